"""Batches of groups, packed: no padding, one copy of each prompt.

Legend: B prompts, K responses (the largest of the batch), T packed tokens, R response tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_nca.layout import GroupLayout


@dataclass
class GroupCollator:
    """Packs groups into one row of tokens, prompt-major: prompt 0, its responses, prompt 1, its responses, ...

    A response is run from the prompt's last token, which predicts its first, to its own last but one. So each prompt is
    there once but for that token, every position of a response predicts one target, and no position is run in vain.
    Positions restart after the prompt: each response continues it as if it were the only one.

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
    """

    #: Weight of the tokens past the end of a prompt's shortest response; None: all count alike.
    ld_alpha: float | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Collates rows of the tokenized data set.

        Args:
            rows: Each with `prompt_ids` (ints, at least one), `response_ids` (K lists of ints), `scores` (K numbers)
                and, where the reference was precomputed, `ref_logps` (K numbers); also `weight` (a number, or None
                for 1), where the data have it, and `location`, the row's place in its file.

        Returns:
            `scores` (float64), `response_mask` (bool) and `response_lengths`, shape (B, K), padded with 0 and False;
            `input_ids` and `position_ids`, shape (1, T); `targets`, the tokens of all responses, shape (R,);
            `token_weights`, float32, shape (R,), with `ld_alpha`;
            `ref_logps`, shape (B, K), and `weight` (float32), shape (B,), where the rows have them;
            `best_length`, tokens of the responses with the highest scores, together;
            `layout`, a `GroupLayout`: the lengths of contexts and responses, on the CPU;
            `location`, B texts to name the rows by.
        """
        input_ids: list[int] = []
        position_ids: list[int] = []
        targets: list[int] = []
        for row in rows:
            *context, last = row["prompt_ids"]
            input_ids += context
            position_ids += range(len(context))
            for response in row["response_ids"]:
                input_ids += [last, *response[:-1]]
                position_ids += range(len(context), len(context) + len(response))
                targets += response
        response_lengths = _padded([[len(r) for r in row["response_ids"]] for row in rows], torch.long)
        layout = GroupLayout([len(row["prompt_ids"]) - 1 for row in rows], response_lengths.tolist())
        batch: dict[str, Any] = {
            # First in the batch: the Trainer takes the number of examples from the first tensor it meets.
            "scores": _padded([row["scores"] for row in rows], torch.float64),
            "response_mask": response_lengths > 0,
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
        batch["best_length"] = sum(len(row["response_ids"][row["scores"].index(max(row["scores"]))]) for row in rows)
        return batch | {"layout": layout, "location": [row.get("location", "") for row in rows]}


def _token_weights(row: dict[str, Any], ld_alpha: float) -> Iterator[float]:
    """1 for each token of the row's responses, `ld_alpha` past the length of the shortest."""
    shortest = min(len(response) for response in row["response_ids"])
    for response in row["response_ids"]:
        yield from (1.0 if t < shortest else ld_alpha for t in range(len(response)))


def _padded(rows: list[list[Any]], dtype: torch.dtype) -> Tensor:
    """Ragged rows to a tensor padded with 0. Shape (B, K)."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=dtype)
