"""Log-ratios of drawn responses: those of plain forwards, and the divergence by enumeration as their mean."""

import pytest
import torch

from alignment.sampling.sample import SamplingConfig, draw_batch, encode_prompt
from nca_trainer import NCAConfig, NCATrainer
from tests.tiny import tiny_tokenizer
from tests.trainers import DEFAULTS, make_trainer, reward_rows, tiny_llama
from trl_nca.divergence import response_logratios, why_no_divergence

PROMPTS = [[5, 9, 30], [7], [11, 12, 13, 14, 15]]
RESPONSES = [[[8, 2], [40, 41, 42]], [[9, 9, 2], [2]], [[100, 2]]]  # 2 ends a response


def plain_logps(model, prompt, response, temperature):
    """Summed log-probs of a response, by the logits of the whole row."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logps = (logits.double() / temperature).log_softmax(-1)
    return logps[torch.arange(len(response)), torch.tensor(response)].sum().item()


def trained(tmp_path, lora, **settings):
    trainer = make_trainer(tmp_path, reward_rows(8), lora=lora, learning_rate=3e-2, max_steps=3, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_log_ratios_are_those_of_plain_forwards(tmp_path, lora):
    trainer = trained(tmp_path, lora, max_tokens_per_forward=8, ld_alpha=0.5)  # which weighs the loss's tokens alone
    start, policy = tiny_llama(), trainer.model.eval()
    for temperature in (1.0, 0.6):
        found = response_logratios(trainer, PROMPTS, RESPONSES, temperature)
        for prompt, responses, ratios in zip(PROMPTS, RESPONSES, found, strict=True):
            expected = [
                plain_logps(policy, prompt, response, temperature) - plain_logps(start, prompt, response, temperature)
                for response in responses
            ]
            assert ratios == pytest.approx(expected, abs=1e-5)
            assert max(map(abs, expected)) > 0.01, "the policy has moved"


def test_nothing_is_left_behind(tmp_path):
    trainer = trained(tmp_path, lora=True)
    trainer.model.train()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    response_logratios(trainer, PROMPTS, RESPONSES)
    assert trainer.model.training
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in trainer.model.named_parameters())


def peaked_llama(noise):
    """A tiny model whose next token is far from uniform; with noise, another one near it."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight *= 6
        model.lm_head.weight += noise * torch.randn(model.lm_head.weight.shape, generator=torch.manual_seed(1))
    return model


def next_logps(model, rows, temperature):
    """Log-probs of the token behind each row, at a temperature. Shape (rows, V)."""
    with torch.no_grad():
        return (model(torch.tensor(rows)).logits[:, -1].double() / temperature).log_softmax(-1)


def divergence(policy, ref, prompt, stops, temperature):
    """KL by enumeration of all responses of at most two tokens: of the first, and of the second behind each first."""
    ours, theirs = (next_logps(model, [prompt], temperature)[0] for model in (policy, ref))
    first = (ours.exp() * (ours - theirs)).sum()
    going_on = [token for token in range(len(ours)) if token not in stops]
    behind, theirs = (next_logps(model, [[*prompt, t] for t in going_on], temperature) for model in (policy, ref))
    second = (behind.exp() * (behind - theirs)).sum(-1)  # (tokens that go on,)
    return first + ours[going_on].exp() @ second, first


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_mean_of_log_ratios_is_the_divergence_by_enumeration(tmp_path, temperature):
    policy, ref, tokenizer, stops = peaked_llama(0.0), peaked_llama(0.25), tiny_tokenizer(), range(2, 60)
    policy.generation_config.eos_token_id = [*stops]
    args = NCAConfig(output_dir=str(tmp_path), **DEFAULTS)
    trainer = NCATrainer(policy, ref, args, reward_rows(2), processing_class=tokenizer)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "the capital"}])
    config = SamplingConfig(num_samples=4000, max_new_tokens=2, temperature=temperature, batch_size=4000)
    drawn = draw_batch([prompt], 0, policy, tokenizer, config)
    assert {len(ids) for ids in drawn[0]} == {1, 2}
    assert all(ids[0] in stops for ids in drawn[0] if len(ids) == 1), "the end of a response is one of its tokens"
    (found,) = response_logratios(trainer, [prompt], drawn, temperature)
    found = torch.tensor(found, dtype=torch.float64)
    expected, of_first = divergence(policy, ref, prompt, stops, temperature)
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean() - expected) < 3 * error
    assert expected - of_first > 6 * error, "and could fail"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_samples_are_of_the_policy_whatever_its_generation_config_likes(temperature):
    policy, tokenizer = peaked_llama(0.0), tiny_tokenizer()
    config = SamplingConfig(num_samples=4, max_new_tokens=12, temperature=temperature)
    plain = draw_batch([[5, 9]], 0, policy, tokenizer, config)
    policy.generation_config.update(repetition_penalty=3.0, min_p=0.2, typical_p=0.5, no_repeat_ngram_size=1, top_k=2)
    assert draw_batch([[5, 9]], 0, policy, tokenizer, config) == plain


def test_where_there_is_no_divergence_its_reason_is_said(tmp_path):
    precomputed = {"precompute_ref_log_probs": True, "ref_logps_dir": str(tmp_path)}
    with_adapter = make_trainer(tmp_path, reward_rows(2), **precomputed)
    assert why_no_divergence(with_adapter, 1.0) is None
    assert "at temperature 0" in why_no_divergence(with_adapter, 0.0)
    synced = make_trainer(tmp_path, reward_rows(2), lora=False, sync_ref_model=True)
    assert "the reference has moved" in why_no_divergence(synced, 1.0)
    args = NCAConfig(output_dir=str(tmp_path), **DEFAULTS | precomputed)
    let_go = NCATrainer(tiny_llama(), args=args, train_dataset=reward_rows(2), processing_class=tiny_tokenizer())
    assert "no reference is kept" in why_no_divergence(let_go, 1.0)
