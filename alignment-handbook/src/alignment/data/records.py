"""Rows of one response each: read alone, and joined to a row in list form by their prompt."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Features, List, Value

from alignment.data.columns import other_columns, rename
from alignment.data.formats import as_record, unwrap
from alignment.data.row import BadRow, Row, named, prompt_hash, storable

#: A record of one response, before those of one prompt are joined.
RECORD_FEATURES = Features(
    {
        "key": Value("int64"),
        "record": Value("string"),
        "dropped": Value("string"),
        "location": Value("string"),
        "noted": List(Value("string")),
        "columns": Value("string"),  # the row's other columns, as a JSON object, where they are kept
    }
)
#: Groups of records in a piece.
_PIECE_GROUPS = 10_000


def record_of(
    row: Any,
    location: str,
    columns: dict[str, Any] | None,
    score: str,
    drop_sources: list[str] | None,
    keep_columns: bool = False,
) -> dict[str, Any]:
    """A row of `RECORD_FEATURES` of a raw row, or of the `BadRow` that reading it gave.

    Args:
        row: The row.
        location: Its place, as a user would name it.
        columns, score, drop_sources: See `groups.RowConfig`.
        keep_columns: Keep the row's other columns.
    """
    found: list[str] = []
    others = ""
    try:
        if isinstance(row, BadRow):
            raise row
        others = other_columns(unwrap(row)) if keep_columns and isinstance(row, dict) else ""
        renamed, found = rename(unwrap(row), columns) if isinstance(row, dict) else ({}, [])
        if renamed.get("source") in (drop_sources or []):
            raise BadRow("dropped_source", str(renamed["source"]))
        record = as_record(renamed, score)
        if record is None:
            raise BadRow("unknown_format", "the rows before it have a response each, and this one has none")
        noted = [note for note in record.pop("noted") if note != "column source" or not drop_sources]
        outcome = {"key": record_key(record), "record": json.dumps(record), "dropped": "", "noted": noted}
    except (BadRow, RecursionError) as error:
        bad = error if isinstance(error, BadRow) else BadRow("not_json", "nested too deep")
        # A key of its own: it belongs to no other line.
        key = -1 - prompt_hash([{"location": location}])
        outcome = {"key": key, "record": storable(bad.detail), "dropped": bad.reason, "noted": []}
    noted = [*map(storable, outcome["noted"]), *named(found)]
    return outcome | {"location": location, "noted": noted, "columns": others}


def record_key(record: Row) -> int:
    """A hash of what records are joined by, 63 bits: the `prompt_id`, else all that the answer is given to."""
    key = record["prompt"] if record["id"] is None else ["id", record["id"]]
    for name in ("system", "tools", "chat_template_kwargs"):
        key = key if record["id"] is not None or record[name] is None else [name, record[name], key]
    return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:8], "big") >> 1


def cut_groups(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of the records of each group, groups in the order of their first record, cut into pieces.

    Yields:
        Rows of all records of a piece, and where each group begins in them.
    """
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.r_[True, keys[order][1:] != keys[order][:-1]])
    groups = np.split(order, starts[1:])
    groups = [groups[g] for g in np.argsort(order[starts], kind="stable")]
    for at in range(0, len(starts), _PIECE_GROUPS):
        part = groups[at : at + _PIECE_GROUPS]
        yield np.concatenate(part), np.cumsum([0, *map(len, part[:-1])])


def gather(records: list[Row]) -> Row:
    """Joins the records of one prompt (see `formats.as_record`) to a row in list form.

    Raises:
        BadRow: Their prompts or their weights differ.
    """
    of_prompt = {}
    for name in ("prompt", "system", "tools", "chat_template_kwargs"):
        given = [record[name] for record in records if record[name] is not None]
        if any(value != given[0] for value in given):
            raise BadRow("prompts_differ", f"one prompt_id has two of {name}")
        of_prompt[name] = given[0] if given else None
    weights = [record["weight"] for record in records if record["weight"] is not None]
    if any(weight != weights[0] for weight in weights):
        raise BadRow("bad_weight", f"the rows of one prompt have the weights {weights[0]!r} and others")
    return of_prompt | {
        "responses": [record["response"] for record in records],
        "scores": [record["score"] for record in records],
        "weight": weights[0] if weights else None,
    }
