"""Checkpoints that are complete or absent: written to a temporary folder, hashed, then renamed.

A kill at any moment leaves the folder `_saving` at most, which the next save removes. A machine that loses its power
may leave a corrupt `checkpoint-N`, which its hashes reveal.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import PartialState
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor

from trl_nca.portable import make_portable
from trl_nca.stops import set_stops

logger = logging.getLogger(__name__)

#: In a checkpoint, written last: `{"files": {path: hash}}`.
MARKER = "complete.json"
#: In the output folder: where a checkpoint is written. Uploads to the Hub leave out what begins with an underscore.
STAGING = "_saving"
RESUME_HINT = "the last complete checkpoint is untouched, --resume_from_checkpoint=true resumes from it"
#: In a checkpoint, upstream's state of the Trainer; and the key under which it keeps what was not logged yet.
TRAINER_STATE = "trainer_state.json"
UNLOGGED_STATE = "since_last_log"


class RunStopped(RuntimeError):
    """The run cannot continue. The message says why, and what to do."""


def seal(folder: Path) -> None:
    """Writes the marker of a checkpoint, the hash of each of its files. All is on the disk when this returns."""
    hashes = {str(file.relative_to(folder)): _hash(file, sync=True) for file in _files(folder)}
    marker = folder / MARKER
    marker.write_text(json.dumps({"files": hashes}, indent=2) + "\n")
    for path in (marker, folder):
        _sync(path)


def find_corruption(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None for a complete one."""
    try:
        files = json.loads((folder / MARKER).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no {MARKER}"
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if _hash(file) != expected:
            return f"{name} is not as it was written"
    return None


def find_missing_state(folder: Path) -> str | None:
    """What a checkpoint lacks to train on as if nothing had happened, in words; None where nothing is lacking.

    Without optimizer or schedule, upstream starts them anew and says nothing. (DeepSpeed keeps both in `global_stepN`.)
    """
    if any(folder.glob("global_step*")):
        return None
    missing = [name for name in ("optimizer", "scheduler") if not any(folder.glob(f"{name}*"))]
    return f"it was saved without its {' and '.join(missing)}" if missing else None


@contextmanager
def staged(output_dir: str) -> Iterator[str]:
    """Gives the folder to write checkpoint-N to, on all processes; at the end it is sealed and moved to its place.

    The processes of all machines must see the same `output_dir`.

    Raises:
        RunStopped: It cannot be written. Nothing of it is left, and older checkpoints are untouched.
    """
    folder, state = Path(output_dir) / STAGING, PartialState()
    try:
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)  # what a killed save left
            folder.mkdir(parents=True)
        state.wait_for_everyone()
        yield str(folder)
        state.wait_for_everyone()
        if state.is_main_process:
            (checkpoint,) = folder.iterdir()
            _publish(checkpoint)
    except Exception as error:
        reason = write_error_reason(error, folder)
        shutil.rmtree(folder, ignore_errors=True)
        if reason is None:
            raise
        stopped = RunStopped(f"{output_dir}: a checkpoint cannot be written: {reason}. Fix that; {RESUME_HINT}")
        if not state.is_main_process:  # which may be able to write, and then prints nothing
            logger.error("%s", stopped)
        raise stopped from error
    state.wait_for_everyone()


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Folders checkpoint-N of a run's output folder, complete or not, oldest step first."""
    found = [checkpoint for checkpoint in Path(folder).glob("checkpoint-*") if checkpoint.name[11:].isdigit()]
    return sorted(found, key=lambda checkpoint: int(checkpoint.name[11:]))


def rotate(output_dir: str, limit: int | None, kept: set[str]) -> None:
    """Removes the oldest checkpoints above a limit. (Upstream would take a corrupt one of a later step for the newest.)

    Args:
        output_dir: Folder of the run.
        limit: Checkpoints to keep; None for all.
        kept: Names of those to keep whatever the limit is.
    """
    found = list_checkpoints(output_dir)
    rest = [folder for folder in found if folder.name not in kept]
    removed = Path(output_dir) / STAGING
    with suppress(OSError):
        for folder in rest[: max(len(found) - (limit or len(found)), 0)]:
            removed.mkdir(exist_ok=True)
            folder.rename(removed / folder.name)  # so that a kill between its files leaves no half of it
    shutil.rmtree(removed, ignore_errors=True)


