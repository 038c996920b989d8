"""Models on the meta device, without memory, as the trainer would make them: quantized and behind their adapter."""

import copy
import types
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.quantizers.base import get_keys_to_not_convert

from trl_nca.layers import is_llama_norm
from trl_nca.norms import is_centered_norm
from trl_nca.one_pass import is_gated, rotated_type, rotates, with_rotation


@dataclass(frozen=True)
class StepSpec:
    """What decides the memory of a training step, except for its tokens.

    Args:
        config: The model's config.
        dtype: Type of the weights that are not quantized.
        peft_config: The adapter; None for full fine-tuning.
        quantization: "4bit", "8bit" or None.
        double_quantized: Whether the scales of 4-bit weights are quantized too.
        autocast: bfloat16 (or float16) where the run says bf16 (or fp16), else None.
        checkpointing: Keyword arguments of gradient checkpointing, or None for none.
        shared_prompt: `NCAConfig.shared_prompt`.
        device: "cuda" or "cpu": whose attention kernel is used.
        accumulates: Whether gradients of an earlier forward are there already: accumulation steps, or chunks.
    """

    config: PretrainedConfig
    dtype: torch.dtype
    peft_config: PeftConfig | None = None
    quantization: str | None = None
    double_quantized: bool = False
    autocast: torch.dtype | None = None
    checkpointing: dict[str, Any] | None = None
    shared_prompt: str = "auto"
    device: str = "cuda"
    accumulates: bool = False


def build_meta_model(spec: StepSpec, num_layers: int) -> nn.Module:
    """The model with `num_layers` decoder layers, quantized and with its adapter, on the meta device."""
    config = copy.deepcopy(spec.config)
    text = config.get_text_config()
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=spec.dtype)
        if spec.quantization:
            _quantize(model, spec)
        if spec.peft_config:
            model = get_peft_model(model, copy.deepcopy(spec.peft_config))
    return model


def _quantize(model: nn.Module, spec: StepSpec) -> None:
    """Replaces the linear layers that transformers quantizes (no head, no three-dimensional experts).

    The replacements are bitsandbytes' modules, so that PEFT wraps them as it does in a run, with a forward that takes
    the memory of bitsandbytes' own and computes nothing.
    """
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    in_4bit = spec.quantization == "4bit"
    config = BitsAndBytesConfig(
        load_in_4bit=in_4bit,
        load_in_8bit=not in_4bit,
        bnb_4bit_compute_dtype=spec.dtype,
        bnb_4bit_use_double_quant=spec.double_quantized,
    )
    linear = {id(module) for module in model.modules() if type(module) is nn.Linear}
    replace_with_bnb_linear(model, get_keys_to_not_convert(model), config)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = in_4bit, not in_4bit
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module) not in linear and type(module) is not nn.Linear:
            module.forward = types.MethodType(_quantized_forward, module)


def _quantized_forward(self: nn.Module, x: Tensor) -> Tensor:
    shape, in_4bit = (self.out_features, self.in_features), type(self).__name__ == "Linear4bit"
    dtype = self.compute_dtype if in_4bit and self.compute_dtype is not None else x.dtype
    return _QuantizedLinear.apply(x.to(dtype), shape, not in_4bit).to(x.dtype)


class _QuantizedLinear(torch.autograd.Function):
    """The memory of bitsandbytes' `MatMul4Bit` and `MatMul8bitLt`.

    Forward and backward both dequantize the whole weight; 8 bit also keeps x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], keeps_input: bool) -> Tensor:
        ctx.save_for_backward(*[x] if keeps_input else [])
        ctx.shape = shape
        return nn.functional.linear(x, x.new_zeros(shape))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient @ gradient.new_zeros(ctx.shape), None, None


def use_meta_norms(model: nn.Module) -> None:
    """Gives what `trl_nca.layers.fuse_layers` fuses the memory that the fused kernels take on a GPU.

    Besides norms these are gated feed-forward layers and rotations.
    """
    for module in model.modules():
        if is_llama_norm(type(module)) or is_centered_norm(type(module)):
            module.forward = types.MethodType(lambda self, x: _MetaNorm.apply(x, self.weight), module)
        elif is_gated(module):
            module.forward = types.MethodType(_meta_gated_forward, module)
        elif rotates(type(module)):
            module.forward = types.MethodType(with_rotation(type(module).forward, _meta_rotation), module)


def _meta_gated_forward(self: nn.Module, x: Tensor) -> Tensor:
    return self.down_proj(_MetaGate.apply(self.gate_proj(x), self.up_proj(x)))


def _meta_rotation(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    query, key = (_MetaRotation.apply(x, rotated_type(x, cos)) for x in (query, key))
    return query, key


class _MetaNorm(torch.autograd.Function):
    """The memory of torch's fused RMSNorm, which keeps its input and one number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return x + gradient, torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class _MetaGate(torch.autograd.Function):
    """The memory of `trl_nca.one_pass.Gate`, and the bytes that its kernels read and write."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gate * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return gate * gradient, up.neg()


class _MetaRotation(torch.autograd.Function):
    """The memory of one of the two that `trl_nca.one_pass.Rotation` turns, and what its kernel reads and writes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        return x.to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype, copy=True), None


def is_quantized(parameter: nn.Parameter) -> bool:
    """Whether a weight is one of bitsandbytes' in 4 or 8 bits."""
    return type(parameter).__name__ in ("Params4bit", "Int8Params")


def stored_bytes(parameter: nn.Parameter, spec: StepSpec) -> int:
    """Bytes of a weight. 4 bit: half a byte, and a float32 scale for each 64, or a byte and 1/256 of that each."""
    if not is_quantized(parameter):
        return parameter.numel() * parameter.element_size()
    if spec.quantization == "8bit":
        return parameter.numel() + 4 * parameter.shape[0]
    scales = parameter.numel() / 64 * (1 + 4 / 256 if spec.double_quantized else 4)
    return round(parameter.numel() / 2 + scales)
