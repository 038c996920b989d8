"""What gpu.py's steps have to do at Mistral-7B's sizes, counted on any machine: matrix products, memory-bound
operations, the peak; and the same of ours at other models' sizes, with the LM head's part of it.

    python -m benchmarks.work       two minutes on a CPU; the tables of NOTES.md

The models have no weights: they run under torch's fake tensors, which have shapes and lives and nothing in them, with
two layers and with three, and the rest is extrapolated. A time is what the counts would take on a GPU that
multiplies bf16 matrices and moves memory at the given rates, one operation after the other: a prediction, which knows
no launch, no overlap and no kernel that is slower than that.
"""

import argparse
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alignment.plan import layouts, trace
from alignment.plan.meta_model import StepSpec, build_meta_model
from alignment.plan.timeline import Timeline, fake_copy
from alignment.plan.trace import largest_forward, trace_step, trainer_inputs, weight_sizes
from benchmarks.bench import draw_rows
from benchmarks.padded import padded_loss
from benchmarks.sizes import SIZES
from benchmarks.systems import LORA, MISTRAL_4BIT, MISTRAL_BF16, Case, mistral_config
from trl_nca import head, logps
from trl_nca.collate import GroupCollator

OURS, UNFUSED = "ours, one micro-batch", "ours with PEFT's layers"
TOKENS = 8192  # of a forward, by K
LESS = 7168  # of a forward, with which a step takes no more memory than padded rows: most steps are one forward
#: Forwards of a step: reference, policy, policy again under checkpointing. FlashAttention's backward is 2.5 of them.
FORWARDS, BACKWARD = 3, 2.5
DEPTHS = (2, 3)


def _case(name: str, num_responses: int, prompts: int, systems: tuple[str, ...], **settings: Any) -> Case:
    return Case(name, num_responses, 126, 300, prompts=prompts, precision="bf16", checkpointing=True, max_length=1024,
                text=True, systems=systems, **settings)  # fmt: skip


