"""What gpu.py's steps have to do at Mistral-7B's sizes, counted on any machine: products, passes over memory, the peak.

    python -m benchmarks.work       a few minutes on a CPU; prints the table of benchmarks/NOTES.md

The models have no weights: they run under torch's fake tensors, which have shapes and lives and nothing in them, with
two layers and with three, and the rest of the 32 is extrapolated. A time is what the counts would take on a GPU that
multiplies bf16 matrices and moves memory at the given rates, one operation after the other: a prediction, which knows
no launch, no overlap and no kernel that is slower than that.
"""

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import gpu
from benchmarks.bench import draw_rows
from benchmarks.padded import padded_loss
from benchmarks.systems import LORA, Case, mistral_config
from trl_nca import logps, memory
from trl_nca.collate import GroupCollator
from trl_nca.planned_model import build
from trl_nca.shared_prompt import GroupLayout
from trl_nca.timeline import Timeline, fake_copy

#: Of the paddings and the copies of keys there is one in each forward; FlashAttention's backward is 2.5 of them.
FORWARDS, BACKWARD = 3, 2.5  # reference, policy, policy again under checkpointing
DEPTHS = (2, 3)


class Work(TorchDispatchMode):
    """Adds up what operations take: products by their multiply-adds or their operands' bytes, all others by bytes."""

    def __init__(self, rate: float, bandwidth: float):
        super().__init__()
        self.rate, self.bandwidth = rate, bandwidth
        self.flops, self.products, self.passes = 0.0, 0.0, 0.0  # the last two in seconds
        self.by_name: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        in_place = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        storages = {id(tensor.untyped_storage()) for tensor in read}
        is_view = all(id(tensor.untyped_storage()) in storages for tensor in made) and not in_place
        if is_view or name.startswith(("empty", "new_empty", "_scaled_dot", "_varlen")):
            return out  # attention is counted by hand: what it skips does not show in its shapes
        if name in ("index", "embedding"):  # what is not asked for is not read
            read = made
        seconds = sum(map(_bytes, read + made)) / self.bandwidth
        if name in ("mm", "addmm", "addmm_", "bmm"):
            left, right = read[-2:]
            flops = 2 * left.numel() * right.shape[-1]
            self.flops += flops
            seconds = max(seconds, flops / self.rate)
            self.products += seconds
        else:
            self.passes += seconds
        self.by_name[name] = self.by_name.get(name, 0.0) + seconds
        return out


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())  # expanded ones are smaller


@dataclass
class Count:
    """Of an optimizer step: seconds of products with attention, of all else; multiply-adds x 2; bytes at the peak."""

    products: float
    passes: float
    flops: float
    peak: float

    @property
    def seconds(self) -> float:
        return self.products + self.passes


def count(case: Case, system: str, quantized: bool, rate: float, bandwidth: float) -> Count:
    """Counts a step of a system on rows of a case."""
    rows = draw_rows(case, case.prompts)
    config = mistral_config(tiny=False)
    setup = memory.Setup(
        config=config, dtype=torch.bfloat16, peft_config=LORA, quantization="4bit" if quantized else None,
        autocast=torch.bfloat16, checkpointing={"use_reentrant": False},
    )  # fmt: skip
    counts = []
    for depth in DEPTHS:
        work, peak = _trace(setup, depth, rows, system, Work(rate, bandwidth))
        counts.append((work.products, work.passes, work.flops, peak))
    more = config.num_hidden_layers - DEPTHS[0]
    products, passes, flops, peak = (low + more * (high - low) for low, high in zip(*counts, strict=True))
    pairs = _pairs(rows, case, system)
    attention = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * pairs
    attention *= FORWARDS + BACKWARD
    return Count(products + attention / rate, passes, flops + attention, peak)


