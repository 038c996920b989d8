"""4-bit models that FSDP2 will shard: loaded on the CPU, with the bits of any other loading."""

from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Params4bit
from transformers import LlamaForCausalLM
from trl.trainer.utils import create_model_from_path

from alignment.job import model_arguments
from alignment.models import PolicyConfig, adapter_and_quantization, model_init_kwargs
from tests.tiny import tiny_config
from trl_nca import loading

SHARDED = {"load_in_4bit": True, "use_peft": True, "bnb_4bit_quant_storage": "bfloat16"}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(hidden_size=128, intermediate_size=256)).save_pretrained(tmp_path)
    return str(tmp_path)


def arguments(name, **settings):
    config = PolicyConfig(model_name_or_path=name, **settings)
    args = SimpleNamespace(model_init_kwargs=model_init_kwargs(config), trust_remote_code=False, world_size=2)
    return model_arguments(config, args), args, config


def bits(tensor):
    """Of 4-bit weights: read as numbers some are none, which equal nothing."""
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("nested", [False, True])
def test_the_bits_are_those_of_any_loading(folder, monkeypatch, nested):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    device = torch.device("cpu", 0)  # stands for a GPU
    monkeypatch.setattr(loading, "PartialState", lambda: SimpleNamespace(device=device))
    devices, quantize = [], Params4bit._quantize
    monkeypatch.setattr(
        Params4bit, "_quantize", lambda self, device: (devices.append(device), quantize(self, device))[1]
    )
    found, args, config = arguments(folder, use_bnb_nested_quant=nested, **SHARDED)
    assert "quantization_config" not in found and args.model_init_kwargs is None
    assert set(devices) == {device}, "each weight, on the device of the run"
    model = found["model"]
    quantization = adapter_and_quantization(config)["quantization_config"]
    other = create_model_from_path(folder, quantization_config=quantization, **model_init_kwargs(config))
    weights, expected = model.state_dict(), other.state_dict()
    assert weights.keys() == expected.keys() and any("absmax" in name for name in weights)
    assert all(torch.equal(bits(value), bits(expected[name])) for name, value in weights.items())


@pytest.mark.parametrize(
    ("launch", "settings"),
    [
        ("FSDP", {}),
        ("FSDP", SHARDED | {"bnb_4bit_quant_storage": "uint8"}),
        ("FSDP", {"load_in_8bit": True, "use_peft": True}),
        ("DEEPSPEED", SHARDED),
        (None, SHARDED),
    ],
)
def test_all_else_is_left_to_upstream(monkeypatch, launch, settings):
    for name in ("FSDP", "DEEPSPEED"):
        monkeypatch.delenv(f"ACCELERATE_USE_{name}", raising=False)
    if launch:
        monkeypatch.setenv(f"ACCELERATE_USE_{launch}", "true")
    found, args, _ = arguments("some/model", **settings)
    assert found["model"] == "some/model" and "quantization_config" in found and args.model_init_kwargs
