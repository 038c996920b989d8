"""The plan's hours: floating-point operations as they are counted by hand, over a share of a GPU's rate."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from alignment.errors import UserError
from alignment.models import SHIPPED_CONFIGS
from alignment.plan.hours import GPUS, SHARE, Hours, gpu_here, named_gpu
from alignment.plan.meta_model import StepSpec, build_meta_model
from alignment.plan.show import estimate_hours
from alignment.plan.steps import Plan
from alignment.plan.trace import largest_forward, trace_step
from alignment.recipe import RunConfig
from benchmarks.flops import count_flops, model_flops
from benchmarks.systems import LORA

ROW = {"prompt_ids": [0] * 300, "response_ids": [[0] * 200] * 4}


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}])
def test_operations_are_those_of_the_formula(checkpointing):
    """Within 4 %: the kernel's attention is counted without its mask, a few per cent of all."""
    config = AutoConfig.from_pretrained(SHIPPED_CONFIGS / "mistralai--Mistral-7B-v0.1.json")
    spec = StepSpec(config, torch.bfloat16, LORA, autocast=torch.bfloat16, checkpointing=checkpointing)
    step = trace_step(spec, largest_forward([(300, [200] * 4)], None)[0])
    flops = count_flops(build_meta_model(spec, config.num_hidden_layers))
    policy, both = (model_flops([ROW], flops, cached, bool(checkpointing)) for cached in (True, False))
    assert step.flops == pytest.approx(policy, rel=0.04)
    assert step.forward_flops == pytest.approx(both - policy, rel=0.04)


#: Of 100 steps by 32 prompts.
PLAN = Plan(8, 1, 4, 32, num_prompts=3200, num_tokens=None, num_epochs=1, num_steps=100, warmup_steps=0)


def hours(plan, precompute=False, gpu="a100", gpu_memory_gb=None):
    """Of a model whose step takes 2e12 operations a token, and its reference 1e12; a prompt has 240 tokens."""
    args = SimpleNamespace(precompute_ref_log_probs=precompute)
    estimator = SimpleNamespace(args=args, flops_per_token=lambda layout: (2e12, 1e12))
    return estimate_hours(
        RunConfig(plan=True, gpu=gpu, gpu_memory_gb=gpu_memory_gb), estimator, plan, "ddp", [(48, [48] * 4)]
    )


def test_hours_of_a_run():
    online, cached = hours(PLAN), hours(PLAN, precompute=True)
    assert online.at_most and online.num_gpus == 8 and online.gpu == "A100"
    assert online.flops == cached.flops == 3e12 * 240 * 3200
    assert (online.flops_per_step, cached.flops_per_step) == (online.flops / 100, online.flops / 150)
    assert online.hours == pytest.approx(online.flops / (312e12 * SHARE * 8) / 3600)
    known = hours(dataclasses.replace(PLAN, num_tokens=1000))
    assert known.flops == 3e12 * 1000 and not known.at_most
    longer = hours(dataclasses.replace(PLAN, num_epochs=3, num_steps=300), precompute=True)
    assert longer.flops == pytest.approx(online.flops * (3 * 2 + 1) / 3), "the reference once"
    assert hours(dataclasses.replace(PLAN, num_steps=None)) is None


def test_hours_need_a_gpu_that_is_known(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hours(PLAN, gpu=None).gpu == "H100"
    assert hours(PLAN, gpu=None, gpu_memory_gb=24) is None, "a GPU of which the memory is known alone"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert hours(PLAN, gpu=None) is None


@pytest.mark.parametrize(
    ("flops", "words"), [(1e17, "4.2 minutes"), (1e19, "7 hours"), (1e20, "70 hours"), (1e21, "29 days")]
)  # 989e12 * 0.4 a second
def test_words(flops, words):
    assert f"about {words} on 1 x H100: " in str(Hours("H100", 1, flops, flops, False))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4060", None),
        ("Tesla T4", None),
    ],
)
def test_the_gpu_here(monkeypatch, name, key):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert gpu_here() == key


def test_a_gpu_by_name():
    assert named_gpu("rtx 4090") == "RTX 4090" and all(named_gpu(name) == name for name in GPUS)
    with pytest.raises(UserError, match="gpu: the rate of 'V100' is not known here; known are A100, .*RTX 4090"):
        named_gpu("V100")
