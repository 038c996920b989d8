"""The load-balancing loss of mixtures of experts: its gradient, its weight over a step, and who is refused."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import DPOConfig, DPOTrainer

from nca_trainer import NCAConfig, NCATrainer, PairwiseNCATrainer
from tests.tiny import SIZES, rows_of, tiny_config, tiny_tokenizer
from tests.trainers import DEFAULTS, logged, pair_rows, reward_rows
from trl_nca.collate import GroupCollator
from trl_nca.logps import prepare, response_logps
from trl_nca.router import RouterLoss, check_router, load_balancing_loss

EXPERTS = {"num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = [
    MixtralConfig(**SIZES, **EXPERTS, num_local_experts=4),
    Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, moe_intermediate_size=16, decoder_sparse_step=1),
    OlmoeConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, **EXPERTS, num_experts=4),
]


def tiny_moe(config=FAMILIES[0], dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype)


def gradients(model, loss):
    wanted = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.model_type)
@pytest.mark.parametrize("shared_prompt", [True, False], ids=["packed", "padded"])
def test_the_loss_is_the_models_own_over_all_real_tokens(config, shared_prompt):
    model = tiny_moe(config)
    check_router(model, enabled=True)
    prepare([model], str(shared_prompt).lower())
    batch = GroupCollator()(rows_of([(5, (4,)), (9, (2,))]))  # one response each: packed holds what padded does
    router = RouterLoss(batch, 0.5)
    response_logps(model, batch, shared_prompt, router)
    # By the model's own forward, a row after the other: without padding, and without packing.
    own = tiny_moe(config)
    gates = []
    for row in rows_of([(5, (4,)), (9, (2,))]):
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"][0][:-1]])
        gates.append(own(ids, output_router_logits=True).router_logits)
    gates = tuple(torch.cat(layer) for layer in zip(*gates, strict=True))
    expected = load_balancing_loss_func(gates, 4, 2)
    torch.testing.assert_close(router.metrics["aux_loss"], expected.float().expand(2))
    found = gradients(model, router.pop_gradient_term().sum())
    wanted = gradients(own, expected)
    assert any(g.abs().max() > 1e-4 for g in wanted)
    for ours, theirs in zip(found, wanted, strict=True):  # two prompts at a coefficient of 0.5
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def make_trainer(tmp_path, rows, trainer_class=NCATrainer, config_class=NCAConfig, model=None, **settings):
    return trainer_class(
        model=model or tiny_moe(),
        ref_model=tiny_moe(),
        args=config_class(output_dir=str(tmp_path), **DEFAULTS | {"learning_rate": 1e-3, "max_steps": 2} | settings),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
    )


def first_gradient(trainer):
    """The gradients that the optimizer meets at the first step."""
    seen = []

    def note(optimizer, args, kwargs):
        if not seen:
            seen.extend(p.grad.clone() for p in trainer.model.parameters())

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(note)
    trainer.train()
    return seen


WHOLE = {"per_device_train_batch_size": 6, "max_grad_norm": 0.0}  # no clipping: gradients are compared


def test_a_step_has_the_coefficient_times_the_mean_over_its_forwards(tmp_path):
    rows = reward_rows(6)
    with_loss = make_trainer(tmp_path, rows, router_aux_loss_coef=0.5, **WHOLE)
    without = first_gradient(make_trainer(tmp_path, rows, router_aux_loss_coef=0.0, **WHOLE))
    found = first_gradient(with_loss)
    model = tiny_moe()
    prepare([model])
    dataset = [with_loss.train_dataset[i] for i in range(6)]
    batch = with_loss.data_collator(dataset)
    router = RouterLoss(batch, 0.5)
    response_logps(model, batch, True, router)
    wanted = gradients(model, router.pop_gradient_term().mean())
    assert max(g.abs().max() for g in wanted) > 1e-3
    for ours, plain, aux in zip(found, without, wanted, strict=True):
        torch.testing.assert_close(ours, plain + aux, rtol=1e-4, atol=1e-6)
    assert logged(with_loss, "aux_loss")[0] == pytest.approx(float(router.metrics["aux_loss"][0]), abs=1e-4)
    assert logged(with_loss)[0] == pytest.approx(1.3863, abs=1e-4), "what is logged as loss is that of the responses"


@pytest.mark.parametrize("loss_type", ["NCA", "InfoNCA"])
def test_forwards_of_a_step_count_by_their_prompts(tmp_path, loss_type):
    """By accumulation and by chunks of one prompt a forward: the same. By chunks that split groups: nearly."""
    rows = reward_rows(6)
    settings = {"router_aux_loss_coef": 0.5, "max_grad_norm": 0.0, "loss_type": loss_type}
    ones = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}
    accumulated = make_trainer(tmp_path, rows, **settings, **ones)
    expected = first_gradient(accumulated)
    longest = max(accumulated.train_dataset["length"])
    chunked = make_trainer(tmp_path, rows, **settings, **ones, max_tokens_per_forward=longest)
    torch.testing.assert_close(first_gradient(chunked), expected, rtol=0, atol=0)
    split = make_trainer(tmp_path, rows, **settings, per_device_train_batch_size=6, max_tokens_per_forward=25)
    found = first_gradient(split)
    assert logged(split, "aux_loss")[0] == pytest.approx(logged(accumulated, "aux_loss")[0], rel=0.05)
    plain = make_trainer(tmp_path, rows, **settings | {"router_aux_loss_coef": 0.0}, **ones)
    without = first_gradient(plain)
    # Other forwards hold other tokens, and the loss is no sum over them: alike, not equal.
    aux, aux_split = (
        torch.cat([(g - w).flatten() for g, w in zip(gs, without, strict=True)]) for gs in (expected, found)
    )
    assert torch.cosine_similarity(aux, aux_split, dim=0) > 0.9
    assert aux_split.norm() == pytest.approx(float(aux.norm()), rel=0.25)


def test_checkpointing_changes_nothing(tmp_path):
    rows, settings = reward_rows(6), {"router_aux_loss_coef": 0.5, **WHOLE}
    plain = first_gradient(make_trainer(tmp_path, rows, **settings))
    checkpointed = make_trainer(tmp_path, rows, gradient_checkpointing=True, **settings)
    torch.testing.assert_close(first_gradient(checkpointed), plain, rtol=1e-5, atol=1e-7)


def test_none_is_the_models_own_coefficient_as_upstream(tmp_path):
    pairs = pair_rows(4)
    for coefficient in (None, 0.0, 0.25):
        ours = make_trainer(tmp_path, pairs, PairwiseNCATrainer, router_aux_loss_coef=coefficient)
        theirs = make_trainer(tmp_path, pairs, DPOTrainer, DPOConfig, router_aux_loss_coef=coefficient)
        assert (
            ours.router_aux_loss_coef == theirs.router_aux_loss_coef == (0.001 if coefficient is None else coefficient)
        )
        ours.train()
        theirs.train()
        assert bool(logged(ours, "aux_loss")) == bool(logged(theirs, "aux_loss")) == (coefficient != 0)
        if coefficient != 0:
            # Upstream also counts each row's last token, which predicts nothing, and the prompt once a response.
            padded = make_trainer(
                tmp_path, pairs, PairwiseNCATrainer, router_aux_loss_coef=coefficient, shared_prompt="false"
            )
            padded.train()
            assert logged(padded, "aux_loss")[0] == pytest.approx(logged(theirs, "aux_loss")[0], rel=0.03)


def test_evaluation_logs_it_too(tmp_path):
    trainer = make_trainer(tmp_path, reward_rows(4), router_aux_loss_coef=0.5)
    trainer.eval_dataset = trainer.train_dataset
    assert trainer.evaluate()["eval_aux_loss"] == pytest.approx(2.0, abs=0.5), "num_experts_per_tok where all is even"


def test_a_model_without_experts_is_refused(tmp_path):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="not a Mixture-of-Experts model"):
        make_trainer(tmp_path, reward_rows(4), model=LlamaForCausalLM(tiny_config()), router_aux_loss_coef=0.1)


def test_a_model_that_fsdp2_has_given_another_class_keeps_its_loss():
    model = tiny_moe()
    model.__class__ = type("FSDPMixtral", (model.__class__,), {"__module__": "torch.distributed.fsdp"})
    check_router(model, enabled=True)
    assert load_balancing_loss(model, (torch.zeros(6, 4),), None) == 2.0


def test_experts_without_a_known_loss_are_refused(monkeypatch):
    monkeypatch.delattr("transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func")
    with pytest.raises(ValueError, match="MixtralForCausalLM does not say .* set it to 0"):
        check_router(MixtralForCausalLM(FAMILIES[0]), enabled=True)
    check_router(MixtralForCausalLM(FAMILIES[0]), enabled=False)
