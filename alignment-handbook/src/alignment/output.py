"""The output folder of a run: what an earlier run left there, and the files that this one writes."""

import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from alignment.errors import UserError
from alignment.files import write_json, write_text
from alignment.recipe import PLAN_KEYS
from trl_nca.checkpoints import find_corruption, find_missing_state, list_checkpoints

logger = logging.getLogger(__name__)

#: Written last, so it tells a finished run from an unfinished one.
FINISHED = "train_results.json"
#: Written once the trainer stands: a mistake before leaves nothing behind.
STARTED = "recipe.yaml"
_WRITTEN = (
    f"{STARTED} plan.json data_report.json samples_before.json samples_after.json trainer_state.json eval_results.json "
    f"{FINISHED} held_out.json environment.json report.html README.md"
).split()


def resume_point(output_dir: str, resume: str | None, overwrite: bool) -> str | None:
    """The checkpoint to resume from, or None for a run from the start.

    `true` is the newest complete checkpoint, or the start where there is none: a run that dies may die before its
    first, and the launcher that starts it again need not look.

    Args:
        output_dir: Folder of the run; it need not exist.
        resume: The key `resume_from_checkpoint`: true, false, or the path of a checkpoint.
        overwrite: The key `overwrite_output_dir`.

    Raises:
        UserError: The folder cannot be written, holds a finished run, or an unfinished one without being asked to
            resume it, or the checkpoint is missing, corrupt, or without its optimizer.
    """
    folder = Path(output_dir)
    _check_writable(folder)
    requested = None if resume is None or resume.lower() == "false" else resume
    if requested and overwrite:
        raise UserError("overwrite_output_dir and resume_from_checkpoint contradict each other; give one of them")
    if requested and requested.lower() != "true":
        if not (Path(requested) / "trainer_state.json").is_file():
            raise UserError(
                f"resume_from_checkpoint: {requested} holds no checkpoint; give a folder checkpoint-N, or true"
            )
        if corruption := find_corruption(Path(requested)):
            raise UserError(
                f"resume_from_checkpoint: {requested} is corrupt: {corruption}; give another, or true for the newest"
            )
        _check_state(Path(requested))
        return requested
    found = list_checkpoints(folder)
    if requested:
        for checkpoint in reversed(found):
            if (corruption := find_corruption(checkpoint)) is None:
                _check_state(checkpoint)
                logger.warning("Resuming from %s", checkpoint)
                return str(checkpoint)
            logger.warning("!!! %s is skipped, it is corrupt: %s", checkpoint, corruption)
        logger.warning("!!! No complete checkpoint in %s: the run starts from the beginning", output_dir)
        return None
    if overwrite:
        return None
    if (folder / FINISHED).exists():
        raise UserError(f"output_dir: {output_dir} holds a finished run; give another, or --overwrite_output_dir")
    if found:
        raise UserError(
            f"output_dir: {output_dir} holds an unfinished run; resume it with --resume_from_checkpoint=true, or start "
            "anew with --overwrite_output_dir"
        )
    return None


def check_kind(checkpoint: str, use_peft: bool) -> None:
    """Ends a run that would resume an adapter's training from whole weights, or the other way round.

    Raises:
        UserError: The checkpoint is of the other kind.
    """
    whole = any(Path(checkpoint).glob("model*.safetensors"))
    adapter = (Path(checkpoint) / "adapter_config.json").is_file()
    if (use_peft and whole and not adapter) or (adapter and not use_peft):
        kind = "an adapter" if adapter else "a whole model"
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} holds {kind}, and the recipe says use_peft: {str(use_peft).lower()};"
            " resume with the recipe that it was begun with"
        )


def has_started(output_dir: str) -> bool:
    """Whether a run has written its recipe there."""
    return (Path(output_dir) / STARTED).is_file()


def make_folder(output_dir: str) -> None:
    """Makes the folder if it is not there.

    Raises:
        UserError: It cannot be made.
    """
    _check_writable(Path(output_dir))
    Path(output_dir).mkdir(parents=True, exist_ok=True)


def resolve(configs: Sequence[Any]) -> dict[str, Any]:
    """The recipe with all its defaults, as plain values. It can be run again, and holds no token."""
    resolved: dict[str, Any] = {}
    for config in configs:
        as_given = config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config)
        resolved |= {key: value for key, value in as_given.items() if value not in (None, [], {})}
    given = resolved.pop("given", ())
    launch_keys = ("overwrite_output_dir", "resume_from_checkpoint", "hub_token", *PLAN_KEYS)
    # transformers' other names of gradient_checkpointing and its kwargs, which it sets to the same and then prefers: a
    # `--gradient_checkpointing` on a recipe with both would do nothing.
    same_twice = ("activation_checkpointing", "activation_checkpointing_kwargs")
    for key in (*launch_keys, *same_twice):
        resolved.pop(key, None)
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if "global_batch_size" in resolved and key not in given:
            del resolved[key]  # it follows, on another number of GPUs too
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
    output_dir: str,
    recipe: dict[str, Any],
    plan: dict[str, Any],
    data_report: dict[str, Any],
    overwrite: bool,
    notes: Sequence[str] = (),
) -> None:
    """Makes the folder, clears an earlier run's files if asked, and writes resolved recipe, plan and data report.

    `notes` are comments above the recipe: what its `auto` came to.
    """
    folder = Path(output_dir)
    if overwrite and folder.is_dir():
        for checkpoint in list_checkpoints(folder):
            shutil.rmtree(checkpoint)
        for name in _WRITTEN:
            (folder / name).unlink(missing_ok=True)
        for events in folder.glob("runs/*/events.out.tfevents.*"):  # TensorBoard would draw both runs as one
            events.unlink()
        shutil.rmtree(folder / "figures", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "plan.json", plan)
    write_json(folder / "data_report.json", data_report)
    comments = "".join(f"# {' '.join(note.split())}\n" for note in notes)
    write_text(folder / STARTED, comments + yaml.safe_dump(recipe, sort_keys=False))


def finish(output_dir: str, results: dict[str, Any]) -> None:
    """Writes the results; from then on the folder holds a finished run."""
    folder = Path(output_dir)
    write_json(folder / "eval_results.json", {key: results[key] for key in ("eval", "samples")})
    write_json(folder / FINISHED, results)


def _check_state(checkpoint: Path) -> None:
    if missing := find_missing_state(checkpoint):
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} cannot be resumed from: {missing} (as save_only_model: true does); "
            "start anew with --overwrite_output_dir=true, or from its weights with model_name_or_path"
        )


def _check_writable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file; name a folder")
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise UserError(f"output_dir: {folder} cannot be written ({existing} is read-only); name another folder")
