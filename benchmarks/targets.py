"""What must hold on one H100, and the table that says of a run of gpu.py whether it does."""

import operator
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.systems import BEST, CACHED, UPSTREAM_BEST
from benchmarks.work import OURS

#: By part: a sentence, the figure, and what it must be.
TARGETS: list[tuple[str, str, Callable[[Any], float], str, float]] = [
    ("equality", "fp32: furthest of ours from padded", lambda r: _furthest(r, "fp32", "ours"), "<=", 1e-4),
    ("equality", "fp32: furthest of ours in pieces from padded", lambda r: _furthest(r, "fp32", "in pieces"),
     "<=", 1e-4),
    ("equality", "bf16: ours from fp32, over padded from fp32", lambda r: _rounding(r), "<=", 1.5),
    ("kernels", "compiled kernels: furthest from fp32, over the plain ones", lambda r: _kernels(r), "<=", 1.5),
    ("lora", "LoRA, K=4: times as fast as padded", lambda r: _times(r, "padded", OURS), ">=", 2),
    ("lora", "LoRA, K=4, reference cached: times as fast as padded", lambda r: _times(r, "padded", CACHED), ">=", 2.5),
    ("lora", "LoRA, K=4: memory, over padded's", lambda r: _of(r, "padded", "memory_of_ours"), "<=", 1),
    ("lora", "LoRA, K=4: utilisation at its best", lambda r: _of(r, BEST, "utilisation"), ">=", 0.45),
    ("lora", "LoRA, K=4: utilisation, recomputed work counted", lambda r: _of(r, OURS, "utilisation_recomputed"),
     ">=", 0.4),
    ("qlora", "QLoRA, K=4: times as fast as padded", lambda r: _times(r, "padded", OURS), ">=", 2),
    ("qlora", "QLoRA, K=4, reference cached: times as fast as padded", lambda r: _times(r, "padded", CACHED),
     ">=", 2.5),
    ("qlora", "QLoRA, K=4: memory, over padded's", lambda r: _of(r, "padded", "memory_of_ours"), "<=", 1),
    ("qlora", "QLoRA, K=4: GB, model included", lambda r: _of(r, OURS, "whole_memory_gb"), "<=", 24),
    ("pairs", "pairs: times as fast as upstream, each at its best", lambda r: _times(r, UPSTREAM_BEST, BEST),
     ">=", 1.4),
    ("by_k", "peak at K=32, over that at K=4", lambda r: _of_k(r, 32) / _of_k(r, 4), "<=", 1.15),
    ("planned", "plan over measured: furthest from 1", lambda r: max(abs(x["plan_over_measured"] - 1) for x in r),
     "<=", 0.15),
    ("waits", "waits for the device, of a step", lambda r: max(sum(places.values()) for places in r.values()), "<=", 1),
    ("job", "SmolLM2 job: gain in held-out score, lower end", lambda r: r["score_difference_interval"][0], ">", 0),
]  # fmt: skip
COMPARE = {"<=": operator.le, ">=": operator.ge, ">": operator.gt}


def _furthest(found: list[dict[str, Any]], precision: str, system: str) -> float:
    rows = [row for row in found if (row["precision"], row["system"]) == (precision, system)]
    return max(row[figure] for row in rows for figure in ("logps", "loss", "gradient"))


def _rounding(found: list[dict[str, Any]]) -> float:
    return _furthest(found, "bf16", "ours") / _furthest(found, "bf16", "padded")


def _kernels(found: dict[str, Any]) -> float:
    if not found["compiled"]:
        raise ValueError("they could not be compiled")
    functions = [figures for name, figures in found.items() if name != "compiled"]
    return max(f["distance"] / f["plain_distance"] for f in functions)


def _of(found: dict[str, Any], system: str, figure: str) -> float:
    return found["systems"][system][figure]


def _times(found: dict[str, Any], slower: str, faster: str) -> float:
    """How many times as fast a system is: the median over the steps."""
    seconds = (_of(found, system, "seconds") for system in (slower, faster))
    return statistics.median(a / b for a, b in zip(*seconds, strict=True))


def _of_k(found: list[dict[str, Any]], num_responses: int) -> float:
    return next(row["peak_memory_gb"] for row in found if row["num_responses"] == num_responses)


def targets_table(results: dict[str, Any]) -> str:
    """Every bar with its figure; of a part that was not run, why."""
    lines = ["| target | figure | bound | |", "|---|---|---|---|"]
    for part, what, figure, sign, bound in TARGETS:
        found = results["parts"].get(part)
        if found is None or "not_run" in found:
            lines.append(f"| {what} | | {sign} {bound:g} | not run: {(found or {}).get('not_run', 'not asked for')} |")
            continue
        try:
            value = figure(found["result"])
        except Exception as error:  # the other targets are still to come
            lines.append(f"| {what} | | {sign} {bound:g} | no figure: {type(error).__name__}: {error} |")
            continue
        holds = COMPARE[sign](value, bound)
        is_rehearsal = results["device"] == "cpu" or results.get("layers", 32) < 32
        verdict = "" if is_rehearsal else "holds" if holds else "FAILS"
        lines.append(f"| {what} | {value:.3g} | {sign} {bound:g} | {verdict} |")
    return "\n".join(lines)
