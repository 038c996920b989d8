"""Fits the token ids of a row into the lengths that are allowed, and joins responses that are the same tokens."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trl_nca.rendering.encoding import Encoded
from trl_nca.rendering.messages import RefusedRow

#: What happens to rows by the name of a rule: `fix`, `keep`, or another to drop them.
DEFAULT_ACTIONS = {
    "duplicate_response": "fix",
    "identical_scores": "drop",
    "system_not_rendered": "keep",
    "prompt_not_rendered": "drop",
    "prompt_not_as_sampled": "drop",
    "calls_not_rendered": "drop",
    "over_long": "fix",
}


@dataclass(frozen=True)
class Limits:
    """What a tokenized row must keep to.

    Attributes:
        max_length: Most tokens of prompt + response, or None for no bound. A longer response is cut at its end.
        max_prompt_length: Most tokens of a prompt, or None. A longer prompt loses its beginning (but for the BOS).
        actions: What happens to rows by the name of a rule; the keys of `DEFAULT_ACTIONS`.
        min_responses: A row with fewer different responses is dropped.
    """

    max_length: int | None = None
    max_prompt_length: int | None = None
    actions: Mapping[str, str] = field(default_factory=lambda: DEFAULT_ACTIONS)
    min_responses: int = 2


def fit_row(encoded: Encoded, scores: Sequence[float], bos: int | None, limits: Limits) -> dict[str, Any]:
    """Cuts a row to the limits, and each response behind its last token that counts.

    Args:
        encoded: The row's tokens.
        scores: Of the K responses.
        bos: The tokenizer's BOS, which a prompt that is trimmed keeps.
        limits: What the row must keep to.

    Returns:
        `prompt_ids`, `response_ids`, `token_masks` (None where all tokens count) and `scores`, and what was done:
        `prompt_trimmed`, `responses_cut`, `merged`.

    Raises:
        RefusedRow: It cannot fit, or too little of it is left.
    """
    prompt_ids, response_ids, masks, _ = encoded
    fitted = _fit_prompt(prompt_ids, bos, limits.max_prompt_length)
    room = sys.maxsize if limits.max_length is None else limits.max_length - len(fitted)
    num_cut = sum(len(ids) > room for ids in response_ids)
    is_trimmed = len(fitted) < len(prompt_ids)
    if not fitted:
        raise RefusedRow("empty_prompt", "nothing would predict a response's first token")
    if room < 1:
        raise RefusedRow("prompt_too_long", f"{len(fitted)} tokens, and max_length is {limits.max_length}")
    if not all(response_ids):
        raise RefusedRow("empty_response", f"response {response_ids.index([]) + 1} has no token")
    if (is_trimmed or num_cut) and limits.actions["over_long"] != "fix":
        longest = len(prompt_ids) + max(map(len, response_ids))
        raise RefusedRow("over_long", f"{longest} tokens of prompt and response")
    masks = [_without_tail(mask[:room]) for mask in masks]
    if not all(masks):
        cut = f" in what max_length {limits.max_length} leaves of it" if num_cut else ""
        raise RefusedRow("no_scored_token", f"no token of response {masks.index([]) + 1} counts{cut}")
    responses = [Response((*ids[: len(mask)],), (*mask,)) for ids, mask in zip(response_ids, masks, strict=True)]
    kept, means = _merge_duplicates(responses, scores, limits)
    return {
        "prompt_ids": fitted,
        "response_ids": [[*response.ids] for response in kept],
        "token_masks": None if all(map(all, masks)) else [[*response.mask] for response in kept],
        "scores": means,
        "prompt_trimmed": is_trimmed,
        "responses_cut": num_cut,
        "merged": len(kept) < len(responses),
    }


class Response(NamedTuple):
    """Token ids of a response, and which of them count."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]


def _without_tail(mask: list[bool]) -> list[bool]:
    """A mask up to the last token that counts: what stands behind it predicts nothing."""
    last = next((i for i in reversed(range(len(mask))) if mask[i]), -1)
    return mask[: last + 1]


def _fit_prompt(prompt_ids: list[int], bos: int | None, longest: int | None) -> list[int]:
    if longest is None or len(prompt_ids) <= longest:
        return prompt_ids
    start = prompt_ids[:1] if prompt_ids[0] == bos else []
    kept = longest - len(start)
    return start + prompt_ids[len(prompt_ids) - kept :]


def _merge_duplicates(
    responses: list[Response], scores: Sequence[float], limits: Limits
) -> tuple[list[Response], list[float]]:
    """Responses without those that occurred before, and the means of their scores."""
    indices: dict[Response, list[int]] = {}
    for k, response in enumerate(responses):
        indices.setdefault(response, []).append(k)
    action = limits.actions["duplicate_response"]
    if len(indices) == len(responses) or action == "keep":
        return responses, list(scores)
    first, second = next(ks for ks in indices.values() if len(ks) > 1)[:2]
    detail = f"responses {first + 1} and {second + 1} are the same tokens"
    if action != "fix":
        raise RefusedRow("duplicate_response", detail)
    if len(indices) < limits.min_responses:
        raise RefusedRow("too_few_responses", f"{len(indices)} usable response (after duplicate_response: {detail})")
    means = [math.fsum(scores[k] for k in ks) / len(ks) for ks in indices.values()]
    if len(set(means)) == 1 and limits.actions["identical_scores"] != "keep":
        raise RefusedRow("identical_scores", f"all are {means[0]:g} (after duplicate_response: {detail})")
    return [*indices], means
