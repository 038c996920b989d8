"""Loads tokenizers, model configs, and models to sample from. (The model to train is loaded by upstream's trainer.)"""

import difflib
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.constants import is_offline_mode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file
from trl import ModelConfig, get_peft_config, get_quantization_config

from alignment.errors import UserError
from alignment.files import shipped
from alignment.recipe.chat_template import read_kwargs, read_template, with_defaults

#: Configs of well-known models, without their weights.
SHIPPED_CONFIGS = shipped("recipes/model_configs")
#: Files with a whole model's weights, or their index.
_WEIGHTS = ("model.safetensors*", "pytorch_model.bin*")
#: Files of an adapter on the Hub: itself, its tokenizer, what tells that it is no model. No pickles.
_ADAPTER_FILES = ("*.json", "*.jinja", "*.model", "*.safetensors")


@dataclass
class PolicyConfig(ModelConfig):
    """The model to align: TRL's keys, and those of its tokenizer."""

    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer to use in place of the model's own."}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "Chat template (Jinja), or a file with it. Default: the tokenizer's own."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of the chat template, such as {enable_thinking: false}. They become defaults in the "
            "template that is saved with the model; a row's own chat_template_kwargs count more."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chat_template_kwargs = read_kwargs(self.chat_template_kwargs)
        if not self.model_name_or_path:
            raise ValueError("model_name_or_path: no model given; set a folder or a Hub id")
        if bits := "load_in_4bit" if self.load_in_4bit else "load_in_8bit" if self.load_in_8bit else None:
            if not self.use_peft:
                raise ValueError(f"{bits}: quantized weights cannot be trained; set use_peft: true")
            if importlib.util.find_spec("bitsandbytes") is None:
                raise ValueError(f"{bits}: bitsandbytes is not installed; pip install bitsandbytes")
        if isinstance(self.lora_target_modules, str) and self.lora_target_modules.isidentifier():
            self.lora_target_modules = [self.lora_target_modules]  # upstream takes a single name for a pattern
        if self.load_in_4bit and self.dtype in (None, "auto"):
            self.dtype = "bfloat16"  # bitsandbytes wants a name for the type it computes in


