"""What is checked before the first step: tokens and lengths, the metric of the best checkpoint, keys without effect."""

import logging

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
)

from alignment.checks import limits as module
from alignment.checks.best_model import check_best_model, evaluation_metrics
from alignment.checks.limits import check_limits, extremes
from alignment.checks.no_effect import keys_without_effect
from alignment.configs import parse_configs
from alignment.errors import UserError
from alignment.evaluation.held_out import check_prompts
from alignment.input_limits import check_input, input_limits, position_table
from alignment.recipe import RunConfig
from alignment.sampling.chat import Speaker
from alignment.sampling.reward_model import RewardModel
from alignment.sampling.sample import SamplingConfig
from nca_trainer import NCAConfig
from tests.conftest import ROOT
from tests.tiny import tiny_config, tiny_tokenizer

_GPT = {"n_embd": 8, "n_layer": 1, "n_head": 1}
_LAYER = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8}
SMALL = {
    "gpt2": _GPT,
    "gptj": _GPT | {"rotary_dim": 4},
    "gpt_neo": {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "attention_types": [[["global"], 1]]},
    "opt": _LAYER | {"ffn_dim": 8, "word_embed_proj_dim": 8},
    "xglm": {"d_model": 8, "num_layers": 1, "attention_heads": 1, "ffn_dim": 8},
    "bloom": {"hidden_size": 8, "n_layer": 1, "n_head": 1},
    "llama": _LAYER | {"intermediate_size": 8},
}


def model_of(family, **settings):
    config = AutoConfig.for_model(family, vocab_size=64, pad_token_id=0, bos_token_id=0, eos_token_id=0,
                                  **SMALL[family], **settings)  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def tokenized(*rows):
    """Rows of (prompt's ids, [responses' ids])."""
    columns = {"prompt_ids": [prompt for prompt, _ in rows], "response_ids": [responses for _, responses in rows]}
    scores = [[float(k) for k in range(len(responses))] for _, responses in rows]
    return Dataset.from_dict(columns | {"scores": scores, "location": [f"line {i + 1}" for i in range(len(rows))]})


@pytest.mark.parametrize("family", SMALL)
def test_a_table_of_positions_is_found_where_there_is_one(family):
    model = model_of(family, **({} if family == "bloom" else {"max_position_embeddings": 20}))
    table = position_table(model)
    assert table == (None if family in ("xglm", "bloom", "llama") else 20)
    model(input_ids=torch.zeros(1, 20 if table else 40, dtype=torch.long))
    if table:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.zeros(1, 21, dtype=torch.long))
    assert position_table(AutoModelForCausalLM.from_config(model.config)) == table


def test_a_table_that_begins_after_the_padding_is_shorter():
    config = AutoConfig.for_model("roberta", vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                                  intermediate_size=8, max_position_embeddings=22, pad_token_id=1)  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert position_table(model) == 20
    model(input_ids=torch.full((1, 20), 3))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 21), 3))


def test_extremes_are_those_of_all_pieces(monkeypatch):
    rows = tokenized(([1, 2], [[3], [4, 5]]), ([9], [[2, 2], [7]]), ([1] * 5, [[1], [1, 1, 1]]), ([2], [[8, 1], []]))
    assert extremes(rows) == (9, 1, 8, 2)
    assert extremes(rows.select([3, 0])) == (8, 0, 4, 1)
    monkeypatch.setattr(module, "_PIECE", 1)
    assert extremes(rows) == (9, 1, 8, 2)


def test_rows_that_the_model_cannot_read_are_named(caplog):
    tokenizer = tiny_tokenizer()
    gpt2 = GPT2Config(vocab_size=len(tokenizer), n_positions=6, n_embd=8, n_layer=1, n_head=1)
    short, long = tokenized(([1, 2], [[3], [4, 5]])), tokenized(([1], [[2], [3]]), ([1] * 4, [[1], [1, 1, 1]]))
    check_limits({"train": short}, gpt2, tokenizer)
    with pytest.raises(UserError, match=r"line 2: 7 tokens of prompt and response, .* has 6 positions .*max_length=6"):
        check_limits({"train": short, "eval": long}, gpt2, tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|context|>"]})
    beyond = tokenized(([1], [[2], [3]]), ([1], [[2], [len(tokenizer) - 1]]))
    with pytest.raises(UserError, match=rf"line 2: token {len(tokenizer) - 1} .'<\|context\|>'. has no embedding"):
        check_limits({"train": beyond}, gpt2, tokenizer)
    assert "positions" not in caplog.text


@pytest.mark.parametrize(
    ("rope", "warns"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, True),
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, False),
    ],
)
def test_rows_beyond_what_a_model_was_made_for_are_warned_of(caplog, rope, warns):
    config = tiny_config(max_position_embeddings=5, rope_parameters=rope)
    with caplog.at_level(logging.WARNING):
        check_limits({"train": tokenized(([1] * 4, [[1], [1, 1]]))}, config, tiny_tokenizer())
    assert ("longest row has 6 tokens, and the model was made for 5 positions" in caplog.text) == warns


