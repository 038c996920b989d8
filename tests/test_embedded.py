"""The embedded model and data: what `make setup` unpacked, what data/ ships, and sampling."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from alignment.evaluation.held_out import bootstrap_interval
from alignment.report.tables import compare_samples, verdict
from alignment.sampling.reward_function import load_reward_function
from alignment.sampling.sample import sample_responses
from tests.conftest import MODEL, ROOT, needs_model
from tests.tiny import tiny_config, tiny_tokenizer

#: For each task, prompts that were sampled to train on and held out, and the fewest responses of a training prompt.
TASKS = {"checkable": (220, 66, 4), "words": (96, 48, 12)}


def rows(task, part):
    return [json.loads(line) for line in (ROOT / "data" / f"{task}_{part}.jsonl").read_text().splitlines()]


def reward_function(task):
    return load_reward_function(f"{ROOT}/data/{task}.py:{task}_score")


@pytest.mark.parametrize(("task", "pattern"), [("checkable", r"about (.*?)\."), ("words", "about (.*) in one")])
def test_topics_are_held_out(task, pattern):
    train, held_out = ({row["prompt"][0]["content"] for row in rows(task, part)} for part in ("train", "eval"))
    assert len(train) >= 90
    assert len(held_out) >= 40
    topics = [{re.search(pattern, text)[1] for text in texts} for texts in (train, held_out)]
    assert not topics[0] & topics[1]


def test_the_files_are_small():
    assert sum(path.stat().st_size for path in (ROOT / "data").iterdir() if path.is_file()) < 2_000_000


def test_the_prompts_are_those_of_the_script(tmp_path):
    subprocess.run([sys.executable, ROOT / "data" / "make_prompts.py", tmp_path], check=True)
    for task, (*counts, _) in TASKS.items():
        for part, count in zip(("train", "eval"), counts, strict=True):
            lines = (tmp_path / f"prompts_{task}_{part}.jsonl").read_text().splitlines()
            made = iter(json.loads(line)["prompt"] for line in lines)
            assert len(lines) == count
            assert all(row["prompt"] in made for row in rows(task, part)), "a part of them, in their order"


@pytest.mark.parametrize("part", ["train", "eval"])
@pytest.mark.parametrize("task", TASKS)
def test_rows_carry_the_score_of_the_function(task, part):
    score = reward_function(task)
    for row in rows(task, part):
        responses, scores = row["responses"], row["scores"]
        assert len(responses) == len(scores) >= (TASKS[task][2] if part == "train" else 4)
        assert len(set(scores)) > 1
        assert score([row["prompt"]] * len(responses), responses) == pytest.approx(scores, abs=1e-4)


def correlation_with_length(task, wish=""):
    """Of scores and lengths in words, both less their prompt's mean, over the training prompts with a wish."""
    pairs = []
    for row in rows(task, "train"):
        if wish in row["prompt"][0]["content"]:
            of_row = np.array([[len(text.split()) for text in row["responses"]], row["scores"]])
            pairs.append(of_row - of_row.mean(axis=1, keepdims=True))
    return np.corrcoef(np.concatenate(pairs, axis=1))[0, 1]


def test_the_scores_are_not_length_alone():
    assert -0.6 < correlation_with_length("checkable") < -0.3
    assert abs(correlation_with_length("words")) < 0.05
    assert all(abs(correlation_with_length("words", wish)) < 0.1 for wish in ("short words", "long words"))


@pytest.mark.parametrize(
    ("text", "long", "short"),
    [
        ("Drinking tea comforts and revives people.", 0.75, 0.25),
        ("Drinking tea comforts, and revives: people!", 0.75, 0.25),
        ("people people revives", 1 / 3, 2 / 3),  # letters are counted: six and seven
        ("comforts", 0.5, 0.0),  # one word is no answer
        ("I am a cat.", 0.0, 0.0),  # no word that counts
        ("", 0.0, 0.0),
        ("Élégance, don't 1234567 x1234567x", 0.5, 0.5),  # letters of any alphabet, no digits
    ],
)
def test_share_of_long_and_short_words(text, long, short):
    prompts = ["Tell me about tea. Use long words.", [{"role": "user", "content": "Use short words."}]]
    messages = [{"role": "assistant", "content": text}]
    assert reward_function("words")(prompts, [text, messages]) == pytest.approx([long, short])


def test_a_prompt_that_asks_for_no_words():
    with pytest.raises(ValueError, match="neither long nor short words"):
        reward_function("words")(["Tell me about tea."], ["Tea."])


@needs_model
def test_the_unpacked_tokenizer_splits_digits_and_ends_turns():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.tokenize("12345") == ["1", "2", "3", "4", "5"]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer("Hello").input_ids[0] != tokenizer.bos_token_id


@needs_model
def test_the_unpacked_model_answers():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    assert model.num_parameters() == 134_515_008
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    answer = sample_responses(model, tokenizer, [prompt], num_samples=1, max_new_tokens=12, temperature=0)
    assert "Paris" in answer[0][0].text


def tiny_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config())


PROMPTS = [[{"role": "user", "content": "the capital " * n}] for n in (3, 1, 2)]


def test_samples_keep_order_seed_and_state():
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    settings = {"num_samples": 2, "max_new_tokens": 6, "batch_size": 2}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = sample_responses(model, tokenizer, PROMPTS, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert [len(drawn) for drawn in first] == [2, 2, 2]
    assert sample_responses(model, tokenizer, PROMPTS, **settings) == first
    assert sample_responses(model, tokenizer, PROMPTS, **settings, seed=1) != first


def test_greedy_samples_equal_plain_generation_with_and_without_adapter():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    greedy = {"num_samples": 1, "max_new_tokens": 8, "temperature": 0}
    together = sample_responses(model, tokenizer, PROMPTS, **greedy)
    for prompt, (drawn,) in zip(PROMPTS, together, strict=True):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        alone = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert drawn.text == tokenizer.decode(alone, skip_special_tokens=True)
        assert drawn.ids == alone.tolist()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert sample_responses(adapted, tokenizer, PROMPTS, **greedy) == together  # an untrained adapter changes nothing


def scored(means):
    return [{"prompt": [], "samples": ["a b"] * 2, "scores": [m - 0.1, m + 0.1]} for m in means]


def test_the_table_claims_no_more_than_the_interval():
    flat = [0.5, 0.6, 0.4, 0.5] * 10
    up = compare_samples(scored(flat), scored([m + 0.2 for m in flat]))
    assert up["score_difference"] == pytest.approx(0.2)
    assert "improved" in verdict(up)
    noise = compare_samples(scored(flat), scored([0.5, 0.4, 0.6, 0.5] * 10))
    assert "NOT SHOWN" in verdict(noise)
    assert "WORSE" in verdict(compare_samples(scored([m + 0.2 for m in flat]), scored(flat)))


def test_interval_is_paired_and_covers():
    rng = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(100):
        values = torch.randn(40, generator=rng).double().numpy() + 0.3
        low, high = bootstrap_interval(values, num_resamples=500)
        covered += low < 0.3 < high
    assert 87 <= covered <= 100
