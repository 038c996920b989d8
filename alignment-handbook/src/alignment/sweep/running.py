"""Runs what is not there yet, so many at a time."""

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from alignment.errors import UserError
from alignment.sweep.commands import Planned, command

#: What a process prints, in its folder.
LOG = "log.txt"
#: Memory that a process takes on a CPU: so much, and so many times the bytes of the weights.
_GB, _TIMES_WEIGHTS = 2e9, 5
#: Seconds between looks at the processes, and that a process has to save a checkpoint when it is to end.
_INTERVAL, _TO_END = 0.2, 120


class Started(NamedTuple):
    """A run that is at work: its process, and its index among those that are at work at a time."""

    run: Planned
    process: subprocess.Popen
    place: int


def finish_all(
    planned: Sequence[Planned], shared: Path, environments: Sequence[Mapping[str, str]]
) -> Iterator[Planned]:
    """Runs what is not finished; yields each run when it is, those first that are there already.

    When a run fails none is started any more, those that are at work are waited for, and the error names the first that
    failed. Whatever else ends this ends them too; each saves a checkpoint.

    Args:
        planned: The runs, in the order in which they are started.
        shared: Folder of what the runs share.
        environments: Variables of the processes, by place: as many run at a time as there are places.

    Raises:
        UserError: A run failed, or another process is at work in its folder.
    """
    yield from (run for run in planned if run.is_finished)
    waiting = [run for run in planned if not run.is_finished]
    working: list[Started] = []
    failed: UserError | None = None
    try:
        while waiting or working:
            free = [place for place in range(len(environments)) if place not in [one.place for one in working]]
            for place in free[: len(waiting)]:
                run = waiting.pop(0)
                working.append(Started(run, start(run, shared, environments[place]), place))
            ended = [one for one in working if one.process.poll() is not None]
            for one in ended:
                working.remove(one)
                if one.run.is_finished:
                    yield one.run
                else:
                    failed, waiting = failed or _failure(one), []
            if not ended:
                time.sleep(_INTERVAL)
    finally:
        end(working)
    if failed:
        raise failed


def start(run: Planned, shared: Path, environment: Mapping[str, str]) -> subprocess.Popen:
    """Starts a run. It keeps its log locked, so that no other sweep starts it too while it is at work.

    Raises:
        UserError: Another process is at work in its folder.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / LOG).open("a") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{run.folder}: another process is at work there; wait for it, or end it") from error
        # In a session of its own, so that Ctrl-C reaches it as what saves a checkpoint, see `end`.
        return subprocess.Popen(
            command(run, shared),
            env={"TOKENIZERS_PARALLELISM": "false", **os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def end(working: Sequence[Started]) -> None:
    """Ends processes: each may save a checkpoint first, which it does on SIGTERM."""
    try:
        for one in working:
            one.process.send_signal(signal.SIGTERM)
        for one in working:
            one.process.wait(_TO_END)
    finally:  # too slow, or interrupted again
        for one in working:
            if one.process.poll() is None:
                os.killpg(one.process.pid, signal.SIGKILL)


def environments_of(jobs: int | None, model: str, use_cpu: bool) -> list[dict[str, str]]:
    """Variables of the processes that run at a time: of each on a GPU the GPU, on a CPU its share of the cores.

    Args:
        jobs: How many. None: one a GPU; on a CPU one a core, as far as the free memory has room for 2 GB and five times
            the weights of each, and one where the weights are in no folder here.
        model: Name or folder of the model.
        use_cpu: Whether the runs leave GPUs alone.
    """
    if torch.accelerator.is_available() and not use_cpu:
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        each = [{"CUDA_VISIBLE_DEVICES": name} for name in gpus.split(",") if name] or [{}]  # of another kind: one
        return [each[i % len(each)] for i in range(jobs or len(each))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jobs is None:
        weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
        room = psutil.virtual_memory().available // (_GB + _TIMES_WEIGHTS * weights) if weights else 1
        jobs = max(1, min(cores, int(room)))
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // jobs)))
    return [{"OMP_NUM_THREADS": threads}] * jobs


def _failure(one: Started) -> UserError:
    log = one.run.folder / LOG
    said = log.read_text(errors="replace").strip().splitlines()[-1:]
    return UserError(f"{one.run.name}: ended with code {one.process.returncode} ({log}): {''.join(said)}")
