"""The table of rules for bad rows: each reason, each of its actions, the page that documents it, and malformed rows."""

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.data.groups import GroupReader, RowConfig
from alignment.data.row import BadRow, FailedRow
from alignment.data.rules import RULES, actions
from alignment.data.texts import is_blank
from tests.conftest import ROOT

USER = [{"role": "user", "content": "Capital of France?"}]
ROW = {"prompt": USER, "responses": ["Rome", "Paris", "Oslo"], "scores": [0.1, 0.9, 0.2]}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "capital", "arguments": {}}}],
}
RESULT = {"role": "tool", "content": "Paris", "tool_call_id": "c1"}
TWO_TURNS = [{"role": "user", "content": "Hi"}, *USER]


def row(**changes):
    return ROW | changes


def read(raw, rules=None, control_tokens=("<eos>",), **settings):
    return GroupReader(RowConfig(row_rules=rules, **settings), control_tokens=control_tokens)(raw)[0]


#: A row for each rule that can be met while a row is read, and settings it needs.
BAD = {
    "not_json": (["no", "object"], {}),
    "unknown_format": ({"prompt": "p", "answers": ["a"]}, {}),
    "dropped_source": (row(source="truthful_qa"), {"drop_sources": ["truthful_qa"]}),
    "lengths_differ": (row(scores=[0.1, 0.9]), {}),
    "bad_messages": (row(responses=["a", 7, "b"]), {}),
    "bad_tools": (row(tools=[{"type": "function", "function": {"parameters": {}}}]), {}),
    "no_assistant_turn": (row(responses=["Rome", USER, "Oslo"]), {}),
    "prompts_differ": (
        {
            "chosen": [*USER, {"role": "assistant", "content": "Paris"}],
            "rejected": [*TWO_TURNS, {"role": "assistant", "content": "Rome"}],
            "score_chosen": 2,
            "score_rejected": 1,
        },
        {},
    ),
    "no_prompt": (row(prompt=" "), {}),
    "broken_text": (row(responses=["a", "\ud800", "b"]), {}),
    "no_overall_score": (
        {
            "instruction": "p",
            "completions": [
                {"response": r, "annotations": {"honesty": [{"Rating": n}]}} for r, n in [("a", "2"), ("b", "5")]
            ],
        },
        {},
    ),
    "ten_for_one": (
        {
            "instruction": "p",
            "completions": [
                {"response": "a", "overall_score": 10, "fine-grained_score": 1.5},
                {"response": "b", "overall_score": 7, "fine-grained_score": 4.0},
            ],
        },
        {},
    ),
    "roles_do_not_alternate": (row(prompt=TWO_TURNS), {}),
    "call_without_result": (row(prompt=[*USER, CALL, *USER]), {}),
    "result_without_call": (row(prompt=[*USER, RESULT]), {}),
    "control_tokens": (row(responses=["Rome<eos>", "Paris", "Oslo"]), {}),
    "empty_response": (row(responses=["Rome", "Paris", " \u200b\n"]), {}),
    "missing_score": (row(scores=[0.1, 0.9, None]), {}),
    "text_score": (row(scores=[0.1, 0.9, "0.2"]), {}),
    "unreadable_score": (row(scores=[0.1, 0.9, "N/A"]), {}),
    "non_finite_score": (row(scores=[0.1, 0.9, math.nan]), {}),
    "score_out_of_range": (row(scores=[0.1, 0.9, -1]), {"score_range": [0, 1]}),
    "bad_weight": (row(weight=-1), {}),
    "duplicate_response": (row(responses=["Rome", "Paris", "Rome"]), {}),
    "too_few_responses": (row(responses=["Rome"], scores=[1]), {}),
    "identical_scores": (row(scores=[0.5, 0.5, 0.5]), {}),
}
#: Rules that are met when the row is tokenized; test_responses.py, test_rendering.py and test_scripts.py have them.
OF_TOKENS = {"template_refused", "prompt_too_long", "empty_prompt", "over_long", "no_scored_token"}
OF_TOKENS |= {"calls_not_rendered", "turns_not_found"}
OF_TOKENS |= {"system_not_rendered", "prompt_not_rendered", "response_not_rendered", "prompt_not_as_sampled"}
#: What is left of the row above when it is fixed: responses and scores.
FIXED = {
    "no_overall_score": (["a", "b"], [2.0, 5.0]),
    "ten_for_one": (["a", "b"], [1.0, 7.0]),
    "roles_do_not_alternate": (ROW["responses"], ROW["scores"]),
    "control_tokens": (ROW["responses"], ROW["scores"]),
    "text_score": (ROW["responses"], ROW["scores"]),
    "duplicate_response": (["Rome", "Paris"], [pytest.approx(0.15), 0.9]),
}


