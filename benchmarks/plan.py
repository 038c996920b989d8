"""What `--plan` says of memory, against the measured peak of real training on this CPU.

    python -m benchmarks.plan               random models of a few layers, and SmolLM2-135M
    python -m benchmarks.plan --only lora   some of them

The peak is exact: every allocation and release of torch's CPU allocator while two optimizer steps run (torch.profiler),
on top of the weights that were there before. Each case runs in a process of its own.
"""

import argparse
import copy
import gc
import multiprocessing as mp
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from alignment.plan import layouts
from alignment.plan.meta_model import StepSpec
from alignment.plan.trace import largest_forward, trace_step, weight_sizes
from benchmarks.systems import LORA
from benchmarks.tiny import tiny_tokenizer
from nca_trainer import NCAConfig, NCATrainer

SMOLLM = "models/SmolLM2-135M-Instruct"
#: Large enough that activations dominate, small enough to train in seconds.
SMALL = {
    "vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    Args:
        kind: "full", "lora" or "4bit".
        checkpointing: Whether activations are made again in the backward pass.
        precision: "fp32" or "bf16" (autocast; weights stay float32).
        model: A folder, or None for a random model of `SMALL` sizes.
        lengths: Tokens of the prompt and of each of the four responses.
        prompts: Prompts of one optimizer step, one at a time.
        max_tokens: `max_tokens_per_forward`.
    """

    kind: str
    checkpointing: bool
    precision: str = "fp32"
    model: str | None = None
    lengths: tuple[int, int] = (200, 200)
    prompts: int = 1
    max_tokens: int | None = None

    def __str__(self) -> str:
        more = f", {self.prompts} micro-batches" * (self.prompts > 1) + f", <= {self.max_tokens} tokens" * bool(
            self.max_tokens
        )
        checkpointing = "with" if self.checkpointing else "without"
        return f"{self.kind}, {self.precision}, {checkpointing} checkpointing{more}"

    def config(self) -> Any:
        return AutoConfig.from_pretrained(self.model) if self.model else LlamaConfig(**SMALL)


CASES = [
    *(Case(kind, checkpointing) for kind in ("full", "lora", "4bit") for checkpointing in (False, True)),
    *(
        Case(kind, checkpointing, "bf16", lengths=(100, 60))
        for kind in ("full", "lora")
        for checkpointing in (False, True)
    ),
    Case("full", False, prompts=2),
    Case("lora", False, max_tokens=640),
    *(Case("lora", checkpointing, lengths=(100, 600), max_tokens=150) for checkpointing in (False, True)),
    *(Case("lora", checkpointing, model=SMOLLM) for checkpointing in (False, True)),
    Case("full", False, model=SMOLLM),
]


def planned(case: Case) -> dict[str, float]:
    """The plan's memory by part, in bytes."""
    prompt, response = case.lengths
    batch, num_chunks = largest_forward([(prompt, [response] * 4)], case.max_tokens)
    batch |= {"piece": case.max_tokens} if case.max_tokens and batch["layout"].num_tokens > case.max_tokens else {}
    spec = StepSpec(
        config=case.config(),
        dtype=torch.float32,
        peft_config=None if case.kind == "full" else LORA,
        quantization="4bit" if case.kind == "4bit" else None,
        autocast=torch.bfloat16 if case.precision == "bf16" else None,
        checkpointing={"use_reentrant": False} if case.checkpointing else None,
        device="cpu",
        accumulates=case.prompts > 1 or num_chunks > 1,
    )
    footprint = layouts.Footprint(
        weights=weight_sizes(spec),
        phases=trace_step(spec, batch).phases,
        optim="adamw_torch",
        mixed_precision=case.precision == "bf16",
        reference_copy=case.kind == "full",
        loads_reference=case.kind == "full",
        shards_quantized=False,
        on_gpu=False,
    )
    return layouts.peak_memory(footprint, "single", 1)[1]


def measured(case: Case) -> int:
    """The peak of two optimizer steps, in bytes."""
    prompt, response = case.lengths
    row = {
        "prompt_ids": [5] * prompt,
        "response_ids": [[6 + k] * response for k in range(4)],
        "scores": [0.1, 0.4, 0.2, 0.3],
    }
    with tempfile.TemporaryDirectory() as folder:
        args = NCAConfig(
            folder, max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=case.prompts,
            gradient_checkpointing=case.checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=case.precision == "bf16", optim="adamw_torch", max_tokens_per_forward=case.max_tokens, max_length=None,
            use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = NCATrainer(
            _model(case), _model(case) if case.kind == "full" else None, args=args,
            train_dataset=Dataset.from_list([row] * 4), processing_class=tiny_tokenizer(),
            peft_config=None if case.kind == "full" else copy.deepcopy(LORA),
        )  # fmt: skip
        gc.collect()  # what an earlier trainer left would be released in between
        held = sum(map(_bytes, filter(None, (trainer.model, trainer.ref_model))))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer.train()
    return held + peak(profiler)


def peak(profiler: profile) -> int:
    """Most bytes that torch's allocator gave out during a profile, above those at its start."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _model(case: Case) -> nn.Module:
    torch.manual_seed(0)
    if case.kind != "4bit":
        auto = AutoModelForCausalLM
        return auto.from_pretrained(case.model, dtype=torch.float32) if case.model else auto.from_config(case.config())
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(case.config()).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def _bytes(model: nn.Module) -> int:
    """Of a model's weights, scales of quantized ones included."""
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        total += state.absmax.numel() * state.absmax.element_size() if state is not None else 0
    return total


def compare(case: Case) -> tuple[float, float, dict[str, float]]:
    """Planned and measured peak in GB, and the plan by part."""
    torch.set_num_threads(1)  # memory does not depend on it, and a second one waits on a busy machine
    plan = planned(case)
    return plan["total"] / layouts.GB, measured(case) / layouts.GB, plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="Cases with this in their name.")
    chosen = parser.parse_args().only
    print("| model | case | planned, GB | measured, GB | planned / measured |\n|---|---|---|---|---|")
    for case in CASES:
        if chosen not in str(case):
            continue
        with mp.get_context("spawn").Pool(1) as pool:
            plan, real, _ = pool.apply(compare, (case,))
        model = "SmolLM2-135M" if case.model else "random, 4 layers"
        print(f"| {model} | {case} | {plan:.3f} | {real:.3f} | {plan / real:.2f} |", flush=True)


if __name__ == "__main__":
    main()
