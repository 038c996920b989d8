"""The engine against the padded reference that the benchmarks measure it by: values, gradients, loss."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.padded import padded_logps
from tests.conftest import MODEL, needs_model
from tests.engine import FAMILIES, make
from tests.tiny import SHAPES, rows_of
from trl_nca.collate import GroupCollator
from trl_nca.logps import prepare, response_logps
from trl_nca.losses import nca_loss, reward_targets


@pytest.fixture
def all_in_float64(monkeypatch):
    """transformers normalises and rotates in float32, whatever the model's type is; here it stays in float64."""
    original = torch.Tensor.to

    def to(self, *args, **kwargs):
        wide = self.dtype == torch.float64 and (torch.float32 in args or kwargs.get("dtype") == torch.float32)
        return self if wide else original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def compare(model, rows, weights=None):
    """Log-probs of real responses and gradients of their weighted sum: padded reference, packed engine."""
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.cat([padded_logps(model, row, "cpu") for row in rows])
    weights = torch.linspace(-1, 1, len(expected), dtype=expected.dtype) if weights is None else weights
    expected_gradient = torch.autograd.grad(weights @ expected, trained)
    assert prepare([model], "true")
    batch = GroupCollator()(rows)
    logps = response_logps(model, batch, True)[batch["response_mask"]]
    return expected, logps, expected_gradient, torch.autograd.grad(weights @ logps, trained)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_float64(all_in_float64, family, lora):
    model = make(family)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).double()
    expected, logps, expected_gradient, gradient = compare(model, rows_of(SHAPES))
    torch.testing.assert_close(logps, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-8)


def smollm2():
    torch.manual_seed(0)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=16, target_modules=layers))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    return model


ROWS = [(24, (30, 9, 17, 4)), (11, (6, 21))]


@needs_model
def test_smollm2_in_float32():
    expected, logps, expected_gradient, gradient = compare(smollm2(), rows_of(ROWS))
    assert ((logps - expected).abs() / expected.abs()).max() < 2e-6
    expected_gradient, gradient = (torch.cat([g.flatten() for g in gs]) for gs in (expected_gradient, gradient))
    assert (gradient - expected_gradient).norm() / expected_gradient.norm() < 1e-4


@needs_model
def test_smollm2_in_bf16_keeps_the_loss_and_does_not_drift():
    rows = rows_of([(12, (9, 14, 5)), (7, (11, 4, 16, 8)), (15, (6, 10))])
    model = smollm2()
    batch = GroupCollator()(rows)
    mask = batch["response_mask"]
    targets = reward_targets(batch["scores"], 0.3, mask)
    with torch.no_grad():
        exact = torch.zeros_like(targets, dtype=torch.float32)
        exact[mask] = torch.cat([padded_logps(model, row, "cpu") for row in rows])
        assert prepare([model], "true")
        with model.disable_adapter():
            ref_logps = response_logps(model, batch, True)
        with torch.autocast("cpu", torch.bfloat16):
            logps = response_logps(model, batch, True)
            with model.disable_adapter():
                rounded_ref_logps = response_logps(model, batch, True)
    drift = (logps - exact)[mask]
    assert drift.abs().max() < 0.01 * exact[mask].abs().max()
    assert drift.mean().abs() < 3 * drift.std() / len(drift) ** 0.5, "rounding errors have a mean"
    loss = nca_loss(0.1 * (exact - ref_logps), targets, mask).mean().item()
    assert nca_loss(0.1 * (logps - rounded_ref_logps), targets, mask).mean().item() == pytest.approx(loss, rel=0.02)
