"""What happens to a bad row: one table of rules, and `RowCleaner`, the only code that applies it.

A recipe changes an action by `row_rules: {reason: action}`. `drop` leaves the row out, `fix` does what the table says,
`keep` takes it as it is, `fail` ends the run and names the row.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.data.messages import looks_rendered
from alignment.data.row import BadRow, FailedRow, Group, as_number
from alignment.errors import did_you_mean


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    Attributes:
        meaning: What is wrong with the row.
        fix: What the action `fix` does; "" where there is none.
        actions: The actions that can be chosen; the first is the default.
    """

    meaning: str
    fix: str
    actions: tuple[str, ...]


_DROP = ("drop", "fail")
_KEPT = ("drop", "keep", "fail")
_FIX = ("fix", "drop", "fail")
_ANY = ("fix", "keep", "drop", "fail")
#: By reason, in the order in which a row meets them.
RULES: dict[str, Rule] = {
    "not_json": Rule("a line that is not JSON, or no object", "", _DROP),
    "unknown_format": Rule("columns of no known form", "", _DROP),
    "dropped_source": Rule("its `source` is one of `drop_sources`", "", _DROP),
    "lengths_differ": Rule("more responses than scores, or fewer; or one of them is no list", "", _DROP),
    "bad_messages": Rule("prompt or response is neither text nor messages that end with an answer", "", _DROP),
    "tool_calls": Rule("calls of tools, or a column `tools`: they are not read yet", "", _DROP),
    "reasoning_content": Rule("reasoning beside the text of a message: it is not read yet", "", _DROP),
    "template_kwargs": Rule("`chat_template_kwargs`, arguments for the chat template: not read yet", "", _DROP),
    "multi_turn_response": Rule("responses that part at an earlier turn than their last", "", _DROP),
    "prompts_differ": Rule("the responses do not answer the same turns, or the prompt says another", "", _DROP),
    "no_prompt": Rule("no prompt, or an empty one", "", _DROP),
    "broken_text": Rule("bytes that are not UTF-8, or half of a surrogate pair", "", _DROP),
    "no_overall_score": Rule("UltraFeedback's first release, without overall scores", "mean of the ratings", _FIX),
    "ten_for_one": Rule(
        "an overall score of 10 in UltraFeedback where 1 was meant",
        "1 where the mean rating is at most 2; missing where it is at most 4",
        ("fix", "drop", "fail"),
    ),
    "roles_do_not_alternate": Rule(
        "two turns of one role in a row, or a prompt that ends with the assistant's", "such turns are joined",
        ("drop", "keep", "fix", "fail"),
    ),
    "control_tokens": Rule(
        "text that spells one of the tokenizer's control tokens (kept, it stays text and never becomes the token)",
        "the token's text is removed", ("keep", "fix", "drop", "fail"),
    ),
    "empty_response": Rule("a response that is missing, empty or white space", "the response is left out", _ANY),
    "missing_score": Rule("a response without a score", "the response is left out", _FIX),
    "text_score": Rule("a score or weight that is a number written as text", "the number is read", _FIX),
    "unreadable_score": Rule('a score that is no number ("N/A", true)', "the response is left out", _FIX),
    "non_finite_score": Rule("a score that is NaN, or too large for float32", "the response is left out", _FIX),
    "score_out_of_range": Rule("a score outside `score_range`, such as -1 for none", "the response is left out", _ANY),
    "bad_weight": Rule(
        "a weight that is no finite number of 0 or more, or not the same in all rows of a prompt", "", _DROP
    ),
    "duplicate_response": Rule(
        "a response that occurs twice, as text or as tokens", "the first stays, with the mean of their scores", _ANY
    ),
    "too_few_responses": Rule("fewer than `min_responses` responses (2) are left", "", _DROP),
    "identical_scores": Rule("no two scores differ by more than `tie_margin` (0)", "", _KEPT),
    "template_refused": Rule("the tokenizer's chat template refuses the turns", "", _DROP),
    "system_not_rendered": Rule(
        "the chat template leaves out the system's turn, in training as in sampling", "", ("keep", "drop", "fail"),
    ),
    "prompt_not_rendered": Rule("the chat template leaves out the text of another turn of the prompt", "", _KEPT),
    "response_not_rendered": Rule(
        "the chat template leaves out text of a response, such as its thinking, or writes other thinking before it",
        "", _DROP,
    ),
    "prompt_not_as_sampled": Rule(
        "sampling starts from another prompt, such as one that opens `<think>` where the response has none", "", _KEPT
    ),
    "prompt_too_long": Rule("the prompt leaves no room for a response in `max_length`", "", _DROP),
    "empty_prompt": Rule("a prompt without a token", "", _DROP),
    "no_scored_token": Rule("a response of which no token counts, or none that `max_length` leaves", "", _DROP),
    "over_long": Rule("prompt and response together are longer than `max_length`", "the end is cut", _FIX),
}  # fmt: skip


