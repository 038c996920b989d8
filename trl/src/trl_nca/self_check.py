"""A model's log-probs by its own plain forward, to hold the engine's against before anything is trained on.

Legend: B prompts, K responses, N responses of the probe, L tokens of a row, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trl_nca.collate import GroupCollator
from trl_nca.layers import keep_4bit_weights
from trl_nca.rotary import forget_lengths, length_dependent
from trl_nca.sharing import base_model

#: Tokens of the probe's prompts and responses: two prompts, one with two responses, all of different lengths.
_SHAPES = [(9, (7, 3)), (4, (5,))]
#: Largest mean difference of a token's log-prob that rounding makes, in nats, by the coarsest type computed in.
_TOLERANCE = {torch.float64: 2e-4, torch.float32: 2e-4, torch.float16: 0.1, torch.bfloat16: 0.25, torch.int8: 1.0}
#: The same at most, of rows that differ in their last token alone. (In 8 bits it may change how all are rounded.)
_CAUSAL_TOLERANCE = 0.02


class Probe:
    """A few short rows, and their log-probs by the model as it is, one row at a time.

    Args:
        model: A causal language model, bare or wrapped by PEFT.

    Attributes:
        batch: The rows, as from `GroupCollator`, where the model is.

    Raises:
        ValueError: The model is not causal.
    """

    def __init__(self, model: nn.Module):
        device = next(model.parameters()).device
        rows = _rows(_vocab_size(model))
        self.batch = _batch(rows, device)
        self._expected = _plain_logps(model, rows, device)  # (N,)
        self._tolerance = _tolerance(model)

    def compare(self, logps: Tensor) -> str | None:
        """Says how the engine's log-probs of the batch, shape (B, K), differ from the model's; None: they do not."""
        lengths = [length for row in self.batch["layout"].response_lengths for length in row if length]
        found = logps[self.batch["response_mask"]] - self._expected
        largest = (found.abs() / torch.tensor(lengths, device=found.device)).max().item()
        return _judge(largest, self._tolerance, "those of its own forward")


def _judge(largest: float, tolerance: float, expected: str) -> str | None:
    if largest <= tolerance:  # NaN is not
        return None
    return f"the log-probs differ from {expected}, by up to {largest:.2g} nats a token"


def long_response(model: nn.Module) -> dict[str, Any]:
    """A batch of the probe's longest response alone, as from `GroupCollator`, where the model is."""
    row = _rows(_vocab_size(model))[0]
    one = row | {"response_ids": row["response_ids"][:1], "scores": [0.0]}
    return _batch([one], next(model.parameters()).device)


def compare_pieces(model: nn.Module, in_pieces: Tensor, whole: Tensor) -> str | None:
    """Says how log-probs of `long_response` in pieces differ from those of it whole; None: they do not."""
    largest = ((in_pieces - whole).abs() / _SHAPES[0][1][0]).max().item()
    return _judge(largest, _tolerance(model), "those of the row whole")


def _batch(rows: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if hasattr(v, "to") else v for k, v in GroupCollator()(rows).items()}


def probe_logits(model: nn.Module) -> Tensor:
    """Logits of a short row of the model's tokens, by its own forward. Shape (L, V)."""
    row = _rows(_vocab_size(model))[0]
    return _logits(model, torch.tensor([row["prompt_ids"]], device=next(model.parameters()).device))


def _vocab_size(model: nn.Module) -> int:
    return base_model(model).config.get_text_config().vocab_size


def _rows(vocab_size: int) -> list[dict[str, Any]]:
    tokens = iter(range(1, 1000))
    num_tokens = max(vocab_size // 2, 1)  # a head may score fewer tokens than there are embeddings

    def ids(length: int) -> list[int]:
        return [next(tokens) * 7919 % num_tokens for _ in range(length)]

    groups = [(ids(prompt), [ids(length) for length in responses]) for prompt, responses in _SHAPES]
    return [{"prompt_ids": p, "response_ids": rs, "scores": [0.0] * len(rs)} for p, rs in groups]


def _plain_logps(model: nn.Module, rows: list[dict[str, Any]], device: torch.device) -> Tensor:
    """Summed log-probs of all responses, each in a row of its own. Shape (N,)."""
    logps: list[Tensor] = []
    for row in rows:
        for response in row["response_ids"]:
            ids = torch.tensor([row["prompt_ids"] + response], device=device)  # (1, L)
            logits = _logits(model, ids)[:-1]  # (L - 1, V)
            if not logps:
                _check_causal(model, logits, _logits(model, torch.cat([ids[:, :-1], ids[:, :1]], dim=1))[:-1])
            predicted = logits[-len(response) :].log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            logps.append(predicted.gather(1, ids[0, -len(response) :, None]).sum())
    return torch.stack(logps)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Runs a model without dropout or noise, and puts back in training what was.

    Linear layers draw nothing, and those in 8 bits round otherwise when they do not train.
    """
    training = [vars(module) for module in model.modules() if module.training and not isinstance(module, nn.Linear)]
    for attributes in training:  # not by `nn.Module.__setattr__`, ten times as long: it is done at every step
        attributes["training"] = False
    try:
        yield
    finally:
        for attributes in training:
            attributes["training"] = True


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of a row. Shape (L, V), without those of virtual tokens before it."""
    keep_4bit_weights(model)
    forget_lengths(length_dependent(model))
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0, -ids.shape[1] :]


def _check_causal(model: nn.Module, logits: Tensor, with_another_end: Tensor) -> None:
    change = (logits.log_softmax(-1) - with_another_end.log_softmax(-1)).abs().mean().item()
    in_8_bits = any(p.dtype == torch.int8 for p in model.parameters())
    if not change <= (_tolerance(model) if in_8_bits else min(_tolerance(model), _CAUSAL_TOLERANCE)):
        raise ValueError(
            "it is not causal: a token's log-prob changes with the tokens behind it (is_decoder is false?)"
        )


def _tolerance(model: nn.Module) -> float:
    device = next(model.parameters()).device.type
    types = {p.dtype for p in model.parameters()}
    if torch.is_autocast_enabled(device):
        types.add(torch.get_autocast_dtype(device))
    if device == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        types.add(torch.float16)  # whose 10 bits of a number TF32 has
    return max(_TOLERANCE.get(dtype, _TOLERANCE[torch.bfloat16]) for dtype in types)
