"""Tiny random models, a small tokenizer, and rows of random token ids."""

import random
from typing import Any

from benchmarks.tiny import CHATML, SIZES, save_tiny_model, tiny_config, tiny_tokenizer

__all__ = ["CHATML", "SHAPES", "SIZES", "rows_of", "save_tiny_model", "tiny_config", "tiny_tokenizer"]

SHAPES = [(7, (3, 5, 1)), (1, (4, 9)), (12, (6, 2, 2, 8))]  # of ragged rows, for `rows_of`


def rows_of(shapes: list[tuple[int, tuple[int, ...]]]) -> list[dict[str, Any]]:
    """Tokenized rows of random ids: for each shape, a prompt's length and its responses' lengths."""
    rng = random.Random(0)
    ids = lambda n: [rng.randrange(320) for _ in range(n)]  # noqa: E731
    return [
        {"prompt_ids": ids(p), "response_ids": [ids(n) for n in ns], "scores": [rng.random() for _ in ns]}
        for p, ns in shapes
    ]
