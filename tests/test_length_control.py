"""The difference at one length: against least squares with dummies, and where length explains all of a gain or none."""

import numpy as np
import pytest

from alignment.evaluation.length_control import control_length, control_length_interval


def rows_of(lengths, score):
    """Rows of one prompt each: samples of these lengths, scored by a function of prompt and length."""
    return [
        {"samples": ["word " * n for n in of_prompt], "scores": [score(p, n) for n in of_prompt]}
        for p, of_prompt in enumerate(lengths)
    ]


def drawn(rng, num_prompts, mean, fewest=4):
    sizes = rng.integers(fewest, 5, num_prompts)
    return [np.maximum(rng.normal(mean + p % 5, 4, size), 1).astype(int) for p, size in enumerate(sizes)]


@pytest.mark.parametrize("fewest", [4, 1], ids=["equal", "ragged"])
def test_it_is_the_regression_with_an_intercept_a_prompt(fewest):
    rng = np.random.default_rng(0)
    noisy = lambda gain: lambda p, n: gain + 0.1 * (p % 3) - 0.02 * n + rng.normal(0, 0.1)  # noqa: E731
    before = rows_of(drawn(rng, 20, 20, fewest), noisy(0.0))
    after = rows_of(drawn(rng, 20, 14, fewest), noisy(0.05))
    after[3]["scores"][0] = None  # the function does not apply
    after[3]["samples"].append("word " * 30)
    after[3]["scores"].append(0.5)
    columns, scores, weights = [], [], []
    for is_after, rows in enumerate((before, after)):
        for prompt, row in enumerate(rows):
            pairs = [(len(s.split()), v) for s, v in zip(row["samples"], row["scores"], strict=True) if v is not None]
            for words, score in pairs:
                columns.append([words, is_after, *np.eye(20)[prompt]])
                scores.append(score)
                weights.append(1 / len(pairs))
    root = np.sqrt(weights)
    (slope, difference, *_), *_ = np.linalg.lstsq(np.array(columns) * root[:, None], scores * root, rcond=None)
    found = control_length(before, after)
    assert found.shape == (20,)
    assert found.mean() == pytest.approx(difference, abs=1e-12)
    assert abs(slope) > 0.01, "and the length matters"
    low, high = control_length_interval(before, after)
    assert low < difference < high


def test_where_length_is_all_nothing_is_left_and_where_it_is_nothing_all():
    rng = np.random.default_rng(1)
    longer, shorter = drawn(rng, 12, 20), drawn(rng, 12, 12)
    by_length = lambda p, n: 0.9 - 0.03 * n + 0.2 * (p % 2)  # noqa: E731
    before, after = rows_of(longer, by_length), rows_of(shorter, by_length)
    assert np.mean([np.mean(a["scores"]) - np.mean(b["scores"]) for b, a in zip(before, after, strict=True)]) > 0.2
    np.testing.assert_allclose(control_length(before, after), 0, atol=1e-12)
    assert control_length_interval(before, after) == pytest.approx((0, 0), abs=1e-12)
    better = rows_of(shorter, lambda p, n: by_length(p, n) + 0.07)
    assert control_length(before, better).mean() == pytest.approx(0.07)
    flat = rows_of(longer, lambda p, n: 0.3), rows_of(shorter, lambda p, n: 0.4)
    assert control_length(*flat).mean() == pytest.approx(0.1)


def test_long_answers_to_prompts_that_score_high_are_no_effect_of_length():
    """Across prompts longer answers score higher, within them lower: the prompt's own level is not the length's."""
    before = rows_of([[10, 12], [30, 32]], lambda p, n: p - 0.02 * n)
    after = rows_of([[8, 10], [28, 30]], lambda p, n: p - 0.02 * n)
    np.testing.assert_allclose(control_length(before, after), 0, atol=1e-12)


def test_equal_lengths_and_one_sample_a_prompt():
    same = rows_of([[5, 5], [5, 5]], lambda p, n: 0.1 * p), rows_of([[5, 5], [5, 5]], lambda p, n: 0.1 * p + 0.2)
    assert control_length(*same) == pytest.approx([0.2, 0.2])
    greedy = rows_of([[4], [6], [9]], lambda p, n: -0.1 * n), rows_of([[3], [6], [5]], lambda p, n: 0.3 - 0.1 * n)
    assert control_length(*greedy).mean() == pytest.approx(0.3), "by the changes of prompts"
    low, high = control_length_interval(*greedy)
    assert low <= 0.3 + 1e-9
    assert np.isfinite([low, high]).all()
