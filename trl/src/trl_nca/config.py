"""The training arguments."""

import importlib.util
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.integrations import get_available_reporting_integrations
from trl import DPOConfig

from trl_nca.loss_config import LossConfig

_FORWARD = "acts inside upstream's forward, which these trainers do not use"
_NO_KL = "implicit rewards are log-ratios, those of the reverse KL, and the targets of the losses are made for these"
#: Keys of `DPOConfig` that these trainers do not support: the value that asks for nothing, and the reason.
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "loss_weights": (None, "a run has one loss; sft_weight adds the likelihood of the best response to it"),
    "f_divergence_type": ("reverse_kl", _NO_KL),
    "f_alpha_divergence_coef": (0.5, _NO_KL),
    "discopop_tau": (
        0.05,
        "DiscoPOP is none of the losses here; a function of your own may be (loss_type: FILE.py:NAME)",
    ),
    "label_smoothing_factor": (0.0, "is the Trainer's, of the next token; label_smoothing is that of a pair's label"),
    "use_weighting": (False, "WPO weighs pairs by probabilities of all tokens, which the fused head does not return"),
    "use_liger_kernel": (False, _FORWARD),
    "padding_free": (False, _FORWARD + "; rows are packed without padding anyway"),
    "pad_to_multiple_of": ("auto", _FORWARD + "; rows are packed without padding"),
    "truncation_mode": ("keep_start", "prompts lose their beginning and responses their end"),
    "enable_jit_checkpoint": (False, "these trainers save a checkpoint on SIGTERM by themselves"),
    "activation_offloading": (
        False,
        "upstream's keeps the books of one forward and its backward pass a step, and a step here has several, in "
        "chunks; gradient_checkpointing and max_tokens_per_forward save memory",
    ),
}
#: Keys of `gradient_checkpointing_kwargs` that transformers 5 takes out itself. trl 1.16 does not, when it switches
#: checkpointing on again, and the layers are then handed them.
_LOST_KWARGS = ("every_n_layers", "offload")

# Notices of transformers to TRL, which sets and calls what gets another name in version 6: no user can act on them.
warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning)


