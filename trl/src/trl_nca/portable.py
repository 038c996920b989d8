"""Makes a saved model's folder readable for more than the transformers that wrote it.

transformers 5 writes names that transformers 4 does not know, nor do the versions of vLLM, TGI and llama.cpp's
converter that are built on it: they refuse the tokenizer, or read a rotary base of 10,000 where there is another.
The names that they know are added; transformers 5 reads the same from the folder as before.
"""

import json
from pathlib import Path
from typing import Any

#: Tokenizer classes that came with transformers 5. What they read from tokenizer.json, this one reads in both.
_NEW_CLASSES = ("TokenizersBackend", "SentencePieceBackend", "PythonBackend")
_FAST_CLASS = "PreTrainedTokenizerFast"


def make_portable(folder: str | Path) -> None:
    """Rewrites `tokenizer_config.json` and `config.json` of a folder, where they are."""
    folder = Path(folder)
    tokenizer, template = folder / "tokenizer.json", folder / "chat_template.jinja"
    _rewrite(
        folder / "tokenizer_config.json",
        lambda config: _tokenizer_config(
            config,
            tokenizer=json.loads(tokenizer.read_text(encoding="utf-8")) if tokenizer.is_file() else None,
            chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
        ),
    )
    _rewrite(folder / "config.json", _model_config)


def _rewrite(file: Path, change: Any) -> None:
    if file.is_file():
        config = change(json.loads(file.read_text(encoding="utf-8")))
        file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer_config(
    config: dict[str, Any], tokenizer: dict[str, Any] | None, chat_template: str | None
) -> dict[str, Any]:
    """A tokenizer's config as transformers 4 takes it; `tokenizer` is what tokenizer.json holds.

    Example:
        >>> new = {"tokenizer_class": "TokenizersBackend", "is_local": True, "extra_special_tokens": ["<a>"]}
        >>> sorted(_tokenizer_config(new, tokenizer={}, chat_template=None).items())[:2]
        [('additional_special_tokens', ['<a>']), ('clean_up_tokenization_spaces', False)]
    """
    config = {key: value for key, value in config.items() if key not in ("is_local", "local_files_only")}
    if tokenizer is not None and config.get("tokenizer_class") in _NEW_CLASSES:
        config["tokenizer_class"] = _FAST_CLASS
        # In transformers 4 this class by itself gives `token_type_ids` too, which no decoder takes.
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
        config.setdefault("clean_up_tokenization_spaces", False)
    elif tokenizer is not None and config.get("tokenizer_class") != _FAST_CLASS:
        # There some classes decide by these keys, and not by the file, what is added to a text.
        added = _added_around(tokenizer.get("post_processor"))
        config |= dict(zip(("add_bos_token", "add_eos_token"), added, strict=True))
    if isinstance(config.get("extra_special_tokens"), list):  # there it is a mapping, and this its name
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if chat_template is not None:  # a file of its own is unknown to the oldest of them
        config["chat_template"] = chat_template
    return config


def _added_around(post_processor: dict[str, Any] | None) -> tuple[bool, bool]:
    """Whether a post-processor of tokenizer.json puts a token before a text, and behind it.

    Example:
        >>> _added_around({"single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]})
        (True, False)
    """
    steps = (post_processor or {}).get("processors", [post_processor or {}])
    parts = [list(part) for step in steps for part in step.get("single", ())]
    return parts[:1] == [["SpecialToken"]], parts[-1:] == [["SpecialToken"]]


def _model_config(config: dict[str, Any]) -> dict[str, Any]:
    """A model's config with the names of transformers 4 beside those of transformers 5.

    Example:
        >>> _model_config({"dtype": "bfloat16", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
        ... # doctest: +NORMALIZE_WHITESPACE
        {'dtype': 'bfloat16', 'rope_parameters': {'rope_theta': 500000.0, 'rope_type': 'default'},
         'torch_dtype': 'bfloat16', 'rope_theta': 500000.0}
    """
    older: dict[str, Any] = {}
    if "dtype" in config:
        older["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # and not one mapping for each kind of layer
        older |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        if rope.get("rope_type", "default") != "default":
            older["rope_scaling"] = {key: value for key, value in rope.items() if key not in older}
    return config | {key: value for key, value in older.items() if key not in config}
