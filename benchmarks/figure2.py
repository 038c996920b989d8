"""Figure 2 of the paper, small: does DPO lose the likelihood of the best responses, and does NCA keep it?

    python -m benchmarks.figure2                                           12 runs, then docs/figure2.md
    python -m benchmarks.figure2 --sweep beta=0.1,0.5 num_responses=2,4    ablations, then docs/sweep.md

SmolLM2-135M-Instruct on the embedded data, as pairs (DPO, which is InfoNCA of a pair, and NCA) and as rewards (InfoNCA
and NCA), with the same seeds, steps and held-out prompts. A run that is finished is not run again, one that was killed
resumes, so the command can be stopped and repeated.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from alignment import errors, output
from alignment.data.convert import ConvertConfig, convert
from alignment.errors import UserError
from alignment.recipe import read_yaml
from alignment.report.runs import Run, read_run
from benchmarks import figure2_page

ROOT = Path(__file__).resolve().parent.parent
#: Script and recipe of each form of the data.
SCRIPTS = {
    "pairs": ("run_preference.py", "yamls/preference_cpu.yaml"),
    "rewards": ("run_reward.py", "yamls/reward_cpu.yaml"),
}
TRAINING_ROWS = ROOT / "data/checkable_train.jsonl"
#: What the recipes do not say, or say otherwise; the rest of a run is as `make train` has it. So large a beta brings
#: implicit rewards to where the losses differ in so few steps: near 0 their gradients point the same way.
SETTINGS: dict[str, Any] = {"beta": 0.5, "learning_rate": 3.0e-4, "max_steps": 40}
#: Keys that a sweep may change.
SWEPT = {"beta": float, "alpha": float, "num_responses": int}


@dataclass(frozen=True)
class Arm:
    """A loss on a form of the data; of a sweep, with a key that has another value."""

    data: str
    loss: str
    changed: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Name of its folder."""
        return "-".join([self.data, self.loss, *(f"{key}={value:g}" for key, value in self.changed)])


FIGURE2 = [Arm("pairs", "DPO"), Arm("pairs", "NCA"), Arm("rewards", "InfoNCA"), Arm("rewards", "NCA")]


def sweep_arms(sweep: dict[str, list[Any]]) -> dict[tuple[str, Any, str], Arm]:
    """One key at a time, all others as they are, by key, value and loss; a value that Figure 2 has is run there."""
    own = read_yaml(str(ROOT / SCRIPTS["rewards"][1])) | SETTINGS | {"num_responses": most_responses()}
    return {
        (key, value, loss): Arm("rewards", loss, () if value == own[key] else ((key, value),))
        for key, values in sweep.items()
        for value in values
        for loss in ("InfoNCA", "NCA")
    }


def most_responses() -> int:
    """The largest K of the training rows."""
    with TRAINING_ROWS.open() as rows:
        return max(len(json.loads(row)["responses"]) for row in rows)


def parse_sweep(given: Sequence[str]) -> dict[str, list[Any]]:
    """`beta=0.01,0.1` to {"beta": [0.01, 0.1]}. A `num_responses` beyond the largest K is the largest K: all of them.

    Raises:
        UserError: Not of that form, or a key that cannot be swept.
    """
    sweep = {}
    for item in given:
        key, _, values = item.partition("=")
        if key not in SWEPT:
            raise UserError(f"sweep: {key!r} is none of {', '.join(SWEPT)}; write key=value,value")
        try:
            found = {SWEPT[key](value) for value in values.split(",")}
        except ValueError as error:
            raise UserError(f"sweep: {item!r}: {error}; write {key}=value,value") from error
        if key == "num_responses":
            if min(found) < 2:
                raise UserError(f"sweep: {item!r}: a row has at least 2 responses, not {min(found)}")
            found = {min(value, most_responses()) for value in found}
        sweep[key] = sorted(found)
        if len(found) < 2:
            raise UserError(f"sweep: {item!r} compares nothing; give two values or more")
    return sweep


def settings_of(arm: Arm, seed: int, steps: int, runs: Path) -> dict[str, Any]:
    """The keys of a run that are not the recipe's."""
    settings = SETTINGS | {"loss_type": arm.loss, "seed": seed, "max_steps": steps} | dict(arm.changed)
    if count := settings.pop("num_responses", None):  # of training rows alone: all runs are measured on the same
        settings["train_file"] = str(rows_of(runs, count))
    return settings


def rows_of(runs: Path, num_responses: int) -> Path:
    """File of the training rows with so many responses."""
    return runs / f"train_{num_responses}.jsonl"


