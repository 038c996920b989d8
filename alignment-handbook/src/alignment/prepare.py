"""A run's rows, from their sources to token ids, and the report on them."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from alignment.data import DataConfig, check_rows, load_groups
from alignment.data_report import data_report
from alignment.rules import actions


def prepare_rows(
    config: DataConfig,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    pairs: bool,
    tokenize: Callable[..., tuple[Dataset, dict[str, Any]]],
) -> tuple[dict[str, Dataset], dict[str, Dataset], dict[str, Any]]:
    """The rows as texts and as token ids, by data set name, and the report on them, for data_report.json.

    Args:
        config: Where the rows come from, and how they are read.
        args: Of the trainer: loss, alpha, lengths in tokens.
        tokenizer: Of the policy.
        pairs: Whether the rows are preference pairs.
        tokenize: `trl_nca.responses.tokenize_dataset`.

    Raises:
        UserError: They cannot be trained on; see `load_groups`.
    """
    control_tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    raw, counts = load_groups(config, pairs, control_tokens, args.dataset_num_proc)
    check_rows(raw["train"], only_pairs=args.loss_type in ("DPO", "biasedNCA"), template=tokenizer.chat_template)
    limits = (args.max_length, args.max_prompt_length, actions(config.row_rules)["over_long"] == "mend")
    rows, reports = {}, {}
    for name, dataset in raw.items():
        how = (*limits, args.dataset_num_proc, f"Tokenizing {name}")
        rows[name], tokenized = tokenize(dataset, tokenizer, *how)
        reports[name] = data_report(name, config, counts[name], tokenized, rows[name], None if pairs else args.alpha)
    return raw, rows, reports["train"] | {"eval": reports.get("eval")}