def load_tokenizer(config: PolicyConfig, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the policy's tokenizer, and before it the model's config: the cheap part of loading, which finds typos.

    Raises:
        UserError: There is no such model, tokenizer or template file, or the model is an adapter.
    """
    _check_is_no_adapter(config)
    name = config.tokenizer_name_or_path or config.model_name_or_path
    revision = {"revision": config.model_revision, "trust_remote_code": trust_remote_code}
    try:
        AutoConfig.from_pretrained(config.model_name_or_path, **revision)
        tokenizer = AutoTokenizer.from_pretrained(name, **revision)
    except (OSError, ValueError) as error:
        raise no_such_model(config.model_name_or_path, error) from error
    if config.chat_template is not None:
        tokenizer.chat_template = read_template(config.chat_template)
    if config.chat_template_kwargs is not None:
        tokenizer.chat_template = with_defaults(tokenizer.chat_template, config.chat_template_kwargs)
    return tokenizer


def load_config(
    config: PolicyConfig, trust_remote_code: bool = False, file: str | None = None
) -> tuple[PretrainedConfig, str | None]:
    """Loads the model's config, for planning: from its folder or the Hub, else from `SHIPPED_CONFIGS`.

    Args:
        config: Names the model.
        trust_remote_code: Whether code that comes with the model may run.
        file: A config.json to load in its place.

    Returns:
        The config, and a line to print where it is a shipped one.

    Raises:
        UserError: There is no such model, and no config of that name is shipped; or it is an adapter.
    """
    if file is not None:
        return _read_config(file, trust_remote_code), f"Planned with the sizes in {file}"
    _check_is_no_adapter(config)
    name = config.model_name_or_path
    try:
        revision = {"revision": config.model_revision, "trust_remote_code": trust_remote_code}
        return AutoConfig.from_pretrained(name, **revision), None
    except (OSError, ValueError) as error:
        names = yaml.safe_load((SHIPPED_CONFIGS / "names.yaml").read_text())
        if name not in names:
            known = difflib.get_close_matches(name, names, n=3, cutoff=0) if names else []
            raise UserError(f"{no_such_model(name, error)}; sizes are at hand for {', '.join(known)}") from error
        file = SHIPPED_CONFIGS / names[name]
        return AutoConfig.from_pretrained(file), f"{name} is not here: planned with the sizes in {file.name}"


def _read_config(file: str, trust_remote_code: bool) -> PretrainedConfig:
    """A model's config from its file."""
    if not Path(file).is_file():
        raise UserError(f"model_config: no such file {file}; give a model's config.json")
    try:
        return AutoConfig.from_pretrained(file, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"model_config: {file} is no config of a model that transformers knows ({reason})") from error


def model_init_kwargs(config: PolicyConfig) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for policy and reference. Weights that unpickle code are not loaded."""
    kwargs = {"revision": config.model_revision, "dtype": config.dtype, "use_safetensors": True}
    if config.attn_implementation is not None:
        kwargs["attn_implementation"] = config.attn_implementation
    return kwargs


def adapter_and_quantization(config: PolicyConfig) -> dict[str, Any]:
    """Arguments of the trainer: LoRA's and bitsandbytes' settings, None where the recipe asks for none."""
    return {"peft_config": get_peft_config(config), "quantization_config": get_quantization_config(config)}


def no_such_model(name: str, error: Exception) -> UserError:
    """The error for a model that cannot be loaded."""
    reason = str(error).split("\n")[0]
    if "custom code" in reason:
        return UserError(
            f"model_name_or_path: {name} brings code of its own; read it, then set trust_remote_code: true"
        )
    if is_offline_mode() and not Path(name).exists():
        reason = "offline, HF_HUB_OFFLINE is set, and it is not in the cache"
    return UserError(
        f"model_name_or_path: {name!r} is neither a folder with a model nor a Hub id that can be loaded ({reason}); "
        "check the path (for models/SmolLM2-135M-Instruct, run `make setup`)"
    )


def _check_is_no_adapter(config: PolicyConfig) -> None:
    """Refuses an adapter as the model: upstream would train the weights beside it, or find none.

    Raises:
        UserError: It is one; names its base and how to make a model of it. See `adapter_base` too.
    """
    name = config.model_name_or_path
    try:
        file = find_adapter_config_file(name, revision=config.model_revision)
    except (OSError, ValueError):  # no such model, as its loading says
        return
    if file is not None:
        base = adapter_base(name) if Path(name).is_dir() else _base_in(Path(file))
        raise UserError(
            f"model_name_or_path: {name} is an adapter on {base}, and a run starts from a model; make "
            f"one of them, `python alignment-handbook/scripts/merge.py {name} --output FOLDER`, and start from FOLDER"
        )


def local_adapter(name: str) -> str:
    """The folder of an adapter that the Hub has, downloaded; anything else as it is."""
    if Path(name).exists():
        return name
    try:
        is_adapter = find_adapter_config_file(name) is not None
        return snapshot_download(name, allow_patterns=_ADAPTER_FILES) if is_adapter else name
    except (OSError, ValueError):  # no such model, as its loading says
        return name


def adapter_base(name: str) -> str | None:
    """The model that a PEFT adapter was trained on; None for anything else.

    Raises:
        UserError: The adapter names no base, or a model's weights lie beside it: which of the two is meant?
    """
    file = Path(local_adapter(name)) / "adapter_config.json"
    if not file.is_file():
        return None
    weights = [path.name for pattern in _WEIGHTS for path in file.parent.glob(pattern)]
    if weights:
        raise UserError(
            f"{name}: holds an adapter (adapter_config.json) and a model's weights ({weights[0]}), and either may be "
            "meant; move one of them to another folder"
        )
    return _base_in(file)


def _base_in(file: Path) -> str:
    """The base that an adapter_config.json names."""
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: is no JSON object ({error}); save the adapter again") from error
    if not base:
        raise UserError(
            f"{file}: names no base (base_model_name_or_path is {json.dumps(base)}); write there the folder or Hub id "
            "of the model that the adapter was trained on"
        )
    return str(base)


def _cannot_be_loaded(name: str, base: str | None, error: Exception) -> UserError:
    """The error for a model that cannot be loaded, or for an adapter whose base cannot."""
    if base is None or Path(base).is_dir():
        return no_such_model(name, error)
    return UserError(
        f"{name} is an adapter on {base!r}, which is neither a folder seen from {Path.cwd()} nor a Hub id that can be "
        f"loaded; --base FOLDER names the base where it is now, or correct base_model_name_or_path in "
        f"{Path(name) / 'adapter_config.json'}"
    )


def load_trained_tokenizer(name: str, base: str | None = None) -> tuple[PreTrainedTokenizerBase, int | None]:
    """The tokenizer of a model or adapter, and the most tokens that the model can read (None: no bound).

    Args:
        name: A model's or an adapter's folder or Hub id.
        base: The base of an adapter, in place of the one that it names.

    Raises:
        UserError: There is no such model.
    """
    name, named = local_adapter(name), adapter_base(name)
    base = base if named and base else named
    has_own = base is None or (Path(name) / "tokenizer_config.json").is_file()
    try:
        config = AutoConfig.from_pretrained(base or name)
        tokenizer = AutoTokenizer.from_pretrained(name if has_own else base)
    except (OSError, ValueError) as error:
        raise _cannot_be_loaded(name, base, error) from error
    return tokenizer, getattr(config.get_text_config(), "max_position_embeddings", None)


def load_trained_model(name: str, dtype: str = "auto", base: str | None = None) -> PreTrainedModel:
    """A causal language model, or an adapter on its base, on the GPUs where there are some.

    Args:
        name: A model's or an adapter's folder or Hub id.
        dtype: Type of the weights; "auto" is the one they were saved in.
        base: The base of an adapter, in place of the one that it names.

    Raises:
        UserError: It cannot be loaded.
    """
    kwargs = {"dtype": dtype, "device_map": "auto" if torch.cuda.is_available() else None, "use_safetensors": True}
    name, named = local_adapter(name), adapter_base(name)
    base = base if named and base else named
    try:
        if base is None:
            return AutoModelForCausalLM.from_pretrained(name, **kwargs)
        if not (Path(name) / "adapter_model.safetensors").is_file():  # peft would unpickle an adapter_model.bin
            raise UserError(f"{name}: no adapter_model.safetensors; only safetensors are loaded")
        from peft import PeftModel

        model = AutoModelForCausalLM.from_pretrained(base, **kwargs)
        num_tokens = len(load_trained_tokenizer(name, base)[0])
        if num_tokens > model.get_input_embeddings().num_embeddings:  # tokens were added to the adapter's
            model.resize_token_embeddings(num_tokens)
        return PeftModel.from_pretrained(model, name)
    except (OSError, ValueError) as error:
        raise _cannot_be_loaded(name, base, error) from error
