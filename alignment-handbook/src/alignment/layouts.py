"""How a run is spread over processes: what memory each layout takes, and what it cannot be combined with.

The layouts are `single` (one process), `ddp`, `zero2` and `zero3` (DeepSpeed), `fsdp2` (torch). `Footprint` is what one
process would hold with nothing spread. Sizes are in bytes.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import TrainingArguments

from alignment.errors import UserError
from alignment.models import PolicyConfig

LAYOUTS = ("ddp", "zero2", "zero3", "fsdp2")
PARTS = "weights adapter gradients optimizer activations logits reference working overhead".split()
GB = 1e9

# Assumptions, not measurements: what the CUDA context and its libraries hold, NCCL's buffers between several GPUs, and
# the share of what comes and goes that the caching allocator loses to fragments.
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


#: Bytes by part at each moment that may be the fullest.
Moments = dict[str, dict[str, float]]


class Weights(Protocol):
    """Of a model and its adapter; see `trl_nca.memory.Weights`."""

    base: int
    adapter: int
    trained: int
    num_trained: int
    num_factors: int
    largest_trained: int
    largest_layer: int
    ends: int
    quantized: int


@dataclass(frozen=True)
class Footprint:
    """A run on one process, nothing spread.

    Args:
        weights: Of model and adapter.
        moments: The fullest moments of a step: bytes of `activations`, `gradients`, `logits` and `working` at each.
        optim: `TrainingArguments.optim`.
        mixed: Whether the run is in bf16 or fp16.
        frozen_copy: Whether the reference is a model of its own, in memory while training.
        loads_copy: Whether it is, at least while the reference's log-probs are computed in advance.
        spreads_quantized: Whether quantized weights are stored in a type that FSDP2 shards.
        on_gpu: Else nothing is added for CUDA.
    """

    weights: Weights
    moments: Mapping[str, Mapping[str, float]]
    optim: str
    mixed: bool
    frozen_copy: bool
    loads_copy: bool
    spreads_quantized: bool
    on_gpu: bool


def optimizer_name(args: TrainingArguments) -> str:
    """`optim` as a recipe spells it; upstream makes an enum of it."""
    return str(getattr(args.optim, "value", args.optim))


def launched_layout(num_processes: int) -> str:
    """The layout that accelerate launched: its environment says so."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        return f"zero{stage}" if stage in ("2", "3") else "ddp"
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "fsdp2"
    return "ddp" if num_processes > 1 else "single"


def refusals(policy: PolicyConfig, args: TrainingArguments, layout: str) -> list[dict[str, str]]:
    """What of a recipe a layout cannot do: each `what`, `reason` and `fix`. Empty when all is well.

    Each was tried with the pinned versions (torch 2.13, bitsandbytes 0.50, accelerate 1.15; DeepSpeed 0.19.8).
    """
    found = []

    def refuse(what: str, reason: str, fix: str) -> None:
        found.append({"what": what, "reason": reason, "fix": fix})

    if layout == "fsdp2":
        # bitsandbytes::optimizer_update_32bit: "does not have a sharding strategy registered" for DTensor.
        if optimizer_name(args) in BITSANDBYTES:
            refuse(
                f"optim: {optimizer_name(args)} with fsdp2",
                "bitsandbytes' optimizers do not take sharded weights",
                "--optim=adamw_torch",
            )
        # Linear8bitLt.forward reads weight.CB, which the sharded parameter has not.
        if policy.load_in_8bit:
            refuse(
                "load_in_8bit with fsdp2",
                "8-bit weights lose their scales when they are sharded",
                "load_in_4bit with fsdp2_qlora.yaml, or multi_gpu.yaml",
            )
        # The gathered bytes are cast to MixedPrecisionPolicy.param_dtype as if they were numbers of that type.
        compute = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
        storage = policy.bnb_4bit_quant_storage
        if policy.load_in_4bit and compute and storage not in (None, "uint8", compute):
            refuse(
                f"bnb_4bit_quant_storage: {storage} with fsdp2",
                f"the 4-bit weights' bytes would be cast to {compute} when they are gathered, and be lost",
                f"--bnb_4bit_quant_storage={compute}",
            )
    if layout == "zero3" and (policy.load_in_4bit or policy.load_in_8bit):
        bits = "load_in_4bit" if policy.load_in_4bit else "load_in_8bit"
        # transformers' from_pretrained: zero.Init only where `is_deepspeed_zero3_enabled() and not is_quantized`. On
        # two processes deepspeed.initialize then does not return, where it does for the same model in bfloat16.
        refuse(
            f"{bits} with zero3",
            "transformers loads quantized weights outside ZeRO-3's partitions, and DeepSpeed hangs on them",
            "fsdp2_qlora.yaml, deepspeed_zero2.yaml or multi_gpu.yaml",
        )
    return found


def refuse(policy: PolicyConfig, args: TrainingArguments) -> None:
    """Ends a run whose recipe its launch cannot do, before anything is loaded.

    Raises:
        UserError: Names the combination, the reason and the fix.
    """
    for refusal in refusals(policy, args, launched_layout(args.world_size)):
        raise UserError(f"{refusal['what']}: {refusal['reason']}; use {refusal['fix']}")


