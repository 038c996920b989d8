"""What a rendering lacks of the messages that it was made of.

Templates lose text in silence: what stands before `</think>`, calls and tools that they do not know, all of it where
they expect lists of parts. White space and the escapes of JSON do not count.
"""

import html
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from trl_nca.rendering.messages import CLOSED, Messages, calls_of, reasoning_of, text_of


class Part(NamedTuple):
    """A text, number, bool or None that a rendering must have, and what it is: "text", "reasoning" or "calls"."""

    kind: str
    value: Any


def lost_part(rendering: str, message: dict[str, Any]) -> str | None:
    """What a rendering lacks of an answer.

    Args:
        rendering: Of the answer alone.
        message: What it was made of.

    Returns:
        "text", "reasoning" or "calls"; None where it has all.

    Example:
        >>> call = {"function": {"name": "add", "arguments": {"a": "1 kg"}}}
        >>> lost_part('{"name": "add", "parameters": {"a": "1 kg"}}', {"content": "", "tool_calls": [call]})
        >>> lost_part("I add a, 1 kg", {"content": "I add a, 1 kg", "tool_calls": [call]})
        'calls'
    """
    parts = [Part("text", text_of(message)), Part("reasoning", reasoning_of(message)), *_parts_of_calls(message)]
    lost = _lost(rendering, parts)
    return lost.kind if lost else None


def lost_from_prompt(rendering: str, prompt: Messages) -> list[tuple[str, str]]:
    """What a rendering lacks of a prompt.

    Args:
        rendering: Of the prompt.
        prompt: What it was made of. Thinking in turns of the assistant may be missing, as sampling too will lack it.

    Returns:
        For each of it the name of a rule, and what is missing.
    """
    if not any("tool_calls" in turn for turn in prompt):
        written = _squeezed(rendering)
        lost = [turn for turn in prompt if _place(written, _answer(turn)) is None]
        return [_rule_of(turn) for turn in lost]
    parts = [(_rule_of(turn), Part("text", _answer(turn))) for turn in prompt]
    called = ("calls_not_rendered", "a call in the assistant's turn")
    parts += [(called, part) for turn in prompt for part in _parts_of_calls(turn)]
    lost = _lost(rendering, [part for _, part in parts])
    return [next(rule for rule, part in parts if part is lost)] if lost else []


def _rule_of(turn: dict[str, Any]) -> tuple[str, str]:
    role = str(turn.get("role"))
    rules = {"system": "system_not_rendered", "tool": "calls_not_rendered"}
    return rules.get(role, "prompt_not_rendered"), f"the text of the {role}'s turn"


def _answer(turn: dict[str, Any]) -> str:
    """The text of a turn without the thinking before it."""
    return text_of(turn).rpartition(CLOSED)[2] if turn.get("role") == "assistant" else text_of(turn)


def _parts_of_calls(message: dict[str, Any]) -> list[Part]:
    values = (value for call in calls_of(message) for value in (call.get("name"), *_leaves(call.get("arguments"))))
    return [Part("calls", value) for value in values]


def _leaves(value: Any) -> Iterator[Any]:
    """The names and values in a call's arguments."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _lost(rendering: str, parts: list[Part]) -> Part | None:
    """The first part that a rendering lacks. What one of them is found in is not another's too."""
    written = _squeezed(rendering)
    for part in sorted(parts, key=lambda part: -len(str(part.value))):
        place = _place(written, part.value)
        if place is None:
            return part
        written = written[: place[0]] + "\0" * (place[1] > place[0]) + written[place[1] :]
    return None


def _place(written: str, value: Any) -> tuple[int, int] | None:
    """Where a value stands in squeezed text: as it is, or as JSON, JSON in JSON, Python or XML write it."""
    for form in _forms(value):
        squeezed = _squeezed(form)
        if (start := written.find(squeezed)) >= 0:
            return start, start + len(squeezed)
    return None


def _forms(value: Any) -> Iterator[str]:
    yield str(value)
    if not isinstance(value, str):
        yield json.dumps(value)
        return
    for is_ascii in (False, True):
        once = json.dumps(value, ensure_ascii=is_ascii)[1:-1]
        yield once
        yield json.dumps(once, ensure_ascii=is_ascii)[1:-1]
    yield repr(value)[1:-1]
    yield html.escape(value)


def _squeezed(text: str) -> str:
    return "".join(text.split())
