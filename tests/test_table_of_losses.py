"""What holds for every loss of the table: values and gradients by hand, symmetries, padding, extremes.

Imports torch only.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from trl_nca.losses import LOSSES, advantage_targets, quantile_targets, rank_targets

ALPHA, BETA = 0.7, 0.3
OF_DIFFERENCES = {"InfoNCA", "PL", "GVPO", "DPO", "robustDPO", "SimPO", "IPO"}
ANY_K = [name for name, loss in LOSSES.items() if loss.num_responses is None]


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def run(name, rewards, scores, mask=None, alpha=ALPHA, beta=BETA):
    """Losses, shape (B,), and their gradient by the rewards, shape (B, K)."""
    rewards = rewards.clone().requires_grad_()
    losses = LOSSES[name].loss(rewards, LOSSES[name].targets(scores, mask, alpha, beta), mask)
    return losses.detach(), torch.autograd.grad(losses.sum(), rewards)[0]


def groups(name):
    """Rewards and scores of 1-3 prompts, ties among them. Shape (B, K) each."""
    num_responses = LOSSES[name].num_responses
    shapes = st.tuples(st.integers(1, 3), st.just(num_responses) if num_responses else st.integers(2, 6))

    def cells(shape):
        size = {"min_size": math.prod(shape), "max_size": math.prod(shape)}
        rewards, scores = (st.lists(numbers, **size) for numbers in (st.floats(-5, 5, width=32), st.integers(-3, 3)))
        return st.tuples(*(values.map(lambda x: f64(x).view(shape)) for values in (rewards, scores)))

    return shapes.flatmap(cells)


def for_each(*strategies):
    """Draws cases of each of the losses in turn, with values of the strategies."""

    def decorate(test):
        @pytest.mark.parametrize("name", LOSSES)
        @given(data=st.data())
        @settings(deadline=None, max_examples=10)
        def run_test(name, data):
            test(name, *data.draw(groups(name)), *map(data.draw, strategies))

        return run_test

    return decorate


# Values and gradients


BY_HAND = {
    # e^{1 / beta} at beta 1 is e, and Z is e - 1; quantiles 1 and 1/2
    "QRPO": lambda r1, r2: ((1 - math.log(math.e - 1) - r1) ** 2 + (0.5 - math.log(math.e - 1) - r2) ** 2) / 2,
    # V = log of the mean of e^{log 3} and e^0 = log 2
    "OAPL": lambda r1, r2: ((math.log(3) - math.log(2) - r1) ** 2 + (-math.log(2) - r2) ** 2) / 2,
    # of a pair half of [(r1 - r2) - (s1 - s2)]^2
    "GVPO": lambda r1, r2: (r1 - r2 - math.log(3)) ** 2 / 2,
    "PL": lambda r1, r2: math.log1p(math.exp(r2 - r1)),
    "IPO": lambda r1, r2: (r1 - r2 - 0.5) ** 2,
    "SimPO": lambda r1, r2: math.log1p(math.exp(r2 - r1)),
    "robustDPO": lambda r1, r2: math.log1p(math.exp(r2 - r1)),
    "NCA": lambda r1, r2: math.log1p(math.exp(-r1)) + (math.log1p(math.exp(r1)) + math.log1p(math.exp(r2))) / 2,
    "biasedNCA": lambda r1, r2: math.log1p(math.exp(-r1)) + math.log1p(math.exp(r2)),
    "InfoNCA": lambda r1, r2: math.log1p(math.exp(r2 - r1)),
    "DPO": lambda r1, r2: math.log1p(math.exp(r2 - r1)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_by_hand(name):
    """Scores log 3 and 0, the second response the better one of the second prompt; beta 1, labels without doubt."""
    rewards = f64([[0.7, -0.4], [0.7, -0.4]])
    losses, _ = run(name, rewards, f64([[math.log(3), 0.0], [0.0, math.log(3)]]), alpha=0.0, beta=1.0)
    torch.testing.assert_close(losses, f64([BY_HAND[name](0.7, -0.4), BY_HAND[name](-0.4, 0.7)]))


def test_ipo_at_another_beta():
    """Of log-ratios, which are the rewards over beta."""
    assert run("IPO", f64([[0.6, -0.2]]), f64([[1.0, 0.0]]), beta=0.2)[0].item() == pytest.approx((4.0 - 2.5) ** 2)


@pytest.mark.parametrize(("wrong", "r"), [(0.1, 0.5), (0.4, -2.0)])
def test_robust_dpo_with_labels_that_may_be_wrong(wrong, r):
    found = LOSSES["robustDPO"].loss(f64([[r, 0.0], [0.0, r]]), f64([[1 - wrong, wrong], [wrong, 1 - wrong]]))
    right, flipped = math.log1p(math.exp(-r)), math.log1p(math.exp(r))
    torch.testing.assert_close(found, f64([((1 - wrong) * right - wrong * flipped) / (1 - 2 * wrong)] * 2))


def test_the_quantile_counts_ties_and_log_z_is_exact_at_any_beta():
    scores = f64([[3.0, 1.0, 3.0, -2.0]])
    for beta in (0.05, 1.0, 20.0):
        log_z = math.log(beta * math.expm1(1 / beta))
        expected = f64([[1.0, 0.5, 1.0, 0.25]]) - beta * log_z
        torch.testing.assert_close(quantile_targets(scores, None, 0.0, beta), expected, rtol=1e-9, atol=1e-9)
    assert quantile_targets(scores, None, 0.0, 1e-6)[0, 0].item() == pytest.approx(-1e-6 * math.log(1e-6), rel=1e-3)


def test_the_value_is_the_mean_at_large_beta_and_the_best_at_small():
    scores = f64([[3.0, 1.0, 0.5]])
    torch.testing.assert_close(advantage_targets(scores, None, 0.0, 1e6), scores - 1.5, rtol=0, atol=1e-5)
    torch.testing.assert_close(advantage_targets(scores, None, 0.0, 1e-6), scores - 3.0, rtol=0, atol=1e-5)


def test_ranks_begin_at_the_worst_and_ties_have_the_same():
    assert rank_targets(f64([[2.0, 1.0, 2.0, 0.5]]), None, 0.0, 0.0).tolist() == [[2.0, 1.0, 2.0, 0.0]]


def test_plackett_luce_by_hand():
    """The best from all, the next from the rest; of two that tie each is drawn first half the time, by Efron."""
    rewards = f64([[0.3, -1.0, 2.0]])
    e = rewards[0].exp().tolist()
    ranked = -math.log(e[2] / sum(e)) - math.log(e[0] / (e[0] + e[1]))
    assert run("PL", rewards, f64([[0.5, 0.1, 0.9]]))[0].item() == pytest.approx(ranked)
    # 0 and 2 tie above 1: of their sum and half of it
    both = e[0] + e[2]
    tied = -math.log(e[2] * e[0] / ((both + e[1]) * (both / 2 + e[1])))
    losses, gradient = run("PL", f64([[0.3, -1.0, 2.0]]), f64([[0.9, 0.1, 0.9]]))
    assert losses.item() == pytest.approx(tied)
    losses, equal = run("PL", f64([[0.3, -1.0, 0.3]]), f64([[0.9, 0.1, 0.9]]))
    assert equal[0, 0].item() == pytest.approx(equal[0, 2].item()), "neither goes before the other"


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("k", [2, 3, 7])
def test_step_zero_is_as_the_table_says(name, k):
    loss = LOSSES[name]
    if loss.start is None or (loss.num_responses or k) != k:
        return
    scores = torch.randn(3, k, dtype=torch.float64)
    torch.testing.assert_close(run(name, torch.zeros_like(scores), scores)[0], torch.full((3,), loss.start(k)).double())


@for_each()
def test_gradients_of_squares_in_closed_form(name, r, s):
    k = s.shape[1]
    if name == "QRPO":
        q = (s[:, None] <= s[..., None]).double().mean(dim=-1)
        expected = -2 / k * (q - BETA * math.log(BETA * math.expm1(1 / BETA)) - r)
    elif name == "OAPL":
        expected = -2 / k * (s - BETA * (s / BETA).exp().mean(dim=1, keepdim=True).log() - r)
    elif name == "GVPO":
        expected = 2 / (k - 1) * ((r - r.mean(1, keepdim=True)) - (s - s.mean(1, keepdim=True)))
    elif name == "IPO":
        sign = (s - s.flip(1)).sign()
        expected = 2 / BETA * ((r - r.flip(1)) / BETA - sign / (2 * BETA)) * sign.abs()
    else:
        return
    torch.testing.assert_close(run(name, r, s)[1], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    torch.manual_seed(0)
    k = LOSSES[name].num_responses or 4
    rewards, scores = torch.randn(3, k, dtype=torch.float64, requires_grad=True), torch.randn(3, k).double()
    if k > 2:
        scores[0, 1] = scores[0, 2]
    targets = LOSSES[name].targets(scores, None, ALPHA, BETA)
    assert gradcheck(lambda r: LOSSES[name].loss(r, targets, None), (rewards,))


# What changes nothing


@for_each(st.randoms(use_true_random=False))
def test_order_of_responses(name, rewards, scores, random):
    order = list(range(rewards.shape[1]))
    random.shuffle(order)
    losses, gradient = run(name, rewards, scores)
    shuffled, its_gradient = run(name, rewards[:, order], scores[:, order])
    torch.testing.assert_close(shuffled, losses)
    torch.testing.assert_close(its_gradient, gradient[:, order])


@for_each(st.integers(1, 3), st.sampled_from([0.0, 1e30, math.inf, -math.inf, math.nan]), st.booleans())
def test_padding_is_as_if_absent(name, rewards, scores, extra, junk, before):
    """In targets, loss and gradient, before the responses or behind them, whatever stands there."""
    losses, gradient = run(name, rewards, scores)

    def padded(values, padding):
        padding = torch.full((len(values), extra), padding, dtype=values.dtype)
        return torch.cat([padding, values] if before else [values, padding], dim=1)

    mask = padded(torch.ones_like(scores, dtype=torch.bool), False)
    its_losses, its_gradient = run(name, padded(rewards, junk), padded(scores, junk), mask)
    torch.testing.assert_close(its_losses, losses)
    torch.testing.assert_close(its_gradient[mask], gradient.flatten())
    assert (its_gradient[~mask] == 0).all()
    targets = LOSSES[name].targets(padded(scores, junk), mask, ALPHA, BETA)
    torch.testing.assert_close(targets, padded(LOSSES[name].targets(scores, None, ALPHA, BETA), 0.0))


@for_each(st.floats(-5, 5, width=32).filter(lambda x: abs(x) > 0.1))
def test_a_shift_of_all_rewards_counts_for_those_that_score_each_by_itself(name, rewards, scores, shift):
    losses, gradient = run(name, rewards, scores)
    shifted, its_gradient = run(name, rewards + shift, scores)
    if name in OF_DIFFERENCES:
        torch.testing.assert_close(shifted, losses, rtol=1e-6, atol=1e-6)
        assert gradient.sum(dim=1).abs().max() < 1e-6
    else:
        assert (its_gradient - gradient).abs().min(dim=1).values.max() > 0


@for_each()
def test_separable_are_those_whose_gradient_needs_no_other_reward(name, rewards, scores):
    moved = rewards.clone()
    moved[:, 0] += 1.0
    change = (run(name, moved, scores)[1] - run(name, rewards, scores)[1])[:, 1:].abs().max()
    assert (name in OF_DIFFERENCES) != LOSSES[name].separable
    if LOSSES[name].separable:
        assert change == 0


@for_each(st.floats(-5, 5, width=32))
def test_a_shift_of_all_scores_changes_no_target(name, _, scores, shift):
    targets = [LOSSES[name].targets(s, None, ALPHA, BETA) for s in (scores, scores + round(shift))]
    torch.testing.assert_close(*targets, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["QRPO", "PL", "IPO", "SimPO", "robustDPO"])
def test_only_the_order_of_scores_counts(name):
    scores = f64([[0.3, -1.0], [2.0, 2.0]])
    targets = [LOSSES[name].targets(s, None, ALPHA, BETA) for s in (scores, scores**3 + 2 * scores)]
    torch.testing.assert_close(*targets)


# Extremes


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [1e-30, 1e2, 1e4, 1e15])
@pytest.mark.parametrize("beta", [1e-3, 1e3])
def test_extremes_stay_finite(name, size, beta):
    rewards = torch.tensor([[size, -size], [-size, size], [size, size], [0.0, 0.0]])
    scores = torch.tensor([[1e15, -1e15], [1.0, 0.0], [0.0, 0.0], [1e-30, 0.0]])
    losses, gradient = run(name, rewards, scores, beta=beta)
    assert losses.isfinite().all() and gradient.isfinite().all()
    assert losses.dtype == torch.float32


@pytest.mark.parametrize("name", ANY_K)
def test_any_leading_shape(name):
    rewards, scores = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    losses, gradient = run(name, rewards, scores)
    flat, its_gradient = run(name, rewards.view(6, 4), scores.view(6, 4))
    torch.testing.assert_close(losses.flatten(), flat)
    torch.testing.assert_close(gradient.view(6, 4), its_gradient)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ANY_K])
def test_losses_of_pairs_refuse_more(name):
    with pytest.raises(ValueError, match=f"^{'DPO' if name == 'SimPO' else name} compares two"):
        LOSSES[name].loss(torch.zeros(1, 3), torch.ones(1, 3) / 3, None)


def test_a_reported_pair():
    """One token each, log-ratios 6 apart, beta 0.1: a report of a trainer that took sigmoid for every loss."""
    rewards = torch.tensor([[0.6, 0.0]], dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for name, value, slope in (("DPO", 0.437488, -0.035434), ("IPO", 1.0, 2.0)):
        loss = LOSSES[name]
        losses = loss.loss(rewards, loss.targets(scores, None, 0.0, 0.1), None)
        (gradient,) = torch.autograd.grad(losses.sum(), rewards)
        assert losses.item() == pytest.approx(value, abs=1e-6)
        assert 0.1 * gradient[0, 0].item() == pytest.approx(slope, abs=1e-6)
