"""Log-probs of the data set under the reference, computed once and kept on disk.

The cache is a file of JSON lines, one a row, whose name is a hash of everything that the values depend on: a changed
model, adapter, row, template, truncation, precision, engine or package has another name. It may be deleted at any time.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from trl_nca.code_hash import code_hash
from trl_nca.sharing import base_model

#: The modules that the values come from; with all that these import of their package, they are the engine.
ENGINE = ("trl_nca.collate", "trl_nca.logps")
#: Packages that the values depend on, whatever the model; those of its layers are added.
PACKAGES = {"torch", "transformers", "peft"}


def reference_logps(
    dataset: Dataset, file: Path, description: dict[str, Any],
    score: Callable[[list[dict[str, Any]]], list[list[float]]], batch_size: int, desc: str,
) -> list[list[float]]:  # fmt: skip
    """Log-probs of all rows, from the file as far as it goes, else computed and added to it as they come.

    Longest rows first, so that a lack of memory shows at once. A run that was killed resumes where it stopped, also
    with another number of processes.

    Args:
        dataset: Tokenized rows, with `length`.
        file: From `cache_file`. Read and written by the main process alone.
        about: What the file's name is the hash of; written as its first line, for a person who wonders.
        score: Log-probs of some rows, K for each. Called equally often on all processes.
        batch_size: Rows to score at a time, on each process.
        desc: Text of the progress bar.

    Returns:
        For each row of the data set its K log-probs, in nats.
    """
    state = PartialState()
    logps: dict[int, list[float]] = dict(gather_object(list(_read(file).items()) if state.is_main_process else []))
    lengths = dataset["length"][:]
    missing = sorted((i for i in range(len(dataset)) if i not in logps), key=lambda i: (-lengths[i], i))
    if missing and state.is_main_process:
        _append(file, [description])  # also ends a line that a kill cut short
    step = batch_size * state.num_processes
    hidden = None if missing and state.is_main_process else True  # None: where the output is no terminal
    for at in tqdm(range(0, len(missing), step), desc=desc, disable=hidden):
        batch = missing[at : at + step]
        mine = batch[state.process_index :: state.num_processes] or batch[:1]  # no row is left: any
        found = gather_object(list(zip(mine, score([dataset[i] for i in mine]), strict=True)))
        if state.is_main_process:
            _append(file, [{"row": i, "logps": values} for i, values in found])
        logps.update(found)
    return [logps[i] for i in range(len(dataset))]


def describe_reference(model: nn.Module, dataset: Dataset, adapter: str | None, **settings: Any) -> dict[str, Any]:
    """Everything that the reference's log-probs of a data set depend on, as values and hashes fit for JSON.

    Args:
        model: The model that is run as the reference. Sharded weights are hashed where they are.
        dataset: Tokenized rows: their ids stand for texts, template, tokenizer and truncation.
        adapter: Name of an adapter that is switched off and must not count; None where none is.
        **settings: Whatever else matters, such as the precision.
    """
    config = base_model(model).config.to_diff_dict()
    description = {
        "weights": sorted(set(gather_object([hash_weights(model, adapter)]))),  # one, unless they are sharded
        "config": {k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"},
        "adapters": {n: c.to_dict() for n, c in model.peft_config.items() if n != adapter}
        if isinstance(model, PeftModel)
        else {},
        "rows": _hash_rows(dataset),
        "engine": code_hash(ENGINE),
        "packages": package_versions(model),
        **settings,
    }
    return json.loads(
        json.dumps(description, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    )


def cache_file(description: dict[str, Any], folder: str | None) -> Path:
    """Where the log-probs of this reference and data set are kept. `folder` None: beside the data sets' cache."""
    name = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]
    return (Path(folder) if folder else Path(datasets.config.HF_DATASETS_CACHE) / "ref_logps") / f"{name}.jsonl"


def _read(file: Path) -> dict[int, list[float]]:
    """Rows and their log-probs; a line that a kill cut short is skipped."""
    logps = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            entry = json.loads(line)
            logps[entry["row"]] = entry["logps"]
        except (ValueError, KeyError, TypeError):
            continue
    return logps


def _append(file: Path, entries: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.writelines(json.dumps(entry) + "\n" for entry in entries)


def hash_weights(model: nn.Module, adapter: str | None = None) -> str:
    """A hash of the weights that this process holds, without those of an adapter."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict(keep_vars=True).items()):
        if adapter in name.split("."):
            continue
        value = getattr(value, "ds_tensor", value)  # this process's part under DeepSpeed ZeRO-3
        value = value.to_local() if isinstance(value, DTensor) else value
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()


def _hash_rows(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    names = [name for name in ("prompt_ids", "response_ids", "token_masks") if name in dataset.column_names]
    for table in dataset.select_columns(names).with_format("arrow").iter(1000):
        for column in table.columns:
            array = column.combine_chunks()
            while pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
                digest.update(pc.list_value_length(array).to_numpy(zero_copy_only=False))
                array = array.flatten()
            digest.update(array.to_numpy(zero_copy_only=False))
    return digest.hexdigest()


def package_versions(model: nn.Module) -> dict[str, str]:
    """Versions of the packages that do the arithmetic: `PACKAGES`, and those of layers, such as a quantization's."""
    names = PACKAGES | {type(module).__module__.partition(".")[0] for module in model.modules()}
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in sorted(names)}
    return {name: str(version) for name, version in versions.items() if version}
