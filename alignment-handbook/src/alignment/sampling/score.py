"""Scores the responses of a file by Python reward functions, reward models, and their weighted sum.

Each scorer goes through the rows batch by batch, the longest first; finished batches are saved
(`alignment.resumable`).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from alignment.data.messages import messages_of
from alignment.data.row import BadRow, Response, Row, as_response
from alignment.data.texts import texts_in
from alignment.errors import UserError
from alignment.resumable import Entry, PartFile, content_hash, fingerprint
from alignment.sampling.prompts import read_prompts
from alignment.sampling.reward_function import Scores, call_reward_function, code_fingerprint, load_reward_function


@dataclass(frozen=True)
class Scorer:
    """One source of scores: a function `FILE.py:NAME`, or a reward model's folder or Hub id; and its weight."""

    name: str
    weight: float
    is_model: bool

    @classmethod
    def parse(cls, spec: str, is_model: bool) -> "Scorer":
        """A scorer from `NAME[=WEIGHT]`.

        Example:
            >>> Scorer.parse("rewards.py:brevity=0.5", is_model=False)
            Scorer(name='rewards.py:brevity', weight=0.5, is_model=False)
            >>> Scorer.parse("org/reward-model", is_model=True).weight
            1.0
        """
        name, equals, weight = spec.rpartition("=")
        if not equals:
            return cls(spec, 1.0, is_model)
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not name or not math.isfinite(value):
            raise UserError(f"command line: {spec!r} is no NAME=WEIGHT; the weight is a finite number")
        return cls(name, value, is_model)

    def fingerprint(self) -> str:
        """A hash that changes when its code or weights do."""
        return fingerprint(self.name) if self.is_model else code_fingerprint(self.name)


def score_file(
    path: str,
    output: str,
    scorers: list[Scorer],
    *,
    batch_size: int = 16,
    digits: int | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
) -> str:
    """Writes the rows of a file with `scores`, and with `score_parts` where there are several scorers.

    A run that was killed resumes where it stopped, and gives the file of an uninterrupted one, byte for byte.

    Args:
        path: Rows with `prompt` (see `read_prompts`) and `responses` (K texts, or lists of messages). Older scores are
            replaced.
        output: A `.jsonl`.
        scorers: At least one. The score is the sum of weight x score over those that apply; null where none does.
        batch_size: Responses scored at once; at least those of one row.
        digits: Decimals to round scores to.
        dtype: Type of a reward model's weights, "auto" as they were saved.
        overwrite: Replace `output`.

    Returns:
        What was written, in a sentence.

    Raises:
        UserError: See `read_prompts`, `PartFile`, `load_reward_function`, `RewardModel`; a row has no responses,
            a scorer is given twice, or a function returns something that is no score.
    """
    _check_scorers(scorers, batch_size)
    rows, locations = _read(path)
    header = {"rows": content_hash(rows), "scorers": [[scorer.name, scorer.fingerprint()] for scorer in scorers]}
    part = PartFile(output, header | {"batch_size": batch_size, "dtype": dtype}, overwrite)
    done = {(entry["scorer"], entry["batch"]) for entry in part.entries}
    num_done = sum(len(entry["rows"]) for entry in part.entries)
    batches = _batches(rows, batch_size)
    with tqdm(total=len(scorers) * len(rows), initial=num_done, desc="Scoring", unit="row") as progress:
        for scorer in scorers:
            missing = [b for b in range(len(batches)) if (scorer.name, b) not in done]
            score = _open(scorer, batch_size, dtype) if missing else None
            for b in missing:
                found = score([rows[i] for i in batches[b]], [locations[i] for i in batches[b]])
                part.add({"scorer": scorer.name, "batch": b, "rows": batches[b], "scores": found})
                progress.update(len(batches[b]))
    part.finish(_join(rows, scorers, part.entries, digits))
    return f"{output}: {len(rows)} rows, {sum(len(row['responses']) for row in rows)} responses scored"


def _open(scorer: Scorer, batch_size: int, dtype: str) -> Callable[[list[Row], list[str]], list[Scores]]:
    if not scorer.is_model:
        return partial(call_reward_function, load_reward_function(scorer.name), scorer.name)
    from alignment.sampling.reward_model import RewardModel  # torch and transformers are slow to import

    return RewardModel(scorer.name, batch_size, dtype)


def _check_scorers(scorers: list[Scorer], batch_size: int) -> None:
    """Checks what can be checked before any work, in all functions."""
    names = [scorer.name for scorer in scorers]
    if not scorers or batch_size < 1:
        raise UserError("command line: give a --reward_function or a --reward_model, and a --batch_size of at least 1")
    if len(set(names)) < len(names):
        raise UserError(f"command line: {max(names, key=names.count)} is given twice; give it once, with its weight")
    for scorer in scorers:
        if not scorer.is_model:
            load_reward_function(scorer.name)


def _read(path: str) -> tuple[list[Row], list[str]]:
    rows, locations = read_prompts(path)
    for row, location in zip(rows, locations, strict=True):
        responses = row.get("responses")
        if not isinstance(responses, list):
            raise UserError(f"{location}: needs a column responses, a list of texts, as sample.py writes it")
        row["responses"] = [_response(said, f"{location}: response {k + 1}") for k, said in enumerate(responses)]
    return rows, locations


def _response(said: Any, what: str) -> Response:
    if isinstance(said, str):
        return said
    try:
        turns = messages_of(said, what)
    except BadRow as bad:
        raise UserError(bad.detail) from bad
    if not turns or turns[0]["role"] != "assistant":
        raise UserError(f"{what} is neither text nor messages that begin with the assistant's")
    return as_response(turns)


def _batches(rows: list[Row], batch_size: int) -> list[list[int]]:
    """Indices of whole rows, longest first, of at most `batch_size` responses together where a row has not more."""

    def length(i: int) -> int:
        lengths = [sum(map(len, texts_in([response]))) for response in rows[i]["responses"]]
        return sum(map(len, texts_in([rows[i]["prompt"]]))) + max(lengths, default=0)

    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(rows)), key=length, reverse=True):
        room -= len(rows[i]["responses"])
        if room < 0 or not batches:
            batches.append([])
            room = batch_size - len(rows[i]["responses"])
        batches[-1].append(i)
    return batches


def _join(rows: list[Row], scorers: list[Scorer], entries: list[Entry], digits: int | None) -> Iterator[Row]:
    parts: list[dict[str, Scores]] = [{} for _ in rows]
    for entry in entries:
        for i, scores in zip(entry["rows"], entry["scores"], strict=True):
            parts[i][entry["scorer"]] = scores
    for row, by_name in zip(rows, parts, strict=True):
        given = [by_name[scorer.name] for scorer in scorers]
        weights = [scorer.weight for scorer in scorers]
        kept = {name: value for name, value in row.items() if name not in ("scores", "score_parts")}
        kept["scores"] = _rounded([_weighted_sum(weights, values) for values in zip(*given, strict=True)], digits)
        if len(scorers) > 1:
            kept["score_parts"] = {scorer.name: _rounded(by_name[scorer.name], digits) for scorer in scorers}
        yield kept


def _weighted_sum(weights: list[float], values: tuple[float | None, ...]) -> float | None:
    """Sum over the scorers that apply, as in TRL; None where none does."""
    given = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
    return math.fsum(given) if given else None


def _rounded(scores: Scores, digits: int | None) -> Scores:
    return [score if score is None or digits is None else round(score, digits) for score in scores]
