"""What this folder shares: a raw row, a group of K responses, a row that cannot be used, and a prompt's hash."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
#: `role` and `content`; `reasoning_content` and `tool_calls` of the assistant's turns; a tool's `tool_call_id`, `name`.
Messages = list[dict[str, Any]]
#: One turn of the assistant's that is nothing but text, or messages that begin with one.
Response = str | Messages


@dataclass
class Group:
    """K responses to one prompt. A response or a score may be missing, or of any type, until the rules were applied.

    Attributes:
        prompt: Messages; the last one is answered by the responses.
        responses: Texts or messages, K of them; None where there is none.
        scores: K values.
        fixed: Names of the rules by which something was fixed.
        ranked: Whether the scores are 1 and 0 for better and worse, and not in the data's unit.
        noted: What the report says of the row: `column X` or `message key X` that was not read, `control_tokens`,
            `rendered`.
        weight: What the prompt's loss is multiplied by; None where the row does not say.
        tools: Schemas of the tools that may be called, if any.
        chat_template_kwargs: Arguments for the chat template, if any.
    """

    prompt: Messages
    responses: list[Any]
    scores: list[Any]
    fixed: list[str] = field(default_factory=list)
    ranked: bool = False
    noted: list[str] = field(default_factory=list)
    weight: Any = None
    tools: list[Row] | None = None
    chat_template_kwargs: Row | None = None


def as_turns(response: Response) -> Messages:
    """A response as messages."""
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def as_response(turns: Messages) -> Response:
    """Messages as a response: a text where they are one turn of the assistant's that is nothing but text."""
    is_text = len(turns) == 1 and turns[0].keys() == {"role", "content"} and turns[0]["role"] == "assistant"
    return turns[0]["content"] if is_text else turns


class BadRow(Exception):
    """A row that cannot be used as it is: `reason` is a name of `rules.RULES`, `detail` says more to a person."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class FailedRow(BadRow):
    """A bad row whose action is `fail`."""


def as_number(value: Any) -> float | None:
    """A number, or a text that spells one; None for anything else, true and false too."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def prompt_hash(prompt: Messages, tools: list[Row] | None = None, template_kwargs: Row | None = None) -> int:
    """A hash of the prompt, and of the tools and arguments of the template where there are any.

    63 bits, the same on every machine; `eval_fraction` holds rows out by it.
    """
    said = [prompt, tools, template_kwargs] if tools or template_kwargs else prompt
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def named(columns: list[str]) -> list[str]:
    """Notes that a row has these columns, which the key `columns` names."""
    return [storable(f"named {column}") for column in columns]


def storable(text: str) -> str:
    """A text as Arrow can hold it: half surrogate pairs become question marks."""
    return text.encode("utf-8", "replace").decode()
