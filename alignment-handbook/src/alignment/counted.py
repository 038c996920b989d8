"""The memory of a recipe on one process, counted once for all layouts and all token budgets."""

import dataclasses
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from transformers import PretrainedConfig
from trl import get_peft_config

from alignment import layouts

#: Token budgets are answered in steps of this.
_GRAIN = 64


class Counted:
    """The memory of a recipe on one process, each question counted once.

    Args:
        configs: As in `show_plan`.
        config: Of the model.
        groups: The micro-batch: of each prompt its tokens and those of its responses.
        accumulates: Whether a step has several micro-batches.
        on_gpu: Whose attention kernel is used.
        engine: `trl_nca.memory`.
    """

    def __init__(
        self, configs: Sequence[Any], config: PretrainedConfig, groups: Any, accumulates: bool, on_gpu: bool,
        engine: ModuleType,
    ):  # fmt: skip
        _, self.policy, _, self.args = configs
        self.engine, self.on_gpu, args = engine, on_gpu, self.args
        self.batch, num_chunks = engine.batch_to_plan(
            groups, args.max_tokens_per_forward, args.shared_prompt != "false"
        )
        self.longest = max(prompt + max(responses) for prompt, responses in groups)
        self.setup = engine.Setup(
            config=config,
            dtype=_dtype(self.policy.dtype, config),
            peft_config=get_peft_config(self.policy),
            quantization="4bit" if self.policy.load_in_4bit else "8bit" if self.policy.load_in_8bit else None,
            double_quantized=self.policy.use_bnb_nested_quant,
            autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
            checkpointing=dict(args.gradient_checkpointing_kwargs or {}) if args.gradient_checkpointing else None,
            shared_prompt=args.shared_prompt,
            device="cuda" if on_gpu else "cpu",
            accumulates=accumulates or num_chunks > 1,
        )
        self.step, self.weights = cache(self._step), cache(self._weights)

    def footprint(self, layout: str, tokens: float | None = None) -> layouts.Footprint:
        """What a layout spreads, at the batch's tokens or at another number of them."""
        full, policy, args = not self.policy.use_peft, self.policy, self.args
        computes = self._computes(layout)
        moments = self.step(computes).moments if tokens is None else self._moments(computes, tokens)
        return layouts.Footprint(
            weights=self.weights(computes if layout.startswith("zero") else self.setup.dtype),
            moments=moments,
            optim=layouts.optimizer_name(args),
            mixed=self.setup.autocast is not None,
            frozen_copy=full and not args.precompute_ref_log_probs,
            loads_copy=full,
            spreads_quantized=policy.bnb_4bit_quant_storage not in (None, "uint8"),
            on_gpu=self.on_gpu,
        )

    def kept(self, checkpointing: bool) -> int:
        """Bytes of the activations at the end of a forward, with gradient checkpointing or without."""
        is_on = self.setup.checkpointing is not None
        if checkpointing == is_on:
            return self.step(self.setup.dtype).kept
        setup = dataclasses.replace(self.setup, checkpointing=None if is_on else {})
        return self.engine.trace_step(setup, self.batch, backward=False).kept

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures must know."""
        weights, notes = self.weights(self.setup.dtype), []
        if self.setup.quantization and weights.quantized < weights.base / 2:
            notes.append(
                f"Only {weights.quantized / layouts.GB:.1f} of {weights.base / layouts.GB:.1f} GB of weights are "
                "quantized: transformers quantizes linear layers, and no experts that are one tensor"
            )
        optim = layouts.optimizer_name(self.args)
        if optim not in layouts.OPTIMIZERS and optim != "adafactor":
            notes.append(f"The state of optim: {optim} is not known here, and planned as AdamW's")
        return notes

    def largest_budget(self, layout: str, num_processes: int, limit: float) -> int | None:
        """The largest `max_tokens_per_forward` that fits; None where not even the longest response does."""

        def fits(tokens: int) -> bool:
            return (
                layouts.memory(self.footprint(layout, tokens), layout, num_processes)[1]["total"] <= limit * layouts.GB
            )

        low, high = 0, 2**14
        while fits(high * _GRAIN) and high < 2**20:
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle * _GRAIN) else (low, middle)
        return low * _GRAIN if low * _GRAIN >= self.longest else None

    def _computes(self, layout: str) -> torch.dtype:
        """The type that weights are gathered in: where they are spread, that of the mixed precision."""
        spread = layout in ("zero2", "zero3", "fsdp2") and self.setup.autocast is not None
        return self.setup.autocast if spread and not self.setup.quantization else self.setup.dtype

    def _weights(self, dtype: torch.dtype) -> Any:
        return self.engine.weights_of(dataclasses.replace(self.setup, dtype=dtype))

    def _step(self, dtype: torch.dtype, times: int = 1, accumulates: bool | None = None) -> Any:
        accumulates = self.setup.accumulates if accumulates is None else accumulates
        setup = dataclasses.replace(self.setup, dtype=dtype, accumulates=accumulates)
        return self.engine.trace_step(setup, self.engine.repeated(self.batch, times) if times > 1 else self.batch)

    def _moments(self, dtype: torch.dtype, tokens: float) -> dict[str, dict[str, float]]:
        """Those of a forward of so many tokens of the same kind, by the line through once and twice the batch.

        It is one of several forwards, as where `max_tokens_per_forward` cuts a micro-batch.
        """
        less = self.step(dtype) if self.setup.accumulates else self.step(dtype, accumulates=True)
        more = self.step(dtype, times=2, accumulates=True)
        share = (tokens - less.tokens) / (more.tokens - less.tokens)
        return {
            moment: {kind: max(low + share * (more.moments[moment][kind] - low), 0) for kind, low in parts.items()}
            for moment, parts in less.moments.items()
        }


def _dtype(name: str | None, config: PretrainedConfig) -> torch.dtype:
    """Type that the weights are loaded in: the recipe's, or the one they were saved in."""
    if name not in (None, "auto"):
        return getattr(torch, name)
    return getattr(config.get_text_config(), "dtype", None) or torch.float32
