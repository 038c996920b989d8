"""Reads a value as messages: their roles, their contents, and messages that somebody wrote down as text.

A message becomes `role` and `content`, a text. What else it has changes what is trained on (calls, reasoning, images),
and the row is dropped under the name of it; or it does not, and the report names it.
"""

import ast
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from alignment.data.row import BadRow, Messages, Row

#: Spellings of the roles; case and surrounding white space do not matter.
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "gpt-4", "gpt4", "model", "bot", "chatbot", "ai", "bard", "bing",
                  "claude", "llm", "agent"),
    "tool": ("tool", "function", "observation", "function_response", "tool_response", "tool_result", "ipython"),
}  # fmt: skip
_ROLE_OF = {spelling: role for role, spellings in ROLES.items() for spelling in spellings}
#: A turn that is a call.
_CALL_ROLES = ("function_call", "tool_call", "tool_calls")
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value", "text")
_READ_KEYS = {*_ROLE_KEYS, *_CONTENT_KEYS}
#: Keys of a message that cannot be left out without changing what is trained on: the rule for each.
_CALLS = ("tool_calls", "tool_call", "function_call", "function_calls", "tools", "functions")
_REASONING = ("reasoning_content", "reasoning", "reasoning_details", "thinking", "thought", "thoughts")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_KEYS_THAT_COUNT = (
    dict.fromkeys(_CALLS, "tool_calls") | dict.fromkeys(_REASONING, "reasoning_content")
    | dict.fromkeys(_MEDIA, "bad_messages")
)  # fmt: skip
#: Types of the parts of a content, likewise; any other that is no text is `bad_messages`.
_PARTS_THAT_COUNT = {
    **dict.fromkeys(("tool_use", "tool_result", "tool_call", "function_call", "tool_response"), "tool_calls"),
    **dict.fromkeys(("thinking", "redacted_thinking", "reasoning"), "reasoning_content"),
}
#: What a chat template writes around a turn, in the templates that are met most often.
_TEMPLATE_MARKS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]",
    "[/INST]", "<<SYS>>", "<|user|>", "<|assistant|>", "<|system|>", "<｜User｜>", "<｜Assistant｜>", "<|turn>",
    "<|START_OF_TURN_TOKEN|>", "<|start|>user", "<|start|>assistant", "<|endoftext|>", "### Human:", "### Assistant:",
    "### Instruction:", "### Response:", "\n\nHuman:", "\n\nAssistant:", "USER: ", "ASSISTANT: ",
)  # fmt: skip


def is_empty(value: Any, depth: int = 3) -> bool:
    """Whether a column or key is as if it were absent: tables fill up with nulls, and with objects of nulls.

    Example:
        >>> is_empty([{"id": None, "function": {"name": None}}]), is_empty([0])
        (True, False)
    """
    if isinstance(value, list | dict):
        items = value.values() if isinstance(value, dict) else value
        return not value or (depth > 0 and all(is_empty(item, depth - 1) for item in items))
    return value is None or value == ""


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
        value = row.get(name)
        if not is_empty(value) and value is not False and value not in ("[]", "{}", "null", "None"):
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
            turns = dialogue(value) if value.startswith("\n\nHuman:") or _is_open_dialogue(value) else None
        if turns is None:
            return [{"role": "user", "content": value}]
        if turns and turns[-1] == {"role": "assistant", "content": ""}:  # where the answer is to follow
            del turns[-1]
        value = turns
    objects = as_objects(value)
    if not isinstance(objects, list):
        raise BadRow("bad_messages", f"{what} is neither text nor messages with 'role' and 'content'")
    return [_message(message, what, unread) for message in objects]


def as_objects(value: Any) -> Any:
    """A list of objects, also from one object or from a dict of lists, as tables store them; else the value itself."""
    if not isinstance(value, dict):
        return value
    columns = {name: column for name, column in value.items() if column is not None}
    if not columns or not all(isinstance(column, list) for column in columns.values()):
        return [value]
    if len({len(column) for column in columns.values()}) > 1:
        return [value]
    return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]


def written_messages(text: str) -> list[Any] | None:
    """The messages that a text is, written as JSON or as Python prints them; None for any other text.

    Raises:
        BadRow: It looks like messages, and cannot be read as such.
    """
    if not re.match(r"\s*(\[\s*(array\(\[\s*)?)?\{", text) or not _ROLE_IN_TEXT.search(text):
        return None
    objects = as_objects(read_written(text))
    if not isinstance(objects, list) or not all(isinstance(item, dict) for item in objects):
        if text.lstrip().startswith("[") and not _begins_with_json(text):
            raise BadRow("bad_messages", "text that looks like messages and cannot be read; is it cut off?")
        return None
    is_messages = all(isinstance(_first(item, _CONTENT_KEYS), str | list | None) for item in objects)
    return objects if is_messages and any(_has_known_role(item) for item in objects) else None


