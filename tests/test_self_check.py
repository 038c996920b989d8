"""The engine's log-probs are each family's own, or it says that they are not, before anything is trained on."""

import copy

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    CPTConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from alignment.errors import UserError
from alignment.models import PolicyConfig
from alignment.plan.check import check_model
from tests.tiny import SHAPES, SIZES, rows_of, tiny_config
from trl_nca import self_check
from trl_nca.chunks import logps_without_gradient, split_batch
from trl_nca.collate import GroupCollator
from trl_nca.config import NCAConfig
from trl_nca.head import fuse_head
from trl_nca.logps import prepare, response_logps
from trl_nca.pieces import find_cutting
from trl_nca.rotary import forget_lengths, length_dependent

_PLAIN = {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_BERT = {k: v for k, v in _PLAIN.items() if k != "max_position_embeddings"} | {
    "is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_BART = {
    "vocab_size": 320, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
    "encoder_layers": 1, "max_position_embeddings": 64, "is_encoder_decoder": False, "is_decoder": True,
    "dropout": 0.0, "init_std": 0.2, "pad_token_id": 0,
}  # fmt: skip
_MLA = _PLAIN | {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 8,
}  # fmt: skip
_CHUNKED = {"attention_chunk_size": 8, "layer_types": ["chunked_attention", "full_attention"]}
_NTK = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}

#: Families that need something of their own: a model, and whether it can run packed.
FAMILIES = {
    "a window in every second layer": (
        lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**_PLAIN, **_EXPERTS, num_key_value_heads=2, use_sliding_window=True,
                                    sliding_window=6, layer_types=["full_attention", "sliding_attention"])), True),
    "layers that hand no arguments on": (lambda: NemotronForCausalLM(NemotronConfig(**SIZES)), False),
    "a head that reads of its decoder": (
        lambda: FalconH1ForCausalLM(FalconH1Config(**SIZES, lm_head_multiplier=0.5, mamba_d_ssm=32, mamba_n_heads=4,
                                    mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8)), False),
    "a mask of its own": (lambda: DogeForCausalLM(DogeConfig(**SIZES)), False),
    "attention sinks": (
        lambda: GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)), False),
    "capped scores": (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, attn_logit_softcapping=2.0)), False),
    "a dense layer before the head": (
        lambda: ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**_PLAIN, cls_token_id=1, sep_token_id=2)), True),
    "a transform before the head": (lambda: BertLMHeadModel(BertConfig(**_BERT)), True),
    "positions that count from the pad token": (
        lambda: RobertaForCausalLM(RobertaConfig(**_BERT, max_position_embeddings=64)), False),
    "learned positions, offset by two": (
        lambda: OPTForCausalLM(OPTConfig(vocab_size=320, hidden_size=32, ffn_dim=48, num_hidden_layers=2, dropout=0.0,
                               num_attention_heads=4, word_embed_proj_dim=32, init_std=0.2, pad_token_id=0)), True),
    "positions of its own": (lambda: BartForCausalLM(BartConfig(**_BART)), False),
    "recurrence": (
        lambda: RwkvForCausalLM(RwkvConfig(vocab_size=320, hidden_size=32, attention_hidden_size=32,
                                intermediate_size=48, num_hidden_layers=2)), False),
    "values smaller than keys": (lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**_MLA)), True),
    "a decoder under another name": (
        lambda: Llama4ForCausalLM(Llama4TextConfig(**SIZES, **_CHUNKED, intermediate_size_mlp=48, num_local_experts=2,
                                  moe_layers=[1])), False),
    "longrope": (lambda: Phi3ForCausalLM(Phi3Config(**_PLAIN, num_key_value_heads=2, rope_parameters=_LONGROPE,
                                         original_max_position_embeddings=8)), True),
    "dynamic NTK": (
        lambda: LlamaForCausalLM(tiny_config(rope_parameters=_NTK, max_position_embeddings=8)), True),
}  # fmt: skip
_LLAMA = lambda: LlamaForCausalLM(tiny_config())  # noqa: E731
_VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
ADAPTERS = {
    "AdaLoRA": (AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"]), True),
    "adaption prompt": (AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1), True),
    "replicated layers": (LoraConfig(layer_replication=[(0, 2), (0, 2)], target_modules=["q_proj"]), True),
    "prompt tuning": (PromptTuningConfig(**_VIRTUAL), False),
    "p-tuning": (PromptEncoderConfig(**_VIRTUAL, encoder_hidden_size=16), False),
    "prefix tuning": (PrefixTuningConfig(**_VIRTUAL), False),
    "CPT": (CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7], cpt_mask=[1] * 3, cpt_tokens_type_mask=[1] * 3),
            False),
}  # fmt: skip


def alone(model, rows):
    """The responses' log-probs by the model's own forward, a row at a time. Shape (N,)."""
    logps = []
    for row in rows:
        for response in row["response_ids"]:
            ids, start = torch.tensor([row["prompt_ids"] + response]), len(row["prompt_ids"])
            forget_lengths(length_dependent(model))
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
            predicted = logits[-ids.shape[1] :].double().log_softmax(-1)
            logps.append(sum(predicted[start + t - 1, token] for t, token in enumerate(response)))
    return torch.stack(logps)


