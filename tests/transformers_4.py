"""Run by a Python that has transformers 4: its logits and token ids of saved folders, to hold them to what 5 gives.

    python tests/transformers_4.py FOLDER ...

Each FOLDER has `expected.npz`: `input_ids` of shape (1, L) with the `logits` that transformers 5 gives them, and, where
a tokenizer is there, a `text` and its `text_ids`. Prints a JSON object: by folder the largest difference of a logit,
and whether the ids are the same.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def compare(folder: Path) -> dict[str, float | bool]:
    """What becomes of a folder in this transformers."""
    expected = np.load(folder / "expected.npz")
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor(expected["input_ids"])).logits.numpy()
    found = {"difference": float(np.abs(logits - expected["logits"]).max())}
    if "text" in expected:
        ids = AutoTokenizer.from_pretrained(folder)(str(expected["text"]))["input_ids"]
        found["same_ids"] = ids == expected["text_ids"].tolist()
    return found


if __name__ == "__main__":
    print(json.dumps({name: compare(Path(name)) for name in sys.argv[1:]}))
