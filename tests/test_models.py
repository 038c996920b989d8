"""Models and adapters by name: which of them can be trained, and what is said of those that cannot be loaded."""

import json

import pytest

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
            r"is an adapter on 'models/elsewhere', which is neither a folder seen from .*correct base",
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
