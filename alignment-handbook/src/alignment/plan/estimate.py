"""The memory of a recipe on one process, traced once for all layouts and all token budgets."""

import dataclasses
import math
from collections.abc import Sequence
from functools import cache

import torch
from datasets import Dataset
from transformers import PretrainedConfig
from trl import get_peft_config

from alignment.configs import Configs
from alignment.plan.layouts import GB, OPTIMIZERS, Footprint, optimizer_name, peak_memory
from alignment.plan.meta_model import StepSpec, build_meta_model
from alignment.plan.trace import StepMemory, WeightSizes, largest_forward, repeat_batch, trace_step, weight_sizes
from trl_nca.pieces import Cutting, find_cutting
from trl_nca.sharing import unsupported_reason

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
        tokens: Tokens of the largest forward, no response being run in pieces.
        longest_response: Tokens of the longest response with its prompt.
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
        prompt, response = max(((prompt, max(responses)) for prompt, responses in groups), key=sum)
        self.longest_response, self._longest = prompt + response, [(prompt, [response])]
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

    def cutting(self, layout: str) -> Cutting:
        """Which responses a layout runs in pieces, as far as it is known without running the model."""
        return self._cutting(layout not in ("single", "ddp"))

    def num_pieces(self, layout: str, tokens: float | None = None) -> int:
        """How many pieces the longest response takes in forwards of so many tokens, by default the recipe's."""
        tokens, length = tokens or self.args.max_tokens_per_forward, self.longest_response - 1
        if tokens is None or not tokens < length <= self.cutting(layout).longest:
            return 1
        return math.ceil(length / tokens)

    def footprint(self, layout: str, tokens: float | None = None, whole: bool = False) -> Footprint:
        """The memory that a layout shards, at the tokens of the largest forward or at another number of them.

        Args:
            layout: One of `LAYOUTS`, or "single".
            tokens: Most of a forward; None: those of the recipe.
            whole: Whether no response is run in pieces.
        """
        full, policy, args = not self.policy.use_peft, self.policy, self.args
        dtype = self._gathered_dtype(layout)
        if not whole and self.num_pieces(layout, tokens) > 1:
            phases = self._phases_in_pieces(dtype, tokens or args.max_tokens_per_forward)
        elif tokens is None and self.tokens == self.batch["input_ids"].shape[1]:
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

    def activations(self, checkpointing: bool, layout: str) -> int:
        """Bytes of the activations at the end of a forward, with gradient checkpointing or without."""
        if self.num_pieces(layout) > 1:
            piece = self._piece(self.args.max_tokens_per_forward)
            return self.step(self.spec.dtype, checkpointing, piece=piece).activations
        if checkpointing == self.checkpointing or self.args.gradient_checkpointing == "auto":  # both are traced
            return self.step(self.spec.dtype, checkpointing).activations
        return trace_step(self._spec(checkpointing), self.batch, backward=False).activations

    def flops_per_token(self, layout: str) -> tuple[float, float]:
        """Floating-point operations a token: of the policy's step, and of the reference's forward.

        In pieces all are run without gradient first, but for the last.
        """
        step, num_pieces = self.step(self._gathered_dtype(layout), self.checkpointing), self.num_pieces(layout)
        again = step.forward_flops * (num_pieces - 1) / num_pieces
        return (step.flops + again) / step.tokens, step.forward_flops / step.tokens

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
        """The largest `max_tokens_per_forward` that fits; None where not even the longest response does.

        In pieces that is one of which the longest response's keys and values, and few of its tokens, fit.
        """

        def fits(tokens: int) -> bool:
            return peak_memory(self.footprint(layout, tokens), layout, num_processes)[1]["total"] <= limit * GB

        low, high = 0, 2**14
        while fits(high * _GRAIN) and high < 2**20:
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle * _GRAIN) else (low, middle)
        largest = low * _GRAIN
        fits_whole = largest >= self.longest_response
        return largest if fits_whole or (largest and self.num_pieces(layout, largest) > 1) else None

    def _gathered_dtype(self, layout: str) -> torch.dtype:
        """The type that weights are gathered in: where they are sharded, that of the mixed precision."""
        sharded = layout not in ("single", "ddp") and self.spec.autocast is not None
        return self.spec.autocast if sharded and not self.spec.quantization else self.spec.dtype

    def _weights(self, dtype: torch.dtype) -> WeightSizes:
        return weight_sizes(dataclasses.replace(self.spec, dtype=dtype))

    def _spec(self, checkpointing: bool) -> StepSpec:
        return self.spec if checkpointing else dataclasses.replace(self.spec, checkpointing=None)

    def _step(
        self,
        dtype: torch.dtype,
        checkpointing: bool,
        times: int = 1,
        accumulates: bool | None = None,
        piece: int | None = None,
    ) -> StepMemory:
        accumulates = self.spec.accumulates or piece is not None if accumulates is None else accumulates
        spec = dataclasses.replace(self._spec(checkpointing), dtype=dtype, accumulates=accumulates)
        if piece is not None:
            return trace_step(spec, largest_forward(self._longest, None)[0] | {"piece": piece})
        return trace_step(spec, repeat_batch(self.batch, times) if times > 1 else self.batch)

    @cache  # noqa: B019  there is one estimator a run
    def _cutting(self, sharded: bool) -> Cutting:
        model = build_meta_model(self.spec, 2)
        shares = self.spec.shared_prompt != "false" and unsupported_reason(model) is None
        return find_cutting([model], self.longest_response, shares, sharded, check=False)

    def _piece(self, tokens: float) -> int:
        """Tokens of a piece in forwards of so many: all of them, as of shorter rows that fill the forward."""
        return min(int(tokens), self.longest_response - 1)

    def _phases(self, dtype: torch.dtype, tokens: float) -> dict[str, dict[str, float]]:
        """The phases of a forward of this many tokens, by the line through once and twice the batch.

        It is one of several forwards, as where `max_tokens_per_forward` cuts a micro-batch.
        """
        once = {} if self.spec.accumulates else {"accumulates": True}
        less = self.step(dtype, self.checkpointing, **once)
        more = self.step(dtype, self.checkpointing, times=2, accumulates=True)
        return _on_line(less.phases, more.phases, (tokens - less.tokens) / (more.tokens - less.tokens))

    def _phases_in_pieces(self, dtype: torch.dtype, tokens: float) -> dict[str, dict[str, float]]:
        """The phases of a piece of this many tokens; by the line through two others, where it is not the recipe's."""
        if tokens == self.args.max_tokens_per_forward:
            return self.step(dtype, self.checkpointing, piece=self._piece(tokens)).phases
        few, many = self.longest_response // 4, self.longest_response // 2
        less, more = (self.step(dtype, self.checkpointing, piece=piece).phases for piece in (few, many))
        return _on_line(less, more, (tokens - few) / (many - few))


def _on_line(
    less: dict[str, dict[str, int]], more: dict[str, dict[str, int]], share: float
) -> dict[str, dict[str, float]]:
    """The phases on the line through those of two numbers of tokens: 0 stands for the first, 1 for the second."""
    return {
        phase: {kind: max(low + share * (more[phase][kind] - low), 0) for kind, low in parts.items()}
        for phase, parts in less.items()
    }


def _dtype(name: str | None, config: PretrainedConfig) -> torch.dtype:
    """Type that the weights are loaded in: the recipe's, or the one they were saved in."""
    if name not in (None, "auto"):
        return getattr(torch, name)
    return getattr(config.get_text_config(), "dtype", None) or torch.float32
