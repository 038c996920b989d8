"""What is compared: each system does the same optimizer step on the same rows, its own way."""

import functools
import importlib.util
import json
import os
import resource
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig
from trl import DPOConfig, DPOTrainer

from benchmarks.padded import padded_loss
from benchmarks.tiny import tiny_tokenizer
from nca_trainer import NCAConfig, NCATrainer

LORA = LoraConfig(
    r=16,
    lora_alpha=16,
    lora_dropout=0.0,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    task_type="CAUSAL_LM",
)
BETA, ALPHA = 0.01, 0.1


@dataclass
class Case:
    """A kind of rows, and how they are run."""

    name: str
    num_responses: int
    prompt_tokens: int  # mean
    response_tokens: int  # mean
    ragged: bool = True
    prompts: int = 1  # of an optimizer step, in micro-batches of one
    precision: str = "fp32"
    checkpointing: bool = False
    max_tokens: int | None = None  # of a forward, where a system can bound it
    max_length: int | None = None  # of prompt and response
    vocabulary: int = 32000  # ids are drawn from
    text: bool = False  # pieces of the embedded data's text, in place of random ids
    paged: bool = False  # AdamW whose state moves out of a GPU that is full
    systems: tuple[str, ...] = ("padded", "ours, reference cached", "ours")


class System(ABC):
    """A model behind fresh LoRA, `model`, and a way to get its gradient, `backward`."""

    model: PeftModel

    def ready(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What is done before the clock starts."""
        return rows

    @abstractmethod
    def backward(self, rows: list[dict[str, Any]]) -> None:
        """The gradient of the mean loss of these rows."""


class Padded(System):
    """(a) The 2024 way: micro-batches of one prompt, the reference run at every step."""

    def __init__(self, base: nn.Module, case: Case, device: str):
        self.model = get_peft_model(base, LORA).train()
        self.case, self.device = case, device

    def backward(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.case.precision == "bf16"):
                loss = padded_loss(self.model, row, BETA, ALPHA, self.device)
            (loss / len(rows)).backward()


class Ours(System):
    """(c) This project's trainer."""

    def __init__(self, base: nn.Module, case: Case, device: str):
        self.trainer = self._trainer(base, case, device)
        # What `train` does: without it the policy runs outside autocast.
        self.trainer.current_gradient_accumulation_steps = 1
        self.model = self.trainer.accelerator.prepare_model(self.trainer.model)

    def _trainer(self, base: nn.Module, case: Case, device: str) -> DPOTrainer:
        args = NCAConfig(
            **_settings(case, device),
            max_tokens_per_forward=case.max_tokens,
            shared_prompt="true",
            loss_type="NCA",
            beta=BETA,
            alpha=ALPHA,
        )
        rows = Dataset.from_list([tiny_row(case)])
        return NCATrainer(base, args=args, train_dataset=rows, processing_class=_tokenizer(), peft_config=LORA)

    def batches(self, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        return [[row] for row in rows]

    def backward(self, rows: list[dict[str, Any]]) -> None:
        trainer = self.trainer
        for batch in self.batches(rows):
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


class OursTogether(Ours):
    """(c) with the prompts of a step in one micro-batch, as upstream's pairs are."""

    def batches(self, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        return [rows]


class Upstream(OursTogether):
    """(b) `trl.DPOTrainer`, with the loss that upstream calls nca_pair."""

    def _trainer(self, base: nn.Module, case: Case, device: str) -> DPOTrainer:
        args = DPOConfig(**_settings(case, device), loss_type=["nca_pair"], beta=BETA)
        rows = Dataset.from_list([{"prompt": "to", "chosen": " begin", "rejected": " with"}])
        return DPOTrainer(base, args=args, train_dataset=rows, processing_class=_tokenizer(), peft_config=LORA)

    def batches(self, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        return [[_as_pair(row) for row in rows]]

    def gather_metrics(self) -> None:
        """Nothing: upstream gathers in each micro-batch."""


SYSTEMS = {
    "padded": Padded,
    "upstream": Upstream,
    "ours": Ours,
    "ours, reference cached": OursCached,
    "ours on pairs": OursTogether,
    "ours, one micro-batch": OursTogether,
}
EMBEDDED = Path(__file__).parents[1] / "data" / "checkable_train.jsonl"
MODEL = "models/SmolLM2-135M-Instruct"
TINY = "-tiny"
#: Random weights: in NF4, as QLoRA has them, and in bfloat16.
MISTRAL_4BIT, MISTRAL_BF16 = "mistral-7b-4bit", "mistral-7b-bf16"


def tiny_row(case: Case) -> dict[str, Any]:
    """A row to warm up with."""
    responses = [[5, 6, 7, 8]] * case.num_responses
    return {"prompt_ids": [3, 4, 5], "response_ids": responses, "scores": [k / 10 for k in range(case.num_responses)]}


@functools.cache
def text_ids(vocabulary: int) -> list[int]:
    """The embedded data's text as one list of token ids, those beyond the vocabulary left out.

    Tokens are Mistral's where the wheel mistral-common (and sentencepiece) is there, else SmolLM2's, else the tests'.
    """
    rows = [json.loads(line) for line in EMBEDDED.read_text().splitlines()]
    text = "\n\n".join(part for row in rows for part in (row["prompt"][0]["content"], *row["responses"]))
    wheel = importlib.util.find_spec("mistral_common")
    if wheel and wheel.origin and importlib.util.find_spec("sentencepiece"):
        from sentencepiece import SentencePieceProcessor

        ids = SentencePieceProcessor(str(Path(wheel.origin).parent / "data" / "tokenizer.model.v1")).encode(text)
    else:
        ids = _tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [i for i in ids if i < vocabulary]


def load_model(name: str, case: Case, device: str) -> nn.Module:
    """The model to adapt: a folder's weights, or Mistral-7B with random ones; after a "-tiny", in a small size."""
    torch.manual_seed(0)
    if name.removesuffix(TINY) in (MISTRAL_4BIT, MISTRAL_BF16):
        config = mistral_config(tiny=name.endswith(TINY))
        base = (random_mistral_4bit if name.startswith(MISTRAL_4BIT) else random_mistral)(config, device)
    else:
        base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
    if case.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
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


def make_optimizer(model: nn.Module, case: Case) -> torch.optim.Optimizer:
    """AdamW on what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if case.paged:
        import bitsandbytes as bnb

        return bnb.optim.PagedAdamW32bit(trained, lr=1e-5)
    return torch.optim.AdamW(trained, lr=1e-5)


class Memory:
    """Most memory held since the start of the measurement, above what was held then, in bytes."""

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
            self.base = _status("VmRSS")

    def peak(self) -> int:
        return (torch.cuda.max_memory_allocated() if self.device == "cuda" else _status("VmHWM")) - self.base


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


def _tokenizer() -> Any:
    """What the trainers ask for; rows are token ids already."""
    return AutoTokenizer.from_pretrained(MODEL) if Path(MODEL).is_dir() else tiny_tokenizer()
