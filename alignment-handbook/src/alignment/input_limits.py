"""What a model can read: tokens that it has embeddings for, and lengths that it has positions for."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedModel

from alignment.errors import UserError

#: Names of tables that have a row for each position, in the families that have such tables.
_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|positions?_embed\w*)(\.weight)?$")


def position_table(model: PreTrainedModel) -> int | None:
    """The most tokens that a model has positions for; None where it computes them, and can go on (rotary positions).

    Learned positions (GPT-2, OPT, BERT) and tables of rotations (GPT-J) end in an index out of range.
    """
    if getattr(model.config.get_text_config(), "rope_parameters", None):  # a table may be that of its images
        return None
    tables = [(name, t) for name, t in [*model.named_parameters(), *model.named_buffers()] if _POSITIONS.search(name)]
    sizes = [len(table) - _rows_before(model, name) for name, table in tables if table.ndim == 2]
    return min(sizes, default=None)


def _rows_before(model: PreTrainedModel, name: str) -> int:
    """Rows of a table of positions before that of the first token: OPT's offset, RoBERTa's padding."""
    module = model.get_submodule(name.rpartition(".")[0])
    padding = getattr(module, "padding_idx", None)
    return getattr(module, "offset", 0 if padding is None else padding + 1)


class InputLimits(NamedTuple):
    """What a model can read.

    Attributes:
        tokens: Ids below this have an embedding; None where that is not known.
        positions: See `position_table`.
    """

    tokens: int | None
    positions: int | None


def input_limits(model: PreTrainedModel) -> InputLimits:
    """What a model can read; beyond it there is an index out of range, which on a GPU ends the process unexplained."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # by what a family says that has them in no one place
        weight = None
    return InputLimits(None if weight is None else len(weight), position_table(model))


def check_input(limits: InputLimits, ids: Sequence[int], num_new: int, what: str, fix: str) -> None:
    """Refuses tokens that a model cannot read.

    Args:
        limits: From `input_limits`.
        ids: Tokens of the input.
        num_new: Tokens that may be generated after them.
        what: What the tokens are, for the error.
        fix: What to do about too many.

    Raises:
        UserError: A token has no embedding, or there are more than the model has positions for.
    """
    if limits.tokens is not None and max(ids, default=0) >= limits.tokens:
        raise UserError(
            f"{what}: token {max(ids)} has no embedding: the model has {limits.tokens}; take its own tokenizer and "
            "chat template"
        )
    if limits.positions is not None and len(ids) + num_new > limits.positions:
        more = f" and {num_new} to generate" if num_new else ""
        raise UserError(f"{what}: {len(ids)} tokens{more}, and the model has {limits.positions} positions; {fix}")
