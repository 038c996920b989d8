"""Rows with tools, calls, reasoning and responses of several turns: spellings, forms, and what bad input gets."""

import json

import pytest
from datasets import Dataset

from alignment.data.convert import ConvertConfig, convert
from alignment.data.groups import GroupReader, RowConfig
from alignment.data.load import DataConfig, load_groups
from alignment.data.outcomes import check_template, count_outcomes, kept_rows
from alignment.data.reading import load_source
from alignment.data.row import BadRow, prompt_hash
from alignment.errors import UserError
from alignment.sampling.prompts import read_prompts
from tests.conftest import ROOT, SHARED, needs_shared
from tests.rows import numbered, said, write_jsonl

ASKED = {"role": "user", "content": "Weather in Oslo?"}
SCHEMA = {"name": "weather", "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}}
TOOL = {"type": "function", "function": SCHEMA}


def call(identity="c1", name="weather", **arguments):
    found = {"type": "function", "function": {"name": name, "arguments": arguments or {"town": "Oslo"}}}
    return {"id": identity, **found} if identity else found


def asks(*calls, content="", **more):
    return {"role": "assistant", "content": content, **more, "tool_calls": [*calls] or [call()]}


def result(content="4", identity="c1", **more):
    return {"role": "tool", "content": content, **({"tool_call_id": identity} if identity else {}), **more}


GOOD = [asks(), result(), *said("4 degrees.")]
ROW = {"prompt": [ASKED], "responses": [GOOD, "Hot.", [asks()]], "scores": [1.0, 0.0, 0.5], "tools": [TOOL]}


def group_of(row, pairs=False, **settings):
    return GroupReader(RowConfig(**settings), pairs)(row)[0]


def reason(row, **settings):
    with pytest.raises(BadRow) as caught:
        GroupReader(RowConfig(**settings))(row)
    return str(caught.value)


def answered(*responses, **columns):
    """A row whose responses are these and a text."""
    return {"prompt": [ASKED], "responses": [*responses, "Hot."], "scores": [*range(len(responses) + 1)]} | columns


def one_turn(turn):
    """What a turn of the assistant's in the prompt becomes, whose calls have their results."""
    turns = turn if isinstance(turn, list) else [turn]
    kept = {"call_without_result": "keep", "result_without_call": "keep"}
    return group_of(answered("Cold.", prompt=[ASKED, *turns, ASKED]), row_rules=kept).prompt[1]


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        # OpenAI: arguments are JSON text, content is null; and what its library writes of the keys without a value.
        ({"role": "assistant", "content": None, "tool_calls": [call() | {"index": 0, "function": {
            "name": "weather", "arguments": '{"town": "Oslo"}'}}]}, asks()),
        (asks(content=None, function_call=None, refusal=None, audio=None), asks()),
        ({"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"town": "Oslo"}'}},
         asks(call(None))),
        (asks(call(7)), asks(call("7"))),
        # Without the object around the function, as JSON text, as a table of columns, and filled up with nulls.
        ({"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {"town": "Oslo"}}]},
         asks(call(None))),
        ({"role": "assistant", "content": "", "tool_calls": json.dumps([call()])}, asks()),
        ({"role": "assistant", "content": "", "tool_calls": [json.dumps(call())]}, asks()),
        ({"role": "assistant", "content": "", "tool_calls": {"id": ["c1"], "function": [call()["function"]]}}, asks()),
        (asks(call(town="Oslo", day=None), {"id": None, "function": None}, name=None, thinking=None), asks()),
        # A null in JSON text was meant.
        ({"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": '{"a": null}'}]},
         asks({"type": "function", "function": {"name": "f", "arguments": '{"a": null}'}})),
        ({"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": ""}]},
         {"role": "assistant", "content": "",
          "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}),
        # Anthropic's parts.
        ({"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "c1", "name": "weather", "input": {"town": "Oslo"}}]},
         asks(content="I look.", reasoning_content="Hm.")),
        # ShareGPT's turn of its own, alone, behind what was said, and several of them.
        ({"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Oslo"}}'}, asks(call(None))),
        ({"role": "tool_call", "content": '[{"name": "weather", "arguments": {"town": "Oslo"}}]'}, asks(call(None))),
        ([{"from": "gpt", "value": "I look."},
          {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
          {"from": "function_call", "value": '{"name": "g", "arguments": "{\\"b\\": 2}"}'}],
         asks(call(None, "f", a=1), call(None, "g", b=2), content="I look.")),
        # Reasoning under all of its names.
        *[({**said("Cold.")[0], name: "Hm."}, {**said("Cold.")[0], "reasoning_content": "Hm."})
          for name in ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")],
        ({**said("Cold.")[0], "reasoning_details": [{"type": "reasoning.text", "text": "Hm."}]},
         {**said("Cold.")[0], "reasoning_content": "Hm."}),
        ({**said("Cold.")[0], "reasoning": "Hm.", "reasoning_details": [{"type": "encrypted", "data": "x"}]},
         {**said("Cold.")[0], "reasoning_content": "Hm."}),
        ({"role": "assistant", "content": None, "reasoning_content": "Hm."},
         {"role": "assistant", "content": "", "reasoning_content": "Hm."}),
        # A call in the text stays text.
        (said('<tool_call>\n{"name": "f"}\n</tool_call>')[0], said('<tool_call>\n{"name": "f"}\n</tool_call>')[0]),
    ],
)  # fmt: skip
def test_spellings_of_the_assistants_turn(turn, expected):
    assert one_turn(turn) == expected
    assert list(one_turn(turn)) == [
        key for key in ("role", "content", "reasoning_content", "tool_calls") if key in expected
    ]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([result(name="weather")], [result(name="weather")]),
        ([{"role": "function", "name": "weather", "content": "4"}], [result(identity=None, name="weather")]),
        ([{"from": "observation", "value": "4"}], [result(identity=None)]),
        ([result(None)], [result("")]),
        ([result([{"type": "text", "text": "4"}])], [result()]),
        ([result(identity=7)], [result(identity="7")]),
        ([{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "4"},
                                       {"type": "text", "text": "Well?"}]}],
         [result(), {"role": "user", "content": "Well?"}]),
        ([{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1",
                                        "content": [{"type": "text", "text": "4"}]}]}], [result()]),
    ],
)  # fmt: skip
def test_spellings_of_results(turns, expected):
    made = group_of(
        answered("Cold.", prompt=[ASKED, asks(call("7"), call()), *turns]), row_rules={"call_without_result": "keep"}
    )
    assert made.prompt[2:] == expected


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"tools": TOOL},
        {"tools": {"type": ["function"], "function": [SCHEMA]}},
        {"functions": [SCHEMA]},
        {"tools": [SCHEMA | {"type": "function"}]},
        {"tools": [{"name": "weather", "input_schema": SCHEMA["parameters"]}]},
        {"tools": [SCHEMA | {"parameters": json.dumps(SCHEMA["parameters"])}]},
        {"tools": [TOOL | {"strict": None}, {"type": None, "function": None}], "functions": None},
        {"tools": [TOOL], "functions": [SCHEMA]},
        {"prompt": {"messages": [ASKED], "tools": [TOOL]}},
        {"prompt": {"messages": [ASKED], "functions": [SCHEMA]}, "tools": None},
        {"prompt": {"messages": [ASKED], "tools": [TOOL]}, "tools": [TOOL]},
        {"prompt": None, "messages": [ASKED], "tools": [TOOL]},
        {"prompt": None, "input": {"messages": [ASKED], "tools": [TOOL]}},
    ],
)
def test_tools_of_a_row(columns):
    made = group_of(answered("Cold.", **columns))
    assert (made.prompt, made.tools, made.noted) == ([ASKED], [TOOL], [])


