"""Batches of groups, packed: no padding, one copy of each prompt.

Legend: B prompts, K responses (the largest of the batch), T packed tokens, R response tokens that count.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_nca.layout import Branch, GroupLayout, Spans

#: Tokens at the beginning of two responses that are worth a part of its own in attention.
_LEAST_SHARED = 8


@dataclass
class GroupCollator:
    """Packs groups into one row of tokens, prompt-major: prompt 0, its responses, prompt 1, its responses, ...

    A response is run from the prompt's last token, which predicts its first, to its own last but one. So each prompt is
    there once but for that token, every position of a response predicts one target, and no position is run in vain.
    Positions restart after the prompt: each response continues it as if it were the only one. Responses that begin with
    the same tokens, as trajectories with the same call do, run these once: see `find_branches`.

    Example:
        >>> rows = [
        ...     {"prompt_ids": [1, 2], "response_ids": [[3, 4], [5]], "scores": [0.9, 0.1]},
        ...     {"prompt_ids": [6], "response_ids": [[7], [8], [9]], "scores": [1.0, 2.0, 3.0]},
        ... ]
        >>> batch = GroupCollator()(rows)
        >>> batch["input_ids"]
        tensor([[1, 2, 3, 2, 6, 6, 6]])
        >>> batch["position_ids"]
        tensor([[0, 1, 2, 1, 0, 0, 0]])
        >>> batch["targets"]
        tensor([3, 4, 5, 7, 8, 9])
        >>> batch["layout"].context_lengths, batch["layout"].response_lengths
        ([1, 0], [[2, 1, 0], [1, 1, 1]])
        >>> batch["scores"]
        tensor([[0.9000, 0.1000, 0.0000],
                [1.0000, 2.0000, 3.0000]], dtype=torch.float64)
        >>> rows[0]["token_masks"] = [[False, True], [True]]  # its token 3 is context: what a tool returned
        >>> GroupCollator()(rows[:1])["targets"]
        tensor([4, 5])
    """

    #: Weight of the tokens past the end of a prompt's shortest response; None: all count alike.
    ld_alpha: float | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Collates rows of the tokenized data set.

        Args:
            rows: Each with `prompt_ids` (ints, at least one), `response_ids` (K lists of ints), `scores` (K numbers)
                and, where not all tokens of the responses count, `token_masks` (K lists of bools, or None); where the
                reference was precomputed, `ref_logps` (K numbers); also `weight` (a number, or None for 1), where the
                data have it, and `location`, the row's place in its file.

        Returns:
            `scores` (float64), `response_mask` (bool) and `response_lengths` (the tokens that count), shape (B, K),
            padded with 0 and False; `input_ids` and `position_ids`, shape (1, T); `targets`, the tokens of all
            responses that count, shape (R,); `token_weights`, float32, shape (R,), with `ld_alpha`;
            `ref_logps`, shape (B, K), and `weight` (float32), shape (B,), where the rows have them;
            `best_length`, tokens that count of the responses with the highest scores, together;
            `layout`, a `GroupLayout`: the lengths of contexts and responses, and what counts of these, on the CPU;
            `location`, B texts to name the rows by.
        """
        input_ids: list[int] = []
        position_ids: list[int] = []
        targets: list[int] = []
        branches = [find_branches(row["response_ids"]) for row in rows]
        for row, of_row in zip(rows, branches, strict=True):
            *context, last = row["prompt_ids"]
            input_ids += context
            position_ids += range(len(context))
            for response, branch in zip(row["response_ids"], of_row, strict=True):
                start = branch[1] if branch else 0
                input_ids += [last, *response[:-1]][start:]
                position_ids += range(len(context) + start, len(context) + len(response))
            targets += itertools.chain.from_iterable(_scored_tokens(row))
        context_lengths = [len(row["prompt_ids"]) - 1 for row in rows]
        run_lengths = _padded([[len(r) for r in row["response_ids"]] for row in rows], torch.long)  # (B, K)
        scored = [_spans(row, run_lengths.shape[1]) for row in rows] if any(map(_masks, rows)) else None
        layout = GroupLayout(
            context_lengths,
            run_lengths.tolist(),
            scored=scored,
            branches=[_filled(of_row, run_lengths.shape[1]) for of_row in branches]
            if any(map(any, branches))
            else None,
        )
        response_lengths = torch.tensor(layout.num_targets)  # (B, K)
        batch: dict[str, Any] = {
            # First in the batch: the Trainer takes the number of examples from the first tensor it meets.
            "scores": _padded([row["scores"] for row in rows], torch.float64),
            "response_mask": run_lengths > 0,
            "response_lengths": response_lengths,
            "input_ids": torch.tensor([input_ids]),
            "position_ids": torch.tensor([position_ids]),
            "targets": torch.tensor(targets),
        }
        if self.ld_alpha is not None:
            batch["token_weights"] = torch.tensor([w for row in rows for w in _token_weights(row, self.ld_alpha)])
        if "weight" in rows[0]:
            weights = [1.0 if row["weight"] is None else row["weight"] for row in rows]
            batch["weight"] = torch.tensor(weights, dtype=torch.float32)
        if "ref_logps" in rows[0]:
            batch["ref_logps"] = _padded([row["ref_logps"] for row in rows], torch.float32)
        best = [row["scores"].index(max(row["scores"])) for row in rows]
        batch["best_length"] = sum(counts[k] for counts, k in zip(layout.num_targets, best, strict=True))
        return batch | {"layout": layout, "location": [row.get("location", "") for row in rows]}