def test_every_rule_has_a_row_here():
    assert set(BAD) | OF_TOKENS == set(RULES)


@pytest.mark.parametrize(("reason", "action"), [(reason, action) for reason in BAD for action in RULES[reason].actions])
def test_every_action_of_every_rule(reason, action):
    raw, settings = BAD[reason]
    if action in ("drop", "fail"):
        with pytest.raises(BadRow) as caught:
            read(raw, {reason: action}, **settings)
        assert caught.value.reason == reason
        assert isinstance(caught.value, FailedRow) == (action == "fail")
        return
    group = read(raw, {reason: action}, **settings)
    assert group.fixed == ([reason] if action == "fix" else [])
    if action == "fix":
        left, scores = FIXED.get(reason, (ROW["responses"][:2], ROW["scores"][:2]))
        assert (group.responses, group.scores) == (left, scores)
    else:
        assert len(group.responses) == len(raw["responses"])


def test_joined_turns_and_removed_tokens():
    assert read(row(prompt=TWO_TURNS), {"roles_do_not_alternate": "fix"}).prompt == [
        {"role": "user", "content": "Hi\n\nCapital of France?"}
    ]
    # What is left when one is removed may spell another.
    assert read(row(responses=["Ro<e<eos>os>me", "P", "O"]), {"control_tokens": "fix"}).responses[0] == "Rome"
    with pytest.raises(BadRow, match="ends with the assistant's turn"):
        turns = [*USER, {"role": "assistant", "content": "Well,"}]
        read(row(prompt=turns), {"roles_do_not_alternate": "fix"})


@pytest.mark.parametrize(
    ("overall", "fine_grained", "meant"),
    [(10, 1.5, 1.0), (10, 2.0, 1.0), ("10", 1.0, 1.0), (10, 4.5, 10.0), (10.0, None, 10.0), (9, 1.0, 9.0)],
)
def test_ultrafeedbacks_ten(overall, fine_grained, meant):
    completions = [
        {"response": "a", "overall_score": overall, "fine-grained_score": fine_grained},
        {"response": "b", "overall_score": 5.5, "fine-grained_score": 3},
    ]
    assert read({"instruction": "p", "completions": completions}).scores == [meant, 5.5]


@pytest.mark.parametrize("fine_grained", [2.5, 4.0])
def test_a_ten_that_nobody_knows_is_left_out(fine_grained):
    completions = [{"response": "a", "overall_score": 10, "fine-grained_score": fine_grained}] + [
        {"response": r, "overall_score": n} for r, n in [("b", 5.5), ("c", 6)]
    ]
    group = read({"instruction": "p", "completions": completions})
    assert (group.responses, group.fixed) == (["b", "c"], ["ten_for_one", "missing_score"])


def test_scores_of_aspects():
    def completion(response, honesty, helpfulness):
        return {
            "response": response,
            "overall_score": 3,
            "annotations": {"honesty": {"Rating": honesty}, "helpfulness": {"Rating": helpfulness, "Type": ["1"]}},
        }

    raw = {"instruction": "p", "completions": [completion("a", "4", "1"), completion("b", "N/A", "5")]}
    assert read(raw, score="honesty=1,helpfulness=2").scores == [2.0, 5.0]
    assert read(raw, score="fine-grained").scores == [2.5, 5.0]
    with pytest.raises(BadRow, match="too_few_responses"):
        read(raw, score="honesty")


