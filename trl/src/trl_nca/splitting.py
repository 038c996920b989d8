"""Cuts the rendering of a row where its responses begin, and checks that it holds the row's text.

Templates lose text in silence (what stands before `</think>`, all of it where they expect lists of parts), and some
start sampling from a prompt that no finished answer has. So each rendering is compared with the text that it was made
of, and with the prompt that sampling starts from.
"""

import json
import os.path
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from trl_nca.rendering import Messages, RefusedRow, text_of

#: The end of the thinking in an answer.
_CLOSED = "</think>"
#: A tag that is open at the end of a text: <think> or [THINK].
_OPEN_TAG = re.compile(r"([<\[])(\w+)[>\]]\s*$")


class Split(NamedTuple):
    """A row's rendering, cut where the responses begin.

    Attributes:
        prompt: The prompt's rendering that sampling starts from.
        rests: What the template writes behind it for each response.
        broken: Names of the rules that the row breaks and is kept despite.
    """

    prompt: str
    rests: list[str]
    broken: list[str]


def split_rendering(
    render: Callable[..., str], prompt: Messages, turns: Sequence[Messages], mark: str, actions: Mapping[str, str]
) -> Split:
    """Renders a row, and checks that the rendering holds its text and begins as sampling does.

    Args:
        render: See `Renderer.render`.
        prompt: The prompt's messages, in which stand-ins mark special tokens' texts.
        turns: The messages of each response, likewise.
        mark: A character that occurs in none of them.
        actions: By the name of a rule, "keep" to keep the rows that break it.

    Raises:
        RefusedRow: The template refuses the row, does not write its text, or writes another prompt than for sampling.
    """
    broken: list[str] = []

    def break_rule(reason: str, detail: str) -> None:
        if actions[reason] != "keep":
            raise RefusedRow(reason, detail)
        broken.append(reason)

    texts = [render([*prompt, *turn]) for turn in turns]
    marked = render([*prompt, {"role": "assistant", "content": mark}])
    sampled_from = render(prompt, add_generation_prompt=True)
    for role in lost_roles(sampled_from, prompt):
        reason = "system_not_rendered" if role == "system" else "prompt_not_rendered"
        break_rule(reason, f"the chat template leaves out the text of the {role}'s turn")
    for k, (turn, text) in enumerate(zip(turns, texts, strict=True)):
        if not _is_verbatim(turn, text, marked, mark):
            check_response(k + 1, turn, text, marked, mark, render(prompt))
    # Up to here the rendering does not depend on the response. What sampling is given may end earlier: some templates
    # write an empty thinking block into a finished answer, others a space before its first word.
    before = os.path.commonprefix([marked, *texts])
    last_turn = text_of(prompt[-1]) if prompt else ""
    starts = [response_start(text, sampled_from, before, last_turn) for text in texts]
    if None in starts:
        no_start = f"sampling starts behind {sampled_from[-30:]!r}, which response {starts.index(None) + 1} lacks"
        break_rule("prompt_not_as_sampled", no_start)
        return Split(before, [text[len(before) :] for text in texts], broken)
    return Split(sampled_from, [text[start:] for text, start in zip(texts, starts, strict=True)], broken)


def lost_roles(rendering: str, prompt: Messages) -> list[str]:
    """Roles of the turns of a prompt whose text a template did not write.

    Args:
        rendering: Of the prompt.
        prompt: What it was made of. Thinking in turns of the assistant may be missing, as sampling too will lack it.
    """
    written = _squeezed(rendering)
    lost = []
    for turn in prompt:
        text = text_of(turn).rpartition(_CLOSED)[2] if turn.get("role") == "assistant" else text_of(turn)
        in_json = json.dumps(text, ensure_ascii=False)[1:-1]  # as templates write what a tool returned
        if _squeezed(text) not in written and _squeezed(in_json) not in written:
            lost.append(str(turn.get("role")))
    return lost


