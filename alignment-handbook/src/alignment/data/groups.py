"""Chooses the responses of a group, scales their scores, and makes pairs of them.

Every random draw is seeded by a hash of the row and a seed: the same row gives the same draw wherever it stands.
"""

import hashlib
import json
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from alignment.data import columns, rules, ultrafeedback
from alignment.data.cleaning import RowCleaner
from alignment.data.formats import to_group
from alignment.data.row import BadRow, Group
from alignment.data.texts import key_of
from alignment.errors import UserError


@dataclass
class RowConfig:
    """How rows of reward data are read; shared by `run_reward.py`, `run_preference.py` and `convert.py`."""

    row_rules: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Action for each kind of bad row, {reason: drop, keep, fix or fail}; docs/data.md has the table."
        },
    )
    score_range: list[float] | None = field(
        default=None,
        metadata={"help": "Smallest and largest valid score; a score outside is a sentinel, such as -1."},
    )
    min_responses: int = field(default=2, metadata={"help": "Rows with fewer usable responses are dropped."})
    tie_margin: float = field(
        default=0.0,
        metadata={"help": "Scores that differ by at most this much are a tie, in the unit of the scores as read."},
    )
    drop_sources: list[str] | None = field(
        default=None,
        metadata={"help": "Rows whose column `source` is one of these are dropped: truthful_qa false_qa."},
    )
    score: str = field(
        default="overall",
        metadata={
            "help": "Which score of raw UltraFeedback or HelpSteer: overall, fine-grained, or a weighted mean of "
            "aspects, such as helpfulness=2,honesty=1."
        },
    )
    columns: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Which columns are the prompt, the responses and so on, for data of no known form: {prompt: "
            "question, responses: answers.text, scores: answers.rating}."
        },
    )
    scale_scores: str = field(
        default="none",
        metadata={
            "help": "Rescale the scores of each prompt: none (as they are), zscore (mean 0, standard deviation 1) or "
            "minmax (0 to 1).",
            "choices": ["none", "zscore", "minmax"],
        },
    )
    num_responses: int | None = field(
        default=None,
        metadata={"help": "Use at most this many responses of a row that is trained on. None: all of them."},
    )
    choose_responses: str = field(
        default="spread",
        metadata={
            "help": "Which responses num_responses keeps: top or bottom by score, random, or spread evenly from best "
            "to worst.",
            "choices": ["top", "bottom", "random", "spread"],
        },
    )
    make_pairs: str | None = field(
        default=None,
        metadata={
            "help": "Make pairs of rows with more than two responses: best_worst, best_random (the best against "
            "another), or all (every two whose scores differ).",
            "choices": ["best_worst", "best_random", "all"],
        },
    )
    draw_seed: int = field(default=0, metadata={"help": "Seeds the draw of random responses and random pairs."})

    def __post_init__(self) -> None:
        self.row_rules = json.loads(self.row_rules) if isinstance(self.row_rules, str) else self.row_rules
        if self.row_rules is not None and not isinstance(self.row_rules, dict):
            raise ValueError(f"row_rules: not a mapping of reason to action: {self.row_rules!r}")
        rules.actions(self.row_rules)
        if isinstance(self.columns, str):
            try:
                self.columns = json.loads(self.columns)
            except json.JSONDecodeError as error:
                raise ValueError(f"columns: not a mapping: {self.columns!r}") from error
        if self.columns is not None:
            columns.check(self.columns)
        if self.score_range is not None and (len(self.score_range) != 2 or self.score_range[0] >= self.score_range[1]):
            raise ValueError(f"score_range: needs a smallest and a largest score, got {self.score_range}")
        for key, least in (("min_responses", 2), ("num_responses", 2), ("tie_margin", 0)):
            value = getattr(self, key)
            if value is not None and not value >= least:
                raise ValueError(f"{key}: must be at least {least}, got {value}")
        if self.num_responses is not None and self.num_responses < self.min_responses:
            raise ValueError(f"num_responses: {self.num_responses} is less than min_responses {self.min_responses}")
        ultrafeedback.parse_score(self.score)


