"""Reward data from files, folders and the Hub: which sources there are, and how they are mixed and split.

What a row may look like is in `alignment.formats`.
"""

import contextlib
import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from alignment import formats
from alignment.errors import UserError
from alignment.formats import GROUP_FEATURES, Row, to_group, to_pair


@dataclass
class DataConfig:
    """Where the rows come from: two files, or a mixture of sources."""

    train_file: str | None = field(
        default=None, metadata={"help": "Rows to train on: .jsonl, .jsonl.gz, .json, .csv or .parquet."}
    )
    eval_file: str | None = field(default=None, metadata={"help": "Held-out rows, in the same formats."})
    dataset_mixer: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Sources and the fraction of each to use: {file, folder or Hub id: fraction}."},
    )
    dataset_splits: list[str] | None = field(
        default=None,
        metadata={
            "help": "Splits of the sources; those with 'train' in their name are trained on. Default: train test."
        },
    )
    dataset_configs: list[str] | None = field(
        default=None, metadata={"help": "Configuration of each Hub source, in the order of dataset_mixer."}
    )
    dataset_mixture: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "alignment-handbook's 2025 form of a mixture: {datasets: [{id, config, split, columns, weight}], "
            "test_split_size, seed}."
        },
    )

    make_pairs: str | None = field(
        default=None,
        metadata={
            "help": "How run_preference.py makes a pair of a row with more than two responses: best_worst, or "
            "best_random (the best against another, drawn by a hash of the row).",
            "choices": ["best_worst", "best_random"],
        },
    )

    def __post_init__(self) -> None:
        for key in ("dataset_mixer", "dataset_mixture"):
            value = getattr(self, key)
            if isinstance(value, str):
                try:
                    setattr(self, key, json.loads(value))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{key}: not a mapping: {value!r}") from error
        if self.train_file is None and not self.dataset_mixer and not self.dataset_mixture:
            raise ValueError("no training data; set train_file, dataset_mixer or dataset_mixture")


def load_groups(config: DataConfig, pairs: bool = False) -> dict[str, Dataset]:
    """The rows to train on and the held-out rows.

    Args:
        config: Where they come from.
        pairs: Take them as preference pairs: two responses, the better one first, scores 1 and 0. Rows with more
            responses need `config.make_pairs`.

    Returns:
        `train` and, where there are held-out rows, `eval`: data sets with the columns of `GROUP_FEATURES`.

    Raises:
        UserError: A source is not there, has no train split, or a row cannot be used; names the file and row.
    """
    load = partial(_load_source, form="pairs" if pairs else "rewards", make_pairs=config.make_pairs)
    if config.train_file is not None:
        files = {"train": config.train_file, "eval": config.eval_file}
        return {name: load(file) for name, file in files.items() if file is not None}
    if config.dataset_mixture:
        return _load_mixture(config.dataset_mixture, load)
    splits = config.dataset_splits or ["train", "test"]
    if not any("train" in split for split in splits):
        raise UserError(f"dataset_splits: no train split in {splits}; one name must contain 'train'")
    parts: dict[str, list[Dataset]] = {"train": [], "eval": []}
    for i, (path, fraction) in enumerate(config.dataset_mixer.items()):
        if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise UserError(f"dataset_mixer: the fraction of {path} must be above 0 and at most 1, got {fraction}")
        name = config.dataset_configs[i] if config.dataset_configs else None
        for split in splits:
            if "train" in split:
                part = load(path, split, name)
                parts["train"].append(part.select(range(round(len(part) * fraction))))
            elif not Path(path).is_file():  # a file is one split
                parts["eval"].append(load(path, split, name))
    return {name: concatenate_datasets(found) for name, found in parts.items() if found}


def _load_mixture(mixture: dict[str, Any], load: Callable[..., Dataset]) -> dict[str, Dataset]:
    sources = mixture.get("datasets")
    if not sources or not all(isinstance(source, dict) and "id" in source for source in sources):
        raise UserError("dataset_mixture: 'datasets' must be a list of sources, each with an 'id'")
    parts = []
    for source in sources:
        part = load(source["id"], source.get("split", "train"), source.get("config"))
        parts.append(part.select(range(round(len(part) * source.get("weight", 1.0)))))
    rows = concatenate_datasets(parts)
    if mixture.get("test_split_size") is None:
        return {"train": rows}
    split = rows.train_test_split(test_size=mixture["test_split_size"], seed=mixture.get("seed", 0))
    return {"train": split["train"], "eval": split["test"]}


