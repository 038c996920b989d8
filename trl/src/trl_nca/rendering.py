"""Text through the tokenizer's chat template to token ids, and where the prompt ends in a rendering.

A message's text stays text: what spells a special token never becomes that token, and no tokenizer puts a space where
the rendering has none. Templates lose text in silence (what stands before `</think>`, all of it where they expect lists
of parts), so each rendering is compared with the text that it was made of.
"""

import json
import os.path
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]

#: Planes 15 and 16: characters that have no meaning of their own, of which those that a row lacks can stand for others.
_PRIVATE_USE = range(0xF0000, 0x10FFFE)
#: Text to go on from, for tokenizers that put a space before all text that they are given.
_ANCHORS = ("\n", "a", "0", ".", "~")
#: What the code in a template may raise, besides jinja's own errors.
_TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class RefusedRow(Exception):
    """A row that cannot be trained on: `reason` is the name of a rule, `detail` says more to a person."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of the tokenizer's special tokens, in the order of their ids."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


class StandIns:
    """Characters that stand for special tokens' texts inside the messages of a row while the template runs.

    Args:
        special_text: Finds the text of a special token.
        texts: All texts of the row.
        template: The chat template. Characters that it or one of the texts holds stand for nothing.
    """

    def __init__(self, special_text: re.Pattern[str], texts: Iterable[str], template: str):
        whole = "\n".join(texts)
        taken = set(re.findall(f"[{chr(_PRIVATE_USE[0])}-{chr(_PRIVATE_USE[-1])}]", template + whole))
        free = (chr(i) for i in _PRIVATE_USE if chr(i) not in taken)
        #: Stands for a whole response.
        self.mark = next(free)
        self._special_text = special_text
        self._of_text = {text: next(free) for text in sorted(set(special_text.findall(whole)))}
        self._literals = {character: text for text, character in self._of_text.items()}

    def protect(self, text: str) -> str:
        """The text with its stand-ins."""
        return self._special_text.sub(lambda match: self._of_text[match[0]], text)

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """Cuts a rendering into pieces, and says of each whether it is literal: no special token is meant by it."""
        if not self._literals:
            return iter([(text, False)] if text else [])
        pieces = re.split(f"([{''.join(self._literals)}])", text)
        return ((self._literals.get(piece, piece), piece in self._literals) for piece in pieces if piece)


class Renderer:
    """A tokenizer and its chat template.

    Args:
        tokenizer: A tokenizer, with a chat template if messages are rendered.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.specials = sorted({*control_tokens(tokenizer), *tokenizer.all_special_tokens} - {""})
        longest_first = sorted(self.specials, key=len, reverse=True)
        self.special_text = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        letter = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._adds_space = tokenizer.decode(letter * 2, clean_up_tokenization_spaces=False) != "aa"

    def stand_ins(self, *texts: str | Messages) -> StandIns:
        """Stand-ins for a row with these texts and messages."""
        row = [part for text in texts for part in ([text] if isinstance(text, str) else map(text_of, text))]
        return StandIns(self.special_text, row, str(self.tokenizer.chat_template))

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """What the template makes of messages.

        Raises:
            RefusedRow: It refuses them; says in which words. Or there is none.
        """
        if self.tokenizer.chat_template is None:
            raise RefusedRow(
                "template_refused", "the tokenizer has no chat template for several turns; set chat_template"
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except _TEMPLATE_ERRORS as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise RefusedRow("template_refused", f"the chat template says: {said}") from error

    def encode(
        self, text: str, stand_ins: StandIns, add_special_tokens: bool = False, continues: bool = False
    ) -> list[int]:
        """Token ids of a rendering.

        Args:
            text: The rendering.
            stand_ins: Those of its row.
            add_special_tokens: Whether the tokenizer adds its BOS, and the EOS that some add.
            continues: Whether other text stands before it.
        """
        ids: list[int] = []
        for piece, is_literal in stand_ins.pieces(text):
            options = {"split_special_tokens": True} if is_literal else {}
            if continues:
                ids += self._encode_on(piece, **options)
            else:
                ids += self.tokenizer(piece, add_special_tokens=add_special_tokens, **options)["input_ids"]
            continues = True
        return ids

    def _encode_on(self, text: str, **options: Any) -> list[int]:
        """Token ids of text that goes on from other text: without a space that the tokenizer puts before it."""
        for anchor in _ANCHORS if self._adds_space else ():
            before, whole = (
                self.tokenizer(each, add_special_tokens=False, **options)["input_ids"]
                for each in (anchor, anchor + text)
            )
            if whole[: len(before)] == before:
                return whole[len(before) :]
        return self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]


def text_of(message: dict[str, Any]) -> str:
    """The text of a message; "" where its content is no text."""
    content = message.get("content")
    return content if isinstance(content, str) else ""


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
        if [marked.replace(mark, text_of(message)) for message in turn] != [text] or mark not in marked:
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
        text = text_of(turn).rpartition("</think>")[2] if turn.get("role") == "assistant" else text_of(turn)
        in_json = json.dumps(text, ensure_ascii=False)[1:-1]  # as templates write what a tool returned
        if _squeezed(text) not in written and _squeezed(in_json) not in written:
            lost.append(str(turn.get("role")))
    return lost


def check_response(number: int, response: Messages, rendering: str, marked: str, mark: str, prompt: str) -> None:
    """Checks that a template wrote the text of a response, but for white space.

    Args:
        number: Of the response in its row, for the message.
        response: Its messages.
        rendering: Of prompt and response.
        marked: Of the prompt and a response that is `mark` alone.
        mark: A character that occurs nowhere else.
        prompt: The rendering of the prompt alone.

    Raises:
        RefusedRow: Text is missing.
    """
    texts = [text_of(message) for message in response]
    after = marked.rpartition(mark)[2] if mark in marked else ""
    written = _squeezed(rendering[len(os.path.commonprefix([prompt, rendering])) :].removesuffix(after))
    is_written = all(_squeezed(text) in written if mark in marked else not text.strip() for text in texts)
    if not is_written:
        lost = "what stands before </think> in" if "</think>" in "".join(texts) and mark in marked else "the text of"
        detail = f"the chat template leaves out {lost} response {number}; set chat_template to one that writes it"
        raise RefusedRow("response_not_rendered", detail)


def response_start(rendering: str, sampled_from: str, before: str, last_turn: str) -> int | None:
    """Where a response begins in a rendering, so that what stands before it ends as sampling starts.

    Earlier turns may differ: some templates put the system's text into the last turn, if it is the user's. And what the
    prompt opens for sampling, such as `<think>`, may be the beginning of the response's own text.

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
        >>> response_start("U: Hi A: Ho", "U: Hi A: <think>\\n", "U: Hi A: ", "Hi")
    """
    if rendering.startswith(sampled_from):
        return len(sampled_from)
    last_turn = last_turn.strip()
    if last_turn not in sampled_from or last_turn not in before:
        return None
    end = before.rindex(last_turn) + len(last_turn)
    opening = sampled_from[sampled_from.rindex(last_turn) + len(last_turn) :]
    if rendering.startswith(opening, end):
        return end + len(opening)
    spaced = re.compile(r"\s*" + r"\s*".join(map(re.escape, opening.split())) + r"\s*")
    match = spaced.match(rendering, end)
    return match.end() if match else None


def common_tail(prompt: str, special_text: re.Pattern[str]) -> int:
    """Where the last special token of a prompt begins. Tokens from there on do not depend on what stands before it."""
    return max((match.start() for match in special_text.finditer(prompt)), default=0)


def _squeezed(text: str) -> str:
    return "".join(text.split())
