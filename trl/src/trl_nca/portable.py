"""Makes a saved model's folder readable for more than the transformers, the folder and the user that wrote it.

transformers 5 writes names that transformers 4 does not know, nor do the versions of vLLM, TGI and llama.cpp's
converter that are built on it: they refuse the tokenizer, or read a rotary base of 10,000 where there is another.
The names that they know are added; transformers 5 reads the same from the folder as before. An adapter names the
folder of its base in full, and weights get the permissions of other files.
"""

import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

#: Tokenizer classes that came with transformers 5. What they read from tokenizer.json, this one reads in both.
_NEW_CLASSES = ("TokenizersBackend", "SentencePieceBackend", "PythonBackend")
_FAST_CLASS = "PreTrainedTokenizerFast"
#: Keys of `rope_parameters` that transformers 4 reads beside `rope_scaling`, and not in it.
_FLAT_ROPE = ("rope_theta", "partial_rotary_factor")
#: What else has another name there, by the beginning of a model type.
_FAMILY_NAMES = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "qwen3_": {"num_local_experts": "num_experts"},
}


def make_portable(folder: str | Path) -> None:
    """Rewrites `tokenizer_config.json`, `config.json` and `adapter_config.json` of a folder, where they are.

    A relative path of an adapter's base is taken from the current folder, as the run took it.
    """
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
    _rewrite(folder / "adapter_config.json", _adapter_config)
    _follow_umask(folder)


def _follow_umask(folder: Path) -> None:
    """Lets those read the files whom the umask lets: safetensors are written for their owner alone."""
    umask = os.umask(0o077)  # it can be read by setting it only
    os.umask(umask)
    for file in filter(Path.is_file, folder.iterdir()):
        mode = stat.S_IMODE(file.stat().st_mode)
        if (wanted := mode | (0o666 & ~umask)) != mode:
            with suppress(OSError):  # of a file of somebody else's, or a disk without permissions
                file.chmod(wanted)


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


def _adapter_config(config: dict[str, Any]) -> dict[str, Any]:
    """An adapter's config whose base is found from any folder. Names of the Hub stay."""
    base = config.get("base_model_name_or_path")
    return config | {"base_model_name_or_path": os.path.abspath(base)} if base and os.path.isdir(base) else config


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
    if isinstance(config.get("rope_parameters"), dict):
        older |= _older_rope(config["rope_parameters"])
    for family, names in _FAMILY_NAMES.items():
        if str(config.get("model_type")).startswith(family):
            older |= {name: value for key, name in names.items() if (value := (older | config).get(key)) is not None}
    if isinstance(config.get("text_config"), dict):  # of a model that also sees
        config = config | {"text_config": _model_config(config["text_config"])}
    return config | {key: value for key, value in older.items() if key not in config}


def _older_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """The keys that transformers 4 reads in place of `rope_parameters`.

    Example:
        >>> _older_rope({"rope_theta": 1e4, "rope_type": "linear", "factor": 8.0})
        {'rope_theta': 10000.0, 'rope_scaling': {'rope_type': 'linear', 'factor': 8.0}}
    """
    whole = rope.get("full_attention", rope)  # or a mapping for each kind of layer
    older = {key: whole[key] for key in _FLAT_ROPE if key in whole}
    if "rope_theta" in rope.get("sliding_attention", {}):
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if whole.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in whole.items() if key not in _FLAT_ROPE}
    return older
