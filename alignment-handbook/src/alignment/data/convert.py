"""Converts reward data of any known form to rows in list form, or to pairs, in one file."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from alignment.data.groups import RowConfig
from alignment.data.lengths import Columns
from alignment.data.notes import describe_notes
from alignment.data.outcomes import OPTIONAL, check_columns, check_dropped, count_outcomes, kept_rows
from alignment.data.reading import column, load_source
from alignment.data.report import describe
from alignment.data.row import as_turns
from alignment.data.stored import has_messages, has_more_than_text
from alignment.data.weights import describe_weights
from alignment.errors import UserError
from alignment.files import atomic_path
from alignment.models import load_trained_tokenizer
from trl_nca.rendering.renderer import control_tokens
from trl_nca.responses import tokenize_dataset

_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass
class ConvertConfig(RowConfig):
    """What to write, in addition to how rows are read."""

    to: str = field(
        default="list",
        metadata={
            "help": "Form of the output: list (prompt, responses, scores) or pairs (prompt, chosen, rejected and their "
            "scores; of more than two responses best_worst, unless make_pairs says otherwise).",
            "choices": ["list", "pairs"],
        },
    )
    output: str = field(default="", metadata={"help": "File to write: .jsonl, .jsonl.gz or .parquet."})
    report: str | None = field(
        default=None, metadata={"help": "Folder for data_report.json and data_report.png: what the rows look like."}
    )
    split: str | None = field(default=None, metadata={"help": "Split, for inputs that are folders or Hub ids."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the output if it is there."})
    max_dropped_fraction: float = field(
        default=1.0, metadata={"help": "Write nothing when more than this share of the rows has to be dropped."}
    )
    alpha: float | None = field(
        default=None, metadata={"help": "Say in the report what labels softmax(score / alpha) makes."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Measure lengths in this tokenizer's tokens, not in characters, and look for its control tokens."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output.endswith(_ENDINGS):
            raise ValueError(f"output: ends in one of {', '.join(_ENDINGS)}, and this is {self.output!r}")
        if self.to == "pairs":
            self.make_pairs = self.make_pairs or "best_worst"


def convert(inputs: Sequence[str], config: ConvertConfig) -> dict[str, Any]:
    """Reads the inputs, writes what is kept of them to one file, and reports.

    The same inputs and settings give the same bytes. The output is there whole or not at all.

    Args:
        inputs: Files, folders or Hub ids, in the order of their rows in the output.
        config: How rows are read, and what to write.

    Returns:
        The data report, as in data_report.json.

    Raises:
        UserError: An input cannot be read, the output is there already, or no row is left.
    """
    output = Path(config.output)
    if output.exists() and not config.overwrite:
        raise UserError(f"output: {output} is there already; give another name, or --overwrite=true")
    tokenizer = _load_tokenizer(config.tokenizer) if config.tokenizer else None
    forbidden = control_tokens(tokenizer) if tokenizer else None
    parts = [
        load_source(path, config.split, config=config, unscored_pairs=True, control_tokens=forbidden) for path in inputs
    ]
    check_columns(parts, config)
    rows = concatenate_datasets(parts)
    counts = count_outcomes(rows)
    check_dropped("input", counts, config.max_dropped_fraction)
    kept = kept_rows(rows)
    columns, tokenized = Columns.of_texts(kept), {"rows_dropped": 0}
    fixed = int((pc.list_value_length(column(kept, "fixed")).to_numpy() > 0).sum())
    counts |= {"rows_kept": len(kept), "rows_fixed": fixed, "responses": len(columns.scores)}
    if tokenizer:
        measured, tokenized = tokenize_dataset(kept, tokenizer)
        columns = Columns.of_tokens(measured) if len(measured) else columns
    notes = describe_notes(counts.pop("noted"), len(kept))
    report = counts | notes | describe(columns, config.alpha) | describe_weights(kept)
    report["warnings"] += notes["warnings"]
    if tokenized["rows_dropped"]:
        first = next(iter(tokenized["examples"].values()))[0]
        report["warnings"].append(
            f"{tokenized['rows_dropped']} of these rows would be dropped in training with {config.tokenizer}, and are "
            f"not measured: {first}"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as partial:
        _write(kept, config.to, partial, str(output))
    return report


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return load_trained_tokenizer(name)[0]
    except UserError as error:
        raise UserError(f"tokenizer: {str(error).removeprefix('model_name_or_path: ')}") from error


def _write(rows: Dataset, to: str, file: Path, name: str) -> None:
    if name.endswith(".parquet"):
        options = set(OPTIONAL) - {"weight"}
        is_plain = not options.intersection(rows.column_names) and not (
            has_more_than_text(column(rows, "prompt")).any() or has_messages(column(rows, "responses")).any()
        )
        shape = _shape if is_plain else _as_text
        made = rows.map(lambda row: shape(row, to), remove_columns=rows.column_names, desc=f"Writing {name}")
        made.to_parquet(file)
        return
    with file.open("wb") as raw:
        # No name and no time in the header: the same rows are the same bytes.
        stream = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if name.endswith(".gz") else raw
        for row in tqdm(rows, desc=f"Writing {name}"):
            stream.write(json.dumps(_shape(row, to), ensure_ascii=False).encode() + b"\n")
        if stream is not raw:
            stream.close()


def _shape(row: dict[str, Any], to: str) -> dict[str, Any]:
    options = {name: json.loads(row[name]) for name in OPTIONAL if name != "weight" and row.get(name) is not None}
    options |= {"weight": row["weight"]} if "weight" in row else {}
    if to == "list":
        return {**{name: row[name] for name in ("prompt", "responses", "scores")}, **options}
    chosen, rejected = map(as_turns, row["responses"])
    return {
        "prompt": row["prompt"],
        "chosen": chosen,
        "rejected": rejected,
        "score_chosen": row["scores"][0],
        "score_rejected": row["scores"][1],
        **options,
    }


def _as_text(row: dict[str, Any], to: str) -> dict[str, Any]:
    """A row for a table, whose columns have one type: messages, tools and arguments as JSON text."""

    def text(value: Any) -> str | None:
        return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    found = _shape(row, to)
    found |= {name: text(found.get(name)) for name in ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")}
    if "responses" in found:
        found["responses"] = [text(said) for said in found["responses"]]
    return found
