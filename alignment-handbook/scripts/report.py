"""Make the report on a run again, or put runs side by side: NCA, InfoNCA and DPO in the same figures.

    python alignment-handbook/scripts/report.py runs/reward_cpu
    python alignment-handbook/scripts/report.py runs/nca runs/infonca runs/dpo --output runs/comparison.html

A RUN is an output folder of run_reward.py or run_preference.py, finished or not. One run's report goes into its folder
(report.html, figures/); the table is printed in both cases.
"""

from pathlib import Path

from alignment import errors
from alignment.errors import UserError
from alignment.report.html import REPORT, report_comparison, report_run
from alignment.report.runs import read_runs
from alignment.report.tables import runs_table


def main() -> None:
    """Reads the folders, writes the page, prints the table."""
    parser = errors.ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders")
    parser.add_argument("--output", help="page to write; None: comparison.html beside the first of several")
    args = parser.parse_args()
    runs = read_runs(args.runs)
    try:
        if len(runs) == 1 and args.output is None:
            file = Path(args.runs[0]) / REPORT
            report_run(args.runs[0])
        else:
            file = Path(args.output or Path(args.runs[0]).parent / "comparison.html")
            report_comparison(runs, file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); name another file by --output") from error
    print(runs_table(runs))
    print(f"report  {file}")


if __name__ == "__main__":
    errors.run(main)