def write_error_reason(error: Exception, folder: Path | None = None) -> str | None:
    """Why files cannot be written, if an error says so; None for any other error.

    Args:
        error: What the writing ended with.
        folder: Where it was to write; it is written to once more where the error, as torch's, does not say why.
    """
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return error.strerror  # and not what the Hub's client says, which is an OSError too
    if isinstance(error, SafetensorError) or "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
        found = re.search(r"(No space left on device|Read-only file system|Disk quota exceeded)", str(error))
        refused = found[0] if found else _try_to_write(folder)
        return refused or f"is the disk full? ({str(error).splitlines()[0]})"
    return None


def _try_to_write(folder: Path | None) -> str | None:
    """What the file system says of a megabyte more in a folder; None if it takes it, or the folder has gone."""
    try:
        if folder:
            (folder / "probe").write_bytes(bytes(2**20))
    except FileNotFoundError:
        return None
    except OSError as refused:
        return refused.strerror
    return None


@torch.no_grad()
def check_weights(trainer: Any) -> None:
    """Checks that the trained weights are finite: a finite step may leave some that are not.

    Raises:
        RunStopped: A weight is not finite, on any process.
    """
    model: nn.Module = trainer.model
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters() if p.requires_grad)
    num_non_finite = sum((~part.isfinite()).sum() for part in parts)
    accelerator = trainer.accelerator
    if accelerator.reduce(torch.as_tensor(num_non_finite, device=accelerator.device)).item():
        raise RunStopped(
            f"Step {trainer.state.global_step}: weights are not finite, and no checkpoint is written of them. Lower "
            f"learning_rate; {RESUME_HINT}"
        )


def _publish(folder: Path) -> None:
    seal(folder)
    target = folder.parent.parent / folder.name
    if target.exists():  # corrupt, or of the same step
        target.rename(folder.with_name("old"))
    folder.rename(target)
    _sync(target.parent)
    shutil.rmtree(folder.parent)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MARKER)


def _hash(file: Path, sync: bool = False) -> str:
    """A hash of the contents, against accidents and not against malice; with `sync`, once they are on the disk."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        if sync:
            os.fsync(stream.fileno())
        while piece := stream.read(2**24):
            digest.update(piece)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AtomicCheckpoints:
    """Mixed into a transformers Trainer, writes its checkpoints by `staged`, with the numbers that are not logged yet.

    Upstream's checkpoint holds weights, optimizer, scheduler, random numbers and position. With the losses and metrics
    since the last logged step too, a resumed run logs next what an uninterrupted run logs.
    """

    _staging: str | None = None  # folder of a checkpoint that is being written

    def store_unlogged_state(self) -> None:
        """Puts the losses and metrics since the last logged step into the state that is saved. Called by all ranks."""
        self.state.stateful_callbacks[UNLOGGED_STATE] = {
            "tr_loss": self.accelerator.gather(self._tr_loss.detach()).mean().item(),
            "last_logged": self._globalstep_last_logged,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items() if values},
        }

    def restore_unlogged_state(self) -> None:
        """Takes them from the checkpoint that the run resumes from; to be called when training begins."""
        stored = self.state.stateful_callbacks.get(UNLOGGED_STATE)
        if stored is None:
            return
        self._tr_loss += stored["tr_loss"]
        self._total_loss_scalar -= stored["tr_loss"]  # train_loss is that of this launch's steps
        self._globalstep_last_logged = stored["last_logged"]
        for name, values in stored["metrics"].items():
            self._metrics["train"][name] += values

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        begin = super()._init_training_state(max_steps, *args)
        # Upstream would train one step more, where all steps are done and the last is inside an epoch.
        return begin if self.state.global_step < max_steps else (self.state.num_train_epochs, 0)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Writes weights and tokenizer, as upstream does for checkpoints and the run's output, for others to read."""
        set_stops(self.accelerator.unwrap_model(self.model), self.processing_class)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            make_portable(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        check_weights(self)
        output_dir, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        self.store_unlogged_state()
        with staged(str(output_dir)) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            best = Path(self.state.best_model_checkpoint or "")
            if best.parent == Path(staging):  # this one: named by the place it is moved to
                self.state.best_model_checkpoint = str(output_dir / best.name)
                if self.args.should_save:
                    self.state.save_to_json(str(best / TRAINER_STATE))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(output_dir / name))
        if self.args.should_save:
            kept = {name, Path(self.state.best_model_checkpoint or "").name}
            rotate(str(output_dir), self.args.save_total_limit, kept)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is not None:  # it is about to move, and an upload takes a while
            return
        tokenizer = self.processing_class
        if self.is_world_process_zero():
            tokenizer.save_pretrained(self.args.output_dir)
            make_portable(self.args.output_dir)
        self.processing_class = None  # else upstream would write the tokenizer again, as it is
        try:
            super()._push_from_checkpoint(checkpoint_folder)
        finally:
            self.processing_class = tokenizer
