"""Trajectories of the trainers on tiny random models: each pair of settings that must agree is held to one curve."""

import functools
import math
import tempfile

import pytest
import torch
from accelerate import ParallelismConfig
from trl import DPOConfig, DPOTrainer

from nca_trainer import NCAConfig, PairwiseNCATrainer
from tests.tiny import SIZES
from tests.trainers import DEFAULTS, assert_same_curve, logged, make_trainer, pair_rows, reward_rows, run
from trl_nca.losses import LOSSES
from trl_nca.objective import make_targets


@functools.cache
def curve(loss_type, lora):
    """Of 20 rows, as they are trained without more settings: what several tests compare with."""
    with tempfile.TemporaryDirectory() as folder:
        return run(folder, reward_rows(20), loss_type=loss_type, lora=lora)


@functools.cache
def upstream_curve(loss_type, lora):
    with tempfile.TemporaryDirectory() as folder:
        return run(folder, pair_rows(20), DPOTrainer, DPOConfig, loss_type=[loss_type], lora=lora)


@pytest.mark.parametrize(("loss_type", "expected"), [("NCA", 2 * math.log(2)), ("InfoNCA", math.log(3))])
def test_loss_at_step_zero(tmp_path, loss_type, expected):
    trainer = make_trainer(tmp_path, reward_rows(4, ks=(3,)), loss_type=loss_type, max_steps=1)
    trainer.train()
    assert logged(trainer) == pytest.approx([expected], abs=1e-5)


def test_dpo_loss_at_step_zero(tmp_path):
    trainer = make_trainer(tmp_path, pair_rows(4), PairwiseNCATrainer, loss_type="dpo", max_steps=1)
    trainer.train()
    assert logged(trainer) == pytest.approx([math.log(2)], abs=1e-5)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(("ours", "upstream"), [("DPO", "sigmoid"), ("InfoNCA", "sigmoid"), ("NCA", "nca_pair")])
def test_pairs_follow_upstream(tmp_path, ours, upstream, lora):
    rows = pair_rows(20)
    mine = run(tmp_path, rows, PairwiseNCATrainer, loss_type=ours, lora=lora)
    assert_same_curve(mine, upstream_curve(upstream, lora))


def test_pairs_as_reward_rows_follow_upstream(tmp_path):
    pairs = pair_rows(20)
    rewards = pairs.map(
        lambda r: {"responses": [r["rejected"][0]["content"], r["chosen"][0]["content"]], "scores": [0.0, 1.0]},
        remove_columns=["chosen", "rejected"],
    )
    mine = run(tmp_path, rewards, loss_type="InfoNCA", alpha=0)
    assert_same_curve(mine, upstream_curve("sigmoid", True))


@pytest.mark.parametrize("loss_type", ["NCA", "InfoNCA"])
def test_accumulation_equals_batch(tmp_path, loss_type):
    # 14 rows at 4 a step: the last batch of the epoch is short, and each prompt must still count the same.
    rows, settings = reward_rows(14), {"loss_type": loss_type, "max_steps": 8}
    whole = run(tmp_path, rows, **settings)
    in_ones = run(tmp_path, rows, per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings)
    assert_same_curve(whole, in_ones)
    in_threes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    in_sixes = {"per_device_train_batch_size": 6}
    assert_same_curve(run(tmp_path, rows, **settings | in_threes), run(tmp_path, rows, **settings | in_sixes))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_packed_equals_padded(tmp_path, lora):
    rows = reward_rows(20)
    packed = run(tmp_path, rows, shared_prompt="true", lora=lora)
    assert_same_curve(packed, run(tmp_path, rows, shared_prompt="false", lora=lora))


