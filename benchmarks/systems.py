"""What is compared: each system does the same optimizer step on the same rows, its own way."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, MistralConfig
from trl import DPOConfig, DPOTrainer

from benchmarks.padded import padded_loss
from benchmarks.rows import Case, tiny_row, tokenizer
from nca_trainer import NCAConfig, NCATrainer

LORA = LoraConfig(
    r=16,
    lora_alpha=16,
    lora_dropout=0.0,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    task_type="CAUSAL_LM",
)
BETA, ALPHA = 0.01, 0.1


@dataclass(frozen=True)
class Setting:
    """What a system is given, beside the rows.

    Args:
        checkpointing: Whether layers are run again in the backward pass.
        at_once: Prompts of a micro-batch.
    """

    checkpointing: bool
    at_once: int

    def __str__(self) -> str:
        return f"{'' if self.checkpointing else 'no '}checkpointing, {self.at_once} at once"


class System(ABC):
    """A model behind fresh LoRA, `model`, and a way to get its gradient, `backward`.

    Args:
        base: The model to adapt.
        case: How it is run.
        device: Where it is.
        settings: Those to choose from; it is made with the first.
    """

    model: PeftModel

    def __init__(self, base: nn.Module, case: Case, device: str, settings: Callable[[Case], list[Setting]]):
        self.case, self.device = case, device
        self.settings = settings(case)
        self.model = self.adapt(base)
        self.use(self.settings[0])

    @abstractmethod
    def adapt(self, base: nn.Module) -> PeftModel:
        """The model behind LoRA, ready to be trained."""

    def use(self, setting: Setting) -> None:
        """Runs the steps to come with this setting."""
        self.setting, base = setting, self.model.get_base_model()
        base.activation_checkpointing_disable()
        base.disable_input_require_grads()
        if setting.checkpointing:
            base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            base.enable_input_require_grads()

    @property
    def given(self) -> str:
        """What it is given, for the table."""
        return str(self.setting)

    def ready(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What is done before the clock starts."""
        return rows

    def batches(self, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """The micro-batches of a step."""
        return [rows[at : at + self.setting.at_once] for at in range(0, len(rows), self.setting.at_once)]

    @abstractmethod
    def backward(self, rows: list[dict[str, Any]]) -> None:
        """The gradient of the mean loss of these rows."""


class Padded(System):
    """(a) The 2024 way: micro-batches of one prompt, the reference run at every step."""

    def adapt(self, base: nn.Module) -> PeftModel:
        return get_peft_model(base, LORA).train()

    def backward(self, rows: list[dict[str, Any]]) -> None:
        for (row,) in self.batches(rows):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.case.precision == "bf16"):
                loss = padded_loss(self.model, row, BETA, ALPHA, self.device)
            (loss / len(rows)).backward()


class Ours(System):
    """(c) This project's trainer."""

    def adapt(self, base: nn.Module) -> PeftModel:
        self.trainer = self._trainer(base)
        # What `train` does: without it the policy runs outside autocast.
        return self.trainer.accelerator.prepare_model(self.trainer.model)

    def _trainer(self, base: nn.Module) -> DPOTrainer:
        args = NCAConfig(
            **_settings(self.case, self.device),
            max_tokens_per_forward=self.case.max_tokens,
            shared_prompt="true",
            loss_type="NCA",
            beta=BETA,
            alpha=ALPHA,
        )
        rows = Dataset.from_list([tiny_row(self.case)])
        return NCATrainer(base, args=args, train_dataset=rows, processing_class=tokenizer(), peft_config=LORA)

    @property
    def given(self) -> str:
        bound = self.case.max_tokens
        return f"{super().given}, at most {bound} tokens a forward" if bound else super().given

    def backward(self, rows: list[dict[str, Any]]) -> None:
        trainer, batches = self.trainer, self.batches(rows)
        trainer.current_gradient_accumulation_steps = len(batches)  # upstream divides by it
        for batch in batches:
            inputs = trainer._prepare_inputs(trainer.data_collator(batch))
            trainer.training_step(trainer.model, inputs, torch.tensor(len(rows)))
        self.gather_metrics()

    def gather_metrics(self) -> None:
        """What the trainer does before the optimizer's step."""
        self.trainer.step_metrics.gather()


