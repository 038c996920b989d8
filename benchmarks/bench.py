"""Time and memory of an optimizer step: the 2024 way, upstream's trainer, and this project's, side by side.

    make bench                                                  all cases on this machine's CPU, about an hour
    python -m benchmarks.bench --only "K=8" --rounds 1          some of them
    python -m benchmarks.bench --device cuda --model mistral-7b-4bit --precision bf16

Each system runs in a process of its own, so that its peak of memory is its own; the steps alternate, so that a busy
machine slows all of them. Rows are the same, and so are model, LoRA and precision. A step is: the reference's
log-probs, the policy's, the gradient, AdamW. The table gives medians over the rounds; a ratio is the median of the
rounds' ratios.
"""

import argparse
import json
import multiprocessing as mp
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.systems import (
    MISTRAL_4BIT,
    MODEL,
    SYSTEMS,
    Case,
    Memory,
    System,
    load_model,
    make_optimizer,
    text_ids,
    tiny_row,
)

# Lengths are log-normal: within a row of AlpacaEval's or UltraFeedback's responses, log-lengths spread by 0.8, and so
# do the rows' means. The longest of a row is then about 1.9 (K = 8) or 1.65 (K = 4) times the row's mean.
SPREAD = 0.8
PAIRS = ("padded", "upstream", "ours on pairs")
CASES = [
    Case("UltraFeedback K=4", 4, 84, 200),
    Case("UltraFeedback K=8", 8, 84, 200),
    Case("UltraFeedback K=16, half the length", 16, 42, 100),
    Case("long prompts K=4", 4, 384, 96, prompts=2),
    Case("long prompts K=8", 8, 384, 96),
    Case("512 + 8 x 128, equal lengths", 8, 512, 128, ragged=False, systems=("padded", "ours")),
    Case("pairs K=2, batch 4", 2, 40, 96, prompts=4, systems=PAIRS),
    Case("UltraFeedback K=8, checkpointing", 8, 84, 200, checkpointing=True),
    Case("short rows K=4, bf16", 4, 16, 32, precision="bf16"),
    Case("900 tokens a forward, K=4, equal lengths", 4, 84, 200, ragged=False, max_tokens=900, systems=("ours",)),
    Case("900 tokens a forward, K=64, equal lengths", 64, 84, 200, ragged=False, max_tokens=900, systems=("ours",)),
]


def draw_rows(case: Case, count: int) -> list[dict[str, Any]]:
    """Rows of random token ids, or of text, with the case's lengths; the same for the same case."""
    rng = random.Random(0)
    text = text_ids(case.vocabulary) if case.text else []

    def tokens(count: int) -> list[int]:
        if not case.text:
            return rng.choices(range(3, case.vocabulary), k=count)
        at = int(rng.random() * (len(text) - count))  # a draw each, so that lengths are those of any text
        return text[at : at + count]

    def length(mean: float, spread: float = SPREAD) -> int:
        if not case.ragged:
            return round(mean)
        return max(4, min(round(mean * rng.lognormvariate(-(spread**2) / 2, spread)), 8 * round(mean)))

    rows = []
    for _ in range(count):
        mean = length(case.response_tokens, 0.4)
        responses = [length(mean) for _ in range(case.num_responses)]
        prompt = length(case.prompt_tokens, 0.4)
        if case.max_length:
            prompt = min(prompt, case.max_length // 2)
            responses = [min(n, case.max_length - prompt) for n in responses]
        rows.append(
            {
                "prompt_ids": tokens(prompt),
                "response_ids": [tokens(n) for n in responses],
                "scores": [rng.random() for _ in responses],
            }
        )
    return rows


def serve(pipe: Connection, system: str, case: Case, model_name: str, device: str) -> None:
    """A worker: sets up a system, then for each list of rows sends back the seconds of a step and the peak so far."""
    runner = SYSTEMS[system](load_model(model_name, case, device), case, device)
    step = stepper(runner, case, device)
    step([tiny_row(case)] * case.prompts)
    memory = Memory(device)
    pipe.send((count_flops(runner.model), memory.base))
    while (rows := pipe.recv()) is not None:
        rows = runner.ready(rows)
        start = time.perf_counter()
        step(rows)
        pipe.send((time.perf_counter() - start, memory.peak()))


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


def count_flops(model: torch.nn.Module) -> dict[str, int]:
    """Multiply-adds x 2 of a token's forward: frozen layers, LoRA, head; and per pair of positions, attention."""
    head = model.get_output_embeddings()
    flops = {"frozen": 0, "lora": 0, "head": 2 * head.in_features * head.out_features}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            flops["lora" if "lora_" in name else "frozen"] += 2 * module.in_features * module.out_features
    config = model.get_base_model().config
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    flops["pair"] = 4 * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) * layers
    return flops


