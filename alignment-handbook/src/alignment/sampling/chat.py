"""A conversation in the terminal, with one model, or with a base and what became of it side by side."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TextStreamer

from alignment.data.row import Messages
from alignment.input_limits import check_input, input_limits
from alignment.models import load_trained_model, load_trained_tokenizer
from alignment.sampling.sample import SamplingConfig, encode_prompt, generation_settings, read_sample

HELP = "/both: base and aligned side by side, on and off; /new: a new conversation; /quit (or Ctrl-D): leave"


class _UntilStop(TextStreamer):
    """Prints an answer without the token that ends it, which some tokenizers do not know as a special one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: list[int] | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stops = stops or []

    def put(self, value: torch.Tensor) -> None:
        """Prints tokens; first it is given the prompt, which it leaves out."""
        if self.next_tokens_are_prompt or value.tolist()[-1] not in self.stops:
            super().put(value)


@dataclass
class Speaker:
    """A model in a conversation, with the turns so far.

    Attributes:
        name: Printed before each answer.
        model: Causal language model; an adapter on its base.
        with_adapter: False for the base under an adapter.
        turns: The conversation so far.
    """

    name: str
    model: Any
    with_adapter: bool = True
    turns: Messages = field(default_factory=list)

    @torch.inference_mode()
    def answer(self, text: str, tokenizer: PreTrainedTokenizerBase, config: SamplingConfig) -> str:
        """Prints the answer to the user's turn while it is generated, and keeps both turns."""
        self.turns.append({"role": "user", "content": text})
        prompt_ids = encode_prompt(tokenizer, self.turns)
        fix = "start another, or give less --max_new_tokens"
        check_input(input_limits(self.model), prompt_ids, config.max_new_tokens, "the conversation", fix)
        ids = torch.tensor([prompt_ids], device=self.model.device)  # (1, L)
        adapter = contextlib.nullcontext() if self.with_adapter else self.model.disable_adapter()
        settings = generation_settings(self.model, tokenizer, config)
        streamer = _UntilStop(tokenizer, settings["eos_token_id"])
        with adapter:
            tokens = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                streamer=streamer,
                **settings,
            )
        reply = read_sample(tokens[0, ids.shape[1] :].tolist(), tokenizer, settings["eos_token_id"]).text.strip()
        self.turns.append({"role": "assistant", "content": reply})
        return reply


def speakers(name: str, base: str | None, dtype: str = "auto") -> tuple[list[Speaker], PreTrainedTokenizerBase]:
    """The base, if it is known, and the aligned model; and the tokenizer of both.

    Args:
        name: A model's folder or Hub id, or an adapter's folder, whose base is known.
        base: The model that `name` was made of; None where it is an adapter that names it, or does not matter.
        dtype: Type of the weights.

    Raises:
        UserError: There is no such model.
    """
    tokenizer, _ = load_trained_tokenizer(name, base)
    model = load_trained_model(name, dtype, base).eval()
    aligned = Speaker("aligned", model)
    if isinstance(model, PeftModel):
        return [Speaker("base", model, with_adapter=False), aligned], tokenizer
    if base is None:
        return [aligned], tokenizer
    return [Speaker("base", load_trained_model(base, dtype).eval()), aligned], tokenizer


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
    for line in lines:
        text = line.strip()
        if text == "/quit":
            return
        if text == "/new":
            for speaker in who:
                speaker.turns.clear()
            say("A new conversation.")
        elif text == "/both":
            both = not both and len(who) > 1
            say(
                "Base and aligned answer." if both else "One model answers." if len(who) > 1 else "No base: see --base."
            )
        elif text.startswith("/"):
            say(HELP)
        elif text:
            for speaker in who if both else who[-1:]:
                say(f"{speaker.name}:" if both else "")
                speaker.answer(text, tokenizer, config)
                say("")