#: Actions of older recipes -> today's.
OLD_ACTIONS = {"mend": "fix"}


def actions(chosen: Mapping[str, str] | None) -> dict[str, str]:
    """The action for each reason: the defaults, and those that a recipe changes.

    Raises:
        ValueError: An unknown reason, or an action that the reason does not have.
    """
    chosen = {reason: OLD_ACTIONS.get(str(action), action) for reason, action in (chosen or {}).items()}
    for reason, action in chosen.items():
        if reason not in RULES:
            hint = did_you_mean(reason, RULES) or f"the reasons are {', '.join(RULES)}"
            raise ValueError(f"row_rules: unknown reason {reason!r}; {hint}")
        if action not in RULES[reason].actions:
            raise ValueError(f"row_rules: {reason} is one of {', '.join(RULES[reason].actions)}; got {action!r}")
    return {reason: rule.actions[0] for reason, rule in RULES.items()} | chosen


@dataclass
class RowCleaner:
    """Applies the table to groups.

    Attributes:
        actions: The action for each reason, from `actions`.
        control_tokens: Texts of the tokenizer's control tokens to look for.
        score_range: Smallest and largest score that can be meant; None: any.
        min_responses: A group with fewer responses is dropped.
    """

    actions: dict[str, str]
    control_tokens: Sequence[str] = ()
    score_range: tuple[float, float] | None = None
    min_responses: int = 2

    def clean(self, group: Group) -> None:
        """Fixes a group in place; afterwards it has K >= `min_responses` texts and finite scores.

        Raises:
            BadRow: It is to be dropped, or, a `FailedRow`, to end the run.
        """
        named, group.fixed = group.fixed, []
        for reason in named:
            self.apply(group, reason)
        self._check_characters(group)
        self._check_roles(group)
        self._check_control_tokens(group)
        self._check_responses(group)
        group.weight = self._weight(group)
        self._merge_duplicates(group)
        if len(group.responses) < self.min_responses:
            also = f" (after {', '.join(group.fixed)})" if group.fixed else ""
            raise self.error("too_few_responses", f"{len(group.responses)} usable response{also}")

    def error(self, reason: str, detail: str = "") -> BadRow:
        """The exception for a row that is dropped, or that ends the run."""
        return (FailedRow if self.actions[reason] == "fail" else BadRow)(reason, detail)

    def apply(self, group: Group, reason: str, detail: str = "") -> bool:
        """Applies the rule of a reason: True to fix it (noted in the group), False to keep it; raises otherwise."""
        if self.actions[reason] in ("drop", "fail"):
            raise self.error(reason, detail)
        if self.actions[reason] == "fix" and reason not in group.fixed:
            group.fixed.append(reason)
        return self.actions[reason] == "fix"

    def _check_characters(self, group: Group) -> None:
        texts = [m["content"] for m in group.prompt] + [r for r in group.responses if r is not None]
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            # Bytes that are not UTF-8 were read as these.
            is_bytes = all("\udc80" <= half <= "\udcff" for half in error.object[error.start : error.end])
            named = "bytes that are not UTF-8 (Latin-1 perhaps; `iconv -f latin1 -t utf8` makes it UTF-8)"
            raise self.error("broken_text", named if is_bytes else "half of a surrogate pair") from None

    def _check_roles(self, group: Group) -> None:
        roles = [m["role"] for m in group.prompt] + ["assistant"]
        doubled = [role for role, after in zip(roles, roles[1:], strict=False) if role == after != "tool"]
        if not doubled or not self.apply(group, "roles_do_not_alternate", f"two turns of {doubled[0]} in a row"):
            return
        if roles[-2] == "assistant":
            raise self.error("roles_do_not_alternate", "the prompt ends with the assistant's turn")
        joined: list[dict[str, str]] = []
        for message in group.prompt:
            if joined and joined[-1]["role"] == message["role"] != "tool":
                joined[-1] = {**message, "content": f"{joined[-1]['content']}\n\n{message['content']}"}
            else:
                joined.append(message)
        group.prompt = joined

    def _check_control_tokens(self, group: Group) -> None:
        texts = [m["content"] for m in group.prompt] + [r for r in group.responses if r is not None]
        if any(map(looks_rendered, texts[: len(group.prompt) + 1])):  # the prompt's, and an answer's
            group.noted.append("rendered")
        tokens = [token for token in self.control_tokens if any(token in text for text in texts)]
        if tokens:
            group.noted.append("control_tokens")
        if not tokens or not self.apply(group, "control_tokens", f"spells {tokens[0]}"):
            return

        def without(text: str) -> str:
            before = None
            while before != text:  # removing one may join the parts of another
                before = text
                for token in tokens:
                    text = text.replace(token, "")
            return text

        group.prompt = [{**m, "content": without(m["content"])} for m in group.prompt]
        group.responses = [None if r is None else without(r) for r in group.responses]

    def _check_responses(self, group: Group) -> None:
        responses, scores = [], []
        for k, (response, raw) in enumerate(zip(group.responses, group.scores, strict=True)):
            is_empty = response is None or is_blank(response)
            left_out = is_empty and self.apply(group, "empty_response", f"response {k + 1}")
            score = None if left_out else self._score(group, raw, k)
            if score is not None:
                responses.append(response or "")
                scores.append(score)
        group.responses, group.scores = responses, scores

    def _score(self, group: Group, raw: Any, k: int) -> float | None:
        """A score as a finite number; None for a response that is left out."""
        location = f"the score of response {k + 1} is {raw!r}"
        if raw is None or (isinstance(raw, str) and not raw.strip()):
            self.apply(group, "missing_score", f"response {k + 1} has none")
            return None
        score = as_number(raw)
        if score is None:
            self.apply(group, "unreadable_score", location)
            return None
        if not abs(score) <= _LARGEST:  # NaN is not
            self.apply(group, "non_finite_score", location)
            return None
        if isinstance(raw, str):
            self.apply(group, "text_score", location)
        if self.score_range and not group.ranked and not self.score_range[0] <= score <= self.score_range[1]:
            return None if self.apply(group, "score_out_of_range", location) else score
        return score

    def _weight(self, group: Group) -> float | None:
        """The weight as a finite number of 0 or more; None where the row does not say."""
        raw = group.weight
        if raw is None or (isinstance(raw, str) and not raw.strip()):
            return None
        weight = as_number(raw)
        if weight is None or not 0 <= weight <= _LARGEST:  # NaN is not
            raise self.error("bad_weight", f"the weight is {raw!r}")
        if isinstance(raw, str):
            self.apply(group, "text_score", f"the weight is {raw!r}")
        return weight

    def _merge_duplicates(self, group: Group) -> None:
        indices: dict[str, list[int]] = {}
        for k, response in enumerate(group.responses):
            indices.setdefault(response, []).append(k)
        if len(indices) == len(group.responses):
            return
        twice = next(ks for ks in indices.values() if len(ks) > 1)
        if self.apply(group, "duplicate_response", f"responses {twice[0] + 1} and {twice[1] + 1} are the same"):
            group.responses = list(indices)
            group.scores = [math.fsum(group.scores[k] for k in ks) / len(ks) for ks in indices.values()]


#: The largest float32: the losses see scores in this type.
_LARGEST = 3.4e38
# What str.strip leaves though nobody sees it: zero-width space, non-joiner, joiner, word joiner, byte-order mark.
_INVISIBLE = str.maketrans("", "", "\u200b\u200c\u200d\u2060\ufeff")


def is_blank(text: str) -> bool:
    """Whether there is nothing to see in a text."""
    return not text.translate(_INVISIBLE).strip()
