"""The output folder of a run: what an earlier run left there, and the files this one writes."""

import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from alignment.errors import UserError
from alignment.recipe import PLAN_KEYS

logger = logging.getLogger(__name__)

#: Written last, so it tells a finished run from an unfinished one.
FINISHED = "train_results.json"
#: Written once the trainer stands: a mistake before leaves nothing behind.
STARTED = "recipe.yaml"
_WRITTEN = (
    f"{STARTED} plan.json data_report.json samples_before.json samples_after.json trainer_state.json eval_results.json "
    f"{FINISHED} held_out.json report.html README.md"
).split()


def resume_point(
    output_dir: str, resume: str | None, overwrite: bool, why_torn: Callable[[Path], str | None]
) -> str | None:
    """Where to go on: a checkpoint, or None for a run from the start.

    `true` is the newest complete checkpoint, or the start where there is none: a run that dies may die before its
    first, and what launches it again need not look.

    Args:
        output_dir: Folder of the run; it need not exist.
        resume: The key `resume_from_checkpoint`: true, false, or the path of a checkpoint.
        overwrite: The key `overwrite_output_dir`.
        why_torn: What is wrong with a checkpoint; None for a complete one.

    Raises:
        UserError: The folder cannot be written, holds a finished run, or an unfinished one that was not asked to go on,
            or the checkpoint is not there or torn.
    """
    folder = Path(output_dir)
    _check_writable(folder)
    asked = None if resume is None or resume.lower() == "false" else resume
    if asked and overwrite:
        raise UserError("overwrite_output_dir and resume_from_checkpoint contradict each other; give one of them")
    if asked and asked.lower() != "true":
        if not (Path(asked) / "trainer_state.json").is_file():
            raise UserError(f"resume_from_checkpoint: {asked} holds no checkpoint; give a folder checkpoint-N, or true")
        if torn := why_torn(Path(asked)):
            raise UserError(f"resume_from_checkpoint: {asked} is torn: {torn}; give another, or true for the newest")
        return asked
    found = _checkpoints(folder)
    if asked:
        for checkpoint in reversed(found):
            if (torn := why_torn(checkpoint)) is None:
                logger.warning("Going on from %s", checkpoint)
                return str(checkpoint)
            logger.warning("!!! %s is passed over, it is torn: %s", checkpoint, torn)
        logger.warning("!!! No complete checkpoint in %s: the run starts from the beginning", output_dir)
        return None
    if overwrite:
        return None
    if (folder / FINISHED).exists():
        raise UserError(f"output_dir: {output_dir} holds a finished run; give another, or --overwrite_output_dir")
    if found:
        raise UserError(
            f"output_dir: {output_dir} holds an unfinished run; go on with --resume_from_checkpoint=true, or start "
            "anew with --overwrite_output_dir"
        )
    return None


def has_started(output_dir: str) -> bool:
    """Whether a run has written its recipe there."""
    return (Path(output_dir) / STARTED).is_file()


def make_folder(output_dir: str) -> None:
    """Makes the folder where it is not there.

    Raises:
        UserError: It cannot be.
    """
    _check_writable(Path(output_dir))
    Path(output_dir).mkdir(parents=True, exist_ok=True)


def resolve(configs: Sequence[Any]) -> dict[str, Any]:
    """The recipe with all its defaults, as plain values; it can be run again, and holds no token."""
    resolved: dict[str, Any] = {}
    for config in configs:
        as_given = config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config)
        resolved |= {key: value for key, value in as_given.items() if value not in (None, [], {})}
    given = resolved.pop("given", ())
    of_launch = ("overwrite_output_dir", "resume_from_checkpoint", "hub_token", *PLAN_KEYS)
    for key in of_launch:  # and not of the run
        resolved.pop(key, None)
    if "global_batch_size" in resolved and "gradient_accumulation_steps" not in given:
        del resolved["gradient_accumulation_steps"]  # it follows, on another number of GPUs too
    return _without_secrets(json.loads(json.dumps(resolved, default=str)))


def _without_secrets(value: Any) -> Any:
    """A JSON value without the keys, at any depth, that hold a credential."""
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    if not isinstance(value, dict):
        return value
    is_secret = re.compile(r"(^|_)(token|password|secret|api_key)$")
    return {key: _without_secrets(item) for key, item in value.items() if not is_secret.search(key)}


def start(
    output_dir: str, recipe: dict[str, Any], plan: dict[str, Any], data_report: dict[str, Any], overwrite: bool
) -> None:
    """Makes the folder, clears an earlier run's files if asked, and writes resolved recipe, plan and data report."""
    folder = Path(output_dir)
    if overwrite and folder.is_dir():
        for checkpoint in _checkpoints(folder):
            shutil.rmtree(checkpoint)
        for name in _WRITTEN:
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "figures", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(output_dir, "plan.json", plan)
    write_json(output_dir, "data_report.json", data_report)
    write_text(folder / STARTED, yaml.safe_dump(recipe, sort_keys=False))


def finish(output_dir: str, results: dict[str, Any]) -> None:
    """Writes the results; from then on the folder holds a finished run."""
    write_json(output_dir, "eval_results.json", {key: results[key] for key in ("eval", "samples")})
    write_json(output_dir, FINISHED, results)


def write_json(output_dir: str, name: str, value: Any) -> None:
    """Writes a file of the output folder, whole or not at all."""
    write_text(Path(output_dir) / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(output_dir: str, name: str) -> Any | None:
    """Reads a file of the output folder; None if it is not there."""
    path = Path(output_dir) / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _check_writable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file; name a folder")
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise UserError(f"output_dir: {folder} cannot be written ({existing} is read-only); name another folder")


def _checkpoints(folder: Path) -> list[Path]:
    """Folders checkpoint-N, oldest first."""
    found = [checkpoint for checkpoint in folder.glob("checkpoint-*") if checkpoint.name[11:].isdigit()]
    return sorted(found, key=lambda checkpoint: int(checkpoint.name[11:]))