def find_branches(response_ids: list[list[int]]) -> list[Branch | None]:
    """What each response goes on from: the one before it with which it has the longest beginning in common.

    A position is run once for all responses that are the same up to it; at least one of each response is its own.

    Example:
        >>> find_branches([[*range(20)], [*range(12), 99], [0, 1, 2]])
        [None, (0, 12), None]
    """
    branches: list[Branch | None] = []
    alike: dict[tuple[int, ...], list[int]] = {}  # responses by their first tokens
    for k, ids in enumerate(response_ids):
        others = alike.setdefault((*ids[:_LEAST_SHARED],), [])
        shared = [(_num_shared(response_ids[j], ids), -j) for j in others] if len(ids) > _LEAST_SHARED else []
        most, j = max(shared, default=(0, 0))
        branches.append((-j, most) if most else None)
        others.append(k)
    return branches


def _num_shared(other: list[int], ids: list[int]) -> int:
    """Positions that are run for both: a token's is that before it."""
    num_tokens = next(
        (t for t, (a, b) in enumerate(zip(other, ids, strict=False)) if a != b), min(len(other), len(ids))
    )
    return min(num_tokens + 1, len(other), len(ids) - 1)


def _masks(row: dict[str, Any]) -> list[list[bool]] | None:
    """Which tokens of the row's responses count; None: all do."""
    return row.get("token_masks")


def _scored_tokens(row: dict[str, Any]) -> list[list[int]]:
    """The tokens of each response that count."""
    responses: list[list[int]] = row["response_ids"]
    masks = _masks(row)
    if masks is None:
        return responses
    return [[*itertools.compress(ids, mask)] for ids, mask in zip(responses, masks, strict=True)]


def _spans(row: dict[str, Any], num_responses: int) -> Sequence[Spans]:
    """Spans of the tokens that count, none for responses that the row does not have.

    Example:
        >>> row = {"response_ids": [[3, 4, 5, 6], [7]], "token_masks": [[True, False, True, True], [True]]}
        >>> _spans(row, 3)
        [[(0, 1), (2, 4)], [(0, 1)], []]
    """
    masks = _masks(row) or [[True] * len(ids) for ids in row["response_ids"]]
    spans = []
    for mask in masks:
        runs = [(counts, len([*tokens])) for counts, tokens in itertools.groupby(mask)]
        stops = itertools.accumulate(length for _, length in runs)
        spans.append([(stop - n, stop) for (counts, n), stop in zip(runs, stops, strict=True) if counts])
    return _filled(spans, num_responses, [])


def _filled(values: list[Any], length: int, value: Any = None) -> list[Any]:
    return values + [value] * (length - len(values))


def _token_weights(row: dict[str, Any], ld_alpha: float) -> Iterator[float]:
    """1 for each token of the row's responses that counts, `ld_alpha` past the length of the shortest."""
    lengths = [len(tokens) for tokens in _scored_tokens(row)]
    shortest = min(lengths)
    for length in lengths:
        yield from (1.0 if t < shortest else ld_alpha for t in range(length))


def _padded(rows: list[list[Any]], dtype: torch.dtype) -> Tensor:
    """Ragged rows to a tensor padded with 0. Shape (B, K)."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=dtype)
