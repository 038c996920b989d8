"""Chunked batches: what is in a chunk, and that the gradient is that of the whole batch."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine import losses_of, make_model, step
from tests.tiny import SHAPES, rows_of
from trl_nca.chunks import NumForwards, count_forwards, logps_without_gradient, split_batch
from trl_nca.collate import GroupCollator
from trl_nca.logps import response_logps
from trl_nca.losses import LOSSES

lengths = st.integers(1, 9)
shapes = st.lists(st.tuples(lengths, st.lists(lengths, min_size=2, max_size=6)), min_size=1, max_size=5)


@given(shapes, st.integers(1, 60), st.booleans())
@settings(deadline=None)
def test_chunks_hold_every_response_once_and_no_more_tokens_than_allowed(shapes, most, shared_prompt):
    batch = GroupCollator()(rows_of(shapes))
    chunks = split_batch(batch, most, shared_prompt)
    assert torch.equal(sum(chunk["response_mask"].int() for chunk in chunks), batch["response_mask"].int())
    for chunk in chunks:
        copies = chunk["response_mask"].sum(1) if not shared_prompt else chunk["response_mask"].any(1).int()
        contexts = torch.tensor(batch["layout"].context_lengths)
        num_targets = sum(map(sum, chunk["layout"].response_lengths))
        tokens = num_targets + int((contexts * copies).sum())
        assert tokens <= most or chunk["response_mask"].sum() == 1
        assert chunk["input_ids"].shape == chunk["position_ids"].shape
        assert chunk["input_ids"].shape[1] == sum(chunk["layout"].context_lengths) + num_targets
        assert len(chunk["targets"]) == num_targets
    if shared_prompt:
        for b, (prompt, responses) in enumerate(shapes):
            parts = sum(bool(chunk["response_mask"][b].any()) for chunk in chunks)
            assert parts == 1 or prompt - 1 + sum(responses) > most, "a group that fits is not split"


def gradients(model, *args, **kwargs):
    """Log-probs and trained weights' gradients of a `step`."""
    model.zero_grad()
    return step(model, *args, **kwargs), [p.grad.clone() for p in model.parameters() if p.requires_grad]


#: Settings of a loss, beside its name, under which it must be the same in chunks.
SETTINGS = [
    *[(name, {}) for name in LOSSES],
    *[(name, {"normalize": "tokens", "sft_weight": 0.3}) for name in ("NCA", "PL")],
    ("DPO", {"margin": 0.4, "label_smoothing": 0.1}),
    ("biasedNCA", {"margin": 0.4, "label_smoothing": 0.1}),
]


def batch_of(loss_type, ld_alpha=None):
    """Ragged rows, weighted, with as many responses as the loss takes."""
    shapes = SHAPES if LOSSES[loss_type].num_responses is None else [(p, lengths[:2]) for p, lengths in SHAPES]
    rows = [row | {"weight": weight} for row, weight in zip(rows_of(shapes), (0.5, None, 3.0), strict=True)]
    return GroupCollator(ld_alpha=ld_alpha)(rows)


@pytest.mark.parametrize(("loss_type", "settings"), SETTINGS)
@pytest.mark.parametrize("ld_alpha", [None, 0.4])
def test_chunked_equals_whole(loss_type, settings, ld_alpha):
    """In chunks of several sizes, packed and padded; with tokens past the shortest response of less weight."""
    settings = {name: value for name, value in settings.items() if ld_alpha is None or name != "sft_weight"}
    model, batch = make_model(), batch_of(loss_type, ld_alpha)
    logps, gradient = gradients(model, batch, loss_type, None, **settings)
    assert all(values.any() for values in gradient)
    largest = max(values.abs().max().item() for values in gradient)
    for most, shared_prompt in ((1, True), (12, True), (20, True), (40, True), (None, False), (12, False)):
        found = gradients(model, batch, loss_type, most, shared_prompt=shared_prompt, **settings)
        torch.testing.assert_close(found[0], logps, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found[1], gradient, rtol=1e-6, atol=1e-8 * max(largest, 1))


