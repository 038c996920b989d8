"""From the texts and messages of a row to token ids, and to which of them count."""

import math
import os.path
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trl_nca.rendering.answers import Template
from trl_nca.rendering.messages import (
    Messages,
    RefusedRow,
    clean_messages,
    map_texts,
    read_template_kwargs,
    read_tools,
    text_of,
)
from trl_nca.rendering.renderer import Renderer, StandIns, common_tail
from trl_nca.rendering.splitting import split_rendering, writes_tools
from trl_nca.rendering.turns import Piece
from trl_nca.rendering.written import lost_from_prompt


class Encoded(NamedTuple):
    """Token ids of a prompt and of each of its responses.

    Attributes:
        prompt_ids: Those of the prompt.
        response_ids: Those of its K responses.
        token_masks: Which of a response's tokens count in the loss, K lists.
        broken: Names of the rules that the row breaks and is kept despite.
    """

    prompt_ids: list[int]
    response_ids: list[list[int]]
    token_masks: list[list[bool]]
    broken: list[str]


class _Tail(NamedTuple):
    """The end of what is tokenized so far: from its last special token on, as text and as token ids."""

    text: str
    ids: list[int]


class RowEncoder:
    """Tokenizes prompts and responses, without regard to their lengths.

    Args:
        renderer: A tokenizer and its chat template.
        actions: By the name of a rule, "keep" to keep the rows that break it.
        score_tokens: See `trl_nca.config.NCAConfig`.
    """

    def __init__(self, renderer: Renderer, actions: Mapping[str, str], score_tokens: str):
        self.renderer = renderer
        self.tokenizer = renderer.tokenizer
        self.actions = actions
        self.score_tokens = score_tokens

    def encode_row(
        self, prompt: str | Messages, responses: Sequence[str | Messages], tools: Any = None, kwargs: Any = None
    ) -> Encoded:
        """Token ids of a row.

        Args:
            prompt: Text, or messages.
            responses: Texts, or lists of messages that begin with an assistant's.
            tools: The row's `tools`.
            kwargs: The row's `chat_template_kwargs`.

        Raises:
            RefusedRow: It cannot be trained on.
        """
        if isinstance(prompt, str) or (self.tokenizer.chat_template is None and len(prompt) == 1):
            text = prompt if isinstance(prompt, str) else prompt[0]["content"]
            return self._join_text(text, [_text_alone(response) for response in responses], read_tools(tools))
        turns = [[{"role": "assistant", "content": r}] if isinstance(r, str) else r for r in responses]
        return self._cut_rendering(prompt, turns, read_tools(tools), read_template_kwargs(kwargs))

    def encode_prompt(self, messages: Messages, tools: Any = None, kwargs: Any = None) -> list[int]:
        """See `trl_nca.responses.ResponseTokenizer.encode_prompt`."""
        (messages,), tools = clean_messages([messages]), read_tools(tools)
        stand_ins = self.renderer.stand_ins(messages, tools)
        if self.tokenizer.chat_template is None and len(messages) == 1 and not tools:
            return self._encode_text(stand_ins.protect(messages[0]["content"]), stand_ins)
        template = self._template(tools, read_template_kwargs(kwargs), stand_ins)
        turns = map_texts(stand_ins.protect, messages)
        rendering = template.render(turns, add_generation_prompt=True)
        if lost_from_prompt(rendering, turns[-1:]):
            raise RefusedRow("prompt_not_rendered", "it leaves out the text of the last turn")
        if not writes_tools(template, turns):
            raise RefusedRow("calls_not_rendered", "it leaves out the tools")
        return self.renderer.encode(rendering, stand_ins)

    def _template(self, tools: list[dict[str, Any]] | None, kwargs: dict[str, Any], stand_ins: StandIns) -> Template:
        return Template(self.renderer, map_texts(stand_ins.protect, tools), kwargs, stand_ins.mark)

    def _cut_rendering(
        self,
        prompt: Messages,
        responses: Sequence[Messages],
        tools: list[dict[str, Any]] | None,
        kwargs: dict[str, Any],
    ) -> Encoded:
        row = clean_messages([prompt, *responses])
        stand_ins = self.renderer.stand_ins(row, tools)
        prompt, *responses = map_texts(stand_ins.protect, row)
        template = self._template(tools, kwargs, stand_ins)
        split = split_rendering(template, prompt, responses, self.actions, self.score_tokens)
        prompt_ids = self.renderer.encode(split.prompt, stand_ins)
        tail = self._tail(split.prompt, prompt_ids, stand_ins)
        encoded = [self._encode_pieces(tail, pieces, stand_ins) for pieces in split.responses]
        return Encoded(prompt_ids, [ids for ids, _ in encoded], [mask for _, mask in encoded], split.broken)

    def _tail(self, text: str, ids: list[int], stand_ins: StandIns) -> _Tail:
        """The end of a text that has these ids."""
        tail = text[common_tail(text, self.renderer.special_text) :]
        tail_ids = self.renderer.encode(tail, stand_ins)
        if ids[-len(tail_ids) :] != tail_ids:  # a tokenizer that looks back, or a token that was split
            return _Tail(text, ids)
        return _Tail(tail, tail_ids)

    def _encode_pieces(self, tail: _Tail, pieces: Sequence[Piece], stand_ins: StandIns) -> tuple[list[int], list[bool]]:
        """Token ids of a response behind the end of its prompt, and which of them count."""
        ids: list[int] = []
        mask: list[bool] = []
        for i, piece in enumerate(pieces):
            # Sampling ends a turn with its special token: white space behind it is tokenized with what follows.
            is_end = i > 0 and bool(self.renderer.special_text.fullmatch(tail.text.rstrip()))
            replaced, new = self._encode_after(tail, piece.text, stand_ins, is_end and not piece.is_sampled)
            del ids[len(ids) - replaced :], mask[len(mask) - replaced :]
            ids, mask = ids + new, mask + self._mask(tail, piece, new, stand_ins)
            if i + 1 < len(pieces):
                before = tail.ids[: len(tail.ids) - replaced]
                tail = self._tail(tail.text + piece.text, before + new, stand_ins)
        return ids, mask

    def _encode_after(self, tail: _Tail, text: str, stand_ins: StandIns, may_replace: bool) -> tuple[int, list[int]]:
        """Token ids of a text behind another, and how many of that one's last tokens they replace."""
        whole = self.renderer.encode(tail.text + text, stand_ins)
        kept = len(tail.ids)
        if whole[:kept] != tail.ids:
            if not may_replace:
                # A token reaches over the cut. Sampling never produces it: it starts after the prompt's own tokens.
                return 0, self.renderer.encode(text, stand_ins, continues=True)
            kept = len(os.path.commonprefix([tail.ids, whole]))
        return len(tail.ids) - kept, whole[kept:]

    def _mask(self, tail: _Tail, piece: Piece, ids: list[int], stand_ins: StandIns) -> list[bool]:
        """Which tokens of a piece count: those that have a character of its spans."""
        if piece.spans is None:
            return [True] * len(ids)
        mask = [False] * len(ids)
        for span in piece.spans:
            start, stop = (self._num_tokens(tail, piece.text, end, ids, stand_ins) for end in span)
            mask[math.floor(start) : math.ceil(stop)] = [True] * (math.ceil(stop) - math.floor(start))
        return mask

    def _num_tokens(self, tail: _Tail, text: str, end: int, ids: list[int], stand_ins: StandIns) -> float:
        """How many of a text's tokens stand before a character; one that reaches over it is half."""
        if end in (0, len(text)):
            return len(ids) if end else 0
        _, before = self._encode_after(tail, text[:end], stand_ins, may_replace=False)
        common = len(os.path.commonprefix([before, ids]))
        return common if common == len(before) else common + 0.5

    def _join_text(self, prompt: str, responses: Sequence[str], tools: Any) -> Encoded:
        """Prompt, response and one EOS, without a template."""
        if tools:
            raise RefusedRow("calls_not_rendered", "the prompt is text, and tools need a chat template")
        eos, eos_id = self.tokenizer.eos_token, self.tokenizer.eos_token_id
        stand_ins = self.renderer.stand_ins(prompt, *responses)
        prompt = stand_ins.protect(prompt)
        prompt_ids = self._encode_text(prompt, stand_ins)
        response_ids = []
        for response in responses:
            response = stand_ins.protect(response.removesuffix(eos) if eos else response)
            whole = self._encode_text(prompt + response, stand_ins)
            if whole[: len(prompt_ids)] == prompt_ids:
                ids = whole[len(prompt_ids) :]
            else:
                ids = self.renderer.encode(response, stand_ins, continues=bool(prompt))
            response_ids.append(ids if eos_id is None else [*ids, eos_id])
        return Encoded(prompt_ids, response_ids, [[True] * len(ids) for ids in response_ids], [])

    def _encode_text(self, text: str, stand_ins: StandIns) -> list[int]:
        """Token ids of plain text, with a BOS where the tokenizer adds one, and without the EOS that some add."""
        ids = self.renderer.encode(text, stand_ins, add_special_tokens=True)
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids


def _text_alone(response: str | Messages) -> str:
    """The text of a response to a prompt that is text.

    Raises:
        RefusedRow: It is more than the text of one turn.
    """
    if isinstance(response, str):
        return response
    (messages,) = clean_messages([response])
    if len(messages) != 1 or {*messages[0]} != {"role", "content"} or messages[0]["role"] != "assistant":
        detail = "the prompt is text or the tokenizer has no chat template, and a response is more than text"
        raise RefusedRow("template_refused", f"{detail}; set chat_template, and give the prompt as messages")
    return text_of(messages[0])
