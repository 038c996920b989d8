"""Messages, tools and template arguments of a row, as chat templates expect them.

Arrow gives all messages of a column the same keys, most of them null, and some data have a call's arguments as JSON
text. Templates print both as they are. A null in arguments may also be meant: where nothing else is null, it is.
"""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

#: The end of the thinking in an answer.
CLOSED = "</think>"

#: Arguments of `apply_chat_template` itself, which no row sets.
_RESERVED = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {"documents"}


class RefusedRow(Exception):
    """A row that cannot be trained on: `reason` is the name of a rule, `detail` says more to a person."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def clean_messages(conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[Messages]:
    """The conversations of a row, each message as by `clean_message`."""
    is_filled = any(_is_filled(message) for messages in conversations for message in messages)
    return [[clean_message(message, is_filled) for message in messages] for messages in conversations]


def clean_message(message: Mapping[str, Any], is_filled: bool = True) -> dict[str, Any]:
    """A message without keys that say nothing, and with the arguments of its calls as dicts.

    Args:
        message: As a row has it.
        is_filled: Whether Arrow filled the row up, so that null in arguments is no value. It is one in JSON text.

    Returns:
        Another message. Its `content` is always there.

    Example:
        >>> call = {"id": None, "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
        >>> cleaned = clean_message({"role": "assistant", "content": None, "tool_calls": [call], "name": ""})
        >>> cleaned["tool_calls"]
        [{'function': {'name': 'add', 'arguments': {'a': 1, 'b': None}}}]
        >>> sorted(cleaned)
        ['content', 'role', 'tool_calls']
    """
    kept = () if is_filled else ("arguments",)
    said = {key: value for key, value in _without_none(message, kept).items() if value not in ("", [], {})}
    cleaned = {"role": said.pop("role", ""), "content": said.pop("content", ""), **said}
    if "tool_calls" in cleaned:
        cleaned["tool_calls"] = [_clean_call(call) for call in cleaned["tool_calls"]]
    return cleaned


def _clean_call(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _clean_call(call["function"])}
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        read = _read_json(arguments)
        arguments = read if isinstance(read, dict) else arguments
    return {**call, "arguments": arguments}


def _is_filled(value: Any) -> bool:
    """Whether a value has a null where data that no table filled up have none: nowhere but in these."""
    if isinstance(value, Mapping):
        nullable = ("content", "default", "arguments")
        nulls = [key for key, item in value.items() if item is None and key not in nullable]
        return bool(nulls) or any(_is_filled(item) for key, item in value.items() if key != "arguments")
    return isinstance(value, list | tuple) and any(map(_is_filled, value))


def _without_none(value: Any, kept: Sequence[str] = ()) -> Any:
    """A value without keys of dicts that are None, at any depth but under those that are kept as they are."""
    if isinstance(value, Mapping):
        given = {key: item for key, item in value.items() if item is not None}
        return {key: item if key in kept else _without_none(item, kept) for key, item in given.items()}
    return [_without_none(item, kept) for item in value] if isinstance(value, list | tuple) else value


def _read_json(value: Any) -> Any:
    """What JSON text says, None for text that is none; all else without what a table filled up."""
    if not isinstance(value, str):
        return _without_none(value) if _is_filled(value) else value
    try:
        return json.loads(value)
    except ValueError:
        return None


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """A row's tools for its template: JSON schemas, as a list or as JSON text; None where it has none.

    Raises:
        RefusedRow: They are something else.
    """
    if tools is None or tools in ("", []):
        return None
    read = _read_json(tools)
    read = [_read_json(tool) for tool in read] if isinstance(read, list) else None
    if not read or not all(isinstance(tool, dict) for tool in read):
        raise RefusedRow("bad_tools", f"tools are no list of JSON schemas: {str(tools)[:80]!r}")
    return read


def read_template_kwargs(kwargs: Any) -> dict[str, Any]:
    """A row's arguments for its template, given as a dict or as JSON text.

    Raises:
        RefusedRow: They are something else, or not the row's to say.
    """
    if kwargs is None or kwargs == "":
        return {}
    read = _read_json(kwargs)
    if not isinstance(read, dict):
        raise RefusedRow("bad_tools", f"chat_template_kwargs are no mapping: {str(kwargs)[:80]!r}")
    if reserved := sorted(_RESERVED & {*read}):
        raise RefusedRow("bad_tools", f"chat_template_kwargs: {', '.join(reserved)} cannot be set by a row")
    return read


def map_texts(change: Callable[[str], str], value: Any) -> Any:
    """The value with all texts in it changed, but for roles and for keys that are names, which templates look up."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        names = {key: key if key.isidentifier() else change(key) for key in map(str, value)}
        return {names[str(key)]: item if key == "role" else map_texts(change, item) for key, item in value.items()}
    return [map_texts(change, item) for item in value] if isinstance(value, list) else value


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a value, those of keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts_in(key)
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message; "" where its content has none."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The reasoning that a message has beside its text, under the names that transformers knows."""
    names = ("reasoning_content", "thinking", "reasoning")
    return next((text for text in map(message.get, names) if isinstance(text, str)), "")


def calls_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The functions that a message calls, each with `name` and `arguments`."""
    return [call.get("function", call) for call in message.get("tool_calls") or ()]


def with_arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message with the arguments of its calls as JSON text."""
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [_as_text(call) for call in message["tool_calls"]]}


def _as_text(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _as_text(call["function"])}
    arguments = call.get("arguments", {})
    return {**call, "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)}


def names_of_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """The names of the functions among a row's tools."""
    return [str(tool.get("function", tool).get("name", "")) for tool in tools or ()]
