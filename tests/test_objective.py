"""From log-probs to the losses of prompts: against plain formulas row by row, at extremes, and through the trainers."""

import json
import math

import pytest
import torch

from nca_trainer import NCATrainer, PairwiseNCATrainer
from tests.trainers import assert_same_curve, make_trainer, pair_rows, reward_rows, run
from trl_nca.loss_config import LossConfig
from trl_nca.losses import LOSSES
from trl_nca.objective import make_targets, prompt_losses

K_LOSSES = [name for name, loss in LOSSES.items() if loss.num_responses is None]
PAIR_LOSSES = [name for name in LOSSES if name not in K_LOSSES]


def config(loss_type, **settings):
    args = LossConfig(loss_type=loss_type, **{"beta": 0.3, "alpha": 0.5} | settings)
    args.check_loss()
    return args


def batch_of(ks, dtype=torch.float64, **columns):
    """A batch of ragged rows: scores, mask, lengths, and log-probs under policy and reference."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(max(ks)) < torch.tensor(ks)[:, None]
    draw = lambda: torch.rand(mask.shape, dtype=torch.float64, generator=generator) * mask  # noqa: E731
    lengths = (1 + 9 * draw()).long() * mask
    batch = {"scores": draw(), "response_mask": mask, "response_lengths": lengths} | columns
    return batch, (-3 * draw() * lengths).to(dtype), (-3 * draw() * lengths).to(dtype)


def value(loss_type, batch, logps, ref_logps, pairs=False, **settings):
    args = config(loss_type, **settings)
    targets = make_targets(batch["scores"], batch["response_mask"], args, pairs)
    return prompt_losses(logps, batch, ref_logps, targets, args)[0]


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("normalize", ["none", "tokens"])
def test_a_batch_is_its_rows_one_by_one(loss_type, normalize):
    """Weights, lengths and the NLL term of a prompt are its own."""
    ks = [2, 5, 3, 4] if loss_type in K_LOSSES else [2, 2, 2]
    weight = torch.tensor([0.5, 1.0, 0.0, 3.0][: len(ks)])
    batch, logps, ref_logps = batch_of(ks, weight=weight, mean_best_length=7.0)
    settings = {"normalize": normalize, "sft_weight": 0.7}
    settings |= {"margin": 0.2, "label_smoothing": 0.1} if LOSSES[loss_type].has_labels else {}
    losses = value(loss_type, batch, logps, ref_logps, **settings)
    args = config(loss_type, **settings)
    for b, k in enumerate(ks):
        scores, lengths = batch["scores"][b, :k], batch["response_lengths"][b, :k]
        rewards = args.beta * (logps[b, :k] - ref_logps[b, :k])
        if normalize == "tokens" or LOSSES[loss_type].per_token:
            rewards = rewards / lengths
        targets = LOSSES[loss_type].targets(scores, None, args.alpha, args.beta)
        best = int(scores.argmax())
        if LOSSES[loss_type].has_labels:
            targets = 0.9 * targets + 0.1 * (1 - targets)
            rewards = rewards - 0.2 * torch.eye(k, dtype=torch.float64)[best]
        expected = LOSSES[loss_type].loss(rewards[None], targets[None], None)[0] - 0.7 * logps[b, best] / 7
        assert losses[b].item() == pytest.approx(expected.item() * weight[b].item(), abs=1e-9)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_rows_weight_multiplies_its_gradient_alone(loss_type):
    ks = [3, 2, 3] if loss_type in K_LOSSES else [2, 2, 2]
    batch, logps, ref_logps = batch_of(ks)
    logps.requires_grad_()

    def gradient(**weights):
        return torch.autograd.grad(value(loss_type, batch | weights, logps, ref_logps).sum(), logps)[0]

    weight = torch.tensor([2.0, 0.0, 0.5])
    torch.testing.assert_close(gradient(weight=weight), gradient() * weight[:, None], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(weight=torch.ones(3)), gradient(), rtol=0, atol=0)


@pytest.mark.parametrize("pairs", [False, True], ids=["rows", "pairs"])
def test_what_the_targets_are_made_with(pairs):
    batch, *_ = batch_of([2, 2])
    batch["scores"] = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    targets = make_targets(batch["scores"], batch["response_mask"], config("DPO", alpha=1.0, tie_break=2.0), pairs)
    at_once = torch.tensor([[2.0, 0.0], [1.0, 0.0]]).softmax(dim=1)
    torch.testing.assert_close(targets, torch.tensor([[0.5, 0.5], [0.0, 1.0]]) if pairs else at_once)
    smoothed = make_targets(batch["scores"], batch["response_mask"], config("robustDPO", label_smoothing=0.1), True)
    torch.testing.assert_close(smoothed, torch.tensor([[0.5, 0.5], [0.1, 0.9]]))


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("beta", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e5])
def test_float32_stays_finite(loss_type, beta, size):
    """Log-ratios of 1e5 nats, scores from 1e-6 to 1e5, any beta: losses and gradients are numbers."""
    ks = [2, 16, 5] if loss_type in K_LOSSES else [2, 2, 2]
    batch, *_ = batch_of(ks)
    batch["scores"] = batch["scores"] * size
    mask = batch["response_mask"]
    for sign in (1, -1):
        logps = (-1e5 * sign * (batch["scores"] / size - 0.5)).float().masked_fill(~mask, 0.0).requires_grad_()
        settings = {"margin": 1.0, "label_smoothing": 0.1} if LOSSES[loss_type].has_labels else {}
        losses = value(loss_type, batch, logps, torch.full_like(logps, -1e4), beta=beta, alpha=1e-4, **settings)
        (gradient,) = torch.autograd.grad(losses.sum(), logps)
        assert losses.dtype == torch.float32
        assert losses.isfinite().all() and gradient.isfinite().all()
        assert not gradient[~mask].any(), "padding has no gradient"


@pytest.mark.parametrize(
    ("trainer_class", "rows", "settings"),
    [
        (NCATrainer, reward_rows, {"loss_type": "OAPL", "sft_weight": 0.3, "normalize": "tokens", "beta": 1.0}),
        (PairwiseNCATrainer, pair_rows, {"loss_type": "DPO", "sft_weight": 0.3}),
    ],
    ids=["rows", "pairs"],
)
def test_accumulation_equals_batch(tmp_path, trainer_class, rows, settings):
    """14 weighted rows at 4 a step: the last batch of the epoch is short, and each token counts the same."""
    rows = rows(14)
    rows = rows.add_column("weight", [None if i % 3 == 0 else 0.5 * i % 4 for i in range(14)])
    settings = {"max_steps": 8, "trainer_class": trainer_class, **settings}
    whole = run(tmp_path, rows, **settings)
    in_ones = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert_same_curve(whole, run(tmp_path, rows, **settings, **in_ones))
    unweighted = run(tmp_path, rows.remove_columns("weight"), **settings)
    assert max(abs(a - b) for a, b in zip(whole[0], unweighted[0], strict=True)) > 0.01


@pytest.mark.parametrize("settings", [{"sft_weight": 0.5}, {"loss_type": "GVPO", "sft_weight": 0.5}])
def test_a_held_out_prompts_loss_is_its_own(tmp_path, settings):
    rows = reward_rows(5).add_column("weight", [1.0, 2.0, None, 0.0, 0.5])
    trainer = make_trainer(tmp_path, reward_rows(4), eval_rows=rows, per_device_eval_batch_size=2, **settings)
    in_twos = trainer.evaluate()["eval_loss"]
    one_by_one = [trainer.evaluate(rows.select([i]))["eval_loss"] for i in range(5) if i != 3]  # all weights 0
    assert in_twos == pytest.approx(sum(one_by_one) / 5, abs=1e-5)


def test_the_cached_reference_goes_by_the_weights_of_tokens(tmp_path):
    """Of ld_alpha the reference's log-probs depend, of the loss, beta, normalize, rows' weights and NLL term not."""
    rows, folder = reward_rows(20), tmp_path / "ref"
    cached = {"precompute_ref_log_probs": True, "ref_logps_dir": str(folder)}
    for settings in ({"ld_alpha": 0.3, "normalize": "tokens", "beta": 2.0}, {"ld_alpha": 0.3, "loss_type": "PL"}):
        assert_same_curve(run(tmp_path, rows, **settings), run(tmp_path, rows, **settings, **cached))
    (file,) = folder.iterdir()
    weighted = rows.add_column("weight", [2.0] * 20)
    run(tmp_path, weighted, **cached, ld_alpha=0.3, loss_type="QRPO", beta=0.5, max_steps=1)
    assert list(folder.iterdir()) == [file]
    for number, settings in enumerate([{}, {"ld_alpha": 0.5}, {"ld_alpha": 0.0}], start=2):
        run(tmp_path, rows, **cached, **settings, max_steps=1)
        assert len(list(folder.iterdir())) == number
    run(tmp_path, rows, **cached, sft_weight=0.1, max_steps=1)
    assert len(list(folder.iterdir())) == 4, "that of no ld_alpha"
    first, *_ = file.read_text().splitlines()
    assert json.loads(first)["ld_alpha"] == 0.3


def test_what_weighs_nothing_teaches_nothing(tmp_path):
    rows = reward_rows(8).add_column("weight", [0.0] * 7 + [1.0])
    trainer = make_trainer(tmp_path, rows, max_steps=1, per_device_train_batch_size=7)
    (batch, rest) = (trainer.data_collator([trainer.train_dataset[i] for i in part]) for part in (range(7), [7]))
    assert trainer.compute_loss(trainer.model, batch) == 0
    assert trainer.compute_loss(trainer.model, rest).item() == pytest.approx(2 * math.log(2), abs=1e-5)