def command_of(arm: Arm, settings: dict[str, Any], folder: Path, runs: Path) -> list[str]:
    """The command of a run, which resumes where it was killed."""
    every = settings["max_steps"] // 5 + 1  # the last evaluation is that of the end
    around = {
        "output_dir": folder, "reward_function": "", "eval_steps": every, "eval_prompts_in_training": "",
        "eval_strategy": "no" if arm.changed else "steps",  # of a sweep, the ends alone are drawn
        "logging_steps": max(every // 2, 1), "save_total_limit": 1, "precompute_ref_log_probs": "true",
        "ref_logps_dir": runs / "ref_logps", "per_device_eval_batch_size": 16, "resume_from_checkpoint": "true",
    }  # fmt: skip
    flags = [f"--{key}={value}" for key, value in (settings | around).items()]
    return [sys.executable, *SCRIPTS[arm.data], *flags]


def finish(arm: Arm, seed: int, steps: int, runs: Path, num_threads: int) -> Run:
    """Runs an arm with a seed, unless it is there.

    Raises:
        UserError: The folder holds a run with other settings, or the run failed.
    """
    folder = runs / arm.name / f"seed-{seed}"
    settings = settings_of(arm, seed, steps, runs)
    if output.has_started(str(folder)):
        recipe = read_yaml(str(folder / output.STARTED))
        for key, value in settings.items():
            if recipe.get(key) != value:
                raise UserError(f"{folder}: has {key} {recipe.get(key)}, not {value}; name another folder by --runs")
    if not (folder / output.FINISHED).exists():
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log.txt"
        with log.open("a") as stream:
            threads = {"OMP_NUM_THREADS": str(num_threads)}
            environ = threads | os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            command = command_of(arm, settings, folder, runs)
            code = subprocess.run(command, cwd=ROOT, env=environ, stdout=stream, stderr=stream).returncode
        if not (folder / output.FINISHED).exists():
            said = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"{arm.name}, seed {seed}: ended with code {code} ({log}): {''.join(said)}")
    return read_run(folder)


def prepare_rows(arms: Iterable[Arm], runs: Path) -> None:
    """Training rows with fewer responses, for the arms that ask for them."""
    for count in {value for arm in arms for key, value in arm.changed if key == "num_responses"}:
        file = rows_of(runs, count)
        if not file.exists():
            convert([str(TRAINING_ROWS)], ConvertConfig(output=str(file), num_responses=count))


def finish_all(arms: Iterable[Arm], seeds: Sequence[int], steps: int, runs: Path, jobs: int) -> dict[Arm, list[Run]]:
    """Runs what is not there yet, so many at a time; a line for each run."""
    found: dict[Arm, list[Run]] = {arm: [] for arm in arms}
    prepare_rows(found, runs)
    pairs = [(arm, seed) for seed in seeds for arm in found]
    num_threads = max(1, (os.cpu_count() or 1) // jobs)
    pool, failed = ThreadPoolExecutor(jobs), Event()

    def one(arm: Arm, seed: int) -> Run:
        if failed.is_set():  # runs are begun in this order: the one that failed is named first
            raise RuntimeError("a run before this one failed")
        try:
            return finish(arm, seed, steps, runs, num_threads)
        except BaseException:
            failed.set()
            raise

    try:
        done = pool.map(one, *zip(*pairs, strict=True))
        for number, ((arm, seed), run) in enumerate(zip(pairs, done, strict=True), start=1):
            found[arm].append(run)
            print(
                f"{number} of {len(pairs)}: {arm.name}, seed {seed}: best {run.last('eval_rewards/chosen'):+.3f}, "
                f"margin {run.last('eval_rewards/margins'):+.3f} ({run.results['seconds']:.0f} s)",
                flush=True,
            )
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, none is started
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Runs, then writes the page."""
    parser = errors.ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--steps", type=int, default=SETTINGS["max_steps"], help="optimizer steps of each run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; they share the cores")
    parser.add_argument("--runs", type=Path, default=Path("runs/figure2"), help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the page and its figures")
    parser.add_argument("--sweep", nargs="+", metavar="KEY=VALUES", help=f"ablations over {', '.join(SWEPT)}")
    args = parser.parse_args(argv)
    sweep = parse_sweep(args.sweep or [])
    if min(args.steps, args.jobs) < 1:
        raise UserError("steps, jobs: must be at least 1")
    swept = sweep_arms(sweep)
    arms = swept.values() if sweep else FIGURE2
    found = finish_all(arms, list(dict.fromkeys(args.seeds)), args.steps, args.runs.resolve(), args.jobs)
    given = shlex.join(sys.argv[1:] if argv is None else argv)
    command = f"python -m benchmarks.figure2 {given}" if given else "make figure2"
    if sweep:
        by_value = {place: found[arm] for place, arm in swept.items()}
        page = figure2_page.write_sweep(by_value, command, args.jobs, args.docs)
    else:
        by_loss = {(arm.data, arm.loss): runs for arm, runs in found.items()}
        page = figure2_page.write_figure2(by_loss, command, args.jobs, args.docs)
    print(f"\n{page.read_text()}\npage  {page}")


if __name__ == "__main__":
    errors.run(main)
