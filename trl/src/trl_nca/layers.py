"""Decoder layers with fewer memory-bound operations, and adapters that are kept in float32.

On a GPU an elementwise operation on the activations of all tokens costs a good part of a matrix product, and PEFT's
LoRA layers and transformers' norms make many: an input written in float32 and back, a product, the product scaled, the
sum. Here LoRA's product goes straight into the base layer's output, and the norm is torch's own, one kernel on a GPU.
The numbers are theirs but for rounding, which happens once in place of several times.

Legend: N tokens, I input size, O output size, r rank.
"""

import types
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from trl_nca.norms import centered_norm_forward, is_centered_norm
from trl_nca.one_pass import fuse_passes, same_code


def fuse_layers(model: nn.Module) -> None:
    """Patches LoRA layers over linear ones, quantized or not, and Llama-style RMSNorms in place with fused forwards.

    What is not plain LoRA on plain tensors runs as before: see `_plain_adapter`.
    """
    keep_4bit_weights(model)  # where the reference is run before the trainer is made
    for module in model.modules():
        if isinstance(module, LoraLayer) and _is_linear(module):
            module.forward = types.MethodType(_lora_forward, module)
        elif is_llama_norm(type(module)):
            module.forward = types.MethodType(_norm_forward, module)
        elif is_centered_norm(type(module)):
            module.forward = types.MethodType(centered_norm_forward, module)
        else:
            fuse_passes(module)


def _is_linear(layer: LoraLayer) -> bool:
    """Whether a layer is PEFT's own LoRA over a linear one. (AdaLoRA's derives from it, and computes otherwise.)"""
    return type(layer).__module__.startswith("peft.tuners.lora.") and isinstance(layer.get_base_layer(), nn.Linear)


def keep_4bit_weights(model: nn.Module) -> None:
    """Keeps bitsandbytes 0.50 from repacking 4-bit weights on a CPU with bfloat16. To be called before any forward.

    It does so at a first forward without gradient, such as sampling's. No gradient goes through them afterwards, and
    input sizes below 64 fail.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def cast_adapter_to_float32(model: nn.Module) -> None:
    """Casts the trained weights of a PEFT model to float32 in place; any other model is left as it is.

    trl 1.16 makes the adapter of a quantized model bfloat16. There a weight of 0.008 moves by 3e-5 or not at all, and
    AdamW's step is the learning rate, 5e-6 in the recipes.
    """
    for parameter in model.parameters() if isinstance(model, PeftModel) else ():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def is_llama_norm(kind: type[nn.Module]) -> bool:
    """Whether a class normalizes as Llama's does: the very same code, which many families repeat."""
    return same_code(kind.forward, LlamaRMSNorm.forward)


def _norm_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    if not _has_fused_norm(hidden_states, self.weight):
        return type(self).forward(self, hidden_states)
    with torch.autocast(hidden_states.device.type, enabled=False):  # which would make it float32, weight and all
        return rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def _has_fused_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether torch has one kernel for it. On a CPU its steps are those of transformers, and slower."""
    return x.is_cuda and x.dtype == weight.dtype


def _lora_forward(self: LoraLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    name = None if args or kwargs else _plain_adapter(self, x)
    if name is None:
        return type(self).forward(self, x, *args, **kwargs)
    out = self.base_layer(x)
    if out._is_view():  # of a function's own tensor, from 8-bit layers, which autograd lets nobody write to
        out = out.clone()
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    return _AddLowRank.apply(out, x, a, b, self.scaling[name])


def _plain_adapter(layer: LoraLayer, x: Tensor) -> str | None:
    """Name of the only active adapter, or None where PEFT does more than add its product."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or not x.numel():
        return None
    (name,) = active
    dropout, weight = layer.lora_dropout[name], layer.lora_A[name].weight
    drops = isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training
    is_variant = name in layer.lora_variant or layer.lora_bias[name]  # DoRA and its like
    is_scattered = hasattr(weight, "ds_id")  # ZeRO-3 gathers a weight when its own module is called
    # Without autocast PEFT computes in the adapter's type, and so it stays.
    is_cast = x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)
    return name if is_cast and not (drops or is_variant or is_scattered) else None


class _AddLowRank(torch.autograd.Function):
    r"""\(y + s\,(x A^T) B^T\), in y's place and in y's type.

    Args:
        out: y, the base layer's output, which nothing else refers to. Shape (..., O).
        x: The layer's input. Shape (..., I).
        a, b: The adapter's weights, shapes (r, I) and (O, r), in any floating type; so are their gradients.
        scaling: s, LoRA's alpha / r.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        device = out.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else out.dtype
        x, rows = x.to(dtype), out.view(-1, out.shape[-1])  # a view, or an error: a copy would be lost
        low = x.flatten(0, -2) @ a.to(dtype).t() * scaling  # (N, r)
        if out.dtype == dtype:
            rows.addmm_(low, b.to(dtype).t())
        else:  # 4-bit layers give back what they were given
            rows += low @ b.to(dtype).t()
        ctx.mark_dirty(out)
        ctx.save_for_backward(x, low, a, b)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        dtype = x.dtype
        rows = gradient.flatten(0, -2).to(dtype)  # (N, O)
        d_low = rows @ b.to(dtype) * ctx.scaling  # (N, r)
        d_x = (d_low @ a.to(dtype)).view_as(x)
        d_a, d_b = d_low.t() @ x.flatten(0, -2), rows.t() @ low
        return gradient, d_x, d_a.to(a.dtype), d_b.to(b.dtype), None
