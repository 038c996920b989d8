"""Recognises the form of a row of reward data by its columns, and reads it without checking its values.

- list form: `prompt` (text or messages), `responses` (texts or message lists), `scores` (or `rewards`);
- the 2024 form: `A0`, `A1`, ... (texts or message lists) and `score_A0`, `score_A1`, ...;
- pairs: `chosen`, `rejected` (texts or message lists), with `prompt` or with it inside them, and for reward data
  `score_chosen`, `score_rejected`; UltraInteract's have `trajectory`, the turns before, in place of `prompt`;
- UltraFeedback as it was released: `instruction`, `completions` (see `alignment.data.ultrafeedback`);
- long form, a row a response: `prompt` or `prompt_id`, `response`, `score` (or `reward`);
- unpaired, TRL's KTO form: `prompt`, `completion`, `label`: scores 1 and 0.

The last two are records of one response: `data.reading` gathers those of one prompt before they come here as a list.
"""

import re
from typing import Any

from alignment.data import ultrafeedback
from alignment.data.row import BadRow, Group, Messages, Row

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def unwrap(row: Any) -> Any:
    """Takes a row out of the wrapper that the Hub's viewer puts around it: `{"row_idx": ..., "row": {...}}`."""
    return row["row"] if isinstance(row, dict) and isinstance(row.get("row"), dict) else row


def as_record(row: Row) -> Row | None:
    """Reads a row of one response as `id`, `prompt`, `response`, `score`; None for a row of another form."""
    if not ("prompt" in row or "prompt_id" in row):
        return None
    prompt_id = row.get("prompt_id")
    if "response" in row and ("score" in row or "reward" in row):
        response, score = row["response"], row.get("score", row.get("reward"))
    elif "completion" in row and "label" in row:
        label = row["label"]
        response, score = row["completion"], float(label) if isinstance(label, bool) else label
    else:
        return None
    return {"id": prompt_id, "prompt": row.get("prompt"), "response": response, "score": score}


def to_group(row: Row, pairs: bool = False, score: str = "overall") -> Group:
    """Reads a row of any form, except the two forms with one response a row.

    Args:
        row: The row as it was read.
        pairs: Whether `chosen` and `rejected` are taken as 1 and 0, whatever their scores.
        score: Which of UltraFeedback's scores, see `alignment.data.ultrafeedback.scores_of`.

    Raises:
        BadRow: It is of no known form, or its parts do not belong together.
    """
    fixed: list[str] = []
    ranked = False
    prompt = row.get("prompt") or row.get("trajectory")
    if "responses" in row and ("scores" in row or "rewards" in row):
        responses, scores = row["responses"], row.get("scores", row.get("rewards"))
    elif "A0" in row and "score_A0" in row:
        names = sorted((k for k in row if re.fullmatch(r"A\d+", k)), key=lambda k: int(k[1:]))
        # Tables fill ragged rows up with nulls.
        names = [k for k in names if row[k] is not None or row.get(f"score_{k}") is not None]
        responses, scores = [row[k] for k in names], [row.get(f"score_{k}") for k in names]
    elif "chosen" in row and "rejected" in row and (pairs or "score_chosen" in row):
        responses = [row["chosen"], row["rejected"]]
        scores = [1.0, 0.0] if pairs else [row["score_chosen"], row.get("score_rejected")]
        ranked = pairs
    elif "instruction" in row and isinstance(row.get("completions"), list):
        prompt = row["instruction"]
        responses, scores, fixed = ultrafeedback.scores_of(row["completions"], score)
    else:
        raise BadRow("unknown_format", f"its columns are {', '.join(map(str, row)) or 'none'}")
    if not isinstance(responses, list) or not isinstance(scores, list) or len(responses) != len(scores):
        raise BadRow("lengths_differ", "responses and scores are not lists of the same length")
    return Group(*_split_prompt(prompt, responses), scores, fixed, ranked)


def _split_prompt(prompt: Any, responses: list[Any]) -> tuple[Messages, list[Any]]:
    """Prompt messages and response texts, whether the prompt is in its column or inside the conversations."""
    if prompt is not None:
        prompt = messages_of(prompt, "the prompt")
    texts: list[Any] = []
    shared = None  # the turns before the answers, where responses are whole conversations
    for k, response in enumerate(responses):
        if response is None or isinstance(response, str):
            texts.append(response)
            continue
        turns = messages_of(response, f"response {k + 1}")
        if not turns or turns[-1]["role"] != "assistant":
            raise BadRow("bad_messages", f"response {k + 1} does not end with an assistant message")
        *before, answer = turns
        texts.append(answer["content"])
        if before:
            if shared is not None and shared != before:
                raise BadRow("prompts_differ", "the responses' earlier turns differ")
            shared = before
    prompt = shared if shared is not None else prompt
    if not prompt or not prompt[-1]["content"].strip():
        raise BadRow("no_prompt", "no prompt column, and none inside the responses")
    return prompt, texts


def messages_of(value: Any, what: str) -> Messages:
    """Reads a value as messages; a text is one user turn. Turns may have ShareGPT's keys `from` and `value`.

    Raises:
        BadRow: It is neither; names it by `what`.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    turns = [_turn(m) for m in value] if isinstance(value, list) else [None]
    if None in turns:
        raise BadRow("bad_messages", f"{what} is neither text nor messages with 'role' and 'content'")
    return turns


def _turn(message: Any) -> dict[str, str] | None:
    """A message with its role and content; None for anything else."""
    if not isinstance(message, dict):
        return None
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    return {"role": _SHAREGPT_ROLES.get(role, role), "content": content}
