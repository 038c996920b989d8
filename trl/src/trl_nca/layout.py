"""Where each prompt's context and its responses lie in the packed row of a batch.

Legend: B prompts, K responses (the largest of the batch), T packed tokens, R response tokens that count.
`GroupCollator` says what belongs to a context and to a response.

Lengths are Python numbers, known where a batch is made. So nobody asks the device for them, which would wait for all
that it has still to do; what is derived from them goes to the device with the batch.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trl_nca.keys import KeyStore

#: Spans of a response's tokens: where each begins, and where it ends.
Spans = Sequence[tuple[int, int]]
#: A response of the same prompt, by its index among the K, and how many of its positions another goes on from.
Branch = tuple[int, int]


@dataclass(frozen=True)
class GroupLayout:
    """The lengths of a batch's groups, and what attention and the LM head need of them.

    Args:
        context_lengths: Tokens of each prompt but its last. B numbers.
        response_lengths: Tokens of each response, 0 where it is padded or elsewhere. B times K numbers.
        device: Where the tokens, and the tensors below, are.
        scored: Which of a response's tokens count: for each of the B times K the spans. None: all of all.
        branches: Where a response begins as another of its prompt does: for each of the B times K the other one, which
            stands before it, and how many positions of it are run for both; or None. None: nowhere.
        start: Of a piece of a response with its context: tokens of these that were run before.
        store: Of a piece: their keys and values.
    """

    context_lengths: Sequence[int]
    response_lengths: Sequence[Sequence[int]]
    device: torch.device = torch.device("cpu")
    scored: Sequence[Sequence[Spans]] | None = None
    branches: Sequence[Sequence[Branch | None]] | None = None
    start: int = 0
    store: KeyStore | None = None

    @classmethod
    def of(cls, context_lengths: Tensor, response_lengths: Tensor) -> "GroupLayout":
        """From lengths that are tensors, of shapes (B,) and (B, K), on their device.

        Example:
            >>> GroupLayout.of(torch.tensor([2]), torch.tensor([[3, 1, 0]])).groups
            [(slice(0, 2, None), [slice(2, 5, None), slice(5, 6, None)])]
        """
        return cls(context_lengths.tolist(), response_lengths.tolist(), context_lengths.device)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "GroupLayout":
        """The layout for tokens on a device. accelerate moves it there with the tensors of its batch."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:  # accelerate's one GPU; its tensors say which it is
            device = torch.device("cuda", torch.cuda.current_device())
        return self if device == self.device else replace(self, device=device)

    def repeat(self, times: int) -> "GroupLayout":
        """The layout of the same groups several times over."""
        return replace(
            self,
            context_lengths=[*self.context_lengths] * times,
            response_lengths=[*self.response_lengths] * times,
            scored=None if self.scored is None else [*self.scored] * times,
            branches=None if self.branches is None else [*self.branches] * times,
        )

    @functools.cached_property
    def groups(self) -> list[tuple[slice, list[slice]]]:
        """For each prompt the slice of the T tokens that holds its context, and the slices of its real responses.

        Of a response that goes on from another it is what it runs itself.
        """
        groups, start = [], 0
        for b, (context_length, lengths) in enumerate(zip(self.context_lengths, self.response_lengths, strict=True)):
            context = slice(start, start + context_length)
            responses, start = [], context.stop
            for k, length in enumerate(lengths):
                if length:
                    branch = self.branch(b, k)
                    responses.append(slice(start, start + length - (branch[1] if branch else 0)))
                    start = responses[-1].stop
            groups.append((context, responses))
        return groups

    def branch(self, b: int, k: int) -> Branch | None:
        """What response k of prompt b goes on from; None: from its context."""
        return self.branches[b][k] if self.branches else None

    @functools.cached_property
    def paths(self) -> list[list[list[slice]]]:
        """For each prompt's real responses, in the order of `groups`, the slices of the T tokens that hold them.

        The last of them is what the response runs itself; those before it are of responses that it goes on from.

        Example:
            >>> GroupLayout([2], [[3, 3]], branches=[[None, (0, 2)]]).paths
            [[[slice(2, 5, None)], [slice(2, 4, None), slice(5, 6, None)]]]
        """
        paths = []
        for b, ((_, responses), lengths) in enumerate(zip(self.groups, self.response_lengths, strict=True)):
            of_prompt: dict[int, list[slice]] = {}
            real = (k for k, length in enumerate(lengths) if length)
            for k, own in zip(real, responses, strict=True):
                branch = self.branch(b, k)
                of_prompt[k] = [*(cut_path(of_prompt[branch[0]], 0, branch[1]) if branch else []), own]
            paths.append([*of_prompt.values()])
        return paths

    @functools.cached_property
    def seen_before(self) -> list[tuple[slice, slice]]:
        """Queries, and keys before them that all of them see: contexts, and what responses go on from.

        Example:
            >>> GroupLayout([2], [[3, 3]], branches=[[None, (0, 2)]]).seen_before
            [(slice(2, 6, None), slice(0, 2, None)), (slice(5, 6, None), slice(2, 4, None))]
        """
        seen = []
        for (context, responses), paths in zip(self.groups, self.paths, strict=True):
            if responses and context.stop > context.start:
                seen.append((slice(responses[0].start, responses[-1].stop), context))
            seen += [(own, before) for *path, own in paths for before in path]
        return seen

    @functools.cached_property
    def num_tokens(self) -> int:
        """T."""
        stops: list[int] = [part.stop for context, responses in self.groups for part in (context, *responses)]
        return max(stops)

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest context with a response, those before a piece among them."""
        pairs = zip(self.context_lengths, self.response_lengths, strict=True)
        return self.start + max(context + max(responses, default=0) for context, responses in pairs)

    @functools.cached_property
    def spans(self) -> list[list[Spans]]:
        """Which tokens count of each prompt's real responses, in the order of `groups`.

        Example:
            >>> GroupLayout([2], [[3, 0, 1]]).spans
            [[[(0, 3)], [(0, 1)]]]
        """
        return [
            [self.scored[b][k] if self.scored else [(0, length)] for k, length in enumerate(lengths) if length]
            for b, lengths in enumerate(self.response_lengths)
        ]

    @functools.cached_property
    def num_targets(self) -> Sequence[Sequence[int]]:
        """Tokens of each response that count. B times K numbers."""
        if self.scored is None:
            return self.response_lengths
        return [[sum(stop - start for start, stop in spans) for spans in row] for row in self.scored]

    @functools.cached_property
    def target_positions(self) -> Tensor:
        """Positions in the packed row that predict the response tokens that count. Shape (R,)."""
        parts: list[slice] = []
        for paths, spans in zip(self.paths, self.spans, strict=True):
            for path, of_it in zip(paths, spans, strict=True):
                for start, stop in of_it:
                    parts += cut_path(path, start, stop)
        return self._on_device([torch.arange(part.start, part.stop) for part in parts])

    @functools.cached_property
    def response_index(self) -> Tensor:
        """The response, as b * K + k, that each response token that counts belongs to. Shape (R,)."""
        counts = torch.tensor([count for counts in self.num_targets for count in counts])  # (B * K,)
        return self._on_device([torch.arange(len(counts)).repeat_interleave(counts)])

    @functools.cached_property
    def sequences(self) -> tuple[Tensor | slice, Tensor, Tensor, int, int]:
        """The row as sequences of queries, contexts and responses in turn, each with keys of its own.

        Returns:
            The keys of all sequences, as positions in the row (of a piece, one sequence, all there are); where each
            sequence's queries and its keys begin, and the last one's end, int32; the largest number of queries and of
            keys of a sequence.

        Example:
            >>> keys, query_starts, key_starts, *largest = GroupLayout([2], [[3, 1]]).sequences
            >>> keys
            tensor([0, 1, 0, 1, 2, 3, 4, 0, 1, 5])
            >>> query_starts.tolist(), key_starts.tolist(), largest
            ([0, 2, 5, 6], [0, 2, 7, 10], [3, 5])
        """
        parts: list[tuple[int, Tensor]] = []  # number of queries, and keys
        for (context, responses), paths in [] if self.store is not None else zip(self.groups, self.paths, strict=True):
            parts += [(context.stop - context.start, _indices([context]))] if context.stop > context.start else []
            parts += [(r.stop - r.start, _indices([context, *path])) for r, path in zip(responses, paths, strict=True)]
        keys = [keys for _, keys in parts]
        num_queries, num_keys = [n for n, _ in parts], [len(k) for k in keys]
        if self.store is not None:
            num_queries, num_keys = [self.num_tokens], [self.start + self.num_tokens]
        query_starts, key_starts = (
            self._on_device([torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32)])
            for n in (num_queries, num_keys)
        )
        taken = slice(None) if self.store is not None else self._on_device(keys)
        return taken, query_starts, key_starts, max(num_queries), max(num_keys)

    def _on_device(self, parts: list[Tensor]) -> Tensor:
        joined = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)
        return to_device(joined, self.device)


def cut_path(path: Sequence[slice], start: int, stop: int) -> list[slice]:
    """The part of a path from one of its positions to another.

    Example:
        >>> cut_path([slice(10, 13), slice(20, 25)], 2, 5)
        [slice(12, 13, None), slice(20, 22, None)]
    """
    parts = []
    for piece in path:
        first, last = max(piece.start, piece.start + start), min(piece.stop, piece.start + stop)
        parts += [slice(first, last)] if first < last else []
        start, stop = start - (piece.stop - piece.start), stop - (piece.stop - piece.start)
    return parts


def _indices(parts: Sequence[slice]) -> Tensor:
    return torch.cat([torch.arange(part.start, part.stop) for part in parts])


def padded_inputs(tokens: Tensor, layout: GroupLayout) -> dict[str, Any]:
    """One row a response, each behind its own copy of the context, padded on the right: no token sees another row.

    Args:
        tokens: The packed tokens. Shape (T,).
        layout: Where groups lie in them.

    Returns:
        A model's `input_ids` and `attention_mask`, of shape (N, L) for N responses, the longest of L tokens with its
        context; `row_length`, L; and `positions`, shape (R,), of the tokens in the flattened rows that predict the
        targets. (The positions that a family gives such rows by itself are right.)

    Example:
        >>> inputs = padded_inputs(torch.tensor([1, 2, 3, 2, 6, 7]), GroupLayout([1, 0], [[2, 1], [2]]))
        >>> inputs["input_ids"]
        tensor([[1, 2, 3],
                [1, 2, 0],
                [6, 7, 0]])
        >>> inputs["positions"]
        tensor([1, 2, 4, 6, 7])
    """
    pairs = [(c, path) for (c, _), paths in zip(layout.groups, layout.paths, strict=True) for path in paths]
    rows = [torch.cat([tokens[part] for part in (context, *path)]) for context, path in pairs]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=-1)  # (N, L)
    longest = input_ids.shape[1]
    # Known from the lengths: to look for them would wait for the device.
    starts = [n * longest + context.stop - context.start for n, (context, _) in enumerate(pairs)]
    spans = itertools.chain.from_iterable(layout.spans)
    scored = [slice(at + first, at + stop) for at, of_it in zip(starts, spans, strict=True) for first, stop in of_it]
    return {
        "input_ids": input_ids.clamp(min=0),
        "attention_mask": (input_ids >= 0).long(),
        "row_length": longest,
        "positions": to_device(_indices(scored), tokens.device),
    }


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device, without waiting for it: from pinned memory alone are copies of any size so."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
