"""Reads rows of Arrow tables as values that JSON has: text, numbers, lists and objects."""

import base64
import datetime
import decimal
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Json, LargeList, List, Value

from alignment.data.row import BadRow

#: Rows that are taken out of a table at once.
_BATCH = 1000


def rows_of(table: Dataset, start: int, stop: int) -> Iterator[Any]:
    """Yields the rows of a table; a `BadRow` for one with a value that Python does not have, such as a year of 10,000.

    A class label becomes its name. Images and sounds are not decoded.
    """
    arrow = table.with_format("arrow")
    others = {name: feature for name, feature in table.features.items() if not _is_plain(feature)}
    for at in range(start, stop, _BATCH):
        part = arrow[at : min(at + _BATCH, stop)]
        try:
            rows: Iterator[Any] = iter(part.to_pylist())
        except (ValueError, OverflowError):  # of one of them
            rows = (_row(part.slice(i, 1)) for i in range(part.num_rows))
        for row in rows:
            if isinstance(row, dict):
                row |= {name: as_json(row[name], feature) for name, feature in others.items()}
            yield row


def _row(part: Any) -> Any:
    try:
        return part.to_pylist()[0]
    except (ValueError, OverflowError) as error:
        return BadRow("not_json", f"a value that cannot be read ({error})")


def _is_plain(feature: Any) -> bool:
    """Whether all values of a type are JSON's already."""
    if isinstance(feature, dict):
        return all(map(_is_plain, feature.values()))
    if isinstance(feature, List | LargeList):
        return _is_plain(feature.feature)
    return isinstance(feature, Value) and bool(
        re.fullmatch(r"(large_)?string|bool|u?int\d+|float(32|64)", feature.dtype)
    )


def as_json(value: Any, feature: Any = None) -> Any:
    """A value of a table as one that JSON has.

    Args:
        value: As Arrow gives it.
        feature: Its type in `datasets`, as far as it is known.

    Example:
        >>> as_json({"day": datetime.date(2024, 2, 29), "score": decimal.Decimal("0.5"), "text": [b"caf\\xc3\\xa9"]})
        {'day': '2024-02-29', 'score': 0.5, 'text': ['café']}
    """
    if isinstance(feature, ClassLabel):
        return feature.names[value] if isinstance(value, int) and 0 <= value < len(feature.names) else None
    if isinstance(feature, Json) and isinstance(value, str):
        return json.loads(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        features = feature if isinstance(feature, dict) else {}
        return {name: as_json(item, features.get(name)) for name, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [as_json(item, getattr(feature, "feature", None)) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:  # no text, so that no rule takes it for one
            return {"base64": base64.b64encode(value).decode()}
    return _number_or_text(value)


def _number_or_text(value: Any) -> Any:
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)
