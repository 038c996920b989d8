"""The output folder of a run: what an earlier run left there, and the files this one writes."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from alignment.errors import UserError

#: Written last, so it tells a finished run from an unfinished one.
FINISHED = "train_results.json"
#: Written first, once the trainer stands: a mistake before leaves nothing behind.
STARTED = "recipe.yaml"
_WRITTEN = (
    f"{STARTED} plan.json data_report.json samples_before.json samples_after.json trainer_state.json eval_results.json "
    f"{FINISHED} README.md"
).split()


def resume_point(output_dir: str, resume: str | None, overwrite: bool) -> str | None:
    """Where to go on: a checkpoint, or None for a run from the start.

    Args:
        output_dir: Folder of the run; it need not exist.
        resume: The key `resume_from_checkpoint`: true, false, or the path of a checkpoint.
        overwrite: The key `overwrite_output_dir`.

    Raises:
        UserError: The folder holds a finished run, or an unfinished one that was not asked to go on, or the
            checkpoint is not there.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {output_dir} is a file; name a folder")
    asked = None if resume is None or resume.lower() == "false" else resume
    if asked and overwrite:
        raise UserError("overwrite_output_dir and resume_from_checkpoint contradict each other; give one of them")
    if asked and asked.lower() != "true":
        if not (Path(asked) / "trainer_state.json").is_file():
            raise UserError(f"resume_from_checkpoint: {asked} holds no checkpoint; give a folder checkpoint-N, or true")
        return asked
    checkpoints = _checkpoints(folder)
    if asked:
        if not checkpoints:
            raise UserError(f"resume_from_checkpoint: no checkpoint-N in {output_dir}; leave the key out to start anew")
        return str(checkpoints[-1])
    if overwrite:
        return None
    if (folder / FINISHED).exists():
        raise UserError(f"output_dir: {output_dir} holds a finished run; give another, or --overwrite_output_dir")
    if checkpoints:
        raise UserError(
            f"output_dir: {output_dir} holds an unfinished run; go on with --resume_from_checkpoint=true, or start "
            "anew with --overwrite_output_dir"
        )
    return None


def has_started(output_dir: str) -> bool:
    """Whether a run has written its recipe there."""
    return (Path(output_dir) / STARTED).is_file()


def start(
    output_dir: str, configs: Sequence[Any], plan: dict[str, Any], data_report: dict[str, Any], overwrite: bool
) -> None:
    """Makes the folder, clears an earlier run's files if asked, and writes resolved recipe, plan and data report."""
    folder = Path(output_dir)
    if overwrite and folder.is_dir():
        for checkpoint in _checkpoints(folder):
            shutil.rmtree(checkpoint)
        for name in _WRITTEN:
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    resolved: dict[str, Any] = {}
    for config in configs:
        as_given = config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config)
        resolved |= {key: value for key, value in as_given.items() if value not in (None, [], {})}
    given = resolved.pop("given", ())
    for key in ("overwrite_output_dir", "resume_from_checkpoint"):  # of that launch, not of the run
        resolved.pop(key, None)
    if "global_batch_size" in resolved and "gradient_accumulation_steps" not in given:
        del resolved["gradient_accumulation_steps"]  # it follows, on another number of GPUs too
    (folder / STARTED).write_text(yaml.safe_dump(json.loads(json.dumps(resolved, default=str)), sort_keys=False))
    write_json(output_dir, "plan.json", plan)
    write_json(output_dir, "data_report.json", data_report)


def finish(output_dir: str, results: dict[str, Any]) -> None:
    """Writes the results; from then on the folder holds a finished run."""
    write_json(output_dir, "eval_results.json", {key: results[key] for key in ("eval", "samples")})
    write_json(output_dir, FINISHED, results)


def write_json(output_dir: str, name: str, value: Any) -> None:
    """Writes a file of the output folder."""
    (Path(output_dir) / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(output_dir: str, name: str) -> Any | None:
    """Reads a file of the output folder; None if it is not there."""
    path = Path(output_dir) / name
    return json.loads(path.read_text()) if path.is_file() else None


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [c for c in folder.glob("checkpoint-*") if c.name[11:].isdigit() and (c / "trainer_state.json").is_file()]
    return sorted(found, key=lambda c: int(c.name[11:]))
