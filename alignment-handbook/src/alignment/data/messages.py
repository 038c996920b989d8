"""Reads a value as messages, in the spellings of OpenAI, Anthropic and ShareGPT.

A message becomes `role` and `content`, a text; and where the source has them `reasoning_content` and `tool_calls` of
the assistant's turns, `tool_call_id` and `name` of a tool's. What else changes what is trained on, such as images,
drops the row under a name; what does not is named in the report.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from alignment.data.row import BadRow, Messages, Row
from alignment.data.tools import CALL_TYPES, agreed, calls_of, identity_of, plain_json
from alignment.data.written import (
    CALL_ROLES,
    CONTENT_KEYS,
    ROLE_KEYS,
    ROLE_OF,
    ROLES,
    as_objects,
    dialogue,
    first,
    is_absent,
    is_empty,
    is_open_dialogue,
    written_messages,
)

#: Keys of the assistant's calls, and of its reasoning.
_CALLS = ("tool_calls", "tool_call", "function_call", "function_calls")
_REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
#: Of a tool's turn: the id of the call that it answers.
_ANSWERED = ("tool_call_id", "tool_use_id", "call_id")
#: Keys that are not read, and cannot be left out without changing what is trained on: the rule for each.
_REFUSED = dict.fromkeys(("tools", "functions"), "bad_tools") | dict.fromkeys(
    ("images", "image", "videos", "video", "audios", "audio"), "bad_messages"
)
#: Of another role than the assistant these are refused too.
_ASSISTANTS = dict.fromkeys(_CALLS, "bad_tools") | dict.fromkeys((*_REASONING, "reasoning_details"), "bad_messages")
#: Types of the parts of a content.
_TEXTS = ("text", "input_text", "output_text")
_THOUGHTS = ("thinking", "reasoning")
_RESULTS = ("tool_result", "tool_response", "function_call_output")
#: Keys of such a part that hold what was returned.
_RETURNED = ("content", "output", "result", "response", "text")
#: What a chat template writes around a turn, in the templates that are met most often.
_TEMPLATE_MARKS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]",
    "[/INST]", "<<SYS>>", "<|user|>", "<|assistant|>", "<|system|>", "<｜User｜>", "<｜Assistant｜>", "<|turn>",
    "<|START_OF_TURN_TOKEN|>", "<|start|>user", "<|start|>assistant", "<|endoftext|>", "### Human:", "### Assistant:",
    "### Instruction:", "### Response:", "\n\nHuman:", "\n\nAssistant:", "USER: ", "ASSISTANT: ",
)  # fmt: skip


def looks_rendered(text: str) -> bool:
    """Whether a text has what a chat template writes around turns."""
    return any(mark in text for mark in _TEMPLATE_MARKS)


def refuse(row: Row, reasons: Mapping[str, str], what: str) -> None:
    """Raises a `BadRow` for a column or key that has a value and that cannot be left out.

    Args:
        row: A row or a message.
        reasons: The rule of each such column or key.
        what: Name of the row or message, for the error.
    """
    for name in reasons:
        if not is_absent(row.get(name)):
            raise BadRow(reasons[name], f"{what} {name}, which is not read")


def messages_of(value: Any, what: str, unread: set[str] | None = None) -> Messages:
    """Reads a value as messages; a text is one user turn, unless it is messages written down.

    Args:
        value: Text, messages, one message, or the lists of roles and contents.
        what: Name of the value, for errors.
        unread: Gets the message keys that are not read.

    Raises:
        BadRow: It is none of these, or its messages have more than text.
    """
    if isinstance(value, str):
        turns = written_messages(value)
        if turns is None:
            turns = dialogue(value) if value.startswith("\n\nHuman:") or is_open_dialogue(value) else None
        if turns is None:
            return [{"role": "user", "content": value}]
        if turns and turns[-1] == {"role": "assistant", "content": ""}:  # where the answer is to follow
            del turns[-1]
        value = turns
    objects = as_objects(value)
    if not isinstance(objects, list):
        raise BadRow("bad_messages", f"{what} is neither text nor messages with 'role' and 'content'")
    messages: Messages = []
    for message in objects:
        if _is_plain(message):
            messages.append({"role": message["role"], "content": message["content"]})
            continue
        turns = _turns(message, what, unread)
        is_call = _spelling(message, what) in CALL_ROLES and "reasoning_content" not in turns[0]
        if is_call and messages and messages[-1]["role"] == "assistant":
            # ShareGPT's turn of a call: what was said before it, and calls beside it, are one turn with it.
            calls = [*messages[-1].get("tool_calls", []), *turns[0]["tool_calls"]]
            messages[-1] = {**messages[-1], "tool_calls": calls}
        else:
            messages += turns
    return messages


def _is_plain(message: Any) -> bool:
    """Whether a message is one as it will be: most are."""
    return (
        isinstance(message, dict)
        and len(message) == 2
        and isinstance(message.get("content"), str)
        and isinstance(message.get("role"), str)
        and message["role"] in ROLES
    )


def _spelling(message: Any, what: str) -> str:
    role = first(message, ROLE_KEYS) if isinstance(message, dict) else None
    if not isinstance(role, str):
        raise BadRow("bad_messages", f"{what} is neither text nor messages with 'role' and 'content'")
    spelling = role.strip().lower()
    if spelling not in ROLE_OF and spelling not in CALL_ROLES:
        raise BadRow("bad_messages", f"{what} has the role {role!r}; known are {', '.join(ROLES)}")
    return spelling


def _turns(message: Row, what: str, unread: set[str] | None) -> Messages:
    """The turn that a message is; of Anthropic's results of tools several, and what the user says behind them."""
    spelling = _spelling(message, what)
    if spelling in CALL_ROLES:
        return [_call_turn(message, what, unread)]
    role = ROLE_OF[spelling]
    refuse(message, _REFUSED if role == "assistant" else _REFUSED | _ASSISTANTS, f"{what} has a turn with")
    raw = first(message, CONTENT_KEYS)
    content = _content(_returned(raw) if role == "tool" else raw, role, what, unread)
    keys = {*ROLE_KEYS, *CONTENT_KEYS}
    if role == "assistant":
        keys |= {*_CALLS, *_REASONING, "reasoning_details"}
        turns = [_assistants_turn(message, content, what, unread)]
    elif role == "tool" and not content.results:
        keys |= {*_ANSWERED, "name"}
        turns = [_result(content.text, first(message, _ANSWERED), message.get("name"), what)]
    else:
        said = [{"role": role, "content": content.text}] if content.text or not content.results else []
        turns = [*content.results, *said]
    if raw is None and role != "tool" and len(turns[0]) == 2:
        raise BadRow("bad_messages", f"{what} is neither text nor messages with 'role' and 'content': one has none")
    _note(message, keys, unread)
    return turns


