"""A response that is too long for a forward, with its prompt, is run in pieces, with the exact gradient.

Its log-prob is the sum of the pieces' own. They are run in order without gradient, which gives the sum, and keeps keys
and values for the pieces behind; then in reverse order with it, each back-propagated and let go. `KeyStore` hands the
gradient back from piece to piece.

Legend: B prompts, K responses.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trl_nca.keys import KeyStore
from trl_nca.layout import GroupLayout, Spans
from trl_nca.logps import Batch, response_logps
from trl_nca.rotary import length_dependent, longest_shared
from trl_nca.self_check import compare_pieces, evaluating, long_response

#: Log-probs of a chunk or a piece, shape (B, K), 0 for responses that are in another chunk.
LogpsFn = Callable[[Batch], Tensor]
#: Of the CPU's random numbers, and the device's.
RandomState = tuple[Tensor, Tensor | None]

#: Smallest bound of a forward's tokens. Pieces then have two at least: one token has no mask that tells what it is.
_SMALLEST = 3


@dataclass(frozen=True)
class Cutting:
    """Which responses are run in pieces, where they do not fit a forward.

    Args:
        longest: Most tokens of a response with its context that can be.
        reason: Why a longer one cannot.
    """

    longest: int = 0
    reason: str | None = None

    def mark(self, chunk: Batch, max_tokens: int | None) -> Batch:
        """A chunk of `split_batch`, with `num_pieces` where it is run in pieces."""
        length, most = chunk["layout"].num_tokens, max(max_tokens or 0, _SMALLEST)
        if max_tokens is None or length <= most:
            return chunk
        if length <= self.longest:
            return chunk | {"num_pieces": math.ceil(length / most)}
        if self.reason:
            warnings.warn(f"Responses of more than max_tokens_per_forward run whole: {self.reason}", stacklevel=3)
        return chunk


#: All are run whole.
WHOLE = Cutting()


def cut(chunk: Batch) -> list[Batch]:
    """The pieces of a chunk, of even sizes, with a new store that they share; an ordinary chunk is one.

    Each has the keys of a chunk, and under `share` its part of the tokens.

    Example:
        >>> from trl_nca.collate import GroupCollator
        >>> batch = GroupCollator()([{"prompt_ids": [1, 2, 3], "response_ids": [[4, 5, 6, 7]], "scores": [1]}])
        >>> for piece in cut(batch | {"num_pieces": 2}):
        ...     print(piece["input_ids"].tolist(), piece["targets"].tolist(), piece["share"])
        [[1, 2, 3]] [4] 0.5
        [[4, 5, 6]] [5, 6, 7] 0.5
    """
    num_pieces, length = chunk.get("num_pieces", 1), chunk["layout"].num_tokens
    if num_pieces == 1:
        return [chunk]
    store = KeyStore(length)
    bounds = [length * i // num_pieces for i in range(num_pieces + 1)]
    return [piece_of(chunk, start, stop, store) for start, stop in itertools.pairwise(bounds)]


def piece_of(chunk: Batch, start: int, stop: int, store: KeyStore) -> Batch:
    """The tokens from `start` to `stop` of a chunk of one response with its context."""
    whole: GroupLayout = chunk["layout"]
    context, length = sum(whole.context_lengths), whole.num_tokens
    in_context = min(stop, context) - min(start, context)
    begin, end = max(start - context, 0), max(stop - context, 0)  # of the response
    layout = GroupLayout(
        [in_context if tokens else 0 for tokens in whole.context_lengths],
        [[end - begin if tokens else 0 for tokens in row] for row in whole.response_lengths],
        whole.device,
        whole.scored and [[_within(spans, begin, end) for spans in row] for row in whole.scored],
        start=start,
        store=store,
    )
    (spans,) = itertools.chain.from_iterable(whole.spans)
    first, num_targets = (sum(b - a for a, b in _within(spans, *part)) for part in ((0, begin), (begin, end)))
    keys = [key for key in ("targets", "token_weights") if key in chunk]
    return chunk | {
        "input_ids": chunk["input_ids"][:, start:stop],
        "position_ids": chunk["position_ids"][:, start:stop],
        **{key: chunk[key][first : first + num_targets] for key in keys},
        "layout": layout,
        "share": (stop - start) / length,
    }


def _within(spans: Spans, begin: int, end: int) -> Spans:
    """The parts of spans between two tokens, counted from the first of these.

    Example:
        >>> _within([(0, 3), (4, 6)], 2, 5)
        [(0, 1), (2, 3)]
    """
    parts = [(max(start, begin) - begin, min(stop, end) - begin) for start, stop in spans]
    return [(start, stop) for start, stop in parts if start < stop]


def run_in_order(
    logps_fn: LogpsFn, pieces: Sequence[Batch], drawn: Sequence[RandomState] = ()
) -> tuple[Tensor | float, list[RandomState]]:
    """Runs the first pieces of a chunk, or all, without gradient.

    Args:
        logps_fn: Log-probs of a piece.
        pieces: From `cut`.
        drawn: Where they were run before, the states from which they drew random numbers, to draw the same ones.

    Returns:
        The sum of the pieces' log-probs, shape (B, K), or 0 of none, and the states from which they drew.
    """
    logps: Tensor | float = 0.0
    states: list[RandomState] = []
    with torch.no_grad():
        for i, piece in enumerate(pieces):
            device = piece["response_mask"].device
            states.append(drawn[i] if drawn else _random_state(device))
            with replayed(states[i] if drawn else None, device):
                logps = logps + logps_fn(piece)
    return logps, [*(drawn or states)]


def _random_state(device: torch.device) -> RandomState:
    on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), on_device


@contextmanager
def replayed(state: RandomState | None, device: torch.device) -> Iterator[None]:
    """Draws the random numbers again that were drawn from a state on; others, where there is none."""
    if state is None:
        yield
        return
    on_cpu, on_device = state
    with torch.random.fork_rng([] if on_device is None else [device], device_type=device.type):
        torch.set_rng_state(on_cpu)
        if on_device is not None:
            torch.get_device_module(device).set_rng_state(on_device, device)
        yield


def find_cutting(
    models: Sequence[nn.Module], max_tokens: int | None, shares: bool, sharded: bool = False, check: bool = True
) -> Cutting:
    """Which responses models can run in pieces.

    Args:
        models: Policy and, where it is a model of its own, reference, after `prepare`.
        max_tokens: Most tokens of a forward; None: there are no pieces.
        shares: What `prepare` returned.
        sharded: Whether processes share weights, of which each forward takes all.
        check: Hold the log-probs of a short row in pieces against those of the row whole.
    """
    if max_tokens is None:
        return WHOLE
    if not shares:
        return Cutting(0, "rows are padded, and a padded row keeps no keys")
    if sharded:
        return Cutting(0, "all processes that weights are sharded over must run the same forwards")
    for model in models if check else ():
        if reason := _wrong_in_pieces(model):
            return Cutting(0, f"in pieces {reason}")
    # Rows as long are padded by `trl_nca.head`.
    longest = min(longest_shared(length_dependent(model)) for model in models)
    return Cutting(longest - 1, f"from {longest} tokens on a row's length decides how its positions are turned")


def _wrong_in_pieces(model: nn.Module) -> str | None:
    """How a model's log-probs in pieces differ from those of a row whole; None: they do not."""
    batch = long_response(model)
    if batch["layout"].longest >= longest_shared(length_dependent(model)):  # so short are no model's rows but a test's
        return None
    with torch.no_grad(), evaluating(model):
        whole = response_logps(model, batch, True)
        try:
            in_pieces, _ = run_in_order(
                lambda piece: response_logps(model, piece, True), cut(batch | {"num_pieces": 3})
            )
        except Exception as error:  # whatever a family's code says of a row that it does not expect
            return f"{type(error).__name__}: {error}"
        return compare_pieces(model, in_pieces, whole)
