"""Opens files, folders and Hub data sets, and cuts them into pieces that are read independently.

A piece is a stretch of a JSON-lines file, some rows of a table, or a whole file of a kind that cannot be cut (gzip, a
JSON list, CSV). Its `key` is a hash of the content: the same rows have the same key wherever the file lies.
"""

import csv
import hashlib
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from huggingface_hub.constants import is_offline_mode

from alignment.data.tables import rows_of
from alignment.data.text_files import encoding_of, open_text, read_csv, read_json
from alignment.errors import UserError

#: Bytes of a JSON-lines piece, and rows of a table's.
PIECE_BYTES = 2**25
PIECE_ROWS = 10_000

_JSON_LINES = ("jsonl", "ndjson", "jsonlines")
_TEXT_ENDINGS = (*_JSON_LINES, "json", "csv", "tsv")
_ENDINGS = f"{', '.join(f'.{ending}' for ending in _TEXT_ENDINGS)} (each also with .gz) and .parquet"


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
    if here.is_file() and _ending(path) in _TEXT_ENDINGS:
        try:
            return _cut_file(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
    if not here.exists() and (split is None or _ending(path) in (*_TEXT_ENDINGS, "parquet")):
        give = "the Hub is not asked, HF_HUB_OFFLINE is set" if is_offline_mode() else "give its split"
        raise UserError(f"{path}: no such file; check the path (and, if it is meant as a Hub id, {give})")
    if here.is_file() and not _is_parquet(here):
        raise UserError(f"{path}: no file of a known kind; they are {_ENDINGS}: convert or rename it")
    table = _open_table(path, split, name)
    stamp = _hash_files(path) or table._fingerprint  # the fingerprint of a Hub data set is of its revision
    key = hashlib.sha256(f"{stamp} {split} {name}".encode()).hexdigest()
    return [
        Piece(path, f"{key} {start}", start, min(start + PIECE_ROWS, len(table)), table=table)
        for start in range(0, len(table), PIECE_ROWS)
    ]


def read_piece(piece: Piece, text_columns: Iterable[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yields the raw rows of a piece, each behind its location as a user would name it.

    A line that cannot be read comes as a `BadRow`.

    Args:
        piece: From `open_source`.
        text_columns: Columns of CSV files that are text, beside those that are known as such.

    Raises:
        UserError: The file as a whole cannot be read.
    """
    if piece.table is not None:
        for i, row in enumerate(rows_of(piece.table, piece.start, piece.stop), start=piece.start + 1):
            yield f"{piece.path}, row {i}", row
        return
    try:
        with closing(open_text(piece.path, piece.start, piece.stop)) as text:
            if _ending(piece.path) in ("csv", "tsv"):
                rows = read_csv(text, _ending(piece.path) == "tsv", text_columns)
            else:
                rows = read_json(text, piece.first_line, may_be_list=_ending(piece.path) == "json")
            for place, row in rows:
                yield f"{piece.path}, {place}", row
    except UnicodeDecodeError as error:
        raise UserError(f"{piece.path}: not UTF-8, and not {error.encoding} either: convert it to UTF-8") from error
    except (OSError, EOFError, zlib.error, json.JSONDecodeError, csv.Error) as error:
        raise UserError(f"{piece.path}: cannot be read: {error}") from error


def _ending(path: str) -> str:
    """The ending of a file's name in lower case, without a dot and without `.gz`."""
    return path.lower().removesuffix(".gz").rpartition(".")[2]


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _cut_file(path: str) -> list[Piece]:
    """A JSON-lines file in pieces that end at line ends; any other file in one piece."""
    with open(path, "rb") as file:
        start_of_file = file.peek(64)
        is_list = start_of_file.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
        is_lines = path.lower().endswith(_JSON_LINES) or (path.lower().endswith("json") and not is_list)
        if not is_lines or encoding_of(start_of_file) != "utf-8":
            return [Piece(path, hashlib.file_digest(file, "sha256").hexdigest())]
        pieces: list[Piece] = []
        start, line = 0, 1
        while block := file.read(PIECE_BYTES):
            block += file.readline()
            pieces.append(Piece(path, hashlib.sha256(block).hexdigest(), start, start + len(block), line))
            start, line = start + len(block), line + block.count(b"\n")
        return pieces


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
        offline = "; offline, HF_HUB_OFFLINE is set" if is_offline_mode() and not here.exists() else ""
        raise UserError(f"{path}: cannot be loaded as a file, folder or Hub data set: {error}{offline}") from error
    if not isinstance(table, DatasetDict):
        return table
    if split is None and len(table) == 1:
        return next(iter(table.values()))
    if split not in table:
        what = f"no split {split!r}; it has" if split else "several splits,"
        how = "convert.py: --split; a recipe: dataset_mixer and dataset_splits"
        raise UserError(f"{path}: {what} {', '.join(table)}: name one ({how})")
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