def _call_turn(message: Row, what: str, unread: set[str] | None) -> Row:
    """ShareGPT's turn of its own for a call, which is the assistant's."""
    refuse(message, _REFUSED | dict.fromkeys(_CALLS, "bad_tools"), f"{what} has a turn with")
    calls = calls_of(first(message, CONTENT_KEYS), what, unread)
    if not calls:
        raise BadRow("bad_tools", f"{what} has a turn of a call without one")
    _note(message, {*ROLE_KEYS, *CONTENT_KEYS, *_REASONING, "reasoning_details"}, unread)
    return _assistants_turn(message, _Content("", "", calls, []), what, unread)


def _note(message: Row, read: set[str], unread: set[str] | None) -> None:
    if unread is not None:
        unread |= {str(key) for key in message if key not in read and not is_empty(message[key])}


def _assistants_turn(message: Row, content: "_Content", what: str, unread: set[str] | None) -> Row:
    turn: Row = {"role": "assistant", "content": content.text}
    reasoning = _reasoning(message, content.reasoning, what)
    given = {key: calls_of(message[key], what, unread) or None for key in _CALLS if not is_absent(message.get(key))}
    calls = agreed(given | {"its content": content.calls or None})
    if reasoning:
        turn["reasoning_content"] = reasoning
    if calls:
        turn["tool_calls"] = calls
    return turn


