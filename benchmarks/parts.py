"""Runs the parts of a benchmark within a given time, each in a process of its own, so that its memory is its own."""

import contextlib
import inspect
import multiprocessing as mp
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

#: A part, from (tiny, device): its result, or an iterator over what it has so far, the last of which is all.
Part = Callable[[bool, str], Any]
#: Seconds before the end in which no part is begun, and in which the last one is stopped.
LAST_START, LAST_END = 90, 30


class Running:
    """A part's process, which imports what it needs and waits to be told to begin."""

    def __init__(self, part: Part, device: str):
        context = mp.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=serve, args=(part, device == "cpu", device, there))
        self.process.start()
        there.close()

    def begin(self) -> None:
        self.began = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it has ended: `finish` says so
            self.pipe.send("begin")

    def stop(self) -> None:
        self.process.kill()
        self.process.join()

    def finish(self, end: float) -> dict[str, Any]:
        """What it has found by its end or at the time `end`, when it is stopped; or why there is nothing."""
        found: dict[str, Any] = {}
        reason = "it took too long"
        with contextlib.suppress(EOFError):  # it has ended
            while self.pipe.poll(max(end - time.monotonic(), 0)):
                found |= self.pipe.recv()
        self.process.join(max(end - time.monotonic(), 0))
        if self.process.exitcode is not None:
            reason = "its process was killed, as for its memory"
        self.stop()
        if self.process.exitcode != 0:
            found["cut" if "result" in found else "not_run"] = reason
        return {"seconds": time.monotonic() - self.began} | found


def serve(part: Part, tiny: bool, device: str, pipe: Connection) -> None:
    """In its process: sends what a part finds, once it is told to begin."""
    pipe.recv()
    began = time.monotonic()
    try:
        found = part(tiny, device)
        for result in found if inspect.isgenerator(found) else [found]:
            pipe.send({"result": result, "seconds": time.monotonic() - began})
    except Exception as error:  # the other parts are still to come
        traceback.print_exc()
        said = str(error).partition("\n")[0]
        pipe.send({"not_run": f"{type(error).__name__}: {said}"})


def run_parts(
    parts: Mapping[str, Part],
    untimed: Sequence[str],
    device: str,
    done: Callable[[str, dict[str, Any]], None],
    seconds: float,
) -> None:
    """Runs the parts one after the other, first those of `untimed` side by side.

    Args:
        parts: The parts by name.
        untimed: Names of those whose figures are no times.
        device: "cuda" or "cpu", which is a rehearsal at a tiny size.
        done: Is told of each part's name and what was found, as it comes.
        seconds: In which all ends.
    """
    started = time.monotonic()
    together = [name for name in parts if name in untimed]
    waves = [together, *([name] for name in parts if name not in untimed)]
    waiting: dict[str, Running] = {}
    for names, later in zip(waves, [*waves[1:], []], strict=True):
        running = waiting or {name: Running(parts[name], device) for name in names}
        waiting = {name: Running(parts[name], device) for name in later}  # they import meanwhile
        if time.monotonic() - started > seconds - LAST_START:
            for name, part in running.items():
                part.stop()
                done(name, {"not_run": "no time was left"})
            continue
        for part in running.values():
            part.begin()
        for name, part in running.items():
            done(name, part.finish(started + seconds - LAST_END))
