"""The tokens at which sampling stops: the EOS, and the first token that the chat template writes behind an answer.

Base models with a chat template need both: their configuration names the end of a document, and knows no turns.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_nca.rendering.messages import RefusedRow
from trl_nca.rendering.renderer import Renderer


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first special token that the chat template writes behind an answer; None where there is no such token.

    Templates that write nothing behind the last answer end a turn by the beginning of the next one (GLM). And some
    models have the end of a turn as a plain token that was added to the vocabulary: without a special one, it.
    """
    if tokenizer.chat_template is None:
        return None
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    plain = {i for i, token in added.items() if token.content.strip(" ▁\n\t")}
    behind = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in _behind_an_answer(tokenizer)]
    return next((i for ids in behind for kind in (special, plain) for i in ids if i in kind), None)


def _behind_an_answer(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the template writes behind an answer at the end, and between an answer and the next turn's text."""
    renderer = Renderer(tokenizer)
    mark = renderer.stand_ins().mark
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    found = []
    for following in ([], [{"role": "user", "content": mark}]):
        try:
            _, has_answer, behind = renderer.render([*turns, *following]).partition(mark)
        except RefusedRow:
            continue
        if has_answer and (not following or mark in behind):
            found.append(behind.partition(mark)[0])
    return found


def stop_tokens(tokenizer: PreTrainedTokenizerBase, generation_config: Any = None) -> list[int]:
    """Ids of the tokens at which sampling stops, sorted; there may be none.

    Args:
        tokenizer: Its EOS, and the end of a turn in its chat template.
        generation_config: Of the model, which may name others.
    """
    eos = getattr(generation_config, "eos_token_id", None)
    others = eos if isinstance(eos, list | tuple) else [eos]
    return sorted({*others, tokenizer.eos_token_id, end_of_turn(tokenizer)} - {None})


def set_stops(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes them into the model's generation config, which is saved with it, and a padding token if it has none."""
    generation = model.generation_config
    stops = stop_tokens(tokenizer, generation)
    generation.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
