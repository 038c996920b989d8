"""Attention on a CPU over what a token's own part of the row has, and over what stands before that part.

Legend: H heads, G heads of keys, T tokens that are queries, S tokens that are keys, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor

from trl_nca.layout import GroupLayout

#: Which queries look at which keys.
Spans = list[tuple[slice, slice]]

# What scaled_dot_product_attention calls on a CPU; called here because they give and take the logsumexp.
_cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def two_parts(layout: GroupLayout) -> tuple[Spans, Spans]:
    """What each part of a row looks at: itself, causally, and all of what stands before it.

    Example:
        >>> two_parts(GroupLayout([2], [[3, 1]]))[1]
        [(slice(2, 6, None), slice(0, 2, None))]
    """
    if layout.store is not None:
        queries, before = slice(0, layout.num_tokens), slice(0, layout.start)
        return [(queries, slice(layout.start, layout.start + layout.num_tokens))], [(queries, before)]
    own = [(part, part) for context, responses in layout.groups for part in (context, *responses)]
    return own, layout.seen_before


class TwoPartAttention(torch.autograd.Function):
    """All responses of a prompt over its context at once, each over itself, and the parts joined; a piece likewise.

    Against a mask, or a copy of the context's keys and values for each response, it saves memory and time.

    With logsumexps a and b of two parts' scores, l = log(e^a + e^b), the output is their outputs weighted by
    e^(a - l) and e^(b - l). Given l and the joined output, each part's gradient is that of attention by itself, so the
    kernels below serve both ways. Nothing is masked but what is above the diagonal, and no key is copied: heads that
    share keys are the heads of the kernel, and those of keys its batch.

    Args:
        query: Shape (1, H, T, D).
        key, value: Shape (1, G, S, D).
        scaling: Of the scores; None: the kernel's own.
        own, seen: From `two_parts`. Each query is in one span of `own`.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, own: Spans, seen: Spans
    ) -> Tensor:
        def attend(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor]:
            q = _by_key_head(query[:, :, queries], key)
            k, v = (_for_heads(t[:, :, keys], q) for t in (key, value))
            out, lse = _cpu_attention(q, k, v, is_causal=causal, scale=scaling)
            return out.flatten(0, 1)[None], lse.flatten(0, 1)[None]

        own, seen = ([span for span in spans if not _is_empty(span)] for spans in (own, seen))
        out = torch.empty_like(query)
        lse = torch.empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))  # (1, H, T)
        for queries, keys in own:
            out[:, :, queries], lse[:, :, queries] = attend(queries, keys, causal=True)
        for queries, keys in seen:
            before, before_lse = attend(queries, keys, causal=False)
            joined = torch.logaddexp(lse[:, :, queries], before_lse)
            own_share, share_before = ((x - joined).exp_()[..., None] for x in (lse[:, :, queries], before_lse))
            out[:, :, queries] = out[:, :, queries] * own_share + before * share_before
            lse[:, :, queries] = joined
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scaling, ctx.own, ctx.seen = scaling, own, seen
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)

        def gradients(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            d_out, q, o, logsumexp = (_by_key_head(t[:, :, queries], key) for t in (gradient, query, out, lse))
            k, v = (_for_heads(t[:, :, keys], q) for t in (key, value))
            d_q, d_k, d_v = _cpu_attention_backward(d_out, q, k, v, o, logsumexp, 0.0, causal, scale=ctx.scaling)
            return d_q.flatten(0, 1)[None], d_k.sum(1)[None], d_v.sum(1)[None]

        for queries, keys in ctx.own:
            d_query[:, :, queries], d_key[:, :, keys], d_value[:, :, keys] = gradients(queries, keys, causal=True)
        for queries, keys in ctx.seen:
            by_query, by_key, by_value = gradients(queries, keys, causal=False)
            d_query[:, :, queries] += by_query
            d_key[:, :, keys] += by_key
            d_value[:, :, keys] += by_value
        return d_query, d_key, d_value, None, None, None


def _by_key_head(x: Tensor, key: Tensor) -> Tensor:
    """From shape (1, H, T, ...) to (G, H / G, T, ...)."""
    return x.unflatten(1, (key.shape[1], -1)).squeeze(0)


def _for_heads(x: Tensor, query: Tensor) -> Tensor:
    """From shape (1, G, S, D) to (G, H / G, S, D), without a copy."""
    return x.squeeze(0)[:, None].expand(-1, query.shape[1], -1, -1)


def _is_empty(span: tuple[slice, slice]) -> bool:
    return any(part.start == part.stop for part in span)
