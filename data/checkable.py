"""A reward that anybody can check: the share of a prompt's conditions that a response meets.

The conditions are read back from the prompt's own text, so the score needs no column beside it, no judge, no network:

>>> prompt = 'Tell me briefly about tea. Write exactly 1 sentence. Mention the word "warm". Do not use commas.'
>>> checkable_score([prompt], ["Tea is a warm drink."])
[1.0]
"""

import re
from collections.abc import Callable
from typing import Any

Check = Callable[..., bool]


def _words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return re.findall(r"[\w'’]+", text.lower())


def _num_sentences(text: str) -> int:
    """Sentences with a letter in them: the "1." of a list is none."""
    return sum(bool(re.search("[a-zA-Z]", part)) for part in re.split(r"[.!?]+(?:[\s\"]|$)", text))


#: What the prompt says -> what the response, stripped of white space, must be. Groups of the pattern are arguments.
CONDITIONS: dict[str, Check] = {
    r"Write exactly (\d) sentences?\.": lambda text, count: _num_sentences(text) == int(count),
    r"Use at most (\d+) words\.": lambda text, high: len(_words(text)) <= int(high),
    r"Use between (\d+) and (\d+) words\.": lambda text, low, high: int(low) <= len(_words(text)) <= int(high),
    r"Do not use commas\.": lambda text: "," not in text,
    r"Include a number written in digits\.": lambda text: any(c.isdigit() for c in text),
    r"Do not use the word \"(\w+)\"\.": lambda text, word: word not in _words(text),
    r"Mention the word \"(\w+)\"\.": lambda text, word: word in _words(text),
    r"Begin with the word \"(\w+)\"\.": lambda text, word: _words(text)[0] == word.lower(),
}


def conditions_met(instruction: str, response: str) -> dict[str, bool]:
    """Checks a response against every condition in an instruction.

    Args:
        instruction: The user's text; sentences that are no condition are passed over.
        response: The text to check.

    Returns:
        One verdict for each condition found, by its words, in the order of `CONDITIONS`. Without a word, a response
        meets none.
    """
    response = response.strip()
    return {
        match[0]: bool(_words(response)) and check(response, *match.groups())
        for pattern, check in CONDITIONS.items()
        if (match := re.search(pattern, instruction))
    }


def checkable_score(prompts: list, completions: list, **columns: Any) -> list[float]:
    """Scores completions; has the signature of TRL's reward functions.

    Args:
        prompts: Texts, or conversations whose last turn is the user's.
        completions: Texts, or message lists. One for each prompt.
        **columns: What else TRL passes; not needed.

    Returns:
        Share of the prompt's conditions that the completion meets, 0 to 1.

    Raises:
        ValueError: A prompt has no condition.
    """
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        met = conditions_met(_last_text(prompt), _last_text(completion))
        if not met:
            raise ValueError(f"no checkable condition in the prompt {_last_text(prompt)[:60]!r}")
        scores.append(sum(met.values()) / len(met))
    return scores


def checkable_score_parts(prompts: list, completions: list, **columns: Any) -> list[dict[str, bool]]:
    """For each completion the conditions of its prompt, and whether it meets them: what the score is made of."""
    pairs = zip(prompts, completions, strict=True)
    return [conditions_met(_last_text(prompt), _last_text(completion)) for prompt, completion in pairs]


def _last_text(text_or_messages: str | list[dict[str, str]]) -> str:
    return text_or_messages if isinstance(text_or_messages, str) else text_or_messages[-1]["content"]