def test_arguments_of_the_template_and_columns_that_are_named():
    for value in ({"enable_thinking": False, "more": None}, '{"enable_thinking": false}'):
        made = group_of(answered("Cold.", chat_template_kwargs=value))
        assert made.chat_template_kwargs == {"enable_thinking": False}
    for empty in (None, "", "{}", {}, "null", {"enable_thinking": None}):
        assert group_of(answered("Cold.", chat_template_kwargs=empty, tools=empty)).chat_template_kwargs is None


def test_columns_with_tools_are_named(tmp_path):
    row = answered("Cold.", api=json.dumps([TOOL]), settings={"template": {"enable_thinking": False}})
    columns = {"tools": "api", "chat_template_kwargs": "settings.template"}
    config = DataConfig(train_file=write_jsonl(tmp_path / "rows.jsonl", [row]), columns=columns)
    (kept,) = load_groups(config)[0]["train"]
    assert (json.loads(kept["tools"]), json.loads(kept["chat_template_kwargs"])) == ([TOOL], {"enable_thinking": False})


@pytest.mark.parametrize(
    ("columns", "rule"),
    [
        ({"tools": "weather"}, "bad_tools: the column tools is no list"),
        ({"tools": 7}, "bad_tools"),
        ({"tools": [7]}, "bad_tools"),
        ({"tools": [{"type": "web_search"}]}, "bad_tools"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "bad_tools: .* without the name"),
        ({"tools": [SCHEMA | {"parameters": "x"}]}, "bad_tools"),
        ({"tools": [SCHEMA | {"parameters": [1]}]}, "bad_tools: .* whose parameters are no object: weather"),
        ({"tools": [TOOL], "functions": [SCHEMA | {"name": "other"}]}, "bad_tools: .* differ"),
        (
            {"prompt": {"messages": [ASKED], "tools": [TOOL]}, "tools": [SCHEMA]},
            "prompts_differ: the row has two of tools",
        ),
        ({"tool_calls": [call()]}, "bad_tools: it has the column tool_calls"),
        ({"chat_template_kwargs": "yes"}, "bad_tools: the column chat_template_kwargs is no object"),
        ({"chat_template_kwargs": [1]}, "bad_tools"),
        ({"chat_template_kwargs": {"tools": [1]}}, "bad_tools: .* has 'tools'"),
        ({"chat_template_kwargs": {"a": float("nan")}}, "bad_tools"),
        ({"images": ["cat.png"]}, "bad_messages"),
    ],
)
def test_bad_tools(columns, rule):
    with pytest.raises(BadRow, match=f"^{rule}"):
        group_of(answered("Cold.", **columns))