@pytest.mark.parametrize("loss_type", ["NCA", "InfoNCA"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_chunked_equals_whole(tmp_path, loss_type, lora):
    rows, settings = reward_rows(20), {"loss_type": loss_type, "lora": lora}
    whole = curve(loss_type, lora)
    in_twos = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert_same_curve(whole, run(tmp_path, rows, max_tokens_per_forward=40, **settings))
    assert_same_curve(whole, run(tmp_path, rows, max_tokens_per_forward=12, **settings, **in_twos))  # in pieces too
    assert_same_curve(whole, run(tmp_path, rows, max_tokens_per_forward=40, shared_prompt="false", **settings))


def test_evaluation_in_chunks_and_pieces_is_the_same(tmp_path):
    settings = {"eval_rows": reward_rows(5), "max_steps": 1}
    whole = make_trainer(tmp_path, reward_rows(4), **settings).evaluate()
    chunked = make_trainer(tmp_path, reward_rows(4), max_tokens_per_forward=12, **settings).evaluate()
    assert chunked["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-6)
    assert chunked["eval_logps/chosen"] == pytest.approx(whole["eval_logps/chosen"], abs=1e-3)


def test_checkpointing_changes_nothing(tmp_path):
    assert_same_curve(curve("NCA", True), run(tmp_path, reward_rows(20), gradient_checkpointing=True))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_precomputed_equals_online_reference(tmp_path, lora):
    precomputed = run(tmp_path, reward_rows(20), lora=lora, precompute_ref_log_probs=True)
    assert_same_curve(curve("NCA", lora), precomputed)


def test_resumed_equals_uninterrupted(tmp_path):
    rows, settings = reward_rows(20), {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = run(tmp_path / "a", rows, **settings)
    trainer = make_trainer(tmp_path / "b", rows, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    assert_same_curve(whole, (logged(trainer), weights))


def test_the_reference_stays_and_the_policy_moves(tmp_path):
    trainer = make_trainer(tmp_path, reward_rows(8), lora=False, max_steps=2)
    reference = [p.clone() for p in trainer.ref_model.parameters()]
    policy = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    torch.testing.assert_close(list(trainer.ref_model.parameters()), reference, rtol=0, atol=0)
    assert any((p != q).any() for p, q in zip(trainer.model.parameters(), policy, strict=True))


def test_metrics_count_every_prompt_once(tmp_path):
    # 5 held-out prompts in batches of 2: a mean over batches would count the last one twice.
    rows = reward_rows(5)
    trainer = make_trainer(tmp_path, reward_rows(8), eval_rows=rows, per_device_eval_batch_size=2, max_steps=3)
    trainer.train()
    in_twos = trainer.evaluate()
    one_by_one = [trainer.evaluate(rows.select([i])) for i in range(5)]
    for key in (
        "eval_loss",
        "eval_rewards/chosen",
        "eval_rewards/margins",
        "eval_rewards/accuracies",
        "eval_logps/chosen",
    ):
        assert in_twos[key] == pytest.approx(sum(one[key] for one in one_by_one) / 5, abs=1e-5)
    # Only rows 2 and 5 of the pattern K = 2, 3, 5 have a fifth response.
    ranked = [one["eval_rewards/rank_4"] for one in one_by_one if "eval_rewards/rank_4" in one]
    assert len(ranked) == 1
    assert in_twos["eval_rewards/rank_4"] == pytest.approx(ranked[0], abs=1e-6)


def test_tie_break_goes_to_the_first_response(tmp_path):
    trainer = make_trainer(tmp_path, reward_rows(4), alpha=0.0, tie_break=0.01, max_steps=1)
    scores, mask = torch.tensor([[0.5, 0.5, 0.1]]), torch.ones(1, 3, dtype=torch.bool)
    assert make_targets(scores, mask, trainer.args).tolist() == [[1, 0, 0]]
    assert scores.tolist()[0][0] == 0.5, "the scores that are logged stay as they are"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"loss_type": "kto"},
            "loss_type: unknown loss 'kto', and no FILE.py:NAME; choose one of NCA, .*, or, with pairs, DPO,",
        ),
        ({"beta": 0.0}, "beta: must be > 0"),
        ({"alpha": -1.0}, "alpha: must be >= 0"),
        ({"alpha": float("nan")}, "alpha: must be >= 0"),
        ({"max_tokens_per_forward": 0}, "max_tokens_per_forward: must be at least 1"),
        ({"max_prompt_length": 1024}, "max_prompt_length: 1024 fills max_length"),
        ({"padding_free": True}, "padding_free: True is not supported"),
        ({"use_liger_kernel": True}, "use_liger_kernel: True is not supported"),
        ({"label_smoothing": 0.1}, "label_smoothing: is for losses of pairs with labels, and NCA has none"),
        ({"label_smoothing": 0.5, "loss_type": "DPO"}, "label_smoothing: from 0 to below 0.5"),
        ({"margin": 0.1, "loss_type": "IPO"}, "margin: is for losses of pairs with labels, and IPO has none"),
        ({"margin": float("nan"), "loss_type": "DPO"}, "margin: must be a finite number"),
        ({"ld_alpha": 1.1}, "ld_alpha: from 0 to 1, got 1.1"),
        ({"ld_alpha": 0.5, "sft_weight": 0.1}, "sft_weight: a response has one log-prob, and ld_alpha changes it"),
        ({"sft_weight": -0.1}, "sft_weight: must be >= 0"),
        ({"normalize": "words"}, "normalize: none or tokens; got 'words'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: 0.1 is not supported: is the Trainer's"),
        ({"discopop_tau": 0.1}, "discopop_tau: 0.1 is not supported: DiscoPOP is none of the losses here"),
        ({"f_alpha_divergence_coef": 1.0}, "f_alpha_divergence_coef: 1.0 is not supported"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of: 8 is not supported: .* packed without padding"),
        ({"truncation_mode": "keep_end"}, "truncation_mode: 'keep_end' is not supported: prompts lose their beginning"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint: True is not supported: .* on SIGTERM by themselves"),
        ({"parallelism_config": ParallelismConfig(cp_size=2)}, "parallelism_config: .* a packed row is none"),
        ({"report_to": ["comet_ml"]}, "report_to: comet_ml is not installed"),
    ],
)
def test_config_refuses(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        NCAConfig(output_dir=str(tmp_path), **DEFAULTS | settings)


@pytest.mark.parametrize("written", ["nca", "NCA", "infonca", "InfoNCA", "dpo", "BIASEDNCA", "Qrpo"])
def test_loss_type_in_any_case(tmp_path, written):
    config = NCAConfig(output_dir=str(tmp_path), **DEFAULTS, loss_type=written)
    assert config.loss_type.lower() == written.lower()
    assert config.loss_type in LOSSES


def test_a_model_that_cannot_share_prompts_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "attn_implementation", "eager")
    with pytest.warns(UserWarning, match="Prompts are not shared"):
        trainer = make_trainer(tmp_path, reward_rows(4), shared_prompt="auto", max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match="cannot share prompts"):
        make_trainer(tmp_path, reward_rows(4), shared_prompt="true", max_steps=1)


def test_missing_columns_are_named(tmp_path):
    with pytest.raises(ValueError, match="needs columns prompt, responses, scores; found chosen, prompt, rejected"):
        make_trainer(tmp_path, pair_rows(2).select_columns(["chosen", "prompt", "rejected"]))
    with pytest.raises(ValueError, match="needs columns chosen, rejected"):
        make_trainer(tmp_path, reward_rows(2), PairwiseNCATrainer)
