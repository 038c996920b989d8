"""Splits responses into the turns that they share, which are the prompt, and what each answers them with.

A prompt may be in its own column, inside the responses, or in both; a system turn may have a column of its own.
"""

import re
from typing import Any

from alignment.data.messages import messages_of
from alignment.data.row import BadRow, Messages, Response, as_response
from alignment.data.written import as_objects, dialogue, written_messages

#: Roles of the first turn of a response that goes on where the prompt ends, and does not tell it once more.
_GOING_ON = ("assistant", "tool")


def read_response(value: Any, what: str, has_prompt: bool, unread: set[str]) -> Response | None:
    """A response as text, or as turns of which one at least is the assistant's; None where there is none.

    Args:
        value: Text, messages, or one message.
        what: Name of the response, for errors.
        has_prompt: Whether the prompt has a column of its own.
        unread: Gets the message keys that are not read.

    Raises:
        BadRow: It is neither text nor messages, or no turn of it is the assistant's.
    """
    if value is None or value == []:
        return None
    if isinstance(value, str):
        turns: Any = written_messages(value)
        if turns is None and (not has_prompt or value.startswith("\n\nHuman:")):
            turns = dialogue(value)
        if turns is None:
            return value
        value = turns
    turns = messages_of(as_objects(value), what, unread)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadRow("no_assistant_turn", f"{what} has no turn of the assistant's")
    return turns


def split(
    responses: list[Response | None], prompt: Messages | None = None
) -> tuple[Messages | None, list[Response | None]]:
    """The turns that the responses share, and what each answers them with.

    A response that begins with a turn of the assistant's is an answer as it is. Those that begin earlier are whole
    conversations: the turns that all of them share are the prompt. It ends where the column `prompt` does, if a call or
    several turns follow there, and else at the last place where all conversations go on with a turn of the assistant's.

    Args:
        responses: From `read_response`.
        prompt: The prompt of a column of its own, if there is one.

    Returns:
        The turns before the answers, None where the responses have none; and the answers: a text where it is one turn
        of nothing but text, else messages.

    Raises:
        BadRow: They answer different turns, or one has no answer.
    """
    conversations = [turns for turns in responses if isinstance(turns, list) and turns[0]["role"] != "assistant"]
    if not conversations:
        return None, [as_response(said) if isinstance(said, list) else said for said in responses]
    num_shared = _common(conversations)
    cuts = [
        cut
        for cut in range(1, num_shared + 1)
        if all(len(turns) > cut and turns[cut]["role"] == "assistant" for turns in conversations)
    ]
    for k, turns in enumerate(responses):
        if isinstance(turns, list) and all(turn["role"] != "assistant" for turn in turns[num_shared:]) and not cuts:
            raise BadRow("no_assistant_turn", f"response {k + 1} does not answer the turns that all responses share")
    if not cuts:
        raise BadRow("prompts_differ", "the responses' earlier turns differ")
    cut = _cut(conversations, prompt, cuts) if prompt else cuts[-1]
    starts = [cut if isinstance(said, list) and said[0]["role"] != "assistant" else 0 for said in responses]
    return conversations[0][:cut], [
        as_response(said[start:]) if isinstance(said, list) else said
        for said, start in zip(responses, starts, strict=True)
    ]


def _common(conversations: list[Messages]) -> int:
    """Turns at the start that all conversations share."""
    first, *others = conversations
    shortest = min(map(len, conversations))
    return next((i for i in range(shortest) if any(turns[i] != first[i] for turns in others)), shortest)


def _cut(conversations: list[Messages], prompt: Messages, cuts: list[int]) -> int:
    """Of the places where the answers may begin the one that fits the prompt of a column of its own.

    Where one answer follows turns of plain talk, a prompt of one turn names them all: it is their first or last.
    """
    ends = [end for end in _told(prompt, conversations[0]) if end in cuts]
    if not ends:
        return cuts[-1]
    follows = [turn for turns in conversations for turn in turns[ends[-1] :]]
    is_one_answer = all(len(turns) == cuts[-1] + 1 for turns in conversations) and all(map(_is_talk, follows))
    return cuts[-1] if is_one_answer and len(_split_system(prompt)[1]) == 1 else ends[-1]


def _told(prompt: Messages, conversation: Messages) -> list[int]:
    """Where a conversation has told the prompt once more: all of its turns, or its one turn of the user's."""
    _, asked = _split_system(prompt)
    num_system = len(_split_system(conversation)[0])
    end = num_system + len(asked)
    if [_words(turn) for turn in asked] == [_words(turn) for turn in conversation[num_system:end]]:
        return [end]
    if len(asked) == 1:
        return [i + 1 for i, turn in enumerate(conversation) if _words(turn) == _words(asked[0])]
    return []


def _is_talk(turn: dict[str, Any]) -> bool:
    return len(turn) == 2 and turn["role"] != "tool"


def join(prompt: Messages | None, system: Any, shared: Messages | None) -> Messages:
    """The prompt, of its column, the column of the system turn, and the turns inside the responses.

    Raises:
        BadRow: They contradict each other, or there is no prompt.
    """
    has_both = prompt and shared and any(_words(turn) for turn in prompt)
    turns = _agreed(prompt, shared) if has_both else shared or prompt
    if not turns or not (turns[-1]["content"].strip() or turns[-1]["role"] == "tool"):
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


def _words(message: dict[str, Any]) -> list[str]:
    return message["content"].split()


def _is_written_as(text: str, messages: Messages) -> bool:
    """Whether a text is all of the messages one behind the other, as they are or as a chat template renders them."""
    between, rest = [], text
    for said in filter(None, (message["content"].strip() for message in messages)):
        before, found, rest = rest.partition(said)
        if not found:
            return False
        between.append(before)
    said = re.sub(r"<[^<>]{1,40}>|\[/?INST\]", " ", " ".join([*between, rest]))
    return all(word in _TEMPLATE_WORDS for word in re.findall(r"\w+", said.lower()))


#: Words that a template, or a person, writes around turns.
_TEMPLATE_WORDS = {"system", "user", "human", "assistant", "ai", "gpt", "model", "bot", "agent", "tool", "instruction",
                   "response", "question", "answer", "input", "output", "q", "a"}  # fmt: skip
