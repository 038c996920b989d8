"""What a row of reward data may look like, recognised by its columns.

- list form: `prompt` (text or messages), `responses` (texts or message lists), `scores` (or `rewards`);
- the 2024 form: `A0`, `A1`, ... (texts or message lists) and `score_A0`, `score_A1`, ...;
- pairs: `chosen`, `rejected` (texts or message lists), with `prompt` or with it inside them, and for reward data
  `score_chosen`, `score_rejected`.
"""

import hashlib
import math
import re
from typing import Any

from datasets import Features, List, Value

from alignment.errors import UserError

Row = dict[str, Any]
Messages = list[dict[str, str]]

#: A row when it is read: K responses to one prompt, K >= 2, and their scores.
GROUP_FEATURES = Features(
    {
        "prompt": List({"role": Value("string"), "content": Value("string")}),
        "responses": List(Value("string")),
        "scores": List(Value("float64")),
    }
)


def to_group(row: Row, where: str, pairs: bool = False) -> Row:
    """One row of any known format as `prompt`, `responses`, `scores`.

    Args:
        row: The row as it was read.
        where: Names file and row, for errors.
        pairs: Whether `chosen` and `rejected` may come without scores: they then get 1 and 0.

    Raises:
        UserError: Columns are missing, there are fewer than two responses, or a value cannot be used.
    """
    if "responses" in row and ("scores" in row or "rewards" in row):
        responses, scores = row["responses"], row.get("scores", row.get("rewards"))
    elif "A0" in row and "score_A0" in row:
        names = sorted((k for k in row if re.fullmatch(r"A\d+", k)), key=lambda k: int(k[1:]))
        names = [k for k in names if row[k] is not None]  # tables fill ragged rows up with nulls
        responses, scores = [row[k] for k in names], [row.get(f"score_{k}") for k in names]
    elif "chosen" in row and "rejected" in row and (pairs or "score_chosen" in row):
        responses = [row["chosen"], row["rejected"]]
        scores = [1.0, 0.0] if pairs else [row["score_chosen"], row.get("score_rejected")]
    else:
        wanted = "chosen and rejected" if pairs else "prompt, responses and scores (or A0, score_A0, ...)"
        raise UserError(f"{where}: needs columns {wanted}; found {', '.join(row) or 'none'}")
    if not isinstance(responses, list) or not isinstance(scores, list) or len(responses) != len(scores):
        raise UserError(f"{where}: responses and scores must be lists of the same length")
    if len(responses) < 2:
        raise UserError(f"{where}: {len(responses)} response; at least two are needed to compare: remove the row")
    scores = [_score(score, k, where) for k, score in enumerate(scores)]
    prompt, texts = _split_prompt(row.get("prompt"), responses, where)
    try:
        "".join([*texts, *(m["content"] for m in prompt)]).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds half of a surrogate pair, which is no character: mend the row") from error
    return {"prompt": prompt, "responses": texts, "scores": scores}


def to_pair(group: Row, where: str, make_pairs: str | None = None) -> Row:
    """A group as a preference pair: two responses, the better one first, scores 1 and 0.

    Args:
        group: From `to_group`.
        where: Names file and row, for errors.
        make_pairs: For groups of more than two: "best_worst" or "best_random".

    Raises:
        UserError: There are more than two responses, and `make_pairs` is None.
    """
    texts, scores = group["responses"], group["scores"]
    if len(texts) > 2 and make_pairs is None:
        raise UserError(
            f"{where}: {len(texts)} responses; a pair has two: set make_pairs to best_worst or best_random, or use "
            "run_reward.py"
        )
    order = sorted(range(len(texts)), key=lambda k: -scores[k])
    others = order[1:]
    if make_pairs == "best_random":
        digest = hashlib.sha256("\0".join(texts).encode()).digest()
        rejected = others[int.from_bytes(digest[:8], "big") % len(others)]
    else:
        rejected = others[-1]
    return {"prompt": group["prompt"], "responses": [texts[order[0]], texts[rejected]], "scores": [1.0, 0.0]}


def _score(score: Any, k: int, where: str) -> float:
    if isinstance(score, bool) or not isinstance(score, int | float):
        shown = "null" if score is None else repr(score)
        raise UserError(f"{where}: the score of response {k + 1} is {shown}, not a number: mend or remove the row")
    if not math.isfinite(score):
        raise UserError(f"{where}: the score of response {k + 1} is {score}, not finite: mend or remove the row")
    return float(score)


def _split_prompt(prompt: Any, responses: list[Any], where: str) -> tuple[Messages, list[str]]:
    """Prompt messages and response texts, wherever the prompt stands: in its column or in the conversations."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif prompt is not None:
        prompt = _messages(prompt, "prompt", where)
    texts = []
    for k, response in enumerate(responses):
        if isinstance(response, str):
            texts.append(response)
            continue
        turns = _messages(response, f"response {k + 1}", where)
        if not turns or turns[-1]["role"] != "assistant":
            raise UserError(f"{where}: response {k + 1} does not end with an assistant message")
        *before, answer = turns
        texts.append(answer["content"])
        if before:  # a whole conversation: its own turns are the prompt, and all responses must share them
            if k > 0 and prompt != before:
                raise UserError(f"{where}: the responses do not share one prompt: their earlier turns differ")
            prompt = before
    if not prompt:
        raise UserError(f"{where}: no prompt; give a 'prompt' column, or message lists that begin with it")
    return prompt, texts


def _messages(value: Any, what: str, where: str) -> Messages:
    if not isinstance(value, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    ):
        raise UserError(f"{where}: {what} must be text or a list of messages with 'role' and 'content'")
    return [{"role": m["role"], "content": m["content"]} for m in value]
