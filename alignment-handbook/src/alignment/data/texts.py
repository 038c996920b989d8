"""Walks over the texts of a row: contents, reasoning, and the texts inside of calls and tools."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from alignment.data.row import Messages

#: What str.strip leaves though nobody sees it: zero-width space, non-joiner, joiner, word joiner, byte-order mark.
_INVISIBLE = str.maketrans("", "", "\u200b\u200c\u200d\u2060\ufeff")


def is_blank(text: str) -> bool:
    """Whether there is nothing to see in a text."""
    return not text.translate(_INVISIBLE).strip()


def says_nothing(response: str | Messages | None) -> bool:
    """Whether a response is missing, or has no turn of the assistant's with text, reasoning or a call."""
    if isinstance(response, str):
        return is_blank(response)
    turns = [turn for turn in response or [] if turn["role"] == "assistant"]
    return all(
        is_blank(turn["content"] + turn.get("reasoning_content", "")) and "tool_calls" not in turn for turn in turns
    )


def key_of(response: str | Messages) -> str:
    """A text that is the same for the same response."""
    return response if isinstance(response, str) else json.dumps(response, sort_keys=True)


def texts_in(responses: Iterable[str | Messages | None]) -> Iterator[str]:
    """All texts of prompts and responses."""
    for response in responses:
        if isinstance(response, str):
            yield response
        for turn in response or [] if not isinstance(response, str) else []:
            yield turn["content"]
            if len(turn) > 2:
                yield from strings({key: value for key, value in turn.items() if key not in ("role", "content")})


def strings(value: Any) -> Iterator[str]:
    """All texts inside of a value, names of keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The value with all texts inside of it changed, names of keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_strings(item, change) for item in value]
    return value