def deep(levels):
    value = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("turn", "rule"),
    [
        (asks({"name": "f", "arguments": "{town: Oslo}"}), "bad_tools: .* arguments that are no JSON: '{town: Oslo}'"),
        (asks({"name": "f", "arguments": "[1]"}), "bad_tools: .* that are no object"),
        (asks({"name": "f", "arguments": [1]}), "bad_tools"),
        (asks({"name": "f", "arguments": '{"a": NaN}'}), "bad_tools"),
        (asks({"name": "f", "arguments": {"a": float("inf")}}), "bad_tools"),
        (asks({"name": "f", "arguments": deep(60)}), "bad_tools: .* nested too deep"),
        (asks({"name": "f", "arguments": json.dumps(deep(300))}), "bad_tools: .* nested too deep"),
        (asks({"arguments": {"a": 1}}), "bad_tools: .* without the name"),
        (asks({"type": "custom", "name": "f"}), "bad_tools"),
        (asks(call(True)), "bad_tools: .* the id True"),
        (asks("x"), "bad_tools"),
        (asks() | {"tool_calls": 7}, "bad_tools"),
        (asks() | {"function_call": {"name": "g", "arguments": "{}"}}, "bad_tools: .* differ"),
        ({"from": "function_call", "value": "weather(Oslo)"}, "bad_tools"),
        ({"from": "function_call", "value": ""}, "bad_tools"),
        (ASKED | {"tool_calls": [call()]}, "bad_tools: .* a turn with tool_calls"),
        (ASKED | {"thinking": "Hm."}, "bad_messages"),
        (said("a")[0] | {"tools": [TOOL]}, "bad_tools: .* a turn with tools"),
        (said("a")[0] | {"thinking": True}, "bad_messages: .* thinking that is no text"),
        (said("a")[0] | {"thinking": "a", "reasoning": "b"}, "bad_messages: .* two texts of reasoning"),
        (said("a")[0] | {"images": ["x"]}, "bad_messages"),
        ({"role": "assistant", "content": None}, "bad_messages"),
        ({"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}, "bad_messages"),
        ({"role": "assistant", "content": [{"type": "tool_use", "name": "f"}, {"type": "text", "text": "x"}]},
         "bad_messages: .* in an order that no template writes: tool_use, text"),
        ({"role": "assistant", "content": [{"type": "tool_result", "content": "4"}]}, "bad_tools"),
        ({"role": "user", "content": [{"type": "tool_use", "name": "f"}]}, "bad_tools"),
        (result({"t": float("inf")}), "bad_tools"),
        (result(identity=1.5), "bad_tools"),
        ({"role": 7, "content": "x"}, "bad_messages"),
        ({"role": "critic", "content": "x"}, "bad_messages"),
        ({}, "bad_messages"),
        ([], "bad_messages"),
    ],
)  # fmt: skip
def test_bad_turns(turn, rule):
    for row in (answered("Cold.", prompt=[ASKED, turn, ASKED]), answered([*said("a"), turn, *said("b")])):
        with pytest.raises(BadRow, match=f"^{rule}"):
            group_of(row)


@pytest.mark.parametrize(
    ("turns", "rule"),
    [
        ([asks(), ASKED, *said("Hm.")], "call_without_result"),
        ([asks(), result(), asks(call("c2")), ASKED], "call_without_result"),
        ([asks(call(), call("c2")), result(), *said("Hm.")], "call_without_result"),
        ([asks(call(None), call(None)), result(identity=None), *said("Hm.")], "call_without_result"),
        ([asks(call(), call("c2")), result(), result(), *said("Hm.")], "call_without_result"),
        ([*said("Hm."), result(), *said("4.")], "result_without_call"),
        ([*said("Hm."), result(identity=None), *said("4.")], "result_without_call"),
        ([asks(), result(identity="c9"), *said("4.")], "result_without_call"),
        # Fine: parallel calls with their results in another order, by name, or without ids; a call at the very end.
        ([asks(call(), call("c2")), result("2", "c2"), result("1"), *said("Hm.")], None),
        ([asks(call(None, "f"), call(None, "g")), result("g", None, name="g"), result("f", None), *said("Hm.")], None),
        ([asks(call(None)), result(), *said("4.")], None),
        ([asks(call(None), call("c2")), result("2", "c2"), result("1", "other"), *said("Hm.")], None),
        ([{"role": "assistant", "content": "", "reasoning_content": "Hm."}], None),
        ([asks(), result(identity=None), *said("4.")], None),
        ([asks()], None),
        ([asks(), result()], None),
        ([asks(), result(), asks(call("c2")), result("5", "c2"), *said("5.")], None),
        ([*said('<tool_call>{"name": "f"}</tool_call>'), result(identity=None), *said("4.")], None),
        ([*said("Hm."), ASKED, *said("4.")], None),
    ],
)  # fmt: skip
def test_calls_and_results_belong_together(turns, rule):
    rows = [answered(turns)]
    if turns[-1]["role"] == "assistant" and "tool_calls" not in turns[-1]:
        rows.append(answered("a", prompt=[ASKED, *turns, ASKED]))
    for row in rows:
        if rule is None:
            assert group_of(row).fixed == []
        else:
            assert reason(row).startswith(rule)
            assert (
                len(group_of(row, row_rules={"call_without_result": "keep", "result_without_call": "keep"}).responses)
                > 1
            )


FORMS = {
    "list": {"prompt": "Weather in Oslo?", "responses": [GOOD, "Hot."], "scores": [1, 0]},
    "one message": {"prompt": [ASKED], "responses": [GOOD, said("Hot.")[0]], "scores": [1, 0]},
    "conversations": {"responses": [[ASKED, *GOOD], [ASKED, *said("Hot.")]], "scores": [1, 0]},
    "both": {"prompt": [ASKED], "responses": [[ASKED, *GOOD], [ASKED, *said("Hot.")]], "scores": [1, 0]},
    "written": {"prompt": "Weather in Oslo?", "responses": [json.dumps(GOOD), "Hot."], "scores": [1, 0]},
    "numbered": {"prompt": [ASKED], "A0": GOOD, "score_A0": 1, "A1": "Hot.", "score_A1": 0},
    "pairs": {"prompt": [ASKED], "chosen": GOOD, "rejected": said("Hot."), "score_chosen": 1, "score_rejected": 0},
    "pairs inside": {
        "chosen": [ASKED, *GOOD],
        "rejected": [ASKED, *said("Hot.")],
        "chosen_score": 1,
        "rejected_score": 0,
    },
    "objects": {
        "prompt": [ASKED],
        "responses": [{"messages": GOOD, "score": 1}, {"messages": said("Hot."), "score": 0}],
    },
    "answers": {"prompt": [ASKED], "answers": [{"answer": GOOD, "rank": 1}, {"answer": said("Hot."), "rank": 2}]},
    "wrapped": {"messages": [ASKED], "responses": [GOOD, "Hot."], "scores": [1, 0]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Weather in Oslo?"}],
        "chosen": [
            {"from": "function_call", "value": json.dumps(call()["function"])},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "4 degrees."},
        ],
        "rejected": {"from": "gpt", "value": "Hot."},
        "chosen_score": 1,
        "rejected_score": 0,
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_a_response_of_several_turns_in_every_form(form):
    made = group_of(FORMS[form])
    good = GOOD if form != "sharegpt" else [asks(call(None)), result(identity=None), GOOD[2]]
    assert (made.prompt, made.responses) == ([ASKED], [good, "Hot."])
    assert made.scores == ([-1.0, -2.0] if form == "answers" else [1.0, 0.0])


def test_the_documented_row():
    page = (ROOT / "docs" / "data.md").read_text().partition("### Trajectories")[2]
    made = group_of(json.loads(page.partition("```json\n")[2].partition("```")[0]))
    assert made.responses == [[asks(), result(), *said("It is 4 degrees.")], "Warm, I think."]
    assert (made.tools, made.noted, made.fixed) == ([TOOL], [], [])


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        # OpenAI's preferences.
        (
            {"input": {"messages": [ASKED, asks(), result()], "tools": [TOOL], "parallel_tool_calls": True},
             "preferred_output": said("4."), "non_preferred_output": said("9.")},
            {"columns": {"prompt": "input", "chosen": "preferred_output", "rejected": "non_preferred_output"}},
        ),
        # LLaMA-Factory's with tools.
        (
            {"conversations": [
                {"from": "human", "value": "Weather in Oslo?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Oslo"}}'},
                {"from": "observation", "value": "4"}],
             "tools": json.dumps([SCHEMA]), "chosen": {"from": "gpt", "value": "4."},
             "rejected": {"from": "gpt", "value": "9."}},
            {},
        ),
        # The prompt inside, calls as OpenAI writes them, ids and all.
        (
            {"chosen": [ASKED, asks(), result(), *said("4.")], "rejected": [ASKED, asks(), result(), *said("9.")],
             "functions": json.dumps([SCHEMA])},
            {},
        ),
    ],
    ids=["openai", "llama-factory", "inside"],
)  # fmt: skip
def test_pairs_as_others_write_them(tmp_path, row, settings):
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    (kept,) = load_groups(DataConfig(train_file=path, **settings), pairs=True)[0]["train"]
    assert [turn["role"] for turn in kept["prompt"]] == ["user", "assistant", "tool"]
    assert kept["prompt"][1]["tool_calls"][0]["function"] == call()["function"]
    assert (kept["responses"], json.loads(kept["tools"])) == (["4.", "9."], [TOOL])


