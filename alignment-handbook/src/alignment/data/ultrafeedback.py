"""Reads scores of aspects: UltraFeedback's as they were released, with the known errors fixed, and HelpSteer's."""

import math
from typing import Any

from alignment.errors import UserError

#: Aspects that were rated from 1 to 5.
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
#: Columns of HelpSteer 1 and 2, rated from 0 to 4; helpfulness is of the response as a whole.
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def parse_score(score: str) -> dict[str, float] | None:
    """Weights of the aspects in `score`: None for `overall`, all equal for `fine-grained`, or as given.

    Args:
        score: `overall`, `fine-grained`, or aspects with weights: `helpfulness=2,honesty=1` (a weight may be left out).

    Raises:
        UserError: It is none of these.
    """
    if score == "overall":
        return None
    if score == "fine-grained":
        return dict.fromkeys(ASPECTS, 1.0)
    weights = {}
    for part in score.split(","):
        aspect, equals, weight = part.strip().partition("=")
        try:
            weights[aspect] = float(weight) if equals else 1.0
        except ValueError:
            weights[aspect] = math.nan
        if aspect not in (*ASPECTS, *HELPSTEER) or not 0 < weights[aspect] < math.inf:
            raise UserError(
                f"score: {score!r}; choose overall, fine-grained, or aspects with weights above 0, such as "
                f"helpfulness=2,honesty=1 (aspects: {', '.join(dict.fromkeys((*ASPECTS, *HELPSTEER)))})"
            )
    return weights


def has_aspects(row: dict[str, Any]) -> bool:
    """Whether a row is one of HelpSteer's: a response with a column for each aspect."""
    return "helpfulness" in row and "correctness" in row


def score_of_aspects(row: dict[str, Any], score: str) -> float | None:
    """Score of a row of HelpSteer's: the weighted mean of its aspects' ratings; None without any.

    Args:
        row: Ratings by aspect.
        score: See `parse_score`; `overall` is helpfulness, `fine-grained` the mean of all five.
    """
    weights = {"overall": {"helpfulness": 1.0}, "fine-grained": dict.fromkeys(HELPSTEER, 1.0)}.get(score)
    weights = parse_score(score) if weights is None else weights
    ratings = {aspect: _number(row.get(aspect)) for aspect in weights}
    known = {aspect: rating for aspect, rating in ratings.items() if rating is not None}
    total = sum(weights[aspect] for aspect in known)
    return sum(weights[aspect] * rating for aspect, rating in known.items()) / total if total else None


def scores_of(completions: list[Any], score: str) -> tuple[list[Any], list[Any], list[str]]:
    """Responses, scores and the names of the rules by which scores were fixed.

    - The first release has no overall scores: the mean of the ratings takes their place in the whole row, since the two
      are on different scales (`no_overall_score`).
    - 2,628 completions have an overall score of 10 where 1 was meant. As published: with a mean rating of at most 2 it
      becomes 1, above 4 it stays; between, nobody knows, and the score is missing (`ten_for_one`).

    Args:
        completions: The completions of a row, one a response.
        score: See `parse_score`.
    """
    completions = [c if isinstance(c, dict) else {} for c in completions]
    responses = [c.get("response") for c in completions]
    weights = parse_score(score)
    if weights is not None:
        return responses, [mean_rating(c, weights) for c in completions], []
    overall = [c.get("overall_score") for c in completions]
    ratings = [mean_rating(c, dict.fromkeys(ASPECTS, 1.0)) for c in completions]
    if completions and all(value is None for value in overall):
        return responses, ratings, ["no_overall_score"]
    meant = [_meant(value, rating) for value, rating in zip(overall, ratings, strict=True)]
    return responses, meant, [] if meant == overall else ["ten_for_one"]


def _meant(overall: Any, rating: float | None) -> Any:
    if _number(overall) != 10 or rating is None or rating > 4:
        return overall
    return 1.0 if rating <= 2 else None


def mean_rating(completion: dict[str, Any], weights: dict[str, float]) -> float | None:
    """Weighted mean of the aspects' ratings that are numbers (the others are "N/A"); None without any.

    With all aspects and equal weights it is the column `fine-grained_score`.
    """
    annotations = completion.get("annotations")
    total = divisor = 0.0
    for aspect, weight in weights.items():
        rating = _rating((annotations or {}).get(aspect)) if isinstance(annotations, dict) else None
        if rating is not None:
            total, divisor = total + weight * rating, divisor + weight
    if divisor:
        return total / divisor
    # Tables without the annotations keep their mean.
    return _number(completion.get("fine-grained_score")) if set(weights) == set(ASPECTS) else None


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _rating(annotation: Any) -> float | None:
    """Rating of an aspect: a dict, or in the first release a list of dicts, whose ratings are averaged."""
    parts = annotation if isinstance(annotation, list) else [annotation]
    values = [_number(part.get("Rating")) for part in parts if isinstance(part, dict)]
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
