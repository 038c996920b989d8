"""Attention over packed groups: each response sees its prompt's context and itself, and the context is there only once.

Works through transformers' attention interface, so it needs no patched model. A group costs P^2 + sum_k L_k (P + L_k)
score products in place of sum_k (P + L_k)^2, and no masked response-response block is ever computed.

Legend: B prompts, K responses, H heads, T packed tokens, D head dimension, P tokens of a context, L of a response.
`GroupCollator` says what belongs to a context and to a response.
"""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trl_nca.layout import GroupLayout

NAME = "shared_prompt"
# What scaled_dot_product_attention calls on a CPU; called here because they give and take the logsumexp.
_cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Fewer heads of keys than of queries: torch 2.11 takes them as they are, later releases want to be told.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


@torch.compiler.disable  # a layout differs at every step: compiled, it would be compiled at every step
def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    group_layout: GroupLayout | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention function for transformers' interface; plain SDPA when no layout is given (sampling, padded batches).

    Args:
        query: Shape (1, H, T, D).
        key, value: Shape (1, H or fewer, T, D).
        sliding_window: Keys at this distance or more from the query are not seen.
        group_layout: Layout of the packed row, handed through the model's forward.

    Returns:
        The output, shape (1, T, H, D), and no weights.
    """
    if group_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves them wide after the rotation
    if _has_flash(query) and not dropout:
        return _attend_by_flash(query, key, value, scaling, sliding_window, group_layout), None
    within_window = sliding_window is None or group_layout.longest <= sliding_window
    if query.device.type == "cpu" and not dropout and within_window:
        heads_per_key = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, heads_per_key), repeat_kv(value, heads_per_key)
        return _TwoPartAttention.apply(query, key, value, scaling, group_layout).transpose(1, 2), None
    return _attend_by_parts(query, key, value, dropout, scaling, sliding_window, group_layout), None


def gpu_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    group_layout: GroupLayout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """What `shared_prompt_attention` does on a GPU, on any device: for a plan to trace."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    return _attend_by_flash(query, key, value, scaling, sliding_window, group_layout), None


def _has_flash(query: Tensor) -> bool:
    """Whether torch's own FlashAttention for sequences of any lengths takes these queries."""
    fits = query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return query.is_cuda and fits and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _attend_by_flash(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, layout: GroupLayout
) -> Tensor:
    """All contexts and responses in one kernel. Shape (1, T, H, D)."""
    keys, query_starts, key_starts, max_queries, max_keys = layout.to(query.device).sequences
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # (T, H, D)
    return varlen_attn(
        q, k[keys], v[keys], query_starts, key_starts, max_queries, max_keys,
        scale=scaling, window_size=(window - 1 if window else -1, 0), **_GROUPED,
    )[None]  # fmt: skip


