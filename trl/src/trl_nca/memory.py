r"""How much memory a training step takes, from a model's config alone: no weights, no GPU.

A model of two decoder layers and one of three are built without memory and run forwards and backwards under torch's
fake tensors, with the adapter, the fused head, the packed groups and the checkpointing of a real run, while `Timeline`
counts what is alive. Decoder layers are alike, so each figure of \(L\) layers is \(f_2 + (L - 2)(f_3 - f_2)\). (Where
they are not alike, a few dense layers before sparse ones say, it is an estimate.)

What is not seen: memory that a kernel takes and gives back within one operation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from trl_nca.chunks import split_batch
from trl_nca.collate import GroupCollator
from trl_nca.logps import Batch, _packed, _padded, prepare
from trl_nca.planned_model import Setup, build, is_quantized, plan_norms, stored_bytes
from trl_nca.shared_prompt import GroupLayout, _attend_by_flash, base_model
from trl_nca.timeline import KINDS, Timeline, fake_copy

#: Depths of the models that are run. From two on, the first layer and the last are different ones.
_DEPTHS = (2, 3)
_FLASH = "shared_prompt_planned"


@dataclass(frozen=True)
class Weights:
    """Of a whole model. Bytes, but for `num_trained`.

    Args:
        base: All weights but the adapter's.
        adapter: The adapter's.
        trained: Those that are trained.
        num_trained: The same, as their number.
        num_factors: Rows and columns of the trained matrices, summed: what Adafactor keeps.
        largest_trained: The largest single one of `trained`.
        largest_layer: The largest decoder layer.
        ends: Everything outside the decoder layers.
        quantized: What is stored in 4 or 8 bits, scales included; part of `base`.
    """

    base: int
    adapter: int
    trained: int
    num_trained: int
    num_factors: int
    largest_trained: int
    largest_layer: int
    ends: int
    quantized: int


@dataclass(frozen=True)
class Step:
    """A forward and its backward pass on one process, nothing sharded.

    Args:
        tokens: Of the forward.
        kept: Bytes kept for the backward pass, at the end of the forward: activations.
        moments: The fullest moments of parts of the step, each bytes by kind: `trl_nca.timeline.KINDS`.
    """

    tokens: int
    kept: int
    moments: dict[str, dict[str, int]]


def batch_to_plan(
    lengths: Sequence[tuple[int, Sequence[int]]], max_tokens: int | None, shared_prompt: bool = True
) -> tuple[Batch, int]:
    """The largest forward of a micro-batch, and in how many forwards the micro-batch is run.

    Args:
        lengths: For each prompt its tokens and those of its responses.
        max_tokens: `max_tokens_per_forward`.
        shared_prompt: Whether prompts are shared.
    """
    rows = [
        {"prompt_ids": [0] * prompt, "response_ids": [[0] * n for n in responses], "scores": [0.0] * len(responses)}
        for prompt, responses in lengths
    ]
    chunks = split_batch(GroupCollator()(rows), max_tokens, shared_prompt)
    return max(chunks, key=lambda chunk: chunk["input_ids"].shape[1]), len(chunks)


def repeated(batch: Batch, times: int) -> Batch:
    """The same prompts and responses several times over, as one batch."""
    in_tokens = ("input_ids", "position_ids")
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    return {name: torch.cat([t] * times, dim=1 if name in in_tokens else 0) for name, t in tensors.items()}


def weights_of(setup: Setup) -> Weights:
    """Counts the weights of the whole model as a run would hold them."""
    model = build(setup, setup.config.get_text_config().num_hidden_layers)
    base = base_model(model)
    sizes = {id(p): stored_bytes(p, setup) for p in base.parameters()}
    adapter = {id(p) for name, p in model.named_parameters() if setup.peft_config and _is_adapter(name)}
    trained = [p for p in model.parameters() if p.requires_grad]
    layers = [sum(sizes[id(p)] for p in layer.parameters()) for layer in decoder_layers(base)]
    in_layers = {id(p) for layer in decoder_layers(base) for p in layer.parameters()}
    return Weights(
        base=sum(size for key, size in sizes.items() if key not in adapter),
        adapter=sum(sizes[key] for key in adapter),
        trained=sum(p.numel() * p.element_size() for p in trained),
        num_trained=sum(p.numel() for p in trained),
        num_factors=sum(sum(p.shape[-2:]) if p.dim() > 1 else p.numel() for p in trained),
        largest_trained=max(p.numel() * p.element_size() for p in trained),
        largest_layer=max(layers),
        ends=sum(size for key, size in sizes.items() if key not in in_layers),
        quantized=sum(sizes[id(p)] for p in base.parameters() if is_quantized(p)),
    )


def trace_step(setup: Setup, batch: Batch, backward: bool = True) -> Step:
    """Counts what a forward and backward pass over a batch keep alive. About a second.

    Args:
        setup: Of the run.
        batch: From `batch_to_plan`.
        backward: False for the forward alone.
    """
    shallow, deeper = (_trace(setup, depth, batch, backward) for depth in _DEPTHS)
    more = setup.config.get_text_config().num_hidden_layers - _DEPTHS[0]

    def extrapolate(low: int, high: int) -> int:
        return max(low + more * (high - low), 0)

    moments = {
        moment: {kind: extrapolate(parts[kind], deeper.moments[moment][kind]) for kind in KINDS}
        for moment, parts in shallow.moments.items()
    }
    return Step(batch["input_ids"].shape[1], extrapolate(shallow.kept, deeper.kept), moments)


def _trace(setup: Setup, depth: int, batch: Batch, backward: bool) -> Step:
    model = build(setup, depth)
    inputs = ready(setup, model, batch)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        fake_copy(model, fake)
        inputs = {k: fake.from_tensor(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        timeline = Timeline([*model.parameters(), *model.buffers()], setup.config.get_text_config().vocab_size)
        trained = [p for p in model.parameters() if p.requires_grad]
        marks: list[int] = []  # when the gradient reaches each layer's output, the last layer's first
        for layer in decoder_layers(base_model(model)):
            layer.register_forward_hook(lambda *args: _mark_backward(args[2], timeline, marks))
        with timeline:
            if setup.accumulates:
                for weight in trained:
                    weight.grad = torch.empty_like(weight)
            enabled = setup.autocast is not None
            with torch.autocast("cpu", dtype=setup.autocast or torch.bfloat16, enabled=enabled):
                logps = model(**inputs)
            forward_end = timeline.now
            if backward:
                logps.sum().backward()
            end = timeline.now
        timeline.sort(forward_end, [p.grad for p in trained if p.grad is not None])
    last, first = (marks[0], marks[-1]) if marks else (forward_end, forward_end)
    moments = {
        "forward": timeline.fullest(0, forward_end),
        "head": timeline.fullest(forward_end, last),
        "last layer": timeline.fullest(last, marks[1] if len(marks) > 1 else end),
        "first layer": timeline.fullest(first, end),
    }
    kept = timeline.parts_at(forward_end)
    return Step(batch["input_ids"].shape[1], kept["activations"] + kept["logits"], moments)


def _mark_backward(output: Any, timeline: Timeline, marks: list[int]) -> None:
    """Notes the event at which the backward pass reaches a layer's output."""
    hidden = output[0] if isinstance(output, tuple) else output
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: marks.append(timeline.now))


