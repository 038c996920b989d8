"""Other ways to take our step, each a context around it: what gpu.py's profile compares ours with."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from alignment.plan.trace import decoder_layers
from trl_nca import layers, norms, one_pass, shared_prompt
from trl_nca.layout import GroupLayout
from trl_nca.sharing import base_model

Variant = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]

_ONE_PASS = (one_pass.gated_forward, one_pass.rotating_forward)


def unfused_layers(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """LoRA layers, norms, gates and rotations are PEFT's and transformers' own."""
    return _without(model, layers._lora_forward, layers._norm_forward, norms.centered_norm_forward, *_ONE_PASS)


def more_passes(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Gates and rotations are transformers' own."""
    return _without(model, *_ONE_PASS)


@contextlib.contextmanager
def _without(model: nn.Module, *forwards: Callable[..., Any]) -> Iterator[None]:
    """Modules that have one of these forwards have their class's."""
    fused = {m: f for m in model.modules() if getattr(f := vars(m).get("forward"), "__func__", None) in forwards}
    for module in fused:
        del module.forward
    try:
        yield
    finally:
        for module, forward in fused.items():
            module.forward = forward


@contextlib.contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """Attention's projections and the feed-forward part through torch.compile, inside what checkpointing runs again."""
    parts = [part for layer in decoder_layers(base_model(model)) for part in (layer.self_attn, layer.mlp)]
    for part in parts:
        part.compile(dynamic=True)
    try:
        yield
    finally:
        for part in parts:
            part._compiled_call_impl = None


def sdpa(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """One context or response after the other, as on GPUs before Ampere."""
    return patch.object(shared_prompt, "_has_flash", lambda query: False)


@contextlib.contextmanager
def flex(model: nn.Module) -> Iterator[None]:
    """All in one FlexAttention kernel, which copies no keys, and looks at blocks of 128 tokens."""
    with patch.multiple(shared_prompt, _has_flash=lambda query: True, _attend_by_flash=attend_by_flex):
        yield


def attend_by_flex(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, layout: GroupLayout
) -> Tensor:
    """As `trl_nca.shared_prompt._attend_by_flash`, without windows. Shape (1, T, H, D)."""
    if window is not None and layout.longest > window:
        raise ValueError(f"sliding_window: {layout.longest} tokens do not fit into {window}")
    attend = torch.compile(flex_attention, dynamic=True) if query.is_cuda else flex_attention
    mask = vars(layout).get("_block_mask") or _block_mask(layout)
    vars(layout)["_block_mask"] = mask  # all layers of a forward ask for the same
    return attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True).transpose(1, 2)


def _block_mask(layout: GroupLayout) -> BlockMask:
    """A token sees what is not after it: its prompt's context, and its own response."""
    total = sum(part.stop - part.start for context, responses in layout.groups for part in (context, *responses))
    group, response = torch.empty(2, total, dtype=torch.int32, device=layout.device)  # 0: of the context
    for i, (context, responses) in enumerate(layout.groups):
        for k, part in enumerate((context, *responses)):
            group[part], response[part] = i, k

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (group[q] == group[k]) & ((response[k] == 0) | (response[q] == response[k]))

    return create_block_mask(sees, None, None, total, total, device=str(layout.device))


VARIANTS: dict[str, Variant] = {
    "PEFT's layers": unfused_layers,
    "gates and rotations in passes": more_passes,
    "SDPA": sdpa,
    "FlexAttention": flex,
    "torch.compile": compiled,
}
