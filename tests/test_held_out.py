"""Samples around training: scored as score.py scores, whatever a reward function returns, and compared by prompt."""

import json
import math

import numpy as np
import pytest

from alignment.data.load import DataConfig, load_groups
from alignment.errors import UserError
from alignment.evaluation import held_out
from alignment.evaluation.held_out import compare_samples, prompt_means, sample_and_score
from alignment.recipe import RunConfig
from alignment.report.groups import group_runs
from alignment.report.html import run_page
from alignment.report.runs import Run
from alignment.report.samples import sampled_answers
from alignment.report.tables import run_rows
from alignment.sampling.reward_function import load_reward_function
from alignment.sampling.sample import Drawn

SAMPLES = [["one", "two words"], ["three", "four"], ["five", "six"]]


@pytest.fixture
def rows(tmp_path):
    """Held-out rows as texts, with a column `answer`, and one that is the score in another form of row."""
    raw = [
        {"prompt": f"Question {i}", "responses": ["a", "b"], "scores": [0, 1], "answer": i, "label": [i]}
        for i in range(3)
    ]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raw))
    config = DataConfig(train_file=str(tmp_path / "eval.jsonl"))
    return load_groups(config, keep_columns=True)[0]["train"]


@pytest.fixture(autouse=True)
def _samples(monkeypatch):
    """No model is asked."""
    drawn = [[Drawn(text, [len(text), 2]) for text in texts] for texts in SAMPLES]
    monkeypatch.setattr(
        held_out, "sample_or_read", lambda folder, model, tokenizer, prompts, **_: drawn[: len(prompts)]
    )


def score(rows, function, **settings):
    config = RunConfig(reward_function="f.py:f", num_eval_samples=2, **settings)
    return sample_and_score(None, None, rows, function, config, 0, "before")


def test_other_columns_are_handed_over_by_name(rows):
    seen = {}

    def takes_all(prompts, completions, **columns):
        seen.update(columns)
        return [0.0] * len(prompts)

    def takes_answers(prompts, completions, answer):
        return [float(value) for value in answer]

    score(rows, takes_all)
    assert seen == {"answer": [0, 0, 1, 1, 2, 2], "label": [[0], [0], [1], [1], [2], [2]]}
    assert [row["scores"] for row in score(rows, takes_answers)] == [[0, 0], [1, 1], [2, 2]]
    assert [row["scores"] for row in score(rows, lambda prompts, completions: [1] * len(prompts))] == [[1, 1]] * 3
    assert [row["samples"] for row in score(rows, takes_answers, max_eval_prompts=2)] == SAMPLES[:2]


def test_columns_are_kept_for_a_reward_function_alone(rows, tmp_path):
    (plain,) = load_groups(DataConfig(train_file=str(tmp_path / "eval.jsonl")))[0].values()
    assert set(plain["columns"][:]) == {""}
    assert json.loads(rows["columns"][1]) == {"answer": 1, "label": [1]}


def test_of_rows_of_one_response_the_columns_that_agree_are_kept(tmp_path):
    raw = [
        {"prompt": f"Question {i}", "response": f"r{k}", "score": k, "gold": i, "annotator": k}
        for i in range(2)
        for k in range(2)
    ]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raw))
    (kept,) = load_groups(DataConfig(train_file=str(tmp_path / "long.jsonl")), keep_columns=True)[0].values()
    assert [json.loads(columns) for columns in kept["columns"]] == [{"gold": 0}, {"gold": 1}]


def test_none_is_no_score(rows):
    scored = score(rows, lambda prompts, completions: [None, 1.0, None, None, 0.5, 0.5])
    assert [row["scores"] for row in scored] == [[None, 1.0], [None, None], [0.5, 0.5]]
    np.testing.assert_equal(prompt_means(scored), [1.0, math.nan, 0.5])
    better = [row | {"scores": [2.0, 2.0]} for row in scored]
    compared = compare_samples(scored, better)
    assert (compared["num_prompts"], compared["score_before"], compared["score_after"]) == (2, 0.75, 2.0)
    run = Run("a", {"beta": 0.1}, [], before=scored, after=better)
    assert ("score of samples", "0.750", "2.000") in run_rows(run)
    assert "no score" in run_page(run, [])


