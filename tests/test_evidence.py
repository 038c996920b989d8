"""The evidence page says what the runs' numbers say, whichever way they fall. The runs are made up."""

import numpy as np
import pytest

from alignment.report.groups import Group
from alignment.report.runs import Run
from benchmarks import evidence, evidence_page
from benchmarks.evidence_page import Place, of_root_of_kl, outcomes, place_of

PROMPTS = 30


def run_of(place: Place, seed: int, gain: float, kl: float, best: float) -> Run:
    rng = np.random.default_rng(seed)
    before = [{"prompt": str(p), "samples": ["a b", "a b c"], "scores": [0.3, 0.5]} for p in range(PROMPTS)]
    noise = 0.02 * rng.standard_normal(PROMPTS)
    drawn = {"logratios": [kl - 0.1, kl + 0.1]}
    after = [row | drawn | {"scores": [0.3 + gain + e, 0.5 + gain + e]} for row, e in zip(before, noise, strict=True)]
    recipe = {"loss_type": place.loss, "beta": place.beta, "num_responses": place.num_responses, "seed": seed}
    samples = {"num_prompts": PROMPTS, "samples_per_prompt": 2}
    return Run(
        "run", recipe, [], before=before, after=after, held_out={"step": 1, "logratios/chosen": [best] * PROMPTS},
        results={"seconds": 60.0, "train": {"train_runtime": 30.0}, "samples": samples},
    )  # fmt: skip


def made_up(worse_by_samples=True, with_later=False):
    """Arms in which all predictions hold; or DPO gets better with more samples."""
    found = {}
    for words in evidence.arm_words()[: None if with_later else -len(evidence.LATER)]:
        loss, beta, number = (word.partition("=")[2] for word in words)
        place = Place(loss, float(beta), int(number))
        is_small, more = place.beta == min(evidence.BETAS[loss]), place.num_responses / 8 - 0.5
        gain = 0.2 if is_small else 0.05
        best = 0.1 if loss in evidence_page.POINTWISE else -1.0
        if loss == "DPO":
            gain, best = gain - more * (0.05 if worse_by_samples else -0.05), best - more
        runs = [run_of(place, seed, gain, 2.0 if is_small else 0.5, best) for seed in (42, 43)]
        found[place] = Group(str(place), runs)
    return found


def test_the_arms_are_what_the_page_takes_them_for():
    found = made_up(with_later=True)
    assert len(found) == len(evidence.LATER) + sum(map(len, evidence.BETAS.values())) + sum(
        map(len, evidence.MORE_RESPONSES.values())
    )
    assert all(place_of(group) == place for place, group in found.items())


def test_predictions_that_hold_and_one_that_does_not():
    assert {answer for _, _, answer, _ in outcomes(made_up())} == {"yes"}
    others = [text for _, text, answer, _ in outcomes(made_up(worse_by_samples=False)) if answer != "yes"]
    assert others == ["DPO: the score falls from the fewest responses to the most"]


def test_the_page_is_written(tmp_path):
    page = evidence_page.write(list(made_up(with_later=True).values()), evidence.LATER, jobs=2, docs=tmp_path)
    text = page.read_text()
    assert (tmp_path / "figures/frontier.png").stat().st_size > 10_000
    assert "| NCA | 0.1 | 16 |" in text
    assert "| OAPL | 0.05 | 4 |" in text
    assert "| DPO | 0.5 | 16 |" in text
    assert text.count("| NCA | 0.1 | 4 |") == 2, "among the betas, and among the numbers of answers"
    assert not [line for line in text.splitlines() if len(line) > 100 and line[0] not in "|!"]


def test_score_a_root_of_kl():
    gains, kls = np.full((2, 5), 0.2), np.full((2, 5), 4.0)
    assert of_root_of_kl(gains, kls) == pytest.approx((0.1, 0.1, 0.1))
    assert of_root_of_kl(gains, -kls).mean > 1, "a KL that is estimated below zero is no error"
