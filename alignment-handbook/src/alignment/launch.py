"""What a launch without GPUs asked for, and upstream does not do by itself."""

import os

from accelerate import PartialState
from accelerate.utils import DistributedType


def settle_cpu_launch() -> None:
    """Makes CPU processes shard as they were launched to: by FSDP, or by DeepSpeed. Does nothing to any other launch.

    - accelerate 1.15 turns a launch with `use_fsdp` into FSDP only where the processes have GPUs or the like
      (`AcceleratorState.__init__` in accelerate/state.py looks for MULTI_GPU and its kin). On CPUs it trains as plain
      DDP, every process with all weights, without a word. Called MULTI_GPU, CPU processes take the same way; their
      device and their backend, gloo, are settled by then.
    - DeepSpeed 0.19 compiles a kernel for reductions on CPUs at the first launch (`build_shm_op` in
      deepspeed/comm/torch.py): that takes minutes, and fails without a compiler. gloo does without.

    To be called when the processes know of each other (`TrainingArguments` is made), before a trainer is.
    """
    state = PartialState()
    if state.distributed_type != DistributedType.MULTI_CPU:
        return
    if _asked_for("FSDP"):
        state.distributed_type = DistributedType.MULTI_GPU
    elif _asked_for("DEEPSPEED"):
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _asked_for(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"
