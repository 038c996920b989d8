"""Recognises the form of a row of reward data by its columns, and reads it without checking its values.

docs/data.md has the table of the forms. Those of K responses and their scores are in `data.forms`; `as_record` reads
those of one response a row, which `data.reading` gathers by their prompt before they come here as a list.
"""

import itertools
from typing import Any

from alignment.data import conversations, ultrafeedback
from alignment.data.forms import RESPONSES, Fields, find_responses
from alignment.data.messages import messages_of, refuse
from alignment.data.row import BadRow, Group, Messages, Row
from alignment.data.tools import agreed, template_kwargs_of, tools_of
from alignment.data.written import ROLE_KEYS, as_objects, first, is_empty, read_written

#: Columns that a prompt may be in; the first that has a value is taken.
PROMPTS = ("prompt", "trajectory", "question", "instruction", "query", "input", "context", "history")
#: Columns of the turns before the answer.
_CONVERSATIONS = ("conversations", "conversation", "messages")
_SYSTEMS = ("system", "system_prompt", "system_message")
#: Columns, or keys of a prompt that is an object, with the tools that may be called.
_TOOLS = ("tools", "functions")
_TEMPLATE_KWARGS = "chat_template_kwargs"
#: Columns that change what is trained on, and are not read.
_UNREAD_COLUMNS = {
    **dict.fromkeys(("tool_calls", "function_call"), "bad_tools"),
    **dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), "bad_messages"),
}
_LABELS = {
    **dict.fromkeys(("true", "yes", "desirable", "good", "positive", "pos", "chosen", "accepted", "thumbs_up"), 1.0),
    **dict.fromkeys(("false", "no", "undesirable", "bad", "negative", "neg", "rejected", "thumbs_down"), 0.0),
}


def unwrap(row: Any) -> Any:
    """Takes a row out of the wrapper that the Hub's viewer puts around it: `{"row_idx": ..., "row": {...}}`."""
    return row["row"] if isinstance(row, dict) and isinstance(row.get("row"), dict) else row


def as_record(row: Row, score: str = "overall") -> Row | None:
    """Reads a row of one response as `id`, `prompt`, `system`, `response`, `score`, `noted` and what else a group has.

    Args:
        row: The row as it was read.
        score: Which aspects of HelpSteer's are the score, see `ultrafeedback.parse_score`.

    Returns:
        The record; None for a row of another form.

    Raises:
        BadRow: It is of this form, and has what cannot be read.
    """
    response = next((name for name in ("response", "completion") if name in row), None)
    rated = next((name for name in ("score", "reward", "rating") if name in row), None)
    is_rated = rated or ultrafeedback.has_aspects(row) or ("completion" in row and "label" in row)
    if rated and not response and not any(name in row for name in (*RESPONSES, "chosen", "A0")):
        row, response = _parted(row)
    if not response or not is_rated or not any(name in row for name in ("prompt_id", *PROMPTS, *_CONVERSATIONS)):
        return None
    row = _opened(row)
    fields = Fields(row)
    if rated:
        value = fields.take(rated)
    elif ultrafeedback.has_aspects(row):
        value = ultrafeedback.score_of_aspects({name: fields.take(name) for name in ultrafeedback.HELPSTEER}, score)
    else:
        response, value = "completion", _label(fields.take("label"))
    refuse(row, _UNREAD_COLUMNS, "it has the column")
    record = {
        "id": fields.take("prompt_id"),
        "prompt": _prompt(fields, (*PROMPTS, *_CONVERSATIONS)),
        "system": _system(fields),
        **_options(fields),
        "response": fields.take(response),
        "score": value,
        "weight": fields.take("weight"),
    }
    return record | {"noted": fields.unread()}


def _parted(row: Row) -> tuple[Row, str | None]:
    """A log of a whole run: its conversation parted before the assistant's first turn, which the response begins with.

    Returns:
        The row with columns `prompt` and `response`, and the name of the latter; or as it is, and None, for another.
    """
    name = next((name for name in _CONVERSATIONS if not is_empty(row.get(name))), None)
    if name is None:
        return row, None
    value = row[name]
    turns = as_objects(read_written(value) if isinstance(value, str) else value)
    what = f"the column {name}"
    if not isinstance(turns, list):
        raise BadRow("bad_messages", f"{what} has no messages")
    asked = itertools.takewhile(lambda turn: messages_of([turn], what)[0]["role"] != "assistant", turns)
    start = len([*asked])
    if start == len(turns):
        raise BadRow("no_assistant_turn", f"{what} has no turn of the assistant's")
    others = {key: value for key, value in row.items() if key != name}
    return {**others, "prompt": turns[:start], "response": turns[start:]}, "response"


