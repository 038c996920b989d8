"""Checkpoints on disk that are complete or absent: written beside, sealed with hashes, then renamed.

A kill at any moment leaves the folder `_saving` at most, which the next save removes. A machine that loses its power
may leave a torn `checkpoint-N`, which its hashes tell.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash
from accelerate import PartialState
from safetensors import SafetensorError

logger = logging.getLogger(__name__)

#: In a checkpoint, written last: `{"files": {path: hash}}`.
MARKER = "complete.json"
#: In the output folder: where a checkpoint is written. Uploads to the Hub leave out what begins with an underscore.
STAGING = "_saving"
GO_ON = "the last complete checkpoint is untouched, --resume_from_checkpoint=true goes on from it"


class RunStopped(RuntimeError):
    """The run cannot go on. The message says why, and what to do."""


def seal(folder: Path) -> None:
    """Writes the marker of a checkpoint: the hash of each of its files. All is on the disk when this returns."""
    hashes = {str(file.relative_to(folder)): _hash(file, sync=True) for file in _files(folder)}
    marker = folder / MARKER
    marker.write_text(json.dumps({"files": hashes}, indent=2) + "\n")
    for path in (marker, folder):
        _sync(path)


def why_torn(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None for a complete one."""
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


@contextmanager
def staged(output_dir: str) -> Iterator[str]:
    """Where to write a checkpoint-N, on all processes; at the end it is sealed, and moved to the output folder.

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
        shutil.rmtree(folder, ignore_errors=True)
        reason = why_unwritable(error)
        if reason is None:
            raise
        stopped = RunStopped(f"{output_dir}: a checkpoint cannot be written: {reason}. Mend that; {GO_ON}")
        if not state.is_main_process:  # which may be able to write, and then has nothing to say
            logger.error("%s", stopped)
        raise stopped from error
    state.wait_for_everyone()


def rotate(output_dir: str, limit: int | None, kept: set[str]) -> None:
    """Removes the oldest checkpoints above a limit. (Upstream would take a torn one of a later step for the newest.)

    Args:
        output_dir: Folder of the run.
        limit: Checkpoints to keep; None for all.
        kept: Names of those to keep whatever the limit is.
    """
    found = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.name[11:].isdigit()]
    rest = sorted((folder for folder in found if folder.name not in kept), key=lambda folder: int(folder.name[11:]))
    for folder in rest[: max(len(found) - (limit or len(found)), 0)]:
        shutil.rmtree(folder, ignore_errors=True)


def why_unwritable(error: Exception) -> str | None:
    """What keeps files from being written, if that is what an error says; None for any other error."""
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return error.strerror  # and not what the Hub's client says, which is an OSError too
    if isinstance(error, SafetensorError) or "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
        found = re.search(r"(No space left on device|Read-only file system|Disk quota exceeded)", str(error))
        return found[0] if found else f"is the disk full? ({str(error).splitlines()[0]})"
    return None


def _publish(folder: Path) -> None:
    seal(folder)
    target = folder.parent.parent / folder.name
    if target.exists():  # torn, or of the same step
        target.rename(folder.with_name("old"))
    folder.rename(target)
    _sync(target.parent)
    shutil.rmtree(folder.parent)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MARKER)


def _hash(file: Path, sync: bool = False) -> str:
    """Of the contents; against accidents, not against malice. With `sync`, once they are on the disk."""
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