_SPELLINGS = "|".join(map(re.escape, [*_ROLE_OF, *_CALL_ROLES]))
#: Stands in a text that is messages: a known role.
_ROLE_IN_TEXT = re.compile(rf"""['"](?:role|from)['"]\s*:\s*\[?\s*['"]\s*(?:{_SPELLINGS})\s*['"]""", re.IGNORECASE)


_STRING = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
#: What numpy prints of a list of texts, without commas, and of one of numbers, nan among them.
_NUMPY_TEXTS = re.compile(rf"\[\s*{_STRING}(?:\s+{_STRING})+\s*\]", re.DOTALL)
_NUMBER = r"[-+\w.]+"
_NUMBERS = re.compile(rf"\[\s*{_NUMBER}(?:[\s,]+{_NUMBER})*\s*\]")


def _begins_with_json(text: str) -> bool:
    """Whether a text has whole JSON at its start, and goes on: it speaks of it, and is not cut off."""
    try:
        json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return False
    return True


def read_written(text: str) -> Any:
    """What a text says as JSON, or as Python and numpy print lists and dicts; None where it is none of these.

    Example:
        >>> read_written("['a' 'b']"), read_written("[0.5 nan]"), read_written("[{'role': 'user'}\\n {'role': 'x'}]")
        (['a', 'b'], [0.5, None], [{'role': 'user'}, {'role': 'x'}])
    """
    text = text.strip()
    numpy = re.sub(r"\barray\((\[.*\])(?:,\s*dtype=object)?\)", r"\1", text, flags=re.DOTALL)
    numpy = re.sub(r"\}\s*\n\s*\{", "}, {", numpy)
    if _NUMPY_TEXTS.fullmatch(text):
        numpy = f"[{', '.join(re.findall(_STRING, text, re.DOTALL))}]"
    elif _NUMBERS.fullmatch(text):
        numpy = f"[{', '.join(re.findall(_NUMBER, text))}]".replace("nan", "None")
    for parse, candidate in ((json.loads, text), (ast.literal_eval, numpy)):
        try:
            return parse(candidate)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def dialogue(text: str) -> Messages | None:
    """The turns of hh-rlhf's text, `Human: ... Assistant: ...`; None for any other text.

    Example:
        >>> [turn["role"] for turn in dialogue("\\n\\nHuman: Name a prime.\\n\\nAssistant: 7")]
        ['user', 'assistant']
    """
    if not text.lstrip().startswith("Human:") or "\n\nAssistant:" not in text:
        return None
    _, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[speaker], "content": said.strip()} for speaker, said in pairs]


def _is_open_dialogue(text: str) -> bool:
    return text.lstrip().startswith("Human:") and text.rstrip().endswith("\n\nAssistant:")


def _first(message: Row, keys: Iterable[str]) -> Any:
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _has_known_role(item: Row) -> bool:
    role = _first(item, _ROLE_KEYS)
    return isinstance(role, str) and (role.strip().lower() in _ROLE_OF or role.strip().lower() in _CALL_ROLES)


def _message(message: Any, what: str, unread: set[str] | None) -> dict[str, str]:
    """A message with its role and content."""
    role = _first(message, _ROLE_KEYS) if isinstance(message, dict) else None
    if not isinstance(role, str):
        raise BadRow("bad_messages", f"{what} is neither text nor messages with 'role' and 'content'")
    spelling = role.strip().lower()
    if spelling in _CALL_ROLES:
        raise BadRow("tool_calls", f"{what} has a turn of {role}, which is not read yet")
    if spelling not in _ROLE_OF:
        raise BadRow("bad_messages", f"{what} has the role {role!r}; known are {', '.join(_ROLE_OF)}")
    refuse(message, _KEYS_THAT_COUNT, f"{what} has a turn with")
    content = _content(_first(message, _CONTENT_KEYS), what)
    if unread is not None:
        unread |= {str(key) for key in message if key not in _READ_KEYS and not is_empty(message[key])}
    return {"role": _ROLE_OF[spelling], "content": content}


def _content(content: Any, what: str) -> str:
    """Text of a content: a text, or parts that are text."""
    if isinstance(content, str):
        return content
    parts = as_objects(content)
    if not isinstance(parts, list) or content == []:
        raise BadRow("bad_messages", f"{what} is neither text nor messages with 'role' and 'content': one is no text")
    return "".join(part if isinstance(part, str) else _part_text(part, what) for part in parts)


def _part_text(part: Any, what: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return part["text"]
    reason = _PARTS_THAT_COUNT.get(kind, "bad_messages") if isinstance(kind, str) else "bad_messages"
    raise BadRow(reason, f"{what} has a content part of type {kind!r}; text is read alone")
