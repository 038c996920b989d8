"""How messages lie in Arrow: plain turns as two columns, what else a turn has as JSON text beside them.

`datasets.Json` would read numbers beyond 64 bits as text, and a response "7" as a number.
"""

import json
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.features.features import register_feature

from alignment.data.row import Messages

#: Begins what is stored of a response that is no text.
_MARK = "\x00messages:"


@dataclass
class StoredMessages:
    """The type of a column whose values are messages."""

    id: str | None = field(default=None, repr=False)
    pa_type: ClassVar[Any] = pa.list_(
        pa.struct({"role": pa.string(), "content": pa.string(), "others": pa.string()})  # null for a plain turn
    )
    _type: str = field(default="StoredMessages", init=False, repr=False)

    def __call__(self) -> Any:
        """The type in Arrow."""
        return self.pa_type

    def encode_example(self, value: Messages) -> list[dict[str, str | None]]:
        """Messages as they are stored."""
        return [
            {"role": turn["role"], "content": turn["content"], "others": _others(turn) if len(turn) > 2 else None}
            for turn in value
        ]

    def decode_example(self, value: list[dict[str, Any]], token_per_repo_id: Any = None) -> Messages:
        """The messages of what was stored."""
        return [
            {"role": turn["role"], "content": turn["content"], **(json.loads(turn["others"]) if turn["others"] else {})}
            for turn in value
        ]


@dataclass
class StoredResponses:
    """The type of a column whose values are lists of responses, each a text or messages."""

    id: str | None = field(default=None, repr=False)
    pa_type: ClassVar[Any] = pa.list_(pa.string())
    _type: str = field(default="StoredResponses", init=False, repr=False)

    def __call__(self) -> Any:
        """The type in Arrow."""
        return self.pa_type

    def encode_example(self, value: list[str | Messages]) -> list[str]:
        """Responses as they are stored."""
        return [
            response if isinstance(response, str) and not response.startswith(_MARK) else _MARK + json.dumps(response)
            for response in value
        ]

    def decode_example(self, value: list[str], token_per_repo_id: Any = None) -> list[str | Messages]:
        """The responses of what was stored."""
        return [decoded(response) for response in value]


def decoded(stored: str) -> str | Messages:
    """A response of what is stored of it."""
    return json.loads(stored.removeprefix(_MARK)) if stored.startswith(_MARK) else stored


def has_messages(responses: pa.Array) -> np.ndarray:
    """Whether rows have a response that is no text.

    Args:
        responses: The column as it is stored. Shape (N,).
    """
    found = np.zeros(len(responses), dtype=bool)
    rows = pc.list_parent_indices(responses).to_numpy(zero_copy_only=False)
    found[rows[are_messages(responses.flatten())]] = True
    return found


def are_messages(stored: pa.Array) -> np.ndarray:
    """Which responses, as they are stored, are no text. Shape (N,)."""
    return pc.starts_with(stored, _MARK).to_numpy(zero_copy_only=False)


def has_more_than_text(prompts: pa.Array) -> np.ndarray:
    """Whether rows have a prompt with calls, their results or reasoning.

    Args:
        prompts: The column as it is stored. Shape (N,).
    """
    found = np.zeros(len(prompts), dtype=bool)
    rows = pc.list_parent_indices(prompts).to_numpy(zero_copy_only=False)
    found[rows[pc.is_valid(prompts.flatten().field("others")).to_numpy(zero_copy_only=False)]] = True
    return found


def _others(turn: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in turn.items() if key not in ("role", "content")})


with warnings.catch_warnings():  # says that it is experimental
    warnings.simplefilter("ignore")
    register_feature(StoredMessages, "StoredMessages")
    register_feature(StoredResponses, "StoredResponses")
