"""Packing and metrics. Imports torch only."""

import math

import pytest
import torch

from trl_nca.collate import GroupCollator
from trl_nca.metrics import group_metrics


def test_rows_are_prompt_major_and_positions_restart():
    rows = [
        {"prompt_ids": [10, 11], "response_ids": [[1], [2, 3], [4]], "scores": [1, 2, 3]},
        {"prompt_ids": [12], "response_ids": [[5, 6], [7]], "scores": [4, 5]},
    ]
    batch = GroupCollator()(rows)
    assert batch["input_ids"].tolist() == [[10, 11, 11, 2, 11, 12, 5, 12]]
    assert batch["position_ids"].tolist() == [[0, 1, 1, 2, 1, 0, 1, 0]]
    assert batch["targets"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch["layout"].context_lengths == [1, 0]
    assert batch["layout"].response_lengths == [[1, 2, 1], [2, 1, 0]]
    assert batch["response_mask"].tolist() == [[True, True, True], [True, True, False]]
    assert batch["scores"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert next(iter(batch)) == "scores"  # the Trainer counts examples by the first tensor
    assert "ref_logps" not in batch


def test_cached_reference_comes_along():
    rows = [
        {"prompt_ids": [1], "response_ids": [[1], [2]], "scores": [1, 2], "ref_logps": [-1.5, -2.5]},
        {"prompt_ids": [1], "response_ids": [[1], [2], [3]], "scores": [1, 2, 3], "ref_logps": [-1.0, -2.0, -3.0]},
    ]
    assert GroupCollator()(rows)["ref_logps"].tolist() == [[-1.5, -2.5, 0.0], [-1.0, -2.0, -3.0]]


def metrics_of(rewards, scores, mask=None):
    rewards, scores = torch.tensor(rewards), torch.tensor(scores, dtype=torch.float64)
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return group_metrics(torch.zeros(len(scores)), rewards, 10 * rewards, scores, mask)


def test_chosen_is_the_best_score_and_rejected_the_mean_of_the_rest():
    metrics = metrics_of([[1.0, 2.0, 6.0]], [[0.5, 0.9, 0.1]])
    assert metrics["rewards/chosen"].item() == 2
    assert metrics["rewards/rejected"].item() == 3.5
    assert metrics["rewards/margins"].item() == -1.5
    assert metrics["rewards/accuracies"].item() == 0.5  # beats 1, not 6
    assert metrics["logps/chosen"].item() == 20
    assert metrics["logps/rejected"].item() == 35
    assert [metrics[f"rewards/rank_{k}"].item() for k in range(3)] == [2, 1, 6]


def test_padded_responses_count_nowhere():
    metrics = metrics_of([[3.0, 1.0, 99.0]], [[0.1, 0.2, 0.9]], [[True, True, False]])
    assert metrics["rewards/chosen"].item() == 1
    assert metrics["rewards/rejected"].item() == 3
    assert metrics["rewards/accuracies"].item() == 0
    assert math.isnan(metrics["rewards/rank_2"].item())


@pytest.mark.parametrize(
    ("rewards", "accuracy"),
    [([[0.0, 0.0, 0.0, 0.0]], 0.5), ([[2.0, 2.0, 1.0, 3.0]], 0.5), ([[2.0, 2.0, 1.0, 1.0]], 5 / 6)],
)
def test_a_tie_counts_a_half(rewards, accuracy):
    assert metrics_of(rewards, [[9.0, 3.0, 2.0, 1.0]])["rewards/accuracies"].item() == pytest.approx(accuracy)


@pytest.mark.parametrize("tied", [[[0.7, 0.7]], [[0.0, 0.0]]])
def test_first_of_tied_scores_is_chosen(tied):
    assert metrics_of([[5.0, 4.0]], tied)["rewards/chosen"].item() == 5