def _is_verbatim(response: Messages, rendering: str, marked: str, mark: str) -> bool:
    """Whether a response without thinking is written as it is; what every other is must be looked at."""
    texts = [text_of(message) for message in response]
    return mark in marked and [marked.replace(mark, text) for text in texts] == [rendering] and _CLOSED not in texts[0]


def check_response(number: int, response: Messages, rendering: str, marked: str, mark: str, prompt: str) -> None:
    """Checks that a template wrote the text of a response, but for white space, and no thinking before its own.

    Args:
        number: Of the response in its row, for the message.
        response: Its messages.
        rendering: Of prompt and response.
        marked: Of the prompt and a response that is `mark` alone.
        mark: A character that occurs nowhere else.
        prompt: The rendering of the prompt alone.

    Raises:
        RefusedRow: Text is missing, or added.
    """
    texts = [text_of(message) for message in response]
    num_thoughts = "".join(texts).count(_CLOSED)
    after = marked.rpartition(mark)[2] if mark in marked else ""
    written = _squeezed(rendering[len(os.path.commonprefix([prompt, rendering])) :].removesuffix(after))
    is_written = all(_squeezed(text) in written if mark in marked else not text.strip() for text in texts)
    if not is_written:
        lost = f"what stands before {_CLOSED} in" if num_thoughts and mark in marked else "the text of"
        detail = f"the chat template leaves out {lost} response {number}; set chat_template to one that writes it"
        raise RefusedRow("response_not_rendered", detail)
    if rendering.count(_CLOSED) - prompt.count(_CLOSED) > num_thoughts >= 1:
        detail = f"the chat template writes other thinking before that of response {number}; set another chat_template"
        raise RefusedRow("response_not_rendered", detail)


def response_start(rendering: str, sampled_from: str, before: str, last_turn: str) -> int | None:
    """Where a response begins in a rendering, so that what stands before it ends as sampling starts.

    Earlier turns may differ: some templates put the system's text into the last turn, if it is the user's. What the
    prompt opens for sampling, such as `<think>`, may be the beginning of the response's own text, or be missing where
    the response closes it, as what was sampled from such a prompt does.

    Args:
        rendering: Of prompt and response.
        sampled_from: The prompt's rendering that sampling starts from.
        before: What stands before the response in a rendering, as far as it does not depend on the response.
        last_turn: The text of the prompt's last turn.

    Returns:
        An index in `rendering`; None where sampling starts from something that is not in it.

    Example:
        >>> response_start("U: Hi A: <think>Hm</think>Ho", "U: Hi A: <think>\\n", "U: Hi A: ", "Hi")
        16
        >>> response_start("U: Hi A: Hm</think>Ho", "U: Hi A: <think>\\n", "U: Hi A: ", "Hi")
        9
        >>> response_start("U: Hi A: Ho", "U: Hi A: <think>\\n", "U: Hi A: ", "Hi")
    """
    if rendering.startswith(sampled_from):
        return len(sampled_from)
    last_turn = last_turn.strip()
    if last_turn not in sampled_from or last_turn not in before:
        return None
    written = rendering[before.rindex(last_turn) + len(last_turn) :]
    opening = sampled_from[sampled_from.rindex(last_turn) + len(last_turn) :]
    length = _matched(opening, written)
    tag = _OPEN_TAG.search(opening)
    if length is None and tag and tag[0].strip() not in written and f"{tag[1]}/{tag[2]}" in written:
        length = _matched(opening[: tag.start()], written)
    return None if length is None else len(rendering) - len(written) + length


def _matched(opening: str, written: str) -> int | None:
    """How much of a text is the opening that it begins with, exactly or but for white space; None if it does not."""
    if written.startswith(opening):
        return len(opening)
    match = re.match(r"\s*" + r"\s*".join(map(re.escape, opening.split())) + r"\s*", written)
    return match.end() if match else None


def _squeezed(text: str) -> str:
    return "".join(text.split())
