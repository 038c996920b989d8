"""The embedded model and data: what `make setup` unpacked, what data/ ships, and sampling."""

import json
import subprocess
import sys

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


def rows(name):
    return [json.loads(line) for line in (ROOT / "data" / f"checkable_{name}.jsonl").read_text().splitlines()]


def test_prompts_are_held_out_and_the_files_small():
    train, held_out = ({row["prompt"][0]["content"] for row in rows(name)} for name in ("train", "eval"))
    assert len(train) >= 150
    assert len(held_out) >= 40
    assert not train & held_out
    topics = [{text.split(".")[0] for text in texts} for texts in (train, held_out)]
    assert not topics[0] & topics[1]
    assert sum(path.stat().st_size for path in (ROOT / "data").iterdir() if path.is_file()) < 2_000_000


def test_the_prompts_are_those_of_the_script(tmp_path):
    subprocess.run([sys.executable, ROOT / "data" / "make_prompts.py", tmp_path], check=True)
    for name, count in [("train", 220), ("eval", 66)]:
        lines = (tmp_path / f"prompts_{name}.jsonl").read_text().splitlines()
        made = iter(json.loads(line)["prompt"] for line in lines)
        assert len(lines) == count
        assert all(row["prompt"] in made for row in rows(name)), "a part of them, in their order"


@pytest.mark.parametrize("name", ["train", "eval"])
def test_rows_carry_the_score_of_the_function(name):
    score = load_reward_function(f"{ROOT}/data/checkable.py:checkable_score")
    for row in rows(name):
        responses, scores = row["responses"], row["scores"]
        assert len(responses) == len(scores) >= 4
        assert len(set(scores)) > 1
        assert score([row["prompt"]] * len(responses), responses) == pytest.approx(scores, abs=1e-4)


def test_the_score_is_not_length_alone():
    pairs = [(len(text), s) for row in rows("train") for text, s in zip(row["responses"], row["scores"], strict=True)]
    lengths, scores = torch.tensor(pairs, dtype=torch.float64).T
    assert abs(torch.corrcoef(torch.stack([lengths, scores]))[0, 1]) < 0.5


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
    answer = sample_responses(model, tokenizer, [{"prompt": prompt}], num_samples=1, max_new_tokens=12, temperature=0)
    assert "Paris" in answer[0][0].text


def tiny_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config())


PROMPTS = [{"prompt": [{"role": "user", "content": "the capital " * n}]} for n in (3, 1, 2)]


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
    for row, (drawn,) in zip(PROMPTS, together, strict=True):
        prompt = row["prompt"]
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
