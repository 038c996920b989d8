"""Merge a LoRA adapter into the model it was trained on."""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from alignment.errors import UserError
from alignment.models import adapter_base, load_trained_model, load_trained_tokenizer

#: Largest difference of a logit, in parts of the largest logit, that float32 arithmetic may make.
TOLERANCE = 1e-3
_PROBE = "Numbers: 1, 2, 3. The quick brown fox"


def merge_adapter(adapter: str, output: str) -> float:
    """Writes base + adapter as one model in float32, with its tokenizer, and reads it back to see that it is the same.

    Args:
        adapter: Folder of the adapter.
        output: Folder to write; it must not exist, or be empty.

    Returns:
        The largest difference of a logit between the adapter on its base and what was written, in parts of the largest.

    Raises:
        UserError: `adapter` is none, `output` is not empty, or the difference is above `TOLERANCE`.
    """
    if adapter_base(adapter) is None:
        raise UserError(f"{adapter}: no adapter_config.json; give the folder of a PEFT adapter")
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output: {output} is not empty; name a new folder")
    partial = folder.with_name(f".{folder.name}.partial")  # a kill leaves no half-made folder under the real name
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer, _ = load_trained_tokenizer(adapter)
    model = load_trained_model(adapter, "float32")
    expected = _probe(model, tokenizer)
    model.merge_and_unload().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    del model
    merged = _probe(AutoModelForCausalLM.from_pretrained(partial, dtype="float32"), tokenizer)
    difference = ((merged - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        shutil.rmtree(partial)
        raise UserError(
            f"{adapter}: merged, it gives other logits (by {difference:.2g} of the largest, {TOLERANCE:g} is allowed), "
            "as when embeddings are tied and the adapter changes one of them; sample from the adapter itself"
        )
    if folder.is_dir():
        folder.rmdir()
    partial.rename(folder)
    return difference


@torch.inference_mode()
def _probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Logits at a few tokens, on the CPU. Shape (1, L, V)."""
    ids = tokenizer(_PROBE, return_tensors="pt")["input_ids"].to(model.device)  # (1, L)
    return model.eval()(input_ids=ids).logits.float().cpu()
