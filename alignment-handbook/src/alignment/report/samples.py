"""The sampled answers of a page, before training and after: those whose score has changed most come first."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from alignment.report.groups import Group

#: Prompts whose answers are shown.
_NUM_PROMPTS = 10


class Answer(NamedTuple):
    """A sampled answer: whose it is, its text, its score in words, and which of the score's parts are not met."""

    name: str
    text: str
    score: str
    parts: str


class Sampled(NamedTuple):
    """A prompt with its answers, and how far the mean score of its samples has changed; None where that is unknown."""

    prompt: str
    change: float | None
    answers: list[Answer]


def sampled_answers(groups: Sequence[Group]) -> list[Sampled]:
    """Ten prompts with the first sample of each model: those with the largest change of the mean score first.

    Args:
        groups: The first run of each is shown, with the samples before training of the very first.
    """
    runs = [group.runs[0] for group in groups]
    columns = [("before", runs[0].before)]
    columns += [(group.name if len(groups) > 1 else "after", group.runs[0].after) for group in groups]
    found = []
    for i, row in enumerate(runs[0].before or runs[0].after or []):
        there = [(name, rows[i]) for name, rows in columns if rows and i < len(rows)]
        same = [(name, other) for name, other in there if other["prompt"] == row["prompt"]]
        answers = [_answer(name, sampled) for name, sampled in same]
        found.append(Sampled(_as_text(row["prompt"]), _change([sampled for _, sampled in same]), answers))
    return sorted(found, key=lambda one: -abs(one.change or 0.0))[:_NUM_PROMPTS]


def _answer(name: str, row: dict[str, Any]) -> Answer:
    score = row["scores"][0]
    parts = {part: values[0] for part, values in (row.get("score_parts") or {}).items()}
    return Answer(name, row["samples"][0], "no score" if score is None else f"score {score:.3g}", _parts(parts))


def _parts(parts: dict[str, float | bool | None]) -> str:
    """Parts that are met or not by whether they are; numbers as they are. Parts that do not apply are left out."""
    given = {name: value for name, value in parts.items() if value is not None}
    if all(value in (0, 1) for value in given.values()):
        failed = [name for name, value in given.items() if not value]
        return f"failed: {' '.join(failed)}" if failed else "all conditions met" if given else ""
    return ", ".join(f"{name} {value:.3g}" for name, value in given.items())


def _change(rows: Sequence[dict[str, Any]]) -> float | None:
    """What the mean score of the last model's samples differs by from the first's."""
    means = []
    for row in (rows[0], rows[-1]):
        scores = [score for score in row["scores"] if score is not None]
        if not scores or len(rows) < 2:
            return None
        means.append(sum(scores) / len(scores))
    return means[1] - means[0]


def _as_text(prompt: Any) -> str:
    """Messages one below the other; of a single one, its text."""
    if isinstance(prompt, str):
        return prompt
    return prompt[0]["content"] if len(prompt) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
