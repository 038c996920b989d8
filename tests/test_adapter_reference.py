"""The reference is the model that training starts from, whatever the adapter, the dropout and the precision."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, VBLoRAConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM
from trl.trainer.utils import use_adapter

from benchmarks.systems import mistral_config, random_mistral_4bit
from nca_trainer import NCAConfig, NCATrainer
from tests.tiny import rows_of, tiny_config, tiny_tokenizer
from tests.trainers import DEFAULTS, logged
from trl_nca.adapter_reference import AdapterSwitch
from trl_nca.collate import GroupCollator
from trl_nca.logps import prepare, response_logps

ROWS = rows_of([(9, (4, 7, 3)), (3, (5, 2)), (6, (8, 1, 4, 6)), (12, (3, 3))])


def llama(**settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(attention_bias=True, mlp_bias=True, **settings))


def make_trainer(tmp_path, model=None, rows=ROWS, **settings):
    kwargs = {name: settings.pop(name, None) for name in ("peft_config", "ref_model")}
    args = NCAConfig(output_dir=str(tmp_path), **DEFAULTS | {"alpha": 0.3, "max_steps": 3} | settings)
    tokenizer = tiny_tokenizer()
    return NCATrainer(
        model or llama(), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **kwargs
    )


def reference(trainer):
    batch = trainer._prepare_inputs(trainer.data_collator(ROWS))
    return trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)


def lora(**settings):
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"bias": "all"}, {"bias": "lora_only"}],
    ids=lambda settings: "_".join(settings.values()) or "plain",
)
def test_whatever_the_adapter(tmp_path, settings):
    start = llama()
    trainer = make_trainer(tmp_path, copy.deepcopy(start), peft_config=lora(**settings))
    shares, batch = prepare([start]), GroupCollator()(ROWS)
    with torch.no_grad():
        expected = response_logps(start, batch, shares)
    torch.testing.assert_close(reference(trainer), expected, rtol=1e-5, atol=1e-4)
    trainer.train()
    torch.testing.assert_close(reference(trainer), expected, rtol=1e-5, atol=1e-4)
    assert logged(trainer, "rewards/rank_0")[0] == pytest.approx(0, abs=1e-5)
    assert logged(trainer, "rewards/rank_0")[-1] != pytest.approx(0, abs=1e-3)


def test_an_adapter_that_says_nothing_of_its_start(tmp_path):
    """VB-LoRA's vectors are drawn at random, and no key of its config says that they change the model."""
    config = VBLoRAConfig(task_type="CAUSAL_LM", r=4, vector_length=8, target_modules=["q_proj", "v_proj"])
    trainer = make_trainer(tmp_path, peft_config=config)
    trainer.train()
    assert logged(trainer, "rewards/rank_0")[0] == 0