QLORA = _case("QLoRA, K=4", 4, 4, ("padded", OURS), max_tokens=LESS, paged=True)
LORA4 = _case("LoRA, K=4", 4, 4, ("padded", OURS), max_tokens=LESS)
PAIRS = _case("LoRA, pairs", 2, 8, ("padded", "upstream", OURS))
BY_K = [_case(f"K={k}", k, 64 // k, (OURS,), max_tokens=TOKENS) for k in (2, 4, 8, 16, 32)]


class Work(TorchDispatchMode):
    """Adds up what operations take, in seconds: products by their multiply-adds, or by their bytes; all else by bytes.

    Args:
        rate: Multiply-adds x 2 a second.
        bandwidth: Bytes a second, read or written.
    """

    def __init__(self, rate: float, bandwidth: float):
        super().__init__()
        self.rate, self.bandwidth = rate, bandwidth
        self.flops, self.products, self.memory_bound, self.head = 0.0, 0.0, 0.0, 0.0

    @property
    def seconds(self) -> float:
        return self.products + self.memory_bound

    def of_head(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, after which `head` has also the seconds that its operations take."""

        def timed(*args: Any) -> Any:
            before = self.seconds
            out = function(*args)
            self.head += self.seconds - before
            return out

        return timed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = args, {key: value for key, value in (kwargs or {}).items() if key != "out"}  # written only
        read = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        in_place = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        storages = {id(tensor.untyped_storage()) for tensor in read}
        is_view = all(id(tensor.untyped_storage()) in storages for tensor in made) and not in_place
        if is_view or name.startswith(("empty", "new_empty", "_scaled_dot", "_varlen")):
            return out  # attention is counted by hand: what it skips does not show in its shapes
        if name in ("index", "embedding", "gather"):  # what is not asked for is not read
            read = made
        elif name in ("scatter_", "scatter_add_"):  # and what is not set is not written
            read = made = read[1:]
        seconds = sum(map(_bytes, read + made)) / self.bandwidth
        if name in ("mm", "addmm", "addmm_", "bmm"):
            left, right = read[-2:]
            flops = 2 * left.numel() * right.shape[-1]
            self.flops += flops
            self.products += max(seconds, flops / self.rate)
        else:
            self.memory_bound += seconds
        return out


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())  # expanded ones are smaller


@dataclass
class Count:
    """Of an optimizer step but for the optimizer.

    Args:
        products: Seconds of matrix products and attention.
        memory_bound: Seconds of all other operations, by the bytes that they move.
        flops: Multiply-adds x 2.
        head: Seconds of the LM head, part of both, where it is ours.
        peak: Bytes above the weights.
    """

    products: float
    memory_bound: float
    flops: float
    head: float
    peak: float

    @property
    def seconds(self) -> float:
        return self.products + self.memory_bound


def count(case: Case, system: str, model: str, rate: float, bandwidth: float, tiny: bool = False) -> Count:
    """Counts a step of a system on rows of a case.

    Args:
        case: One of those above.
        system: Its systems, or `UNFUSED`.
        model: MISTRAL_4BIT, MISTRAL_BF16 or a name of `SIZES`.
        rate, bandwidth: Those of `Work`.
        tiny: A small model of the same kind, for tests.
    """
    rows, spec = draw_rows(case, case.prompts), spec_of(case, model, tiny)
    figures = []
    for depth in DEPTHS:
        work = Work(rate, bandwidth)
        peak = _trace(spec, depth, rows, system, work)
        figures.append((work.products, work.memory_bound, work.flops, work.head, peak))
    config = spec.config
    more = config.num_hidden_layers - DEPTHS[0]
    of_all = (low + more * (high - low) for low, high in zip(*figures, strict=True))
    products, memory_bound, flops, of_head, peak = of_all
    attention = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    attention *= _pairs(rows, system) * (FORWARDS + BACKWARD)
    return Count(products + attention / rate, memory_bound, flops + attention, of_head, peak)


def spec_of(case: Case, model: str, tiny: bool = False, device: str = "cuda") -> StepSpec:
    """What `alignment.plan.trace` needs of a run."""
    config = SIZES[model] if model in SIZES else mistral_config(tiny)
    return StepSpec(
        config=config, dtype=torch.bfloat16, peft_config=LORA, device=device, autocast=torch.bfloat16,
        quantization="4bit" if model == MISTRAL_4BIT else None,
        checkpointing={"use_reentrant": False} if case.checkpointing else None,
    )  # fmt: skip


def _batch(rows: Sequence[dict[str, Any]], max_tokens: int | None) -> tuple[dict[str, Any], int]:
    lengths = [(len(row["prompt_ids"]), [len(r) for r in row["response_ids"]]) for row in rows]
    return largest_forward(lengths, max_tokens)


def plan(case: Case, model: str, tiny: bool = False, device: str = "cuda") -> dict[str, float]:
    """What `--plan` says of ours, in bytes by part, and their total."""
    batch, num_chunks = _batch(draw_rows(case, case.prompts), case.max_tokens)
    spec = replace(spec_of(case, model, tiny, device), accumulates=num_chunks > 1)
    footprint = layouts.Footprint(
        weights=weight_sizes(spec), phases=trace_step(spec, batch).phases, optim="adamw_torch",
        mixed_precision=True, reference_copy=False, loads_reference=False, shards_quantized=False,
        on_gpu=device == "cuda",
    )  # fmt: skip
    return layouts.peak_memory(footprint, "single", 1)[1]


def _pairs(rows: Sequence[dict[str, Any]], system: str) -> float:
    """Of queries and keys that attention scores: padded rows under a mask in whole squares, ours under the diagonal."""
    if system in (OURS, UNFUSED):
        layout = GroupCollator()(list(rows))["layout"]
        sizes = zip(layout.context_lengths, layout.response_lengths, strict=True)
        return sum(p * p / 2 + sum(n * (p + n / 2) for n in lengths) for p, lengths in sizes)
    longest = [len(row["prompt_ids"]) + max(map(len, row["response_ids"])) for row in rows]
    if system == "upstream":  # pads all pairs of the batch alike
        longest = [max(longest)] * len(rows)
    return sum(len(row["response_ids"]) * n**2 for n, row in zip(longest, rows, strict=True))


def _trace(spec: StepSpec, depth: int, rows: Sequence[dict[str, Any]], system: str, work: Work) -> int:
    """Runs a step of a model of a few layers; returns its peak in bytes above the weights."""
    model = build_meta_model(spec, depth)
    spec = replace(spec, shared_prompt="true" if system in (OURS, UNFUSED) else "false")
    with contextlib.ExitStack() as patches:
        if system != OURS:
            patches.enter_context(patch.object(logps, "fuse_layers", lambda model: None))
            patches.enter_context(patch.object(trace, "use_meta_norms", lambda model: None))
        inputs = trainer_inputs(spec, model, _batch(rows, None)[0])
    if system == "upstream":
        inputs = _upstream_inputs(rows) | {"run_device": spec.device}
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        fake_copy(model, fake)
        inputs = {name: fake.from_tensor(v) if isinstance(v, Tensor) else v for name, v in inputs.items()}
        timeline = Timeline([*model.parameters(), *model.buffers()], spec.config.vocab_size)
        with patch.object(head, "target_logps", work.of_head(head.target_logps)), timeline, work:
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
        timeline.classify(0, [])
    return sum(timeline.peak(0, timeline.now).values())


def _upstream_inputs(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What trl 1.16 runs on a GPU: all responses padded alike behind their prompts, the head at the responses alone."""
    length = max(len(row["prompt_ids"]) + max(map(len, row["response_ids"])) for row in rows)
    lengths = [len(r) for row in rows for r in row["response_ids"]]
    return {
        "input_ids": torch.zeros(len(lengths), length, dtype=torch.long),
        "attention_mask": torch.ones(len(lengths), 1, length, length, dtype=torch.bool),
        "positions": torch.arange(sum(lengths)),
        "targets": torch.zeros(sum(lengths), dtype=torch.long),
        "use_cache": False,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tflops", type=float, default=800, help="Rate of bf16 products, in 10^12 a second.")
    parser.add_argument("--terabytes", type=float, default=3.0, help="Rate of moving memory, in 10^12 bytes a second.")
    options = parser.parse_args()
    rate, bandwidth = options.tflops * 1e12, options.terabytes * 1e12
    print(
        "| step | system | products, s | memory-bound, s | ours is faster by | utilisation | peak above the model, GB |"
    )
    print("|---|---|---|---|---|---|---|")
    for case, model in ((LORA4, MISTRAL_BF16), (QLORA, MISTRAL_4BIT), (PAIRS, MISTRAL_BF16)):
        systems = (*case.systems[:-1], UNFUSED, OURS)
        counts = {system: count(case, system, model, rate, bandwidth) for system in systems}
        for system, c in counts.items():
            print(
                f"| {case.name} | {system} | {c.products:.3f} | {c.memory_bound:.3f} | "
                f"{c.seconds / counts[OURS].seconds:.2f}x | {c.flops / rate / c.seconds:.2f} | {c.peak / 1e9:.2f} |",
                flush=True,
            )
    print("\n| LoRA, K=4, ours | products, s | memory-bound, s | LM head, s | its share | peak above the model, GB |")
    print("|---|---|---|---|---|---|")
    for model in (MISTRAL_BF16, *SIZES):
        c = count(LORA4, OURS, model, rate, bandwidth)
        print(
            f"| {model} | {c.products:.3f} | {c.memory_bound:.3f} | {c.head:.3f} | {c.head / c.seconds:.3f} | "
            f"{c.peak / 1e9:.2f} |",
            flush=True,
        )
    print("\n| `--plan` of ours | above the model, GB | in all, GB |\n|---|---|---|")
    for case, model in ((QLORA, MISTRAL_4BIT), (LORA4, MISTRAL_BF16), *((case, MISTRAL_BF16) for case in BY_K)):
        parts = plan(case, model)
        held = sum(parts.get(part, 0) for part in ("weights", "adapter", "optimizer", "overhead"))
        print(f"| {case.name} | {(parts['total'] - held) / 1e9:.2f} | {parts['total'] / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()
