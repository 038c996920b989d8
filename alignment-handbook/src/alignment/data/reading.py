"""Reads sources into data sets of groups: in pieces, on several processes, each cached under a key of all its inputs.

A second run reads nothing again, a killed one resumes with the pieces that are missing, and memory does not grow with
the number of rows. Rows of one response each are first joined by their prompt.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.exceptions import DatasetGenerationError
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm.auto import tqdm

from alignment.data.columns import common_columns, other_columns, rename, text_columns
from alignment.data.formats import as_record, unwrap
from alignment.data.groups import GroupReader, RowConfig
from alignment.data.records import RECORD_FEATURES, cut_groups, gather, record_of
from alignment.data.row import BadRow, FailedRow, named, prompt_hash, storable
from alignment.data.sources import Piece, open_source, read_piece
from alignment.data.stored import StoredMessages, StoredResponses
from alignment.errors import UserError
from trl_nca.code_hash import code_hash

#: A row once it is read: K responses to one prompt, K >= 2, and their scores; or why it was dropped.
GROUP_FEATURES = Features(
    {
        "prompt": StoredMessages(),
        "responses": StoredResponses(),
        "tools": Value("string"),  # as JSON; null where the row has none
        "chat_template_kwargs": Value("string"),  # likewise
        "scores": List(Value("float64")),
        "weight": Value("float64"),  # null where the row does not say
        "prompt_hash": Value("int64"),
        "fixed": List(Value("string")),
        "dropped": Value("string"),  # a reason, or "" for a row to train on
        "detail": Value("string"),
        "location": Value("string"),
        "lines": Value("int32"),  # lines of the source; 0 for all pairs of a row but the first
        "columns": Value("string"),  # the row's other columns, as a JSON object, where they are kept
        "noted": List(Value("string")),  # what the report says of the row, see `Group`; none for pairs but the first
    }
)


def load_source(
    path: str,
    split: str | None = None,
    name: str | None = None,
    *,
    config: RowConfig,
    pairs: bool = False,
    unscored_pairs: bool = False,
    control_tokens: list[str] | None = None,
    num_proc: int | None = None,
    keep_columns: bool = False,
) -> Dataset:
    """All rows of a source, those that are dropped too, with the columns of `GROUP_FEATURES`.

    Args:
        path: A file, a folder or a Hub id.
        split: Split of a folder or Hub data set.
        name: Configuration of a Hub data set.
        config: How rows are read.
        unscored_pairs: Read `chosen` and `rejected` without scores as 1 and 0.
        pairs, control_tokens, num_proc, keep_columns: See `load_groups`.

    Raises:
        UserError: See `load_groups`.
    """
    settings = {
        "config": {f.name: getattr(config, f.name) for f in fields(RowConfig)},
        "pairs": pairs,
        "unscored_pairs": unscored_pairs,
        "control_tokens": sorted(control_tokens or []),
        "keep_columns": keep_columns,
        "code": code_hash([__name__]),
    }
    pieces = open_source(path, split, name)
    how = {name: settings["config"][name] for name in ("columns", "score", "drop_sources")}
    how["keep_columns"] = keep_columns
    in_parallel = partial(_in_parallel, desc=f"Reading {path}", num_proc=num_proc)
    if _has_records(pieces, how):
        records = in_parallel([partial(_build_records, piece, how, settings["code"]) for piece in pieces])
        builds = [
            partial(_build_gathered, records, *part, settings) for part in cut_groups(column(records, "key").to_numpy())
        ]
    else:
        builds = [partial(_build_groups, piece, settings) for piece in pieces]
    rows = in_parallel(builds) if builds else []
    if not len(rows):
        raise UserError(f"{path}: no rows{f' in split {split}' if split else ''}; give a file that has some")
    return rows


def _has_records(pieces: list[Piece], how: dict[str, Any]) -> bool:
    """Whether a source has a row a response: its first readable row says so."""
    for piece in pieces[:1]:
        for _, row in read_piece(piece, text_columns(how["columns"])):
            if isinstance(row, dict):
                try:
                    return as_record(rename(unwrap(row), how["columns"])[0], how["score"]) is not None
                except BadRow:
                    return True
                except RecursionError:
                    continue
    return False


def _build_groups(piece: Piece, settings: dict[str, Any]) -> Dataset:
    return _build(partial(_groups_of, piece, settings), GROUP_FEATURES, ["groups", piece.path, piece.key, settings])


def _groups_of(piece: Piece, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    read = _reader(settings)
    columns = settings["config"]["columns"]
    for location, row in read_piece(piece, text_columns(columns)):
        row, others, found = unwrap(row), "", []
        if isinstance(row, dict):
            try:
                others = other_columns(row) if settings["keep_columns"] else ""
                row, found = rename(row, columns)
            except RecursionError:
                row = BadRow("not_json", "nested too deep")
        yield from _outcome(read, row, location, 1, named(found), others)


def _build_records(piece: Piece, how: dict[str, Any], code: str) -> Dataset:
    return _build(partial(_records_of, piece, how), RECORD_FEATURES, ["records", piece.path, piece.key, how, code])


def _records_of(piece: Piece, how: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for location, row in read_piece(piece, text_columns(how["columns"])):
        yield record_of(row, location, **how)


def _build_gathered(records: Dataset, rows: np.ndarray, starts: np.ndarray, settings: dict[str, Any]) -> Dataset:
    content = hashlib.sha256(rows.tobytes() + starts.tobytes()).hexdigest()
    key = ["gathered", records._fingerprint, content, settings]
    return _build(partial(_gathered_of, records, rows, starts, settings), GROUP_FEATURES, key)


def _gathered_of(
    records: Dataset, rows: np.ndarray, starts: np.ndarray, settings: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    read = _reader(settings)
    for group in np.split(rows, starts[1:]):
        found = records[group]
        if found["dropped"][0]:
            row = BadRow(found["dropped"][0], found["record"][0])
        else:
            try:
                row = gather([json.loads(record) for record in found["record"]])
            except BadRow as bad:
                row = bad
        noted = list(dict.fromkeys(note for notes in found["noted"] for note in notes))
        yield from _outcome(read, row, found["location"][0], len(group), noted, common_columns(found["columns"]))


def _reader(settings: dict[str, Any]) -> GroupReader:
    config, *rest = (settings[name] for name in ("config", "pairs", "unscored_pairs", "control_tokens"))
    return GroupReader(RowConfig(**config), *rest)


def _outcome(
    read: GroupReader, row: Any, location: str, lines: int, noted: list[str], columns: str = ""
) -> Iterator[dict[str, Any]]:
    """The rows of `GROUP_FEATURES` that a raw row becomes: one, or one a pair, or a dropped one."""
    outcome = {
        "prompt": [],
        "responses": [],
        "tools": None,
        "chat_template_kwargs": None,
        "scores": [],
        "weight": None,
        "fixed": [],
        "prompt_hash": -1,
        "dropped": "",
        "detail": "",
    }
    outcome |= {"location": location, "lines": lines, "columns": columns, "noted": noted}
    try:
        groups = read(row)
    except FailedRow as bad:
        raise UserError(f"{location}: {bad}: fix the row, or set row_rules: {bad.reason}: drop") from None
    except BadRow as bad:
        yield outcome | {"dropped": bad.reason, "detail": storable(bad.detail)}
        return
    except UserError as error:
        raise UserError(f"{location}: {error}") from None
    for i, group in enumerate(groups):
        yield outcome | {
            "prompt": group.prompt,
            "responses": group.responses,
            "tools": json.dumps(group.tools) if group.tools else None,
            "chat_template_kwargs": json.dumps(group.chat_template_kwargs) if group.chat_template_kwargs else None,
            "scores": group.scores,
            "weight": group.weight,
            "fixed": group.fixed,
            "prompt_hash": prompt_hash(group.prompt, group.tools, group.chat_template_kwargs),
            "lines": lines if i == 0 else 0,
            "noted": [*noted, *map(storable, group.noted)] if i == 0 else [],
        }


def _build(read: Callable[[], Iterator[dict[str, Any]]], features: Features, key: list[Any]) -> Dataset:
    """A piece as a data set: from the cache if its key is there, else read and put there in one go."""
    fingerprint = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    try:
        return Dataset.from_generator(read, features=features, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    except OSError as error:
        raise UserError(
            f"{datasets.config.HF_DATASETS_CACHE}: the cache of rows cannot be made there: {error}; set "
            "HF_DATASETS_CACHE to a folder that can be written to"
        ) from error
    except ValueError as error:  # what datasets says of a generator that yields nothing
        if "corresponds to no data" not in str(error):
            raise
        return Dataset.from_dict({name: [] for name in features}, features=features)


def _in_parallel(builds: list[Callable[[], Dataset]], desc: str, num_proc: int | None) -> Dataset:
    """Builds pieces on several processes and concatenates them in order."""
    num_proc = min(num_proc or os.cpu_count() or 1, len(builds))
    with _without_bars(), tqdm(total=len(builds), desc=desc, disable=len(builds) == 1) as progress:
        pool = multiprocessing.Pool(num_proc) if num_proc > 1 else contextlib.nullcontext()
        with pool as workers:
            parts = []
            for part in workers.imap(_call, builds) if workers else map(_call, builds):
                parts.append(part)
                progress.update()
    return concatenate_datasets([part for part in parts if len(part)] or parts[:1])


def _call(build: Callable[[], Dataset]) -> Dataset:
    return build()


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Hides the bars of pieces: reading one is quick, and a bar would stand before the line of an error."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def column(rows: Dataset, name: str) -> Any:
    """A column as an Arrow array, without a Python object a value."""
    return rows.select_columns([name]).with_format("arrow")[:][name].combine_chunks()