class OursCached(Ours):
    """(c) with `precompute_ref_log_probs`, from the second run on: the reference's log-probs come with the rows."""

    def ready(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        trainer = self.trainer
        inputs = trainer._prepare_inputs(trainer.data_collator(rows))
        logps = trainer.compute_ref_log_probs(trainer.model, inputs).tolist()
        return [row | {"ref_logps": logps[i][: len(row["scores"])]} for i, row in enumerate(rows)]


class Upstream(Ours):
    """(b) `trl.DPOTrainer`, with the loss that upstream calls nca_pair. Its own LM head, SDPA over padded rows."""

    def _trainer(self, base: nn.Module) -> DPOTrainer:
        args = DPOConfig(**_settings(self.case, self.device), loss_type=["nca_pair"], beta=BETA)
        rows = Dataset.from_list([{"prompt": "to", "chosen": " begin", "rejected": " with"}])
        return DPOTrainer(base, args=args, train_dataset=rows, processing_class=tokenizer(), peft_config=LORA)

    def batches(self, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        return [[_as_pair(row) for row in batch] for batch in super().batches(rows)]

    def gather_metrics(self) -> None:
        """Nothing: upstream gathers in each micro-batch."""


def _one_by_one(case: Case) -> list[Setting]:
    return [Setting(case.checkpointing, 1)]


def _together(case: Case) -> list[Setting]:
    """All prompts of a step in one micro-batch."""
    return [Setting(case.checkpointing, case.prompts)]


def _recomputed_or_not(case: Case) -> list[Setting]:
    return [Setting(checkpointing, case.prompts) for checkpointing in (True, False)]


def _any(case: Case) -> list[Setting]:
    """With checkpointing and without, the step in one micro-batch, in two, in four."""
    sizes = [case.prompts // parts for parts in (1, 2, 4) if case.prompts % parts == 0]
    return [Setting(checkpointing, size) for checkpointing in (True, False) for size in sizes]


BEST, UPSTREAM_BEST = "ours at its best", "upstream at its best"
CACHED = "ours, one micro-batch, reference cached"
#: A system by its name, to be made with (base, case, device).
SYSTEMS: dict[str, Callable[[nn.Module, Case, str], System]] = {
    "padded": partial(Padded, settings=_one_by_one),
    "upstream": partial(Upstream, settings=_together),
    UPSTREAM_BEST: partial(Upstream, settings=_any),
    "ours": partial(Ours, settings=_one_by_one),
    "ours, reference cached": partial(OursCached, settings=_one_by_one),
    "ours, one micro-batch": partial(Ours, settings=_together),
    CACHED: partial(OursCached, settings=_together),
    BEST: partial(Ours, settings=_recomputed_or_not),
    f"{BEST}, reference cached": partial(OursCached, settings=_recomputed_or_not),
}
TINY = "-tiny"
#: Random weights: in NF4, as QLoRA has them, and in bfloat16.
MISTRAL_4BIT, MISTRAL_BF16 = "mistral-7b-4bit", "mistral-7b-bf16"


def load_model(name: str, case: Case, device: str) -> nn.Module:
    """The model to adapt: a folder's weights, or Mistral-7B with random ones; after a "-tiny", in a small size."""
    torch.manual_seed(0)
    if name.removesuffix(TINY) in (MISTRAL_4BIT, MISTRAL_BF16):
        config = mistral_config(tiny=name.endswith(TINY))
        base = (random_mistral_4bit if name.startswith(MISTRAL_4BIT) else random_mistral)(config, device)
    else:
        base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
    return base


def mistral_config(tiny: bool, **changed: Any) -> MistralConfig:
    """Mistral-7B's sizes, or small ones of the same kind."""
    small = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip
    layers = int(os.environ.get("MISTRAL_LAYERS", 32))  # fewer in a rehearsal
    return MistralConfig(**{"vocab_size": 32000, "num_hidden_layers": layers} | (small if tiny else {}) | changed)


def random_mistral(config: MistralConfig, device: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A Mistral with random weights, frozen as LoRA's base is."""
    with torch.device(device):  # in its type from the start: in float32 three of them are more than a GPU has
        return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)


def random_mistral_4bit(config: MistralConfig, device: str) -> nn.Module:
    """A Mistral with random weights, its linear layers but the head in NF4, as QLoRA has it."""
    import bitsandbytes as bnb

    model = random_mistral(config, device)
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                quantized = bnb.nn.Linear4bit(  # on a device without memory: its own weights would be drawn on the CPU
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta"
                )
                quantized.weight = bnb.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False
                )
                setattr(module, name, quantized.to(device))
    model.is_loaded_in_4bit = True  # what peft asks for
    return model


def _settings(case: Case, device: str) -> dict[str, Any]:
    return {
        "output_dir": f"/tmp/nca-bench-{os.getpid()}",
        "per_device_train_batch_size": 1,
        "bf16": case.precision == "bf16",
        "fp16": False,
        "use_cpu": device == "cpu",
        "gradient_checkpointing": case.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "max_length": None,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def _as_pair(row: dict[str, Any]) -> dict[str, Any]:
    chosen, rejected = row["response_ids"]
    return {"prompt_ids": row["prompt_ids"], "chosen_ids": chosen, "rejected_ids": rejected}
