"""The order of the training rows: groups of similar length share a batch."""

from collections.abc import Iterator

import torch
from datasets import Dataset
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler


class SeededLengthSampler(LengthGroupedSampler):
    """Shuffled rows in which neighbours have similar length, the longest of all first.

    Upstream's order, drawn from a generator of its own: it depends on seed and epoch alone, so a resumed run sees the
    rows that an uninterrupted one does.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows that should have similar length: the global batch.
        seed: Seeds the shuffle.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = list(super().__iter__())
        self.generator = None
        return iter(order)


def group_by_length(dataset: Dataset, args: TrainingArguments) -> SeededLengthSampler:
    """The sampler of rows with a `length`, for the global batch and the seed of a Trainer's arguments."""
    global_batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return SeededLengthSampler(
        dataset["length"][:], global_batch, args.seed if args.data_seed is None else args.data_seed
    )
