r"""What each loss converges to, on a bandit that can be enumerated: N answers, of which K are drawn from mu.

The policy over the answers that minimises the expected loss is found in float64, and held to a closed form that is
computed without the loss. `docs/choosing.md` says what is derived here. Imports torch only.

Legend: N answers, T tuples of K answers, r = beta * log(pi / mu).
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from trl_nca.losses import LOSSES
from trl_nca.losses.targets import smoothed_labels

MU = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
SCORES = torch.tensor([0.2, 1.0, -0.5, 0.6], dtype=torch.float64)
#: Share of answers drawn from mu whose score is not higher.
QUANTILES = torch.tensor([0.6, 1.0, 0.2, 0.7], dtype=torch.float64)
#: Ten answers of which each of the four is as often as mu says: nothing is left to chance.
ALL_OF_MU = torch.tensor([[0] * 4 + [1] * 3 + [2] * 2 + [3]])
ONCE = torch.ones(1, dtype=torch.float64)


def tuples_of(k: int) -> tuple[Tensor, Tensor]:
    """All K answers that may be drawn, shape (T, K), and their probabilities, shape (T,)."""
    answers = torch.tensor(list(itertools.product(range(4), repeat=k)))
    return answers, MU[answers].prod(dim=1)


def minimise(expected_loss, mu: Tensor = MU) -> Tensor:
    """The policy of least expected loss, a function of log(pi / mu), shape (N,)."""
    theta = mu.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = expected_loss(torch.log_softmax(theta, 0) - mu.log())
        value.backward()
        return value

    optimizer.step(closure)
    for _ in range(3):  # Newton's steps: a search along a line cannot tell values that differ by rounding
        theta.grad = None
        closure()
        hessian = torch.autograd.functional.hessian(lambda t: expected_loss(torch.log_softmax(t, 0) - mu.log()), theta)
        theta.data -= torch.linalg.pinv(hessian, hermitian=True) @ theta.grad
    return theta.detach().softmax(0)


def optimum(name, answers, probabilities, alpha=0.5, beta=1.0, targets=None, scores=SCORES, mu=MU) -> Tensor:
    """The policy to which a loss converges where these answers are drawn, with its own targets or with others."""
    loss = LOSSES[name]
    if targets is None:
        targets = loss.targets(scores[answers], None, alpha, beta)
    return minimise(lambda ratios: (probabilities * loss.loss(beta * ratios[answers], targets)).sum(), mu)


def drawn(name: str, k: int, alpha: float = 0.5, beta: float = 1.0) -> Tensor:
    """The same where all tuples of K answers are drawn from mu."""
    return optimum(name, *tuples_of(k), alpha, beta)


def tilted(rewards: Tensor, mu: Tensor = MU) -> Tensor:
    """mu e^rewards, normalised: the optimum of RL with a KL penalty."""
    return torch.softmax(mu.log() + rewards, 0)


def distance(policy: Tensor, other: Tensor) -> float:
    """Total variation."""
    return (policy - other).abs().sum().item() / 2


def kept(k: int, alpha: float) -> Tensor:
    """Probability of each answer, where K are drawn from mu and one is kept by softmax(score / alpha). Shape (N,).

    Over all numbers n of each answer, with the sum K: one is kept by a probability of n e^{s / alpha}, normalised.
    """
    total = torch.zeros(4, dtype=torch.float64)
    for first in range(k + 1):
        rest = torch.cartesian_prod(*[torch.arange(k - first + 1)] * 2)
        rest = rest[rest.sum(dim=1) <= k - first]
        last = k - first - rest.sum(dim=1, keepdim=True)
        counts = torch.cat([torch.full_like(last, first), rest, last], dim=1).double()
        log_probability = math.lgamma(k + 1) + (counts * MU.log() - torch.lgamma(counts + 1)).sum(dim=1)
        total += log_probability.exp() @ torch.softmax(counts.log() + SCORES / alpha, dim=1)
    return total


# The optimum of RL, whatever K is


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 1.0), (1.0, 0.5), (0.7, 0.3)])
@pytest.mark.parametrize(("name", "temperature"), [("InfoNCA", lambda a, b: a * b), ("GVPO", lambda a, b: b)])
def test_info_nca_and_gvpo_reach_it_for_every_k(name, temperature, k, alpha, beta):
    assert distance(drawn(name, k, alpha, beta), tilted(SCORES / temperature(alpha, beta))) < 1e-8


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 1.0), (0.7, 0.3)])
def test_dpo_reaches_it_with_soft_labels(alpha, beta):
    assert distance(drawn("DPO", 2, alpha, beta), tilted(SCORES / (alpha * beta))) < 1e-8


def labelled_pairs(temperature: float, wrong: float = 0.0) -> tuple[Tensor, Tensor]:
    """All ordered pairs, the first preferred by Bradley and Terry, or the other with a probability of `wrong`."""
    answers, probabilities = tuples_of(2)
    first, second = SCORES[answers].T
    preferred = torch.sigmoid((first - second) / temperature)
    return answers, 2 * probabilities * ((1 - wrong) * preferred + wrong * (1 - preferred))


FIRST = torch.tensor([1.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(("temperature", "beta"), [(0.5, 1.0), (0.8, 0.4)])
def test_dpo_reaches_it_from_preferences_of_bradley_and_terry(temperature, beta):
    answers, probabilities = labelled_pairs(temperature)
    assert probabilities.sum() == pytest.approx(1)
    policy = optimum("DPO", answers, probabilities, beta=beta, targets=FIRST)
    assert distance(policy, tilted(SCORES / (beta * temperature))) < 1e-8


@pytest.mark.parametrize(("wrong", "lost"), [(0.1, 0.102), (0.3, 0.262)])
def test_robust_dpo_reaches_that_of_right_labels_from_wrong_ones(wrong, lost):
    answers, probabilities = labelled_pairs(0.5, wrong)
    goal, labels = tilted(SCORES / 0.5), smoothed_labels(FIRST, wrong)
    assert distance(optimum("robustDPO", answers, probabilities, targets=labels), goal) < 1e-8
    assert distance(optimum("DPO", answers, probabilities, targets=FIRST), goal) == pytest.approx(lost, abs=1e-3)


@pytest.mark.parametrize(("temperature", "beta"), [(0.5, 1.0), (0.8, 0.4)])
def test_plackett_luce_reaches_it_from_rankings_that_are_drawn_so(temperature, beta):
    answers, probabilities = tuples_of(3)
    all_answers, all_probabilities, ranks = [], [], []
    for order in itertools.permutations(range(3)):
        ranked = SCORES[answers[:, order]] / temperature  # best first
        rest = torch.logsumexp(ranked[:, 1:], 1)
        likelihood = ranked[:, :2].sum(1) - torch.logsumexp(ranked, 1) - rest
        all_answers.append(answers[:, order])
        all_probabilities.append(probabilities * likelihood.exp())
        ranks.append(torch.tensor([2.0, 1.0, 0.0]).double().expand(len(answers), 3))
    weights = torch.cat(all_probabilities)
    assert weights.sum() == pytest.approx(1)
    policy = optimum("PL", torch.cat(all_answers), weights, beta=beta, targets=torch.cat(ranks))
    assert distance(policy, tilted(SCORES / (beta * temperature))) < 1e-8


@pytest.mark.parametrize(("name", "k"), [("InfoNCA", 2), ("InfoNCA", 4), ("DPO", 2), ("PL", 3)])
def test_of_labels_without_doubt_the_best_answer_takes_all(name, k):
    assert drawn(name, k, alpha=0.0)[SCORES.argmax()] > 0.999


# NCA


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_nca_reaches_what_is_kept_of_k(k, alpha):
    """log(pi / mu) = log(K E[w | y]): what is drawn and kept, which needs no normaliser."""
    assert distance(drawn("NCA", k, alpha), kept(k, alpha or 1e-3)) < 1e-8


@pytest.mark.parametrize("k", [2, 5, 40])
def test_for_small_alpha_that_is_the_best_of_k(k):
    best = QUANTILES**k - (QUANTILES - MU) ** k  # all are no better, and not all are worse
    assert distance(kept(k, 1e-3), best) < 1e-12


def test_for_large_k_it_is_the_optimum_of_rl():
    """The distance falls as 1 / K."""
    expected = {2: 0.2432, 4: 0.1216, 8: 0.0540, 64: 0.0057, 128: 0.0028, 256: 0.0014}
    distances = {k: distance(kept(k, 0.5), tilted(SCORES / 0.5)) for k in expected}
    assert distances == pytest.approx(expected, abs=6e-5)
    assert 1.95 < distances[64] / distances[128] < 2.05


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
@pytest.mark.parametrize(("name", "k"), [("NCA", 2), ("NCA", 3), ("biasedNCA", 2)])
def test_their_optimum_at_other_betas_is_held_by_the_sum_of_pi(name, k, beta):
    r"""\(p \sigma(r) - a \sigma(-r) = \lambda \pi\), of a the weight on an answer and p that of the noise."""
    policy, weight = drawn(name, k, beta=beta), kept(k, 0.5)
    noise = MU if name == "NCA" else 2 * MU - weight
    rewards = beta * (policy / MU).log()
    multipliers = (noise * torch.sigmoid(rewards) - weight * torch.sigmoid(-rewards)) / policy
    torch.testing.assert_close(multipliers, multipliers.mean().expand(4), rtol=1e-6, atol=1e-9)
    free = MU * (weight / noise) ** (1 / beta)  # where each term is least, whatever the others do
    assert (free.sum() - 1).sign() == -multipliers[0].sign(), "too much probability is held back"
    assert distance(policy, free / free.sum()) > 1e-4


def test_nca_gives_no_answer_more_than_k_times_its_share():
    for k, alpha in ((2, 0.1), (4, 0.1), (4, 1e-3)):
        assert (kept(k, alpha) <= k * MU).all()


def test_a_small_beta_holds_the_best_answer_back():
    """What the other answers can lose is small beside what it would gain: 0.637, of each by itself."""
    best = SCORES.argmax()
    found = {beta: (beta * (drawn("NCA", 4, beta=beta) / MU).log())[best].item() for beta in (0.1, 0.5, 1.0)}
    assert found == pytest.approx({0.1: 0.110, 0.5: 0.433, 1.0: 0.637}, abs=1e-3)


def test_biased_nca_does_not_reach_a_distribution_of_its_own():
    weight = kept(2, 0.5)
    assert (MU * weight / (2 * MU - weight)).sum() > 1.05


# Regression on the scores


def constrained(policy: Tensor, goal: Tensor, beta: float) -> Tensor:
    r"""mu (r - goal) / pi: where the policy is nearest to the goals, the \(\lambda\) of its sum for all answers."""
    return MU * (beta * (policy / MU).log() - goal) / policy


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
def test_oapl_reaches_it_where_the_value_is_known(beta):
    """Absolutely: with no loss left, r = s - V."""
    policy = optimum("OAPL", ALL_OF_MU, ONCE, beta=beta)
    assert distance(policy, tilted(SCORES / beta)) < 1e-8
    loss, rewards = LOSSES["OAPL"], beta * (policy / MU).log()[ALL_OF_MU]
    assert loss.loss(rewards, loss.targets(SCORES[ALL_OF_MU], None, 0.5, beta)).item() < 1e-12


@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("k", [2, 4])
def test_oapl_with_k_answers_regresses_on_the_mean_of_their_values(k, beta):
    """Of those with the answer among them: a good answer raises the value that it is held against."""
    rest, probabilities = tuples_of(k - 1)
    powers = (SCORES[:, None] / beta).exp() + (SCORES[rest] / beta).exp().sum(dim=1)  # (N, tuples)
    values = beta * (powers / k).log() @ probabilities
    policy, goal = drawn("OAPL", k, beta=beta), SCORES - values
    multipliers = constrained(policy, goal, beta)
    torch.testing.assert_close(multipliers, multipliers.mean().expand(4), rtol=1e-6, atol=1e-9)
    assert multipliers[0] > 0, "the goals have a sum below 1"


def test_oapl_comes_near_it_as_k_grows():
    distances = {k: distance(drawn("OAPL", k), tilted(SCORES)) for k in (2, 4, 6)}
    assert distances[2] == pytest.approx(0.109, abs=1e-3) and distances[4] == pytest.approx(0.053, abs=1e-3)
    assert 0.95 < 6 * distances[6] / (4 * distances[4]) < 1.05, "it falls as 1 / K"


@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("k", [2, 4])
def test_qrpo_with_k_answers_regresses_on_the_mean_quantile(k, beta):
    r"""\(E[q | y] = (1 + (K - 1) F) / K\): it spreads the rewards over (K - 1) / K in place of 1."""
    log_z = math.log(beta * (math.exp(1 / beta) - 1))
    goal = (1 + (k - 1) * QUANTILES) / k - beta * log_z
    policy = drawn("QRPO", k, beta=beta)
    multipliers = constrained(policy, goal, beta)
    torch.testing.assert_close(multipliers, multipliers.mean().expand(4), rtol=1e-6, atol=1e-9)
    assert multipliers[0] < 0, "the goals have a sum above 1"


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_qrpo_reaches_its_optimum_as_answers_grow_in_number(beta):
    """mu e^{q / beta} / Z, with the Z of quantiles between 0 and 1: all distances fall as 1 / N."""
    found = []
    for n in (50, 100):
        scores, mu = torch.linspace(-1, 3, n).double() ** 3, torch.full((n,), 1 / n).double()
        answers, quantiles = torch.arange(n)[None], torch.arange(1, n + 1).double() / n
        policy = optimum("QRPO", answers, ONCE, beta=beta, scores=scores, mu=mu)
        z = beta * math.expm1(1 / beta)
        wanted = mu * (quantiles / beta).exp() / z
        assert wanted.sum() > 1
        found.append((wanted.sum().item() - 1, distance(policy, wanted / wanted.sum()), distance(policy, wanted)))
    for at_50, at_100 in zip(*found, strict=True):
        assert 1.8 < at_50 / at_100 < 2.2
        assert at_100 < 0.02


# IPO


def test_ipo_puts_the_answers_of_a_pair_half_a_reward_apart():
    """1 / (2 beta) nats, whatever their scores are."""
    for beta in (0.2, 1.0):
        policy = optimum("IPO", torch.tensor([[0, 1]]), ONCE, beta=beta)
        ratios = (policy / MU).log()
        assert (ratios[1] - ratios[0]).item() == pytest.approx(1 / (2 * beta), abs=1e-8)


@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, None])
def test_ipo_reaches_the_optimum_for_the_probability_to_be_preferred(temperature, beta):
    """To an answer drawn from mu; by labels without doubt it is the share of worse ones and half that of the same."""
    gaps = SCORES[:, None] - SCORES
    preferred = torch.heaviside(gaps, gaps.new_tensor(0.5)) if temperature is None else (gaps / temperature).sigmoid()
    answers, probabilities = tuples_of(2)
    if temperature is None:
        policy = optimum("IPO", answers, probabilities, beta=beta)
        torch.testing.assert_close(preferred @ MU, QUANTILES - MU / 2)
    else:
        answers, probabilities = labelled_pairs(temperature)
        policy = optimum("IPO", answers, probabilities, beta=beta, targets=FIRST / (2 * beta))
    assert distance(policy, tilted(preferred @ MU / beta)) < 1e-8