def _reasoning(message: Row, in_content: str, what: str) -> str:
    """The reasoning beside the text: under any of its names, or in parts."""
    found = {key: message[key] for key in _REASONING if not is_absent(message.get(key))}
    if not found and not is_absent(message.get("reasoning_details")):
        details = as_objects(message["reasoning_details"])
        texts = [part.get("text") if isinstance(part, dict) else None for part in details]
        found = {"reasoning_details": "".join(texts) if all(isinstance(text, str) for text in texts) else None}
    for key, value in found.items():
        if not isinstance(value, str):
            raise BadRow("bad_messages", f"{what} has a turn with {key} that is no text")
    texts = {*found.values(), *([in_content] if in_content else [])}
    if len(texts) > 1:
        raise BadRow("bad_messages", f"{what} has a turn with two texts of reasoning: {', '.join(found)}")
    return next(iter(texts), "")


def _result(text: str, answered: Any, name: Any, what: str) -> Row:
    """A tool's turn."""
    turn = {"role": "tool", "content": text}
    if identity := identity_of(answered, what):
        turn["tool_call_id"] = identity
    if isinstance(name, str) and name:
        turn["name"] = name
    return turn


def _returned(value: Any) -> Any:
    """What a tool returned: an object or a number as JSON text; text and lists of parts as they are.

    Example:
        >>> _returned({"t": 22}), _returned([{"type": "text", "text": "22"}])
        ('{"t": 22}', [{'type': 'text', 'text': '22'}])
    """
    parts = value if isinstance(value, list) else [value]
    if value is None or all(isinstance(p, str) or (isinstance(p, dict) and p.keys() & {"type", "text"}) for p in parts):
        return value
    return json.dumps(plain_json(value, "a tool's result", keep_nulls=True), ensure_ascii=False)


class _Content(NamedTuple):
    """What a content holds: text and reasoning, "" for none, calls, and tools' turns."""

    text: str
    reasoning: str
    calls: list[Row]
    results: Messages


def _content(content: Any, role: str, what: str, unread: set[str] | None) -> _Content:
    """What a content holds: a text, or parts."""
    if content is None or isinstance(content, str):
        return _Content(content or "", "", [], [])
    parts = as_objects(content)
    if not isinstance(parts, list) or content == []:
        raise BadRow("bad_messages", f"{what} is neither text nor messages with 'role' and 'content': one is no text")
    found: dict[str, list[Any]] = {"results": [], "reasoning": [], "text": [], "calls": []}
    order = []
    for part in parts:
        kind, value = _part(part, role, what, unread)
        found[kind].append(value)
        order.append([*found].index(kind))
    if order != sorted(order) or (role == "tool" and found["results"] and found["text"]):
        raise BadRow("bad_messages", f"{what} has content parts in an order that no template writes: {_kinds(parts)}")
    return _Content("".join(found["text"]), "".join(found["reasoning"]), found["calls"], found["results"])


def _part(part: Any, role: str, what: str, unread: set[str] | None) -> tuple[str, Any]:
    """Which kind a part of a content is, and what it says."""
    if isinstance(part, str):
        return "text", part
    kind = part.get("type") or "text" if isinstance(part, dict) else None
    if kind in _TEXTS and isinstance(part.get("text"), str):
        return "text", part["text"]
    if role == "assistant" and kind in _THOUGHTS:
        text = first(part, ("thinking", "reasoning", "text", "content"))
        if isinstance(text, str):
            return "reasoning", text
    if role == "assistant" and kind in CALL_TYPES:
        (call,) = calls_of([part], what, unread)
        return "calls", call
    if role in ("user", "tool") and kind in _RESULTS:
        result = _content(_returned(first(part, _RETURNED)), "result", what, unread)
        _note(part, {"type", "name", *_RETURNED, *_ANSWERED}, unread)
        return "results", _result(result.text, first(part, _ANSWERED), part.get("name"), what)
    is_of_tools = isinstance(kind, str) and kind in (*CALL_TYPES, *_RESULTS)
    reason = "bad_tools" if is_of_tools else "bad_messages"
    raise BadRow(reason, f"{what} has a content part of type {kind!r}, which is not read in a turn of {role}")


def _kinds(parts: list[Any]) -> str:
    return ", ".join(str(part.get("type", "text")) if isinstance(part, dict) else "text" for part in parts)
