"""Make the report on a run again, or put runs side by side: NCA, InfoNCA and DPO in the same figures.

    python alignment-handbook/scripts/report.py runs/reward_cpu
    python alignment-handbook/scripts/report.py runs/nca runs/infonca runs/dpo --output runs/comparison.html
    python alignment-handbook/scripts/report.py runs/sweep/* --figures paper/figures --format pdf

A RUN is an output folder of run_reward.py or run_preference.py, finished or not. Runs that differ in their seed alone
are one group: a mean, a band, an interval over the seeds. One run's report goes into its folder (report.html,
figures/); the table is printed in all cases.
"""

from pathlib import Path

from alignment import errors
from alignment.errors import UserError


def main() -> None:
    """Reads the folders, writes the page, prints the table."""
    parser = errors.ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders")
    parser.add_argument("--output", help="page to write; None: comparison.html beside the first of several")
    parser.add_argument("--figures", help="folder for the figures, numbers.csv and groups.csv; None: not written")
    parser.add_argument("--format", choices=["png", "pdf", "svg"], default="png", help="format of these figures")
    args = parser.parse_args()
    from alignment.report.figures import draw_all, save_all  # now: it takes seconds
    from alignment.report.groups import group_runs
    from alignment.report.html import REPORT, report_comparison, report_run
    from alignment.report.numbers import write_numbers
    from alignment.report.runs import read_runs
    from alignment.report.tables import runs_table

    groups = group_runs(read_runs(args.runs))
    is_single = len(args.runs) == 1
    first = Path(args.runs[0])
    file = Path(args.output or (first / REPORT if is_single else first.parent / "comparison.html"))
    try:
        if is_single and args.output is None:
            report_run(args.runs[0])
        else:
            report_comparison(groups, file)
        if args.figures:
            save_all(draw_all(groups), Path(args.figures), [group.name for group in groups], args.format)
            write_numbers(groups, Path(args.figures))
    except OSError as error:
        place = error.filename or file
        raise UserError(
            f"{place}: cannot be written ({error.strerror}); name another by --output or --figures"
        ) from error
    print(runs_table(groups))
    print(f"report  {file}" + (f", figures {args.figures}" if args.figures else ""))


if __name__ == "__main__":
    errors.run(main)