def test_defaults_are_the_first_action_and_can_be_changed():
    assert actions(None)["text_score"] == "fix"
    assert actions({"text_score": "drop"})["text_score"] == "drop"
    with pytest.raises(ValueError, match="did you mean 'text_score'"):
        actions({"text_scores": "drop"})
    with pytest.raises(ValueError, match="not_json is one of drop, fail; got 'fix'"):
        actions({"not_json": "fix"})


def test_the_table_in_the_docs_is_the_table_in_the_code():
    page = (ROOT / "docs" / "data.md").read_text()
    documented = {m[0]: m.groups() for m in re.finditer(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \|$", page, re.MULTILINE)}
    documented = {name: rest for name, *rest in documented.values() if name in RULES or "_" in name}
    assert documented == {
        reason: [rule.meaning, rule.fix, ", ".join([f"**{rule.actions[0]}**", *rule.actions[1:]])]
        for reason, rule in RULES.items()
    }


def test_what_nobody_sees_is_blank():
    assert is_blank("")
    assert is_blank(" \n\t\u200b\ufeff\u3000")
    assert not is_blank("\u597d")


# --- Malformed rows: whatever stands in a row, it is read or dropped under a name of the table.

_text = st.text(max_size=8) | st.sampled_from(
    ["", " ", "7", "N/A", "\u200b", "\ud800", "<eos>", "nan", "1e999", "[1]", "[{'role': 'user', 'content': 'a'}]",
     '[{"role": "assistant"', "\n\nHuman: a\n\nAssistant: b", "['a' 'b']", "[1 2]"]
)  # fmt: skip
_parts = st.lists(st.dictionaries(st.sampled_from(["type", "text"]), st.just("text") | _text, max_size=2), max_size=2)
_anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=5,
)
_id = st.sampled_from(["c1", "c2", 7]) | st.none()
_arguments = st.dictionaries(_text, _anything, max_size=2) | st.sampled_from(['{"a": 1}', "{", "[]", ""])
_function = st.fixed_dictionaries({"name": st.sampled_from(["f", "g"]) | _anything}, optional={"arguments": _arguments})
_call = st.one_of(
    st.fixed_dictionaries({"function": _function}, optional={"id": _id, "type": st.just("function") | _anything}),
    _function,
    _anything,
)
_calls = st.lists(_call, max_size=3) | _call | _anything
_part = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "thinking", "tool_use", "tool_result", "image"])},
    optional={"text": _text, "thinking": _text, "name": _text, "id": _id, "input": _arguments, "tool_use_id": _id,
              "content": _text},
)  # fmt: skip
_message = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "tool", "function_call", "observation", 7]) | st.none(),
        "content": _text | st.none() | _parts | st.lists(_part, max_size=3),
    },
    optional={"tool_calls": _calls, "function_call": _call, "tool_call_id": _id, "name": _anything,
              "reasoning_content": _anything, "thinking": _text},
)  # fmt: skip
#: Turns that are mostly as they should be, so that the rules for their order are met.
_turn = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.sampled_from("abc")}),
    st.fixed_dictionaries({"role": st.just("tool"), "content": st.just("4")}, optional={"tool_call_id": _id}),
    st.builds(
        lambda *ids: {"role": "assistant", "content": None,
                      "tool_calls": [{"id": i, "function": {"name": "f", "arguments": {}}} for i in ids]},
        _id, _id,
    ),
)  # fmt: skip
_turns = st.lists(_message | _turn, max_size=4) | st.lists(_turn, max_size=6)
_response = _text | _turns | _anything
_score = st.floats() | st.integers(-3, 12) | _anything
_prompt = _text | _turns | st.fixed_dictionaries({"messages": _turns, "tools": _calls}) | _anything
_annotations = _anything | st.dictionaries(st.sampled_from(["honesty", "helpfulness"]), _anything)
_objects = st.dictionaries(st.sampled_from(["answer", "text", "rank", "score", "role"]), _text | _score, max_size=3)
_column = st.sampled_from(
    "prompt question instruction input history system messages conversations context chosen rejected "
    "chosen_score rejected-rating responses answers completions scores ratings ranks response1 response2 "
    "overall_preference response_0 response_1 better_response_id human_ref_A human_ref_B score_A score_B "
    "tools functions chat_template_kwargs A0 score_A0".split()
)
_rows = st.one_of(
    st.fixed_dictionaries(
        {"prompt": _prompt, "responses": st.lists(_response, max_size=5), "scores": st.lists(_score, max_size=5)},
        optional={"tools": _calls, "chat_template_kwargs": _arguments},
    ),
    st.integers(0, 5).flatmap(
        lambda k: st.fixed_dictionaries(
            {
                "prompt": _prompt,
                "responses": st.lists(_response, min_size=k, max_size=k),
                "rewards": st.lists(_score, min_size=k, max_size=k),
            },
            optional={"tools": _calls, "chat_template_kwargs": _arguments},
        )
    ),
    st.fixed_dictionaries(
        {"prompt": _prompt, "A0": _response, "A1": _response, "score_A0": _score, "score_A1": _score}
    ),
    st.fixed_dictionaries(
        {"chosen": _response, "rejected": _response, "score_chosen": _score, "score_rejected": _score},
        optional={"prompt": _prompt},
    ),
    st.fixed_dictionaries(
        {
            "instruction": _prompt,
            "completions": st.lists(
                _anything
                | st.fixed_dictionaries(
                    {"response": _response, "overall_score": _score, "fine-grained_score": _score},
                    optional={"annotations": _annotations},
                ),
                max_size=4,
            ),
        }
    ),
    st.dictionaries(_text, _anything, max_size=4),
    st.dictionaries(_column, _prompt | _response | st.lists(_response | _objects, max_size=3) | _score, max_size=6),
    _anything,
)


