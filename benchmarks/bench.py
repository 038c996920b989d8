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
import platform
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import measure
from benchmarks.rows import MODEL, Case, draw_rows
from benchmarks.systems import MISTRAL_4BIT

PAIRS = ("padded", "upstream", "ours, one micro-batch")
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


def table(results: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [
        "| case | system | given | s/step | response tok/s | peak above the model, GB | utilisation | "
        "ours is faster by | our memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for system, r in result["systems"].items():
            name = f"| {result['case']['name']} | {system} |"
            if "failed" in r:
                lines.append(f"{name} {r['failed']} | | | | | | |")
                continue
            is_ours = system.startswith("ours")
            lines.append(
                f"{name} {r['given']} | {r['seconds_per_step']:.2f} | "
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
        result = measure(case, draw_rows(case, options.rounds * case.prompts), options.model, options.device)
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