def ready(setup: Setup, model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Makes the model ready as the trainer does; returns its arguments for the batch."""
    shared = prepare([model], setup.shared_prompt)
    base = base_model(model)
    if shared and setup.device == "cuda":
        base.set_attn_implementation(_FLASH)
    if setup.device == "cuda":
        plan_norms(base)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if setup.checkpointing is not None:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=setup.checkpointing or None)
        if isinstance(model, PeftModel):
            model.enable_input_require_grads()
    inputs, positions = (_packed if shared else _padded)(batch)
    if not shared:  # the mask that transformers makes of a padded batch's
        num_rows, length = inputs["attention_mask"].shape
        inputs["attention_mask"] = torch.ones(num_rows, 1, length, length, dtype=torch.bool)
    return inputs | {"positions": positions, "targets": batch["targets"], "use_cache": False}


def _is_adapter(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name


def decoder_layers(base: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model."""
    return next(
        module
        for module in base.modules()
        if isinstance(module, nn.ModuleList) and len(module) == base.config.get_text_config().num_hidden_layers
    )


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, group_layout: GroupLayout,
    scaling: float | None = None, sliding_window: int | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What `shared_prompt_attention` does on a GPU."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    return _attend_by_flash(query, key, value, scaling, sliding_window, group_layout), None


AttentionInterface.register(_FLASH, _attend)
AttentionMaskInterface.register(_FLASH, sdpa_mask)