@pytest.mark.parametrize("write", [json.dumps, lambda value: value])
def test_conversations_that_bring_their_tools(write):
    row = {side: write({"messages": [ASKED, *turns], "tools": [TOOL]})
           for side, turns in (("chosen", GOOD), ("rejected", said("Hot.")))}  # fmt: skip
    made = group_of(row, pairs=True)
    assert (made.prompt, made.responses, made.tools) == ([ASKED], [GOOD, "Hot."], [TOOL])
    with pytest.raises(BadRow, match="bad_tools: tools and tools of response 1 differ"):
        group_of(row | {"tools": [SCHEMA | {"name": "other"}]}, pairs=True)
    answers = ['{"messages": 7}', '{"prime": 7}']
    assert group_of({"prompt": "JSON?", "responses": answers, "scores": [1, 0]}).responses == answers


@pytest.mark.parametrize(
    ("turn", "text"),
    [
        ({"role": "tool", "content": {"t": 4, "rain": None}}, '{"t": 4, "rain": null}'),
        ({"role": "tool", "content": [{"t": 4}, {"t": "\u00f8"}]}, '[{"t": 4}, {"t": "\u00f8"}]'),
        ({"role": "tool", "content": 4}, "4"),
        ({"role": "tool", "content": ["4", " degrees"]}, "4 degrees"),
        ({"role": "tool", "content": [{"type": "tool_result", "call_id": "c1", "result": {"t": 4}}]}, '{"t": 4}'),
        ({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "4"}]}, "4"),
    ],
)
def test_what_a_tool_returned_is_text(turn, text):
    made = group_of(answered([asks(), turn, *said("4 degrees.")], tools=[TOOL]))
    assert made.responses[0][1]["content"] == text


