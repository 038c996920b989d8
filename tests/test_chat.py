"""Talking to a model: who answers, what each of them remembers."""

import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from alignment.sampling.chat import HELP, chat, speakers
from alignment.sampling.sample import SamplingConfig, sample_responses
from tests.scripts import script
from tests.tiny import tiny_tokenizer

GREEDY = SamplingConfig(num_samples=1, max_new_tokens=6, temperature=0.0, batch_size=1)


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """Folder of an adapter that changes what the base says."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def talk(lines, name, base=None, both=False):
    said = []
    who, tokenizer = speakers(name, base)
    chat(lines, who, tokenizer, GREEDY, both, say=said.append)
    return who, said, tokenizer


def test_an_answer_is_what_the_model_says_and_is_remembered(adapter, capsys):
    who, _, tokenizer = talk(["What is Rome?\n", "And Paris?\n"], adapter)
    base, aligned = who
    assert [turn["role"] for turn in aligned.turns] == ["user", "assistant"] * 2
    assert base.turns == []
    settings, printed = {"num_samples": 1, "max_new_tokens": 6, "temperature": 0.0}, capsys.readouterr().out
    for end in (1, 3):
        ((expected,),) = sample_responses(aligned.model, tokenizer, [aligned.turns[:end]], **settings)
        assert aligned.turns[end]["content"] == expected.strip()
        assert expected.strip() in printed


def test_side_by_side_the_base_is_the_model_without_its_adapter(adapter, tiny_model):
    (base, aligned), said, _ = talk(["/both", "What is Rome?"], adapter)
    assert said[:3] == ["Base and aligned answer.", "base:", ""]
    assert said[3] == "aligned:"
    (alone,), _, _ = talk(["What is Rome?"], tiny_model)
    assert base.turns == alone.turns
    assert base.turns[1] != aligned.turns[1]
    named, _, _ = talk(["What is Rome?"], tiny_model, base=tiny_model, both=True)
    assert named[0].turns == named[1].turns == alone.turns


def test_commands(adapter, tiny_model):
    who, said, _ = talk(["hello", "/new", "/what", "", "/both", "/both", "/quit", "never"], adapter)
    assert who[1].turns == []
    assert said[2:] == ["A new conversation.", HELP, "Base and aligned answer.", "One model answers."]
    _, said, _ = talk(["/both"], tiny_model)
    assert said == ["No base: see --base."]


def test_the_chat_script(adapter, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is Rome?\n/quit\n"))
    assert script(monkeypatch, "chat.py", adapter, "--both", "--max_new_tokens", "3", "--temperature", "0") == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.endswith(":")] == ["base:", "aligned:"]
    assert script(monkeypatch, "chat.py", "models/nowhere") == 2
    assert "models/nowhere" in capsys.readouterr().err
