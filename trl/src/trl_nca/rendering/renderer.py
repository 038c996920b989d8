"""Text through the tokenizer's chat template to token ids.

A message's text stays text: what spells a special token never becomes that token, and no tokenizer puts a space where
the rendering has none.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from trl_nca.rendering.messages import Messages, RefusedRow, texts_in

#: Planes 15 and 16: characters that have no meaning of their own, of which those that a row lacks can stand for others.
_PRIVATE_USE = range(0xF0000, 0x10FFFE)
#: Text to go on from, for tokenizers that put a space before all text that they are given.
_ANCHORS = ("\n", "a", "0", ".", "~")
#: What marks the assistant's text in a template, for masks.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: What the code in a template may raise, besides jinja's own errors.
_TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

#: Parts of a text, as (start, stop) of its characters.
Spans = list[tuple[int, int]]


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

    def stand_ins(self, *row: Any) -> StandIns:
        """Stand-ins for a row of these texts, messages, tools."""
        texts = (text for part in row for text in texts_in(part))
        return StandIns(self.special_text, texts, str(self.tokenizer.chat_template))

    def render(
        self,
        messages: Messages,
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """What the template makes of messages.

        Args:
            messages: At least one.
            add_generation_prompt: Whether the assistant's next turn is opened.
            tools: JSON schemas of the functions that may be called.
            **kwargs: The row's `chat_template_kwargs`.

        Raises:
            RefusedRow: It refuses them; says in which words. Or there is none.
        """
        if self.tokenizer.chat_template is None:
            raise RefusedRow(
                "template_refused", "the tokenizer has no chat template for several turns; set chat_template"
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs
            )
        except _TEMPLATE_ERRORS as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise RefusedRow("template_refused", f"the chat template says: {said}") from error

    def generated(self, messages: Messages, tools: list[dict[str, Any]] | None = None, **kwargs: Any) -> Spans | None:
        """The parts of a rendering that the template marks as the assistant's; None for a template that marks none.

        Args:
            messages, tools, **kwargs: As for `render`, which has rendered them.
        """
        template = self.tokenizer.get_chat_template(None, tools)
        if not _GENERATION.search(template):
            return None
        settings = {"chat_template": template, "return_assistant_tokens_mask": True}
        _, spans = render_jinja_template([messages], tools, **settings, **self.tokenizer.special_tokens_map | kwargs)
        return [(start, stop) for start, stop in spans[0] if start < stop]

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


def common_tail(prompt: str, special_text: re.Pattern[str]) -> int:
    """Where the last special token of a prompt begins. Tokens from there on do not depend on what stands before it."""
    return max((match.start() for match in special_text.finditer(prompt)), default=0)


def common_length(text: str, other: str) -> int:
    """Length of the beginning that two texts share.

    Example:
        >>> common_length("A: Paris", "A: Pisa"), common_length("A", "A: Pisa"), common_length("", "A")
        (4, 1, 0)
    """
    low, high = 0, min(len(text), len(other))
    while low < high:  # compares halves: a loop over characters takes long for a long conversation
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[low:middle] == other[low:middle] else (low, middle - 1)
    return low