def is_canonical(turn):
    """Whether a message is as the engine takes it: no key without a value."""
    of_role = {"assistant": {"reasoning_content", "tool_calls"}, "tool": {"tool_call_id", "name"}}
    others = {key: value for key, value in turn.items() if key not in ("role", "content")}
    texts = [turn["content"], *(value for key, value in others.items() if key != "tool_calls")]
    functions = [call["function"] for call in others.get("tool_calls", [])]
    return (
        turn["role"] in ("system", "user", "assistant", "tool")
        and others.keys() <= of_role.get(turn["role"], set())
        and all(others.values())
        and all(isinstance(text, str) for text in [*texts, *(function["name"] for function in functions)])
        and all(isinstance(function["arguments"], dict | str) for function in functions)
    )


@settings(max_examples=500, deadline=None)
@given(
    raw=_rows,
    action=st.sampled_from(["drop", "fix", "keep"]),
    settings_=st.sampled_from(
        [{}, {"score_range": [0, 1]}, {"num_responses": 2, "choose_responses": "random"}, {"make_pairs": "all"},
         {"scale_scores": "zscore"}, {"scale_scores": "minmax", "make_pairs": "best_random"}, {"score": "fine-grained"}]
    ),
)  # fmt: skip
def test_a_malformed_row_is_read_or_dropped_under_a_name(raw, action, settings_):
    rules = {reason: action for reason, rule in RULES.items() if action in rule.actions}
    try:
        groups = GroupReader(RowConfig(row_rules=rules, **settings_), unscored_pairs=True, control_tokens=["<eos>"])(
            raw
        )
    except BadRow as bad:
        assert bad.reason in RULES
        return
    assert groups
    for group in groups:
        assert len(group.responses) == len(group.scores) >= 2
        assert all(isinstance(said, str) or said[0]["role"] == "assistant" for said in group.responses)
        for said in [group.prompt, *group.responses]:
            assert isinstance(said, str) or all(map(is_canonical, said))
        assert all(isinstance(score, float) and math.isfinite(score) for score in group.scores)
        assert group.prompt
        whole = [group.prompt, group.responses, group.tools, group.chat_template_kwargs]
        assert json.loads(json.dumps(whole, ensure_ascii=False, allow_nan=False).encode()) == whole
        assert set(group.fixed) <= set(RULES)


def test_the_old_name_of_fix_is_read():
    text_scores = row(scores=["1", "2", "3"])
    assert read(text_scores, {"text_score": "mend"}) == read(text_scores, {"text_score": "fix"})
    assert actions({"text_score": "mend"}) == actions({"text_score": "fix"})
