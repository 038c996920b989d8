"""From a prompt and its K responses to token ids, through the tokenizer's chat template.

The template renders the whole conversation, prompt and response together, and the rendering is cut where the response
begins. (Rendering a response alone, as the 2024 scripts did, goes wrong with templates that add a default system turn.)
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from trl_nca.code_hash import code_hash
from trl_nca.fitting import DEFAULT_ACTIONS, Limits, fit_row
from trl_nca.rendering.encoding import RowEncoder
from trl_nca.rendering.messages import Messages, RefusedRow
from trl_nca.rendering.renderer import Renderer

#: Rows that are tokenized, and cached, at a time.
_PIECE_ROWS = 50_000
#: Rows of each reason for dropping that are named in a report.
_EXAMPLES = 3

TOKENIZED_FEATURES = Features(
    {
        "prompt_ids": List(Value("int32")),
        "response_ids": List(List(Value("int32"))),
        "scores": List(Value("float64")),
        "length": Value("int32"),
        "location": Value("string"),  # the row's place in its file, for a person
    }
)
#: Which tokens of the responses count in the loss; null where all of the row's do.
TOKEN_MASKS = {"token_masks": List(List(Value("bool")))}
#: What was done to a row, beside its token ids.
_OUTCOME = {
    "prompt_trimmed": Value("bool"),
    "responses_cut": Value("int32"),
    "merged": Value("bool"),
    "fixed": Value("bool"),
    "broken": List(Value("string")),
    "dropped": Value("string"),
    "detail": Value("string"),
}


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


class ResponseTokenizer:
    """Tokenizes one prompt and its responses so that training sees what sampling will see.

    - The prompt's ids are those of the template with `add_generation_prompt=True`: what sampling starts from.
    - A response's ids are all that the template writes after it: the text, the EOS, and whatever follows.
    - Text inside a message that spells a special token ("</s>", "<|im_end|>") stays text: it never becomes that token.
    - A prompt given as plain text is not templated: prompt, response and one EOS are joined, as TRL does.
    - A row whose text the template does not write is dropped, and so is one that sampling starts from elsewhere.

    Args:
        tokenizer: A tokenizer, with a chat template if prompts are lists of messages.
        max_length, max_prompt_length, min_responses: See `trl_nca.fitting.Limits`.
        actions: What happens to rows by the name of a rule, where it is not as in `trl_nca.fitting.DEFAULT_ACTIONS`.
        score_tokens: See `trl_nca.config.NCAConfig`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        actions: Mapping[str, str] | None = None,
        min_responses: int = 2,
        score_tokens: str = "assistant",
    ):
        self.tokenizer = tokenizer
        self.score_tokens = score_tokens
        self.limits = Limits(max_length, max_prompt_length, DEFAULT_ACTIONS | dict(actions or {}), min_responses)
        self._renderer = Renderer(tokenizer)
        self._encoder = RowEncoder(self._renderer, self.limits.actions, score_tokens)

    def key(self, rows: str) -> str:
        """What stands for the tokenized rows in a cache: the rows' own key, the tokenizer, the settings and the code.

        (By itself datasets hashes the tokenizer's object, which has another hash in every process.)
        """
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
            vocabulary = {name: part for name, part in vocabulary.items() if name not in ("padding", "truncation")}
        else:
            vocabulary = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), str(tokenizer.init_kwargs)]
        template = [tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, self._renderer.specials]
        settings = [asdict(self.limits), self.score_tokens, code_hash([__name__])]
        content = json.dumps([rows, vocabulary, template, settings], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Tokenizes a row.

        Args:
            row: `prompt` (messages or text), `responses` (K texts, or K lists of messages) and `scores` (K numbers).
                A `weight` and a `location` are handed on.

        Returns:
            `prompt_ids` (ints), `response_ids` (K lists of ints), `token_masks` (K lists of bools, which tokens count;
            None where all do), `scores`, `length` (tokens of the packed group), `location` (as given); what was done
            to fit them: `prompt_trimmed` (bool), `responses_cut` (count),
            `merged` (bool: responses that are the same tokens became one), `fixed` (bool: one of these, or the row
            came with a `fixed` that is not empty); `broken` (names of the rules that it is kept despite); and
            `dropped` (a reason, or "" for a row to train on) with its `detail`. A dropped row has no ids.
        """
        done = {"prompt_ids": [], "response_ids": [], "token_masks": None, "scores": row["scores"],
                "prompt_trimmed": False, "responses_cut": 0, "merged": False, "broken": [], "dropped": "",
                "detail": ""}  # fmt: skip
        done |= {"weight": row["weight"]} if "weight" in row else {}
        try:
            settings = row.get("tools"), row.get("chat_template_kwargs")
            encoded = self._encoder.encode_row(row["prompt"], row["responses"], *settings)
            done |= fit_row(encoded, row["scores"], self.tokenizer.bos_token_id, self.limits)
            done["broken"] = encoded.broken
        except RefusedRow as refused:
            done |= {"dropped": refused.reason, "detail": refused.detail}
        done["merged"] &= "duplicate_response" not in (row.get("fixed") or ())  # else it is counted there
        is_fixed = done["prompt_trimmed"] or done["responses_cut"] or done["merged"] or row.get("fixed")
        return done | {"length": group_length(done), "location": row.get("location", ""), "fixed": bool(is_fixed)}

    def encode_prompt(self, messages: Messages, tools: Any = None, chat_template_kwargs: Any = None) -> list[int]:
        """Token ids that sampling starts from: the prompt up to where the assistant begins.

        Text that spells a special token stays text, as in training. Without a chat template, the ids of the one turn.

        Args:
            messages: The prompt. It may end with what a tool returned.
            tools, chat_template_kwargs: Those of its row.

        Raises:
            RefusedRow: The template refuses the messages, or does not write the last one, or the tools.
        """
        return self._encoder.encode_prompt(messages, tools, chat_template_kwargs)


def tokenize_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    actions: Mapping[str, str] | None = None,
    min_responses: int = 2,
    score_tokens: str = "assistant",
    num_proc: int | None = None,
    desc: str = "Tokenizing",
) -> tuple[Dataset, dict[str, Any]]:
    """Tokenizes rows of `prompt`, `responses`, `scores`; drops those that cannot fit, and counts.

    Large data sets are done in pieces that are cached one by one: a killed run resumes where it stopped.

    Args:
        dataset: Columns `prompt`, `responses` (K >= 2 a row, K may differ by row), `scores`, and where they are there
            `weight` and `location`, which the rows are named by. Others are dropped.
        tokenizer, max_length, max_prompt_length, actions, min_responses, score_tokens: See `ResponseTokenizer`.
        num_proc: Processes to use; None for this one.
        desc: Label of the progress bar.

    Returns:
        The data set with columns `prompt_ids`, `response_ids`, `token_masks`, `scores`, `length`, `location`, `weight`
        where it was there, and a report; see `_report`.
    """
    tokenize = ResponseTokenizer(tokenizer, max_length, max_prompt_length, actions, min_responses, score_tokens)
    weight = {"weight": Value("float64")} if "weight" in dataset.column_names else {}
    pieces = []
    for start in range(0, max(len(dataset), 1), _PIECE_ROWS):
        piece = dataset.select(range(start, min(start + _PIECE_ROWS, len(dataset))))
        pieces.append(
            piece.map(
                tokenize,
                remove_columns=dataset.column_names,
                features=Features({**TOKENIZED_FEATURES, **TOKEN_MASKS, **weight, **_OUTCOME}),
                num_proc=num_proc if len(dataset) > 1000 else None,  # starting processes takes longer than a few rows
                new_fingerprint=tokenize.key(piece._fingerprint),
                desc=desc if len(dataset) <= _PIECE_ROWS else f"{desc}, from row {start + 1} of {len(dataset)}",
            )
        )
    rows = concatenate_datasets(pieces)
    is_kept = pc.equal(rows.select_columns(["dropped"]).with_format("arrow")[:]["dropped"], "").combine_chunks()
    kept = rows.select(np.flatnonzero(is_kept.to_numpy(zero_copy_only=False)))
    return kept.remove_columns(list(_OUTCOME)), _report(rows, is_kept)


def _report(rows: Dataset, is_kept: pa.BooleanArray) -> dict[str, Any]:
    """Counts what became of rows.

    Returns:
        `rows_in`, `rows_kept`, `rows_fixed`, `rows_dropped`, `dropped_by_reason`, `examples` (where the first rows of
        each reason stand, and why), `kept_by_reason` (kept rows that break a rule), `rows_merged`, `responses`,
        `responses_cut`, `prompts_trimmed`.
    """
    # In Arrow, without the ids: there may be millions of rows.
    table = rows.select_columns(["scores", "location", *_OUTCOME]).with_format("arrow")[:]
    reasons = {entry["values"]: entry["counts"] for entry in pc.value_counts(table["dropped"]).to_pylist()}
    examples = {}
    for reason in filter(None, reasons):
        first = table.filter(pc.equal(table["dropped"], reason)).slice(0, _EXAMPLES)
        examples[reason] = [f"{row['location']}: {row['detail']}" for row in first.to_pylist()]
    table = table.filter(is_kept)

    broken = pc.value_counts(pc.list_flatten(table["broken"])).to_pylist()

    def total(column: pa.ChunkedArray) -> int:
        return pc.sum(column).as_py() or 0

    return {
        "rows_in": len(rows),
        "rows_kept": len(table),
        "rows_fixed": total(table["fixed"]),
        "rows_dropped": len(rows) - len(table),
        "dropped_by_reason": {reason: count for reason, count in reasons.items() if reason},
        "examples": examples,
        "kept_by_reason": {entry["values"]: entry["counts"] for entry in broken},
        "rows_merged": total(table["merged"]),
        "responses": total(pc.list_value_length(table["scores"])),
        "responses_cut": total(table["responses_cut"]),
        "prompts_trimmed": total(table["prompt_trimmed"]),
    }