@dataclass
class NCAConfig(LossConfig, DPOConfig):
    r"""Training arguments: those of `trl.DPOConfig` (and so of `transformers.TrainingArguments`), and these.

    Raises:
        ValueError: A value is out of range, or a key of `DPOConfig` is set that is not supported.
    """

    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a prompt; a longer one loses its beginning. None: no bound of its own."},
    )
    score_tokens: str = field(
        default="assistant",
        metadata={
            "help": "Which tokens of a response of several turns count: assistant (those of all its assistant turns; "
            "what tools and users say is context), last (those of its last assistant turn), or all.",
            "choices": ["assistant", "last", "all"],
        },
    )
    shared_prompt: str = field(
        default="auto",
        metadata={
            "help": "Run each prompt once for all its responses, without padding: true, false (padded rows), or auto "
            "(true where the model can).",
            "choices": ["auto", "true", "false"],
        },
    )
    check_logps: bool = field(
        default=True,
        metadata={
            "help": "Before the first step, hold the log-probs of a few short rows against those of the model's own "
            "forward. A model whose packed rows are wrong is run padded; one that is wrong padded too is not trained."
        },
    )

    gradient_checkpointing: bool | str = field(
        default=True,
        metadata={
            "help": "Compute activations again in the backward pass in place of keeping them: less memory, and a step "
            "that takes longer. true, false, or auto: the plan decides before the model is loaded, false where a step "
            "fits the free memory without it, and the run's first lines say why. A trainer that is made without "
            "run_reward.py or run_preference.py takes auto for true."
        },
    )
    max_tokens_per_forward: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens that a forward runs, prompts and responses: a micro-batch of more is run and "
            "back-propagated in chunks, with the same gradient; one response of more in pieces. Bounds memory "
            "whatever K, per_device_train_batch_size and the lengths are, but for the keys and values of one response; "
            "forwards of several thousand keep a GPU busy. None: no bound."
        },
    )
    ref_logps_dir: str | None = field(
        default=None,
        metadata={
            "help": "With precompute_ref_log_probs, the folder that keeps the reference's log-probs for later runs. "
            "None: ref_logps in the data sets' cache ($HF_DATASETS_CACHE)."
        },
    )

    max_nan_steps: int = field(
        default=3,
        metadata={
            "help": "Optimizer steps in a row whose loss or gradient is not finite, after which the run ends. Each is "
            "skipped, and its rows are named; the last good checkpoint stays."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Upstream's own filter of losses that are not finite, which waits for the GPU at each micro-batch. "
            "Without it too, the steps that max_nan_steps counts are left out of the logged loss."
        },
    )
    include_num_input_tokens_seen: str = field(
        default="true", metadata={"help": "Count the tokens that were trained on, and log them: true or false."}
    )

    #: The resolved recipe, for experiment trackers: they log what `to_dict` gives.
    recipe: dict[str, Any] = field(default_factory=dict, init=False)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | ({"recipe": self.recipe} if self.recipe else {})

    def __getstate__(self) -> dict[str, Any]:
        """What the Trainer pickles beside each checkpoint: no credentials."""
        kwargs = {key: value for key, value in (self.model_init_kwargs or {}).items() if key != "token"}
        return self.__dict__ | {"hub_token": None, "model_init_kwargs": kwargs}

    def __post_init__(self) -> None:
        self.check_loss()
        # Without a reference its log-probs are 0 in each row, so that no model is kept for them.
        self.precompute_ref_log_probs = self.precompute_ref_log_probs or not self.has_reference
        for key in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "max_length",
            "max_prompt_length",
            "max_tokens_per_forward",
            "max_nan_steps",
        ):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"{key}: must be at least 1, got {getattr(self, key)}")
        if self.max_length is not None and (self.max_prompt_length or 0) >= self.max_length:
            raise ValueError(f"max_prompt_length: {self.max_prompt_length} fills max_length {self.max_length}")
        for key, (neutral, reason) in UNSUPPORTED.items():
            if getattr(self, key) not in (neutral, None):
                raise ValueError(f"{key}: {getattr(self, key)!r} is not supported: {reason}; remove the key")
        if (
            self.parallelism_config is not None
            and max(self.parallelism_config.cp_size, self.parallelism_config.sp_size) > 1
        ):
            raise ValueError(
                "parallelism_config: cp_size and sp_size shard causal sequences, and a packed row is none; set them to "
                "1, and max_tokens_per_forward, by which each process runs a long response in pieces"
            )
        self.gradient_checkpointing = _true_false_or_auto("gradient_checkpointing", self.gradient_checkpointing)
        if self.report_to in (None, "false"):  # null, and no as YAML 1.1 reads it
            self.report_to = "none"
        self.shared_prompt = str(self.shared_prompt).lower()
        self.score_tokens = str(self.score_tokens).lower()
        if self.score_tokens not in ("assistant", "last", "all"):
            raise ValueError(f"score_tokens: assistant, last or all; got {self.score_tokens!r}")
        counts_tokens = str(self.include_num_input_tokens_seen).lower() not in ("false", "no")
        self.include_num_input_tokens_seen = "all" if counts_tokens else "no"  # packed: all tokens are real
        if not torch.accelerator.is_available():  # recipes are written for GPUs; on a CPU they run there, in float32
            self.use_cpu, self.bf16, self.dataloader_pin_memory = True, bool(self.bf16), False
        if self.ddp_find_unused_parameters is None:  # each step uses all that is trained: no need to look
            self.ddp_find_unused_parameters = False
        if self.accelerator_config is None or isinstance(self.accelerator_config, dict):  # batches are pinned: no wait
            self.accelerator_config = {"non_blocking": self.dataloader_pin_memory, **(self.accelerator_config or {})}
        super().__post_init__()
        for key in _LOST_KWARGS:
            if key in (self.gradient_checkpointing_kwargs or {}):
                raise ValueError(
                    f"gradient_checkpointing_kwargs: {key} is not supported: TRL switches checkpointing off for the "
                    "reference and on again without it; remove it"
                )
        (self.loss_type,) = self.loss_type  # upstream makes a list of it
        for tracker in self.report_to:
            _check_tracker(tracker)


def _check_tracker(name: str) -> None:
    """Imports an experiment tracker, as the trainer will.

    Raises:
        ValueError: It is not installed, or only in parts.
    """
    try:
        is_installed = name in get_available_reporting_integrations()
        if is_installed and importlib.util.find_spec(name) is not None:
            importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(name, name))
    except Exception as error:  # whatever a broken package raises
        raise ValueError(
            f"report_to: {name} cannot be imported ({error}); install it anew, or set report_to: none"
        ) from error
    if not is_installed:
        raise ValueError(f"report_to: {name} is not installed; install it, or set report_to: none")


def _true_false_or_auto(key: str, value: bool | str | None) -> bool | str | None:
    """A switch that may also be left to the plan; words in any case.

    Raises:
        ValueError: It is neither.
    """
    words = {"true": True, "false": False, "auto": "auto", "none": None}
    if str(value).lower() not in words:
        raise ValueError(f"{key}: true, false or auto; got {value!r}")
    return words[str(value).lower()]
