"""Batches of any K in bounded memory: runs of a few responses at a time, with the exact gradient.

Legend: B prompts, K responses. A batch is that of `GroupCollator`, a chunk a part of it with the same keys and shapes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from trl_nca.logps import Batch

Run = Callable[[Batch], Tensor]
Agree = Callable[[int], int]


def split_batch(batch: Batch, max_tokens: int | None, shared_prompt: bool = True) -> list[Batch]:
    """Cuts a batch into chunks of at most `max_tokens` tokens.

    A group that fits a chunk is not split. One that does not is spread over as many as it needs, each behind a copy
    of the prompt. A single response that is too long, with its prompt, is a chunk of its own.

    Args:
        batch: Packed groups.
        max_tokens: Most tokens of a forward; None for no bound.
        shared_prompt: Whether a prompt counts once for the responses in a chunk, or for each.

    Returns:
        Chunks in which prompts and responses that are elsewhere have length 0 and mask False, so that log-probs of
        the chunks, shape (B, K) each, add up to those of the batch.

    Example:
        >>> from trl_nca.collate import GroupCollator
        >>> row = {"prompt_ids": [1, 2, 3], "response_ids": [[4, 5], [6], [7, 8]], "scores": [2, 1, 0]}
        >>> batch = GroupCollator()([row])
        >>> [chunk["response_lengths"].tolist() for chunk in split_batch(batch, max_tokens=5)]
        [[[2, 1, 0]], [[0, 0, 2]]]
        >>> [chunk["input_ids"].tolist() for chunk in split_batch(batch, max_tokens=5)]
        [[[1, 2, 3, 4, 3]], [[1, 2, 3, 7]]]
    """
    if max_tokens is None:
        return [batch]
    owners: list[list[tuple[int, int]]] = [[]]  # the responses (b, k) of each chunk
    used = 0
    for b, (context, lengths) in enumerate(
        zip(batch["context_lengths"].tolist(), batch["response_lengths"].tolist(), strict=True)
    ):
        real = [k for k, length in enumerate(lengths) if length]
        whole = sum(lengths) + context * (1 if shared_prompt else len(real))
        if used and used + whole > max_tokens:
            owners.append([])
            used = 0
        for k in real:
            has_prompt = shared_prompt and bool(owners[-1]) and owners[-1][-1][0] == b
            cost = lengths[k] + (0 if has_prompt else context)
            if used and used + cost > max_tokens:
                owners.append([])
                used, cost = 0, lengths[k] + context
            owners[-1].append((b, k))
            used += cost
    if len(owners) == 1:
        return [batch]
    return [_part(batch, chunk) for chunk in owners]


def _part(batch: Batch, owners: list[tuple[int, int]]) -> Batch:
    """The chunk that holds these responses (b, k), and the contexts of their prompts."""
    device = batch["scores"].device
    chosen = torch.zeros_like(batch["response_mask"], device="cpu")
    chosen[tuple(torch.tensor(owners).T)] = True
    chosen = chosen.to(device)  # (B, K)
    has_prompt = chosen.any(dim=1)  # (B,)
    lengths = batch["response_lengths"]
    segments = torch.cat([batch["context_lengths"][:, None], lengths], dim=1)  # (B, 1 + K)
    tokens = torch.cat([has_prompt[:, None], chosen], dim=1).flatten().repeat_interleave(segments.flatten())  # (T,)
    return batch | {
        "response_mask": chosen,
        "context_lengths": batch["context_lengths"] * has_prompt,
        "response_lengths": lengths * chosen,
        "input_ids": batch["input_ids"][:, tokens],
        "position_ids": batch["position_ids"][:, tokens],
        "targets": batch["targets"][chosen.flatten().repeat_interleave(lengths.flatten())],
    }


def logps_without_gradient(run: Run, chunks: list[Batch], agree: Agree = int) -> Tensor:
    """Log-probs of a batch run in chunks. Shape (B, K). For the arguments see `logps_for_training`."""
    with torch.no_grad():
        logps = torch.zeros_like(chunks[0]["response_mask"], dtype=torch.float32)
        for chunk in _level(chunks, agree):
            logps = _fill(logps, run, chunk)
    return logps


def logps_for_training(
    run: Run,
    chunks: list[Batch],
    separable: bool,
    backward: Callable[[Tensor], None],
    deferred: Callable[[], AbstractContextManager[None]] = nullcontext,
    agree: Agree = int,
) -> Tensor:
    r"""Log-probs of a batch run in chunks, with the gradient of all chunks but the last already spent.

    The derivative of the loss by a response's log-prob is known as soon as those it depends on are: its own, where the
    loss separates over the responses (NCA: \(\sigma(r_i)/K - w_i \sigma(-r_i)\)), or those of its group (InfoNCA:
    \(\mathrm{softmax}(r)_i - w_i\)). So each chunk is run, back-propagated and let go. Only a chunk with a part of a
    group whose loss does not separate is run once before, without gradient and with the same dropout.

    Args:
        run: Log-probs of a chunk, shape (B, K), 0 for responses that are elsewhere.
        chunks: From `split_batch`.
        separable: Whether the loss of a prompt is a sum over its responses.
        backward: Takes log-probs, shape (B, K), and back-propagates their loss.
        deferred: A context in which gradients are summed up and not synchronised between processes.
        agree: The largest of a number over all processes, where all must run the same number of times.

    Returns:
        Log-probs of the whole batch, shape (B, K). Gradients flow to the last chunk: back-propagating the loss of these
        completes the gradient.
    """
    chunks = _level(chunks, agree)
    real = torch.stack([chunk["response_mask"] for chunk in chunks]).any(dim=0)  # (B, K)
    first = [] if separable else [i for i, chunk in enumerate(chunks) if _splits_a_group(chunk, real)]
    first += [len(chunks) - 1] * (agree(len(first)) - len(first))
    states = {}
    with torch.no_grad():
        logps = real.new_zeros(real.shape, dtype=torch.float32)
        for i in first:
            states[i] = _random_state(real.device)
            logps = _fill(logps, run, chunks[i])
    for i, chunk in enumerate(chunks[:-1]):
        with deferred():
            with _replayed(states.get(i), real.device):
                logps = _fill(logps, run, chunk)
            backward(logps)
        logps = logps.detach()
    with _replayed(states.get(len(chunks) - 1), real.device):
        return _fill(logps, run, chunks[-1])


def _fill(logps: Tensor, run: Run, chunk: Batch) -> Tensor:
    """Log-probs with those of a chunk filled in. Shape (B, K)."""
    return torch.where(chunk["response_mask"], run(chunk), logps)


def _level(chunks: list[Batch], agree: Agree) -> list[Batch]:
    """As many chunks on every process, some run for nothing: sharded weights are gathered by all processes or none."""
    idle = chunks[-1] | {"response_mask": torch.zeros_like(chunks[-1]["response_mask"])}
    return chunks + [idle] * (agree(len(chunks)) - len(chunks))


def _splits_a_group(chunk: Batch, real: Tensor) -> bool:
    here = chunk["response_mask"]  # (B, K)
    return bool((here.any(dim=1) & (here != real).any(dim=1)).any())


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), on_device


@contextmanager
def _replayed(state: tuple[Tensor, Tensor | None] | None, device: torch.device) -> Iterator[None]:
    """Draws the random numbers again that were drawn after `_random_state`; none, where there is no state."""
    if state is None:
        yield
        return
    on_cpu, on_device = state
    with torch.random.fork_rng([] if on_device is None else [device], device_type=device.type):
        torch.set_rng_state(on_cpu)
        if on_device is not None:
            torch.get_device_module(device).set_rng_state(on_device, device)
        yield
