"""Renders an answer, checks that all of it is written, and finds where sampling starts it.

Some templates start sampling from a prompt that no finished answer has, and some leave thinking out of an answer. So
each rendering is compared with the messages that it was made of, and with the prompt that sampling starts from.
"""

import json
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

from trl_nca.rendering.messages import (
    CLOSED,
    Messages,
    RefusedRow,
    calls_of,
    reasoning_of,
    text_of,
    with_arguments_as_text,
)
from trl_nca.rendering.renderer import Renderer, Spans, common_length
from trl_nca.rendering.written import lost_part

#: A tag that is open at the end of a text: <think> or [THINK].
_OPEN_TAG = re.compile(r"([<\[])(\w+)[>\]]\s*$")

#: Takes the name of a rule and what breaks it; raises `RefusedRow` unless such rows are kept.
BreakRule = Callable[[str, str], None]


class Template:
    """A chat template with the tools and arguments of a row.

    Args:
        renderer: The tokenizer's.
        tools: The row's, with stand-ins.
        kwargs: The row's `chat_template_kwargs`.
        mark: A character that occurs in no text of the row.
    """

    def __init__(self, renderer: Renderer, tools: list[dict[str, Any]] | None, kwargs: dict[str, Any], mark: str):
        self.renderer, self.tools, self.kwargs, self.mark = renderer, tools, kwargs, mark
        self._joins_arguments: bool | None = None

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """See `Renderer.render`."""
        return self.renderer.render(self._readable(messages), add_generation_prompt, tools=self.tools, **self.kwargs)

    def generated(self, messages: Messages) -> Spans | None:
        """See `Renderer.generated`."""
        return self.renderer.generated(self._readable(messages), self.tools, **self.kwargs)

    def _readable(self, messages: Messages) -> Messages:
        """The messages, with arguments of calls as JSON text for a template that prints them as they are."""
        if not any("tool_calls" in message for message in messages):
            return messages
        as_text = [with_arguments_as_text(message) for message in messages]
        if self._joins_arguments is None:
            self._joins_arguments = self._prints_dicts(messages, as_text)
        return as_text if self._joins_arguments else messages

    def _prints_dicts(self, messages: Messages, as_text: Messages) -> bool:
        """Whether a template writes arguments that are a dict as Python does, or fails on them, and not on JSON."""
        try:
            written = self.renderer.render(messages, tools=self.tools, **self.kwargs)
        except RefusedRow:
            written = None
        arguments = [call.get("arguments") for message in messages for call in calls_of(message)]
        if written is not None and not any(a and isinstance(a, dict) and str(a) in written for a in arguments):
            return False
        try:
            return bool(self.renderer.render(as_text, tools=self.tools, **self.kwargs))
        except RefusedRow:
            return False

    @property
    def knows_thinking(self) -> bool:
        """Whether the template speaks of `<think>`."""
        return "think>" in str(self.renderer.tokenizer.chat_template)


class Start:
    """What a turn of the assistant's starts from: messages, and their renderings, each made once.

    Args:
        template: Renders them.
        messages: All before the turn.
    """

    def __init__(self, template: Template, messages: Messages):
        self.template, self.messages = template, messages

    @cached_property
    def sampled_from(self) -> str:
        """What sampling starts from."""
        return self.template.render(self.messages, add_generation_prompt=True)

    @cached_property
    def marked(self) -> str:
        """Of an answer that is the mark alone."""
        return self.answered({"role": "assistant", "content": self.template.mark})

    @cached_property
    def unanswered(self) -> str:
        """Of the messages alone."""
        return self.template.render(self.messages)

    def answered(self, message: dict[str, Any]) -> str:
        """Of the messages and an answer."""
        return self.template.render([*self.messages, message])


class Answer(NamedTuple):
    """The rendering of a conversation up to the end of an answer.

    Attributes:
        rendering: Of the messages before the answer, and of it.
        spans: The parts of it that the template marks as the assistant's; None for a template that marks none.
    """

    rendering: str
    spans: Spans | None