class GroupReader:
    """Reads rows by a `RowConfig`.

    Args:
        config: The settings.
        pairs: Read `chosen` and `rejected` as better and worse, whatever their scores.
        unscored_pairs: Read them so only where they have no scores.
        control_tokens: Texts of the tokenizer's control tokens that are looked for in the rows.
    """

    def __init__(
        self,
        config: RowConfig,
        pairs: bool = False,
        unscored_pairs: bool = False,
        control_tokens: list[str] | None = None,
    ):
        self.config = config
        self.pairs = pairs
        self.unscored_pairs = unscored_pairs
        self.cleaner = RowCleaner(
            rules.actions(config.row_rules), control_tokens or (), config.score_range, config.min_responses
        )

    def __call__(self, row: Any) -> list[Group]:
        """Turns a row, or the `BadRow` that reading it gave, into a group that can be trained on, or into pairs.

        Raises:
            BadRow: It is to be dropped, or, a `FailedRow`, to end the run.
            UserError: A pair is wanted of more than two responses, and `make_pairs` does not say which.
        """
        try:
            if isinstance(row, BadRow):
                raise row
            if not isinstance(row, dict):
                raise BadRow("not_json", f"expected an object with named columns, got {type(row).__name__}")
            if row.get("source") in (self.config.drop_sources or []):
                raise BadRow("dropped_source", str(row["source"]))
            make_pairs = self.config.make_pairs is not None
            group = to_group(row, self.pairs, self.unscored_pairs, make_pairs, self.config.score)
        except BadRow as bad:
            raise self.cleaner.error(bad.reason, bad.detail) from None
        except RecursionError:
            raise self.cleaner.error("not_json", "nested too deep") from None
        if self.config.drop_sources:
            group.noted = [note for note in group.noted if note != "column source"]
        margin = 0.0 if group.ranked else self.config.tie_margin
        self.cleaner.clean(group)
        choose(group, self.config.num_responses, self.config.choose_responses, self.config.draw_seed)
        if max(group.scores) - min(group.scores) <= margin:
            self.cleaner.apply(group, "identical_scores", f"all of them {group.scores[0]:g}")
        if not (self.pairs or self.config.make_pairs):
            scale(group, self.config.scale_scores)
            return [group]
        return self._pairs(group, margin)

    def _pairs(self, group: Group, margin: float) -> list[Group]:
        method = self.config.make_pairs
        if method is None and len(group.responses) > 2:
            raise UserError(
                f"{len(group.responses)} responses; a pair has two: set make_pairs to best_worst, best_random or all, "
                "or use run_reward.py"
            )
        found = list(pairs_of(group, method, self.config.draw_seed, margin))
        if not found:  # tied scores that were to be kept make no pair
            raise self.cleaner.error("identical_scores", f"all of them {group.scores[0]:g}")
        scale(group, self.config.scale_scores)
        return [
            replace(
                group,
                responses=[group.responses[a], group.responses[b]],
                scores=[1.0, 0.0] if self.pairs else [group.scores[a], group.scores[b]],
                ranked=False,
            )
            for a, b in found
        ]


def choose(group: Group, num: int | None, method: str, seed: int) -> None:
    """Keeps `num` responses of the group, in their order: the top, the bottom, random ones, or a spread of all."""
    if num is None or len(group.responses) <= num:
        return
    best_first = sorted(range(len(group.scores)), key=lambda k: -group.scores[k])
    if method == "random":
        taken = _rng(group, seed).sample(best_first, num)
    elif method == "spread":
        taken = [best_first[round(i * (len(best_first) - 1) / (num - 1))] for i in range(num)]
    else:
        taken = best_first[:num] if method == "top" else best_first[-num:]
    taken.sort()
    group.responses = [group.responses[k] for k in taken]
    group.scores = [group.scores[k] for k in taken]


def scale(group: Group, method: str) -> None:
    """Rescales the scores: `zscore` to mean 0 and standard deviation 1, `minmax` to 0..1; equal ones become 0."""
    if method == "none":
        return
    low, spread = min(group.scores), max(group.scores) - min(group.scores)
    if method == "zscore":
        low, spread = statistics.fmean(group.scores), statistics.pstdev(group.scores)
    group.scores = [(score - low) / spread if spread else 0.0 for score in group.scores]


def pairs_of(group: Group, method: str | None, seed: int, tie_margin: float = 0.0) -> Iterator[tuple[int, int]]:
    """Indices (better, worse) of the pairs that are made of a group; a tie is no pair.

    Args:
        group: K responses and their scores.
        how: `best_worst`, `best_random`, `all`; None for a group of two.
        seed: Seeds the random draw.
        tie_margin: Scores that differ by at most this much are a tie.
    """
    best_first = sorted(range(len(group.scores)), key=lambda k: -group.scores[k])
    if method == "all":
        candidates = [(a, b) for i, a in enumerate(best_first) for b in best_first[i + 1 :]]
    else:
        candidates = [(best_first[0], b) for b in best_first[1:]]
    found = [(a, b) for a, b in candidates if group.scores[a] - group.scores[b] > tie_margin]
    if method == "best_random":
        found = [_rng(group, seed).choice(found)] if found else []
    yield from found if method == "all" else found[-1:]


def _rng(group: Group, seed: int) -> random.Random:
    digest = hashlib.sha256("\0".join([str(seed), *map(key_of, group.responses)]).encode("utf-8", "replace")).digest()
    return random.Random(digest)
