"""Merges a LoRA adapter into the model it was trained on: the result needs neither PEFT nor quantization."""

import copy
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alignment.errors import UserError
from alignment.files import atomic_path
from alignment.models import adapter_base, load_trained_model, load_trained_tokenizer, local_adapter
from alignment.report.card import write_card
from alignment.serving.modelfile import write_modelfile
from trl_nca.layers import keep_4bit_weights
from trl_nca.portable import make_portable
from trl_nca.stops import set_stops

#: Largest difference of a logit, in parts of the largest logit, that rounding may make: of float32 arithmetic, and of
#: weights that are kept in fewer bits.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_PROBE = "Numbers: 1, 2, 3. The quick brown fox"


def merge_adapter(
    adapter: str,
    output: str,
    dtype: str = "auto",
    quantized: bool | None = None,
    base: str | None = None,
    modelfile: bool = False,
) -> float:
    """Writes base + adapter as one model, with its tokenizer and a model card, and reads it back to see it is the same.

    An adapter of a QLoRA run was trained on a base in 4 bits, and corrects that base's errors too. So the base is taken
    as it was trained on: quantized, and dequantized again, which loses nothing more. (PEFT's own merge
    into 4-bit weights quantizes the sum again.) The sum is made in float32.

    Args:
        adapter: Folder or Hub id of the adapter.
        output: Folder to write; it must not exist, or be empty.
        dtype: Type to keep the weights in; "auto" is the one that the base was saved in.
        quantized: Whether the base is taken as it is in 4 bits. None: as the adapter's recipe says.
        base: The base, in place of the one that the adapter names.
        modelfile: Whether an Ollama Modelfile is written too.

    Returns:
        The largest difference of a logit between the adapter on its base and what was written, in parts of the largest.

    Raises:
        UserError: `adapter` is no adapter, `output` is not empty, or the difference is above `TOLERANCE`.
    """
    adapter, named = local_adapter(adapter), adapter_base(adapter)
    if named is None:
        raise UserError(f"{adapter}: no adapter_config.json; give the folder of a PEFT adapter")
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output: {output} is not empty; name a new folder")
    base = base or named
    tokenizer, _ = load_trained_tokenizer(adapter, base)
    probe = tokenizer(_PROBE, return_tensors="pt")["input_ids"]  # (1, L)
    recipe = read_recipe(adapter)
    if quantized or (quantized is None and recipe.get("load_in_4bit")):
        model = _dequantized(adapter, base, recipe)
        expected = _logits(_in_4_bits(base, recipe, adapter), probe)
    else:
        model = load_trained_model(adapter, "float32", base)
        expected = _logits(model, probe)
    merged = model.merge_and_unload()

    def check(what: str, model: PreTrainedModel, allowed: float) -> float:
        difference = ((_logits(model, probe) - expected).abs().max() / expected.abs().max()).item()
        if difference > allowed:
            raise UserError(
                f"{adapter}: {what}, it gives other logits (by {difference:.2g} of the largest, {allowed:g} is "
                "allowed), as when embeddings are tied and the adapter changes one of them; sample from the adapter "
                "itself"
            )
        return difference

    check("merged", merged, TOLERANCE[torch.float32])
    kept = _dtype(dtype, base)
    with atomic_path(folder) as partial:
        _save(merged.to(kept), tokenizer, partial)
        if modelfile:
            write_modelfile(partial)
        write_card(partial, base, run=adapter, name=folder.resolve().name)
        read_back = AutoModelForCausalLM.from_pretrained(partial, dtype="float32", use_safetensors=True)
        return check(f"merged and kept as {kept}", read_back, TOLERANCE[kept])


def push(folder: str, repository: str) -> str:
    """Uploads a folder to a model repository of the Hub, which is made (private) if it is not there.

    Args:
        folder: Written by `merge_adapter`.
        repository: Name of the repository, "owner/name".

    Returns:
        The address of the upload.

    Raises:
        UserError: The Hub refuses; says what it said.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder))
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(f"--push_to_hub: {repository}: {str(error).splitlines()[0]}; {folder} is written") from error


def read_recipe(run: str) -> dict[str, Any]:
    """The resolved recipe that a run left in its folder; empty where there is none."""
    file = Path(run) / "recipe.yaml"
    return (yaml.safe_load(file.read_text()) or {}) if file.is_file() else {}


def _in_4_bits(base: str, recipe: dict[str, Any], adapter: str | None = None) -> PreTrainedModel:
    """The base as a QLoRA run has it, computing in float32; with the adapter on it, if one is named."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.get("bnb_4bit_quant_type", "nf4"),
        bnb_4bit_use_double_quant=recipe.get("use_bnb_nested_quant", False),
        bnb_4bit_compute_dtype="float32",
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization, dtype=torch.float32, use_safetensors=True
    )
    keep_4bit_weights(model)  # which bitsandbytes would repack, with coarser scales
    return PeftModel.from_pretrained(model, adapter) if adapter else model


def _dequantized(adapter: str, base: str, recipe: dict[str, Any]) -> PeftModel:
    """The adapter on its base, whose 4-bit weights are dequantized to float32."""
    model = _in_4_bits(base, recipe).dequantize(dtype=torch.float32)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):  # the same weights, in a model that was never quantized
        whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    whole.load_state_dict(model.state_dict(), assign=True)
    whole.tie_weights()
    for name, buffer in model.named_buffers():  # rotations, say, which no state dict holds
        module, _, leaf = name.rpartition(".")
        whole.get_submodule(module)._buffers[leaf] = buffer
    return PeftModel.from_pretrained(whole, adapter)


def _dtype(name: str, base: str) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    saved = getattr(AutoConfig.from_pretrained(base), "dtype", None)
    return saved if saved in TOLERANCE else torch.float32


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Weights, tokenizer with its chat template, and a generation config that stops where the template does."""
    set_stops(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_portable(folder)


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits at a few tokens, on the CPU. Shape (1, L, V)."""
    return model.eval()(input_ids=ids.to(model.device)).logits.float().cpu()
