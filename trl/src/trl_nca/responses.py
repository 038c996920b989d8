"""From a prompt and its K responses to token ids, through the tokenizer's chat template.

The template renders the whole conversation, prompt and response together, and the rendering is cut where the response
begins. (Rendering a response alone, as the 2024 scripts did, goes wrong with templates that add a default system turn.)
"""

import hashlib
import json
import os.path
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value, concatenate_datasets
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]

# One private-use character stands for each special token's text inside a message while the template runs.
_FIRST_STAND_IN = 0xF0000
_RESPONSE_MARK = chr(_FIRST_STAND_IN - 1)
#: Rows that are tokenized, and cached, at a time.
_PIECE_ROWS = 50_000

TOKENIZED_FEATURES = Features(
    {
        "prompt_ids": List(Value("int32")),
        "response_ids": List(List(Value("int32"))),
        "scores": List(Value("float64")),
        "length": Value("int32"),
        "location": Value("string"),  # the row's place in its file, for a person
    }
)


def group_length(row: Mapping[str, Any]) -> int:
    """Tokens of a packed forward of a tokenized row: the prompt but its last token, and the responses."""
    return len(row["prompt_ids"]) - 1 + sum(map(len, row["response_ids"]))


def check_columns(dataset: Dataset, needed: set[str]) -> None:
    """Checks that a data set has the columns that are needed.

    Raises:
        ValueError: One is missing; names them all.
    """
    if not needed <= set(dataset.column_names):
        raise ValueError(f"needs columns {', '.join(sorted(needed))}; found {', '.join(dataset.column_names)}")


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of the tokenizer's special tokens, in the order of their ids."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


