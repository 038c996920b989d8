"""Run a recipe with several settings, each with several seeds, and compare the runs on one page.

    python alignment-handbook/scripts/sweep.py yamls/reward_cpu.yaml --set beta=0.1,0.5 loss_type=NCA,DPO \
        --seeds 3 --output_dir runs/sweep

All combinations of the values are run. A run that is finished is not run again, and one that was killed resumes, so the
command can be stopped and repeated.
"""

import shlex
import sys
from pathlib import Path

from alignment import errors
from alignment.errors import UserError


def main() -> None:
    """Parses, runs, compares."""
    parser = errors.ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file of run_reward.py or run_preference.py")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUES",
                        help="values of keys, key=value,value: all combinations are run")  # fmt: skip
    parser.add_argument("--arm", nargs="+", action="append", default=[], metavar="KEY=VALUE",
                        help="keys that change together, as one arm; may be given several times, and --set multiplies "
                        "each of them")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, help="runs of each arm: the recipe's seed and those after it")
    parser.add_argument("--output_dir", required=True, help="folder of the runs, of what they share, and of sweep.html")
    parser.add_argument("--jobs", type=int, help="runs at a time; None: one a GPU; on a CPU one a core, as far as the "
                        "free memory has room for 2 GB and five times the weights of each")  # fmt: skip
    parser.add_argument("--script", choices=["auto", "run_reward.py", "run_preference.py"], default="auto",
                        help="script of the runs; auto: run_preference.py for losses of two responses, on pairs of the "
                        "best and the worst one, and where make_pairs is set; else run_reward.py")  # fmt: skip
    parser.add_argument("--baseline", help="arm that the others are compared with, by its name; None: the first")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
    args = parser.parse_args()
    if args.seeds < 1 or (args.jobs or 1) < 1:
        raise UserError("--seeds, --jobs: must be at least 1")
    from alignment.report.runs import read_run  # now: it takes seconds
    from alignment.sweep.arms import make_arms
    from alignment.sweep.commands import command, plan_runs
    from alignment.sweep.page import choose_baseline, group_arms, run_line, write_page
    from alignment.sweep.running import environments_of, finish_all

    arms, folder = make_arms(args.recipe, args.set, args.arm, args.script), Path(args.output_dir).resolve()
    recipe, baseline = arms[0].resolved, choose_baseline([arm.name for arm in arms], args.baseline)
    planned = plan_runs(arms, [recipe["seed"] + i for i in range(args.seeds)], folder)
    if args.dry_run:
        return print("\n".join(shlex.join(command(run, folder)) for run in planned))
    environments = environments_of(args.jobs, str(recipe["model_name_or_path"]), bool(recipe.get("use_cpu")))
    print("\n".join(f"{arm.name}: {arm.runs_as}" for arm in arms))
    print(f"{len(planned)} runs, {len(environments)} at a time; what they print: {folder}/*/*/log.txt", flush=True)
    try:
        for number, run in enumerate(finish_all(planned, folder, environments), start=1):
            print(f"{number} of {len(planned)}  {run.name}  {run_line(read_run(run.folder))}", flush=True)
    except KeyboardInterrupt:
        sys.exit("Stopped; the same command goes on where the runs have saved a checkpoint")
    print(f"\n{write_page(group_arms(planned), baseline, folder)}")


if __name__ == "__main__":
    errors.run(main, exit_on_sigterm=True)