def to_group(
    row: Row, pairs: bool = False, unscored_pairs: bool = False, make_pairs: bool = False, score: str = "overall"
) -> Group:
    """Reads a row of any form, except those with one response a row.

    Args:
        row: The row as it was read.
        pairs: Whether `chosen` and `rejected` are taken as 1 and 0, whatever their scores.
        unscored_pairs: Whether they are taken so where they have no scores.
        make_pairs: Whether pairs are made of rows with more responses.
        score: Which of UltraFeedback's scores, see `ultrafeedback.parse_score`.

    Raises:
        BadRow: It is of no known form, its parts do not belong together, or it has what cannot be read.
    """
    row = _opened(row)
    fields = Fields(row)
    found = find_responses(fields, pairs, unscored_pairs, make_pairs, score)
    responses, scores = found.responses, found.scores
    if not isinstance(responses, list) or not isinstance(scores, list) or len(responses) != len(scores):
        raise BadRow("lengths_differ", "responses and scores are not lists of the same length")
    responses, inside = _unwrapped(responses)
    refuse(row, _UNREAD_COLUMNS, "it has the column")
    keys: set[str] = set()
    has_prompt = fields.first(*PROMPTS, *_CONVERSATIONS) is not None
    turns = [
        conversations.read_response(response, f"response {k + 1}", has_prompt, keys)
        for k, response in enumerate(responses)
    ]
    is_inside = any(isinstance(said, list) and said[0]["role"] not in ("assistant", "tool") for said in turns)
    talk = None if is_inside else _conversation(fields, keys)
    # Beside turns, other columns may be about anything.
    value = _prompt(fields, ("prompt",) if is_inside or talk else PROMPTS)
    prompt = None if value is None else messages_of(value, "the prompt", keys)
    shared, answers = conversations.split(turns, prompt)
    prompt = conversations.join(prompt, _system(fields), shared or talk)
    weight, options = fields.take("weight"), _options(fields, inside)
    noted = [*fields.unread(), *(f"message key {key}" for key in sorted(keys))]
    return Group(prompt, answers, scores, found.fixed, found.ranked, noted, weight, **options)


def read_prompt(row: Row) -> Row:
    """The prompt of a row without responses: `prompt`, `tools` and `chat_template_kwargs`, see `Group`.

    Args:
        row: Its columns, of which one is `prompt`.

    Raises:
        BadRow: One of them cannot be read.
    """
    row = _opened(row)
    refuse(row, _UNREAD_COLUMNS, "it has the column")
    fields = Fields(row)
    prompt = conversations.with_system(messages_of(row["prompt"], "the prompt"), _system(fields))
    return {"prompt": prompt, **_options(fields)}


def _opened(row: Row) -> Row:
    """A row whose prompt is an object with `messages` and, beside them, `tools`: these become columns."""
    column = next((name for name in PROMPTS if not is_empty(row.get(name))), "prompt")
    prompt = row.get(column)
    name = next((n for n in _CONVERSATIONS if prompt.get(n) is not None), None) if isinstance(prompt, dict) else None
    if name is None or first(prompt, ROLE_KEYS) is not None:
        return row
    inside = {key: value for key, value in prompt.items() if key != name and not is_empty(value)}
    for key in inside:
        if key in (*_TOOLS, _TEMPLATE_KWARGS, *_SYSTEMS) and not is_empty(row.get(key)) and row[key] != inside[key]:
            raise BadRow("prompts_differ", f"the row has two of {key}, one of them inside the prompt")
    beside = {key: value for key, value in row.items() if not is_empty(value) or key not in inside}
    return {**inside, **beside, column: prompt[name]}


def _unwrapped(responses: list[Any]) -> tuple[list[Any], Row]:
    """Responses of which some are objects, or JSON text of one, with `messages` and `tools`; and those tools."""
    unwrapped, tools = [], {}
    for k, response in enumerate(responses):
        is_object = isinstance(response, str) and response.lstrip()[:1] == "{"
        read = read_written(response) if is_object else response
        turns = (
            next((read[n] for n in _CONVERSATIONS if _is_talk(read.get(n))), None) if isinstance(read, dict) else None
        )
        unwrapped.append(response if turns is None else turns)
        if turns is not None and not is_empty(read.get("tools")):
            tools[f"tools of response {k + 1}"] = tools_of(read["tools"], f"tools of response {k + 1}")
    return unwrapped, tools


def _is_talk(value: Any) -> bool:
    """Whether a value is a list of messages."""
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(turn, dict) and first(turn, ROLE_KEYS) is not None for turn in value)


def _options(fields: Fields, inside: Row | None = None) -> Row:
    """What the chat template is given beside the messages. `inside`: the tools that responses have beside theirs."""
    tools = {name: tools_of(fields.take(name), f"the column {name}") for name in _TOOLS if name in fields.row}
    tools |= inside or {}
    template_kwargs = fields.take(_TEMPLATE_KWARGS)
    return {
        "tools": agreed(tools),
        "chat_template_kwargs": template_kwargs_of(template_kwargs, f"the column {_TEMPLATE_KWARGS}"),
    }


def _system(fields: Fields) -> Any:
    name = fields.first(*_SYSTEMS)
    return fields.take(name) if name else None


def _prompt(fields: Fields, names: tuple[str, ...]) -> Any:
    """The prompt as its column has it; None where there is none."""
    name = fields.first(*names)
    if name is None:
        return None
    value = fields.take(name)
    if name != "instruction" or not isinstance(value, str):
        return value
    # As LLaMA-Factory reads Alpaca's columns.
    given = fields.take("input") if isinstance(fields.row.get("input"), str) else None
    asked = f"{value}\n{given}" if given and given.strip() else value
    earlier = fields.row.get("history")
    if not isinstance(earlier, list) or not all(isinstance(turns, list) and len(turns) == 2 for turns in earlier):
        return asked
    turns = [turn for said, answer in fields.take("history") for turn in (("user", said), ("assistant", answer))]
    return [{"role": role, "content": text} for role, text in [*turns, ("user", asked)]]


def _conversation(fields: Fields, unread: set[str]) -> Messages | None:
    """The turns of a column of their own, where they do not end with an answer."""
    name = fields.first(*_CONVERSATIONS)
    if name is None:
        return None
    try:
        turns = messages_of(fields.row[name], f"the column {name}", unread)
    except BadRow:
        if fields.first(*PROMPTS):
            return None
        raise
    if not turns or turns[-1]["role"] == "assistant":
        return None
    fields.take(name)
    return turns


def _label(label: Any) -> Any:
    """The score of a label: 1 or 0 of a truth value or its name; anything else as it is."""
    if isinstance(label, bool):
        return float(label)
    return _LABELS.get(label.strip().lower(), label) if isinstance(label, str) else label
