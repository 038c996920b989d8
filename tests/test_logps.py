"""Log-probs of packed groups against padded rows, and both against a plain loop over the model's full logits."""

import itertools

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tests.engine import FAMILIES, make
from tests.tiny import SHAPES, SIZES, rows_of, tiny_config
from trl_nca import shared_prompt
from trl_nca.collate import GroupCollator
from trl_nca.layout import GroupLayout
from trl_nca.logps import prepare, response_logps
from trl_nca.sharing import unsupported_reason


def by_hand(model, rows):
    """Each response alone behind its prompt, log-softmax over the full logits."""
    sums = []
    for row in rows:
        for response in row["response_ids"]:
            ids = torch.tensor([row["prompt_ids"] + response])
            logps = model(ids).logits.double().log_softmax(-1)[0]
            start = len(row["prompt_ids"])
            sums.append(sum(logps[start + t - 1, token] for t, token in enumerate(response)))
    return torch.stack(sums)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded_equals_by_hand(family):
    model, rows = make(family), rows_of(SHAPES)
    batch = GroupCollator()(rows)
    mask = batch["response_mask"]
    expected = by_hand(model, rows)
    expected_gradient = torch.autograd.grad(expected.square().mean(), model.parameters())

    assert prepare([model])
    for packed in (True, False):
        logps = response_logps(model, batch, packed)
        assert (logps[~mask] == 0).all()
        torch.testing.assert_close(logps[mask], expected, rtol=1e-6, atol=1e-6)
        gradient = torch.autograd.grad(logps[mask].square().mean(), model.parameters())
        # transformers normalises in float32 whatever the model's type is: that is what the tolerance allows for.
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_nothing():
    model, batch = make("mistral-window"), GroupCollator()(rows_of(SHAPES))
    assert prepare([model])
    model.train()
    plain = torch.autograd.grad(response_logps(model, batch, True).sum(), model.parameters())
    model.gradient_checkpointing_enable()
    again = torch.autograd.grad(response_logps(model, batch, True).sum(), model.parameters())
    torch.testing.assert_close(plain, again)


def test_the_sliding_window_is_seen():
    batch = GroupCollator()(rows_of(SHAPES))
    windowed = make("mistral-window")
    assert prepare([windowed])
    wide = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)).double()
    wide.load_state_dict(windowed.state_dict())
    assert prepare([wide])
    difference = response_logps(windowed, batch, True) - response_logps(wide, batch, True)
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
def test_packed_for_flash_attention(family, monkeypatch):
    """What a GPU's kernel is given: a stand-in that follows its contract sequence by sequence gets the same values."""
    seen = []

    def varlen_attn(q, k, v, q_starts, k_starts, most_q, most_k, *, scale, window_size, enable_gqa=True):
        outs = []
        queries, keys = (itertools.pairwise(starts.tolist()) for starts in (q_starts, k_starts))
        for (a, b), (c, d) in zip(queries, keys, strict=True):
            assert b - a <= most_q and d - c <= most_k
            offset = torch.arange(d - c) - torch.arange(d - c - (b - a), d - c)[:, None]  # key - query: ends meet
            mask = (offset <= window_size[1]) & ((offset >= -window_size[0]) | (window_size[0] < 0))
            parts = (t[None].transpose(1, 2) for t in (q[a:b], k[c:d], v[c:d]))
            out = torch.nn.functional.scaled_dot_product_attention(*parts, mask, scale=scale, enable_gqa=enable_gqa)
            outs.append(out[0].transpose(0, 1))
        seen.append(len(outs))
        return torch.cat(outs)

    model, batch = make(family), GroupCollator()(rows_of(SHAPES))
    assert prepare([model])
    expected = response_logps(model, batch, True)
    monkeypatch.setattr(shared_prompt, "varlen_attn", varlen_attn)
    monkeypatch.setattr(shared_prompt, "_has_flash", lambda query: True)
    torch.testing.assert_close(response_logps(model, batch, True), expected)
    assert seen == [11, 11]  # in each of two layers 2 contexts, the one-token prompt has none, and 9 responses


def test_responses_do_not_see_each_other():
    model, rows = make("llama"), rows_of(SHAPES)
    assert prepare([model])
    before = response_logps(model, GroupCollator()(rows), True)
    rows[0]["response_ids"][1] = [5, 6, 7, 8]
    after = response_logps(model, GroupCollator()(rows), True)
    changed = (before != after).nonzero().tolist()
    assert changed == [[0, 1]]


def test_sampling_is_as_before_after_the_switch():
    model, prompt = make("gemma3"), torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert prepare([model])
    assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False), expected)


def test_models_that_cannot_share_say_why():
    softcapped = Gemma2ForCausalLM(Gemma2Config(**SIZES))  # caps attention scores, so it runs eager attention
    assert "'eager'" in unsupported_reason(softcapped)
    chunked = LlamaForCausalLM(tiny_config(layer_types=["full_attention", "chunked_attention"]))
    assert "chunked_attention" in unsupported_reason(chunked)
    virtual = get_peft_model(
        LlamaForCausalLM(tiny_config()), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    assert "virtual tokens" in unsupported_reason(virtual)


def test_a_layout_is_derived_once_on_one_gpu(monkeypatch):
    """accelerate calls it "cuda", and the batch's tensors say "cuda:0"."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    layout = GroupLayout([2], [[3, 1]]).to("cuda")
    assert layout.to(torch.device("cuda", 0)) is layout
