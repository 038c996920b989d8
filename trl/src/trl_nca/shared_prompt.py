"""Attention over packed groups: each response sees its prompt's context and itself, and the context is there only once.
What responses have in common behind it is there once too, and seen by all that go on from it.

Works through transformers' attention interface, so it needs no patched model. A group costs P^2 + sum_k L_k (P + L_k)
score products in place of sum_k (P + L_k)^2, and no masked response-response block is ever computed.

Legend: B prompts, K responses, H heads, T packed tokens, D head dimension, P tokens of a context, L of a response.
`GroupCollator` says what belongs to a context and to a response.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trl_nca.layout import GroupLayout
from trl_nca.two_part import TwoPartAttention, two_parts

NAME = "shared_prompt"
#: Arguments that layers hand on and that change no score here: the mask has the window, the rotation the positions.
_IGNORED = frozenset({
    "sliding_window", "is_causal", "position_ids", "cache_position", "past_key_values", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits", "num_items_in_batch", "logits_to_keep",
    "layer_idx", "target_dtype", "deterministic", "implementation", "position_embeddings",
})  # fmt: skip
# Fewer heads of keys than of queries: torch 2.11 takes them as they are, later releases want to be told.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class CannotShare(ValueError):
    """Why a model cannot run packed groups."""


@torch.compiler.disable  # a layout differs at every step: compiled, it would be compiled at every step
def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    group_layout: GroupLayout | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention function for transformers' interface; plain SDPA when no layout is given (sampling, padded batches).

    Args:
        query: Shape (1, H, T, D).
        key: Shape (1, H or fewer, T, D). Of a piece of a long row, those of its own tokens.
        value: As the key; the head dimension may be another.
        attention_mask: Of a packed row, what `shared_prompt_mask` made of it.
        group_layout: Layout of the packed row, handed through the model's forward.
        **kwargs: What else a family hands to its attention.

    Returns:
        The output, shape (1, T, H, D), and no weights.

    Raises:
        CannotShare: The layer was handed no layout, or something that changes its scores.
    """
    if group_layout is None:
        if _is_packed(attention_mask, key):
            raise CannotShare(f"{type(module).__name__} is not handed the keyword arguments of its model")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if key.shape[2] > 1 and not _is_packed(attention_mask, key):
        raise CannotShare(f"{type(module).__name__} makes a mask of its own")
    if unknown := [name for name, given in kwargs.items() if name not in _IGNORED and _says_something(given)]:
        raise CannotShare(f"{type(module).__name__} scores by {', '.join(unknown)} too")
    window = _window(attention_mask, key)
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves them wide after the rotation
    if group_layout.store is not None:
        key, value = group_layout.store.extend(module, key, value, group_layout.start)
    same_size = value.shape[-1] == key.shape[-1]
    if same_size and _has_flash(query) and not dropout:
        return _attend_by_flash(query, key, value, scaling, window, group_layout), None
    within_window = window is None or group_layout.longest <= window
    if same_size and query.device.type == "cpu" and not dropout and within_window:
        out = TwoPartAttention.apply(query, key, value, scaling, *two_parts(group_layout)).transpose(1, 2)
    else:
        out = _attend_by_parts(query, key, value, dropout, scaling, window, group_layout)
    return out.contiguous(), None


def shared_prompt_mask(
    *args: Any, q_length: int, kv_length: int, local_size: int | None = None, device: Any = "cpu", **kwargs: Any
) -> Tensor | None:
    """Mask function for transformers' interface: SDPA's, and of a packed row a mark with the layer's window.

    A packed row comes with a mask of one token, which no other row of more tokens has. transformers decides which
    layer sees how far; the mark, of shape (1, 1, window + 1 or 1, 1) and without storage, tells attention.
    """
    if q_length > kv_length == 1:
        return torch.ones((), dtype=torch.bool, device=device).expand(1, 1, (local_size or 0) + 1, 1)
    return sdpa_mask(*args, q_length=q_length, kv_length=kv_length, local_size=local_size, device=device, **kwargs)


def _is_packed(mask: Tensor | None, key: Tensor) -> bool:
    return mask is not None and mask.shape[-1] == 1 < key.shape[2]


def _window(mask: Tensor | None, key: Tensor) -> int | None:
    """Keys at this distance or more from the query are not seen; None: all are."""
    return mask.shape[2] - 1 or None if mask is not None and _is_packed(mask, key) else None


def _says_something(value: object) -> bool:
    """Whether an argument asks for more than plain causal attention."""
    return isinstance(value, Tensor) or (value is not None and value is not False and value != 0)


def gpu_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    group_layout: GroupLayout,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """What `shared_prompt_attention` does on the GPU here, or on a recent one: for a plan to trace on any device."""
    query, key, window = query.to(value.dtype), key.to(value.dtype), _window(attention_mask, key)
    if group_layout.store is not None:
        key, value = group_layout.store.extend(module, key, value, group_layout.start)
    is_recent = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)
    if value.shape[-1] == key.shape[-1] and _fits_flash(query) and is_recent:
        return _attend_by_flash(query, key, value, scaling, window, group_layout), None
    return _attend_by_parts(query, key, value, 0.0, scaling, window, group_layout).contiguous(), None


def _has_flash(query: Tensor) -> bool:
    """Whether torch's own FlashAttention for sequences of any lengths takes these queries."""
    return query.is_cuda and _fits_flash(query) and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _fits_flash(query: Tensor) -> bool:
    return query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


def _attend_by_flash(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, layout: GroupLayout
) -> Tensor:
    """All contexts and responses in one kernel. Shape (1, T, H, D)."""
    keys, query_starts, key_starts, max_queries, max_keys = layout.to(query.device).sequences
    # Not t[0], whose gradient would be written into zeros, and would have to be copied for the projection before it.
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))  # (T, H, D)
    return varlen_attn(
        q, k[keys], v[keys], query_starts, key_starts, max_queries, max_keys,
        scale=scaling, window_size=(window - 1 if window else -1, 0), **_GROUPED,
    )[None]  # fmt: skip


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
    if group_layout.store is not None and sliding_window is not None:  # what no query sees is not copied
        unseen = max(group_layout.start - sliding_window + 1, 0)
        key, value = key[:, :, unseen:], value[:, :, unseen:]
    heads_per_key = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, heads_per_key), repeat_kv(value, heads_per_key)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of the last queries over all keys: (1, H, L, D) over (1, H, P + L, D)."""
        mask = _causal_mask(q.shape[2], k.shape[2], sliding_window, q.device)
        causal = mask is None and q.shape[2] > 1
        return scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=causal, scale=scaling)

    if group_layout.store is not None:
        return attend(query, key, value).transpose(1, 2)
    # One split, whose gradient is one concatenation: a slice's would be a tensor of the whole row's size each.
    lengths = [part.stop - part.start for context, responses in group_layout.groups for part in (context, *responses)]
    parts = zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
    outputs = []
    for (context, responses), paths in zip(group_layout.groups, group_layout.paths, strict=True):
        context_query, *context_keys = next(parts)
        if context.stop > context.start:
            outputs.append(attend(context_query, *context_keys))
        run: dict[int, list[Tensor]] = {}  # keys and values of each response, by where it begins
        for response, path in zip(responses, paths, strict=True):
            q, *run[response.start] = next(parts)
            seen = [context_keys, *([t[:, :, : p.stop - p.start] for t in run[p.start]] for p in path)]
            outputs.append(attend(q, *(torch.cat(pieces, dim=2) for pieces in zip(*seen, strict=True))))
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
AttentionMaskInterface.register(NAME, shared_prompt_mask)
