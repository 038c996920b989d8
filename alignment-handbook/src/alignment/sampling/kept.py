"""Samples that are kept on disk for later runs which would draw the same: before training the loss changes nothing.

The name of a file is a hash of everything that decides the samples, as with `trl_nca.reference`. It may be deleted at
any time.
"""

import fcntl
import json
from pathlib import Path
from typing import Any

from alignment.data.row import Row
from alignment.files import read_json, write_json
from alignment.resumable import content_hash
from alignment.sampling.sample import Drawn, SamplingConfig, encode_row, generation_settings, sample_responses
from trl_nca.code_hash import code_hash
from trl_nca.reference import hash_weights, package_versions
from trl_nca.sharing import base_model


def sample_or_read(
    folder: str | None, model, tokenizer, prompts: list[Row], desc: str = "Sampling", **settings: Any
) -> list[list[Drawn]]:
    """Samples responses to each prompt, or reads what an earlier call with the same arguments has drawn.

    Args:
        folder: Of the kept samples; None: none are kept. A second process waits for one that draws the same.
        model, tokenizer, prompts, desc, settings: See `sample_responses`.
    """
    if folder is None:
        return sample_responses(model, tokenizer, prompts, desc, **settings)
    file = Path(folder) / f"{content_hash(_describe(model, tokenizer, prompts, SamplingConfig(**settings)))}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:  # let go of when it is closed, also by a kill
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = read_json(file)
        if found is None:
            found = sample_responses(model, tokenizer, prompts, desc, **settings)
            write_json(file, found)
    return [[Drawn(*response) for response in of_prompt] for of_prompt in found]


def _describe(model, tokenizer, prompts: list[Row], config: SamplingConfig) -> str:
    """Everything that the samples depend on, as JSON."""
    description = {
        "weights": hash_weights(model),
        "config": {k: v for k, v in base_model(model).config.to_diff_dict().items() if not k.startswith("_")},
        "adapters": {name: adapter.to_dict() for name, adapter in getattr(model, "peft_config", {}).items()},
        "prompts": [encode_row(tokenizer, row) for row in prompts],
        "vocabulary": tokenizer.get_vocab(),
        "sampling": vars(config),
        "generation": generation_settings(model, tokenizer, config),
        "device": model.device.type,
        "packages": package_versions(model),
        "code": code_hash(["alignment.sampling.sample"]),
    }
    return json.dumps(description, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
