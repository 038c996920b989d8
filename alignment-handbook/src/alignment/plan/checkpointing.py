"""`gradient_checkpointing: auto`: off where a step fits the free memory without it, else on."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from transformers import PretrainedConfig
from transformers.integrations import deepspeed

from alignment.configs import Configs
from alignment.launch import launch_checkpoints, launched_layout, processes_here
from alignment.plan import layouts
from alignment.plan.estimate import MemoryEstimator, longest_rows
from alignment.plan.steps import Plan

#: Share of the free memory that a step may be planned to take. The plan is held to 15 % of measured peaks, so that a
#: peak is at most the plan / 0.85. What is in doubt is recomputed: that costs a part of each step, and a step that does
#: not fit ends the run.
SHARE = 0.85


@dataclass(frozen=True)
class Checkpointing:
    """What `auto` came to.

    Attributes:
        on: Whether activations are computed again.
        free_gb: Memory that is there for a process, in GB (1e9 bytes).
        without_gb, with_gb: Peak of a process without gradient checkpointing and with it, in GB.
        reason: Why nothing was planned; None where it was.
    """

    on: bool
    free_gb: float | None = None
    without_gb: float | None = None
    with_gb: float | None = None
    reason: str | None = None

    def __str__(self) -> str:
        choice = f"Gradient checkpointing (auto): {'on' if self.on else 'off'}"
        if self.reason is not None:
            return f"{choice}: {self.reason}"
        bound = f"{'above' if self.on else 'within'} {SHARE:.0%} of the {self.free_gb:.2f} GB free"
        doubt = ", which may not fit either" if self.with_gb > self.free_gb else ""
        return f"{choice}: a step takes {self.without_gb:.2f} GB without it, {bound}; {self.with_gb:.2f} with it{doubt}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for plan.json."""
        return {"asked": "auto", **asdict(self), "summary": str(self)}


def decide(configs: Configs, model_config: PretrainedConfig, rows: Dataset, plan: Plan) -> Checkpointing | None:
    """What a run that asks for `auto` does, the same on all its processes. To be called by all of them.

    Args:
        configs: The settings of the run.
        model_config: The model's config.
        rows: The rows to train on, tokenized.
        plan: The arithmetic of the run's batch.

    Returns:
        The choice; None where the recipe says true or false.
    """
    args = configs.trainer
    if args.gradient_checkpointing != "auto":
        return None
    if launch_checkpoints():  # transformers refuses the two together
        return Checkpointing(False, reason="the launch recomputes by itself (fsdp_activation_checkpointing)")
    if args.device.type not in ("cuda", "cpu", "mps"):
        return Checkpointing(True, reason=f"how much memory is free is not known of a device {args.device.type}")
    free = min(gather_object([free_memory_gb(args.device)]))  # GPUs may differ, or be shared with other programs
    decision = None
    if PartialState().is_main_process:
        decision = _planned(configs, model_config, rows, plan, free)
    (decision,) = broadcast_object_list([decision])
    return decision


def _planned(
    configs: Configs, model_config: PretrainedConfig, rows: Dataset, plan: Plan, free_gb: float
) -> Checkpointing:
    args = configs.trainer
    groups = longest_rows(rows, rows["length"][:], plan.per_device_train_batch_size)
    accumulates, on_gpu = plan.gradient_accumulation_steps > 1, args.device.type == "cuda"
    try:
        with _outside_zero3():
            estimator = MemoryEstimator(configs, model_config, groups, accumulates, on_gpu)
            return choose(estimator, launched_layout(plan.num_processes), plan.num_processes, free_gb)
    except Exception as error:  # a model that only its own code can build, say: it can be trained all the same
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return Checkpointing(True, reason=f"the memory cannot be planned ({words})")


def choose(estimator: MemoryEstimator, layout: str, num_processes: int, free_gb: float) -> Checkpointing:
    """Chooses by the plan, and leaves the estimator at the choice.

    Args:
        estimator: Knows the run.
        layout: One of `layouts.LAYOUTS`, or "single".
        num_processes: Processes of the run.
        free_gb: Memory that is there for a process.
    """
    peaks = {}
    for estimator.checkpointing in (True, False):
        _, parts = layouts.peak_memory(estimator.footprint(layout), layout, num_processes)
        peaks[estimator.checkpointing] = layouts.in_gb(parts)["total"]
    estimator.checkpointing = peaks[False] > SHARE * free_gb
    return Checkpointing(estimator.checkpointing, round(free_gb, 3), peaks[False], peaks[True])


def free_memory_gb(device: torch.device) -> float:
    """Memory that a process can have, in GB: what is free on its GPU, or its part of what is free on the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / layouts.GB
    return psutil.virtual_memory().available / processes_here() / layouts.GB


@contextlib.contextmanager
def _outside_zero3() -> Iterator[None]:
    """Builds models as they are, where transformers would partition any new one over the processes of a ZeRO-3 run."""
    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held
