r"""How much memory a training step takes, from a model's config alone: no weights, no GPU.

A model of two decoder layers and one of three are built without memory and run forwards and backwards under torch's
fake tensors, with the adapter, the fused head, the packed groups and the checkpointing of a real run, while `Timeline`
counts what is alive. Decoder layers are alike, so each figure of \(L\) layers is \(f_2 + (L - 2)(f_3 - f_2)\). (Where
they are not alike, a few dense layers before sparse ones say, it is an estimate.)

What is not seen: memory that a kernel takes and gives back within one operation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from alignment.plan.meta_model import StepSpec, build_meta_model, is_quantized, stored_bytes, use_meta_norms
from alignment.plan.timeline import KINDS, Timeline, fake_copy
from trl_nca.chunks import split_batch
from trl_nca.collate import GroupCollator
from trl_nca.keys import KeyStore
from trl_nca.logps import Batch, model_inputs, prepare
from trl_nca.pieces import piece_of
from trl_nca.shared_prompt import gpu_attention, shared_prompt_mask
from trl_nca.sharing import base_model

#: Numbers of layers of the models that are run. From two on, the first layer and the last are different ones.
_DEPTHS = (2, 3)
_GPU_ATTENTION = "shared_prompt_on_gpu"


@dataclass(frozen=True)
class WeightSizes:
    """The weights of a whole model, in bytes except for `num_trained`.

    Args:
        base: All weights but the adapter's.
        adapter: The adapter's weights.
        trained: The weights that are trained.
        num_trained: How many numbers are trained.
        num_factors: Rows and columns of the trained matrices, summed: what Adafactor keeps.
        largest_trained: The largest single trained weight.
        largest_layer: The largest decoder layer.
        outside_layers: Everything outside the decoder layers.
        quantized: What is stored in 4 or 8 bits, scales included; part of `base`.
        scales: The scales of what is stored in 4 bits; part of `quantized`.
    """

    base: int
    adapter: int
    trained: int
    num_trained: int
    num_factors: int
    largest_trained: int
    largest_layer: int
    outside_layers: int
    quantized: int
    scales: int


@dataclass(frozen=True)
class StepMemory:
    """The memory of a forward and its backward pass on one process, nothing sharded.

    Args:
        tokens: Tokens of the forward.
        activations: Bytes kept for the backward pass, at the end of the forward.
        phases: Peak of each phase of the step, in bytes by kind: `alignment.plan.timeline.KINDS`, and `keys`.
        forward_flops: Floating-point operations of the forward.
        flops: Those of all: forward, what is recomputed, backward.
    """

    tokens: int
    activations: int
    phases: dict[str, dict[str, int]]
    forward_flops: int = 0
    flops: int = 0


def largest_forward(
    lengths: Sequence[tuple[int, Sequence[int]]], max_tokens: int | None, shared_prompt: bool = True
) -> tuple[Batch, int]:
    """The largest forward of a micro-batch, and how many forwards the micro-batch takes.

    Args:
        lengths: For each prompt its tokens and those of its responses.
        max_tokens: `max_tokens_per_forward`.
        shared_prompt: Whether prompts are shared.
    """
    rows = [
        {
            "prompt_ids": [0] * prompt,
            "response_ids": [[k] * n for k, n in enumerate(responses)],
            "scores": [0.0] * len(responses),
        }
        for prompt, responses in lengths
    ]
    chunks = split_batch(GroupCollator()(rows), max_tokens, shared_prompt)
    return max(chunks, key=lambda chunk: chunk["input_ids"].shape[1]), len(chunks)


def repeat_batch(batch: Batch, times: int) -> Batch:
    """The same prompts and responses several times over, as one batch."""
    in_tokens = ("input_ids", "position_ids")
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    repeated = {name: torch.cat([t] * times, dim=1 if name in in_tokens else 0) for name, t in tensors.items()}
    return repeated | {"layout": batch["layout"].repeat(times)}


def weight_sizes(spec: StepSpec) -> WeightSizes:
    """Counts the weights of the whole model as a run would hold them."""
    model = build_meta_model(spec, spec.config.get_text_config().num_hidden_layers)
    base = base_model(model)
    sizes = {id(p): stored_bytes(p, spec) for p in base.parameters()}
    adapter = {id(p) for name, p in model.named_parameters() if spec.peft_config and _is_adapter(name)}
    trained = [p for p in model.parameters() if p.requires_grad]
    layers = [sum(sizes[id(p)] for p in layer.parameters()) for layer in decoder_layers(base)]
    in_layers = {id(p) for layer in decoder_layers(base) for p in layer.parameters()}
    quantized = [p for p in base.parameters() if is_quantized(p)]
    return WeightSizes(
        base=sum(size for key, size in sizes.items() if key not in adapter),
        adapter=sum(sizes[key] for key in adapter),
        trained=sum(p.numel() * p.element_size() for p in trained),
        num_trained=sum(p.numel() for p in trained),
        num_factors=sum(sum(p.shape[-2:]) if p.dim() > 1 else p.numel() for p in trained),
        largest_trained=max(p.numel() * p.element_size() for p in trained),
        largest_layer=max(layers),
        outside_layers=sum(size for key, size in sizes.items() if key not in in_layers),
        quantized=sum(sizes[id(p)] for p in quantized),
        scales=sum(sizes[id(p)] - p.numel() // 2 for p in quantized) if spec.quantization == "4bit" else 0,
    )


def trace_step(spec: StepSpec, batch: Batch, backward: bool = True) -> StepMemory:
    """Counts the memory that a forward and backward pass over a batch hold. Takes about a second.

    Args:
        spec: Model and settings of the run.
        batch: From `largest_forward`. With a number under `piece`, it is of one response, and so many of its tokens
            are run: a piece behind as many others as there can be, when the keys and values of all are kept, and their
            gradients.
        backward: False for the forward alone.
    """
    shallow, deeper = (_trace(spec, depth, batch, backward) for depth in _DEPTHS)
    more = spec.config.get_text_config().num_hidden_layers - _DEPTHS[0]

    def extrapolate(low: int, high: int) -> int:
        return max(low + more * (high - low), 0)

    phases = {
        phase: {kind: extrapolate(parts[kind], deeper.phases[phase][kind]) for kind in (*KINDS, "keys")}
        for phase, parts in shallow.phases.items()
    }
    of_layers = {
        name: extrapolate(getattr(shallow, name), getattr(deeper, name))
        for name in ("activations", "forward_flops", "flops")
    }
    return StepMemory(shallow.tokens, phases=phases, **of_layers)


def _trace(spec: StepSpec, depth: int, batch: Batch, backward: bool) -> StepMemory:
    model = build_meta_model(spec, depth)
    shared, store = _patch(spec, model), KeyStore(batch["layout"].num_tokens)
    forwards = _pieces(batch, store) if "piece" in batch else [batch]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        fake_copy(model, fake)
        *before, inputs = (_fake_inputs(spec, forward, shared, fake) for forward in forwards)
        _run_before(spec, model, before)
        known = [*model.parameters(), *model.buffers(), *store.tensors()]
        timeline = Timeline(known, spec.config.get_text_config().vocab_size)
        trained = [p for p in model.parameters() if p.requires_grad]
        marks: list[int] = []  # when the gradient reaches each layer's output, the last layer's first
        for layer in decoder_layers(base_model(model)):
            layer.register_forward_hook(lambda *args: _mark_backward(args[2], timeline, marks))
        with timeline:
            if spec.accumulates:
                for weight in trained:
                    weight.grad = torch.empty_like(weight)
            with _autocast(spec):
                logps = model(**inputs)
            forward_end, forward_flops = timeline.now, timeline.flops
            if backward:
                logps.sum().backward()
            end = timeline.now
        timeline.classify(forward_end, [p.grad for p in trained if p.grad is not None])
    last, first = (marks[0], marks[-1]) if marks else (forward_end, forward_end)
    phases = {
        "forward": timeline.peak(0, forward_end),
        "head": timeline.peak(forward_end, last),
        "last layer": timeline.peak(last, marks[1] if len(marks) > 1 else end),
        "first layer": timeline.peak(first, end),
    }
    keys = sum(tensor.nbytes for tensor in store.tensors())
    phases = {phase: parts | {"keys": keys} for phase, parts in phases.items()}
    alive = timeline.alive_at(forward_end)
    activations = alive["activations"] + alive["logits"]
    return StepMemory(forwards[-1]["layout"].num_tokens, activations, phases, forward_flops, timeline.flops)


def _pieces(batch: Batch, store: KeyStore) -> list[Batch]:
    """What fills a store, what sends gradients back to all that there can be, and the piece to trace."""
    length, last = store.length, 2
    start = max(length - last - batch["piece"], last)
    bounds = [(0, start), (start, length - last), (length - last, length), (start, length - last)]
    return [piece_of(batch, begin, end, store) for begin, end in bounds]


def _run_before(spec: StepSpec, model: nn.Module, before: Sequence[dict[str, Any]]) -> None:
    """Runs the pieces that come before the one to trace, the last of them with gradient."""
    for i, inputs in enumerate(before):
        with torch.set_grad_enabled(i == len(before) - 1), _autocast(spec):
            logps = model(**inputs)
        if logps.requires_grad:
            logps.sum().backward()
    model.zero_grad()


def _autocast(spec: StepSpec) -> torch.autocast:
    return torch.autocast("cpu", dtype=spec.autocast or torch.bfloat16, enabled=spec.autocast is not None)


def _mark_backward(output: Any, timeline: Timeline, marks: list[int]) -> None:
    """Notes the event at which the backward pass reaches a layer's output."""
    hidden = output[0] if isinstance(output, tuple) else output
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: marks.append(timeline.now))