def test_held_out_prompts_leave_room_for_their_samples():
    tokenizer = tiny_tokenizer()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=60, n_embd=8, n_layer=1, n_head=1))
    texts = ["one", "one", "one two three " * 9]
    prompts = [[{"role": "user", "content": text}] for text in texts]
    rows = Dataset.from_dict({"prompt": prompts, "location": ["line 1", "line 2", "line 3"]})
    check_prompts(model, tokenizer, rows, RunConfig(max_new_tokens=5, max_eval_prompts=2))
    with pytest.raises(UserError, match=r"line 3: \d+ tokens and 5 to generate, .* 60 positions; give less"):
        check_prompts(model, tokenizer, rows, RunConfig(max_new_tokens=5))


def test_a_conversation_and_a_reward_models_row_are_checked_too(tmp_path):
    tokenizer = tiny_tokenizer()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=9, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(UserError, match=r"the conversation: \d+ tokens and 30 to generate, .* 9 positions; start"):
        Speaker("a", model).answer(
            {"role": "user", "content": "one two three"}, tokenizer, SamplingConfig(1, max_new_tokens=30)
        )
    with pytest.raises(UserError, match=r"a row: token 9999 has no embedding: the model has"):
        check_input(input_limits(model), [1, 9999], 0, "a row", "fix")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    bert = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=9, num_labels=1, **sizes)
    AutoModelForSequenceClassification.from_config(bert).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = [{"prompt": [{"role": "user", "content": "one two three"}], "responses": ["four " * 9]}]
    with pytest.raises(
        UserError, match=r"line 1, for .*: \d+ tokens, and the model has 9 positions; leave the row out"
    ):
        RewardModel(str(tmp_path), 2)(rows, ["line 1"])


HELD_OUT = tokenized(([1], [[2], [3]]), ([1], [[2], [3], [4]]))


@pytest.mark.parametrize(
    ("settings", "held_out", "message"),
    [
        (
            {"metric_for_best_model": "reward_accuracy"},
            HELD_OUT,
            "'reward_accuracy'; did you mean 'rewards/accuracies'",
        ),
        ({"metric_for_best_model": "eval_rewards/margin"}, HELD_OUT, "did you mean 'rewards/margins'"),
        ({"metric_for_best_model": "rewards/rank_3"}, HELD_OUT, "'rewards/rank_3'; did you mean 'rewards/rank_2'"),
        ({"metric_for_best_model": "aux_loss"}, HELD_OUT, "no evaluation gives 'aux_loss'"),
        ({"save_strategy": "best", "load_best_model_at_end": False}, None, "save_strategy: best: needs an evaluation"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "load_best_model_at_end": False}, None, "needs an evaluation"),
        ({}, HELD_OUT, None),
        ({}, None, None),
        ({"metric_for_best_model": "eval_loss"}, HELD_OUT, None),
        ({"metric_for_best_model": "rewards/rank_2"}, HELD_OUT, None),
        ({"metric_for_best_model": "anything", "load_best_model_at_end": False}, HELD_OUT, None),
    ],
)
def test_the_metric_of_the_best_checkpoint_is_looked_for(tmp_path, settings, held_out, message):
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "bf16": False}
    both = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    args = NCAConfig(output_dir=str(tmp_path), **(steps | both | settings))
    if message is None:
        return check_best_model(args, held_out, tiny_config())
    with pytest.raises(UserError, match=message):
        check_best_model(args, held_out, tiny_config())


def test_a_mixture_of_experts_has_a_metric_more():
    assert "aux_loss" in evaluation_metrics(HELD_OUT, PretrainedConfig(output_router_logits=False))