def memory(footprint: Footprint, layout: str, num_processes: int) -> tuple[str, dict[str, float]]:
    """The fullest moment of a run, and the bytes on one process then, by part (`PARTS`), with their `total`."""
    moments = {}
    for moment, held in _SPREAD[layout](footprint, num_processes).items():
        moments[moment] = parts = dict.fromkeys(PARTS, 0.0) | held
        if footprint.on_gpu:
            moving = sum(parts[part] for part in ("gradients", "activations", "logits", "working"))
            parts["overhead"] = _CONTEXT + _NCCL * (num_processes > 1) + _FRAGMENTS * moving
        parts["total"] = sum(parts.values())
    return max(moments.items(), key=lambda moment: moment[1]["total"])


def _optimizer(footprint: Footprint, num_trained: float, trained: float) -> float:
    """Bytes of the optimizer's state for so many trained numbers of so many bytes."""
    share = num_trained / max(footprint.weights.num_trained, 1)
    if footprint.optim == "adafactor":
        return 4 * footprint.weights.num_factors * share
    values, size = OPTIMIZERS.get(footprint.optim, OPTIMIZERS["adamw_torch"])
    return values * (trained if size is None else num_trained * size)


def _optimizer_work(footprint: Footprint, trained: float) -> float:
    """Bytes that come and go in the optimizer's step.

    torch's AdamW makes the roots of its second moments: on a GPU all at once, on a CPU one weight after the other, and
    once more divided; fused it makes none.
    """
    if footprint.optim != "adamw_torch":
        return 0.0
    return trained if footprint.on_gpu else 2 * footprint.weights.largest_trained


def _replicated(footprint: Footprint, num_processes: int) -> Moments:
    """One process, or DDP: everything on each, and gradients once more in DDP's buckets."""
    weights = footprint.weights
    buckets = weights.trained if num_processes > 1 else 0
    fixed = {
        "weights": weights.base,
        "adapter": weights.adapter,
        "optimizer": _optimizer(footprint, weights.num_trained, weights.trained),
        "reference": weights.base if footprint.frozen_copy else 0,
    }
    moments = {name: fixed | m | {"gradients": m["gradients"] + buckets} for name, m in footprint.moments.items()}
    work = _optimizer_work(footprint, weights.trained)
    return moments | {"optimizer step": fixed | {"gradients": weights.trained + buckets, "working": work}}


def _zero(footprint: Footprint, num_processes: int, stage: int) -> Moments:
    """ZeRO: float32 weights, optimizer state and gradients spread over the processes, at stage 3 all weights too.

    Weights are in the run's type, also the trained ones (`DeepSpeedEngine`: `module.bfloat16()`).
    """
    weights, n = footprint.weights, num_processes
    size = 2 if footprint.mixed else 4
    held = n if stage == 3 else 1
    trained = weights.num_trained * size
    fixed = {
        "weights": weights.base / held,
        "adapter": (trained if weights.adapter else 0) / held,
        "optimizer": (4 * weights.num_trained + _optimizer(footprint, weights.num_trained, 4 * weights.num_trained))
        / n,
        "reference": weights.base / held if footprint.frozen_copy else 0,
    }
    buffers = _BUCKET * size
    if stage == 3:
        buffers += min(weights.base + weights.adapter, (_MAX_LIVE + _PREFETCH) * size)
    moments = {
        name: fixed | m | {"gradients": m["gradients"] / n, "working": m["working"] + buffers}
        for name, m in footprint.moments.items()
    }
    in_float32 = 4 * weights.num_trained / n  # the gradients, for the step
    work = buffers + _optimizer_work(footprint, in_float32)
    return moments | {"optimizer step": fixed | {"gradients": in_float32, "working": work}}


def _fsdp2(footprint: Footprint, num_processes: int) -> Moments:
    """FSDP2: everything spread; a layer and the next, and what is outside the layers, are gathered while they work.

    accelerate (`fsdp2_prepare_model`) keeps trained weights in float32 where the run is in bf16, but for 4-bit models,
    whose adapter stays as trl makes it, bfloat16, and leaves 4-bit weights whole on each process unless they are stored
    as bf16 numbers.
    """
    weights, n = footprint.weights, num_processes
    trained = weights.trained
    if weights.quantized or footprint.mixed:
        trained = (2 if weights.quantized else 4) * weights.num_trained
    whole = 0 if footprint.spreads_quantized else weights.quantized
    base = weights.base if weights.adapter else trained
    fixed = {
        "weights": (base - whole) / n + whole,
        "adapter": (trained if weights.adapter else 0) / n,
        "optimizer": _optimizer(footprint, weights.num_trained, trained) / n,
        "reference": weights.base / n if footprint.frozen_copy else 0,
    }
    layers = 2 * weights.largest_layer * (1 - whole / max(weights.base, 1))
    gathered = layers + weights.ends + layers * weights.trained / (weights.base + weights.adapter)
    share = trained / max(weights.trained, 1) / n
    moments = {
        name: fixed | m | {"gradients": m["gradients"] * share, "working": m["working"] + gathered}
        for name, m in footprint.moments.items()
    }
    moments["optimizer step"] = fixed | {"gradients": trained / n, "working": _optimizer_work(footprint, trained / n)}
    if footprint.loads_copy:  # trl.models.utils.prepare_fsdp shards the reference as one unit: it is gathered whole
        moments["reference"] = fixed | {"reference": weights.base / n, "working": weights.base}
    if weights.quantized:  # "will still cause the VRAM spike": accelerate's fsdp2_prepare_model
        moments["loading"] = {"weights": weights.base, "adapter": trained}
    return moments


_SPREAD = {
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