def test_what_is_not_read_of_a_result_is_named():
    part = {"type": "tool_result", "tool_use_id": "c1", "content": "4", "seconds": 3}
    made = group_of(answered([asks(), {"role": "user", "content": [part]}, *said("4 degrees.")], tools=[TOOL]))
    assert made.noted == ["message key seconds"]


def test_calls_in_the_text_of_hermes_stay_text():
    turns = [
        {"from": "system", "value": "<tools>[]</tools>"},
        {"from": "human", "value": "Weather in Oslo?"},
        {"from": "gpt", "value": '<tool_call>\n{"name": "weather"}\n</tool_call>'},
        {"from": "tool", "value": "<tool_response>\n4\n</tool_response>"},
    ]
    made = group_of({"conversations": turns, "responses": ["4.", "9."], "scores": [1, 0]})
    assert [turn["content"] for turn in made.prompt] == [turn["value"] for turn in turns]
    assert all(turn.keys() == {"role", "content"} for turn in made.prompt)


def test_in_long_form(tmp_path):
    rows = [
        {"prompt": [ASKED], "response": GOOD, "score": 1, "tools": [TOOL]},
        {"prompt": [ASKED], "response": "Hot.", "score": 0, "tools": json.dumps([TOOL])},
        {"prompt": [ASKED], "response": "Other tools.", "score": 0, "tools": [SCHEMA | {"name": "other"}]},
        {"prompt": [ASKED], "response": "No tools.", "score": 0},
    ]
    counts, (kept,) = loaded(tmp_path, rows)
    assert (kept["prompt"], kept["responses"], json.loads(kept["tools"])) == ([ASKED], [GOOD, "Hot."], [TOOL])
    assert counts["dropped_by_reason"] == {"too_few_responses": 2}, "other tools are another prompt"
    by_id = [{**row, "prompt_id": "x"} for row in rows[:3]]
    counts, _ = loaded(tmp_path, [*by_id, *rows[:2]])
    assert counts["dropped_by_reason"] == {"prompts_differ": 1}


def test_logs_of_whole_runs(tmp_path):
    runs = [[ASKED, *GOOD], [ASKED, {"role": "assistant", "content": "Hot."}, {"role": "user", "content": "Sure?"},
                             {"role": "assistant", "content": "No."}]]  # fmt: skip
    rows = [{"messages": run, "reward": k, "tools": [TOOL], "steps": 9} for k, run in enumerate(runs)]
    for more in ({}, {"prompt_id": "x"}):
        counts, (kept,) = loaded(tmp_path, [row | more for row in rows])
        assert (kept["prompt"], kept["responses"], kept["scores"]) == ([ASKED], [GOOD, runs[1][1:]], [0, 1])
        assert json.loads(kept["tools"]) == [TOOL]
        assert counts["noted"] == {"column steps": 1}
    (told,) = loaded(tmp_path, [{"messages": json.dumps(run), "score": k} for k, run in enumerate(runs)])[1]
    assert told["responses"] == [GOOD, runs[1][1:]]
    counts, _ = loaded(tmp_path, [*rows, {"messages": [ASKED], "reward": 1}, {"messages": 7, "reward": 1}])
    assert counts["dropped_by_reason"] == {"no_assistant_turn": 1, "bad_messages": 1}


