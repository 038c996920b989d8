"""What happens to a bad row: the table of rules, which `data.cleaning` applies.

A recipe changes an action by `row_rules: {reason: action}`. `drop` leaves the row out, `fix` does what the table says,
`keep` takes it as it is, `fail` ends the run and names the row.
"""

from collections.abc import Mapping
from dataclasses import dataclass

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
    "bad_messages": Rule("prompt or response is neither text nor messages of known roles and parts", "", _DROP),
    "bad_tools": Rule("calls, tools or `chat_template_kwargs` that are no JSON, or without a name", "", _DROP),
    "no_assistant_turn": Rule("a response of messages without a turn of the assistant's", "", _DROP),
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
    "call_without_result": Rule(
        "a call that other turns follow without its result (that of the last turn needs none)", "", _KEPT
    ),
    "result_without_call": Rule("a tool's turn before any call, or with a `tool_call_id` that no call has", "", _KEPT),
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
        "the chat template leaves out text of a response, such as its thinking or `reasoning_content`, or writes other "
        "thinking before it",
        "", _DROP,
    ),
    "calls_not_rendered": Rule(
        "the chat template leaves out a call, what a tool returned, or the tools that may be called", "", _KEPT
    ),
    "turns_not_found": Rule("the rendering does not show which of its tokens are the assistant's", "", _DROP),
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
