"""Counts the outcome of each row that was read, and ends the run where too many were dropped."""

from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from alignment.data.columns import paths_of
from alignment.data.groups import RowConfig
from alignment.data.reading import column
from alignment.data.stored import has_messages
from alignment.errors import UserError

#: Columns that plain rows do not have.
OPTIONAL = ("tools", "chat_template_kwargs", "weight")
#: Rows that the report names for a reason.
_EXAMPLES = 3


def count_outcomes(rows: Dataset) -> dict[str, Any]:
    """Counts what happened to the rows of `load_source`.

    Returns:
        `lines_in` (of the source), `rows_in` (groups or pairs made of them, and what was dropped), `rows_dropped`,
        `dropped_by_reason`, `fixed_by_reason` (a kept row may count under several), `examples` (where the first rows
        of each reason stand), `repeated_prompts` (kept rows whose prompt an earlier one has), `noted` (what rows have
        that is not read, and what looks rendered; see `Group`).
    """
    dropped = column(rows, "dropped")
    reasons = {v["values"]: v["counts"] for v in pc.value_counts(dropped).to_pylist() if v["values"]}
    examples = {}
    for reason in reasons:
        at = np.flatnonzero(pc.equal(dropped, reason).to_numpy(zero_copy_only=False))[:_EXAMPLES]
        examples[reason] = [f"{row['location']}: {row['detail']}" for row in rows.select(at)]
    fixed = pc.value_counts(pc.list_flatten(column(rows, "fixed"))).to_pylist()
    hashes = column(kept_rows(rows), "prompt_hash").to_numpy()
    return {
        "lines_in": pc.sum(column(rows, "lines")).as_py() or 0,
        "rows_in": len(rows),
        "rows_dropped": sum(reasons.values()),
        "dropped_by_reason": reasons,
        "fixed_by_reason": {v["values"]: v["counts"] for v in fixed},
        "repeated_prompts": len(hashes) - len(np.unique(hashes)),
        "noted": {note: n for note, n in _count_notes(rows).items() if not note.startswith("named ")},
        "examples": examples,
    }


def check_columns(parts: list[Dataset], config: RowConfig) -> None:
    """Ends the run where the key `columns` names a column that no row has.

    Args:
        parts: Rows of `load_source`.
        config: How they were read.

    Raises:
        UserError: No row has one of the columns.
    """
    paths = paths_of(config.columns)
    found = {note for part in parts for note in _count_notes(part)} if paths else set()
    for path in paths:
        if f"named {path}" not in found:
            details = [f"; {part[0]['location']}: {part[0]['detail']}" for part in parts if len(part)]
            raise UserError(f"columns: no row has {path!r}{''.join(details[:1])}: change the key")


def _count_notes(rows: Dataset) -> dict[str, int]:
    notes = pc.value_counts(pc.list_flatten(column(rows, "noted"))).to_pylist()
    return {v["values"]: v["counts"] for v in notes}


def check_dropped(name: str, counts: dict[str, Any], max_fraction: float) -> None:
    """Ends the run when too many rows were dropped.

    Args:
        name: Name of the data set.
        counts: `rows_in`, `rows_dropped`, `dropped_by_reason` and, where known, `examples`.
        most: Largest share of the rows that may be dropped.

    Raises:
        UserError: More were, or none is left.
    """
    num_in, num_dropped = counts["rows_in"], counts["rows_dropped"]
    if num_dropped < num_in and num_dropped <= max_fraction * num_in:
        return
    reasons = ", ".join(f"{reason} {n}" for reason, n in counts["dropped_by_reason"].items())
    examples = [example for found in counts.get("examples", {}).values() for example in found[:1]]
    limit = f", more than max_dropped_fraction {max_fraction:g} allows" if num_dropped < num_in else ""
    raise UserError(
        f"{name}: {num_dropped} of {num_in} rows had to be dropped ({reasons}){limit}{': ' if examples else ''}"
        f"{'; '.join(examples)}. Fix the rows, or change row_rules or the limit"
    )


def check_template(rows: Dataset, template: str | None) -> None:
    """Checks that there is a chat template where rows need one.

    Args:
        rows: From `load_groups`.
        template: The tokenizer's chat template, if it has one.

    Raises:
        UserError: A prompt has several turns, and there is none; names the row.
    """
    if template is not None:
        return
    is_talk = pc.list_value_length(column(rows, "prompt")).to_numpy() > 1
    turns = np.flatnonzero(is_talk | has_messages(column(rows, "responses")))
    if len(turns):
        row = rows[int(turns[0])]
        what = (
            f"prompt of {row['location']} has {len(row['prompt'])}"
            if is_talk[turns[0]]
            else (f"responses of {row['location']} have several")
        )
        raise UserError(
            f"chat_template: the tokenizer has none, and the {what} messages; set chat_template to a Jinja template or "
            "a .jinja file"
        )


def kept_rows(rows: Dataset) -> Dataset:
    """The rows of `load_source` that were not dropped, without the columns of `OPTIONAL` that none of them has."""
    is_kept = pc.equal(column(rows, "dropped"), "").to_numpy(zero_copy_only=False)
    kept = rows if is_kept.all() else rows.select(np.flatnonzero(is_kept))
    return kept.remove_columns([name for name in OPTIONAL if column(kept, name).null_count == len(kept)])
