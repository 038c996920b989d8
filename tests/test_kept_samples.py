"""Samples that are kept for later runs: drawn once, and drawn again where anything that decides them has changed."""

import pytest
import torch

from alignment.sampling import kept
from alignment.sampling.sample import sample_responses
from tests.tiny import tiny_tokenizer
from tests.trainers import tiny_llama

PROMPTS = [{"prompt": [{"role": "user", "content": text}]} for text in ("Paris is", "the capital of Italy", "Rome")]
SETTINGS = {"num_samples": 2, "max_new_tokens": 5, "temperature": 0.7, "seed": 3}


@pytest.fixture
def draws(monkeypatch):
    """How often samples were drawn."""
    calls = []
    monkeypatch.setattr(
        kept, "sample_responses", lambda *given, **to: calls.append(1) or sample_responses(*given, **to)
    )
    return calls


def test_samples_are_drawn_once_and_are_those_of_a_run_that_keeps_none(tmp_path, draws):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    alone = kept.sample_or_read(None, model, tokenizer, PROMPTS, **SETTINGS)
    found = [kept.sample_or_read(str(tmp_path), model, tokenizer, PROMPTS, **SETTINGS) for _ in range(3)]
    assert found == [alone] * 3
    assert len(draws) == 2


def test_what_decides_the_samples_draws_them_again(tmp_path, draws):
    model, tokenizer = tiny_llama(), tiny_tokenizer()

    def draw(prompts=PROMPTS, **changed):
        kept.sample_or_read(str(tmp_path), model, tokenizer, prompts, **SETTINGS | changed)
        return len(draws)

    assert draw() == 1
    others = [{"seed": 4}, {"num_samples": 3}, {"max_new_tokens": 6}, {"temperature": 0.8}, {"prompts": PROMPTS[:2]},
              {"prompts": PROMPTS[::-1]}]  # fmt: skip
    assert [draw(**other) for other in others] == [2, 3, 4, 5, 6, 7]
    model.generation_config.eos_token_id = [7, 9]
    assert draw() == 8
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    assert draw() == 9 and draw() == 9
