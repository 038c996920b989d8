"""Reads rows of JSON-lines, JSON and CSV files, plain or gzipped, in UTF-8 or UTF-16.

What Python refuses in a row (an integer of 5,000 digits, objects nested too deep) costs the row, and not the file.
"""

import codecs
import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from alignment.data.row import BadRow

csv.field_size_limit(sys.maxsize)  # a response may be longer than the 128 KiB that csv allows by itself

_BOMS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
         (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
#: Columns of CSV files that are text even where they begin like a list or an object: prompts and answers.
_TEXT_COLUMN = re.compile(
    r"prompt|system(_\w+)?|question|instruction|input|query|context|response(_?\w)?|completion|chosen"
    r"|rejected|A\d+|human_ref_[AB]",
)
_NUMBER_COLUMN = re.compile(r"(score|reward|rating)s?([_-].*)?|label|weight|.*[_-](score|reward|rating)s?")


def encoding_of(start: bytes) -> str:
    """The encoding of a text by its first bytes: its byte-order mark, or zeros in every other byte; else UTF-8."""
    for mark, name in _BOMS:
        if start.startswith(mark):
            return name
    if len(start) >= 4 and not any(start[0:4:2]) and all(start[1:4:2]):
        return "utf-16-be"
    if len(start) >= 4 and not any(start[1:4:2]) and all(start[0:4:2]):
        return "utf-16-le"
    return "utf-8"


def open_text(path: str, start: int = 0, stop: int = sys.maxsize) -> TextIO:
    """A file, or some bytes of one in UTF-8, as text."""
    raw: Any = (gzip.open if path.lower().endswith(".gz") else open)(path, "rb")
    if stop < sys.maxsize:
        with raw:
            raw.seek(start)
            raw = io.BytesIO(raw.read(stop - start))
    encoding = encoding_of(raw.peek(4)[:4]) if stop == sys.maxsize else "utf-8"
    if encoding != "utf-8":
        return io.TextIOWrapper(raw, encoding, errors="surrogatepass", newline="")
    # Bytes that are not UTF-8 become half surrogate pairs, which cost their row (`broken_text`) and not the file.
    return io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")


def read_json(text: TextIO, first_line: int, may_be_list: bool) -> Iterator[tuple[str, Any]]:
    """Yields the place of each row, and the row or a `BadRow`.

    Args:
        text: JSON lines, or where `may_be_list` a list.
        first_line: Number of the first line.
        may_be_list: Whether all of the text may be one list.

    Raises:
        json.JSONDecodeError: It is a list, and no JSON.
    """
    if may_be_list:
        is_list = text.read(64).lstrip("\ufeff \t\r\n")[:1] == "["
        text.seek(0)
        if is_list:
            yield from ((f"row {i + 1}", row) for i, row in enumerate(_read_list(text.read())))
            return
    for i, line in enumerate(text, start=first_line):
        if line.strip():
            yield f"line {i}", _read_row(line)


def _read_row(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return BadRow("not_json", f"not JSON ({error.msg}, column {error.colno}); write one object a line")
    except (ValueError, RecursionError) as error:
        detail = "nested too deep" if isinstance(error, RecursionError) else "an integer of too many digits"
        return BadRow("not_json", f"not JSON that can be read ({detail})")


def _read_list(text: str) -> Iterable[Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError):  # of one of its rows
        return map(_read_row, _items(text))


def _items(text: str) -> Iterator[str]:
    """The texts of the items of a JSON list."""
    depth, start = 0, text.index("[") + 1
    for found in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[\]{},]', text, re.DOTALL):
        sign = found[0]
        depth += (sign in "[{") - (sign in "]}")
        if (sign == "," and depth == 1) or depth == 0:
            yield text[start : found.start()]
            start = found.end()
        if depth == 0:
            return


def read_csv(text: TextIO, tabs: bool, text_columns: Iterable[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yields the place of each row, and the row or a `BadRow`.

    Args:
        text: CSV with a header.
        tabs: Whether the cells are parted by tabs. Else by what is most often in the header: `,` `;` `|` or a tab.
        text_columns: Columns that are text even where they begin like a list or an object, beside those of prompts and
            answers by their usual names.
    """
    header = text.readline()
    text.seek(0)
    delimiter = "\t" if tabs else max(",;\t|", key=re.sub(r'"[^"]*"', "", header).count)
    reader = csv.DictReader(text, delimiter=delimiter)
    for row in reader:
        if None in row:
            yield f"line {reader.line_num}", BadRow("not_json", "more cells than the header names")
        else:
            yield (
                f"line {reader.line_num}",
                {name.strip(): _cell(name.strip(), value, delimiter, text_columns) for name, value in row.items()},
            )


def _cell(name: str, value: str | None, delimiter: str, text_columns: Iterable[str]) -> Any:
    """Parses a cell: CSV has no types. An empty cell is missing; lists and objects are JSON, but for texts."""
    if value is None or value == "":
        return None
    if name in text_columns or _TEXT_COLUMN.fullmatch(name):
        return value
    is_number = _NUMBER_COLUMN.fullmatch(name)
    if is_number and delimiter == ";":  # where the comma is the decimal sign
        value = re.sub(r"^\s*(-?\d+),(\d+)\s*$", r"\1.\2", value)
    if is_number or value[0] in "[{":
        try:
            return json.loads(value.lower() if name == "label" else value)
        except (ValueError, RecursionError):
            return value
    return value
