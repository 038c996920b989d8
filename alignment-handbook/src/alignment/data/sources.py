"""Opens files, folders and Hub data sets, and cuts them into pieces that are read independently.

A piece is a stretch of a JSON-lines file, some rows of a table, or a whole file of a kind that cannot be cut (gzip, a
JSON list, CSV). Its `key` is a hash of the content: the same rows have the same key wherever the file lies.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from alignment.data.row import BadRow
from alignment.errors import UserError

#: Bytes of a JSON-lines piece, and rows of a table's.
PIECE_BYTES = 2**25
PIECE_ROWS = 10_000

# Bytes that are not UTF-8 become half surrogate pairs, which cost their row (`broken_text`) and not the file.
_TEXT: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}

csv.field_size_limit(sys.maxsize)  # a response may be longer than the 128 KiB that csv allows by itself


@dataclass(frozen=True)
class Piece:
    """A part of a source.

    Attributes:
        path: The source, as a user names it.
        key: Hash of the content.
        start, stop: Bytes of a file, or rows of a table.
        first_line: Line number of the first line, from 1.
        table: The table that the rows are of; None for a text file.
    """

    path: str
    key: str
    start: int = 0
    stop: int = sys.maxsize
    first_line: int = 1
    table: Dataset | None = None


def open_source(path: str, split: str | None = None, name: str | None = None) -> list[Piece]:
    """The pieces of a source, in order.

    Args:
        path: A file, a `save_to_disk` folder, a folder of data files, or a Hub id.
        split: Split of a folder or Hub data set.
        name: Configuration of a Hub data set.

    Raises:
        UserError: There is no such source or split, or it cannot be read.
    """
    here = Path(path)
    if here.is_file() and re.search(r"\.(jsonl?|csv)(\.gz)?$", path):
        try:
            return _cut_file(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
    if not here.exists() and (split is None or re.search(r"\.(jsonl?|csv|parquet)(\.gz)?$", path)):
        raise UserError(f"{path}: no such file; check the path (and, if it is meant as a Hub id, give its split)")
    table = _open_table(path, split, name)
    stamp = _hash_files(path) or table._fingerprint  # the fingerprint of a Hub data set is of its revision
    key = hashlib.sha256(f"{stamp} {split} {name}".encode()).hexdigest()
    return [
        Piece(path, f"{key} {start}", start, min(start + PIECE_ROWS, len(table)), table=table)
        for start in range(0, len(table), PIECE_ROWS)
    ]


def read_piece(piece: Piece) -> Iterator[tuple[str, Any]]:
    """Yields the raw rows of a piece, each behind its location as a user would name it.

    A line that cannot be read comes as a `BadRow`.

    Raises:
        UserError: The file as a whole cannot be read.
    """
    if piece.table is not None:
        for i in range(piece.start, piece.stop):
            yield f"{piece.path}, row {i + 1}", piece.table[i]
        return
    read = _read_csv if re.search(r"\.csv(\.gz)?$", piece.path) else _read_json
    try:
        with closing(_open_text(piece)) as text:
            for place, row in read(piece, text):
                yield f"{piece.path}, {place}", row
    except (OSError, EOFError, zlib.error, json.JSONDecodeError, csv.Error) as error:
        raise UserError(f"{piece.path}: cannot be read: {error}") from error


def _cut_file(path: str) -> list[Piece]:
    """A JSON-lines file in pieces that end at line ends; any other file in one piece."""
    with open(path, "rb") as file:
        is_list = file.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
        whole = not path.endswith(".jsonl") and (is_list or not path.endswith(".json"))
        if whole:
            return [Piece(path, hashlib.file_digest(file, "sha256").hexdigest())]
        pieces: list[Piece] = []
        start, line = 0, 1
        while block := file.read(PIECE_BYTES):
            block += file.readline()
            pieces.append(Piece(path, hashlib.sha256(block).hexdigest(), start, start + len(block), line))
            start, line = start + len(block), line + block.count(b"\n")
        return pieces


def _open_text(piece: Piece) -> TextIO:
    if piece.path.endswith(".gz"):
        return gzip.open(piece.path, "rt", **_TEXT)
    if piece.stop == sys.maxsize:
        return open(piece.path, **_TEXT)
    with open(piece.path, "rb") as file:
        file.seek(piece.start)
        return io.TextIOWrapper(io.BytesIO(file.read(piece.stop - piece.start)), **_TEXT)


def _read_json(piece: Piece, text: TextIO) -> Iterator[tuple[str, Any]]:
    if re.search(r"\.json(\.gz)?$", piece.path):
        is_list = text.read(64).lstrip()[:1] == "["
        text.seek(0)
        if is_list:
            yield from ((f"row {i + 1}", row) for i, row in enumerate(json.load(text)))
            return
    for i, line in enumerate(text, start=piece.first_line):
        if not line.strip():
            continue
        try:
            yield f"line {i}", json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            detail = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
            yield f"line {i}", BadRow("not_json", f"not JSON ({detail}); write one object a line")


def _read_csv(piece: Piece, text: TextIO) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(text)
    for row in reader:
        if None in row:
            yield f"line {reader.line_num}", BadRow("not_json", "more cells than the header names")
        else:
            yield f"line {reader.line_num}", {name: _cell(name, value) for name, value in row.items()}


def _cell(name: str, value: str | None) -> Any:
    """Parses a cell: CSV has no types. An empty cell is missing; lists and objects are JSON."""
    if value is None or value == "":
        return None
    is_number = re.fullmatch(r"(score|reward)s?(_.*)?|label", name)
    if is_number or value[0] in "[{":
        try:
            return json.loads(value.lower() if name == "label" else value)
        except (json.JSONDecodeError, RecursionError):
            return value
    return value


def _open_table(path: str, split: str | None, name: str | None) -> Dataset:
    """A Parquet file, a `save_to_disk` folder, a folder of data files, or a Hub data set."""
    here = Path(path)
    try:
        if here.is_file():
            return load_dataset("parquet", data_files=path, split="train")
        if (here / "dataset_dict.json").is_file() or (here / "state.json").is_file():
            table = load_from_disk(path)
        else:
            table = load_dataset(path, name)
    except Exception as error:  # datasets and the hub raise many kinds; all mean that the source cannot be read
        raise UserError(f"{path}: cannot be loaded as a file, folder or Hub data set: {error}") from error
    if not isinstance(table, DatasetDict):
        return table
    if split is None and len(table) == 1:
        return next(iter(table.values()))
    if split not in table:
        raise UserError(f"{path}: no split {split!r}; it has {', '.join(table)}: set dataset_splits")
    return table[split]


def _hash_files(path: str) -> str:
    """Hash of a local file's or folder's content; "" for a Hub id."""
    here = Path(path)
    files = [here] if here.is_file() else sorted(file for file in here.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.relative_to(here)} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest() if files else ""
