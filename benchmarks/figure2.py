"""Figure 2 of the paper, small: does DPO lose the likelihood of the best responses, and does NCA keep it?

    python -m benchmarks.figure2                                           12 runs, then docs/figure2.md
    python -m benchmarks.figure2 --sweep beta=0.1,0.5 num_responses=2,4    ablations, then docs/sweep.md

SmolLM2-135M-Instruct on the embedded data, as pairs (DPO, which is InfoNCA of a pair, and NCA) and as rewards (InfoNCA
and NCA), with the same seeds, steps and held-out prompts. The runs are those of a sweep, see `alignment.sweep`: the
command can be stopped and repeated.
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from alignment import errors
from alignment.errors import UserError
from alignment.recipe import read_yaml
from alignment.report.runs import Run, read_run
from alignment.sweep.arms import PREFERENCE, REWARD, Arm, Settings, make_arm, parse_settings
from alignment.sweep.commands import plan_runs
from alignment.sweep.running import environments_of, finish_all
from benchmarks import figure2_page

ROOT = Path(__file__).resolve().parent.parent
#: Script and recipe of each form of the data.
SCRIPTS = {"pairs": (PREFERENCE, "yamls/preference_cpu.yaml"), "rewards": (REWARD, "yamls/reward_cpu.yaml")}
TRAINING_ROWS = ROOT / "data/checkable_train.jsonl"
MODEL = "models/SmolLM2-135M-Instruct"
#: What the recipes do not say, or say otherwise; the rest of a run is as `make train` has it. So large a beta brings
#: implicit rewards to where the losses differ in so few steps: near 0 their gradients point the same way.
SETTINGS = {"beta": "0.5", "learning_rate": "3.0e-4", "reward_function": "", "eval_prompts_in_training": "",
            "per_device_eval_batch_size": "16", "save_total_limit": "1"}  # fmt: skip
STEPS = 40
FIGURE2 = [("pairs", "DPO"), ("pairs", "NCA"), ("rewards", "InfoNCA"), ("rewards", "NCA")]
#: Keys that a sweep may change.
SWEPT = {"beta": float, "alpha": float, "num_responses": int}


def arm_of(data: str, loss: str, steps: int, changed: Settings | None = None) -> Arm:
    """A loss on a form of the data; of a sweep, with a key that has another value."""
    script, recipe = SCRIPTS[data]
    every = steps // 5 + 1  # the last evaluation is that of the end
    around = {
        "eval_strategy": "no" if changed else "steps",  # of a sweep, the ends alone are drawn
        "eval_steps": str(every), "logging_steps": str(max(every // 2, 1)),
    }  # fmt: skip
    settings = SETTINGS | around | {"loss_type": loss, "max_steps": str(steps)} | dict(changed or {})
    name = "-".join([data, loss, *(f"{key}={value}" for key, value in (changed or {}).items())])
    return make_arm(recipe, name, settings, script)


def sweep_arms(sweep: dict[str, list[float]], steps: int = STEPS) -> dict[figure2_page.Place, Arm]:
    """One key at a time, all others as they are, by key, value and loss; a value that Figure 2 has is run there."""
    own = read_yaml(str(ROOT / SCRIPTS["rewards"][1])) | {"beta": float(SETTINGS["beta"])}
    own["num_responses"] = most_responses()
    return {
        (key, value, loss): arm_of("rewards", loss, steps, {} if value == own[key] else {key: f"{value:g}"})
        for key, values in sweep.items()
        for value in values
        for loss in ("InfoNCA", "NCA")
    }


def most_responses() -> int:
    """The largest K of the training rows."""
    with TRAINING_ROWS.open() as rows:
        return max(len(json.loads(row)["responses"]) for row in rows)


def parse_sweep(given: Sequence[str]) -> dict[str, list[float]]:
    """`beta=0.01,0.1` to {"beta": [0.01, 0.1]}. A `num_responses` beyond the largest K is the largest K: all of them.

    Raises:
        UserError: Not of that form, or a key that cannot be swept.
    """
    sweep: dict[str, list[float]] = {}
    for key, values in parse_settings(given, "--sweep").items():
        if key not in SWEPT:
            raise UserError(f"--sweep: {key!r} is none of {', '.join(SWEPT)}")
        try:
            found = {SWEPT[key](value) for value in values}
        except ValueError as error:
            raise UserError(f"--sweep: {key}={','.join(values)}: {error}") from error
        if key == "num_responses":
            found = {min(value, most_responses()) for value in found}
        if len(found) < 2:
            raise UserError(f"--sweep: {key}={','.join(values)} compares nothing; give two values or more")
        sweep[key] = sorted(found)
    return sweep


def finish(arms: Sequence[Arm], seeds: Sequence[int], runs: Path, jobs: int) -> dict[str, list[Run]]:
    """Runs what is not there yet, with a line for each run; the runs by their arm's name."""
    planned = plan_runs(arms, seeds, runs)
    for number, one in enumerate(finish_all(planned, runs, environments_of(jobs, MODEL, use_cpu=True)), start=1):
        run = read_run(one.folder)
        print(
            f"{number} of {len(planned)}: {one.name}: best {run.last('eval_rewards/chosen'):+.3f}, "
            f"margin {run.last('eval_rewards/margins'):+.3f} ({run.results['seconds']:.0f} s)",
            flush=True,
        )
    return {arm.name: [read_run(one.folder) for one in planned if one.arm is arm] for arm in arms}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs, then writes the page."""
    parser = errors.ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; they share the cores")
    parser.add_argument("--runs", type=Path, default=Path("runs/figure2"), help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the page and its figures")
    parser.add_argument("--sweep", nargs="+", metavar="KEY=VALUES", help=f"ablations over {', '.join(SWEPT)}")
    args = parser.parse_args(argv)
    sweep = parse_sweep(args.sweep or [])
    if min(args.steps, args.jobs) < 1:
        raise UserError("steps, jobs: must be at least 1")
    runs, docs = args.runs.resolve(), args.docs.resolve()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.chdir(ROOT)  # which the paths of the recipes start from
    places = sweep_arms(sweep, args.steps) if sweep else {place: arm_of(*place, args.steps) for place in FIGURE2}
    arms = list({arm.name: arm for arm in places.values()}.values())
    by_name = finish(arms, list(dict.fromkeys(args.seeds)), runs, args.jobs)
    found = {place: by_name[arm.name] for place, arm in places.items()}
    given = shlex.join(sys.argv[1:] if argv is None else argv)
    command = f"python -m benchmarks.figure2 {given}" if given else "make figure2"
    write = figure2_page.write_sweep if sweep else figure2_page.write_figure2
    page = write(found, command, args.jobs, docs)
    print(f"\n{page.read_text()}\npage  {page}")


if __name__ == "__main__":
    errors.run(main, exit_on_sigterm=True)
