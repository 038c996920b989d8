"""Pairs under each loss that TRL has too: the same curve and weights as its own trainer, or the same gradients."""

import functools
import tempfile
from types import SimpleNamespace

import pytest
import torch
from trl import DPOConfig, DPOTrainer

from nca_trainer import NCAConfig, PairwiseNCATrainer
from tests.tiny import save_tiny_model
from tests.trainers import DEFAULTS, assert_same_curve, pair_rows, run
from trl_nca.objective import make_targets, prompt_losses

#: Settings here, and what they are called in TRL. (test_trainer.py has DPO and NCA.)
SAME = {
    "biasedNCA": ({"loss_type": "biasedNCA"}, {"loss_type": ["bco_pair"]}),
    "IPO": ({"loss_type": "IPO", "beta": 0.5}, {"loss_type": ["ipo"], "beta": 0.5}),
    "robustDPO": (
        {"loss_type": "robustDPO", "label_smoothing": 0.2},
        {"loss_type": ["robust"], "label_smoothing": 0.2},
    ),
    "DPO a token": (
        {"loss_type": "DPO", "normalize": "tokens", "beta": 3.0},
        {"loss_type": ["sigmoid_norm"], "beta": 3.0},
    ),
    "LD-DPO": ({"loss_type": "DPO", "ld_alpha": 0.3}, {"loss_type": ["sigmoid"], "ld_alpha": 0.3}),
    "LD-IPO": (
        {"loss_type": "IPO", "beta": 0.5, "ld_alpha": 0.3},
        {"loss_type": ["ipo"], "beta": 0.5, "ld_alpha": 0.3},
    ),
    "DPO and SFT": (
        {"loss_type": "DPO", "sft_weight": 0.2},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    ),
    "IPO and SFT": (
        {"loss_type": "IPO", "beta": 0.5, "sft_weight": 2.0},
        {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 2.0], "beta": 0.5},
    ),
}


@functools.cache
def upstream_curve(name, lora=True):
    with tempfile.TemporaryDirectory() as folder:
        return run(folder, pair_rows(20), DPOTrainer, DPOConfig, lora=lora, **SAME[name][1])


@pytest.mark.parametrize("name", SAME)
def test_an_adapter_follows_upstream(tmp_path, name):
    mine = run(tmp_path, pair_rows(20), PairwiseNCATrainer, **SAME[name][0])
    assert_same_curve(mine, upstream_curve(name))


@pytest.mark.parametrize("name", ["DPO and SFT", "LD-IPO"])
def test_all_weights_follow_upstream(tmp_path, name):
    mine = run(tmp_path, pair_rows(20), PairwiseNCATrainer, lora=False, **SAME[name][0])
    assert_same_curve(mine, upstream_curve(name, lora=False))


@pytest.mark.parametrize("name", ["IPO and SFT", "robustDPO"])
def test_rows_of_two_responses_follow_upstream(tmp_path, name):
    rows = pair_rows(20).map(
        lambda r: {"responses": [r["rejected"][0]["content"], r["chosen"][0]["content"]], "scores": [0.2, 0.7]},
        remove_columns=["chosen", "rejected"],
    )
    assert_same_curve(run(tmp_path, rows, **SAME[name][0]), upstream_curve(name))


@pytest.mark.filterwarnings("ignore")  # it is experimental, and says so
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("settings", "cpo"),
    [
        ({"loss_type": "DPO", "reference_free": True}, {"loss_type": "sigmoid"}),
        ({"loss_type": "DPO", "reference_free": True, "margin": 0.7, "normalize": "tokens"}, {"simpo_gamma": 0.7}),
        ({"loss_type": "SimPO"}, {}),
        ({"loss_type": "SimPO", "margin": 1.5}, {"simpo_gamma": 1.5}),
    ],
)
def test_losses_without_a_reference_are_cpo_trainers(tmp_path, settings, cpo, label_smoothing):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    both = {"label_smoothing": label_smoothing, "beta": 2.0}
    cpo = CPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{"loss_type": "simpo"} | cpo | both)
    args = NCAConfig(output_dir=str(tmp_path), **DEFAULTS | settings | both)
    lengths = torch.tensor([[5, 9], [12, 3], [4, 4]])
    logps = -torch.rand(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * lengths
    mine, theirs = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    batch = {"scores": torch.tensor([[1.0, 0.0]] * 3), "response_mask": torch.ones(3, 2, dtype=torch.bool)}
    batch["response_lengths"] = lengths
    targets = make_targets(batch["scores"].double(), batch["response_mask"], args, pairs=True)
    losses, _ = prompt_losses(mine, batch, torch.zeros(3, 2), targets, args)
    chosen, rejected = (theirs / lengths if cpo.loss_type == "simpo" else theirs).unbind(dim=1)
    names = ("beta", "label_smoothing", "loss_type", "simpo_gamma", "alpha")
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), **{name: getattr(cpo, name) for name in names})
    expected, *_ = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(values.sum(), rows)[0] for values, rows in ((losses, mine), (expected, theirs))]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "settings", [{"loss_type": "SimPO", "beta": 2.0}, {"loss_type": "DPO", "reference_free": True}]
)
def test_without_a_reference_none_is_kept(tmp_path, settings):
    save_tiny_model(tmp_path / "model")
    args = NCAConfig(output_dir=str(tmp_path), **DEFAULTS | settings | {"max_steps": 2, "learning_rate": 1e-3})
    trainer = PairwiseNCATrainer(str(tmp_path / "model"), args=args, train_dataset=pair_rows(8))
    trainer.train()
    assert trainer.ref_model is None
    (batch,) = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])["ref_logps"].abs().sum()[None]
    assert batch == 0