def check_rows(rows: Dataset, only_pairs: bool, template: str | None) -> None:
    """Checks that the rows fit the loss and the tokenizer.

    Args:
        rows: From `load_groups`.
        only_pairs: Whether the loss compares two responses and no more.
        template: The tokenizer's chat template, if it has one.

    Raises:
        UserError: They do not; names the row.
    """
    for i, row in enumerate(rows):
        if only_pairs and len(row["scores"]) > 2:
            raise UserError(
                f"loss_type: DPO and biasedNCA compare two responses, and row {i + 1} has {len(row['scores'])}; use "
                "NCA or InfoNCA, or run_preference.py with pairs"
            )
        if template is None and len(row["prompt"]) > 1:
            raise UserError(
                f"chat_template: the tokenizer has none, and the prompt of row {i + 1} has {len(row['prompt'])} "
                "messages; set chat_template to a Jinja template or a .jinja file"
            )


def _load_source(
    path: str, split: str | None = None, name: str | None = None, *, form: str, make_pairs: str | None
) -> Dataset:
    files = _local_files(path, split)
    # Part of the cache's key: the files, and the code that reads them.
    stamps = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    stamps += [hashlib.sha256(Path(code).read_bytes()).hexdigest() for code in (__file__, formats.__file__)]
    read = partial(_groups_of, path, split, name, form, make_pairs, stamps)
    try:
        # Reading a file is quick, and a bar would stand before the one line that a mistake gets; downloads keep theirs.
        with _without_bars() if files else contextlib.nullcontext():
            rows = Dataset.from_generator(read, features=GROUP_FEATURES)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    except ValueError as error:  # what datasets says of a generator that yields nothing
        if "corresponds to no data" not in str(error):
            raise
        rows = []
    if not len(rows):
        raise UserError(f"{path}: no rows{f' in split {split}' if split else ''}; give a file that has some")
    return rows


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _local_files(path: str, split: str | None) -> list[Path]:
    """The files that a source stands for; none for a Hub id."""
    here = Path(path)
    if here.is_file():
        return [here]
    if here.is_dir():
        return sorted(file for file in here.rglob("*") if file.is_file())
    if split is None or re.search(r"\.(jsonl?|csv|parquet)(\.gz)?$", path):
        raise UserError(f"{path}: no such file; check train_file, eval_file or dataset_mixer")
    return []


def _groups_of(
    path: str, split: str | None, name: str | None, form: str, make_pairs: str | None, stamps: list[Any]
) -> Iterator[Row]:
    for where, row in _read(path, split, name):
        group = to_group(row, where, form == "pairs")
        yield to_pair(group, where, make_pairs) if form == "pairs" else group


def _read(path: str, split: str | None, name: str | None) -> Iterator[tuple[str, Row]]:
    """Raw rows of a source, each with the words that tell a user which one it is."""
    if re.search(r"\.jsonl?(\.gz)?$", path) and Path(path).is_file():
        yield from _read_json(path)
        return
    for i, row in enumerate(_open_table(path, split, name)):
        yield f"{path}, row {i + 1}", row


def _read_json(path: str) -> Iterator[tuple[str, Row]]:
    open_text = gzip.open if path.endswith(".gz") else open
    try:
        with open_text(path, "rt", encoding="utf-8") as file:
            if re.search(r"\.json(\.gz)?$", path) and file.read(1) == "[":
                file.seek(0)
                lines = ((f"row {i + 1}", row) for i, row in enumerate(json.load(file)))
            else:
                file.seek(0)
                lines = ((f"line {i + 1}", line) for i, line in enumerate(file) if line.strip())
            for place, line in lines:
                where = f"{path}, {place}"
                row = _parse_line(line, where) if isinstance(line, str) else line
                if not isinstance(row, dict):
                    raise UserError(f"{where}: expected an object with named columns, got {type(row).__name__}")
                yield where, row
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _parse_line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno}); write one object a line") from error


def _open_table(path: str, split: str | None, name: str | None) -> Dataset:
    """A CSV or Parquet file, a `save_to_disk` folder, a folder of data files, or a Hub data set."""
    here = Path(path)
    try:
        if here.is_file():
            return load_dataset(here.suffix.lstrip("."), data_files=path, split="train")
        if (here / "dataset_dict.json").is_file() or (here / "state.json").is_file():
            table = load_from_disk(path)
        else:
            table = load_dataset(path, name)
    except Exception as error:  # datasets and the hub raise many kinds; all mean that the source cannot be read
        raise UserError(f"{path}: cannot be loaded as a file, folder or Hub data set: {error}") from error
    if not isinstance(table, DatasetDict):
        return table
    if split not in table:
        raise UserError(f"{path}: no split {split!r}; it has {', '.join(table)}: set dataset_splits")
    return table[split]
