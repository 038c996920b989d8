"""The processes of a run: how they were launched, and how much memory they took."""

import os
import resource
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, get_int_from_env


def launched_layout(num_processes: int) -> str:
    """The layout that accelerate launched, from its environment: `single`, or one of `plan.layouts.LAYOUTS`."""
    if _asked_for("DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        offloads = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none"
        return f"zero{stage}{'_offload' * offloads}" if stage in ("2", "3") else "ddp"
    if _asked_for("FSDP"):
        return "fsdp2_offload" if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true" else "fsdp2"
    return "ddp" if num_processes > 1 else "single"


def launched_sequence_parallelism() -> dict[str, int]:
    """Over how many processes accelerate's launch shards each sequence, by `cp_size` and `sp_size`; those that do."""
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        return {}
    sizes = {name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")) for name in ("cp_size", "sp_size")}
    return {name: size for name, size in sizes.items() if size > 1}


def enable_cpu_sharding() -> None:
    """Enables FSDP and DeepSpeed sharding on CPU-only launches that ask for it. Changes no other launch.

    - accelerate 1.15 turns a launch with `use_fsdp` into FSDP only where the processes have GPUs or the like
      (`AcceleratorState.__init__` in accelerate/state.py looks for MULTI_GPU and its kin). On CPUs it trains as plain
      DDP, every process with all weights, without a word. Called MULTI_GPU, CPU processes take the same way; their
      device and their backend, gloo, are set by then.
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


def processes_here() -> int:
    """How many processes of the launch run on this machine."""
    names = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
    return max(get_int_from_env(names, 1), 1)


def launch_checkpoints() -> bool:
    """Whether accelerate launched FSDP with activation checkpointing of its own."""
    return _asked_for("FSDP") and os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true"


def peak_memory_gb() -> float:
    """Peak memory of this process in GB (1e9 bytes): of the GPU's allocator where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _asked_for(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"
