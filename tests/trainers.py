"""Tiny trainers, their rows, and the curves that they are held to."""

import random

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForCausalLM

from nca_trainer import NCAConfig, NCATrainer
from tests.tiny import tiny_config, tiny_tokenizer

WORDS = "Paris Rome is was the capital of France Italy and a city not far from here".split()


def text(rng, most):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def reward_rows(n, ks=(2, 3, 5)):
    """Rows with K responses, K differing by row."""
    rng = random.Random(0)
    rows = []
    for i in range(n):
        k = ks[i % len(ks)]
        prompt = [{"role": "user", "content": text(rng, 12)}]
        rows.append(
            {
                "prompt": prompt,
                "responses": [text(rng, 15) for _ in range(k)],
                "scores": [rng.random() for _ in range(k)],
            }
        )
    return Dataset.from_list(rows)


def pair_rows(n):
    rng = random.Random(1)
    answer = lambda: [{"role": "assistant", "content": text(rng, 15)}]  # noqa: E731
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": text(rng, 9)}], "chosen": answer(), "rejected": answer()}
            for _ in range(n)
        ]
    )


def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config())


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


DEFAULTS = {
    "learning_rate": 1e-2, "max_steps": 5, "logging_steps": 1, "per_device_train_batch_size": 4, "beta": 0.1,
    "bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
    "lr_scheduler_type": "constant", "gradient_checkpointing": False, "seed": 7,
}  # fmt: skip


def make_trainer(
    tmp_path, rows, trainer_class=NCATrainer, config_class=NCAConfig, lora=True, eval_rows=None, **settings
):
    if config_class is NCAConfig:
        settings = {"alpha": 0.3} | settings
    if not lora:  # Adam's first steps are signs: at a high rate a rounding error in a tiny gradient shows in a weight
        settings = {"learning_rate": 1e-3} | settings
    return trainer_class(
        model=tiny_llama(),
        ref_model=None if lora else tiny_llama(),
        args=config_class(output_dir=str(tmp_path), **DEFAULTS | settings),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(**LORA) if lora else None,
    )


def logged(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def run(*args, **kwargs):
    """Trains; returns the losses of the steps, and the trained weights."""
    trainer = make_trainer(*args, **kwargs)
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    return logged(trainer), weights


def assert_same_curve(one, other, atol=1e-4):
    """Largest difference and mean drift of the losses, and the final weights."""
    assert one[0] == pytest.approx(other[0], abs=atol)
    assert sum(one[0]) / len(one[0]) == pytest.approx(sum(other[0]) / len(other[0]), abs=atol / 2)
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=3 * atol)  # Adam divides by small gradients
    assert max(one[0]) - min(one[0]) > 10 * atol, "nothing was learned, so nothing was compared"