def test_a_row_that_contradicts_itself_says_nothing_of_the_form_of_others(tmp_path):
    twice = answered("Cold.", prompt={"messages": [ASKED], "tools": [TOOL]}, tools=[SCHEMA])
    counts, kept = loaded(tmp_path, [twice, ROW])
    assert (counts["dropped_by_reason"], len(kept)) == ({"prompts_differ": 1}, 1)


def test_what_is_nested_too_deep_is_dropped(tmp_path):
    deepest = [answered("Cold.", tools=deep(levels)) for levels in (60, 300, 900)]
    lines = [
        answered([asks({"name": "f", "arguments": deep(900)})]),
        answered([{"role": "assistant", "content": deep(900)}]),
    ]
    counts, kept = loaded(tmp_path, [*deepest, *lines, ROW])
    assert len(kept) == 1
    assert counts["rows_in"] == counts["rows_dropped"] + 1 == 6
    assert counts["dropped_by_reason"].keys() <= {"bad_tools", "bad_messages", "not_json"}


def loaded(folder, rows, name="rows.jsonl", **settings):
    path = write_jsonl(folder / name, rows)
    found = load_source(path, config=RowConfig(**settings))
    return count_outcomes(found), kept_rows(found)


@pytest.mark.parametrize(
    ("responses", "prompt", "num"),
    [
        # Whole conversations: the shared turns are the prompt.
        ([[ASKED, *GOOD], [ASKED, asks(), result(), *said("Cold.")]], None, 3),
        # The cut goes back where a response would begin with what a tool says, or with the user.
        ([[ASKED, *GOOD], [ASKED, asks(), result("9"), *said("9.")]], None, 1),
        ([[ASKED, *GOOD], [ASKED, asks()]], None, 1),
        ([[ASKED, *said("Where?"), ASKED, *said("a")], [ASKED, *said("Where?"), ASKED | {"content": "x"}, *said("b")]],
         None, 1),
        # A prompt beside them says where it ends, if a call or several turns follow.
        ([[ASKED, *GOOD], [ASKED, asks(), result(), *said("Cold.")]], [ASKED], 1),
        ([[ASKED, *GOOD], [ASKED, asks(), result(), *said("Cold.")]], "Weather in Oslo?", 1),
        ([[ASKED, *said("Where?"), ASKED, *said("a")], [ASKED, *said("Where?"), ASKED, *said("b")]], [ASKED], 3),
        ([[ASKED, *said("Where?"), ASKED, *said("a")], [ASKED, *said("Where?"), ASKED, *said("b"), ASKED, *said("c")]],
         [ASKED], 1),
        ([[ASKED, *said("Where?"), ASKED, *said("So."), ASKED, *said(text)] for text in "ab"],
         [ASKED, *said("Where?"), ASKED], 3),
        # What goes on where the prompt ends is a response as it is.
        ([GOOD, [asks(), result(), *said("Cold.")]], [ASKED], 1),
        ([[result(), *said("a")], [result(), asks(call("c2"))]], [ASKED, asks()], 3),
    ],
)  # fmt: skip
def test_where_the_prompt_ends(responses, prompt, num):
    row = {"responses": responses, "scores": [1, 0]} | ({"prompt": prompt} if prompt else {})
    made = group_of(row)
    assert len(made.prompt) == num
    whole = [*made.prompt, *(said(made.responses[0]) if isinstance(made.responses[0], str) else made.responses[0])]
    told = (
        []
        if responses[0][0]["role"] == "user"
        else [ASKED]
        if responses[0][0]["role"] == "assistant"
        else [ASKED, asks()]
    )
    assert whole == [*told, *responses[0]]
    assert group_of({"prompt": made.prompt, "responses": made.responses, "scores": [1, 0]}) == made


@pytest.mark.parametrize(
    ("responses", "rule"),
    [
        ([[ASKED], "a"], "no_assistant_turn: response 1 has no turn of the assistant's"),
        ([[result()], "a"], "no_assistant_turn"),
        ([[ASKED, *said("a")], [ASKED | {"content": "x"}, *said("b")]], "prompts_differ"),
        ([[ASKED, ASKED, *said("a")], [ASKED, result(), *said("b")]], "prompts_differ"),
        ([[result("1"), *said("a")], [result("2"), *said("b")]], "prompts_differ"),
        ([[ASKED | {"content": "Another."}, *said("a")], "b"], "prompts_differ"),
        ([7, "a"], "bad_messages"),
        ([{"role": "assistant"}, "a"], "bad_messages"),
        ([[*said("a"), *said("b")], "a"], "roles_do_not_alternate"),
        (
            [[*said("a"), {"role": "tool_call", "content": '{"name": "f"}', "thinking": "Hm."}], "a"],
            "roles_do_not_alternate",
        ),
        ([[], "a"], "too_few_responses"),
        ([said(""), "a"], "too_few_responses"),
        ([GOOD, GOOD], "too_few_responses"),
        ([[ASKED | {"content": ""}, asks(), result(), *said("a")], "b"], "prompts_differ"),
    ],
)
def test_bad_responses(responses, rule):
    assert reason({"prompt": [ASKED], "responses": responses, "scores": [1, 0]}).startswith(rule)


