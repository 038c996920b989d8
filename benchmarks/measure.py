"""Measures the steps of systems: each in a process of its own, on the same rows."""

import contextlib
import gc
import multiprocessing as mp
import resource
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.flops import count_flops, matmul_rate, model_flops
from benchmarks.rows import Case, tiny_row
from benchmarks.systems import SYSTEMS, System, load_model

Rows = list[dict[str, Any]]


class Worker:
    """A system in a process of its own, so that its peak of memory is its own. It begins with its imports alone."""

    def __init__(self, system: str, case: Case, model_name: str, device: str):
        context = mp.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, system, case, model_name, device), daemon=True)
        self.process.start()
        there.close()

    def answer(self) -> dict[str, Any]:
        """What it sends next."""
        try:
            return self.pipe.recv()
        except EOFError:
            return {"failed": "its process was killed, as for its memory"}

    def stop(self) -> None:
        """Ends it, and waits until its memory is free."""
        with contextlib.suppress(BrokenPipeError):  # one that failed has ended by itself
            self.pipe.send(None)
        self.process.join()


def serve(pipe: Connection, system: str, case: Case, model_name: str, device: str) -> None:
    """A worker: for each list of rows sends back the seconds of a step and the peak so far; what fails is sent too.

    It first takes the longest rows, which its setting must fit, and rows to choose the setting by.
    """
    longest, typical = pipe.recv()
    try:
        runner = SYSTEMS[system](load_model(model_name, case, device), case, device)
        step = stepper(runner, case, device)
        step([tiny_row(case)] * case.prompts)
        tried = choose_setting(runner, step, longest, typical)
        gc.collect()
        memory, setting = Memory(device), runner.setting
        given = {"given": runner.given, "checkpointing": setting.checkpointing, "tried": tried}
        pipe.send({"flops": count_flops(runner.model), "base": memory.base} | given)
        while (rows := pipe.recv()) is not None:
            rows = runner.ready(rows)
            start = time.perf_counter()
            step(rows)
            pipe.send({"seconds": time.perf_counter() - start, "peak": memory.peak()})
    except Exception as error:  # the other systems are still to come
        traceback.print_exc()
        pipe.send({"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"})


def choose_setting(runner: System, step: Callable[[Rows], None], longest: Rows, typical: Rows) -> dict[str, Any]:
    """Gives a system the fastest of its settings in which the longest rows fit; returns the seconds of each.

    The longest rows are run whatever there is to choose: the steps that are timed then find the allocator's memory.
    """
    if len(runner.settings) == 1:
        step(runner.ready(longest))
        return {}
    seconds = {}
    for setting in runner.settings:
        runner.use(setting)
        seconds[setting] = _seconds(step, runner.ready(longest), runner.ready(typical))
        if seconds[setting] is None:
            runner.model.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()
    runner.use(min((s for s in seconds if seconds[s] is not None), key=seconds.__getitem__))
    return {str(setting): taken or "out of memory" for setting, taken in seconds.items()}


def _seconds(step: Callable[[Rows], None], longest: Rows, typical: Rows) -> float | None:
    """Seconds of a step on typical rows, after one on the longest; None where memory does not suffice."""
    try:
        step(longest)
        start = time.perf_counter()
        step(typical)
    except torch.OutOfMemoryError:
        return None
    return time.perf_counter() - start


def stepper(runner: System, case: Case, device: str) -> Callable[[list[dict[str, Any]]], None]:
    """An optimizer step of a system, which returns when it is done."""
    optimizer = make_optimizer(runner.model, case)

    def step(rows: list[dict[str, Any]]) -> None:
        runner.backward(rows)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def measure(case: Case, rows: Rows, model_name: str, device: str) -> dict[str, Any]:
    """Runs the systems of a case, step by step of these rows.

    On a CPU in turn, so that a busy machine slows all of them; on a GPU one after the other, alone with its memory.
    """
    workers = {system: Worker(system, case, model_name, device) for system in case.systems}
    turns = [[system] for system in workers] if device == "cuda" else [list(workers)]
    found: dict[str, dict[str, Any]] = {}
    rates: list[float] = []
    for turn in turns:
        found |= _take_turn({system: workers[system] for system in turn}, case, rows, device, rates)
    rate = statistics.median(rates)
    results = {system: _figures(system, found, case, rows, rate) for system in workers}
    return {"case": asdict(case), "matmul_gflops": rate / 1e9, "systems": results}