def test_log_ratios_are_of_the_tokens_that_were_drawn(rows, monkeypatch):
    monkeypatch.setattr(held_out, "encode_row", lambda tokenizer, row: [len(row["prompt"][0]["content"])])

    def logratios(prompt_ids, response_ids):
        pairs = zip(prompt_ids, response_ids, strict=True)
        return [[float(prompt[0] * sum(ids)) for ids in of_prompt] for prompt, of_prompt in pairs]

    config = RunConfig(reward_function="f.py:f", num_eval_samples=2)
    scored = sample_and_score(None, None, rows, lambda prompts, completions: [0] * 6, config, 0, "after", logratios)
    assert [row["logratios"] for row in scored] == [[50.0, 110.0], [70.0, 60.0], [60.0, 50.0]], "10 (length + the end)"
    assert "logratios" not in score(rows, lambda prompts, completions: [0] * 6)[0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([0.0] * 5, "returned 5 scores for 6 responses; it must return one for each completion"),
        ([0.0] * 7, "returned 7 scores for 6 responses"),
        (
            [0.0] * 5 + [math.nan],
            "eval.jsonl, line 3, response 2: f.py:f returned nan; return a finite number",
        ),
        ([0.0] * 5 + ["good"], "eval.jsonl, line 3, response 2: f.py:f returned 'good'"),
        ([None] * 6, "f.py:f returned None for all samples"),
    ],
)
def test_what_is_no_score_is_one_line(rows, returned, message):
    with pytest.raises(UserError, match=message):
        score(rows, lambda prompts, completions: returned)


def test_prompts_without_a_score_on_one_side_cannot_be_compared():
    before, after = [{"samples": ["a"], "scores": [None]}], [{"samples": ["a"], "scores": [1.0]}]
    with pytest.raises(UserError, match="no prompt has a sample with a score both before and after"):
        compare_samples(before, after)


def test_parts_of_a_score_are_kept_by_their_names(rows, tmp_path):
    (tmp_path / "f.py").write_text(
        "def good(prompts, completions): return [1.0] * len(prompts)\n"
        "def good_parts(prompts, completions, answer):\n"
        "    return [{'short': len(c[0]['content']) < 4, 'answer': a} | ({'odd': None} if a % 2 else {})\n"
        "            for c, a in zip(completions, answer)]\n"
        "def bad(prompts, completions): return [1.0] * len(prompts)\n"
        "def bad_parts(prompts, completions): return [1.0] * len(prompts)\n"
    )
    found = [row["score_parts"] for row in score(rows, load_reward_function(f"{tmp_path}/f.py:good"))]
    assert found[0] == {"short": [1.0, 0.0], "answer": [0.0, 0.0]}
    assert found[1] == {"short": [0.0, 0.0], "answer": [1.0, 1.0], "odd": [None, None]}
    with pytest.raises(UserError, match="f.py:f_parts fails: .* it must return a dict of numbers for each completion"):
        score(rows, load_reward_function(f"{tmp_path}/f.py:bad"))
    assert "score_parts" not in score(rows, lambda prompts, completions: [1.0] * len(prompts))[0]


def test_the_page_says_which_conditions_failed_and_begins_with_the_largest_change():
    def rows_of(scores, met):
        return [
            {"prompt": f"Prompt {i}.", "samples": [f"text {i}"], "scores": [score],
             "score_parts": {"No commas.": [is_met], "One sentence.": [1.0]}}
            for i, (score, is_met) in enumerate(zip(scores, met, strict=True))
        ]  # fmt: skip

    before, after = rows_of([0.5, 0.5, 1.0], [0.0, 0.0, 1.0]), rows_of([0.6, 1.0, 0.9], [0.0, 1.0, 1.0])
    found = sampled_answers(group_runs([Run("a", {"beta": 0.1}, [], before=before, after=after)]))
    assert [row.prompt for row in found] == ["Prompt 1.", "Prompt 0.", "Prompt 2."]
    assert [answer.parts for answer in found[0].answers] == ["failed: No commas.", "all conditions met"]
    numbers = [row | {"score_parts": {"brevity": [0.25]}} for row in after]
    found = sampled_answers(group_runs([Run("a", {"beta": 0.1}, [], after=numbers)]))
    assert found[0].answers[0].parts == "brevity 0.25"
