"""A run's rows, from their sources to token ids, and the report on them."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from alignment.data.load import DataConfig, check_rows, load_groups
from alignment.data.report import data_report
from alignment.data.rules import actions
from trl_nca.config import NCAConfig
from trl_nca.responses import control_tokens, tokenize_dataset


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
    raw, counts = load_groups(config, pairs, control_tokens(tokenizer), args.dataset_num_proc, keep_columns)
    check_rows(raw["train"], only_pairs=args.loss_type in ("DPO", "biasedNCA"), template=tokenizer.chat_template)
    rows, reports = {}, {}
    for name, dataset in raw.items():
        rows[name], tokenized = tokenize_dataset(
            dataset,
            tokenizer,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            cut_over_long=actions(config.row_rules)["over_long"] == "fix",
            num_proc=args.dataset_num_proc,
            desc=f"Tokenizing {name}",
        )
        reports[name] = data_report(name, config, counts[name], tokenized, rows[name], None if pairs else args.alpha)
    return raw, rows, reports["train"] | {"eval": reports.get("eval")}


def describe_group(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """A tokenized group as text, to check: what the model is given, and which tokens count in the loss.

    Args:
        row: A tokenized row: `prompt_ids`, `response_ids`, `scores`.
        tokenizer: The policy's tokenizer.
    """
    prompt = tokenizer.decode(row["prompt_ids"])
    lines = [f"prompt ({len(row['prompt_ids'])} tokens, mask 0):", repr(prompt), ""]
    for k, (ids, score) in enumerate(zip(row["response_ids"], row["scores"], strict=True)):
        ends = "ends with EOS" if tokenizer.eos_token_id in ids[-2:] else "has no EOS at its end"
        lines += [
            f"response {k + 1}, score {score:g} ({len(ids)} tokens, mask 1, {ends}):",
            repr(tokenizer.decode(ids)),
        ]
        lines += [" ".join(f"{token!r}:1" for token in tokenizer.convert_ids_to_tokens(ids)), ""]
    return "\n".join(lines)
