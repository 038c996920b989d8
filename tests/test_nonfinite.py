"""Steps whose loss is not finite: skipped, their rows named, and too many of them end the run."""

import logging

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from alignment.errors import UserError
from nca_trainer import NCATrainer
from run_reward import align
from tests.trainers import logged, make_trainer, reward_rows
from trl_nca.checkpoints import RunStopped


def bad_rows(*bad):
    """Rows of which some have a score that makes their loss NaN."""
    rows = reward_rows(12)
    return Dataset.from_list(
        [row | {"scores": [float("nan")] * len(row["scores"]), "location": f"line {i}"} if i in bad else
         row | {"location": f"line {i}"} for i, row in enumerate(rows)]
    )  # fmt: skip


def test_a_step_that_is_not_finite_is_skipped_and_its_row_named(tmp_path, caplog):
    settings = {"max_steps": 3, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(tmp_path, bad_rows(5), **settings)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "Step 2: the loss of line 5 is not finite; the step is skipped (1 of max_nan_steps 3)" in caplog.text
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert logged(trainer, "rewards/chosen")[2] != 0, "the other steps count"


def test_a_gradient_that_is_not_finite_is_enough(tmp_path, caplog):
    trainer, gradients = make_trainer(tmp_path, reward_rows(12), max_steps=3), []

    def spoil(gradient):
        gradients.append(trainer.state.global_step)
        return gradient * (torch.inf if trainer.state.global_step == 1 else 1)

    next(p for p in trainer.model.parameters() if p.requires_grad).register_hook(spoil)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "Step 2: the gradient, of finite losses, is not finite; the step is skipped" in caplog.text
    assert 1 in gradients and all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert all(loss > 0 for loss in logged(trainer)), "the losses are"


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_logged_loss_is_that_of_the_other_steps(tmp_path, accumulation):
    settings = {"max_steps": 6, "train_sampling_strategy": "sequential", "gradient_accumulation_steps": accumulation}
    settings |= {"per_device_train_batch_size": 4 // accumulation}
    each = make_trainer(tmp_path, bad_rows(5), **settings)
    each.train()
    first, skipped, third, *_ = logged(each)
    assert skipped == 0, "there is no other since the last log"
    for in_threes in (each.args.logging_nan_inf_filter, True):
        trainer = make_trainer(tmp_path, bad_rows(5), logging_steps=3, logging_nan_inf_filter=in_threes, **settings)
        trainer.train()
        assert logged(trainer)[0] == pytest.approx((first + first + third) / 3, abs=1e-6)
        assert logged(trainer, "train_loss")[0] == pytest.approx(sum(logged(trainer)) / 2, abs=1e-6)


def test_only_steps_in_a_row_are_too_many(tmp_path):
    trainer = make_trainer(tmp_path, bad_rows(1, 9), max_nan_steps=2, max_steps=3, train_sampling_strategy="sequential")
    trainer.train()
    assert trainer.state.global_step == 3


def test_too_many_of_them_end_the_run_with_the_last_good_checkpoint(tmp_path):
    settings = {"max_steps": 3, "train_sampling_strategy": "sequential", "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, bad_rows(5, 7, 9), max_nan_steps=2, **settings)
    with pytest.raises(
        RunStopped, match="Step 3: the loss of line 9 is not finite, for 2 steps in a row .max_nan_steps 2"
    ):
        trainer.train()
    assert (tmp_path / "checkpoint-2").exists() and not (tmp_path / "checkpoint-3").exists()
    weights = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_run_that_blows_up_names_rows_and_keeps_no_broken_weights(saving_recipe, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="not finite"):
        align(
            [str(saving_recipe), f"--output_dir={out}", "--learning_rate=1e38", "--max_grad_norm=0", "--optim=sgd"],
            NCATrainer,
        )  # fmt: skip
    for checkpoint in out.glob("checkpoint-*"):
        weights = load_file(checkpoint / "adapter_model.safetensors")
        assert all(torch.isfinite(value).all() for value in weights.values())
