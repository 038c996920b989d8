"""A conversation in the terminal, with one model, or with a base and what became of it side by side."""

import contextlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TextStreamer

from alignment.data.row import Messages, Row
from alignment.errors import UserError
from alignment.files import write_text
from alignment.input_limits import check_input, input_limits
from alignment.models import load_trained_model, load_trained_tokenizer
from alignment.sampling.sample import SamplingConfig, encode_prompt, generation_settings, read_sample
from trl_nca.rendering.messages import RefusedRow, read_tools

HELP = """/again: another answer to the last turn
/system TEXT: what the system says from now on; without TEXT nothing
/tool TEXT: what a tool returned, where the last answer called one
/new: a new conversation
/both: base and aligned side by side, on and off
/save FILE: write the conversation, a JSON object a line and model
/quit (or Ctrl-D): leave. Ctrl-C stops an answer, and keeps what there is of it"""


class _UntilStop(TextStreamer):
    """Prints an answer without the token that ends it, which some tokenizers do not know as a special one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: list[int] | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stops = stops or []
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """Prints tokens, and keeps them; first it is given the prompt, which it leaves out."""
        if not self.next_tokens_are_prompt:
            self.ids += value.tolist()
        if self.next_tokens_are_prompt or self.ids[-1] not in self.stops:
            super().put(value)


@dataclass
class Speaker:
    """A model in a conversation, with the turns so far.

    Attributes:
        name: Printed before each answer.
        model: Causal language model; an adapter on its base.
        with_adapter: False for the base under an adapter.
        turns: The conversation so far.
        tools: Schemas of the tools that the model may call.
    """

    name: str
    model: Any
    with_adapter: bool = True
    turns: Messages = field(default_factory=list)
    tools: list[Row] | None = None

    @torch.inference_mode()
    def answer(self, turn: Row, tokenizer: PreTrainedTokenizerBase, config: SamplingConfig) -> str:
        """Prints the answer to a turn of the user's or a tool's while it is generated, and keeps both turns.

        Ctrl-C stops the answer; what there is of it is kept. Without a token of it, the turn before it is not.
        """
        turns = [*self.turns, turn]
        prompt_ids = encode_prompt(tokenizer, turns, self.tools)
        fix = "start another, or give less --max_new_tokens"
        check_input(input_limits(self.model), prompt_ids, config.max_new_tokens, "the conversation", fix)
        ids = torch.tensor([prompt_ids], device=self.model.device)  # (1, L)
        adapter = contextlib.nullcontext() if self.with_adapter else self.model.disable_adapter()
        settings = generation_settings(self.model, tokenizer, config)
        streamer = _UntilStop(tokenizer, settings["eos_token_id"])
        try:
            with adapter:
                self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    streamer=streamer,
                    **settings,
                )
        except KeyboardInterrupt:
            streamer.end()
        reply = read_sample(streamer.ids, tokenizer, settings["eos_token_id"]).text.strip()
        if streamer.ids:
            self.turns = [*turns, {"role": "assistant", "content": reply}]
        return reply


def speakers(
    name: str, base: str | None, dtype: str = "auto", tools: list[Row] | None = None
) -> tuple[list[Speaker], PreTrainedTokenizerBase]:
    """The base, if it is known, and the aligned model; and the tokenizer of both.

    Args:
        name: A model's folder or Hub id, or an adapter's folder, whose base is known.
        base: The model that `name` was made of; None where it is an adapter that names it, or does not matter.
        dtype: Type of the weights.
        tools: From `read_tools_file`.

    Raises:
        UserError: There is no such model, or its chat template does not write the tools.
    """
    tokenizer, _ = load_trained_tokenizer(name, base)
    encode_prompt(tokenizer, [{"role": "user", "content": "?"}], tools)  # which says so before a model is loaded
    model = load_trained_model(name, dtype, base).eval()
    aligned = Speaker("aligned", model, tools=tools)
    if isinstance(model, PeftModel):
        return [Speaker("base", model, with_adapter=False, tools=tools), aligned], tokenizer
    if base is None:
        return [aligned], tokenizer
    return [Speaker("base", load_trained_model(base, dtype).eval(), tools=tools), aligned], tokenizer


def read_tools_file(name: str | None) -> list[Row] | None:
    """The tools of a JSON file, a list of JSON schemas.

    Raises:
        UserError: There is no such file, or it holds something else.
    """
    if name is None:
        return None
    try:
        return read_tools(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--tools: {name} cannot be read ({error}); give a JSON file") from error
    except RefusedRow as refused:
        raise UserError(f"--tools: {name}: {refused.detail}; give a JSON list of them") from refused


def chat(
    lines: Iterable[str],
    who: list[Speaker],
    tokenizer: PreTrainedTokenizerBase,
    config: SamplingConfig,
    both: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Answers line by line, until the lines end or one says /quit.

    Args:
        lines: What the user types.
        who: From `speakers`.
        tokenizer: Tokenizer of the models.
        config: Length and temperature of an answer; the seed of the whole conversation.
        both: Whether the base answers too, from the start.
        say: Prints a line.
    """
    torch.manual_seed(config.seed)
    conversation = Conversation(who, tokenizer, config, both, say)
    for line in lines:
        text = line.strip()
        if text == "/quit":
            return
        if text.startswith("/"):
            conversation.obey(*text.partition(" ")[::2])
        elif text:
            conversation.ask({"role": "user", "content": text})


