"""Splits responses into the turns that they share, which are the prompt, and the text of each answer.

A prompt may be in its own column, inside the responses, or in both; a system turn may have a column of its own.
"""

import re
from typing import Any

from alignment.data.messages import as_objects, dialogue, messages_of, written_messages
from alignment.data.row import BadRow, Messages

#: Roles of the first turn of a response that goes on where the prompt ends, and does not tell it once more.
_GOING_ON = ("assistant", "tool")


def read_response(value: Any, what: str, has_prompt: bool, unread: set[str]) -> Messages | str | None:
    """A response as text, or as turns that end with the answer; None where there is none.

    Args:
        value: Text, messages, or one message.
        what: Name of the response, for errors.
        has_prompt: Whether the prompt has a column of its own.
        unread: Gets the message keys that are not read.

    Raises:
        BadRow: It is neither text nor messages that end with an answer.
    """
    if value is None:
        return None
    if isinstance(value, str):
        turns: Any = written_messages(value)
        if turns is None and (not has_prompt or value.startswith("\n\nHuman:")):
            turns = dialogue(value)
        if turns is None:
            return value
        value = turns
    turns = messages_of(as_objects(value), what, unread)
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRow("bad_messages", f"{what} does not end with an assistant message")
    return turns


def split(responses: list[Messages | str | None], prompt: Any = None) -> tuple[Messages | None, list[str | None]]:
    """The turns that the responses share, and the text that each answers them with.

    Args:
        responses: From `read_response`.
        prompt: The column `prompt`, if there is one.

    Returns:
        The turns before the answers, None where the responses have none; and the answers.

    Raises:
        BadRow: They answer different turns, or part at an earlier turn than the last.
    """
    conversations = [response for response in responses if isinstance(response, list) and len(response) > 1]
    if not conversations:
        return None, [turns[-1]["content"] if isinstance(turns, list) else turns for turns in responses]
    num_shared = 0
    while all(num_shared < len(turns) - 1 for turns in conversations) and all(
        turns[num_shared] == conversations[0][num_shared] for turns in conversations
    ):
        num_shared += 1
    rests = [turns[num_shared:] for turns in conversations]
    is_multi_turn = any(len(rest) > 1 for rest in rests)
    restarts = conversations[0][0]["role"] not in _GOING_ON
    is_in_prompt = is_multi_turn and restarts and isinstance(prompt, list) and num_shared < len(prompt)
    if is_in_prompt or any(rest[0]["role"] != "assistant" for rest in rests):
        raise BadRow("prompts_differ", "the responses' earlier turns differ")
    if is_multi_turn:
        raise BadRow(
            "multi_turn_response",
            f"the responses part at turn {num_shared + 1}, and more turns follow; one answer each is read",
        )
    texts = [turns[-1]["content"] if isinstance(turns, list) else turns for turns in responses]
    return conversations[0][:num_shared] or None, texts


def join(prompt: Messages | None, system: Any, shared: Messages | None) -> Messages:
    """The prompt, of its column, the column of the system turn, and the turns inside the responses.

    Raises:
        BadRow: They contradict each other, or there is no prompt.
    """
    has_both = prompt and shared and any(_words(turn) for turn in prompt)
    turns = _agreed(prompt, shared) if has_both else shared or prompt
    if not turns or not turns[-1]["content"].strip():
        raise BadRow("no_prompt", "no prompt column, and none inside the responses")
    return with_system(turns, system)


def with_system(turns: Messages, system: Any) -> Messages:
    """Turns behind a system turn that has a column of its own, as text or as one message.

    Raises:
        BadRow: It is neither, or the turns begin with another system turn.
    """
    if system is None:
        return turns
    if not isinstance(system, str):
        messages = messages_of(system, "the system column")
        if [message["role"] for message in messages] != ["system"]:
            raise BadRow("bad_messages", "the system column is neither text nor one message of the system's")
        system = messages[0]["content"]
    if not system.strip():
        return turns
    if not turns or turns[0]["role"] != "system":
        return [{"role": "system", "content": system}, *turns]
    if _words(turns[0]) != system.split():
        raise BadRow("prompts_differ", "the system column is not the prompt's system turn")
    return turns


def _agreed(prompt: Messages, shared: Messages) -> Messages:
    """One prompt of the column `prompt` and of the turns inside the responses, where they say the same.

    The column may hold the user's first or last turn alone, or all turns as one text; it, or the responses, may lack
    the system turn.
    """
    if shared[0]["role"] in _GOING_ON:
        return prompt + shared
    (system, asked), (system_there, turns) = _split_system(prompt), _split_system(shared)
    if system and system_there and _words(system[0]) != _words(system_there[0]):
        raise BadRow("prompts_differ", "the system turns of the prompt column and of the responses differ")
    whole = (system_there or system) + turns
    if [(turn["role"], _words(turn)) for turn in asked] == [(turn["role"], _words(turn)) for turn in turns]:
        return whole
    if len(asked) == 1 and asked[0]["role"] == "user":
        of_user = [_words(turn) for turn in turns if turn["role"] == "user"]
        if _words(asked[0]) in (of_user[:1] + of_user[-1:]) or _is_written_as(asked[0]["content"], shared):
            return whole
    raise BadRow("prompts_differ", "the prompt column says something else than the turns inside the responses")


def _split_system(messages: Messages) -> tuple[Messages, Messages]:
    num = 1 if messages[0]["role"] == "system" else 0
    return messages[:num], messages[num:]


def _words(message: dict[str, str]) -> list[str]:
    return message["content"].split()


def _is_written_as(text: str, messages: Messages) -> bool:
    """Whether a text is all of the messages one behind the other, as they are or as a chat template renders them."""
    between, rest = [], text
    for message in messages:
        before, found, rest = rest.partition(message["content"].strip())
        if not found:
            return False
        between.append(before)
    said = re.sub(r"<[^<>]{1,40}>|\[/?INST\]", " ", " ".join([*between, rest]))
    return all(word in _TEMPLATE_WORDS for word in re.findall(r"\w+", said.lower()))


#: Words that a template, or a person, writes around turns.
_TEMPLATE_WORDS = {"system", "user", "human", "assistant", "ai", "gpt", "model", "bot", "agent", "tool", "instruction",
                   "response", "question", "answer", "input", "output", "q", "a"}  # fmt: skip