class _TwoPartAttention(torch.autograd.Function):
    """On a CPU: all responses of a prompt over its context at once, each over itself, and the two joined.

    Against `_attend_by_parts` it saves a copy of the context's keys and values for each response, in memory and time.

    With logsumexps a and b of the two parts' scores, l = log(e^a + e^b), the output is their outputs weighted by
    e^(a - l) and e^(b - l). Given l and the joined output, each part's gradient is that of attention by itself, so the
    kernels below serve both ways. Nothing is masked but what is above the diagonal, and no key is copied.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: GroupLayout
    ) -> Tensor:
        def attend(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor]:
            q, k, v = query[:, :, queries], key[:, :, keys], value[:, :, keys]
            return _cpu_attention(q, k, v, is_causal=causal, scale=scaling)

        out = torch.empty_like(query)
        lse = torch.empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))  # (1, H, T)
        for context, responses in layout.groups:
            for part in (context, *responses):
                if part.stop > part.start:
                    out[:, :, part], lse[:, :, part] = attend(part, part, causal=True)
            if responses and context.stop > context.start:
                span = slice(responses[0].start, responses[-1].stop)
                seen, seen_lse = attend(span, context, causal=False)
                joined = torch.logaddexp(lse[:, :, span], seen_lse)
                own_share, seen_share = ((x - joined).exp_()[..., None] for x in (lse[:, :, span], seen_lse))
                out[:, :, span] = out[:, :, span] * own_share + seen * seen_share
                lse[:, :, span] = joined
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scaling, ctx.layout = scaling, layout
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)

        def gradients(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            d_out, q, o, logsumexp = (t[:, :, queries] for t in (gradient, query, out, lse))
            k, v = key[:, :, keys], value[:, :, keys]
            return _cpu_attention_backward(d_out, q, k, v, o, logsumexp, 0.0, causal, scale=ctx.scaling)

        for context, responses in ctx.layout.groups:
            for part in (context, *responses):
                if part.stop > part.start:
                    d_query[:, :, part], d_key[:, :, part], d_value[:, :, part] = gradients(part, part, causal=True)
            if responses and context.stop > context.start:
                span = slice(responses[0].start, responses[-1].stop)
                by_query, by_key, by_value = gradients(span, context, causal=False)
                d_query[:, :, span] += by_query
                d_key[:, :, context] += by_key
                d_value[:, :, context] += by_value
        return d_query, d_key, d_value, None, None


def _attend_by_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    group_layout: GroupLayout,
) -> Tensor:
    """One context or response after the other, on any device and in any precision. Shape (1, T, H, D)."""
    heads_per_key = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, heads_per_key), repeat_kv(value, heads_per_key)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of the last queries over all keys: (1, H, L, D) over (1, H, P + L, D)."""
        mask = _causal_mask(q.shape[2], k.shape[2], sliding_window, q.device)
        causal = mask is None and q.shape[2] > 1
        return scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=causal, scale=scaling)

    # One split, whose gradient is one concatenation: a slice's would be a tensor of the whole row's size each.
    lengths = [part.stop - part.start for context, responses in group_layout.groups for part in (context, *responses)]
    parts = zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
    outputs = []
    for context, responses in group_layout.groups:
        context_query, context_key, context_value = next(parts)
        if context.stop > context.start:
            outputs.append(attend(context_query, context_key, context_value))
        for _ in responses:
            q, k, v = next(parts)
            outputs.append(attend(q, torch.cat([context_key, k], dim=2), torch.cat([context_value, v], dim=2)))
    return torch.cat(outputs, dim=2).transpose(1, 2)  # (1, T, H, D)


def _causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """True where a query may look: shape (num_queries, num_keys), or None where plain causality says it all."""
    windowed = window is not None and num_keys > window
    if not windowed and num_queries in (1, num_keys):
        return None
    key_positions = torch.arange(num_keys, device=device)
    query_positions = key_positions[num_keys - num_queries :, None]
    mask = key_positions <= query_positions
    return mask & (query_positions - key_positions < window) if windowed else mask


AttentionInterface.register(NAME, shared_prompt_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def share_prompts(models: Sequence[nn.Module], mode: str = "auto") -> bool:
    """Makes models run packed groups, if all of them can. Sampling, and batches without a layout, run as before.

    Args:
        models: Policy and, where it is a model of its own, reference; plain or wrapped by PEFT.
        mode: "true", "false", or "auto": true where the models can, else a warning.

    Returns:
        Whether they run packed groups now.

    Raises:
        ValueError: The mode is "true" and a model cannot; says why.
    """
    if mode == "false":
        return False
    reason = next(filter(None, map(unsupported_reason, models)), None)
    if reason is not None:
        if mode == "true":
            raise ValueError(f"shared_prompt: this model cannot share prompts: {reason}; set it to auto or false")
        warnings.warn(f"Prompts are not shared and rows are padded: {reason}", stacklevel=2)
        return False
    for model in models:
        base_model(model).set_attn_implementation(NAME)
    return True


def unsupported_reason(model: nn.Module) -> str | None:
    """Why this model cannot run packed groups; None when it can."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "its adapter puts virtual tokens before the prompt"
    model = base_model(model)
    config = model.config.get_text_config()
    if not any(word in config._attn_implementation for word in ("sdpa", "flash", "flex", NAME)):
        return f"its attention is {config._attn_implementation!r}, which scores by rules of its own"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not use transformers' attention interface"
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        return f"it has layers of type {', '.join(sorted(other))}"
    return None


def base_model(model: nn.Module) -> nn.Module:
    """The model without its adapter's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