OWN_LOSSES = """
from trl_nca.losses import info_nca_loss

def plain(rewards, targets, response_mask):
    return info_nca_loss(rewards, targets, response_mask)

def with_targets(rewards, targets, response_mask):
    return info_nca_loss(rewards, targets, response_mask)

with_targets.targets = lambda scores, response_mask, alpha, beta: scores / alpha
"""


def without_effect(recipe, *flags, pairs=False, has_held_out=True):
    return keys_without_effect(parse_configs([str(recipe), *flags]), pairs, has_held_out)


@pytest.mark.parametrize("path", sorted((ROOT / "yamls").glob("*.yaml")), ids=lambda path: path.name)
def test_all_keys_of_the_recipes_have_an_effect(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert without_effect(path, pairs=path.name.startswith("preference")) == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--lora_dropout=0.1"], ["lora_dropout (disable_dropout is true)"]),
        (["--lora_dropout=0.1", "--disable_dropout=false"], []),
        (["--lora_r=4", "--lora_target_modules", "q_proj", "--use_peft=false"], [
            "lora_r, lora_target_modules (use_peft is false)"]),
        (["--bnb_4bit_quant_type=fp4"], ["bnb_4bit_quant_type (load_in_4bit is false)"]),
        (["--eval_steps=5"], ["eval_steps (eval_strategy is no)"]),
        (["--eval_steps=5", "--eval_strategy=steps"], []),
        (["--save_steps=5", "--save_strategy=epoch"], ["save_steps (save_strategy is epoch)"]),
        (["--num_train_epochs=2", "--max_steps=5"], ["num_train_epochs (max_steps is set)"]),
        (["--num_eval_samples=2"], ["num_eval_samples (there is no reward_function)"]),
        (["--hub_model_id=a/b", "--push_to_hub=false"], ["hub_model_id (push_to_hub is false)"]),
        (["--metric_for_best_model=loss"], ["metric_for_best_model (load_best_model_at_end is false)"]),
        (["--choose_responses=top", "--draw_seed=3"], [
            "choose_responses (num_responses is not set)", "draw_seed (nothing is drawn)"]),
        (["--choose_responses=random", "--num_responses=2", "--draw_seed=3"], []),
        (["--alpha=0.1", "--tie_break=0.01"], []),
        (["--loss_type=QRPO", "--alpha=0.1", "--tie_break=0.01", "--scale_scores=zscore"], [
            "alpha (the targets of QRPO do not depend on it)",
            "scale_scores (QRPO sees the order of the scores only)"]),
        (["--loss_type=GVPO", "--scale_scores=zscore", "--sft_weight=0.1", "--normalize=tokens"], []),
        (["--loss_type=IPO", "--normalize=tokens"], ["normalize (IPO always takes log-probs a token)"]),
        (["--loss_type=DPO", "--alpha=0.1", "--label_smoothing=0.1", "--margin=0.5"], []),
        (["--loss_type=own.py:plain", "--alpha=0.1"], []),
        (["--loss_type=own.py:with_targets", "--alpha=0.1"], []),
        (["--ld_alpha=1"], ["ld_alpha (at 1 all tokens count alike)"]),
        (["--ld_alpha=0.5"], []),
        (["--loss_type=SimPO", "--ref_logps_dir=x"], ["ref_logps_dir (SimPO has no reference)"]),
        (["--reference_free=true", "--ref_logps_dir=x"], ["ref_logps_dir (reference_free is true)"]),
    ],
)  # fmt: skip
def test_keys_that_do_nothing_are_named(tmp_path, monkeypatch, flags, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN_LOSSES)
    (tmp_path / "recipe.yaml").write_text("{model_name_or_path: m, train_file: t, output_dir: o, use_peft: true}")
    assert without_effect(tmp_path / "recipe.yaml", *flags) == expected


def test_without_held_out_rows_nothing_evaluates(tmp_path):
    (tmp_path / "recipe.yaml").write_text("{model_name_or_path: m, train_file: t, output_dir: o}")
    flags = ["--load_best_model_at_end=true", "--eval_strategy=steps", "--eval_steps=5", "--save_steps=5",
             "--reward_function=f.py:f", "--temperature=0.5", "--alpha=0.5"]  # fmt: skip
    assert without_effect(tmp_path / "recipe.yaml", *flags, pairs=True, has_held_out=False) == [
        "alpha (the target of a pair is its chosen response)",
        "load_best_model_at_end, eval_strategy, eval_steps, reward_function, temperature (there are no held-out rows)",
    ]