def write_answer(start: Start, message: dict[str, Any], name: str, break_rule: BreakRule) -> Answer:
    """Renders an answer, and checks that all of it is written. Thinking that the template leaves out is put in.

    Args:
        start: What it starts from.
        message: The answer.
        name: Of the answer, for a person.
        break_rule: For `calls_not_rendered`.

    Raises:
        RefusedRow: Text is missing, or added.
    """
    rendering = start.answered(message)
    lost = None if _is_verbatim(start, message, rendering) else _lost(start, message, rendering)
    if lost == "calls":
        break_rule("calls_not_rendered", f"the chat template leaves out a call in {name}, or what it is called with")
    elif lost and (thought := _put_thinking_in(start, message)):
        return thought
    elif lost:
        raise RefusedRow("response_not_rendered", _detail(message, name, lost))
    return Answer(rendering, start.template.generated([*start.messages, message]))


def _is_verbatim(start: Start, message: dict[str, Any], rendering: str) -> bool:
    """Whether an answer without thinking is written as it is; what every other is must be looked at."""
    text, mark = message.get("content"), start.template.mark
    if not isinstance(text, str) or CLOSED in text or len(message) > 2:
        return False
    return mark in start.marked and start.marked.replace(mark, text) == rendering


def _lost(start: Start, message: dict[str, Any], rendering: str) -> str | None:
    """What a rendering lacks of an answer: see `lost_part`; or "added" for thinking that is not the answer's."""
    mark = start.template.mark
    has_text = mark in start.marked or "tool_calls" in message or isinstance(message["content"], list)
    after = start.marked.rpartition(mark)[2] if mark in start.marked else ""
    written = rendering[common_length(start.unanswered, rendering) :].removesuffix(after)
    lost = lost_part(written, message) if has_text or not text_of(message).strip() else "text"
    num_thoughts = text_of(message).count(CLOSED) + bool(reasoning_of(message))
    if not lost and rendering.count(CLOSED) - start.unanswered.count(CLOSED) > num_thoughts >= 1:
        return "added"
    return lost


def _put_thinking_in(start: Start, message: dict[str, Any]) -> Answer | None:
    """An answer with its thinking before its text, as sampling writes it; None where that cannot be.

    The thinking is in the text, or beside it where the template speaks of <think> and reads no reasoning. First the
    template is given both as text; if it leaves the thinking out, a mark in their place.
    """
    mark, text, reasoning = start.template.mark, text_of(message), reasoning_of(message)
    if CLOSED not in text and not (reasoning and start.template.knows_thinking):
        return None
    if reasoning:
        text = f"<think>\n{reasoning}\n{CLOSED}\n\n{text}"
    plain = {key: value for key, value in message.items() if key in ("role", "tool_calls")} | {"content": text}
    if reasoning and not _lost(start, plain, rendering := start.answered(plain)):
        return Answer(rendering, start.template.generated([*start.messages, plain]))
    marked = start.answered({**plain, "content": mark})
    rendering = marked.replace(mark, text)
    if marked.count(mark) != 1 or _lost(start, plain, rendering):
        return None
    spans = start.template.generated([*start.messages, {**plain, "content": mark}])
    at, more = marked.index(mark), len(text) - 1
    moved = spans and [(a + more * (a > at), b + more * (b > at)) for a, b in spans]
    return Answer(rendering, moved)


def _detail(message: dict[str, Any], name: str, lost: str) -> str:
    """Why an answer is refused."""
    if lost == "added":
        return f"the chat template writes other thinking before that of {name}; set another chat_template"
    what = "the text of"
    if lost == "reasoning":
        what = "the reasoning (reasoning_content) of"
    elif CLOSED in text_of(message):
        what = f"what stands before {CLOSED} in"
    return f"the chat template leaves out {what} {name}; set chat_template to one that writes it"


def answer_start(rendering: str, start: Start) -> int | None:
    """Where an answer begins in the rendering of a conversation that ends with it; see `response_start`."""
    sampled_from = start.sampled_from
    if rendering.startswith(sampled_from):
        return len(sampled_from)
    # Up to here the rendering does not depend on the answer. What sampling is given may end earlier: some templates
    # write an empty thinking block into a finished answer, others a space before its first word.
    before = rendering[: common_length(start.marked, rendering)]
    last_turn = text_of(start.messages[-1]) if start.messages else ""
    for anchor in (last_turn, json.dumps(last_turn, ensure_ascii=False)):  # as templates write what a tool returned
        found = response_start(rendering, sampled_from, before, anchor)
        if found is not None:
            return found
    return None


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
    last_turn = last_turn.strip()
    if not last_turn or last_turn not in sampled_from or last_turn not in before:
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
