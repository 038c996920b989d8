"""A long response in pieces against the same whole, on this CPU: time, peak of memory, and how far gradients differ.

    python -m benchmarks.pieces

A random Llama with LoRA, one prompt of 64 tokens with a long response and a short one, in float32. Whole and in pieces
take turns in one process, so that a busy machine slows both; the ratio is the median of their turns'. Peaks are exact:
every allocation of torch's CPU allocator during a step (torch.profiler), above what was there before.
"""

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.plan import LORA, SMALL, peak
from trl_nca.chunks import logps_for_training, split_batch
from trl_nca.collate import GroupCollator
from trl_nca.logps import prepare, response_logps
from trl_nca.losses import LOSSES
from trl_nca.pieces import WHOLE, Cutting

#: Most tokens of a forward.
MOST = 512


def make_model(checkpointing: bool) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(
        LlamaForCausalLM(LlamaConfig(**SMALL | {"max_position_embeddings": 2**14})), copy.deepcopy(LORA)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    prepare([model])
    if checkpointing:
        base = model.get_base_model()
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    return model.train()


def make_batch(length: int) -> dict[str, Any]:
    torch.manual_seed(1)
    ids = [torch.randint(SMALL["vocab_size"], (n,)).tolist() for n in (64, length - 63, 30)]
    return GroupCollator()([{"prompt_ids": ids[0], "response_ids": ids[1:], "scores": [1.0, 0.0]}])


def step(model: nn.Module, batch: dict[str, Any], loss_type: str, cutting: Cutting) -> list[Tensor]:
    """Gradients of the adapter's weights."""
    model.zero_grad()
    loss, targets = LOSSES[loss_type], torch.tensor([[0.7, 0.3]])

    def loss_of(logps: Tensor) -> Tensor:
        lengths = torch.tensor(batch["layout"].num_targets)
        return loss.loss(0.01 * logps / lengths, targets, batch["response_mask"]).sum()

    chunks = split_batch(batch, MOST, True, cutting)
    logps = logps_for_training(
        lambda chunk: response_logps(model, chunk, True),
        chunks,
        loss.separable,
        lambda logps: loss_of(logps).backward(),
    )
    loss_of(logps).backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


def compare(length: int, checkpointing: bool, loss_type: str, turns: int) -> str:
    """A row of the table."""
    model, batch = make_model(checkpointing), make_batch(length)
    ways = {"whole": WHOLE, "pieces": Cutting(2**14)}
    found, peaks = {}, {}
    for way, cutting in ways.items():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            found[way] = torch.cat([g.flatten() for g in step(model, batch, loss_type, cutting)])
        peaks[way] = peak(profiler) / 1e6
    ratios = []
    for _ in range(turns):
        seconds = {}
        for way, cutting in ways.items():
            start = time.perf_counter()
            step(model, batch, loss_type, cutting)
            seconds[way] = time.perf_counter() - start
        ratios.append(seconds["pieces"] / seconds["whole"])
    differ = ((found["pieces"] - found["whole"]).norm() / found["whole"].norm()).item()
    cells = [length, loss_type, "yes" if checkpointing else "no", f"{peaks['whole']:.0f}", f"{peaks['pieces']:.0f}"]
    cells += [f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}", f"{differ:.0e}"]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = "tokens, loss, checkpointing, whole MB, pieces MB, time of whole, from to, gradients differ by".split(", ")
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for length in options.lengths:
        for loss_type in ("NCA", "InfoNCA"):
            for checkpointing in (False, True):
                print(compare(length, checkpointing, loss_type, options.turns), flush=True)


if __name__ == "__main__":
    main()
