"""Models and adapters by name: which of them can be trained, and what is said of those that cannot be loaded."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from alignment import models
from alignment.errors import UserError
from alignment.merge import merge_adapter
from alignment.models import (
    PolicyConfig,
    adapter_base,
    load_config,
    load_tokenizer,
    load_trained_model,
    load_trained_tokenizer,
)
from tests.scripts import script
from tests.tiny import SIZES, save_tiny_model, tiny_tokenizer

IDS = torch.arange(3, 40)[None]


def adapter(folder, base, *others):
    """An adapter's folder, with empty files beside its config."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(base if base.startswith("[") else json.dumps({
        "peft_type": "LORA", "base_model_name_or_path": base or None, "r": 4,
    }))  # fmt: skip
    for name in others:
        (folder / name).touch()
    return str(folder)


@pytest.mark.parametrize("load", [load_tokenizer, load_config])
def test_an_adapter_is_no_model_to_start_from(tmp_path, tiny_model, load):
    name = adapter(tmp_path / "adapter", tiny_model, "adapter_model.safetensors", "config.json")
    with pytest.raises(UserError, match=f"adapter is an adapter on {tiny_model}, .*merge.py {name} --output FOLDER"):
        load(PolicyConfig(model_name_or_path=name))


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_an_adapter_beside_weights_is_neither(tmp_path, tiny_model, weights):
    name = adapter(tmp_path / "both", tiny_model, "adapter_model.safetensors", weights)
    for load in (load_trained_tokenizer, load_trained_model, lambda n: load_tokenizer(PolicyConfig(n))):
        with pytest.raises(UserError, match=f"holds an adapter .* and a model's weights .{weights}.*; move one"):
            load(name)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (
            "models/elsewhere",
            r"is an adapter on 'models/elsewhere', which is neither a folder seen from .*--base FOLDER .*correct base",
        ),
        ("", r"adapter_config.json: names no base .base_model_name_or_path is null"),
        ("[1", r"adapter_config.json: is no JSON object"),
        ("[1]", r"adapter_config.json: is no JSON object"),
    ],
)
def test_an_adapter_whose_base_is_not_there(tmp_path, base, message):
    name = adapter(tmp_path / "adapter", base, "adapter_model.safetensors")
    for load in (load_trained_tokenizer, load_trained_model, lambda name: merge_adapter(name, f"{name}/merged")):
        with pytest.raises(UserError, match=message):
            load(name)


def test_anything_else_is_no_adapter(tmp_path, tiny_model):
    assert adapter_base(tiny_model) is None
    assert adapter_base(str(tmp_path / "nowhere")) is None
    assert adapter_base(adapter(tmp_path / "adapter", "org/base", "config.json")) == "org/base"


@pytest.fixture
def moved(tmp_path):
    """An adapter, and its base where it is now; and what the adapter says on it."""
    base = save_tiny_model(tmp_path / "base")
    torch.manual_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).eval()
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "moved")
    with torch.inference_mode():
        return str(tmp_path / "adapter"), str(tmp_path / "moved"), model(IDS).logits


def test_a_base_that_has_moved_is_named(moved, tmp_path, monkeypatch, capsys):
    name, base, expected = moved
    with pytest.raises(UserError, match=f"adapter is an adapter on '{tmp_path}/base', .* --base FOLDER"):
        load_trained_model(name)
    tokenizer, longest = load_trained_tokenizer(name, base)
    assert (len(tokenizer), longest) == (len(tiny_tokenizer()), SIZES["max_position_embeddings"])
    with torch.inference_mode():
        assert torch.equal(load_trained_model(name, base=base).eval()(IDS).logits, expected)
    assert script(monkeypatch, "merge.py", name, "--output", tmp_path / "merged", "--base", base, "--modelfile") == 0
    with torch.inference_mode():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    assert (tmp_path / "merged" / "Modelfile").read_text().startswith("# ollama create")
    assert script(monkeypatch, "merge.py", name, "--output", tmp_path / "other", "--base", "4bit") == 2
    assert "give --base_weights 4bit" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("What is Rome?\n")
    given = ["--model_name_or_path", name, "--num_samples", "1", "--max_new_tokens", "2", "--engine", "transformers"]
    for more, code in ([], 2), (["--base", base], 0):
        samples = ["--output", tmp_path / "samples.jsonl", *given, *more]
        assert script(monkeypatch, "sample.py", tmp_path / "prompts.txt", *samples) == code
    (tmp_path / "questions.json").write_text('[{"instruction": "What is Rome?", "dataset": "mine"}]')
    given = ["--benchmark", "alpaca_eval", "--questions", tmp_path / "questions.json", "--model_name_or_path", name]
    for more, code in ([], 2), (["--base", base], 0):
        answers = [*given, "--output_dir", tmp_path / "answers", "--max_new_tokens", "2", *more]
        assert script(monkeypatch, "generate_answers.py", *answers) == code


def test_an_adapter_is_found_by_its_name_on_the_hub(moved, monkeypatch):
    name, base, expected = moved
    monkeypatch.setattr(models, "find_adapter_config_file", lambda repo: repo == "me/adapter" or None)
    monkeypatch.setattr(models, "snapshot_download", lambda repo, allow_patterns: name)
    assert adapter_base("me/adapter") == str(Path(base).with_name("base"))
    with torch.inference_mode():
        assert torch.equal(load_trained_model("me/adapter", base=base).eval()(IDS).logits, expected)
    assert adapter_base("me/model") is None
