"""Responses that begin with the same tokens run them once: the same log-probs and gradients, fewer tokens."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine import FAMILIES, hold_against_plain, make, make_model, step
from trl_nca.chunks import split_batch
from trl_nca.collate import GroupCollator


def tree_rows(shapes, seed=0):
    """Rows whose responses begin as an earlier one of their prompt does, up to a place that is drawn."""
    rng, rows = random.Random(seed), []
    for prompt, lengths in shapes:
        responses = []
        for length in lengths:
            start = rng.choice(responses)[: rng.randrange(length)] if responses else []
            responses.append(start + [rng.randrange(320) for _ in range(length - len(start))])
        masks = [[rng.random() < 0.7 for _ in ids[:-1]] + [True] for ids in responses]
        row = {"prompt_ids": [rng.randrange(320) for _ in range(prompt)], "response_ids": responses,
               "scores": [rng.random() for _ in lengths]}  # fmt: skip
        rows.append(row | {"token_masks": masks})
    return rows


#: With responses that go on from each other, from the prompt's one token, and that are part of another.
SHAPES = [(7, (30, 25, 28, 40)), (1, (20, 26)), (12, (16, 12, 3))]


@pytest.mark.parametrize("shared_prompt", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_the_plain_models(family, shared_prompt):
    rows = tree_rows(SHAPES, seed=3)
    batch = GroupCollator()(rows)
    assert any(len(path) > 2 for paths in batch["layout"].paths for path in paths)
    lengths = [len(row["prompt_ids"]) - 1 + sum(map(len, row["response_ids"])) for row in rows]
    assert batch["input_ids"].shape[1] < sum(lengths)
    hold_against_plain(make(family), rows, shared_prompt, atol=1e-4)


@pytest.mark.parametrize("loss_type", ["NCA", "InfoNCA"])
def test_chunks_take_what_their_responses_go_on_from(loss_type):
    model, batch = make_model(), GroupCollator()(tree_rows(SHAPES, seed=3))
    results = []
    for most in (None, 1, 35, 60, 75):
        model.zero_grad()
        logps = step(model, batch, loss_type, most)
        results.append([logps, *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-8)


lengths = st.lists(st.integers(1, 30), min_size=2, max_size=5)


@given(st.lists(st.tuples(st.integers(1, 9), lengths), min_size=1, max_size=3), st.integers(0, 999), st.integers(1, 90))
@settings(deadline=None)
def test_every_part_of_a_batch_holds_its_responses(shapes, seed, most):
    rows = tree_rows(shapes, seed)
    found = {}
    for chunk in split_batch(GroupCollator()(rows), most):
        layout, ids, positions = chunk["layout"], chunk["input_ids"][0], chunk["position_ids"][0].tolist()
        assert sum(c.stop - c.start + sum(r.stop - r.start for r in rs) for c, rs in layout.groups) == len(ids)
        assert len(ids) <= most or chunk["response_mask"].sum() == 1
        keys, _, starts, *_ = layout.sequences
        sequences = iter([keys[a:b] for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)])
        targets = iter(zip(layout.target_positions.tolist(), chunk["targets"].tolist(), strict=True))
        for b, ((context, _), paths) in enumerate(zip(layout.groups, layout.paths, strict=True)):
            seen = [next(sequences)] if context.stop > context.start else []
            real = [k for k, length in enumerate(layout.response_lengths[b]) if length]
            for k, path in zip(real, paths, strict=True):
                index = [i for part in (context, *path) for i in range(part.start, part.stop)]
                assert next(sequences).tolist() == index, "what a response sees is its context and itself"
                assert [positions[i] for i in index] == [*range(len(index))]
                prompt, response = rows[b]["prompt_ids"], rows[b]["response_ids"][k]
                assert ids[index].tolist() == (prompt + response)[:-1]
                scored = [t for t, counts in enumerate(rows[b]["token_masks"][k]) if counts]
                expected = [(index[len(prompt) - 1 + t], response[t]) for t in scored]
                assert [next(targets) for _ in scored] == expected
                found[b, k] = None
            assert not seen or seen[0].tolist() == [*range(context.start, context.stop)]
    assert len(found) == sum(len(row["response_ids"]) for row in rows)


def test_plain_rows_are_as_before():
    batch = GroupCollator()([{"prompt_ids": [1, 2], "response_ids": [[3, 4, 5], [3, 4, 6]], "scores": [1, 0]}])
    assert batch["layout"].branches is None
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 2, 3, 4]]