class ResponseTokenizer:
    """Tokenizes one prompt and its responses so that training sees what sampling will see.

    - The prompt's ids are those of the template with `add_generation_prompt=True`: what sampling starts from.
    - A response's ids are all that the template writes after it: the text, the EOS, and whatever follows.
    - Text inside a message that spells a special token ("</s>", "<|im_end|>") stays text: it never becomes that token.
    - A prompt given as plain text is not templated: prompt, response and one EOS are joined, as TRL does.

    Args:
        tokenizer: A tokenizer, with a chat template if prompts are lists of messages.
        max_length: Most tokens of prompt + response, or None for no bound. A longer response is cut at its end.
        max_prompt_length: Most tokens of a prompt, or None. A longer prompt loses its beginning (but for the BOS).
        cut_over_long: False drops rows that would have to be cut.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        cut_over_long: bool = True,
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.cut_over_long = cut_over_long
        specials = {*control_tokens(tokenizer), *tokenizer.all_special_tokens}
        self._stand_ins = {text: chr(_FIRST_STAND_IN + i) for i, text in enumerate(sorted(specials))}
        self._literals = {stand_in: text for text, stand_in in self._stand_ins.items()}
        longest_first = sorted(specials, key=len, reverse=True)
        self._special_text = re.compile("|".join(map(re.escape, longest_first))) if specials else None

    def key(self, rows: str) -> str:
        """What stands for the tokenized rows in a cache: the rows' own key, the tokenizer, the limits and this file.

        (By itself datasets hashes the tokenizer's object, which has another hash in every process.)
        """
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
            vocabulary = {name: part for name, part in vocabulary.items() if name not in ("padding", "truncation")}
        else:
            vocabulary = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), str(tokenizer.init_kwargs)]
        template = [tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, sorted(self._stand_ins)]
        limits = [self.max_length, self.max_prompt_length, self.cut_over_long]
        content = json.dumps([rows, vocabulary, template, limits]).encode() + Path(__file__).read_bytes()
        return hashlib.sha256(content).hexdigest()[:32]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Tokenizes a row.

        Args:
            row: `prompt` (messages or text), `responses` (K texts, or K lists of messages) and `scores` (K numbers).

        Returns:
            `prompt_ids` (ints), `response_ids` (K lists of ints), `scores`, `length` (tokens of the packed group),
            `location` (as given); and what was done to fit them: `prompt_trimmed` (bool), `responses_cut` (count),
            `fixed` (bool: one of these, or the row came with a `fixed` that is not empty), `dropped` (a reason, or ""
            for a row to train on).
        """
        prompt, responses, dropped = row["prompt"], row["responses"], ""
        try:
            if isinstance(prompt, str):
                prompt_ids, response_ids = self._join_text(prompt, responses)
            elif self.tokenizer.chat_template is None and len(prompt) == 1:
                prompt_ids, response_ids = self._join_text(prompt[0]["content"], responses)
            else:
                prompt_ids, response_ids = self._cut_rendering(prompt, responses)
        except TemplateError:
            prompt_ids, response_ids, dropped = [], [], "template_refused"
        fitted_prompt = self._fit_prompt(prompt_ids)
        room = sys.maxsize if self.max_length is None else self.max_length - len(fitted_prompt)
        if not (fitted_prompt or dropped):
            dropped = "empty_prompt"  # nothing would predict a response's first token
        elif room < 1:
            dropped = "prompt_too_long"
        elif not all(response_ids):
            dropped = "empty_response"
        fitted = {"prompt_ids": fitted_prompt, "response_ids": [ids[: max(room, 0)] for ids in response_ids]}
        is_trimmed = len(fitted_prompt) < len(prompt_ids)
        num_cut = sum(len(ids) > room for ids in response_ids)
        if (is_trimmed or num_cut) and not (dropped or self.cut_over_long):
            dropped = "over_long"
        return fitted | {
            "scores": row["scores"],
            "length": group_length(fitted),
            "location": row.get("location", ""),
            "prompt_trimmed": is_trimmed,
            "responses_cut": num_cut,
            "fixed": bool(is_trimmed or num_cut or row.get("fixed")),
            "dropped": dropped,
        }

    def encode_prompt(self, messages: Messages) -> list[int]:
        """Token ids that sampling starts from: the prompt up to where the assistant begins.

        Text that spells a special token stays text, as in training. Without a chat template, the ids of the one turn.
        """
        if self.tokenizer.chat_template is None and len(messages) == 1:
            return self._encode_text(self._stand_in(messages[0]["content"]))
        return self._encode(self._render(self._protect(messages), add_generation_prompt=True))

    def _cut_rendering(
        self, prompt: Messages, responses: Sequence[str | Messages]
    ) -> tuple[list[int], list[list[int]]]:
        turns = [[{"role": "assistant", "content": r}] if isinstance(r, str) else r for r in responses]
        prompt = self._protect(prompt)
        texts = [self._render(prompt + self._protect(turn)) for turn in turns]
        marked = self._render(prompt + [{"role": "assistant", "content": _RESPONSE_MARK}])
        # Up to here the rendering does not depend on the response. What sampling is given may end earlier: some
        # templates write an empty thinking block into a finished answer, others a space before its first word.
        before_response = os.path.commonprefix([marked, *texts])
        sampled_from = self._render(prompt, add_generation_prompt=True)
        prompt_text = sampled_from if before_response.startswith(sampled_from) else before_response
        prompt_ids = self._encode(prompt_text)
        # Tokens from a special token on do not depend on what stands before it: the prompt is encoded once for all.
        specials = self._special_text.finditer(prompt_text) if self._special_text else ()
        tail = max((match.start() for match in specials), default=0)
        tail_ids = self._encode(prompt_text[tail:])
        if prompt_ids[-len(tail_ids) :] != tail_ids:  # a tokenizer that looks back
            tail, tail_ids = 0, prompt_ids
        return prompt_ids, [self._encode_after(tail_ids, text[tail:], len(prompt_text) - tail) for text in texts]

    def _encode_after(self, prompt_ids: list[int], text: str, cut: int) -> list[int]:
        whole = self._encode(text)
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole[len(prompt_ids) :]
        # A token reaches over the cut. Sampling never produces it: it starts after the prompt's own tokens.
        return self._encode(text[cut:])

    def _join_text(self, prompt: str, responses: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        eos, eos_id = self.tokenizer.eos_token, self.tokenizer.eos_token_id
        prompt = self._stand_in(prompt)
        prompt_ids = self._encode_text(prompt)
        response_ids = []
        for response in responses:
            response = self._stand_in(response.removesuffix(eos) if eos else response)
            whole = self._encode_text(prompt + response)
            prefix_holds = whole[: len(prompt_ids)] == prompt_ids
            ids = whole[len(prompt_ids) :] if prefix_holds else self._encode(response)
            response_ids.append(ids if eos_id is None else [*ids, eos_id])
        return prompt_ids, response_ids

    def _fit_prompt(self, prompt_ids: list[int]) -> list[int]:
        if self.max_prompt_length is None or len(prompt_ids) <= self.max_prompt_length:
            return prompt_ids
        bos = prompt_ids[:1] if prompt_ids[0] == self.tokenizer.bos_token_id else []
        kept = self.max_prompt_length - len(bos)
        return bos + prompt_ids[len(prompt_ids) - kept :]

    def _render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _stand_in(self, text: str) -> str:
        return self._special_text.sub(lambda m: self._stand_ins[m[0]], text) if self._special_text else text

    def _protect(self, messages: Messages) -> Messages:
        return [
            {**m, "content": self._stand_in(m["content"])} if isinstance(m.get("content"), str) else m for m in messages
        ]

    def _encode_text(self, text: str) -> list[int]:
        """Token ids of plain text, with a BOS where the tokenizer adds one, and without the EOS that some add."""
        ids = self._encode(text, add_special_tokens=True)
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a rendering in which stand-ins mark text that must not become special tokens."""
        ids: list[int] = []
        for piece in re.split(f"([{chr(_FIRST_STAND_IN)}-{chr(_FIRST_STAND_IN + len(self._literals))}])", text):
            literal = self._literals.get(piece)
            if literal is not None:
                ids += self.tokenizer(literal, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            elif piece:
                ids += self.tokenizer(piece, add_special_tokens=add_special_tokens and not ids)["input_ids"]
        return ids


def tokenize_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    cut_over_long: bool = True,
    num_proc: int | None = None,
    desc: str = "Tokenizing",
) -> tuple[Dataset, dict[str, Any]]:
    """Tokenizes rows of `prompt`, `responses`, `scores`; drops those that cannot fit, and counts.

    Large data sets are done in pieces that are cached one by one: a killed run resumes where it stopped.

    Args:
        dataset: Columns `prompt`, `responses` (K >= 2 a row, K may differ by row), `scores`, and `location`, if the
            rows can be named. Others are dropped.
        tokenizer: See `ResponseTokenizer`, also for `max_length`, `max_prompt_length` (tokens) and `cut_over_long`.
        num_proc: Processes to use; None for this one.
        desc: Label of the progress bar.

    Returns:
        The data set with columns `prompt_ids`, `response_ids`, `scores`, `length`, `location`, and the counts
        `rows_in`, `rows_kept`, `rows_fixed`, `rows_dropped`, `dropped_by_reason`, `responses`, `responses_cut`,
        `prompts_trimmed`.
    """
    tokenize = ResponseTokenizer(tokenizer, max_length, max_prompt_length, cut_over_long)
    outcome = {
        "prompt_trimmed": Value("bool"),
        "responses_cut": Value("int32"),
        "fixed": Value("bool"),
        "dropped": Value("string"),
    }
    pieces = []
    for start in range(0, max(len(dataset), 1), _PIECE_ROWS):
        piece = dataset.select(range(start, min(start + _PIECE_ROWS, len(dataset))))
        pieces.append(
            piece.map(
                tokenize,
                remove_columns=dataset.column_names,
                features=Features({**TOKENIZED_FEATURES, **outcome}),
                num_proc=num_proc if len(dataset) > 1000 else None,  # starting processes takes longer than a few rows
                new_fingerprint=tokenize.key(piece._fingerprint),
                desc=desc if len(dataset) <= _PIECE_ROWS else f"{desc}, from row {start + 1} of {len(dataset)}",
            )
        )
    rows = concatenate_datasets(pieces)
    table = rows.select_columns(["scores", *outcome]).with_format("arrow")[:]  # in Arrow: there may be millions of rows
    is_kept = pc.equal(table["dropped"], "").combine_chunks()
    reasons = {entry["values"]: entry["counts"] for entry in pc.value_counts(table["dropped"]).to_pylist()}
    kept, table = rows.select(np.flatnonzero(is_kept.to_numpy(zero_copy_only=False))), table.filter(is_kept)

    def total(column: pa.ChunkedArray) -> int:
        return pc.sum(column).as_py() or 0

    report = {
        "rows_in": len(rows),
        "rows_kept": len(kept),
        "rows_fixed": total(table["fixed"]),
        "rows_dropped": len(rows) - len(kept),
        "dropped_by_reason": {reason: count for reason, count in reasons.items() if reason},
        "responses": total(pc.list_value_length(table["scores"])),
        "responses_cut": total(table["responses_cut"]),
        "prompts_trimmed": total(table["prompt_trimmed"]),
    }
    return kept.remove_columns(list(outcome)), report