@pytest.mark.parametrize("most", [1, 12])
def test_chunks_without_gradient_are_the_same(most):
    model, batch = make_model(), GroupCollator()(rows_of(SHAPES))
    logps = response_logps(model, batch, True).detach()
    with_zeros = logps_without_gradient(lambda chunk: response_logps(model, chunk, True), split_batch(batch, most))
    torch.testing.assert_close(with_zeros, logps, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("loss_type", "again"), [("NCA", 0), ("InfoNCA", 3)])
def test_only_coupled_groups_that_are_split_run_twice(loss_type, again):
    runs, batch = [], GroupCollator()(rows_of([(4, (2, 2)), (12, (9, 9, 9)), (4, (3, 3))]))
    gradients(make_model(), batch, loss_type, 20, runs=runs)
    assert [tokens for with_gradient, tokens in runs if with_gradient] == [7, 20, 20, 20, 9]
    assert [tokens for with_gradient, tokens in runs if not with_gradient] == [20] * again


@pytest.mark.parametrize("loss_type", ["NCA", "InfoNCA"])
def test_dropout_is_replayed(loss_type):
    """The gradient is that of the chunks run once each, all kept, with the random numbers in the same order."""
    model, batch = make_model(dropout=0.5), GroupCollator()(rows_of(SHAPES))
    torch.manual_seed(3)
    logps, gradient = gradients(model, batch, loss_type, 12, beta=0.5)
    model.zero_grad()
    torch.manual_seed(3)
    expected = sum(response_logps(model, chunk, True) for chunk in split_batch(batch, 12))
    losses_of(loss_type, batch, beta=0.5)(expected).sum().backward()
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(gradient, [p.grad for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("loss_type", ["NCA", "InfoNCA"])
def test_idle_chunks_change_nothing(loss_type):
    """Another process has more chunks: this one runs along, for nothing."""
    model, batch = make_model(), GroupCollator()(rows_of(SHAPES))
    expected = gradients(model, batch, loss_type, 12)
    runs = []
    own = count_forwards(batch, 12, shared_prompt=True, separable=LOSSES[loss_type].separable)
    found = gradients(model, batch, loss_type, 12, at_least=NumForwards(own.chunks + 3, own.before + 3), runs=runs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert sum(with_gradient for with_gradient, _ in runs) == len(split_batch(batch, 12)) + 3 == own.chunks + 3
    assert sum(not with_gradient for with_gradient, _ in runs) == own.before + 3


def test_all_chunks_but_the_last_are_not_synchronised():
    depth, seen = [0], []

    @contextlib.contextmanager
    def no_sync():
        depth[0] += 1
        yield
        depth[0] -= 1

    class Runs(list):
        def append(self, run):
            seen.append(depth[0])

    batch = GroupCollator()(rows_of(SHAPES))
    gradients(make_model(), batch, "NCA", 12, no_sync=no_sync, runs=Runs())
    assert seen == [1] * (len(split_batch(batch, 12)) - 1) + [0]


@pytest.mark.parametrize("loss_type", ["NCA", "InfoNCA"])
def test_bf16_autocast(loss_type):
    """Autocast keeps copies of weights: those made without gradient must not be the ones that are trained."""
    model, batch = make_model(dtype=torch.float32), GroupCollator()(rows_of(SHAPES))
    _, exact = gradients(model, batch, loss_type, None)
    with torch.autocast("cpu", torch.bfloat16):
        _, chunked = gradients(model, batch, loss_type, 12)
    one, other = torch.cat([g.flatten() for g in exact]), torch.cat([g.flatten() for g in chunked])
    assert torch.cosine_similarity(one, other, dim=0) > 0.99
    assert (one.norm() / other.norm()).item() == pytest.approx(1, abs=0.05)
