"""The memory of one process in each layout.

The layouts are `single` (one process), `ddp`, `zero2` and `zero3` (DeepSpeed), `fsdp2` (torch), and the last three with
offload: what is sharded lies in the memory of the CPU (DeepSpeed: the optimizer's part alone). `Footprint` is what one
process would hold with nothing sharded. Sizes are in bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from alignment.plan.trace import WeightSizes

LAYOUTS = ("ddp", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp2", "fsdp2_offload")
PARTS = "weights adapter gradients optimizer activations keys logits reference working overhead".split()
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


#: The phase before the first step: the weights are there, and nothing was computed.
LOADING = "loading"
_STEP = "optimizer step"

#: Bytes by part in each phase that may have the peak.
Phases = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Footprint:
    """The memory of a run on one process, nothing sharded.

    Args:
        weights: The weights of model and adapter.
        phases: Peak of each phase of a step: bytes of `activations`, `gradients`, `logits`, `working` and `keys`.
        optim: `TrainingArguments.optim`.
        mixed_precision: Whether the run is in bf16 or fp16.
        reference_copy: Whether the reference is a model of its own, in memory while training.
        loads_reference: Whether it is, at least while the reference's log-probs are precomputed.
        shards_quantized: Whether quantized weights are stored in a type that FSDP2 shards.
        accumulates: Whether a step has several forwards, whose gradients are added up.
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
    accumulates: bool = False


def optimizer_name(args: TrainingArguments) -> str:
    """`optim` as a recipe spells it; upstream makes an enum of it."""
    return str(getattr(args.optim, "value", args.optim))


def peak_memory(footprint: Footprint, layout: str, num_processes: int) -> tuple[str, dict[str, float]]:
    """The phase of a run with the peak, and the bytes of one process in it, by part (`PARTS`), with their `total`."""
    return _fullest(_phases(footprint, layout, num_processes))


def moments(footprint: Footprint, layout: str, num_processes: int) -> dict[str, tuple[str, dict[str, float]]]:
    """The two moments of a run: `loading`, and of `training` the phase with the peak. Values as of `peak_memory`."""
    phases = _phases(footprint, layout, num_processes)
    return {"loading": (LOADING, phases.pop(LOADING)), "training": _fullest(phases)}


def _phases(footprint: Footprint, layout: str, num_processes: int) -> Phases:
    engine, _, offload = layout.partition("_")
    phases = _SHARDING[engine](footprint, num_processes)
    if offload:
        phases = _left_on_gpu(engine, phases, footprint)
    for phase, held in phases.items():
        phases[phase] = parts = dict.fromkeys(PARTS, 0.0) | held
        if footprint.on_gpu:
            transient = sum(parts[part] for part in ("gradients", "activations", "keys", "logits", "working"))
            parts["overhead"] = _CONTEXT + _NCCL * (num_processes > 1) + _FRAGMENTS * transient
        parts["total"] = sum(parts.values())
    return phases


def _fullest(phases: Phases) -> tuple[str, dict[str, float]]:
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
    phases[_STEP] = fixed | {"gradients": weights.trained + buckets, "working": work}
    return phases | {LOADING: fixed | {"optimizer": 0}}


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
    phases[_STEP] = fixed | {"gradients": in_float32, "working": work}
    return phases | {LOADING: fixed | {"optimizer": 0}}


def _fsdp2(footprint: Footprint, num_processes: int) -> Phases:
    """FSDP2: everything sharded; a layer and the next, and what is outside the layers, are gathered while they work.

    accelerate (`fsdp2_prepare_model`) keeps trained weights in float32 where the run is in bf16, but for 4-bit models,
    whose adapter stays as trl makes it, bfloat16, and leaves 4-bit weights whole on each process unless they are stored
    as bf16 numbers. The scales of 4-bit weights are no parameters, and are whole on each process always
    (`QuantState` of bitsandbytes). Gradients are sharded when they are exchanged, after the last forward of a step:
    until then each process holds all of them (`Accelerator.no_sync`).
    """
    weights, n = footprint.weights, num_processes
    trained = weights.trained
    if weights.quantized or footprint.mixed_precision:
        trained = (2 if weights.quantized else 4) * weights.num_trained
    whole = _whole(footprint)
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
    added_up = weights.num_trained * 2 if footprint.mixed_precision else trained
    phases = {}
    for name, m in footprint.phases.items():
        gradients = added_up if footprint.accumulates else m["gradients"] * share
        phases[name] = fixed | m | {"gradients": gradients, "working": m["working"] + gathered}
    phases[_STEP] = fixed | {"gradients": trained / n, "working": _optimizer_working(footprint, trained / n)}
    if footprint.loads_reference:  # trl's prepare_fsdp shards the reference as one unit: it is gathered whole
        phases["reference"] = fixed | {"reference": weights.base / n, "working": weights.base}
    one_module = max(weights.largest_layer, weights.outside_layers)  # is whole on the GPU while it is sharded
    loaded = fixed | {"optimizer": 0, "working": one_module}
    if weights.quantized and not _loads_on_cpu(footprint):  # "will still cause the VRAM spike": fsdp2_prepare_model
        loaded = {"weights": weights.base + (base - whole) / n, "adapter": trained}
    return phases | {LOADING: loaded}


def _whole(footprint: Footprint) -> float:
    """Bytes of 4-bit or 8-bit weights that FSDP2 leaves whole on each process."""
    return footprint.weights.scales if footprint.shards_quantized else footprint.weights.quantized


def _left_on_gpu(engine: str, phases: Phases, footprint: Footprint) -> Phases:
    """The phases with offload: the optimizer's step is made on the CPU, where its state and its gradients are.

    Under FSDP2 the sharded weights are there too, and are gathered from there (`CPUOffloadPolicy`).
    """
    gone = {"optimizer": 0.0}
    if engine == "fsdp2":
        gone |= {"weights": _whole(footprint), "adapter": 0.0, "reference": 0.0}
        gone |= {} if footprint.accumulates else {"gradients": 0.0}
    return {name: dict(held) | gone for name, held in phases.items() if name != _STEP}


def host_memory(footprint: Footprint, layout: str, num_processes: int) -> float:
    """Bytes of the CPU's memory that one process needs beside what every run does.

    That is what offload takes from the GPU, and a 4-bit model that is to be sharded, which is loaded there first.
    """
    engine, _, offload = layout.partition("_")
    loaded = footprint.weights.base if engine == "fsdp2" and _loads_on_cpu(footprint) else 0.0
    if not offload:
        return loaded
    step = _SHARDING[engine](footprint, num_processes)[_STEP]
    moved = step["optimizer"] + step["gradients"] + step["working"] * (engine == "fsdp2")
    if engine == "fsdp2":
        moved += step["weights"] - _whole(footprint) + step["adapter"] + step["reference"]
    return max(loaded, moved)


def _loads_on_cpu(footprint: Footprint) -> bool:
    return bool(footprint.weights.quantized) and footprint.shards_quantized


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
