"""Rows by length: a shuffle that depends on seed and epoch alone, the longest row first."""

import random
import statistics

from tests.trainers import assert_same_curve, logged, make_trainer, reward_rows, run
from trl_nca.sampler import SeededLengthSampler

LENGTHS = random.Random(0).choices(range(10, 1000), k=500)


def orders(seed, epochs=(0, 1)):
    sampler = SeededLengthSampler(LENGTHS, 4, seed)
    for epoch in epochs:
        sampler.set_epoch(epoch)
        yield list(sampler)


def test_every_row_once_and_the_longest_first():
    for order in orders(3):
        assert sorted(order) == list(range(500))
        assert LENGTHS[order[0]] == max(LENGTHS)


def test_neighbours_have_like_length():
    (order,) = orders(3, epochs=(0,))

    def spread(order):
        return statistics.mean(abs(LENGTHS[a] - LENGTHS[b]) for a, b in zip(order, order[1:], strict=False))

    assert spread(order) < spread(list(range(500))) / 10


def test_the_order_is_a_matter_of_seed_and_epoch():
    first, second = orders(3)
    assert first != second
    assert next(orders(3)) == first
    assert list(orders(3, epochs=(1,))) == [second], "epoch 1 does not depend on epoch 0 having been drawn"
    assert next(orders(4)) != first


def test_training_by_length(tmp_path):
    rows, settings = reward_rows(20), {"train_sampling_strategy": "group_by_length", "max_steps": 8}
    whole = run(tmp_path, rows, **settings)
    assert_same_curve(whole, run(tmp_path, rows, **settings))
    ones = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert_same_curve(whole, run(tmp_path, rows, **settings, **ones))
    assert whole[0] != run(tmp_path, rows, **settings | {"seed": 8})[0]


def test_resumed_in_the_second_epoch_equals_uninterrupted(tmp_path):
    rows = reward_rows(20)
    settings = {"train_sampling_strategy": "group_by_length", "save_strategy": "steps", "save_steps": 7, "max_steps": 9}
    whole = make_trainer(tmp_path / "a", rows, **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "b", rows, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-7"))
    assert logged(resumed) == logged(whole)


def test_rows_that_come_tokenized_are_measured(tmp_path):
    tokenized = make_trainer(tmp_path, reward_rows(8)).train_dataset
    trainer = make_trainer(tmp_path, tokenized.remove_columns("length"), train_sampling_strategy="group_by_length")
    assert trainer.train_dataset["length"][:] == tokenized["length"][:]
    trainer.train()
