"""Entropy and accuracy of the response tokens, by the model's own logits, whatever way its rows are run."""

import pytest
import torch
from trl import DPOConfig, DPOTrainer

from nca_trainer import PairwiseNCATrainer
from tests.engine import make_model, step
from tests.tiny import SHAPES, rows_of
from tests.trainers import logged, make_trainer, pair_rows, reward_rows
from trl_nca.chunks import NumForwards, count_forwards, logps_without_gradient, split_batch
from trl_nca.collate import GroupCollator
from trl_nca.logps import response_logps
from trl_nca.token_metrics import TokenMetrics


@torch.no_grad()
def by_hand(model, rows):
    """What is logged of each prompt, by the plain forward of each response. Shape (B, 2)."""
    found = []
    for row in rows:
        entropies, is_top = [], []
        for response in row["response_ids"]:
            logits = model(input_ids=torch.tensor([row["prompt_ids"] + response])).logits[0, -len(response) - 1 : -1]
            entropies.append(torch.distributions.Categorical(logits=logits).entropy())
            is_top.append((logits.argmax(-1) == torch.tensor(response)).double().mean())
        best = max(range(len(is_top)), key=row["scores"].__getitem__)
        found.append([torch.cat(entropies).mean(), is_top[best]])
    return torch.tensor(found)


@pytest.fixture
def rows():
    """With a few targets that are the model's first choice, of tokens that follow the prompt."""
    rows, model = rows_of(SHAPES), make_model()
    for row in rows:
        for response in row["response_ids"][::2]:
            response[0] = int(model(input_ids=torch.tensor([row["prompt_ids"]])).logits[0, -1].argmax())
    return rows


def as_table(metrics):
    assert tuple(metrics) == TokenMetrics.NAMES
    return torch.stack(list(metrics.values()), dim=1).double()


@pytest.mark.parametrize("shared_prompt", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("most", [None, 12, 1], ids=["whole", "chunks", "responses"])
def test_they_are_the_models_own_of_each_prompt(rows, shared_prompt, most):
    model = make_model()
    expected = by_hand(model, rows)
    assert 0 < expected[:, 1].mean() < 1
    batch = GroupCollator()(rows)
    with torch.no_grad():
        tokens = TokenMetrics(batch)
    chunks = split_batch(batch, most, shared_prompt)
    logps_without_gradient(lambda chunk: response_logps(model, chunk, shared_prompt, None, tokens), chunks)
    torch.testing.assert_close(as_table(tokens.metrics), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["NCA", "InfoNCA"])
@pytest.mark.parametrize("most", [None, 12])
def test_forwards_that_run_twice_or_for_another_process_count_once(rows, loss_type, most, monkeypatch):
    """And the gradient does not know of them, to the last bit."""
    batch, model = GroupCollator()(rows), make_model()
    own = count_forwards(batch, most, shared_prompt=True, separable=loss_type == "NCA")
    more = NumForwards(own.chunks + 2, own.before + 2)
    gradients, added, add = [], [], TokenMetrics.add
    monkeypatch.setattr(TokenMetrics, "add", lambda *args: added.append(torch.is_grad_enabled()) or add(*args))
    for tokens in (None, TokenMetrics(batch)):
        model.zero_grad()
        monkeypatch.setattr("tests.engine.response_logps", lambda *args, of=tokens: response_logps(*args, None, of))
        step(model, batch, loss_type, most, at_least=more)
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    assert added == [True] * more.chunks, "of the pass without gradient, which costs less, nothing is asked"
    torch.testing.assert_close(as_table(tokens.metrics), by_hand(model, rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lora", [True, False])
def test_they_are_upstreams_of_a_pair(tmp_path, lora):
    """Of several in a micro-batch upstream weighs each by its tokens, and here each counts once."""
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "max_steps": 2, "lora": lora}
    ours = make_trainer(tmp_path, pair_rows(6), PairwiseNCATrainer, loss_type="DPO", **settings)
    theirs = make_trainer(tmp_path, pair_rows(6), DPOTrainer, DPOConfig, loss_type="sigmoid", **settings)
    for trainer in (ours, theirs):
        trainer.train()
    for name in TokenMetrics.NAMES:
        assert logged(ours, name) == pytest.approx(logged(theirs, name), abs=1e-3)
    assert len(set(logged(ours, "entropy"))) == 2, "nothing was learned"


def test_they_are_logged_of_the_policy_in_training_and_on_held_out_rows(tmp_path, monkeypatch):
    asked = []

    def run(*args, **kwargs):
        asked.append(kwargs.get("token_statistics", False))
        return forward(*args, **kwargs)

    trainer = make_trainer(tmp_path, reward_rows(4), eval_rows=reward_rows(3), max_steps=1)
    model = trainer.model.get_base_model()
    forward = model.forward
    monkeypatch.setattr(model, "forward", run)
    trainer.train()
    assert asked == [False, True], "the reference's forward, and the policy's"
    held_out = trainer.evaluate()
    assert asked == [False, True] * 2
    assert 0 < held_out["eval_entropy"] < torch.tensor(320.0).log()
    assert 0 <= held_out["eval_mean_token_accuracy"] <= 1
    assert logged(trainer, "entropy")[0] > 0
