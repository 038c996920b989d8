"""Rows against the model: tokens that it has embeddings for, and lengths that it has positions for."""

import logging
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from alignment.data.reading import column
from alignment.errors import UserError
from alignment.input_limits import position_table

logger = logging.getLogger(__name__)

#: Rows that are looked at together: Arrow counts the tokens of an array in 32 bits.
_PIECE = 50_000


class Extremes(NamedTuple):
    """The largest token id of tokenized rows, their longest prompt + response, and the places of both."""

    token: int
    token_row: int
    length: int
    length_row: int


def check_limits(rows: dict[str, Dataset], config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Ends a run whose rows the model cannot read; on a GPU, an index out of range says nothing of its reason.

    Args:
        rows: Tokenized rows, by `train` and `eval`.
        config: The model's config.
        tokenizer: The policy's tokenizer.

    Raises:
        UserError: A token has no embedding, or a row is longer than the model's table of positions.
    """
    text = config.get_text_config()
    vocabulary, trained_on = getattr(text, "vocab_size", None), getattr(text, "max_position_embeddings", None)
    table = _position_table(config)
    for name, dataset in rows.items():
        if not len(dataset):
            continue
        found = extremes(dataset)
        if vocabulary is not None and found.token >= vocabulary:
            raise UserError(
                f"{dataset[found.token_row]['location']}: token {found.token} "
                f"({tokenizer.convert_ids_to_tokens(found.token)!r}) has no embedding: the model has {vocabulary}, the "
                f"tokenizer {len(tokenizer)} tokens; take the model's own tokenizer and chat template, or save the "
                "model after resize_token_embeddings(len(tokenizer))"
            )
        if table is not None and found.length > table:
            raise UserError(
                f"{dataset[found.length_row]['location']}: {found.length} tokens of prompt and response, and the model "
                f"has {table} positions (max_position_embeddings); set --max_length={table} or less"
            )
        if trained_on and found.length > trained_on and not _is_scaled(getattr(text, "rope_parameters", None)):
            logger.warning(
                "!!! %s: the longest row has %d tokens, and the model was made for %d positions "
                "(max_position_embeddings); set --max_length=%d, or rope_parameters in its config.json",
                name, found.length, trained_on, trained_on,
            )  # fmt: skip


def extremes(rows: Dataset) -> Extremes:
    """What in tokenized rows is largest, and where.

    Args:
        rows: At least one, with columns `prompt_ids` (a list a row) and `response_ids` (K lists a row).
    """
    pieces = range(0, len(rows), _PIECE)
    found = [_extremes(rows.select(range(start, min(start + _PIECE, len(rows)))), start) for start in pieces]
    longest = max(found, key=lambda piece: piece.length)
    return max(found)._replace(length=longest.length, length_row=longest.length_row)


def _extremes(rows: Dataset, start: int) -> Extremes:
    """The same of a few rows, the first of which is row `start`; over Arrow's arrays, for speed."""
    prompts, responses = column(rows, "prompt_ids"), column(rows, "response_ids")
    longest = np.zeros(len(rows), dtype=np.int64)
    response_rows = pc.list_parent_indices(responses).to_numpy()
    np.maximum.at(longest, response_rows, pc.list_value_length(responses.flatten()).to_numpy())
    lengths = pc.list_value_length(prompts).to_numpy() + longest
    of_responses = responses.flatten()
    token, row = max(
        _largest(prompts.flatten(), pc.list_parent_indices(prompts).to_numpy()),
        _largest(of_responses.flatten(), response_rows[pc.list_parent_indices(of_responses).to_numpy()]),
    )
    return Extremes(token, start + row, int(lengths.max()), start + int(lengths.argmax()))


def _largest(ids: Any, rows: np.ndarray) -> tuple[int, int]:
    """The largest of token ids, and its row; -1 where there are none."""
    ids = ids.to_numpy()
    return (int(ids.max()), int(rows[ids.argmax()])) if len(ids) else (-1, -1)


def _position_table(config: PretrainedConfig) -> int | None:
    """See `input_limits.position_table`; of a model that is built without memory, where that can be done."""
    has_none = getattr(config.get_text_config(), "rope_parameters", None)
    if has_none or hasattr(config, "auto_map") or is_deepspeed_zero3_enabled():  # which would partition it
        return None
    try:
        with torch.device("meta"):
            return position_table(AutoModelForCausalLM.from_config(config))
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError):  # the real one's loading says why
        return None


def _is_scaled(rope: Any) -> bool:
    """Whether rotary positions are scaled to a longer text than the model was first trained on."""
    if not isinstance(rope, dict):
        return False
    return rope.get("rope_type", "default") != "default" or any(map(_is_scaled, rope.values()))
