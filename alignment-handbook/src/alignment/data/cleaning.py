"""Applies the rules to a row: `RowCleaner`, the only code that does."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignment.data.messages import looks_rendered
from alignment.data.row import BadRow, FailedRow, Group, as_number, as_response
from alignment.data.texts import key_of, map_strings, says_nothing, strings, texts_in
from alignment.data.turns import doubled_role, faults_of_calls, joined


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
        """Fixes a group in place; afterwards it has K >= `min_responses` responses and finite scores.

        Raises:
            BadRow: It is to be dropped, or, a `FailedRow`, to end the run.
        """
        named, group.fixed = group.fixed, []
        for reason in named:
            self.apply(group, reason)
        self._check_characters(group)
        self._check_roles(group)
        self._check_calls(group)
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
        texts = [*texts_in([group.prompt, *group.responses]), *strings([group.tools, group.chat_template_kwargs])]
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            # Bytes that are not UTF-8 were read as these.
            is_bytes = all("\udc80" <= half <= "\udcff" for half in error.object[error.start : error.end])
            named = "bytes that are not UTF-8 (Latin-1 perhaps; `iconv -f latin1 -t utf8` makes it UTF-8)"
            raise self.error("broken_text", named if is_bytes else "half of a surrogate pair") from None

    def _check_roles(self, group: Group) -> None:
        answers = [response for response in group.responses if isinstance(response, list)]
        doubled = doubled_role([*group.prompt, _ANSWER]) or next(filter(None, map(doubled_role, answers)), None)
        if not doubled or not self.apply(group, "roles_do_not_alternate", f"two turns of {doubled} in a row"):
            return
        if group.prompt[-1]["role"] == "assistant":
            raise self.error("roles_do_not_alternate", "the prompt ends with the assistant's turn")
        group.prompt = joined(group.prompt)
        group.responses = [as_response(joined(said)) if isinstance(said, list) else said for said in group.responses]

    def _check_calls(self, group: Group) -> None:
        of_prompt = [turn for turn in group.prompt if turn["role"] == "tool" or "tool_calls" in turn]
        answers = [response for response in group.responses if isinstance(response, list)]
        if not of_prompt and not answers:
            return
        # A text goes on from the prompt as every answer does.
        for answer in [*answers, [_ANSWER]]:
            for reason, detail in faults_of_calls([*group.prompt, *answer]).items():
                self.apply(group, reason, detail)

    def _check_control_tokens(self, group: Group) -> None:
        if any(map(looks_rendered, texts_in([group.prompt, *group.responses[:1]]))):
            group.noted.append("rendered")
        texts = [*texts_in([group.prompt, *group.responses]), *strings([group.tools, group.chat_template_kwargs])]
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

        for name in ("prompt", "responses", "tools", "chat_template_kwargs"):
            setattr(group, name, map_strings(getattr(group, name), without))

    def _check_responses(self, group: Group) -> None:
        responses, scores = [], []
        for k, (response, raw) in enumerate(zip(group.responses, group.scores, strict=True)):
            left_out = says_nothing(response) and self.apply(group, "empty_response", f"response {k + 1}")
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
            indices.setdefault(key_of(response), []).append(k)
        if len(indices) == len(group.responses):
            return
        twice = next(ks for ks in indices.values() if len(ks) > 1)
        if self.apply(group, "duplicate_response", f"responses {twice[0] + 1} and {twice[1] + 1} are the same"):
            group.responses = [group.responses[ks[0]] for ks in indices.values()]
            group.scores = [math.fsum(group.scores[k] for k in ks) / len(ks) for ks in indices.values()]


#: The largest float32: the losses see scores in this type.
_LARGEST = 3.4e38
#: What every response is, for rules of the prompt alone.
_ANSWER: dict[str, Any] = {"role": "assistant", "content": ""}