@dataclass
class Conversation:
    """What is typed, and what becomes of it. Attributes as the arguments of `chat`."""

    who: list[Speaker]
    tokenizer: PreTrainedTokenizerBase
    config: SamplingConfig
    both: bool
    say: Callable[[str], None]

    def ask(self, turn: Row) -> None:
        """Lets those who answer do so, one after the other."""
        for speaker in self.who if self.both else self.who[-1:]:
            self._answer(speaker, turn)

    def obey(self, command: str, argument: str) -> None:
        """Does what a command says; of an unknown one, says which there are."""
        commands = {
            "/again": self._again,
            "/both": self._switch,
            "/new": self._begin,
            "/save": self._save,
            "/system": self._set_system,
            "/tool": self._return,
        }
        commands.get(command, lambda _: self.say(HELP))(argument.strip())

    def _answer(self, speaker: Speaker, turn: Row) -> None:
        self.say(f"{speaker.name}:" if self.both else "")
        speaker.answer(turn, self.tokenizer, self.config)
        self.say("")

    def _again(self, _: str) -> None:
        """Another answer of those who answered last, in place of theirs."""
        answered = [speaker for speaker in (self.who if self.both else self.who[-1:]) if len(speaker.turns) > 1]
        if not answered:
            self.say("There is no answer yet.")
        for speaker in answered:
            before = speaker.turns
            *speaker.turns, question, _ = before
            self._answer(speaker, question)
            if len(speaker.turns) < len(before):  # it was stopped at once
                speaker.turns = before

    def _switch(self, _: str) -> None:
        self.both = not self.both and len(self.who) > 1
        one = "One model answers." if len(self.who) > 1 else "No base: see --base."
        self.say("Base and aligned answer." if self.both else one)

    def _begin(self, _: str) -> None:
        """Forgets all turns but the system's."""
        for speaker in self.who:
            speaker.turns = [turn for turn in speaker.turns if turn["role"] == "system"]
        self.say("A new conversation.")

    def _return(self, text: str) -> None:
        """Goes on from what a tool returned."""
        turn = {"role": "tool", "content": text}
        try:
            for speaker in self.who if self.both else self.who[-1:]:
                encode_prompt(self.tokenizer, [*speaker.turns, turn], speaker.tools)
        except UserError as error:
            return self.say(f"It cannot go on from that: {error}")
        self.ask(turn)

    def _set_system(self, text: str) -> None:
        system: Messages = [{"role": "system", "content": text}] if text else []
        question: Messages = [{"role": "user", "content": "?"}]
        try:
            is_read = encode_prompt(self.tokenizer, system + question) != encode_prompt(self.tokenizer, question)
        except UserError as error:
            return self.say(f"It stays as it was: {error}")
        if system and not is_read:
            return self.say("It stays as it was: the chat template leaves out what a system says.")
        for speaker in self.who:
            speaker.turns = system + [turn for turn in speaker.turns if turn["role"] != "system"]
        self.say(f"The system says: {text}" if text else "The system says nothing.")

    def _save(self, name: str) -> None:
        rows = [
            {"model": speaker.name, "messages": speaker.turns} | ({"tools": speaker.tools} if speaker.tools else {})
            for speaker in self.who
            if speaker.turns
        ]
        if not name or not rows:
            return self.say("Nothing is said yet." if name else "/save FILE: name a file.")
        if Path(name).exists():
            return self.say(f"{name} exists; name another file.")
        try:
            write_text(Path(name), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        except OSError as error:
            return self.say(f"{name} cannot be written: {error.strerror}")
        self.say(f"Saved in {name}.")
