"""Responses of which some tokens are context: tools' results and users' turns are run, and do not count."""

import math
import random

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.data.lengths import Columns
from alignment.data.report import describe
from tests.engine import FAMILIES, hold_against_plain, losses_of, make, make_model, step
from tests.tiny import SHAPES, rows_of
from trl_nca.chunks import split_batch
from trl_nca.collate import GroupCollator
from trl_nca.columns import checked_rows
from trl_nca.fitting import Limits, fit_row
from trl_nca.logps import response_logps
from trl_nca.losses import LOSSES
from trl_nca.rendering.encoding import Encoded
from trl_nca.rendering.messages import RefusedRow
from trl_nca.token_metrics import TokenMetrics


def masked_rows(shapes=SHAPES, seed=0):
    """Rows of random ids, of which every other one has masks, each with a token that counts."""
    rng, rows = random.Random(seed), rows_of(shapes)
    for row in rows[::2]:
        row["token_masks"] = [[rng.random() < 0.5 for _ in ids] for ids in row["response_ids"]]
        for mask in row["token_masks"]:
            mask[rng.randrange(len(mask))] = True
    return rows


@pytest.mark.parametrize("shared_prompt", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_log_probs_are_those_of_the_tokens_that_count(family, shared_prompt):
    hold_against_plain(make(family), masked_rows(), shared_prompt)


@pytest.mark.parametrize("loss_type", [name for name, loss in LOSSES.items() if loss.num_responses is None])
@pytest.mark.parametrize("settings", [{}, {"normalize": "tokens"}, {"ld_alpha": 0.3}, {"sft_weight": 0.1}])
@pytest.mark.parametrize("shared_prompt", [True, False], ids=["packed", "padded"])
def test_every_loss_is_the_same_in_chunks(loss_type, settings, shared_prompt):
    model = make_model()
    batch = GroupCollator(settings.get("ld_alpha"))(masked_rows())
    results = []
    for most in (None, 20):
        model.zero_grad()
        logps = step(model, batch, loss_type, most, shared_prompt=shared_prompt, **settings)
        results.append([logps, *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def test_implicit_rewards_are_divided_by_the_tokens_that_count():
    (row,) = rows_of([(3, (4, 2))])
    whole = GroupCollator()([row])
    masked = GroupCollator()([row | {"token_masks": [[True, False, False, True], [True, True]]}])
    assert masked["response_lengths"].tolist() == [[2, 2]]
    assert masked["best_length"] == 2
    logps = torch.tensor([[-3.0, -5.0]], dtype=torch.float64)
    by_tokens = [losses_of("NCA", batch, beta=1.0, normalize="tokens")(logps).item() for batch in (whole, masked)]
    assert by_tokens[0] != by_tokens[1]
    assert math.isclose(by_tokens[1], losses_of("NCA", masked, beta=0.5)(logps).item())


def test_tokens_past_the_shortest_response_are_counted_among_those_that_count():
    (row,) = rows_of([(3, (5, 2))])
    row["token_masks"] = [[True, False, True, False, True], [True, True]]
    assert GroupCollator(ld_alpha=0.25)([row])["token_weights"].tolist() == [1, 1, 0.25, 1, 1]


@given(st.lists(st.tuples(st.integers(1, 4), st.lists(st.integers(1, 9), min_size=2, max_size=4)), min_size=1,
                max_size=4), st.integers(1, 40), st.integers(0, 99))  # fmt: skip
@settings(deadline=None)
def test_chunks_hold_every_token_that_counts_once(shapes, most, seed):
    batch = GroupCollator()(masked_rows(shapes, seed))
    chunks = split_batch(batch, most)
    found = {}
    for chunk in chunks:
        layout = chunk["layout"]
        assert len(layout.target_positions) == len(layout.response_index) == len(chunk["targets"])
        for b, (position, target) in zip(layout.response_index.tolist(), zip(
            layout.target_positions.tolist(), chunk["targets"].tolist(), strict=True), strict=True):  # fmt: skip
            found.setdefault(b, []).append(target)
            following = chunk["input_ids"][0, position + 1 :][:1].tolist()
            ends = [r.stop - 1 for _, responses in layout.groups for r in responses]
            assert position in ends or following == [target]
    whole = {}
    for b, target in zip(batch["layout"].response_index.tolist(), batch["targets"].tolist(), strict=True):
        whole.setdefault(b, []).append(target)
    assert found == whole


def test_entropy_and_accuracy_are_of_the_tokens_that_count():
    model, (row,) = make_model(), rows_of([(3, (4, 4))])
    row["token_masks"] = [[True, False, True, False], [False, True, True, True]]
    row["scores"] = [1.0, 0.0]
    batch = GroupCollator()([row])
    metrics = TokenMetrics(batch)
    response_logps(model, batch, True, token_metrics=metrics)
    entropies = []
    for ids, mask in zip(row["response_ids"], row["token_masks"], strict=True):
        logits = model(input_ids=torch.tensor([row["prompt_ids"] + ids])).logits[0, 2:-1]
        entropies += [torch.distributions.Categorical(logits=x).entropy() for x in logits[torch.tensor(mask)]]
    torch.testing.assert_close(metrics.metrics["entropy"], torch.stack(entropies).mean()[None].float())


ALL = [True] * 3


@pytest.mark.parametrize(
    ("masks", "limits", "expected"),
    [
        ([ALL, ALL], {}, ([[1, 2, 3], [4, 5, 6]], None)),
        ([[True, True, False], ALL], {}, ([[1, 2], [4, 5, 6]], None)),
        ([[False, True, False], ALL], {}, ([[1, 2], [4, 5, 6]], [[False, True], ALL])),
        ([[True, False, True], ALL], {"max_length": 4}, ([[1], [4, 5]], None)),
        ([[False, False, True], ALL], {"max_length": 4}, "no token of response 1 counts in what max_length 4"),
        ([ALL, [False] * 3], {}, "no token of response 2 counts"),
    ],
)  # fmt: skip
def test_responses_end_with_a_token_that_counts(masks, limits, expected):
    encoded = Encoded([8, 9], [[1, 2, 3], [4, 5, 6]], masks, [])
    if isinstance(expected, str):
        with pytest.raises(RefusedRow, match=expected) as refused:
            fit_row(encoded, [1.0, 0.0], None, Limits(**limits))
        assert refused.value.reason == "no_scored_token"
    else:
        row = fit_row(encoded, [1.0, 0.0], None, Limits(**limits))
        assert (row["response_ids"], row["token_masks"]) == expected


def test_the_same_tokens_that_count_otherwise_are_two_responses():
    same = [1, 2, 3]
    masks = [[False, True, True], ALL, [False, True, True]]
    row = fit_row(Encoded([9], [same] * 3, masks, []), [1.0, 0.0, 0.5], None, Limits())
    assert row["token_masks"] == [[False, True, True], ALL]
    assert row["scores"] == [0.75, 0.0]


@pytest.mark.parametrize(
    ("masks", "fault"),
    [
        ([[True], [True, False]], "does not have a bool for each token"),
        ([[True, True]], "does not have a bool for each token"),
        ([[False, False], [True]], "no token of a response counts"),
        ([[False, True], [True]], None),
        (None, None),
    ],
)
def test_masks_of_tokenized_rows_are_checked(masks, fault):
    row = {"prompt_ids": [1], "response_ids": [[2, 3], [4]], "scores": [1.0, 0.0], "location": "row 1"}
    rows = Dataset.from_list([row | {"token_masks": [[True, True], [True]]}, row | {"token_masks": masks}])
    if fault is None:
        assert len(checked_rows(rows, "train")) == 2
    else:
        with pytest.raises(ValueError, match=fault):
            checked_rows(rows, "train")


def test_lengths_in_the_report_are_of_the_tokens_that_count():
    rows = [{"prompt_ids": [1, 2], "response_ids": [[3, 4, 5], [6]], "token_masks": masks, "scores": [1.0, 0.0]}
            for masks in (None, [[True, False, True], [True]], None, [[False, False, True], [True]])]  # fmt: skip
    columns = Columns.of_tokens(Dataset.from_list(rows))
    assert columns.response_lengths.tolist() == [3, 1, 2, 1, 3, 1, 1, 1]
    assert columns.context_lengths.tolist() == [0, 0, 1, 0, 0, 0, 2, 0]
    assert describe(columns)["lengths"]["context"]["max"] == 2
    columns = Columns.of_tokens(Dataset.from_list(rows).remove_columns("token_masks"))
    assert columns.response_lengths.tolist() == [3, 1] * 4
    assert "context" not in describe(columns)["lengths"]
