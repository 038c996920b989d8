"""Runs of run_reward.py, several in the same processes: importing takes longer than any of them.

    accelerate launch --config_file CONFIG --num_processes=2 tests/launch_runs.py RUNS.json

RUNS.json is a list of command lines of run_reward.py, or with make_pairs of run_preference.py. Each process leaves
`rank_N.json` in a run's output folder: how it was launched, and how much of the policy it holds.

`fork_launches` and `fork_workers` are called in a process that has imported everything: accelerate sets a launch up as
it always does, and its processes are then forked from this one, in place of started anew.
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed.run
from accelerate.commands.launch import launch_command, launch_command_parser
from torch import nn
from torch.distributed.tensor import DTensor

from nca_trainer import NCATrainer, PairwiseNCATrainer
from run_reward import align
from tests.forked import draw_nothing, run_as_main


class WatchedTrainer(NCATrainer):
    """Writes down how it was launched, once trained."""

    reference_held = None  # where the reference ran

    def compute_ref_log_probs(self, model: nn.Module, inputs: Any) -> Any:
        self.reference_held = self.reference_held or held(model)
        return super().compute_ref_log_probs(model, inputs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        facts = {"type": self.accelerator.distributed_type.value, "processes": self.args.world_size} | held(self.model)
        facts["reference"] = self.reference_held
        (Path(self.args.output_dir) / f"rank_{self.args.process_index}.json").write_text(json.dumps(facts))
        return result


class WatchedPairTrainer(WatchedTrainer, PairwiseNCATrainer):
    """The same, of pairs."""


def held(model: nn.Module) -> dict[str, int]:
    """Numbers in the policy's parameters, and those that this process holds: fewer, where they are sharded."""
    whole = local = 0
    for parameter in model.parameters():
        whole += getattr(parameter, "ds_numel", parameter.numel())
        own = parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)
        local += own.numel()
    return {"whole": whole, "local": local}


def run(path: str) -> None:
    """All runs of a file, with the flags that follow it on the command line."""
    draw_nothing()
    if not torch.cuda.is_available():  # CPU offload pins memory for a GPU
        torch.Tensor.pin_memory, torch.Tensor.is_pinned = (lambda self, *_: self), (lambda self, *_: True)
    for argv in json.loads(Path(path).read_text()):
        pairs = any(flag.startswith("--make_pairs") for flag in argv)
        align([*argv, *sys.argv[2:]], WatchedPairTrainer if pairs else WatchedTrainer)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fork(args: Any) -> None:
    """In place of `torch.distributed.run.run`: the processes of one machine."""
    port, children = free_port(), []
    for rank in range(int(args.nproc_per_node)):
        child = os.fork()
        if not child:
            ranks = dict.fromkeys(["RANK", "LOCAL_RANK"], str(rank))
            worlds = dict.fromkeys(["WORLD_SIZE", "LOCAL_WORLD_SIZE"], str(args.nproc_per_node))
            os.environ |= ranks | worlds | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            try:
                sys.argv[1:] = args.training_script_args
                run(sys.argv[1])
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit(1)


def fork_launches(launches: list[tuple[list[str], str]]) -> None:
    """Launches by their arguments of `accelerate launch` and their RUNS.json, one after the other."""
    torch.distributed.run.run = fork
    for launch, runs in launches:
        launch_command(launch_command_parser().parse_args([*launch, __file__, runs]))


def fork_workers(argv: list[str]) -> None:
    """A whole `accelerate launch` with torchrun's agent, which forks its processes; they run the script as always."""
    config_from_args = torch.distributed.run.config_from_args

    def forked(args: Any) -> Any:
        config, *_ = config_from_args(args)
        config.start_method = "fork"
        return config, run_worker, [args.training_script, *args.training_script_args]

    torch.distributed.run.config_from_args = forked
    launch_command(launch_command_parser().parse_args(argv))


def run_worker(*argv: str) -> None:
    run_as_main(list(argv))


if __name__ == "__main__":
    run(sys.argv[1])