def test_of_virtual_tokens_it_is_their_first_values(tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.warns(UserWarning, match="virtual tokens"):
        trainer = make_trainer(tmp_path, peft_config=config)
    before = reference(trainer)
    trainer.train()
    torch.testing.assert_close(reference(trainer), before)
    assert logged(trainer, "rewards/rank_0")[0] == pytest.approx(0, abs=1e-6)
    assert logged(trainer, "rewards/rank_0")[-1] != 0


def test_sharded_it_must_be_computed_before(tmp_path, monkeypatch):
    monkeypatch.setattr(NCATrainer, "_is_sharded", True)
    with pytest.raises(ValueError, match="bias: all.*set precompute_ref_log_probs: true"):
        make_trainer(tmp_path, peft_config=lora(bias="all"))
    trainer = make_trainer(
        tmp_path, peft_config=lora(bias="all"), precompute_ref_log_probs=True, ref_logps_dir=str(tmp_path)
    )
    trainer.train()
    assert logged(trainer, "rewards/rank_0")[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_it_has_neither_dropout_nor_noise(tmp_path, is_lora):
    """A reference whose dropout is drawn anew, or whose embeddings are noisy, is another one at each step."""
    other = {"peft_config": lora(lora_dropout=0.3)} if is_lora else {"ref_model": llama(attention_dropout=0.3)}
    trainer = make_trainer(
        tmp_path, llama(attention_dropout=0.3), disable_dropout=False, neftune_noise_alpha=5.0, **other
    )
    seen = []
    trainer.compute_ref_log_probs = lambda *args: (
        seen.append(type(trainer).compute_ref_log_probs(trainer, *args)) or seen[-1]
    )
    trainer.train()
    assert trainer.model.training, "the policy goes on with both"
    for found in seen[1:]:
        torch.testing.assert_close(found.flatten().sort().values, seen[0].flatten().sort().values)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_policy_and_reference_are_under_the_same_autocast(tmp_path, monkeypatch, kind, precompute, precision):
    if (kind, precision) == ("qlora", "fp16"):
        pytest.skip("bitsandbytes has no float16 on a CPU")
    if precision == "fp16":  # whose scaler wants a GPU; the forwards are what is looked at
        monkeypatch.setattr("accelerate.Accelerator.autocast", lambda self: torch.autocast("cpu", torch.float16))
    other = {"ref_model": llama()} if kind == "full" else {"peft_config": lora()}
    model = random_mistral_4bit(mistral_config(tiny=True), "cpu") if kind == "qlora" else llama()
    settings = {"precompute_ref_log_probs": precompute, "ref_logps_dir": str(tmp_path)}
    trainer = make_trainer(tmp_path, model, eval_strategy="no", bf16=precision == "bf16", **other, **settings)
    seen = {}
    models = {"policy": trainer.model} | ({"ref": trainer.ref_model} if trainer.ref_model is not None else {})
    for name, model in models.items():
        layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp"))
        layer.register_forward_hook(
            lambda module, inputs, output, name=name: seen.setdefault(name, set()).add((module.training, output.dtype))
        )
    trainer.train()
    trainer.evaluate(Dataset.from_list(ROWS))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    assert {dtype} == {found for kinds in seen.values() for _, found in kinds}
    assert {True, False} <= {training for training, _ in seen["policy"]}
    assert logged(trainer, "rewards/rank_0")[0] == 0


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_in_8_bits_it_is_rounded_as_the_policy_is(tmp_path):
    """bitsandbytes computes otherwise in a layer that does not train."""
    llama().save_pretrained(tmp_path / "model")
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=quantization)
    trainer = make_trainer(tmp_path, model, peft_config=lora())
    trainer.train()
    assert logged(trainer, "rewards/rank_0")[0] == 0


def test_another_reference_is_said(tmp_path, caplog):
    torch.manual_seed(5)
    other = LlamaForCausalLM(tiny_config())
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, ref_model=llama(), max_steps=1).train()
        assert "the reference" not in caplog.text
        make_trainer(tmp_path, ref_model=other, max_steps=1).train()
    assert "the reference is not the model that training starts from" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"response_ids": [[5, 6], []]}, "row 2 of train: a response has no token"),
        ({"prompt_ids": []}, "row 2 of train: its prompt has no token"),
        ({"response_ids": [[5, 6]], "scores": [1.0]}, "row 2 of train: it has fewer than two responses"),
        ({"scores": [1.0]}, "row 2 of train: it has another number of scores"),
    ],
)
def test_rows_that_come_tokenized_are_looked_at(tmp_path, change, words):
    rows = copy.deepcopy(ROWS)
    rows[1] |= change
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, rows=rows, peft_config=lora())


def test_an_adapter_that_was_trained_before_starts_from_itself(tmp_path):
    model = get_peft_model(llama(), lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    assert logged(trainer, "rewards/rank_0")[0] == pytest.approx(0, abs=1e-5)


SWITCHED = {
    "plain": {},
    "trained beside": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [5, 6]},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate_proj.weight", "mlp.up_proj.weight"]},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("adapter", [None, "ref"])
@pytest.mark.parametrize("settings", SWITCHED.values(), ids=SWITCHED)
def test_the_switch_does_what_pefts_context_does(settings, adapter):
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"]} | settings, task_type="CAUSAL_LM")
    model = get_peft_model(llama(), config)
    if adapter:
        model.add_adapter(adapter, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens")):
                parameter += 0.1 * torch.randn_like(parameter)
    ids, before = torch.arange(3, 20)[None], [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        policy = model(ids).logits
        with use_adapter(model, adapter):
            expected = model(ids).logits
        for parameter, requires_grad in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(requires_grad)  # PEFT's leaves some otherwise
        with AdapterSwitch(model).off():
            assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, policy)
    assert not torch.allclose(policy, expected)
    assert [p.requires_grad for p in model.parameters()] == before
    assert model.active_adapter == "default"
