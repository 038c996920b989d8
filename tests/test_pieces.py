"""Responses that are run in pieces: log-probs and gradients are those of the whole row, and memory stays flat."""

import contextlib

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from alignment.plan.timeline import Timeline
from tests.engine import FAMILIES, losses_of, make, make_model, step
from tests.tiny import rows_of, tiny_config
from trl_nca.chunks import logps_for_training, logps_without_gradient, split_batch
from trl_nca.collate import GroupCollator
from trl_nca.logps import prepare, response_logps
from trl_nca.losses import LOSSES
from trl_nca.pieces import WHOLE, Cutting, cut, find_cutting
from trl_nca.router import RouterLoss
from trl_nca.token_metrics import TokenMetrics

ANY = Cutting(10_000)
#: A long response, one with a long prompt, and short ones beside them.
SHAPES = [(7, (23, 5, 11)), (20, (9, 4))]


def batch_of(ld_alpha=None, masked=False):
    rows = rows_of(SHAPES)
    if masked:
        rows[0]["token_masks"] = [[t % 5 > 1 for t in range(len(r))] for r in rows[0]["response_ids"]]
    return GroupCollator(ld_alpha)(rows)


def gradients(model, batch, loss_type, most, **settings):
    """Log-probs, and the gradients of what is trained."""
    model.zero_grad()
    logps = step(model, batch, loss_type, most, **settings)
    return logps, [p.grad.clone() for p in model.parameters() if p.requires_grad]


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_equal_the_whole_row(family, monkeypatch):
    """In full fine-tuning, with windows, for pieces that hold context, responses, and both."""
    # In float64: its own is in float32.
    monkeypatch.setattr(Gemma3RMSNorm, "forward", lambda self, x: self._norm(x) * (1 + self.weight))
    model = make(family).train()
    prepare([model])
    cutting = find_cutting([model], 9, shares=True)
    assert cutting.longest > 1000
    for most in (1, 5, 12):
        expected = gradients(model, batch_of(), "InfoNCA", most)
        assert all(gradient.any() for gradient in expected[1])
        assert_same(gradients(model, batch_of(), "InfoNCA", most, cutting=cutting), expected)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_each_loss(loss_type):
    """With an adapter and a frozen head, weighted tokens, and tokens that do not count."""
    model, shapes = make_model(), SHAPES
    if LOSSES[loss_type].num_responses is not None:
        shapes = [(p, lengths[:2]) for p, lengths in SHAPES]
    rows = rows_of(shapes)
    rows[0]["token_masks"] = [[t % 5 > 1 for t in range(len(r))] for r in rows[0]["response_ids"]]
    batch = GroupCollator(ld_alpha=0.4)(rows)
    expected = gradients(model, batch, loss_type, 6)
    largest = max(gradient.abs().max().item() for gradient in expected[1])
    found = gradients(model, batch, loss_type, 6, cutting=ANY)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12 * max(largest, 1))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("trains", ["adapter", "all"])
def test_with_gradient_checkpointing(trains, reentrant):
    """What is computed again neither fills the store again nor sends a gradient back twice."""
    model = make_model() if trains == "adapter" else make("qwen3").train()
    prepare([model])
    expected = gradients(model, batch_of(), "InfoNCA", 9)
    base = model.get_base_model() if trains == "adapter" else model
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    base.enable_input_require_grads()
    assert_same(gradients(model, batch_of(), "InfoNCA", 9, cutting=ANY), expected)


class _InGraph:
    """A store whose keys stay in the graph of the whole response."""

    def __init__(self, length):
        self.layers = {}

    def extend(self, layer, key, value, start):
        before = self.layers.get(id(layer), (key[:, :, :0], value[:, :, :0]))
        self.layers[id(layer)] = [torch.cat(pair, dim=2) for pair in zip(before, (key, value), strict=True)]
        return self.layers[id(layer)]


@pytest.mark.parametrize("loss_type", ["NCA", "InfoNCA"])
def test_dropout_is_replayed(loss_type, monkeypatch):
    """The gradient is that of the pieces run once each, all kept, with the random numbers in the same order."""
    model, batch = make_model(dropout=0.5), batch_of()
    torch.manual_seed(3)
    found = gradients(model, batch, loss_type, 9, cutting=ANY, beta=0.5)
    monkeypatch.setattr("trl_nca.pieces.KeyStore", _InGraph)
    model.zero_grad()
    torch.manual_seed(3)
    pieces = [piece for chunk in split_batch(batch, 9, cutting=ANY) for piece in cut(chunk)]
    logps = sum(response_logps(model, piece, True) for piece in pieces)
    losses_of(loss_type, batch, beta=0.5)(logps).sum().backward()
    assert_same(found, (logps.detach(), [p.grad for p in model.parameters() if p.requires_grad]))


