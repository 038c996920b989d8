"""The runs of a sweep: their folders, their commands, and what a folder holds already."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment import output
from alignment.errors import UserError
from alignment.files import read_json, shipped
from alignment.recipe import read_yaml
from alignment.report.runs import ENVIRONMENT
from alignment.sweep.arms import OWN_KEYS, Arm, as_flags

#: Keys that a sweep or a run sets otherwise than the recipe, and that do not change what is learned.
_NOT_COMPARED = (*OWN_KEYS, "eval_strategy", "push_to_hub", "precompute_ref_log_probs", "save_total_limit")


@dataclass(frozen=True)
class Planned:
    """A run of a sweep.

    Attributes:
        arm: Its settings.
        seed: Its seed.
        folder: Its output folder.
    """

    arm: Arm
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """Names it in messages."""
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return (self.folder / output.FINISHED).exists()


def plan_runs(arms: Sequence[Arm], seeds: Sequence[int], folder: Path) -> list[Planned]:
    """All runs in the order in which they are started: a whole seed before the next one.

    Raises:
        UserError: The folder of a run holds one with other settings.
    """
    planned = [Planned(arm, seed, folder / arm.name / f"seed-{seed}") for seed in seeds for arm in arms]
    for run in planned:
        _check_folder(run)
    return planned


def command(run: Planned, shared: Path) -> list[str]:
    """The command of a run, which resumes where it was killed.

    Args:
        run: The run.
        shared: Folder of what the runs share.
    """
    around = {
        "precompute_ref_log_probs": "true",
        "ref_logps_dir": shared / "ref_logps",
        "push_to_hub": "false",
        "overwrite_output_dir": "false",
        "resume_from_checkpoint": "true",
    }
    if run.arm.resolved.get("reward_function"):
        around["samples_before_dir"] = shared / "samples_before"
    settings = around | dict(run.arm.settings) | {"seed": run.seed, "output_dir": run.folder}
    return [sys.executable, str(shipped(run.arm.script)), run.arm.recipe, *as_flags(settings)]


def _check_folder(run: Planned) -> None:
    if not output.has_started(str(run.folder)):
        return
    recipe = read_yaml(str(run.folder / output.STARTED))
    environment = read_json(run.folder / ENVIRONMENT) or {}
    for key, value in _expected(run, environment.get("given", ())).items():
        if recipe.get(key) != value:
            raise UserError(
                f"{run.folder}: has {key} {recipe.get(key)}, not {value}: it is a run with other settings; name "
                "another folder, or remove that one"
            )
    started_by = environment.get("command", run.arm.script)
    if run.arm.script not in started_by:
        raise UserError(f"{run.folder}: is not a run of {run.arm.script} ({started_by}); name another folder")


def _expected(run: Planned, given: Sequence[str]) -> Mapping[str, Any]:
    """What the recipe in the run's folder must say, of all that was given when it was started, or is now."""
    keys = (run.arm.given | run.arm.resolved.keys() & set(given)) - {*_NOT_COMPARED}
    return {key: run.arm.resolved.get(key) for key in sorted(keys)} | {"seed": run.seed}
