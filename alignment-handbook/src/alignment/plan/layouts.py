"""The memory of one process in each layout.

The layouts are `single` (one process), `ddp`, `zero2` and `zero3` (DeepSpeed), `fsdp2` (torch). `Footprint` is what one
process would hold with nothing sharded. Sizes are in bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from alignment.plan.trace import WeightSizes

LAYOUTS = ("ddp", "zero2", "zero3", "fsdp2")
PARTS = "weights adapter gradients optimizer activations logits reference working overhead".split()
GB = 1e9

# Assumptions, not measurements: what the CUDA context and its libraries hold, NCCL's buffers between several GPUs, and
# the share of activations, gradients and working memory that the caching allocator loses to fragments.
_CONTEXT, _NCCL, _FRAGMENTS = 1.0e9, 0.5e9, 0.05
# DeepSpeed 0.19's defaults, in numbers (runtime/zero/config.py): the bucket that gradients are reduced in, allocated
# whole; the most gathered weights that ZeRO-3 keeps, and what it fetches ahead.
_BUCKET, _MAX_LIVE, _PREFETCH = 5e8, 1e9, 5e7

#: State of an optimizer a trained number: how many values, and bytes of each; None: the trained number's own type.
OPTIMIZERS: dict[str, tuple[float, float | None]] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_anyprecision"), (2, None)),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), (2, 1)),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), (3, 1)),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), (3, 4)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), (1, 1)),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit"), (1, 4)),
    "paged_adamw_32bit": (2, 4),
    "adamw_torch_4bit": (2, 0.5),
    **dict.fromkeys(("adagrad", "rmsprop"), (1, None)),
    "sgd": (0, None),
}
#: Those of bitsandbytes, whose kernels take whole tensors.
BITSANDBYTES = frozenset(name for name in OPTIMIZERS if "torch" not in name) - {
    "adamw_anyprecision", "adagrad", "rmsprop", "sgd",
}  # fmt: skip


#: Bytes by part in each phase that may have the peak.
Phases = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Footprint:
    """The memory of a run on one process, nothing sharded.

    Args:
        weights: The weights of model and adapter.
        phases: Peak of each phase of a step: bytes of `activations`, `gradients`, `logits` and `working`.
        optim: `TrainingArguments.optim`.
        mixed_precision: Whether the run is in bf16 or fp16.
        reference_copy: Whether the reference is a model of its own, in memory while training.
        loads_reference: Whether it is, at least while the reference's log-probs are precomputed.
        shards_quantized: Whether quantized weights are stored in a type that FSDP2 shards.
        on_gpu: Whether to add CUDA's own memory.
    """

    weights: WeightSizes
    phases: Mapping[str, Mapping[str, float]]
    optim: str
    mixed_precision: bool
    reference_copy: bool
    loads_reference: bool
    shards_quantized: bool
    on_gpu: bool


def optimizer_name(args: TrainingArguments) -> str:
    """`optim` as a recipe spells it; upstream makes an enum of it."""
    return str(getattr(args.optim, "value", args.optim))


def peak_memory(footprint: Footprint, layout: str, num_processes: int) -> tuple[str, dict[str, float]]:
    """The phase of a run with the peak, and the bytes of one process in it, by part (`PARTS`), with their `total`."""
    phases = {}
    for phase, held in _SHARDING[layout](footprint, num_processes).items():
        phases[phase] = parts = dict.fromkeys(PARTS, 0.0) | held
        if footprint.on_gpu:
            transient = sum(parts[part] for part in ("gradients", "activations", "logits", "working"))
            parts["overhead"] = _CONTEXT + _NCCL * (num_processes > 1) + _FRAGMENTS * transient
        parts["total"] = sum(parts.values())
    return max(phases.items(), key=lambda phase: phase[1]["total"])


def _optimizer(footprint: Footprint, num_trained: float, trained: float) -> float:
    """Bytes of the optimizer's state for so many trained numbers of so many bytes."""
    share = num_trained / max(footprint.weights.num_trained, 1)
    if footprint.optim == "adafactor":
        return 4 * footprint.weights.num_factors * share
    values, size = OPTIMIZERS.get(footprint.optim, OPTIMIZERS["adamw_torch"])
    return values * (trained if size is None else num_trained * size)


def _optimizer_working(footprint: Footprint, trained: float) -> float:
    """Temporary bytes of the optimizer's step.

    torch's AdamW takes the roots of its second moments: on a GPU all at once, on a CPU one weight after the other, and
    once more divided; fused it makes none.
    """
    if footprint.optim != "adamw_torch":
        return 0.0
    return trained if footprint.on_gpu else 2 * footprint.weights.largest_trained


