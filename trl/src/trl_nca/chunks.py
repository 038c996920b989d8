"""Batches of any K in bounded memory: a forward of a few responses at a time, with the exact gradient.

Legend: B prompts, K responses. A batch is that of `GroupCollator`, a chunk a part of it with the same keys and shapes.
"""

from collections import Counter
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_nca.layout import Branch, GroupLayout, cut_path, to_device
from trl_nca.logps import Batch
from trl_nca.pieces import WHOLE, Cutting, LogpsFn, RandomState, cut, replayed, run_in_order


@dataclass(frozen=True)
class NumForwards:
    """How many forwards a batch takes.

    Args:
        chunks: Those that are back-propagated.
        before: Those of chunks that are run without gradient before.
    """

    chunks: int = 0
    before: int = 0


#: Where there is one process, or each takes its own time.
NO_MORE = NumForwards()


def split_batch(
    batch: Batch, max_tokens: int | None, shared_prompt: bool = True, cutting: Cutting = WHOLE
) -> list[Batch]:
    """Cuts a batch into chunks of at most `max_tokens` tokens.

    A group that fits a chunk is not split. One that does not is divided over as many as it needs, each behind a copy
    of the prompt. A single response that is too long, with its prompt, is a chunk of its own, which is run in pieces
    where it can be.

    Args:
        batch: Packed groups.
        max_tokens: Most tokens of a forward; None for no bound.
        shared_prompt: Whether a prompt counts once for the responses in a chunk, or for each.
        cutting: Which responses are run in pieces: `num_pieces` says in how many a chunk is.

    Returns:
        Chunks in which prompts and responses of other chunks have length 0 and mask False, so that log-probs of
        the chunks, shape (B, K) each, add up to those of the batch.

    Example:
        >>> from trl_nca.collate import GroupCollator
        >>> row = {"prompt_ids": [1, 2, 3], "response_ids": [[4, 5], [6], [7, 8]], "scores": [2, 1, 0]}
        >>> batch = GroupCollator()([row])
        >>> [chunk["layout"].response_lengths for chunk in split_batch(batch, max_tokens=5)]
        [[[2, 1, 0]], [[0, 0, 2]]]
        >>> [chunk["input_ids"].tolist() for chunk in split_batch(batch, max_tokens=5)]
        [[[1, 2, 3, 4, 3]], [[1, 2, 3, 7]]]
    """
    chunks = _plan_chunks(batch["layout"], max_tokens, shared_prompt)
    selected = [batch] if len(chunks) == 1 else [_select(batch, set(chunk)) for chunk in chunks]
    return [cutting.mark(chunk, max_tokens) for chunk in selected]


def count_forwards(batch: Batch, max_tokens: int | None, shared_prompt: bool, separable: bool) -> NumForwards:
    """Forwards of a batch that `split_batch` cuts, as `logps_for_training` runs them. For the arguments see there."""
    chunks = _plan_chunks(batch["layout"], max_tokens, shared_prompt)
    before = [] if separable else _with_split_groups([{b for b, _ in chunk} for chunk in chunks])
    return NumForwards(len(chunks), len(before))


def _plan_chunks(layout: GroupLayout, max_tokens: int | None, shared_prompt: bool) -> list[list[tuple[int, int]]]:
    """The responses (b, k) of each chunk."""
    chunks: list[list[tuple[int, int]]] = [[]]
    used = 0
    most = float("inf") if max_tokens is None else max_tokens
    for b, (context, lengths) in enumerate(zip(layout.context_lengths, layout.response_lengths, strict=True)):
        real = [k for k, length in enumerate(lengths) if length]

        def cost(k: int, before: Sequence[int], b: int = b, context: int = context) -> int:
            """Tokens that a response adds to a chunk that has others of its prompt."""
            branch = _branch(layout, b, k, before) if shared_prompt else None
            shared = branch[1] if branch else 0
            return layout.response_lengths[b][k] - shared + (0 if shared_prompt and before else context)

        whole = sum(cost(k, real[:i]) for i, k in enumerate(real))
        if used and used + whole > most:
            chunks.append([])
            used = 0
        before: list[int] = []
        for k in real:
            if used and used + cost(k, before) > most:
                chunks.append([])
                used, before = 0, []
            used += cost(k, before)
            chunks[-1].append((b, k))
            before.append(k)
    return chunks


def _branch(layout: GroupLayout, b: int, k: int, chosen: Container[int]) -> Branch | None:
    """What a response goes on from, in a chunk with these responses of its prompt.

    They are neighbours: if what it goes on from is in another chunk, so is all that this one goes on from.
    """
    branch = layout.branch(b, k)
    return branch if branch and branch[0] in chosen else None


