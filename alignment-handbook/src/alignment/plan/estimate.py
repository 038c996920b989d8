"""The memory of a recipe on one process, traced once for all layouts and all token budgets."""

import dataclasses
from collections.abc import Sequence
from functools import cache

import torch
from datasets import Dataset
from transformers import PretrainedConfig
from trl import get_peft_config

from alignment.configs import Configs
from alignment.plan.layouts import GB, OPTIMIZERS, Footprint, optimizer_name, peak_memory
from alignment.plan.meta_model import StepSpec
from alignment.plan.trace import StepMemory, WeightSizes, largest_forward, repeat_batch, trace_step, weight_sizes

#: Token budgets are answered in multiples of this.
_GRAIN = 64

#: Tokens of a prompt, and of each of its responses.
GroupLengths = tuple[int, list[int]]


def longest_rows(rows: Dataset, lengths: Sequence[int], count: int) -> list[GroupLengths]:
    """Tokens of prompt and responses of the longest rows: the micro-batch that takes the most.

    Args:
        rows: Tokenized rows.
        lengths: The tokens of each.
        count: Rows of a micro-batch.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)[:count]
    return [(len(row["prompt_ids"]), [len(r) for r in row["response_ids"]]) for row in map(rows.__getitem__, order)]


class MemoryEstimator:
    """The memory of a recipe on one process. Each question is traced once.

    Attributes:
        tokens: Tokens of the largest forward.
        checkpointing: Whether the answers are those with gradient checkpointing; may be changed between questions.

    Args:
        configs: The settings of the run.
        model_config: The model's config.
        groups: The micro-batch: of each prompt its tokens and those of its responses.
        accumulates: Whether a step has several micro-batches.
        on_gpu: Whether the GPU's attention kernel is used.
    """

    def __init__(
        self,
        configs: Configs,
        model_config: PretrainedConfig,
        groups: list[GroupLengths],
        accumulates: bool,
        on_gpu: bool,
    ):
        self.policy, self.args, self.on_gpu = configs.policy, configs.trainer, on_gpu
        policy, args = configs.policy, configs.trainer
        self.batch, num_chunks = largest_forward(groups, args.max_tokens_per_forward, args.shared_prompt != "false")
        self.longest_response = max(prompt + max(responses) for prompt, responses in groups)  # with its prompt
        self.tokens = self.batch["input_ids"].shape[1]
        if num_chunks > 1:  # shorter rows may fill a forward where the longest leave a rest
            self.tokens = max(self.tokens, args.max_tokens_per_forward)
        self.checkpointing = bool(args.gradient_checkpointing)
        self.spec = StepSpec(
            config=model_config,
            dtype=_dtype(policy.dtype, model_config),
            peft_config=get_peft_config(policy),
            quantization="4bit" if policy.load_in_4bit else "8bit" if policy.load_in_8bit else None,
            double_quantized=policy.use_bnb_nested_quant,
            autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
            checkpointing=dict(args.gradient_checkpointing_kwargs or {}),
            shared_prompt=args.shared_prompt,
            device="cuda" if on_gpu else "cpu",
            accumulates=accumulates or num_chunks > 1,
        )
        self.step, self.weights = cache(self._step), cache(self._weights)

    def footprint(self, layout: str, tokens: float | None = None) -> Footprint:
        """The memory that a layout shards, at the tokens of the largest forward or at another number of them."""
        full, policy, args = not self.policy.use_peft, self.policy, self.args
        dtype = self._gathered_dtype(layout)
        if tokens is None and self.tokens == self.batch["input_ids"].shape[1]:
            phases = self.step(dtype, self.checkpointing).phases
        else:
            phases = self._phases(dtype, self.tokens if tokens is None else tokens)
        return Footprint(
            weights=self.weights(dtype if layout.startswith("zero") else self.spec.dtype),
            phases=phases,
            optim=optimizer_name(args),
            mixed_precision=self.spec.autocast is not None,
            reference_copy=full and not args.precompute_ref_log_probs,
            loads_reference=full,
            shards_quantized=policy.bnb_4bit_quant_storage not in (None, "uint8"),
            on_gpu=self.on_gpu,
            accumulates=self.spec.accumulates or tokens is not None,  # more tokens than a forward takes, say
        )

    def activations(self, checkpointing: bool) -> int:
        """Bytes of the activations at the end of a forward, with gradient checkpointing or without."""
        if checkpointing == self.checkpointing or self.args.gradient_checkpointing == "auto":  # both are traced
            return self.step(self.spec.dtype, checkpointing).activations
        return trace_step(self._spec(checkpointing), self.batch, backward=False).activations

    def flops_per_token(self, layout: str) -> tuple[float, float]:
        """Floating-point operations a token: of the policy's step, and of the reference's forward."""
        step = self.step(self._gathered_dtype(layout), self.checkpointing)
        return step.flops / step.tokens, step.forward_flops / step.tokens

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures must know."""
        weights, notes = self.weights(self.spec.dtype), []
        if self.spec.quantization and weights.quantized < weights.base / 2:
            notes.append(
                f"Only {weights.quantized / GB:.1f} of {weights.base / GB:.1f} GB of weights are quantized: "
                "transformers quantizes linear layers, and no experts that are one tensor"
            )
        optim = optimizer_name(self.args)
        if optim not in OPTIMIZERS and optim != "adafactor":
            notes.append(f"The state of optim: {optim} is not known here, and planned as AdamW's")
        return notes

    def largest_budget(self, layout: str, num_processes: int, limit: float) -> int | None:
        """The largest `max_tokens_per_forward` that fits; None where not even the longest response does."""

        def fits(tokens: int) -> bool:
            return peak_memory(self.footprint(layout, tokens), layout, num_processes)[1]["total"] <= limit * GB

        low, high = 0, 2**14
        while fits(high * _GRAIN) and high < 2**20:
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle * _GRAIN) else (low, middle)
        return low * _GRAIN if low * _GRAIN >= self.longest_response else None

    def _gathered_dtype(self, layout: str) -> torch.dtype:
        """The type that weights are gathered in: where they are sharded, that of the mixed precision."""
        sharded = layout not in ("single", "ddp") and self.spec.autocast is not None
        return self.spec.autocast if sharded and not self.spec.quantization else self.spec.dtype

    def _weights(self, dtype: torch.dtype) -> WeightSizes:
        return weight_sizes(dataclasses.replace(self.spec, dtype=dtype))

    def _spec(self, checkpointing: bool) -> StepSpec:
        return self.spec if checkpointing else dataclasses.replace(self.spec, checkpointing=None)

    def _step(
        self, dtype: torch.dtype, checkpointing: bool, times: int = 1, accumulates: bool | None = None
    ) -> StepMemory:
        accumulates = self.spec.accumulates if accumulates is None else accumulates
        spec = dataclasses.replace(self._spec(checkpointing), dtype=dtype, accumulates=accumulates)
        return trace_step(spec, repeat_batch(self.batch, times) if times > 1 else self.batch)

    def _phases(self, dtype: torch.dtype, tokens: float) -> dict[str, dict[str, float]]:
        """The phases of a forward of this many tokens, by the line through once and twice the batch.

        It is one of several forwards, as where `max_tokens_per_forward` cuts a micro-batch.
        """
        once = {} if self.spec.accumulates else {"accumulates": True}
        less = self.step(dtype, self.checkpointing, **once)
        more = self.step(dtype, self.checkpointing, times=2, accumulates=True)
        share = (tokens - less.tokens) / (more.tokens - less.tokens)
        return {
            phase: {kind: max(low + share * (more.phases[phase][kind] - low), 0) for kind, low in parts.items()}
            for phase, parts in less.phases.items()
        }


def _dtype(name: str | None, config: PretrainedConfig) -> torch.dtype:
    """Type that the weights are loaded in: the recipe's, or the one they were saved in."""
    if name not in (None, "auto"):
        return getattr(torch, name)
    return getattr(config.get_text_config(), "dtype", None) or torch.float32