def test_forwards_are_bounded_and_none_is_run_in_vain():
    """The last piece is run once, with gradient; of losses that couple responses it is run before too."""
    batch = GroupCollator()(rows_of([(4, (14, 9)), (3, (2, 2))]))
    for loss_type, before in (("NCA", []), ("InfoNCA", [5, 6, 6, 6, 6])):
        runs = []
        gradients(make_model(), batch, loss_type, 6, cutting=ANY, runs=runs)
        assert [run for run in runs if not run[0]] == [(False, n) for n in (*before, 5, 6, 6)]
        assert [run for run in runs if run[0]] == [(True, n) for n in (6, 6, 5, 6, 6, 6)]


@pytest.mark.parametrize(("length", "most"), [(40, 7), (9, 4), (5, 2), (7, 3), (8, 1)])
def test_pieces_are_even_and_none_is_one_token(length, most):
    (chunk,) = split_batch(GroupCollator()(rows_of([(3, (length - 2,))])), most, cutting=ANY)
    sizes = [piece["input_ids"].shape[1] for piece in cut(chunk)]
    assert sum(sizes) == length and min(sizes) >= 2 and max(sizes) <= max(most, 3) and max(sizes) - min(sizes) <= 1


def test_all_pieces_but_the_last_are_not_synchronised():
    depth, seen = [0], []

    @contextlib.contextmanager
    def no_sync():
        depth[0] += 1
        yield
        depth[0] -= 1

    class Runs(list):
        def append(self, run):
            seen.extend([depth[0]] * run[0])

    gradients(make_model(), batch_of(), "NCA", 9, cutting=ANY, no_sync=no_sync, runs=Runs())
    assert len(seen) > 8 and seen == [1] * (len(seen) - 1) + [0]


def test_without_gradient():
    model, batch = make_model(), batch_of(masked=True)
    logps = response_logps(model, batch, True).detach()
    chunks = split_batch(batch, 9, cutting=ANY)
    found = logps_without_gradient(lambda piece: response_logps(model, piece, True), chunks)
    torch.testing.assert_close(found, logps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_tokens_are_counted_once_and_forwards_by_their_share(training):
    model, batch = make_model(), batch_of(masked=True)
    with torch.set_grad_enabled(training):
        expected, tokens, router = TokenMetrics(batch), TokenMetrics(batch), RouterLoss(batch, 0.1)
        response_logps(model, batch, True, None, expected)

    def run(piece):
        router.add(piece, torch.ones(()))
        return response_logps(model, piece, True, None, tokens)

    if training:
        loss = losses_of("NCA", batch)
        logps_for_training(run, split_batch(batch, 9, cutting=ANY), True, lambda logps: loss(logps).sum().backward())
    else:
        logps_without_gradient(run, split_batch(batch, 9, cutting=ANY))
    torch.testing.assert_close(tokens.metrics, expected.metrics, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(router.metrics["aux_loss"], torch.ones(2))


def peak(length, cutting, checkpointing):
    """Most bytes held in a step of forwards of 40 tokens, weights left out, of two responses of so many tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(num_hidden_layers=8, max_position_embeddings=1000)).train()
    prepare([model])
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = GroupCollator()(rows_of([(10, (length - 9, length - 9))]))
    with Timeline([*model.parameters(), *model.buffers()], 320) as timeline:
        step(model, batch, "NCA", 40, cutting=cutting)
    return sum(timeline.peak(0, timeline.now).values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_grows_by_keys_and_values_alone(checkpointing):
    """Of one response, in all layers, and their gradients; attention works on those of a layer for all heads."""
    config = tiny_config()
    of_a_layer = 2 * config.num_key_value_heads * config.head_dim * (4 + 4) * 300
    whole, in_pieces = (
        peak(400, cutting, checkpointing) - peak(100, cutting, checkpointing) for cutting in (WHOLE, ANY)
    )
    assert 8 * of_a_layer < in_pieces < 11 * of_a_layer
    assert whole > (1.3 if checkpointing else 5) * in_pieces


def test_what_cannot_be_cut_runs_whole_and_says_why():
    model = LlamaForCausalLM(tiny_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
                                         max_position_embeddings=20))  # fmt: skip
    assert prepare([model])
    reasons = {
        "a padded row keeps no keys": find_cutting([model], 9, shares=False),
        "must run the same forwards": find_cutting([model], 9, shares=True, sharded=True),
        "from 20 tokens on": find_cutting([model], 9, shares=True),
    }
    for reason, cutting in reasons.items():
        with pytest.warns(UserWarning, match=f"run whole: .*{reason}"):
            assert all("num_pieces" not in chunk for chunk in split_batch(batch_of(), 20, cutting=cutting))
    chunk = split_batch(GroupCollator()(rows_of([(8, (12,))])), 8, cutting=reasons["from 20 tokens on"])[0]
    assert len(cut(chunk)) == 3  # of 19 tokens
    assert find_cutting([model], None, shares=False) == WHOLE


def test_a_family_that_is_wrong_in_pieces_is_found():
    """Layers that call one module several times, as recurrent depth does, have more keys than the store keeps apart."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config())
    model.model.layers[1] = model.model.layers[0]
    assert prepare([model])
    cutting = find_cutting([model], 9, shares=True)
    assert cutting.longest == 0 and "in pieces the log-probs differ from those of the row whole" in cutting.reason
    assert find_cutting([model], 9, shares=True, check=False).longest > 0