def check(model, packs):
    """Value and gradient, packed and padded, whole and in pieces, against a copy that the engine never saw."""
    rows, plain = rows_of(SHAPES), copy.deepcopy(model.eval())
    expected = alone(plain, rows)
    weights = torch.linspace(-1, 1, len(expected), dtype=expected.dtype)
    trained = [(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True) if b.requires_grad]
    wanted = torch.autograd.grad(weights @ expected, [b for _, b in trained], allow_unused=True)
    if not packs:
        with pytest.warns(UserWarning, match="Prompts are not shared"):
            assert not prepare([model])
    else:
        assert prepare([model])
    batch = GroupCollator()(rows)
    for shared in {packs, False}:
        logps = response_logps(model, batch, shared)[batch["response_mask"]].double()
        torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-4)
        found = torch.autograd.grad(weights @ logps, [a for a, _ in trained], allow_unused=True)
        for gradient, right in zip(found, wanted, strict=True):
            assert (gradient is None) == (right is None)
            if right is not None:
                torch.testing.assert_close(gradient, right, rtol=1e-3, atol=1e-4 * right.abs().max().clamp(min=1))
        cutting = find_cutting([model], 8, shared)
        assert (cutting.longest > 0) == shared
        chunks = split_batch(batch, 8, shared, cutting)
        pieces = logps_without_gradient(lambda b, shared=shared: response_logps(model, b, shared), chunks)
        torch.testing.assert_close(pieces[batch["response_mask"]].double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Rows of more than")
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    torch.manual_seed(0)
    make, packs = FAMILIES[family]
    check(make(), packs)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters(adapter):
    torch.manual_seed(0)
    config, packs = ADAPTERS[adapter]
    model = get_peft_model(_LLAMA(), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "gate" in name:
            torch.nn.init.constant_(parameter, 0.5)
    check(model, packs)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "some/kernels"])
def test_attention_is_judged_by_what_it_is_handed(attention, monkeypatch):
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, attn_logit_softcapping=2.0))
    probe = self_check.Probe(model)
    monkeypatch.setattr("trl_nca.logps.Probe", lambda model: probe)  # the kernels are not on this machine
    model.config._attn_implementation_internal = attention
    with pytest.raises(ValueError, match="scores by softcap too"):
        prepare([model], "true")


def test_a_mask_of_its_own_is_seen_in_any_precision():
    """In 16 bits what it changes is less than what rounding makes."""
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="DogeAttention makes a mask of its own"):
        prepare([DogeForCausalLM(DogeConfig(**SIZES)).bfloat16()], "true")


def test_a_model_that_is_not_causal_is_refused():
    model = BertLMHeadModel(BertConfig(**_BERT | {"is_decoder": False}))
    with pytest.raises(ValueError, match="BertLMHeadModel cannot be trained on: .*not causal"):
        prepare([model])


@pytest.mark.filterwarnings("ignore:Prompts are not shared")
def test_a_model_that_is_wrong_in_padded_rows_too_is_refused():
    class Odd(LlamaForCausalLM):
        """Its decoder's hidden states are not all that its head sees."""

        def forward(self, input_ids=None, **kwargs):
            out = super().forward(input_ids=input_ids, **kwargs)
            out.logits = out.logits + self.lm_head.weight[input_ids].sum(-1, keepdim=True) * torch.arange(320)
            return out

    with pytest.raises(ValueError, match=r"Odd cannot be trained on: .* nats a token"):
        prepare([Odd(tiny_config())])
    assert prepare([Odd(tiny_config())], check=False)


def test_the_check_leaves_no_trace():
    model = _LLAMA().train()
    model.model.layers[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    prepare([model])
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_a_cut_vocabulary():
    class Cut(LlamaForCausalLM):
        """Scores fewer tokens than it has embeddings."""

        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits[..., :300]
            return out

    torch.manual_seed(0)
    model, ids = Cut(tiny_config()), torch.arange(3, 12)[None]
    expected = model(ids).logits[0].log_softmax(-1)[torch.arange(8), ids[0, 1:]]
    fuse_head(model)
    torch.testing.assert_close(model(ids, positions=torch.arange(8), targets=ids[0, 1:]), expected)


def test_a_plan_checks_the_weights_that_are_here(tmp_path):
    def outcome(model, name, **settings):
        model.save_pretrained(tmp_path / name)
        policy = PolicyConfig(model_name_or_path=str(tmp_path / name), use_peft=True, lora_target_modules="all-linear")
        args = NCAConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True, **settings)
        return check_model(policy, args)

    torch.manual_seed(0)
    assert outcome(_LLAMA(), "llama") == "Log-probs: those of the model's own forward, packed"
    assert outcome(_LLAMA(), "llama", check_logps=False) is None
    padded = outcome(NemotronForCausalLM(NemotronConfig(**SIZES)), "nemotron")
    assert padded.startswith("Prompts are not shared and rows are padded: NemotronAttention")
    with pytest.raises(UserError, match="cannot be trained with these settings: BertLMHeadModel .* not causal"):
        outcome(BertLMHeadModel(BertConfig(**_BERT | {"is_decoder": False})), "bert")
    elsewhere = PolicyConfig(model_name_or_path="an/id")
    assert "when the run starts" in check_model(elsewhere, NCAConfig(output_dir=str(tmp_path), report_to="none"))
