"""Models without memory, as the trainer would make them: quantized and behind their adapter, on the meta device."""

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


@dataclass(frozen=True)
class Setup:
    """What decides the memory of a step but for its tokens.

    Args:
        config: Of the model.
        dtype: Of the weights that are not quantized.
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


def build(setup: Setup, depth: int) -> nn.Module:
    """The model, of this many layers, on the meta device: quantized and with its adapter, as the trainer makes it."""
    config = copy.deepcopy(setup.config)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=setup.dtype)
        if setup.quantization:
            _quantize(model, setup)
        if setup.peft_config:
            model = get_peft_model(model, copy.deepcopy(setup.peft_config))
    return model


def _quantize(model: nn.Module, setup: Setup) -> None:
    """Swaps the linear layers that transformers quantizes (no head, no three-dimensional experts) for stand-ins.

    They are bitsandbytes' modules, so that PEFT wraps them as it does in a run, with a forward that takes the memory of
    bitsandbytes' and computes nothing.
    """
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    in_4bit = setup.quantization == "4bit"
    config = BitsAndBytesConfig(
        load_in_4bit=in_4bit,
        load_in_8bit=not in_4bit,
        bnb_4bit_compute_dtype=setup.dtype,
        bnb_4bit_use_double_quant=setup.double_quantized,
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
    """bitsandbytes' `MatMul4Bit` and `MatMul8bitLt` by memory: the weight is made whole both ways, 8 bit keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], keeps_input: bool) -> Tensor:
        ctx.save_for_backward(*[x] if keeps_input else [])
        ctx.shape = shape
        return nn.functional.linear(x, x.new_zeros(shape))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient @ gradient.new_zeros(ctx.shape), None, None


def plan_norms(model: nn.Module) -> None:
    """Gives norms that `fuse_layers` makes one kernel the memory that it takes on a GPU."""
    for module in model.modules():
        if is_llama_norm(type(module)):
            module.forward = types.MethodType(lambda self, x: _PlannedNorm.apply(x, self.weight), module)


class _PlannedNorm(torch.autograd.Function):
    """torch's fused RMSNorm by memory, one pass each way: keeps its input and a number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return x + gradient, torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def is_quantized(parameter: nn.Parameter) -> bool:
    return type(parameter).__name__ in ("Params4bit", "Int8Params")


def stored_bytes(parameter: nn.Parameter, setup: Setup) -> int:
    """Bytes of a weight. 4 bit: half a byte, and a float32 scale for each 64, or a byte and 1/256 of that each."""
    if not is_quantized(parameter):
        return parameter.numel() * parameter.element_size()
    if setup.quantization == "8bit":
        return parameter.numel() + 4 * parameter.shape[0]
    scales = parameter.numel() / 64 * (1 + 4 / 256 if setup.double_quantized else 4)
    return round(parameter.numel() / 2 + scales)
