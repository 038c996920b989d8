"""The numbers of a data set: scores, and lengths of prompts and responses.

N rows, K responses of a row, all responses of all rows one behind the other in the flat arrays.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from alignment.data.row import Response
from alignment.data.stored import are_messages, decoded
from alignment.data.texts import texts_in


@dataclass
class Columns:
    """The numbers of a data set.

    Attributes:
        scores: Shape (sum of K,).
        response_lengths: Of the responses, as far as they count. Shape (sum of K,).
        prompt_lengths: Shape (N,).
        num_responses: K of each row. Shape (N,).
        unit: Unit of the lengths: tokens or characters.
        context_lengths: Of what is in the responses and does not count. Shape (sum of K,). None: all counts.
    """

    scores: np.ndarray
    response_lengths: np.ndarray
    prompt_lengths: np.ndarray
    num_responses: np.ndarray
    unit: str
    context_lengths: np.ndarray | None = None

    @classmethod
    def of_tokens(cls, rows: Dataset) -> "Columns":
        """From rows with `prompt_ids`, `response_ids`, `scores` and, where not all tokens count, `token_masks`."""
        scores, responses, contexts, prompts = [], [], [], []
        names = [name for name in ("scores", "response_ids", "prompt_ids", "token_masks") if name in rows.column_names]
        for table in rows.select_columns(names).with_format("arrow").iter(10_000):
            for part in table.to_batches():  # of the lists their ends alone: the ids are not read from the disk
                scores.append(part["scores"])
                lengths = part["response_ids"].flatten().value_lengths().to_numpy()
                masks = part["token_masks"] if "token_masks" in names else pa.nulls(len(part), pa.list_(pa.null()))
                responses.append(_scored_lengths(part["response_ids"], masks))
                contexts.append(lengths - responses[-1])
                prompts.append(part["prompt_ids"].value_lengths().to_numpy())
        return cls._of(scores, responses, contexts, prompts, "tokens")

    @classmethod
    def of_texts(cls, rows: Dataset) -> "Columns":
        """From rows with `prompt`, `responses` and `scores`; lengths are in characters."""
        scores, responses, contexts, prompts = [], [], [], []
        for table in rows.select_columns(["scores", "responses", "prompt"]).with_format("arrow").iter(10_000):
            part = {name: table[name].combine_chunks() for name in table.column_names}
            scores.append(part["scores"])
            flat = part["responses"].flatten()
            lengths = pc.utf8_length(flat).to_numpy(zero_copy_only=False).copy()
            context = np.zeros_like(lengths)
            for i in np.flatnonzero(are_messages(flat)):
                lengths[i], context[i] = _characters(decoded(flat[i].as_py()))
            responses.append(lengths)
            contexts.append(context)
            turns = pc.utf8_length(part["prompt"].flatten().field("content")).to_numpy()
            ends = np.cumsum(part["prompt"].value_lengths().to_numpy())
            prompts.append(np.diff(np.r_[0, np.cumsum(turns)][np.r_[0, ends]]))
        return cls._of(scores, responses, contexts, prompts, "characters")

    @classmethod
    def _of(
        cls,
        scores: list[Any],
        responses: list[np.ndarray],
        contexts: list[np.ndarray],
        prompts: list[np.ndarray],
        unit: str,
    ) -> "Columns":
        return cls(
            scores=np.concatenate([s.flatten().to_numpy() for s in scores]),
            response_lengths=np.concatenate(responses),
            context_lengths=np.concatenate(contexts),
            prompt_lengths=np.concatenate(prompts),
            num_responses=np.concatenate([s.value_lengths().to_numpy() for s in scores]),
            unit=unit,
        )


def _scored_lengths(responses: pa.ListArray, masks: pa.ListArray) -> np.ndarray:
    """Tokens that count of all responses of a chunk: all of them in rows without a mask."""
    lengths = responses.flatten().value_lengths().to_numpy().copy()
    if masks.null_count < len(masks):
        in_masks = pc.fill_null(pc.list_value_length(masks), 0).to_numpy(zero_copy_only=False)
        owner = np.repeat(in_masks > 0, responses.value_lengths().to_numpy())
        flat = masks.drop_null().flatten()
        sums = np.r_[0, np.cumsum(flat.flatten().to_numpy(zero_copy_only=False))]
        ends = np.cumsum(flat.value_lengths().to_numpy())
        lengths[owner] = np.diff(sums[np.r_[0, ends]])
    return lengths


def _characters(response: Response) -> tuple[int, int]:
    """Characters of the assistant's turns, and of the others."""
    turns = response if isinstance(response, list) else [{"role": "assistant", "content": response}]
    lengths = [sum(map(len, texts_in([[turn]]))) for turn in turns]
    of_assistant = sum(n for turn, n in zip(turns, lengths, strict=True) if turn["role"] == "assistant")
    return of_assistant, sum(lengths) - of_assistant
