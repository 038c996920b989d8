"""Cuts the rendering of a row where its responses begin, and those of several turns into turns and context."""

import os.path
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from trl_nca.rendering.answers import BreakRule, Start, Template, answer_start, write_answer
from trl_nca.rendering.messages import Messages, RefusedRow, names_of_tools
from trl_nca.rendering.turns import Piece, Turn, check_spans, cut_by_spans, join_turns
from trl_nca.rendering.written import lost_from_prompt


class Split(NamedTuple):
    """A row's rendering, cut where the responses begin and where their turns do.

    Attributes:
        prompt: The prompt's rendering that sampling starts from.
        responses: What the template writes behind it for each response: turns of the assistant's, context between.
        broken: Names of the rules that the row breaks and is kept despite.
    """

    prompt: str
    responses: list[list[Piece]]
    broken: list[str]


class _Cut(NamedTuple):
    """A response from where its first turn that counts starts from.

    Attributes:
        start: What that turn starts from.
        pieces: The turns that count, and the context between them.
        whole: The rendering of a response whose start is not in it, so that it is cut elsewhere; else None.
    """

    start: str
    pieces: list[Piece]
    whole: str | None = None


def split_rendering(
    template: Template,
    prompt: Messages,
    responses: Sequence[Messages],
    actions: Mapping[str, str],
    score_tokens: str = "assistant",
) -> Split:
    """Renders a row, and checks that the rendering holds its text and begins as sampling does.

    Args:
        template: Renders messages in which stand-ins mark special tokens' texts.
        prompt: The prompt's messages.
        responses: The messages of each response.
        actions: By the name of a rule, "keep" to keep the rows that break it.
        score_tokens: See `trl_nca.config.NCAConfig`.

    Raises:
        RefusedRow: The template refuses the row, does not write its text, or writes another prompt than for sampling.
    """
    broken: list[str] = []

    def break_rule(reason: str, detail: str) -> None:
        if actions.get(reason) != "keep":
            raise RefusedRow(reason, detail)
        broken.extend({reason} - {*broken})

    first = Start(template, prompt)
    _check_prompt(first, break_rule)
    cuts = [_cut(first, turns, f"response {k + 1}", score_tokens, break_rule) for k, turns in enumerate(responses)]
    if any(cut.whole is not None for cut in cuts):
        return _split_elsewhere(first, cuts, broken)
    shared = _shared(first, [cut.start for cut in cuts])
    behind = [[Piece(cut.start[len(shared) :], [], False)] if len(cut.start) > len(shared) else [] for cut in cuts]
    return Split(shared, [context + cut.pieces for context, cut in zip(behind, cuts, strict=True)], broken)


def _check_prompt(first: Start, break_rule: BreakRule) -> None:
    """Checks that the prompt's text and the tools are in what sampling starts from."""
    rendering, tools = first.sampled_from, first.template.tools
    for reason, what in lost_from_prompt(rendering, first.messages):
        break_rule(reason, f"the chat template leaves out {what}")
    if not (writes_tools(first.template, first.messages)):
        names = ", ".join(names_of_tools(tools))
        break_rule("calls_not_rendered", f"the chat template leaves out the tools ({names})")


def writes_tools(template: Template, messages: Messages) -> bool:
    """Whether the names of the row's tools are in what sampling starts from, and not because of the messages alone."""
    if not template.tools:
        return True
    rendering = template.render(messages, add_generation_prompt=True)
    try:
        without = Template(template.renderer, None, template.kwargs, template.mark).render(messages, True)
    except RefusedRow:
        without = ""  # it needs them
    return rendering != without and all(name in rendering for name in names_of_tools(template.tools))


def _split_elsewhere(first: Start, cuts: Sequence[_Cut], broken: list[str]) -> Split:
    """A row of which a response does not begin as sampling starts: all are cut where they begin to differ."""
    wholes = [cut.start + cut.pieces[0].text if cut.whole is None else cut.whole for cut in cuts]
    if any(len(cut.pieces) > 1 for cut in cuts):
        raise RefusedRow("prompt_not_as_sampled", "and the row has responses of several turns")
    before = os.path.commonprefix([first.marked, *wholes])
    return Split(before, [[Piece(whole[len(before) :], None)] for whole in wholes], broken)


def _shared(first: Start, starts: Sequence[str]) -> str:
    """What all responses start from: the prompt, or less where the template writes it otherwise once turns follow."""
    if all(start.startswith(first.sampled_from) for start in starts):
        return first.sampled_from
    # Tokens before a special token do not depend on it: there texts may be cut.
    special = first.template.renderer.special_text
    common = len(os.path.commonprefix(starts))
    ends = [match.start() for match in special.finditer(starts[0]) if match.start() <= common]
    cut = max((end for end in ends if all(special.match(start, end) for start in starts)), default=0)
    if cut == 0:
        raise RefusedRow("turns_not_found", "the chat template writes the prompt otherwise once turns follow")
    return starts[0][:cut]


def _cut(first: Start, turns: Messages, name: str, score_tokens: str, break_rule: BreakRule) -> _Cut:
    """Cuts a response into what counts and context; for arguments and errors see `split_rendering`."""
    if not turns or turns[0].get("role") != "assistant":
        raise RefusedRow("no_assistant_turn", f"{name} does not begin with a turn of the assistant's")
    messages, before = [*first.messages, *turns], len(first.messages)
    indices = [i for i in range(before, len(messages)) if messages[i].get("role") == "assistant"]
    if score_tokens == "last":
        indices = indices[-1:]
    starts = [first if i == before else Start(first.template, messages[:i]) for i in indices]
    names = [name if len(turns) == 1 else f"turn {i - before + 1} of {name}" for i in indices]
    found = []
    for i, start, of_turn in zip(indices, starts, names, strict=True):
        answer = write_answer(start, messages[i], of_turn, break_rule)
        begin = answer_start(answer.rendering, start)
        if begin is None:
            detail = f"sampling starts behind {start.sampled_from[-30:]!r}, which {of_turn} lacks"
            if len(turns) > 1:
                raise RefusedRow("prompt_not_as_sampled", detail)
            break_rule("prompt_not_as_sampled", detail)
            return _Cut(start.sampled_from, [], answer.rendering)
        spans = answer.spans and [(max(a - begin, 0), b - begin) for a, b in answer.spans if b > begin]
        found.append(Turn(messages[i], of_turn, start.sampled_from, answer.rendering[begin:], spans))
        check_spans(found[-1])
    end = first.template.render(messages) if score_tokens == "all" and indices[-1] + 1 < len(messages) else None
    if len(turns) > 1:
        context = messages if end else messages[: indices[-1]]
        for reason, what in lost_from_prompt(end or starts[-1].sampled_from, context):
            break_rule(reason, f"the chat template leaves out {what} in {name}")
    try:
        pieces = join_turns(found, end, first.template.renderer.special_text)
    except RefusedRow as refused:
        pieces = cut_by_spans(first, messages[: indices[-1] + 1], found, refused, break_rule)
    if score_tokens == "all":
        pieces = [piece._replace(spans=None) for piece in pieces]
    return _Cut(found[0].start, pieces)
