"""Loads the reward data of a run: mixes and splits sources, and counts the outcome of each row.

What a row may look like is in `formats`, what happens to a bad one in `rules`, and how a source is read in `reading`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets

from alignment.data.groups import RowConfig
from alignment.data.outcomes import check_columns, check_dropped, count_outcomes, kept_rows
from alignment.data.reading import column, load_source
from alignment.errors import UserError
from trl_nca.loss_config import LossConfig

Load = Callable[..., Dataset]


@dataclass
class DataConfig(RowConfig):
    """The sources of the rows: two files, or a mixture of sources."""

    train_file: str | None = field(
        default=None, metadata={"help": "Rows to train on: .jsonl, .json, .csv, .tsv (each also with .gz) or .parquet."}
    )
    eval_file: str | None = field(default=None, metadata={"help": "Held-out rows, in the same formats."})
    eval_fraction: float | None = field(
        default=None,
        metadata={"help": "Hold out this share of the prompts, drawn by their hash, with all their rows."},
    )
    allow_shared_prompts: bool = field(
        default=False, metadata={"help": "Continue although training and held-out rows share prompts."}
    )
    max_dropped_fraction: float = field(
        default=0.2, metadata={"help": "End the run when more than this share of the rows has to be dropped."}
    )
    dataset_mixer: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Sources and the fraction of each to use: {file, folder or Hub id: fraction}."},
    )
    dataset_splits: list[str] | None = field(
        default=None,
        metadata={
            "help": "Splits of the sources; those with 'train' in their name are trained on, the others held out. "
            "Default: train test, or with eval_fraction train alone."
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("dataset_mixer", "dataset_mixture"):
            value = getattr(self, key)
            if isinstance(value, str):
                try:
                    setattr(self, key, json.loads(value))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{key}: not a mapping: {value!r}") from error
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction: a share between 0 and 1, got {self.eval_fraction}")
        if not 0 <= self.max_dropped_fraction <= 1:
            raise ValueError(f"max_dropped_fraction: a share from 0 to 1, got {self.max_dropped_fraction}")
        self._check_sources()

    def _check_sources(self) -> None:
        """Refuses keys that contradict each other: one of them would not be read."""
        given = [key for key in ("train_file", "dataset_mixer", "dataset_mixture") if getattr(self, key)]
        if not given:
            raise ValueError("no training data; set train_file, dataset_mixer or dataset_mixture")
        if len(given) > 1:
            raise ValueError(f"{given[0]}: {given[1]} names training data too; {_how_to_reset(*given)}")
        for key in ("dataset_splits", "dataset_configs"):
            if getattr(self, key) and not self.dataset_mixer:
                raise ValueError(f"{key}: is read with dataset_mixer alone; {_how_to_reset(key)}")
        if self.eval_file is not None and self.train_file is None:
            raise ValueError(
                f"eval_file: is read with train_file alone, and the training data is in {given[0]}, which has the "
                f"held-out rows too; {_how_to_reset('eval_file', given[0])}"
            )
        held_out = [key for key in ("eval_file", "eval_fraction") if getattr(self, key) is not None]
        held_out += ["dataset_splits"] if any("train" not in split for split in self.dataset_splits or []) else []
        held_out += ["test_split_size"] if (self.dataset_mixture or {}).get("test_split_size") is not None else []
        if len(held_out) > 1:
            raise ValueError(f"{held_out[0]}: {held_out[1]} names held-out rows too; {_how_to_reset(*held_out)}")
        if self.dataset_configs and len(self.dataset_configs) != len(self.dataset_mixer):
            raise ValueError(
                f"dataset_configs: {len(self.dataset_configs)} names for the {len(self.dataset_mixer)} sources of "
                "dataset_mixer; give one for each, in their order"
            )


def _how_to_reset(*keys: str) -> str:
    """Words for the fix: which flags reset the keys, one of which may be in the recipe."""
    rest = "remove the key" if len(keys) == 1 else "give one of them"
    return f"{rest} ({' or '.join(f'--{key}=' for key in keys)} resets what a recipe sets)"


def load_groups(
    config: DataConfig,
    pairs: bool = False,
    control_tokens: list[str] | None = None,
    num_proc: int | None = None,
    keep_columns: bool = False,
    only_pairs: bool = False,
) -> tuple[dict[str, Dataset], dict[str, dict[str, Any]]]:
    """Loads the rows to train on, and the held-out rows, of which `config.num_responses` takes no responses.

    Args:
        config: Sources of the rows, and how they are read.
        pairs: Read them as preference pairs: two responses, the better one first, scores 1 and 0. Rows with more
            responses need `config.make_pairs`.
        control_tokens: Texts of the tokenizer's control tokens that are looked for in the rows.
        num_proc: Processes to read with. None: one for each core.
        keep_columns: Keep the rows' other columns, for a reward function.
        only_pairs: Whether the loss compares two responses and no more: where `config.num_responses` makes the pairs,
            it makes those of held-out rows too.

    Returns:
        `train` and, where there are held-out rows, `eval`: data sets with the columns of `GROUP_FEATURES`; and for each
        the outcome of its rows, see `count_outcomes`.

    Raises:
        UserError: A source is not there or has no train split, a row is of a kind that ends the run, too many rows
            were dropped, or training and held-out rows share prompts; names the file and row.
    """
    load = partial(
        load_source,
        config=config,
        pairs=pairs,
        control_tokens=control_tokens,
        num_proc=num_proc,
        keep_columns=keep_columns,
    )
    # The measure of a run must not change with the number of responses that it is trained on.
    is_cut = config.num_responses is not None and not ((pairs or only_pairs) and config.make_pairs is None)
    load_whole = partial(load, config=replace(config, num_responses=None)) if is_cut else load
    rows = _load_sources(config, load, load_whole)
    check_columns(list(rows.values()), config)
    if "eval" not in rows and (key := _split_key(config)) is not None:
        whole = _load_sources(config, load_whole, load_whole)["train"] if is_cut else rows["train"]
        rows = _split(rows["train"], whole, _held_out_rows(config, whole), key)
    counts = {name: count_outcomes(part) for name, part in rows.items()}
    for name, count in counts.items():
        check_dropped(name, count, config.max_dropped_fraction)
    kept = {name: kept_rows(part) for name, part in rows.items()}
    if "eval" in kept:
        shared = _shared_prompts(kept["train"], kept["eval"])
        counts["train"]["prompts_shared_with_eval"] = len(shared)
        if len(shared) and not config.allow_shared_prompts:
            hashes = column(kept["eval"], "prompt_hash").to_numpy()
            place = kept["eval"][int(np.flatnonzero(hashes == shared[0])[0])]["location"]
            raise UserError(
                f"{len(shared)} prompts stand in the training and in the held-out rows (one is {place}): take them "
                "out, split by eval_fraction, or set allow_shared_prompts: true"
            )
    return kept, counts


def check_num_responses(rows: Dataset, loss: LossConfig) -> None:
    """Checks that the rows have as many responses as the loss takes.

    Args:
        rows: From `load_groups`.
        loss: The loss, which may compare two responses and no more.

    Raises:
        UserError: They have not; names the row.
    """
    taken = loss.loss.num_responses
    others = np.flatnonzero(pc.list_value_length(column(rows, "scores")).to_numpy() != taken)
    if taken is not None and len(others):
        row = rows[int(others[0])]
        hint = "make_pairs: best_worst" if taken == 2 else f"min_responses: {taken} and num_responses: {taken}"
        raise UserError(
            f"loss_type: {loss.loss_type} compares {taken} responses, and {row['location']} has {len(row['scores'])}; "
            f"use a loss of any number, such as NCA or InfoNCA, or set {hint}"
        )


def _load_sources(config: DataConfig, load: Load, load_whole: Load) -> dict[str, Dataset]:
    """The rows by `train` and, where a source is held out as a whole, `eval`."""
    if config.train_file is not None:
        held_out = {} if config.eval_file is None else {"eval": load_whole(config.eval_file)}
        return {"train": load(config.train_file)} | held_out
    if config.dataset_mixture:
        return {"train": _load_mixture(config.dataset_mixture, load)}
    return _load_mixer(config, load, load_whole)


def _load_mixer(config: DataConfig, load: Load, load_whole: Load) -> dict[str, Dataset]:
    splits = config.dataset_splits or (["train"] if config.eval_fraction is not None else ["train", "test"])
    if not any("train" in split for split in splits):
        raise UserError(f"dataset_splits: no train split in {splits}; one name must contain 'train'")
    parts: dict[str, list[Dataset]] = {"train": [], "eval": []}
    for i, (path, fraction) in enumerate(config.dataset_mixer.items()):
        fraction = _fraction(fraction, f"dataset_mixer: the fraction of {path}")
        name = config.dataset_configs[i] if config.dataset_configs else None
        for split in splits:
            if "train" in split:
                part = load(path, split, name)
                parts["train"].append(part.select(range(round(len(part) * fraction))))
            elif not Path(path).is_file():  # a file is one split
                parts["eval"].append(load_whole(path, split, name))
    return {name: concatenate_datasets(found) for name, found in parts.items() if found}


def _load_mixture(mixture: dict[str, Any], load: Load) -> Dataset:
    sources = mixture.get("datasets")
    if not sources or not all(isinstance(source, dict) and "id" in source for source in sources):
        raise UserError("dataset_mixture: 'datasets' must be a list of sources, each with an 'id'")
    parts = []
    for source in sources:
        weight = _fraction(source.get("weight", 1.0), f"dataset_mixture: the weight of {source['id']}")
        part = load(source["id"], source.get("split", "train"), source.get("config"))
        parts.append(part.select(range(round(len(part) * weight))))
    return concatenate_datasets(parts)


def _split_key(config: DataConfig) -> str | None:
    """The key that holds out a part of the rows; None where there is none."""
    if config.eval_fraction is not None:
        return "eval_fraction"
    return "test_split_size" if (config.dataset_mixture or {}).get("test_split_size") is not None else None


def _held_out_rows(config: DataConfig, rows: Dataset) -> np.ndarray:
    """Whether each row is held out, with all others of its prompt. Shape (rows,)."""
    hashes = column(rows, "prompt_hash").to_numpy()
    if config.eval_fraction is not None:
        return (hashes >= 0) & (hashes < config.eval_fraction * 2**63)
    # Whole prompts, in random order, until there are as many rows as asked for.
    mixture = config.dataset_mixture or {}
    size = mixture["test_split_size"]
    prompts, counts = np.unique(hashes[hashes >= 0], return_counts=True)
    order = np.random.default_rng(mixture.get("seed", 0)).permutation(len(prompts))
    before = np.cumsum(counts[order]) - counts[order]
    return np.isin(hashes, prompts[order[before < (size * counts.sum() if size < 1 else size)]])


def _fraction(value: Any, what: str) -> float:
    """A share of a source's rows; a number in quotes is one."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not 0 < number <= 1:
        raise UserError(f"{what} must be above 0 and at most 1, got {value!r}")
    return number


def _split(train: Dataset, whole: Dataset, held_out: np.ndarray, key: str) -> dict[str, Dataset]:
    """The rows whose prompts are not held out, and those that are.

    Args:
        train: Rows to train on, all of them.
        whole: The same rows with all their responses.
        held_out: Whether each of these is held out. Shape (rows of whole,).
        key: That says so, for errors.
    """
    if not held_out.any() or held_out.all():
        raise UserError(f"{key}: leaves {'no' if held_out.all() else 'all'} rows to train on; change it")
    prompts = column(whole, "prompt_hash").to_numpy()[held_out]
    stay = ~np.isin(column(train, "prompt_hash").to_numpy(), prompts)
    return {"train": train.select(np.flatnonzero(stay)), "eval": whole.select(np.flatnonzero(held_out))}


def _shared_prompts(train: Dataset, held_out: Dataset) -> list[int]:
    return np.intersect1d(column(train, "prompt_hash").to_numpy(), column(held_out, "prompt_hash").to_numpy()).tolist()
