"""Values, gradients, masks and extremes of the losses. Imports torch only."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from tests.conftest import SHARED, needs_shared
from trl_nca.losses import LOSSES, biased_nca_loss, dpo_loss, info_nca_loss, nca_loss, reward_targets

K_LOSSES = [info_nca_loss, nca_loss]
PAIR_LOSSES = [dpo_loss, biased_nca_loss]


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def groups(draw, k=None):
    """Rewards and scores of 1-3 prompts with K responses: (rewards, scores), both (B, K)."""
    shape = (draw(st.integers(1, 3)), k or draw(st.integers(2, 9)))
    number = st.floats(-30, 30, allow_nan=False, width=32)
    cells = st.lists(number, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
    return f64(draw(cells)).view(shape), f64(draw(cells)).view(shape)


def golden(section):
    if not SHARED.is_dir():
        return []
    return json.loads((SHARED / "golden" / "losses.json").read_text())[section]


def grad_of(losses, leaf):
    return torch.autograd.grad(losses.mean(), leaf)[0]


@needs_shared
@pytest.mark.parametrize("case", golden("reward_K4"), ids=lambda case: f"{case['loss_type']}-{case['name']}")
def test_golden_rewards(case):
    scores = f64(case["scores"])
    scores[:, 0] += 0.01  # the 2024 scripts' tie-break
    policy = f64(case["policy_logps"]).requires_grad_()
    rewards = case["beta"] * (policy - f64(case["reference_logps"]))
    losses = LOSSES[case["loss_type"]].loss(rewards, reward_targets(scores, case["temperature_alpha"]))
    torch.testing.assert_close(losses.mean().item(), case["loss"], rtol=0, atol=1e-9)
    torch.testing.assert_close(grad_of(losses, policy), f64(case["grad_policy_logps"]), rtol=0, atol=1e-9)


@needs_shared
@pytest.mark.parametrize("case", golden("pairwise"), ids=lambda case: f"{case['loss_type']}-{case['name']}")
def test_golden_pairs(case):
    policy = f64([case["policy_chosen_logps"], case["policy_rejected_logps"]]).T.contiguous().requires_grad_()
    ref = f64([case["reference_chosen_logps"], case["reference_rejected_logps"]]).T
    losses = LOSSES[case["loss_type"]].loss(case["beta"] * (policy - ref), f64([[1, 0]]).expand_as(ref))
    torch.testing.assert_close(losses, f64(case["out_losses"]), rtol=0, atol=1e-9)
    expected = f64([case["grad_policy_chosen"], case["grad_policy_rejected"]]).T
    torch.testing.assert_close(grad_of(losses, policy), expected, rtol=0, atol=1e-9)


def test_values_worked_by_hand():
    rewards, targets = f64([[1.0, 0.0]]), f64([[1.0, 0.0]])
    sigmoid = 1 / (1 + math.exp(-1.0))
    assert dpo_loss(rewards, targets).item() == pytest.approx(-math.log(sigmoid))
    # -log sigma(1) - 1/2 log sigma(-1) - 1/2 log sigma(0)
    assert nca_loss(rewards, targets).item() == pytest.approx(
        -math.log(sigmoid) - 0.5 * math.log(1 - sigmoid) + 0.5 * math.log(2)
    )
    # -log sigma(1) - log sigma(0)
    assert biased_nca_loss(rewards, targets).item() == pytest.approx(-math.log(sigmoid) + math.log(2))
    # targets 3/4, 1/4 against softmax(log 3, 0) = 3/4, 1/4: the entropy of the targets
    rewards, targets = f64([[math.log(3), 0.0]]), f64([[0.75, 0.25]])
    assert info_nca_loss(rewards, targets).item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


@pytest.mark.parametrize("k", [2, 3, 4, 8, 64])
def test_step_zero(k):
    scores = torch.linspace(-1, 1, k).view(1, k)
    zero, targets = torch.zeros(1, k), reward_targets(scores, 0.3)
    assert nca_loss(zero, targets).item() == pytest.approx(2 * math.log(2), abs=1e-6)
    assert info_nca_loss(zero, targets).item() == pytest.approx(math.log(k), abs=1e-6)
    if k == 2:
        assert dpo_loss(zero, targets).item() == pytest.approx(math.log(2), abs=1e-6)
        assert biased_nca_loss(zero, targets).item() == pytest.approx(2 * math.log(2), abs=1e-6)


def test_targets_small_alpha_is_one_hot_large_is_uniform():
    scores = f64([[0.1, 0.9, 0.5]])
    torch.testing.assert_close(reward_targets(scores, 1e-4), f64([[0, 1, 0]]))
    torch.testing.assert_close(reward_targets(scores, 0), f64([[0, 1, 0]]))
    torch.testing.assert_close(reward_targets(scores, 1e9), f64([[1, 1, 1]]) / 3)
    # softmax(score / alpha) with alpha = 0.4 / log 3: a gap of 0.4 is a factor of 3
    alpha = 0.4 / math.log(3)
    torch.testing.assert_close(reward_targets(scores, alpha), f64([[1 / 9, 1, 1 / 3]]) / (1 + 1 / 3 + 1 / 9))


def test_targets_ties_share_and_padding_gets_nothing():
    mask = torch.tensor([[True, True, True, False]])
    for alpha in (0, 1e-4):
        targets = reward_targets(f64([[2, 1, 2, 99]]), alpha, mask)
        torch.testing.assert_close(targets, f64([[0.5, 0, 0.5, 0]]))


def test_targets_of_huge_scores_and_tiny_alpha_are_finite():
    targets = reward_targets(torch.tensor([[1e30, -1e30], [1e-30, 0.0]]), 1e-30)
    torch.testing.assert_close(targets[0], torch.tensor([1.0, 0.0]))
    assert targets.isfinite().all()


def test_negative_alpha_is_refused():
    with pytest.raises(ValueError, match="alpha must be >= 0"):
        reward_targets(torch.zeros(1, 2), -0.1)


@given(groups())
@settings(deadline=None, max_examples=50)
def test_gradients_match_the_closed_form(group):
    rewards, scores = group
    rewards.requires_grad_()
    targets, k = reward_targets(scores, 3.0), rewards.shape[-1]
    info = torch.autograd.grad(info_nca_loss(rewards, targets).sum(), rewards)[0]
    torch.testing.assert_close(info, (rewards.softmax(-1) - targets).detach(), rtol=1e-9, atol=1e-12)
    nca = torch.autograd.grad(nca_loss(rewards, targets).sum(), rewards)[0]
    expected = rewards.sigmoid() / k - targets * (-rewards).sigmoid()
    torch.testing.assert_close(nca, expected.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", K_LOSSES + PAIR_LOSSES)
def test_gradcheck(loss):
    torch.manual_seed(0)
    k = 2 if loss in PAIR_LOSSES else 4
    rewards = torch.randn(3, k, dtype=torch.float64, requires_grad=True)
    targets = reward_targets(torch.randn(3, k, dtype=torch.float64), 0.7)
    assert gradcheck(lambda r: loss(r, targets), (rewards,))


@given(groups(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=50)
def test_order_of_responses_does_not_matter(group, random):
    rewards, scores = group
    order = list(range(rewards.shape[-1]))
    random.shuffle(order)
    for loss in K_LOSSES:
        straight = loss(rewards, reward_targets(scores, 2.0))
        shuffled = loss(rewards[:, order], reward_targets(scores[:, order], 2.0))
        torch.testing.assert_close(straight, shuffled)


@given(groups(), st.integers(1, 4), st.sampled_from([0.0, 1e30, -math.inf, math.nan]))
@settings(deadline=None, max_examples=50)
def test_padded_equals_absent_in_loss_and_gradient(group, extra, junk):
    rewards, scores = group
    k = rewards.shape[-1]
    padding = torch.full((len(rewards), extra), junk, dtype=torch.float64)
    mask = torch.arange(k + extra).expand(len(rewards), -1) < k
    for loss in K_LOSSES:
        real = rewards.clone().requires_grad_()
        plain = loss(real, reward_targets(scores, 2.0))
        padded = torch.cat([rewards, padding], -1).requires_grad_()
        masked = loss(padded, reward_targets(torch.cat([scores, padding], -1), 2.0, mask), mask)
        torch.testing.assert_close(plain, masked)
        gradient = torch.autograd.grad(masked.sum(), padded)[0]
        torch.testing.assert_close(gradient[:, :k], torch.autograd.grad(plain.sum(), real)[0])
        assert (gradient[:, k:] == 0).all()


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_a_padded_pair_equals_the_pair(loss):
    rewards, targets = f64([[0.3, -0.2]]), f64([[1, 0]])
    mask = torch.tensor([[True, True, False]])
    padded = loss(f64([[0.3, -0.2, 7.0]]), f64([[1, 0, 0]]), mask)
    torch.testing.assert_close(padded, loss(rewards, targets))


@given(groups(), st.floats(-5, 5))
@settings(deadline=None, max_examples=25)
def test_shift_of_all_rewards(group, shift):
    rewards, scores = group
    targets = reward_targets(scores, 2.0)
    torch.testing.assert_close(info_nca_loss(rewards, targets), info_nca_loss(rewards + shift, targets))


def test_nca_sees_a_shift_of_all_rewards():
    targets = f64([[1, 0, 0]])
    assert nca_loss(f64([[0, 0, 0]]), targets).item() < nca_loss(f64([[-1, -1, -1]]), targets).item()


@given(groups(k=2))
@settings(deadline=None, max_examples=25)
def test_dpo_is_info_nca_with_two_responses(group):
    rewards, scores = group
    one_hot = reward_targets(scores, 0)
    torch.testing.assert_close(dpo_loss(rewards, one_hot), info_nca_loss(rewards, one_hot))


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_pair_losses_refuse_more_than_two(loss):
    with pytest.raises(ValueError, match="two responses"):
        loss(torch.zeros(1, 3), torch.ones(1, 3) / 3)
    with pytest.raises(ValueError, match="two responses"):
        loss(torch.zeros(1, 3), torch.ones(1, 3) / 3, torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_pairs_are_told_by_their_shape(loss):
    """Tensors without storage refuse to say what is in them, as a GPU does before its queue is done."""
    pair = torch.zeros(4, 2, device="meta")
    assert loss(pair, pair, torch.ones_like(pair, dtype=torch.bool)).shape == (4,)


@pytest.mark.parametrize("loss", K_LOSSES + PAIR_LOSSES)
@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_extremes_stay_finite(loss, size):
    rewards = torch.tensor([[size, -size], [-size, size], [size, size]], requires_grad=True)
    losses = loss(rewards, torch.tensor([[1.0, 0.0]]).expand(3, 2))
    assert losses.isfinite().all()
    assert torch.autograd.grad(losses.sum(), rewards)[0].isfinite().all()


@pytest.mark.parametrize("loss", K_LOSSES)
def test_any_leading_shape(loss):
    rewards, targets = torch.randn(2, 3, 4), torch.full((2, 3, 4), 0.25)
    assert loss(rewards, targets).shape == (2, 3)
    torch.testing.assert_close(loss(rewards, targets).flatten(), loss(rewards.view(6, 4), targets.view(6, 4)))