def trainer_inputs(spec: StepSpec, model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Patches the model as the trainer does, and returns the arguments of its forward for the batch."""
    return _inputs(spec, batch, _patch(spec, model))


def _patch(spec: StepSpec, model: nn.Module) -> bool:
    """Patches the model as the trainer does; returns whether it shares prompts."""
    shared = prepare([model], spec.shared_prompt, check=False)
    base = base_model(model)
    if shared and spec.device == "cuda":
        base.set_attn_implementation(_GPU_ATTENTION)
    if spec.device == "cuda":
        use_meta_norms(base)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if spec.checkpointing is not None:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=spec.checkpointing or None)
        if isinstance(model, PeftModel):
            model.enable_input_require_grads()
    return shared


def _inputs(spec: StepSpec, batch: Batch, shared: bool) -> dict[str, Any]:
    batch = batch | {"layout": replace(batch["layout"])}  # a new one: it keeps its tensors, and a trace's are fake
    inputs = model_inputs(batch, shared) | {"run_device": spec.device}
    if not shared:  # the mask that transformers makes of a padded batch's
        num_rows, length = inputs["attention_mask"].shape
        inputs["attention_mask"] = torch.ones(num_rows, 1, length, length, dtype=torch.bool)
    return inputs


def _fake_inputs(spec: StepSpec, batch: Batch, shared: bool, fake: FakeTensorMode) -> dict[str, Any]:
    inputs = _inputs(spec, batch, shared)
    return {name: fake.from_tensor(v) if isinstance(v, Tensor) else v for name, v in inputs.items()}


def _is_adapter(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name


def decoder_layers(base: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model."""
    return next(
        module
        for module in base.modules()
        if isinstance(module, nn.ModuleList) and len(module) == base.config.get_text_config().num_hidden_layers
    )


AttentionInterface.register(_GPU_ATTENTION, gpu_attention)
AttentionMaskInterface.register(_GPU_ATTENTION, shared_prompt_mask)
AttentionMaskInterface.register(_GPU_ATTENTION, sdpa_mask)