def _replicated(footprint: Footprint, num_processes: int) -> Phases:
    """One process, or DDP: everything on each, and gradients once more in DDP's buckets."""
    weights = footprint.weights
    buckets = weights.trained if num_processes > 1 else 0
    fixed = {
        "weights": weights.base,
        "adapter": weights.adapter,
        "optimizer": _optimizer(footprint, weights.num_trained, weights.trained),
        "reference": weights.base if footprint.reference_copy else 0,
    }
    phases = {name: fixed | m | {"gradients": m["gradients"] + buckets} for name, m in footprint.phases.items()}
    work = _optimizer_working(footprint, weights.trained)
    return phases | {"optimizer step": fixed | {"gradients": weights.trained + buckets, "working": work}}


def _zero(footprint: Footprint, num_processes: int, stage: int) -> Phases:
    """ZeRO: float32 weights, optimizer state and gradients sharded over the processes, at stage 3 all weights too.

    Weights are in the run's type, also the trained ones (`DeepSpeedEngine`: `module.bfloat16()`).
    """
    weights, n = footprint.weights, num_processes
    size = 2 if footprint.mixed_precision else 4
    held = n if stage == 3 else 1
    trained = weights.num_trained * size
    fixed = {
        "weights": weights.base / held,
        "adapter": (trained if weights.adapter else 0) / held,
        "optimizer": (4 * weights.num_trained + _optimizer(footprint, weights.num_trained, 4 * weights.num_trained))
        / n,
        "reference": weights.base / held if footprint.reference_copy else 0,
    }
    buffers = _BUCKET * size
    if stage == 3:
        buffers += min(weights.base + weights.adapter, (_MAX_LIVE + _PREFETCH) * size)
    phases = {
        name: fixed | m | {"gradients": m["gradients"] / n, "working": m["working"] + buffers}
        for name, m in footprint.phases.items()
    }
    in_float32 = 4 * weights.num_trained / n  # the gradients, for the step
    work = buffers + _optimizer_working(footprint, in_float32)
    return phases | {"optimizer step": fixed | {"gradients": in_float32, "working": work}}


def _fsdp2(footprint: Footprint, num_processes: int) -> Phases:
    """FSDP2: everything sharded; a layer and the next, and what is outside the layers, are gathered while they work.

    accelerate (`fsdp2_prepare_model`) keeps trained weights in float32 where the run is in bf16, but for 4-bit models,
    whose adapter stays as trl makes it, bfloat16, and leaves 4-bit weights whole on each process unless they are stored
    as bf16 numbers.
    """
    weights, n = footprint.weights, num_processes
    trained = weights.trained
    if weights.quantized or footprint.mixed_precision:
        trained = (2 if weights.quantized else 4) * weights.num_trained
    whole = 0 if footprint.shards_quantized else weights.quantized
    base = weights.base if weights.adapter else trained
    fixed = {
        "weights": (base - whole) / n + whole,
        "adapter": (trained if weights.adapter else 0) / n,
        "optimizer": _optimizer(footprint, weights.num_trained, trained) / n,
        "reference": weights.base / n if footprint.reference_copy else 0,
    }
    layers = 2 * weights.largest_layer * (1 - whole / max(weights.base, 1))
    gathered = layers + weights.outside_layers + layers * weights.trained / (weights.base + weights.adapter)
    share = trained / max(weights.trained, 1) / n
    phases = {
        name: fixed | m | {"gradients": m["gradients"] * share, "working": m["working"] + gathered}
        for name, m in footprint.phases.items()
    }
    phases["optimizer step"] = fixed | {"gradients": trained / n, "working": _optimizer_working(footprint, trained / n)}
    if footprint.loads_reference:  # trl's prepare_fsdp shards the reference as one unit: it is gathered whole
        phases["reference"] = fixed | {"reference": weights.base / n, "working": weights.base}
    if weights.quantized:  # "will still cause the VRAM spike": accelerate's fsdp2_prepare_model
        phases["loading"] = {"weights": weights.base, "adapter": trained}
    return phases


_SHARDING = {
    "single": _replicated,
    "ddp": _replicated,
    "zero2": lambda footprint, n: _zero(footprint, n, 2),
    "zero3": lambda footprint, n: _zero(footprint, n, 3),
    "fsdp2": _fsdp2,
}


def in_gb(parts: Mapping[str, float]) -> dict[str, float]:
    """The same in GB (1e9 bytes), rounded so that the parts add up to the total."""
    rounded: dict[str, Any] = {part: round(parts[part] / GB, 3) for part in PARTS}
    return rounded | {"total": round(sum(rounded.values()), 3)}
