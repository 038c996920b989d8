"""The columns of a data set that the trainers take: scored responses, pairs, or the token ids of either."""

import logging
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import extract_prompt

from trl_nca.config import NCAConfig
from trl_nca.responses import TOKENIZED_FEATURES, check_columns, group_length, tokenize_dataset

logger = logging.getLogger(__name__)


def scored_responses(dataset: Dataset) -> Dataset:
    """Rows of `prompt`, `responses` and `scores` (or `rewards`), and of other columns as they are.

    Raises:
        ValueError: A column is missing.
    """
    if "rewards" in dataset.column_names and "scores" not in dataset.column_names:
        dataset = dataset.rename_column("rewards", "scores")
    check_columns(dataset, {"prompt", "responses", "scores"})
    return dataset


def scored_pairs(dataset: Dataset) -> Dataset:
    """Rows of `prompt`, `responses` and `scores` 1 and 0, from `chosen` and `rejected`, with the prompt inside or not.

    Raises:
        ValueError: A column is missing.
    """
    check_columns(dataset, {"chosen", "rejected"})
    if "prompt" not in dataset.column_names:
        dataset = dataset.map(_with_prompt, desc="Extracting prompts")
    return dataset.map(
        lambda row: {"responses": [row["chosen"], row["rejected"]], "scores": [1.0, 0.0]},
        remove_columns=["chosen", "rejected"],
        desc="Pairing",
    )


def _with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """A pair with the turns that both responses share as its prompt, but for those from a last answer on.

    Trajectories may begin with the same call, whose result differs.

    Example:
        >>> def turns(*texts):
        ...     roles = ["user", "assistant", "tool", "assistant"]
        ...     return [{"role": role, "content": text} for role, text in zip(roles, texts)]
        >>> row = _with_prompt({"chosen": turns("q", "call", "4", "It is 4."), "rejected": turns("q", "call", "5")})
        >>> row["prompt"], row["rejected"][0]
        ([{'role': 'user', 'content': 'q'}], {'role': 'assistant', 'content': 'call'})
    """
    row = extract_prompt(row)
    prompt, sides = row["prompt"], (row["chosen"], row["rejected"])
    if isinstance(prompt, str):
        return row
    num = len(prompt)
    while num > 0 and any((prompt[num:] + side)[0]["role"] != "assistant" for side in sides):
        num -= 1
    chosen, rejected = (prompt[num:] + side for side in sides)
    return {**row, "prompt": prompt[:num], "chosen": chosen, "rejected": rejected}


def with_locations(dataset: Dataset, name: str) -> Dataset:
    """The rows, each with the `location` that a person knows it by: by default its number."""
    if "location" in dataset.column_names:
        return dataset
    return dataset.add_column("location", [f"row {i + 1} of {name}" for i in range(len(dataset))])


def tokenized_rows(dataset: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, args: NCAConfig) -> Dataset:
    """Tokenizes rows of `prompt`, `responses` and `scores`; says so where some are dropped or cut.

    Args:
        dataset: The rows.
        name: Name of the data set, for messages.
        tokenizer: The policy's.
        args: The limits, and the number of processes.

    Raises:
        ValueError: See `check_weights`.
    """
    check_weights(dataset, name)
    limits, desc = (args.max_length, args.max_prompt_length), f"Tokenizing {name}"
    settings = {"score_tokens": args.score_tokens, "num_proc": args.dataset_num_proc}
    rows, report = tokenize_dataset(dataset, tokenizer, *limits, **settings, desc=desc)
    if report["rows_dropped"] or report["responses_cut"]:
        logger.warning("%s: not all rows fit: %s", name, report)
    return rows


def is_tokenized(dataset: Dataset) -> bool:
    """Whether the rows come tokenized."""
    return set(TOKENIZED_FEATURES) <= {*dataset.column_names, "length"}


def checked_rows(dataset: Dataset, name: str) -> Dataset:
    """Rows that come tokenized, with their `length`.

    Args:
        dataset: Columns `prompt_ids`, `response_ids`, `scores` and `location`; `token_masks`, K lists of bools or null,
            where not all tokens of the responses count.
        name: Name of the data set, for errors.

    Raises:
        ValueError: A row has no prompt, fewer than two responses, an empty one, or another number of scores, or masks
            that do not fit its responses; names the first. See also `check_weights`.
    """
    check_weights(dataset, name)
    table = dataset.select_columns(["prompt_ids", "response_ids", "scores"]).with_format("arrow")[:]
    prompts, responses, scores = (table[column].combine_chunks() for column in table.column_names)
    num_responses = _lengths(responses)
    has_empty = np.zeros(len(num_responses), dtype=bool)
    has_empty[np.repeat(np.arange(len(num_responses)), num_responses)[_lengths(pc.list_flatten(responses)) == 0]] = True
    faults = {
        "its prompt has no token": _lengths(prompts) == 0,
        "a response has no token": has_empty,
        "it has fewer than two responses": num_responses < 2,
        "it has another number of scores than of responses": num_responses != _lengths(scores),
        **_faults_of_masks(dataset, responses),
    }
    for fault, rows in faults.items():
        if rows.any():
            location = dataset[int(rows.argmax())]["location"]
            raise ValueError(f"{name}: {location}: {fault} ({int(rows.sum())} such rows); leave it out")
    if "length" in dataset.column_names:
        return dataset
    return dataset.map(lambda row: {"length": group_length(row)}, desc=f"Measuring {name}")


def _faults_of_masks(dataset: Dataset, responses: pa.Array) -> dict[str, np.ndarray]:
    """Which rows have a mask that does not fit its response, or one of which no token counts."""
    if "token_masks" not in dataset.column_names:
        return {}
    masks = dataset.select_columns(["token_masks"]).with_format("arrow")[:]["token_masks"].combine_chunks()
    misfits, empty = np.zeros(len(masks), dtype=bool), np.zeros(len(masks), dtype=bool)
    for i in np.flatnonzero(masks.is_valid().to_numpy(zero_copy_only=False)):
        mask, ids = masks[i].as_py(), responses[i]
        misfits[i] = [*map(len, mask)] != [len(r) for r in ids.values]
        empty[i] = not all(map(any, mask))
    return {"token_masks does not have a bool for each token of its responses": misfits,
            "no token of a response counts (token_masks)": empty}  # fmt: skip


def check_weights(dataset: Dataset, name: str) -> None:
    """Checks the column `weight`, where there is one; a row without a weight has the weight 1.

    Raises:
        ValueError: A weight is no finite number of 0 or more, which is named; or all of them are 0.
    """
    if "weight" not in dataset.column_names:
        return
    column = dataset.select_columns(["weight"]).with_format("arrow")[:]["weight"].combine_chunks()
    if not any(is_of(column.type) for is_of in (pa.types.is_integer, pa.types.is_floating, pa.types.is_null)):
        raise ValueError(
            f"{name}: the column weight holds {column.type}; it is to be numbers, which multiply the losses of their "
            "prompts: rename or remove it if it says something else"
        )
    weights = pc.fill_null(column.cast(pa.float64()), 1.0).to_numpy(zero_copy_only=False)
    is_bad = ~((weights >= 0) & (weights <= torch.finfo(torch.float32).max))  # NaN is neither
    if is_bad.any():
        row = int(is_bad.argmax())
        raise ValueError(
            f"{name}: {dataset[row]['location']}: the weight is {weights[row]:g} ({int(is_bad.sum())} such rows); "
            "a weight is a finite number of 0 or more"
        )
    if len(weights) and not weights.any():
        raise ValueError(f"{name}: all weights are 0: nothing would be learned; change or remove the column weight")


def _lengths(lists: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