def _pairs(rows: Sequence[dict[str, Any]], case: Case, system: str) -> float:
    """Of queries and keys that attention scores: padded rows under a mask in whole squares, ours under the diagonal."""
    if system.startswith("ours"):
        batch = GroupCollator()(list(rows))
        groups = GroupLayout.of(batch["context_lengths"], batch["response_lengths"]).groups
        length = lambda part: part.stop - part.start  # noqa: E731
        return sum(
            length(c) ** 2 / 2 + sum(length(r) * (length(c) + length(r) / 2) for r in responses)
            for c, responses in groups
        )
    longest = [len(row["prompt_ids"]) + max(map(len, row["response_ids"])) for row in rows]
    if system == "upstream":  # pads all pairs of the batch alike
        longest = [max(longest)] * len(rows)
    return sum(case.num_responses * n**2 for n in longest)


def _trace(
    setup: memory.Setup, depth: int, rows: Sequence[dict[str, Any]], system: str, work: Work
) -> tuple[Work, int]:
    """A step of a model of a few layers, and its peak in bytes above the weights."""
    model = build(setup, depth)
    layers = patch.object(logps, "fuse_layers", lambda model: None)
    with contextlib.nullcontext() if system == "ours" else layers:
        fuse = memory.ready(replace(setup, shared_prompt=str(system.startswith("ours")).lower()), model, _batch(rows))
    inputs = fuse if system.startswith("ours") else _upstream_inputs(rows)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        fake_copy(model, fake)
        inputs = {name: fake.from_tensor(v) if isinstance(v, Tensor) else v for name, v in inputs.items()}
        timeline = Timeline([*model.parameters(), *model.buffers()], setup.config.vocab_size)
        with timeline, work:
            if system == "padded":
                for row in rows:
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = padded_loss(model, row, 0.01, 0.1, "cpu")
                    loss.backward()
            else:
                with torch.autocast("cpu", torch.bfloat16):
                    with torch.no_grad(), model.disable_adapter():
                        model(**inputs)
                    total = model(**inputs).sum()
                total.backward()
        timeline.sort(0, [])
    return work, sum(timeline.fullest(0, timeline.now).values())


def _batch(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return memory.batch_to_plan(
        [(len(row["prompt_ids"]), [len(r) for r in row["response_ids"]]) for row in rows], None
    )[0]


def _upstream_inputs(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What trl 1.16 runs on a GPU: all responses padded alike behind their prompts, the head at the responses alone."""
    length = max(len(row["prompt_ids"]) + max(map(len, row["response_ids"])) for row in rows)
    count, targets = (
        sum(len(row["response_ids"]) for row in rows),
        sum(len(r) for row in rows for r in row["response_ids"]),
    )
    return {
        "input_ids": torch.zeros(count, length, dtype=torch.long),
        "attention_mask": torch.ones(count, 1, length, length, dtype=torch.bool),
        "positions": torch.arange(targets), "targets": torch.zeros(targets, dtype=torch.long), "use_cache": False,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tflops", type=float, default=800, help="Rate of bf16 products, in 10^12 a second.")
    parser.add_argument("--terabytes", type=float, default=3.0, help="Rate of moving memory, in 10^12 bytes a second.")
    options = parser.parse_args()
    rate, bandwidth = options.tflops * 1e12, options.terabytes * 1e12
    print("| step | system | products, s | passes, s | s/step | ours is faster by | utilisation | peak, GB |")
    print("|---|---|---|---|---|---|---|---|")
    for case, quantized, systems in (
        (gpu.LORA4, False, ("padded", "ours, PEFT's layers", "ours")),
        (gpu.QLORA, True, ("padded", "ours, PEFT's layers", "ours")),
        (gpu.PAIRS, False, ("padded", "upstream", "ours")),
    ):
        counts = {system: count(case, system, quantized, rate, bandwidth) for system in systems}
        for system, c in counts.items():
            print(
                f"| {case.name} | {system} | {c.products:.3f} | {c.passes:.3f} | {c.seconds:.3f} | "
                f"{c.seconds / counts['ours'].seconds:.2f}x | {c.flops / rate / c.seconds:.2f} | {c.peak / 1e9:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
