"""The types of this folder: a raw row, a group of K responses, and a row that cannot be used."""

from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
Messages = list[dict[str, str]]


@dataclass
class Group:
    """K responses to one prompt. A response or a score may be missing, or of any type, until the rules were applied.

    Attributes:
        prompt: Messages; the last one is answered by the responses.
        responses: Texts, K of them; None where there is none.
        scores: K values.
        fixed: Names of the rules by which something was fixed.
        ranked: Whether the scores are 1 and 0 for better and worse, and not in the data's unit.
        noted: What the report says of the row: `column X` or `message key X` that was not read, `control_tokens`,
            `rendered`.
    """

    prompt: Messages
    responses: list[Any]
    scores: list[Any]
    fixed: list[str] = field(default_factory=list)
    ranked: bool = False
    noted: list[str] = field(default_factory=list)


class BadRow(Exception):
    """A row that cannot be used as it is: `reason` is a name of `rules.RULES`, `detail` says more to a person."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class FailedRow(BadRow):
    """A bad row whose action is `fail`."""