def _select(batch: Batch, chosen: set[tuple[int, int]]) -> Batch:
    """The chunk with these responses (b, k), and the contexts of their prompts."""
    layout: GroupLayout = batch["layout"]
    prompts = {b for b, _ in chosen}
    lengths = [
        [length if (b, k) in chosen else 0 for k, length in enumerate(row)]
        for b, row in enumerate(layout.response_lengths)
    ]
    tokens, targets = [], []  # slices of the T tokens, and of the R targets
    num_targets = 0
    branches: list[list[Branch | None]] = [[None] * len(row) for row in lengths]
    for b, ((context, _), paths) in enumerate(zip(layout.groups, layout.paths, strict=True)):
        tokens += [context] if b in prompts else []
        real = (k for k, length in enumerate(layout.response_lengths[b]) if length)
        of_prompt = {k for k, length in enumerate(lengths[b]) if length}
        for k, path in zip(real, paths, strict=True):
            start, num_targets = num_targets, num_targets + layout.num_targets[b][k]
            if k in of_prompt:
                branches[b][k] = branch = _branch(layout, b, k, of_prompt)
                tokens += cut_path(path, branch[1] if branch else 0, lengths[b][k])
                targets.append(slice(start, num_targets))
    mask = torch.tensor([[length > 0 for length in row] for row in lengths])  # (B, K)
    contexts = [length if b in prompts else 0 for b, length in enumerate(layout.context_lengths)]
    scored = layout.scored and [
        [spans if (b, k) in chosen else [] for k, spans in enumerate(row)] for b, row in enumerate(layout.scored)
    ]
    of_targets = {key: batch[key] for key in ("targets", "token_weights") if key in batch}
    return batch | {
        "response_mask": to_device(mask, batch["response_mask"].device),
        "input_ids": torch.cat([batch["input_ids"][:, part] for part in tokens], dim=1),
        "position_ids": torch.cat([batch["position_ids"][:, part] for part in tokens], dim=1),
        **{key: torch.cat([values[part] for part in targets]) for key, values in of_targets.items()},
        "layout": GroupLayout(contexts, lengths, layout.device, scored, branches if layout.branches else None),
    }


def logps_without_gradient(
    logps_fn: LogpsFn,
    chunks: list[Batch],
    at_least: NumForwards = NO_MORE,
) -> Tensor:
    """Log-probs of a batch that is run in chunks. Shape (B, K). For the arguments see `logps_for_training`."""
    logps = torch.zeros_like(chunks[0]["response_mask"], dtype=torch.float32)
    for chunk in _with_idle_chunks(chunks, at_least):
        logps = _fill(logps, chunk, run_in_order(logps_fn, cut(chunk))[0])
    return logps


def logps_for_training(
    logps_fn: LogpsFn,
    chunks: list[Batch],
    separable: bool,
    backward: Callable[[Tensor], None],
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
    at_least: NumForwards = NO_MORE,
) -> Tensor:
    r"""Log-probs of a batch that is run in chunks, all but the last of which have already been back-propagated.

    The derivative of the loss by a response's log-prob is known as soon as those it depends on are: its own, where the
    loss separates over the responses (NCA: \(\sigma(r_i)/K - w_i \sigma(-r_i)\)), or those of its group (InfoNCA:
    \(\mathrm{softmax}(r)_i - w_i\)). So each chunk is run, back-propagated and let go. Only a chunk with a part of a
    group whose loss does not separate is run once before, without gradient and with the same dropout.

    Args:
        logps_fn: Log-probs of a chunk.
        chunks: From `split_batch`.
        separable: Whether the loss of a prompt is a sum over its responses.
        backward: Takes log-probs, shape (B, K), and back-propagates their loss.
        no_sync: A context in which gradients are accumulated and not exchanged between processes.
        at_least: Forwards to run, idle ones if need be: those of the process that needs most, where weights are
            sharded, which all processes gather or none.

    Returns:
        Log-probs of the whole batch, shape (B, K). Gradients flow to the last chunk: back-propagating the loss of these
        completes the gradient.
    """
    groups = [{b for b, row in enumerate(chunk["layout"].response_lengths) if any(row)} for chunk in chunks]
    first = [] if separable else _with_split_groups(groups)
    chunks = _with_idle_chunks(chunks, at_least)
    first += [len(chunks) - 1] * (at_least.before - len(first))
    logps = torch.zeros_like(chunks[0]["response_mask"], dtype=torch.float32)  # (B, K)
    drawn: dict[int, list[RandomState]] = {}
    for i in first:
        of_chunk, drawn[i] = run_in_order(logps_fn, cut(chunks[i]))
        logps = _fill(logps, chunks[i], of_chunk)
    for i, chunk in enumerate(chunks):
        pieces = cut(chunk)
        # Nothing looks at the keys of the last piece, which is run next.
        total, states = run_in_order(logps_fn, pieces[:-1], drawn.get(i, ()))
        for j in reversed(range(len(pieces))):
            is_last = i == len(chunks) - 1 and j == 0
            with nullcontext() if is_last else no_sync():
                with replayed(states[j] if j < len(states) else None, logps.device):
                    of_piece = logps_fn(pieces[j])
                total = total + of_piece.detach() if j == len(pieces) - 1 else total
                logps = _fill(logps, chunk, _at(total, of_piece) if len(pieces) > 1 else of_piece)
                if not is_last:
                    backward(logps)
                    logps = logps.detach()
                    del of_piece  # whose graph refers to the store of keys
    return logps


def _fill(logps: Tensor, chunk: Batch, of_chunk: Tensor) -> Tensor:
    """Log-probs with those of a chunk filled in. Shape (B, K)."""
    return torch.where(chunk["response_mask"], of_chunk, logps)


def _at(total: Tensor, part: Tensor) -> Tensor:
    """A sum, with the gradient of one of its terms alone."""
    return total + (part - part.detach())


def _with_idle_chunks(chunks: list[Batch], at_least: NumForwards) -> list[Batch]:
    """Repeats the last chunk, with no response that counts, until there are as many as on the other processes."""
    idle = chunks[-1] | {"response_mask": torch.zeros_like(chunks[-1]["response_mask"])}
    return chunks + [idle] * (at_least.chunks - len(chunks))


def _with_split_groups(groups: Sequence[set[int]]) -> list[int]:
    """Which chunks hold a part of a group whose other responses are in other chunks, of the groups in each chunk."""
    num_chunks = Counter(b for chunk in groups for b in chunk)
    return [i for i, chunk in enumerate(groups) if any(num_chunks[b] > 1 for b in chunk)]
