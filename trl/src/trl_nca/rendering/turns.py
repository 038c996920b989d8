"""Joins the turns of a response into one rendering: what counts, and the context between.

Each turn of the assistant's that counts goes on from what sampling starts from there: the rendering of all messages
before it. So the renderings must fit into each other: what one turn starts from begins with the turn before it and
what that one started from. Where it does not (templates that take thinking out of earlier turns, or move the tools to
the last turn of the user's), one sequence of tokens cannot be what sampling saw at each turn.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from trl_nca.rendering.answers import BreakRule, Start
from trl_nca.rendering.messages import CLOSED, Messages, RefusedRow, reasoning_of, text_of
from trl_nca.rendering.renderer import Spans, common_length
from trl_nca.rendering.written import lost_part

#: What looks like a special token, to models whose tokenizers are not at hand.
_MARKUP = r"<[|｜][^<>|｜]*[|｜]>|</s>"
#: A thinking block without thinking, which some templates write into the last answer alone.
_EMPTY_THINKING = re.compile(r"\s*([<\[])(\w+)[>\]]\s*\1/\2[>\]]\s*")


class Piece(NamedTuple):
    """A part of a response's rendering.

    Attributes:
        text: What the template writes.
        spans: The characters of it that count; None for all.
        is_sampled: Whether it is a turn of the assistant's, and not what stands between two.
    """

    text: str
    spans: Spans | None
    is_sampled: bool = True


class Turn(NamedTuple):
    """A turn of the assistant's: its message, what it starts from, and what the template writes for it."""

    message: dict[str, Any]
    name: str
    start: str
    text: str
    spans: Spans | None


def check_spans(turn: Turn) -> None:
    """Checks that what the template marks as the assistant's holds the turn's answer."""
    if turn.spans:
        marked = "".join(turn.text[a:b] for a, b in turn.spans)
        if lost_part(marked, {"content": text_of(turn.message).rpartition(CLOSED)[2]}):
            detail = "the {% generation %} spans of the chat template do not hold the text of " + turn.name
            raise RefusedRow("turns_not_found", detail)


def join_turns(turns: Sequence[Turn], end: str | None, special_text: re.Pattern[str]) -> list[Piece]:
    """The turns of a response, and between them what stands there where the next one starts from."""
    special = re.compile(f"{special_text.pattern}|{_MARKUP}")
    pieces: list[Piece] = []
    for i, turn in enumerate(turns):
        following = turns[i + 1].start if i + 1 < len(turns) else end
        if following is None:
            pieces.append(Piece(turn.text, turn.spans))
            break
        placed = _place(turn, following, special)
        if placed is None:
            raise _refusal(turns[: i + 1], following)
        skipped, stop = placed
        text = following[len(turn.start) : stop]
        pieces += [Piece(text, _moved(turn, skipped, text)), Piece(following[stop:], [], False)]
    return pieces


def _moved(turn: Turn, skipped: int, text: str) -> Spans | None:
    """The spans of a turn in a text that lacks its first characters, and may end otherwise."""
    if turn.spans is None:
        return None
    same = common_length(turn.text[skipped:], text)
    moved = ((max(a - skipped, 0), b - skipped if b - skipped <= same else len(text)) for a, b in turn.spans)
    return [(a, b) for a, b in moved if a < b]


def _place(turn: Turn, following: str, special: re.Pattern[str]) -> tuple[int, int] | None:
    """Finds a turn in a later rendering.

    Returns:
        How many characters the turn lacks there (an empty thinking block), and where it ends; None if it is not there.
    """
    empty = _EMPTY_THINKING.match(turn.text)
    for skipped in (0, empty.end()) if empty else (0,):
        stop = turn_end(turn.start + turn.text[skipped:], len(turn.start), following, special)
        if stop is not None:
            return skipped, stop
    return None


def turn_end(rendering: str, start: int, following: str, special: re.Pattern[str]) -> int | None:
    """Where a turn ends in a rendering that goes on behind it.

    Args:
        rendering: One that ends with the turn.
        start: Where the turn begins.
        following: The one that goes on.
        special: Finds special tokens. Those at the end of a conversation may be others than inside of it, or more.

    Returns:
        An index in `following`; None where the turn is not in it.

    Example:
        >>> special = re.compile(r"<[a-z]+>")
        >>> turn_end("Q: Hi<end>A: Ho<return>", 11, "Q: Hi<end>A: Ho<end>Q: Hm", special)
        20
        >>> turn_end("Q: Hi<end>A: Ho<end><eos>", 11, "Q: Hi<end>A: Ho<end>Q: Hm", special)
        20
        >>> turn_end("Q: Hi A: Well, ho", 9, "Q: Hi A: ho Q: Hm", special)
    """
    if following.startswith(rendering):
        return len(rendering)
    common = common_length(rendering, following)
    if common < start:
        return None
    found = (match for text in (rendering, following) for match in special.finditer(text, start))
    common = min([common, *(m.start() for m in found if m.start() < common < m.end())])
    if special.sub("", rendering[common:]).strip():
        return None
    written = rendering[start:common].rstrip()
    is_ended = any(m.end() == len(written) for m in special.finditer(written))
    other = None if is_ended else special.match(following, common)
    return other.end() if other else common


def _refusal(turns: Sequence[Turn], following: str) -> RefusedRow:
    """Why turns that a later rendering does not hold cannot be one sequence of tokens."""
    fix = "score_tokens: last trains on the last turn alone"
    for turn in turns:
        if (reasoning_of(turn.message) or CLOSED in text_of(turn.message)) and lost_part(following, turn.message):
            detail = f"the chat template leaves out the reasoning of {turn.name} once other turns follow; {fix}"
            return RefusedRow("response_not_rendered", detail)
    name = turns[-1].name
    detail = f"the chat template writes {name}, or what stands before it, otherwise once other turns follow; {fix}"
    return RefusedRow("turns_not_found", detail)


def cut_by_spans(
    first: Start, messages: Messages, turns: Sequence[Turn], refusal: RefusedRow, break_rule: BreakRule
) -> list[Piece]:
    """A response whose turns only the template's own spans find, since they do not go on from what sampling saw."""
    rendering, spans = first.template.render(messages), first.template.generated(messages)
    start = first.sampled_from
    if not spans or not rendering.startswith(start) or refusal.reason == "response_not_rendered":
        raise refusal
    for turn in turns:
        if lost_part(rendering[len(start) :], turn.message):
            raise refusal
    break_rule("prompt_not_as_sampled", refusal.detail)
    return [
        Piece(rendering[len(start) :], [(max(a - len(start), 0), b - len(start)) for a, b in spans if b > len(start)])
    ]