def test_turns_of_one_role_are_joined_if_asked():
    responses = [[*said("I look."), asks(), result(), *said("a"), *said("b")], [*said("a"), *said("b")]]
    made = group_of(
        {"prompt": [ASKED], "responses": responses, "scores": [1, 0]}, row_rules={"roles_do_not_alternate": "fix"}
    )
    assert made.responses == [[asks(content="I look."), result(), *said("a\n\nb")], "a\n\nb"]


def test_rules_look_at_all_texts():
    spells = [asks(call(town="<eos>"), content="", reasoning_content="<eos>Hm."), result("<eos>4"), *said("4.")]
    read = GroupReader(RowConfig(row_rules={"control_tokens": "fix"}), control_tokens=["<eos>"])
    (made,) = read(answered(spells, tools=[SCHEMA | {"description": "<eos>"}]))
    assert made.responses[0] == [asks(call(town=""), reasoning_content="Hm."), result(), *said("4.")]
    assert made.tools[0]["function"]["description"] == ""
    assert "rendered" in group_of(answered([asks(reasoning_content="<|im_start|>")])).noted
    for turns in ([asks(call(town="\ud800"))], [asks(call(name="\ud800"))], [asks(reasoning_content="\ud800")]):
        assert reason(answered(turns)).startswith("broken_text")
    assert reason(answered("Cold.", tools=[SCHEMA | {"description": "\ud800"}])).startswith("broken_text")


def test_what_is_kept_of_trajectories_is_chosen_and_merged_like_texts():
    row = {
        "prompt": [ASKED],
        "responses": [GOOD, "a", [*GOOD], [asks()]],
        "scores": [1.0, 0.0, 0.0, 0.25],
        "tools": [TOOL],
    }
    made = group_of(row)
    assert (made.responses, made.scores, made.fixed) == (
        [GOOD, "a", [asks()]],
        [0.5, 0.0, 0.25],
        ["duplicate_response"],
    )
    pair = group_of(row, make_pairs="best_random")
    assert (pair.responses[0], pair.tools) == (GOOD, [TOOL])
    assert group_of(row, num_responses=2, choose_responses="random").tools == [TOOL]
    assert group_of(row, pairs=True, make_pairs="best_worst").scores == [1.0, 0.0]