def model_flops(
    rows: list[dict[str, Any]], flops: dict[str, int], cached: bool = False, recomputed: bool = False
) -> float:
    """What a step must compute, with each prompt once and no padding: reference and policy forward, and backward.

    Backward costs a forward for frozen weights (the gradient of their input alone), two for LoRA and for attention.

    Args:
        rows: Rows of the step.
        flops: From `count_flops`.
        cached: The reference's log-probs are there.
        recomputed: The layers' forward is counted once more, as checkpointing runs it.
    """
    total, references, again = 0.0, 0 if cached else 1, int(recomputed)
    for row in rows:
        prompt, responses = len(row["prompt_ids"]) - 1, [len(r) for r in row["response_ids"]]
        tokens = prompt + sum(responses)
        pairs = prompt * prompt / 2 + sum(n * (prompt + n / 2) for n in responses)
        total += tokens * ((2 + references + again) * flops["frozen"] + (3 + again) * flops["lora"])
        total += sum(responses) * (2 + references) * flops["head"]
        total += pairs * (3 + references + again) * flops["pair"]
    return total


def matmul_rate(device: str, precision: str) -> float:
    """Floating-point operations a second of a large matrix product."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Without instructions for bf16, a CPU takes a minute for the larger one.
    n = 8192 if device == "cuda" else 2048 if precision == "fp32" else 256
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def measure(case: Case, rounds: int, model_name: str, device: str) -> dict[str, Any]:
    """Runs the systems of a case in turn, round by round."""
    context = mp.get_context("spawn")
    pipes, workers = {}, []
    for system in case.systems:
        pipes[system], there = context.Pipe()
        workers.append(context.Process(target=serve, args=(there, system, case, model_name, device), daemon=True))
        workers[-1].start()
        there.close()
    found = {system: pipe.recv() for system, pipe in pipes.items()}
    flops = next(iter(found.values()))[0]
    rows = draw_rows(case, rounds * case.prompts)
    for pipe in pipes.values():  # a first time, not counted: the allocator gets its memory from the system
        pipe.send(rows[: case.prompts])
        pipe.recv()
    seconds: dict[str, list[float]] = {system: [] for system in case.systems}
    peaks: dict[str, float] = {}
    tokens, rates = [], []
    for at in range(0, len(rows), case.prompts):
        step = rows[at : at + case.prompts]
        tokens.append(sum(len(r) for row in step for r in row["response_ids"]))
        rates.append(matmul_rate(device, case.precision))
        for system, pipe in pipes.items():
            pipe.send(step)
            taken, peaks[system] = pipe.recv()
            seconds[system].append(taken)
    for pipe in pipes.values():
        pipe.send(None)
    for worker in workers:
        worker.join()
    last, rate = case.systems[-1], statistics.median(rates)
    results = {
        system: {
            "seconds": seconds[system],
            "seconds_per_step": statistics.median(seconds[system]),
            "response_tokens_per_second": sum(tokens) / sum(seconds[system]),
            "whole_memory_gb": (found[system][1] + peaks[system]) / 1e9,
            "peak_memory_gb": peaks[system] / 1e9,
            "utilisation": model_flops(rows, flops, "cached" in system) / sum(seconds[system]) / rate,
            "utilisation_recomputed": model_flops(rows, flops, "cached" in system, case.checkpointing)
            / sum(seconds[system])
            / rate,
            "times_slower_than_ours": statistics.median(
                a / b for a, b in zip(seconds[system], seconds[last], strict=True)
            ),
            "memory_of_ours": peaks[last] / max(peaks[system], 1),  # a tiny model's may be none
        }
        for system in case.systems
    }
    return {"case": asdict(case), "matmul_gflops": rate / 1e9, "systems": results}


def table(results: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [
        "| case | system | s/step | response tok/s | peak above the model, GB | utilisation | ours is faster by | "
        "our memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for system, r in result["systems"].items():
            is_ours = system.startswith("ours")
            lines.append(
                f"| {result['case']['name']} | {system} | {r['seconds_per_step']:.2f} | "
                f"{r['response_tokens_per_second']:.0f} | {r['peak_memory_gb']:.2f} | {r['utilisation']:.2f} | "
                + ("| |" if is_ours else f"{r['times_slower_than_ours']:.2f}x | {r['memory_of_ours']:.2f}x |")
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="Run the cases whose name contains this; results of others stay.")
    parser.add_argument("--rounds", type=int, default=2, help="Steps of each system, each on rows of its own.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default=MODEL, help=f"A folder, or {MISTRAL_4BIT}: random weights in NF4.")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="For all cases, in place of their own.")
    parser.add_argument("--output", default="benchmarks/results.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU found on this machine; run without it, on the CPU")
    output = Path(options.output)
    results = json.loads(output.read_text()) if options.only and output.exists() else []
    for case in CASES:
        if options.only not in case.name:
            continue
        case = replace(case, precision=options.precision or case.precision)
        result = measure(case, options.rounds, options.model, options.device)
        result["about"] = {
            "date": str(date.today()),
            "machine": platform.processor() or platform.machine(),
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "model": options.model,
            "rounds": options.rounds,
        }
        print(table([result]).split("\n", 2)[2], flush=True)
        results = [other for other in results if other["case"]["name"] != case.name] + [result]
        output.write_text(json.dumps(results, indent=1) + "\n")
    print("\n" + table(results))


if __name__ == "__main__":
    main()
