"""A reward that does not depend on the length of a response: how large a share of its words is long, or short.

The wish is read back from the prompt's own text. Words of fewer than four letters do not count, since no sentence goes
without them:

>>> words_score(["Tell me about tea. Use long words."], ["Drinking tea comforts and revives people."])
[0.75]
>>> words_score(["Tell me about tea. Use short words."], ["Drinking tea comforts and revives people."])
[0.25]
"""

import re
from typing import Any

#: From this number of letters on, a word counts, and is long.
COUNTS, LONG = 4, 7
#: With fewer words that count, the missing ones are misses: one word is no answer.
LEAST = 2


def words_score(prompts: list, completions: list, **columns: Any) -> list[float]:
    """Scores completions; has the signature of TRL's reward functions.

    Args:
        prompts: Texts, or conversations whose last turn is the user's.
        completions: Texts, or message lists. One for each prompt.
        **columns: What else TRL passes; not needed.

    Returns:
        Share of the words that count which are as the prompt wants them, 0 to 1.

    Raises:
        ValueError: A prompt asks for neither.
    """
    return [
        _share(_last_text(completion), wants_long=_wants_long(_last_text(prompt)))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _wants_long(instruction: str) -> bool:
    wish = re.search(r"Use (long|short) words\.", instruction)
    if wish is None:
        raise ValueError(f"neither long nor short words are asked for in the prompt {instruction[:60]!r}")
    return wish[1] == "long"


def _share(text: str, wants_long: bool) -> float:
    """Words are runs of letters, with an apostrophe inside or without."""
    lengths = [len(word) for word in re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text)]
    counted = [length for length in lengths if length >= COUNTS]
    return sum((length >= LONG) == wants_long for length in counted) / max(LEAST, len(counted))


def _last_text(text_or_messages: str | list[dict[str, str]]) -> str:
    return text_or_messages if isinstance(text_or_messages, str) else text_or_messages[-1]["content"]