def test_reading_into_the_cache_and_out_of_it(tmp_path):
    large = asks(call("c1", n=10**30, x=0.1 + 0.2, nothing=[None]), reasoning_content="7")
    row = {"prompt": [ASKED, large, result()], "responses": ["7", [asks()], "null", '{"a": 1}', "\x00messages:7"],
           "scores": [1, 2, 3, 4, 5], "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}  # fmt: skip
    counts, kept = loaded(tmp_path, [row, numbered(1), row, "{torn"])
    assert (counts["rows_in"], counts["rows_dropped"], counts["repeated_prompts"]) == (4, 1, 1)
    for rows in (kept, kept.select([0, 2]), kept.map(lambda row: {"more": 1}), kept.filter(lambda row: row["tools"])):
        for read in (rows[0], next(iter(rows)), rows[len(rows) - 1]):
            assert {name: read[name] for name in ("prompt", "responses")} == {
                name: row[name] for name in ("prompt", "responses")
            }
            assert json.loads(read["tools"]) == [TOOL]
    assert kept["responses"][1] == numbered(1)["responses"]
    assert kept[1]["tools"] is kept[1]["chat_template_kwargs"] is None
    ran = kept.map(
        lambda row: {"kinds": [type(r).__name__ for r in row["responses"]]},
        remove_columns=kept.column_names,
        num_proc=2,
    )
    assert ran[0]["kinds"] == ["str", "list", "str", "str", "str"]


def test_plain_rows_have_no_more_columns_and_keep_their_hash(tmp_path):
    _, kept = loaded(tmp_path, [numbered(1)])
    assert not {"tools", "chat_template_kwargs"} & {*kept.column_names}
    assert kept[0]["prompt"] == [{"role": "user", "content": "Question 1"}]
    # Of the rows that are held out: it must be the same in every version.
    assert kept[0]["prompt_hash"] == prompt_hash(kept[0]["prompt"]) == 278194480989894420
    assert (
        len({prompt_hash([ASKED], *options) for options in ((), ([TOOL],), (None, {"a": 1}), ([TOOL], {"a": 1}))}) == 4
    )


def test_a_null_filled_table_is_read(tmp_path):
    """Parquet gives every object all keys, and nulls where it has none."""
    rows = [
        {"prompt": [ASKED, asks(call("c1", town="Oslo")), result()], "chosen": [asks(call("c2", day=3))],
         "rejected": said("Hot."), "score_chosen": 1, "score_rejected": 0, "tools": [TOOL]}
    ]  # fmt: skip
    rows.append({**rows[0], "prompt": [ASKED], "tools": []})
    Dataset.from_list(rows, on_mixed_types=None).to_parquet(tmp_path / "rows.parquet")
    _, kept = (found := load_source(str(tmp_path / "rows.parquet"), config=RowConfig())), kept_rows(found)
    assert kept[0]["prompt"] == rows[0]["prompt"]
    assert kept["responses"][:] == [[rows[0]["chosen"], "Hot."]] * 2
    assert [row["tools"] and json.loads(row["tools"]) for row in kept] == [[TOOL], None]


MANY = [
    ROW,
    numbered(1),
    {
        **ROW,
        "prompt": [ASKED, asks(call("c9", a=None, n=10**30)), result("5", "c9")],
        "chat_template_kwargs": {"think": False},
    },
    answered([asks(content="Ünïcode", reasoning_content="7"), result(identity=None), ASKED], "7", weight=0.5),
]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
@pytest.mark.parametrize("to", ["list", "pairs"])
def test_what_was_converted_converts_to_itself(tmp_path, name, to):
    rows = [*MANY, answered("Cold.", prompt=[ASKED, asks() | {"tool_calls": [
        {"name": "f", "arguments": '{"a": null}'}]}, result(identity=None)])]  # fmt: skip
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    report = convert([source], ConvertConfig(to=to, output=str(tmp_path / name)))
    assert report["rows_in"] == report["rows_kept"] == len(rows)
    convert([str(tmp_path / name)], ConvertConfig(to=to, output=str(tmp_path / f"again-{name}")))
    assert (tmp_path / f"again-{name}").read_bytes() == (tmp_path / name).read_bytes()
    config = RowConfig(make_pairs="best_worst" if to == "pairs" else None)
    whole, again = (kept_rows(load_source(str(path), config=config)) for path in (source, tmp_path / name))
    names = ["prompt", "responses", "scores", "tools", "chat_template_kwargs", "weight", "prompt_hash"]
    assert [{n: row[n] for n in names} for row in whole] == [{n: row[n] for n in names} for row in again]


def test_without_a_template_nothing_but_text_can_be_joined(tmp_path):
    _, kept = loaded(tmp_path, [numbered(1), ROW])
    check_template(kept.select([0]), None)
    check_template(kept, "a template")
    with pytest.raises(
        UserError, match="chat_template: the tokenizer has none, and the responses of .*line 2 have several"
    ):
        check_template(kept, None)


def test_prompts_to_sample_from_keep_tools(tmp_path):
    rows = [
        {"prompt": {"messages": [ASKED], "tools": json.dumps([SCHEMA])}, "id": 3},
        {"prompt": [ASKED, asks(), result("")], "chat_template_kwargs": '{"enable_thinking": false}', "tools": None},
    ]
    found, _ = read_prompts(write_jsonl(tmp_path / "prompts.jsonl", rows))
    assert found[0] == {"prompt": [ASKED], "tools": [TOOL], "id": 3}
    assert found[1]["prompt"] == rows[1]["prompt"]
    assert found[1]["chat_template_kwargs"] == {"enable_thinking": False}
    for prompt in ([ASKED, asks()], [ASKED, *said("a")], []):
        with pytest.raises(UserError, match="line 1: "):
            read_prompts(write_jsonl(tmp_path / "bad.jsonl", [{"prompt": prompt}]))


def test_what_is_not_read_of_a_turn_is_named(tmp_path):
    turns = [asks(call() | {"index": 0}, annotations=["x"]), result(weight=0), *said("4.")]
    counts, _ = loaded(tmp_path, [answered(turns, prompt=[ASKED | {"name": "Ann"}], tool_choice="auto")])
    assert counts["noted"] == dict.fromkeys(
        [
            "column tool_choice",
            *(f"message key {key}" for key in ("annotations", "name", "tool_calls.index", "weight")),
        ],
        1,
    )


@needs_shared
@pytest.mark.parametrize("name", ["rows", "null_content", "call_as_answer"])
def test_rows_whose_calls_were_lost(name):
    raw = json.loads((SHARED / "bugs" / "05-tool-calls-lost" / f"{name}.jsonl").read_text())
    made = group_of(raw)
    turns = raw["prompt"] if name != "call_as_answer" else raw["chosen"]
    expected = [{**turn, "content": turn["content"] or ""} for turn in turns]
    assert (made.prompt if name != "call_as_answer" else made.responses[0]) == expected
    assert made.tools == raw["tools"]
