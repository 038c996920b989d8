"""Reads tools, calls of them, and arguments for the chat template, in the spellings that data have.

A table fills objects up with nulls, so a key whose value is null is as if absent; in JSON text a null was meant.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from alignment.data.row import BadRow, Row
from alignment.data.written import as_objects, first, is_absent, is_empty, read_written

#: Keys of the arguments of a call: OpenAI's, Anthropic's, Llama's.
_ARGUMENTS = ("arguments", "input", "parameters", "args")
#: Types of an object that is a call.
CALL_TYPES = ("function", "tool_use", "tool_call", "function_call")
_CALL_KEYS = {"id", "call_id", "type", "function", "name", *_ARGUMENTS}
#: What the caller of a chat template passes by itself.
_RESERVED = ("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message",
             "tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask")  # fmt: skip
#: Deepest nesting of arguments and schemas; Python's own limit is not far beyond a few hundred.
_DEEPEST = 50


def calls_of(value: Any, what: str, unread: set[str] | None = None) -> list[Row]:
    """Calls in OpenAI's form, `{"type": "function", "function": {"name": ..., "arguments": {...}}}`, with their ids.

    Args:
        value: A list of calls, one call, a dict of lists, or any of these as JSON text.
        what: Name of the value, for errors.
        unread: Gets the keys of calls that are not read.

    Raises:
        BadRow: It is no list of calls, or the arguments of one are no JSON object.

    Example:
        >>> calls_of('{"name": "add", "parameters": {"a": 1}}', "the turn")
        [{'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 1}}}]
    """
    calls = as_objects(read_written(value) if isinstance(value, str) else value)
    if not isinstance(calls, list):
        raise BadRow("bad_tools", f"{what} has calls that cannot be read: {value!r:.60}")
    return [_call(call, what, unread) for call in calls if not is_empty(call)]


def _call(call: Any, what: str, unread: set[str] | None) -> Row:
    call = read_written(call) if isinstance(call, str) else call
    if not isinstance(call, dict) or call.get("type") not in (None, *CALL_TYPES):
        raise BadRow("bad_tools", f"{what} has a call that is no function's: {call!r:.60}")
    function = call["function"] if isinstance(call.get("function"), dict) else call
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise BadRow("bad_tools", f"{what} has a call without the name of a function")
    if unread is not None:
        others = {**call, **function}
        unread |= {f"tool_calls.{key}" for key in others if key not in _CALL_KEYS and not is_empty(others[key])}
    read = {"type": "function", "function": {"name": name, "arguments": _arguments(function, what)}}
    identity = identity_of(first(call, ("id", "call_id")), what)
    return {"id": identity, **read} if identity else read


def _arguments(function: Row, what: str) -> Row | str:
    """The arguments of a call; as JSON text where they hold a null, which in an object is as if absent."""
    value = first(function, _ARGUMENTS)
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            found, keep_nulls = json.loads(value), True
        except (ValueError, RecursionError):
            raise BadRow("bad_tools", f"{what} has a call with arguments that are no JSON: {value!r:.60}") from None
    else:
        found, keep_nulls = value, False
    if not isinstance(found, dict):
        raise BadRow("bad_tools", f"{what} has a call with arguments that are no object: {value!r:.60}")
    found = plain_json(found, f"{what} has a call with arguments", keep_nulls)
    holds_null = keep_nulls and found != plain_json(found, what)
    return json.dumps(found, ensure_ascii=False) if holds_null else found


def identity_of(value: Any, what: str) -> str:
    """The id of a call, a text or a number; "" for none.

    Raises:
        BadRow: It is neither.
    """
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow("bad_tools", f"{what} has a call with the id {value!r:.60}")
    return str(value)


def tools_of(value: Any, name: str) -> list[Row] | None:
    """Tools in OpenAI's form, `{"type": "function", "function": {"name": ..., "parameters": ...}}`; None without any.

    Args:
        value: A list of JSON schemas, one, or these as JSON text; with the `function` around each or without it.
        name: Name of the column or key, for errors.

    Raises:
        BadRow: It is none of these.

    Example:
        >>> tools_of('[{"name": "add", "input_schema": {"type": "object"}}]', "tools")
        [{'type': 'function', 'function': {'name': 'add', 'parameters': {'type': 'object'}}}]
    """
    if is_absent(value):
        return None
    tools = as_objects(read_written(value) if isinstance(value, str) else value)
    if not isinstance(tools, list):
        raise BadRow("bad_tools", f"{name} is no list of tools' schemas: {value!r:.60}")
    return [_tool(tool, name) for tool in tools if not is_empty(tool)] or None


def _tool(tool: Any, name: str) -> Row:
    tool = read_written(tool) if isinstance(tool, str) else tool
    if not isinstance(tool, dict) or tool.get("type") not in (None, "function"):
        raise BadRow("bad_tools", f"{name} has something that is no function's schema: {tool!r:.60}")
    tool = plain_json(tool, name)
    is_wrapped = isinstance(tool.get("function"), dict)
    function = dict(tool["function"] if is_wrapped else tool)
    if not is_wrapped:
        function.pop("type", None)
        if "parameters" not in function and "input_schema" in function:
            function["parameters"] = function.pop("input_schema")
    if isinstance(function.get("parameters"), str):
        function["parameters"] = plain_json(read_written(function["parameters"]), name, keep_nulls=True)
    if not isinstance(function.get("name"), str) or not function["name"].strip():
        raise BadRow("bad_tools", f"{name} has a schema without the name of a function")
    if not isinstance(function.get("parameters", {}), dict):
        raise BadRow("bad_tools", f"{name} has a schema whose parameters are no object: {function['name']}")
    return {**(tool if is_wrapped else {}), "type": "function", "function": function}


def template_kwargs_of(value: Any, name: str) -> Row | None:
    """A row's arguments for the chat template, such as `enable_thinking`; None without any.

    Args:
        value: An object, or one as JSON text.
        name: Name of the column or key, for errors.

    Raises:
        BadRow: It is neither, or has what the template is given anyway.
    """
    if is_absent(value):
        return None
    found = read_written(value) if isinstance(value, str) else value
    if not isinstance(found, dict):
        raise BadRow("bad_tools", f"{name} is no object: {value!r:.60}")
    found = plain_json(found, name)
    for key in found:
        if key in _RESERVED:
            raise BadRow("bad_tools", f"{name} has {key!r}, which has a column of its own or is set by itself")
    return found or None


def agreed(values: Mapping[str, Any]) -> Any:
    """The one value that several places of a row give; None where none does.

    Args:
        values: By the name of the place.

    Raises:
        BadRow: Two places differ.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if not given:
        return None
    name, value = next(iter(given.items()))
    for other in given:
        if given[other] != value:
            raise BadRow("bad_tools", f"{name} and {other} differ")
    return value


def plain_json(value: Any, what: str, keep_nulls: bool = False, depth: int = _DEEPEST) -> Any:
    """A value with nothing in it but what JSON has.

    Args:
        value: Any value.
        what: Name of the value, for errors.
        keep_nulls: Keep the keys whose value is null.
        depth: How deep it may be.

    Raises:
        BadRow: It has something else, or is nested too deep.
    """
    if depth < 0:
        raise BadRow("bad_tools", f"{what} nested too deep")
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        kept = {key: item for key, item in value.items() if keep_nulls or item is not None}
        return {key: plain_json(item, what, keep_nulls, depth - 1) for key, item in kept.items()}
    if isinstance(value, list):
        return [plain_json(item, what, keep_nulls, depth - 1) for item in value]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise BadRow("bad_tools", f"{what} that are no JSON: {value!r:.60}")
