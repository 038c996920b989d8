"""Tokenizer and model settings of a run. Upstream loads the model itself, in the trainer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig

from alignment.errors import UserError


@dataclass
class PolicyConfig(ModelConfig):
    """The model to align: TRL's keys, and those of its tokenizer."""

    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer to use in place of the model's own."}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "Chat template (Jinja), or a file with it. Default: the tokenizer's own."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model_name_or_path:
            raise ValueError("model_name_or_path: no model given; set a folder or a Hub id")
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_peft:
            raise ValueError("load_in_4bit: quantized weights cannot be trained; set use_peft: true")
        if self.load_in_4bit and self.dtype in (None, "auto"):
            self.dtype = "bfloat16"  # bitsandbytes wants a name for the type it computes in


def load_tokenizer(config: PolicyConfig, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of the policy, after a look at the model's config: the cheap part of loading, which finds typos.

    Raises:
        UserError: There is no such model, tokenizer or template file.
    """
    name = config.tokenizer_name_or_path or config.model_name_or_path
    revision = {"revision": config.model_revision, "trust_remote_code": trust_remote_code}
    try:
        AutoConfig.from_pretrained(config.model_name_or_path, **revision)
        tokenizer = AutoTokenizer.from_pretrained(name, **revision)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"model_name_or_path: {config.model_name_or_path!r} is neither a folder with a model nor a Hub id that can "
            f"be had ({reason}); check the path (for models/SmolLM2-135M-Instruct, run `make setup`)"
        ) from error
    if config.chat_template is not None:
        file = Path(config.chat_template)
        if config.chat_template.endswith(".jinja") and not file.is_file():
            raise UserError(f"chat_template: no such file {config.chat_template}")
        tokenizer.chat_template = file.read_text() if config.chat_template.endswith(".jinja") else config.chat_template
    return tokenizer


def model_init_kwargs(config: PolicyConfig) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for policy and reference."""
    kwargs = {"revision": config.model_revision, "dtype": config.dtype}
    if config.attn_implementation is not None:
        kwargs["attn_implementation"] = config.attn_implementation
    return kwargs