def _take_turn(
    workers: dict[str, Worker], case: Case, rows: Rows, device: str, rates: list[float]
) -> dict[str, dict[str, Any]]:
    """What is found of systems that run in turn; to `rates` the matrix products of the rounds are added."""
    longest = sorted(rows, key=lambda row: len(row["prompt_ids"]) + max(map(len, row["response_ids"])))
    first = rows[: case.prompts]
    found = _ask(workers, (longest[-case.prompts :], first))
    _ask(_well(workers, found), first)  # not counted: the allocator gets its memory from the system
    for figures in found.values():
        figures["seconds"] = []
    for at in range(0, len(rows), case.prompts):
        rates.append(matmul_rate(device, case.precision))
        for system, worker in _well(workers, found).items():  # one after the other: they share the machine
            answer = _ask({system: worker}, rows[at : at + case.prompts])[system]
            found[system] |= answer | {"seconds": [*found[system]["seconds"], answer.get("seconds")]}
    for worker in workers.values():
        worker.stop()
    return found


def _well(workers: dict[str, Worker], found: dict[str, dict[str, Any]]) -> dict[str, Worker]:
    return {system: worker for system, worker in workers.items() if "failed" not in found[system]}


def _ask(workers: dict[str, Worker], what: Any) -> dict[str, dict[str, Any]]:
    for worker in workers.values():
        worker.pipe.send(what)
    return {system: worker.answer() for system, worker in workers.items()}


def _figures(system: str, found: dict[str, dict[str, Any]], case: Case, rows: Rows, rate: float) -> dict[str, Any]:
    """What is reported of a system; ratios are to the last one of the case, which is ours."""
    mine, ours = found[system], found[case.systems[-1]]
    if "failed" in mine or "failed" in ours:
        return {"failed": mine.get("failed", "ours failed")}
    seconds, cached = mine["seconds"], "cached" in system
    products = model_flops(rows, mine["flops"], cached), model_flops(rows, mine["flops"], cached, mine["checkpointing"])
    return {
        "given": mine["given"],
        "tried": mine["tried"],
        "seconds": seconds,
        "seconds_per_step": statistics.median(seconds),
        "response_tokens_per_second": sum(len(r) for row in rows for r in row["response_ids"]) / sum(seconds),
        "whole_memory_gb": (mine["base"] + mine["peak"]) / 1e9,
        "peak_memory_gb": mine["peak"] / 1e9,
        "utilisation": products[0] / sum(seconds) / rate,
        "utilisation_recomputed": products[1] / sum(seconds) / rate,
        "times_slower_than_ours": statistics.median(a / b for a, b in zip(seconds, ours["seconds"], strict=True)),
        "memory_of_ours": ours["peak"] / max(mine["peak"], 1),  # a tiny model's may be none
    }


def make_optimizer(model: nn.Module, case: Case) -> torch.optim.Optimizer:
    """AdamW on what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if case.paged:
        import bitsandbytes as bnb

        return bnb.optim.PagedAdamW32bit(trained, lr=1e-5)
    return torch.optim.AdamW(trained, lr=1e-5)


class Memory:
    """Most memory held since the start of the measurement, above what was held then, in bytes."""

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
            self.base = _status("VmRSS")

    def peak(self) -> int:
        return (torch.cuda.max_memory_allocated() if self.device == "cuda" else _status("VmHWM")) - self.base


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
