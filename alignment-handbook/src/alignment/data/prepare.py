"""A run's rows, from their sources to token ids, and the report on them."""

import itertools
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from alignment.data.load import DataConfig, check_num_responses, load_groups
from alignment.data.outcomes import check_template
from alignment.data.report import data_report
from alignment.data.row import Row
from alignment.data.rules import actions
from trl_nca.config import NCAConfig
from trl_nca.fitting import DEFAULT_ACTIONS
from trl_nca.rendering.messages import RefusedRow
from trl_nca.rendering.renderer import control_tokens
from trl_nca.responses import ResponseTokenizer, tokenize_dataset
from trl_nca.stops import stop_tokens

#: Rows that are searched for the end of a response.
_SEARCHED_ROWS = 1000


def prepare_rows(
    config: DataConfig,
    args: NCAConfig,
    tokenizer: PreTrainedTokenizerBase,
    pairs: bool,
    keep_columns: bool = False,
) -> tuple[dict[str, Dataset], dict[str, Dataset], dict[str, Any]]:
    """The rows as texts and as token ids, each by `train` and `eval`, and the report on them, for data_report.json.

    Args:
        config: Where the rows come from, and how they are read.
        args: The training arguments: loss, alpha, lengths in tokens.
        tokenizer: The policy's tokenizer.
        pairs: Whether the rows are preference pairs.
        keep_columns: Whether the texts keep the other columns of their rows, for a reward function.

    Raises:
        UserError: They cannot be trained on; see `load_groups`.
    """
    only_pairs = args.loss.num_responses == 2
    raw, counts = load_groups(config, pairs, control_tokens(tokenizer), args.dataset_num_proc, keep_columns, only_pairs)
    for dataset in raw.values():
        check_num_responses(dataset, args)
    check_template(raw["train"], tokenizer.chat_template)
    chosen = actions(config.row_rules)
    rows, reports = {}, {}
    for name, dataset in raw.items():
        rows[name], tokenized = tokenize_dataset(
            dataset,
            tokenizer,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            actions={reason: chosen[reason] for reason in DEFAULT_ACTIONS},
            min_responses=2 if pairs else config.min_responses,
            score_tokens=args.score_tokens,
            num_proc=args.dataset_num_proc,
            desc=f"Tokenizing {name}",
        )
        reports[name] = data_report(name, config, counts[name], tokenized, rows[name], None if pairs else args)
    if keep_columns and reports.get("eval", {}).get("rows_dropped"):  # samples are drawn to these prompts
        raw["eval"] = _renderable(raw["eval"], tokenizer)
    reports["train"]["warnings"] += warn_of_template(tokenizer) + warn_of_ends(rows["train"], tokenizer)
    return raw, rows, reports["train"] | {"eval": reports.get("eval")}


def _renderable(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The rows whose prompt the chat template takes: the others were dropped by name, and cannot be sampled to."""
    tokenize = ResponseTokenizer(tokenizer)

    def is_taken(row: Row) -> bool:
        try:
            return bool(tokenize.encode_prompt(row["prompt"], row.get("tools"), row.get("chat_template_kwargs")))
        except RefusedRow:
            return False

    return rows.select([i for i, row in enumerate(rows) if is_taken(row)])


def warn_of_template(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A warning where there is no chat template."""
    if tokenizer.chat_template is not None:
        return []
    return [
        "the tokenizer has no chat template: responses follow their prompts as plain text, with no turns; set "
        "chat_template to a template if the model is to be chatted with"
    ]


def warn_of_ends(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A warning where no response has a token that sampling stops at: a model would not learn to end its answers."""
    stops = set(stop_tokens(tokenizer))
    first = rows.select_columns(["response_ids"]).select(range(min(len(rows), _SEARCHED_ROWS)))
    if any(not stops.isdisjoint(ids) for row in first for ids in row["response_ids"]):
        return []
    if not stops:
        return [
            "no response has an end: the tokenizer has no EOS, and the chat template writes no special token behind an "
            "answer, so that sampling only stops at its limit; give the tokenizer an eos_token, or set chat_template"
        ]
    names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(stops)))
    return [f"no response ends where sampling stops (at {names}): the model does not learn to end its answers"]


def describe_group(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """A tokenized group as text, to check: what the model is given, and which tokens count in the loss.

    Args:
        row: A tokenized row: `prompt_ids`, `response_ids`, `token_masks`, `scores`; `weight`, where the data have it.
        tokenizer: The policy's tokenizer.
    """
    prompt = tokenizer.decode(row["prompt_ids"])
    weight = "" if row.get("weight") is None else f", weight {row['weight']:g}"
    lines = [f"prompt ({len(row['prompt_ids'])} tokens, mask 0{weight}):", repr(prompt), ""]
    masks = row["token_masks"] or [[True] * len(ids) for ids in row["response_ids"]]
    for k, (ids, mask, score) in enumerate(zip(row["response_ids"], masks, row["scores"], strict=True)):
        counts = "mask 1" if all(mask) else f"mask 1 on {sum(mask)} of them"
        lines.append(f"response {k + 1}, score {score:g} ({len(ids)} tokens, {counts}, {_end(ids, tokenizer)}):")
        for is_scored, run in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
            text = repr(tokenizer.decode([token for token, _ in run]))
            lines.append(text if all(mask) else f"  mask {int(is_scored)}: {text}")
        tokens = zip(tokenizer.convert_ids_to_tokens(ids), mask, strict=True)
        lines += [" ".join(f"{token!r}:{int(counts)}" for token, counts in tokens), ""]
    return "\n".join(lines)


def _end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """How a response ends, in words. (Some templates write a line's end behind the end of a turn.)"""
    stops = stop_tokens(tokenizer)
    last = [token for token in ids[-3:] if token in stops]
    if not last:
        return "has no token at its end at which sampling stops"
    if last[-1] == tokenizer.eos_token_id:
        return "ends with EOS"
    return f"ends with {tokenizer.decode(last[-1:])}, where sampling stops"
