"""Messages that somebody wrote down as text: JSON, what Python prints, or a dialogue; and how roles are spelt."""

import ast
import json
import re
from collections.abc import Iterable
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
ROLE_OF = {spelling: role for role, spellings in ROLES.items() for spelling in spellings}
#: A turn that is a call.
CALL_ROLES = ("function_call", "tool_call", "tool_calls")
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "text")


def first(message: Row, keys: Iterable[str]) -> Any:
    """The first value of these keys that is there."""
    return next((message[key] for key in keys if message.get(key) is not None), None)


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


def is_absent(value: Any) -> bool:
    """Whether a key says nothing, also as text."""
    return is_empty(value) or value is False or value in ("[]", "{}", "null", "None")


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
    is_messages = all(isinstance(first(item, CONTENT_KEYS), str | list | None) for item in objects)
    return objects if is_messages and any(_has_known_role(item) for item in objects) else None


_SPELLINGS = "|".join(map(re.escape, [*ROLE_OF, *CALL_ROLES]))
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


def is_open_dialogue(text: str) -> bool:
    return text.lstrip().startswith("Human:") and text.rstrip().endswith("\n\nAssistant:")


def _has_known_role(item: Row) -> bool:
    role = first(item, ROLE_KEYS)
    return isinstance(role, str) and (role.strip().lower() in ROLE_OF or role.strip().lower() in CALL_ROLES)
