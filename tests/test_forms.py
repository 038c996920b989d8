"""Forms of the data sets that are met most often, messages in all their spellings, and what of a row is not read."""

import json

import pytest

from alignment.data.columns import suggestion
from alignment.data.formats import as_record
from alignment.data.groups import GroupReader, RowConfig
from alignment.data.load import DataConfig, load_groups
from alignment.data.notes import describe_notes
from alignment.data.records import gather
from alignment.data.report import summary
from alignment.data.row import BadRow
from alignment.errors import UserError
from alignment.sampling.prompts import read_prompts
from tests.rows import GROUP, PAIR, ROW, USER, numbered, said, write_jsonl

ASKED = "Capital of France?"
RANKED = PAIR | {"scores": [1.0, 0.0]}
TWO_TURNS = [*USER, *said("Paris"), {"role": "user", "content": "And Italy?"}]
SYSTEM = {"role": "system", "content": "Answer in French."}
CALL = {"id": "c1", "type": "function", "function": {"name": "capital", "arguments": {"of": "France"}}}


def read(row, pairs=False, unscored=False, **settings):
    """The first group that a row becomes."""
    group = GroupReader(RowConfig(**settings), pairs, unscored)(row)[0]
    return {"prompt": group.prompt, "responses": group.responses, "scores": group.scores}


def reason(row, pairs=False, **settings):
    """The rule that drops a row, and what it says."""
    with pytest.raises(BadRow) as caught:
        GroupReader(RowConfig(**settings), pairs)(row)
    return str(caught.value)


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # Messages whose content is a list of text parts; a table gives the keys of other parts with nulls.
        (ROW | {"prompt": [{"role": "user", "content": parts("Capital", " of France?")}]}, GROUP),
        (ROW | {"prompt": [{"role": "user", "content": [{"type": "text", "text": ASKED, "image_url": None}]}]}, GROUP),
        (
            ROW | {"responses": [[{"role": "assistant", "content": parts(text)}] for text in GROUP["responses"]]},
            GROUP,
        ),
        # SimPO's sets: the pair beside them is the best and the worst of these.
        (
            {"prompt": ASKED, "all_generated_responses": ["Rome", "Paris", "Oslo"], "all_rm_scores": [0.1, 0.9, 0.2],
             "chosen": USER + said("Paris"), "rejected": USER + said("Rome")},
            GROUP,
        ),
        # A pair with scores is one, whatever else the row has.
        ({"prompt": ASKED, "chosen": "Paris", "rejected": "Rome", "score_chosen": 0.9, "score_rejected": 0.1,
          "generations": ["x", "y"], "ratings": [1, 2]}, PAIR),
        ({"prompt": ASKED, "chosen": "Paris", "rejected": "Rome", "chosen_score": 0.9, "rejected_score": 0.1}, PAIR),
        ({"prompt": ASKED, "chosen": "Paris", "rejected": "Rome", "chosen-rating": 0.9, "rejected-rating": 0.1}, PAIR),
        ({"prompt": ASKED, "chosen": "Paris", "rejected": "Rome", "rating_chosen": 0.9, "rating_rejected": 0.1}, PAIR),
        ({"prompt": ASKED, "chosen": "Paris", "rejected": "Rome", "rejected_rm_score": 0.1, "chosen_rm_score": 0.9},
         PAIR),
        # HelpSteer 3 and the pairs of 2: the preference is above 0 where the second is better.
        (
            {"domain": "general", "context": USER, "response1": "Paris", "response2": "Rome", "overall_preference": -2},
            PAIR | {"scores": [1.0, -1.0]},
        ),
        (
            {"prompt": ASKED, "response_1": "Paris", "response_2": "Rome", "preference_strength": 3},
            PAIR | {"scores": [-1.5, 1.5]},
        ),
        # Nectar: the score of a rank is the rank with its sign changed.
        (
            {"prompt": f"\n\nHuman: {ASKED}\n\nAssistant: ",
             "answers": [{"answer": "Rome", "model": "m", "rank": 3.0}, {"answer": "Paris", "model": "n", "rank": 1.0},
                         {"answer": "Oslo", "model": "o", "rank": 2.0}]},
            GROUP | {"scores": [-3.0, -1.0, -2.0]},
        ),
        (
            {"prompt": ASKED, "answers": {"text": ["Rome", "Paris", "Oslo"], "score": [0.1, 0.9, 0.2]}},
            GROUP,
        ),
        # SHP: votes.
        (
            {"post_id": "x", "history": ASKED, "human_ref_A": "Paris", "human_ref_B": "Rome", "labels": 1,
             "score_A": 12, "score_B": 3, "score_ratio": 4.0},
            PAIR | {"scores": [12.0, 3.0]},
        ),
        # Sequences of objects as `datasets` stores them.
        (ROW | {"prompt": {"role": ["user"], "content": [ASKED]}}, GROUP),
        (
            {"prompt": ASKED, "generations": ["Rome", "Paris", "Oslo"], "rating": [0.1, 0.9, 0.2]},
            GROUP,
        ),
        ({"prompt": ASKED, "responses": ["Rome", "Paris", "Oslo"], "ranks": [3, 1, 2]},
         GROUP | {"scores": [-3.0, -1.0, -2.0]}),
    ],
)  # fmt: skip
def test_forms_with_scores(row, expected):
    assert read(row) == expected
    assert read(row, unscored=True) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # LLaMA-Factory.
        (
            {"conversations": [{"from": "human", "value": ASKED}], "chosen": {"from": "gpt", "value": "Paris"},
             "rejected": {"from": "gpt", "value": "Rome"}},
            RANKED,
        ),
        ({"messages": USER, "chosen": said("Paris"), "rejected": said("Rome")}, RANKED),
        ({"instruction": "Capital", "input": "of France?", "chosen": "Paris", "rejected": "Rome"},
         RANKED | {"prompt": [{"role": "user", "content": "Capital\nof France?"}]}),
        ({"instruction": ASKED, "input": "", "chosen": "Paris", "rejected": "Rome"}, RANKED),
        ({"input": ASKED, "context": "Europe", "chosen": "Paris", "rejected": "Rome"}, RANKED),
        (
            {"instruction": "And Italy?", "input": "", "history": [[ASKED, "Paris"]], "chosen": "Rome",
             "rejected": "Oslo"},
            {"prompt": TWO_TURNS, "responses": ["Rome", "Oslo"], "scores": [1.0, 0.0]},
        ),
        # Orca pairs.
        ({"system": SYSTEM["content"], "question": ASKED, "chosen": "Paris", "rejected": "Rome"},
         RANKED | {"prompt": [SYSTEM, *USER]}),
        # hh-rlhf.
        (
            {"chosen": f"\n\nHuman: {ASKED}\n\nAssistant: Paris", "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: Rome"},
            RANKED,
        ),
        (
            {"chosen": f"Human: {ASKED}\n\nAssistant: Paris\n\nHuman: And Italy?\n\nAssistant: Rome",
             "rejected": f"Human: {ASKED}\n\nAssistant: Paris\n\nHuman: And Italy?\n\nAssistant: Oslo"},
            {"prompt": TWO_TURNS, "responses": ["Rome", "Oslo"], "scores": [1.0, 0.0]},
        ),
        # PKU-SafeRLHF.
        ({"prompt": ASKED, "response_0": "Paris", "response_1": "Rome", "better_response_id": 0}, RANKED),
        (
            {"prompt": ASKED, "response_0": "Paris", "response_1": "Rome", "better_response_id": 1},
            {"prompt": USER, "responses": ["Rome", "Paris"], "scores": [1.0, 0.0]},
        ),
        # UltraFeedback, binarized: `prompt` is the first turn, `messages` the chosen conversation.
        (
            {"prompt": ASKED, "prompt_id": "x", "chosen": TWO_TURNS + said("Rome"), "messages": TWO_TURNS,
             "rejected": TWO_TURNS + said("Oslo"), "score_chosen": 8.0, "score_rejected": 3.0},
            {"prompt": TWO_TURNS, "responses": ["Rome", "Oslo"], "scores": [1.0, 0.0]},
        ),
        # The chosen and the rejected answer go on where the prompt ends.
        ({"prompt": USER, "chosen": [*said("Paris"), TWO_TURNS[2], *said("Rome")],
          "rejected": [*said("Paris"), TWO_TURNS[2], *said("Oslo")]},
         RANKED | {"responses": [[*TWO_TURNS[1:], *said("Rome")], [*TWO_TURNS[1:], *said("Oslo")]]}),
        # A pair of SimPO's.
        ({"prompt": ASKED, "all_generated_responses": ["Rome", "Paris", "Oslo"], "all_rm_scores": [0.1, 0.9, 0.2],
          "chosen": USER + said("Paris"), "rejected": USER + said("Rome")}, RANKED),
    ],
)  # fmt: skip
def test_forms_of_pairs(row, expected):
    assert read(row, pairs=True) == expected


def gathered(*rows, **settings):
    return read(gather([as_record(row, settings.get("score", "overall")) for row in rows]), **settings)


def test_forms_of_one_response_a_row():
    rated = {"prompt": ASKED, "coherence": 4, "complexity": 1, "verbosity": 1}
    rows = [rated | {"response": "Paris", "helpfulness": 4, "correctness": 3},
            rated | {"response": "Rome", "helpfulness": 1, "correctness": 0}]  # fmt: skip
    assert gathered(*rows)["scores"] == [4.0, 1.0]
    assert gathered(*rows, score="helpfulness=1,correctness=3")["scores"] == [3.25, 0.25]
    assert gathered(*rows, score="fine-grained")["scores"] == [2.6, 1.4]
    for good, bad in [("true", "False"), ("desirable", "undesirable"), ("Yes", "no"), (True, False)]:
        rows = [{"prompt": ASKED, "completion": text, "label": label} for text, label in [("Paris", good), ("O", bad)]]
        assert gathered(*rows)["scores"] == [1.0, 0.0]
    rows = [
        {"question": ASKED, "system": "Be brief", "response": text, "rating": n} for text, n in [("a", 1), ("b", 2)]
    ]
    assert gathered(*rows)["prompt"] == [{"role": "system", "content": "Be brief"}, *USER]


def test_records_with_other_system_turns_are_of_other_prompts(tmp_path):
    rows = [{"prompt": ASKED, "system": system, "response": text, "score": score}
            for text, score in [("a", 1), ("b", 2)] for system in ("Be brief.", "Be kind.")]  # fmt: skip
    kept = load_groups(DataConfig(train_file=write_jsonl(tmp_path / "long.jsonl", rows)))[0]["train"]
    assert [prompt[0]["content"] for prompt in kept["prompt"]] == ["Be brief.", "Be kind."]


def test_pairs_that_part_at_an_earlier_turn():
    other = [*USER, *said("Lyon"), TWO_TURNS[2]]
    pair = {"chosen": TWO_TURNS + said("Rome"), "rejected": other + said("Oslo")}
    answers = [[*said("Paris"), TWO_TURNS[2], *said("Rome")], [*said("Lyon"), TWO_TURNS[2], *said("Oslo")]]
    assert read(pair, pairs=True) == RANKED | {"responses": answers}
    assert read({"chosen": USER + said("Paris"), "rejected": USER + said("Lyon")}, pairs=True)["prompt"] == USER
    # One is the start of the other.
    group = read({"chosen": TWO_TURNS + said("Rome"), "rejected": TWO_TURNS[:2]}, pairs=True)
    assert group == RANKED | {"responses": [answers[0], "Paris"]}
    other = [{"role": "user", "content": "Capital of Spain?"}, *said("Madrid")]
    assert "prompts_differ" in reason({"chosen": USER + said("Paris"), "rejected": other}, pairs=True)


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        (ROW | {"prompt": [{"role": "user", "content": [{"type": "image"}, *parts(ASKED)]}]},
         "bad_messages: the prompt has a content part of type 'image'"),
        (ROW | {"images": ["cat.png"]}, "bad_messages: it has the column images"),
        (ROW | {"prompt": [{"role": "critic", "content": ASKED}]}, "bad_messages: the prompt has the role 'critic'"),
        (ROW | {"prompt": [{"role": "user", "content": None}]}, "bad_messages"),
        (ROW | {"system": ["no", "text"]}, "bad_messages: the system column"),
        (ROW | {"system": [{"role": "user", "content": "Be brief."}]}, "bad_messages: the system column"),
    ],
)  # fmt: skip
def test_what_would_be_lost_drops_the_row_under_a_name(row, rule):
    assert reason(row).startswith(rule)
    assert reason(row, pairs=True, make_pairs="best_worst").startswith(rule)


def test_nulls_of_a_table_are_as_if_absent():
    turn = USER[0] | {"tool_calls": None, "reasoning_content": None, "from": None, "value": None, "images": []}
    turn["function_call"] = {"name": None, "arguments": {"of": None}}
    row = ROW | {"prompt": [turn], "tools": [], "system": None, "conversations": None, "chosen": None, "rejected": None}
    assert read(row) == GROUP
    assert read(ROW | {"tools": "[]", "system": ""}) == GROUP


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"system": SYSTEM["content"]}, [SYSTEM, *USER]),
        ({"system": [SYSTEM]}, [SYSTEM, *USER]),
        ({"system": SYSTEM}, [SYSTEM, *USER]),
        ({"system_prompt": SYSTEM["content"]}, [SYSTEM, *USER]),
        ({"system": SYSTEM["content"], "prompt": [SYSTEM, *USER]}, [SYSTEM, *USER]),  # twice the same
        ({"prompt": [SYSTEM, *USER], "chosen": USER + said("Paris"), "rejected": USER + said("Rome")}, [SYSTEM, *USER]),
        ({"prompt": USER, "chosen": [SYSTEM, *USER, *said("Paris")], "rejected": [SYSTEM, *USER, *said("Rome")]},
         [SYSTEM, *USER]),
        # The column has the last turn, the first, or all as one text.
        ({"prompt": "And Italy?", "chosen": TWO_TURNS + said("a"), "rejected": TWO_TURNS + said("b")}, TWO_TURNS),
        ({"prompt": USER, "chosen": TWO_TURNS + said("a"), "rejected": TWO_TURNS + said("b")}, TWO_TURNS),
        ({"prompt": f"{SYSTEM['content']}\n\n{ASKED}", "chosen": [SYSTEM, *USER, *said("a")],
          "rejected": [SYSTEM, *USER, *said("b")]}, [SYSTEM, *USER]),
        ({"prompt": f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n", "chosen": USER + said("a"),
          "rejected": USER + said("b")}, USER),
        ({"prompt": f"User: {ASKED}\nAssistant: Paris\nUser: And Italy?\nAssistant:", "chosen": TWO_TURNS + said("a"),
          "rejected": TWO_TURNS + said("b")}, TWO_TURNS),
        ({"prompt": "And Italy?", "messages": TWO_TURNS}, TWO_TURNS),
        ({"prompt": " ", "chosen": USER + said("a"), "rejected": USER + said("b")}, USER),
    ],
)  # fmt: skip
def test_prompt_column_and_conversations_that_agree(columns, prompt):
    row = {"prompt": ASKED, "chosen": "Paris", "rejected": "Rome"} | columns
    assert read(row, pairs=True)["prompt"] == prompt


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "Name a prime."},
        {"prompt": f"{ASKED} In one word."},
        {"prompt": f"<|im_start|>system\nIn French.<|im_end|>\n<|im_start|>user\n{ASKED}<|im_end|>\n"},
        {"prompt": TWO_TURNS},
        {"prompt": [SYSTEM, *USER], "chosen": [USER[0] | {"role": "system"}, *USER, *said("a")],
         "rejected": [USER[0] | {"role": "system"}, *USER, *said("b")]},
        {"system": "Answer in English.", "prompt": [SYSTEM, *USER], "chosen": "a", "rejected": "b"},
        {"prompt": "Name a prime.", "messages": USER, "chosen": "a", "rejected": "b"},
    ],
)  # fmt: skip
def test_a_prompt_that_contradicts_the_conversations(columns):
    row = {"chosen": USER + said("Paris"), "rejected": USER + said("Rome")} | columns
    assert reason(row, pairs=True).startswith("prompts_differ")


@pytest.mark.parametrize(
    "write",
    [
        json.dumps,
        repr,
        lambda turns: "[" + "\n ".join(map(repr, turns)) + "]",
        lambda turns: "\n" + json.dumps(turns, indent=1),
    ],
    ids=["json", "repr", "numpy", "indented"],
)
def test_messages_that_were_written_as_text(write):
    turns = [{"role": "user", "content": "What's [it]?"}]
    row = {"prompt": write(turns), "chosen": write(turns + said("It's 7\n{7}")), "rejected": write(turns + said("8"))}
    expected = {"prompt": turns, "responses": ["It's 7\n{7}", "8"], "scores": [1.0, 0.0]}
    assert read(row, pairs=True) == expected
    answers = {"prompt": "What's [it]?", "responses": [write(said("a")), write(said("b"))], "scores": [1, 0]}
    assert read(answers)["responses"] == ["a", "b"]
    cut = {**row, "chosen": row["chosen"].rstrip()[:-3]}
    assert reason(cut, pairs=True).startswith("bad_messages")


@pytest.mark.parametrize("text", ['{"prime": 7}', "[3, 2, 1]", '[{"from": "Oslo", "value": 3}]', "{x}", "[]", '["a"]',
                                  "Human: hi", '{"role": "king", "content": "x"}', "[{", "[{'role': 1}]",
                                  '{"from": "agent", "value": 3}',
                                  '[{"role": "user", "content": "x"}] What is this?'])  # fmt: skip
def test_any_other_text_stays_text(text):
    row = {"prompt": text, "responses": [text, "b"], "scores": [1, 0]}
    assert read(row) == {"prompt": [{"role": "user", "content": text}], "responses": [text, "b"], "scores": [1.0, 0.0]}


@pytest.mark.parametrize(
    ("role", "known"),
    [("chatgpt", "assistant"), ("model", "assistant"), ("bot", "assistant"), ("gpt", "assistant"),
     (" ASSISTANT ", "assistant"), ("observation", "tool"), ("function", "tool")],
)  # fmt: skip
def test_spellings_of_roles(role, known):
    for user, system in [("human", "system"), ("User", "System"), ("prompter", "developer")]:
        turns = [{"from": said_by, "value": "x"} for said_by in (system, user, role)]
        row = ROW | {"prompt": [*turns, {"role": user, "content": "u"}]}
        group = read(row, row_rules={"result_without_call": "keep"})
        assert [turn["role"] for turn in group["prompt"]] == ["system", "user", known, "user"]


def test_scores_under_other_names_are_not_replaced():
    """As convert.py reads pairs, which makes 1 and 0 of those without scores."""
    pair = {"prompt": ASKED, "chosen": "Paris", "rejected": "Rome"}
    assert read(pair, unscored=True)["scores"] == [1.0, 0.0]
    assert read(pair | {"chosen_quality": 3, "rejected_quality": 5}, unscored=True)["scores"] == [3.0, 5.0]
    for columns in ({"scores": [9, 1]}, {"ratings": "[9, 1]"}):
        with pytest.raises(BadRow, match="unknown_format: whose scores are those of the column"):
            read(pair | columns, unscored=True)
    with pytest.raises(BadRow, match="too_few_responses"):
        read(pair | {"rejected_score": 5}, unscored=True)  # the other one is missing
    text = reason(pair | {"a_points": 3, "b_points": 4})
    assert "a pair without scores; its columns are prompt, chosen, rejected, a_points, b_points" in text
    assert "columns: {score_chosen: a_points, score_rejected: b_points}" in text


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"ask": ASKED, "replies": ["Rome", "Paris", "Oslo"], "marks": [0.1, 0.9, 0.2]},
         {"prompt": "ask", "responses": "replies", "scores": "marks"}),
        ({"task": {"text": ASKED}, "replies": [{"said": text, "by": {"mark": mark}}
                                               for text, mark in [("Rome", 0.1), ("Paris", 0.9), ("Oslo", 0.2)]]},
         {"prompt": "task.text", "responses": "replies.said", "scores": "replies.by.mark"}),
        ({"prompt": "not this", "ask": ASKED, "a": "Rome", "b": "Paris", "c": "Oslo", "of": [0.1, 0.9, 0.2]},
         {"prompt": "ask", "responses": ["a", "b", "c"], "scores": ["of.0", "of.1", "of.2"]}),
        ({"q.text": ASKED, "replies": '["Rome", "Paris", "Oslo"]', "marks": "[0.1, 0.9, 0.2]"},
         {"prompt": "q.text", "responses": "replies", "scores": "marks"}),
    ],
)  # fmt: skip
def test_columns_are_named(tmp_path, row, columns):
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    kept, counts = load_groups(DataConfig(train_file=path, columns=json.dumps(columns)))
    assert {name: kept["train"][0][name] for name in GROUP} == GROUP
    assert [note for note in counts["train"]["noted"] if note != "column prompt"] == []


def test_columns_of_one_response_a_row(tmp_path):
    rows = [{"ask": ASKED, "reply": text, "mark": mark} for text, mark in [("Paris", 0.9), ("Rome", 0.1)]]
    columns = {"prompt": "ask", "response": "reply", "score": "mark"}
    kept = load_groups(DataConfig(train_file=write_jsonl(tmp_path / "rows.jsonl", rows), columns=columns))[0]["train"]
    assert {name: kept[0][name] for name in PAIR} == PAIR


def test_the_key_columns_is_strict(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROW, numbered(1)])
    with pytest.raises(UserError, match="columns: no row has 'answer'.*change the key"):
        load_groups(DataConfig(train_file=path, columns={"responses": "responses", "prompt": "answer"}))
    for columns, message in [({"respones": "a"}, "did you mean 'responses'"), ([1], "not a mapping"),
                             ("{", "not a mapping"), ({"prompt": 1}, "prompt: the name of a column"),
                             ({"prompt": ["a"]}, "prompt: the name of a column")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            RowConfig(columns=columns)
    # A source of a mixture that has none of the columns is read by its form.
    other = write_jsonl(tmp_path / "other.jsonl", [{"ask": "q", "replies": ["a", "b"], "marks": [1, 2]}])
    columns = {"prompt": "ask", "responses": "replies", "scores": "marks"}
    config = DataConfig(dataset_mixer={path: 1.0, other: 1.0}, dataset_splits=["train"], columns=columns)
    assert len(load_groups(config)[0]["train"]) == 3


def test_an_unknown_form_suggests_the_key():
    row = {"id": 3, "question": ASKED, "replies": [{"by": "m", "text": "a", "mark": 1.0}], "extra": None}
    assert suggestion(row) == "columns: {prompt: question, responses: replies.by, scores: replies.mark}"
    assert suggestion(row) in reason(row)
    assert suggestion({"x": 1}) == "columns: {prompt: YOUR_PROMPT_COLUMN, responses: YOUR_RESPONSES_COLUMN, scores: YOUR_SCORES_COLUMN}"  # noqa: E501  # fmt: skip
    web = {"question": {"id": 1, "text": "q"}, "answer_0": "a", "answer_1": "b", "score_0": 0.5, "score_1": -0.5}
    assert suggestion(web) == "columns: {prompt: question.text, responses: [answer_0, answer_1], scores: [score_0, score_1]}"  # noqa: E501  # fmt: skip
    one = {"ask": "q", "reply": "a", "mark": 0.5}
    assert suggestion(one) == "columns: {prompt: ask, response: reply, score: mark}"


def test_what_is_not_read_is_named_once(tmp_path):
    turn = USER[0] | {"name": "Ann"}
    rows = [numbered(i, source="s", prompt=[turn | {"content": f"Question {i}"}], empty=None) for i in range(3)]
    counts = load_groups(DataConfig(train_file=write_jsonl(tmp_path / "rows.jsonl", rows)))[1]["train"]
    assert counts["noted"] == {"column source": 3, "message key name": 3}
    report = {"rows_kept": 3, "rows_in": 3, "dropped_by_reason": {}, "responses": 9, "k_histogram": {"3": 3},
              "scores": dict.fromkeys(("mean", "std", "std_in_row", "min", "max", "rows_with_ties"), 0.0)
              | {"length_correlation": None}, "lengths": {}, "warnings": [],
              "not_read": {"columns": {"source": 3}, "message_keys": {"name": 3}}}  # fmt: skip
    assert summary("train", report).count("  not read: columns source; message keys name") == 1


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("<|im_start|>user\nName a prime.<|im_end|>", "look as if a chat template had rendered them before"),
        ("[INST] Name a prime. [/INST]", "look as if a chat template had rendered them before"),
        ("What does <eos> mean?", "spell control tokens of the tokenizer"),
        ("Name a prime.", None),
    ],
)
def test_rows_that_look_rendered_are_a_warning(tmp_path, text, warning):
    rows = [numbered(i, prompt=f"{i} {text if i % 10 == 0 else 'Name a prime.'}") for i in range(50)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    counts = load_groups(DataConfig(train_file=path), control_tokens=["<eos>"])[1]["train"]
    warnings = describe_notes(counts["noted"], 50)["warnings"]
    assert [warning in found for found in warnings] == ([True] if warning else [])
    one = write_jsonl(tmp_path / "one.jsonl", [*rows[1:10], *rows[11:20], rows[10], *rows[21:30]])
    counts = load_groups(DataConfig(train_file=one), control_tokens=["<eos>"])[1]["train"]
    assert describe_notes(counts["noted"], 28)["warnings"] == []  # one such text is no matter of the rows


def test_prompts_to_sample_from_have_their_system_turn(tmp_path):
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": ASKED, "system": SYSTEM["content"], "id": 3}])
    assert read_prompts(path)[0] == [{"prompt": [SYSTEM, *USER], "system": SYSTEM["content"], "id": 3}]


def test_names_that_are_no_text_are_noted_all_the_same(tmp_path):
    """Half of a surrogate pair, or bytes that are not UTF-8, in the name of a column or key."""
    turn = {"role": "user", "content": ASKED, "\ud800": 1}
    path = write_jsonl(tmp_path / "rows.jsonl", [ROW | {"prompt": [turn], "\udce9": 1}])
    assert load_groups(DataConfig(train_file=path))[1]["train"]["noted"] == {"column ?": 1, "message key ?": 1}
    rows = [{"prompt": "p", "response": "a", "score": n, "\ud800": n} for n in (1, 2)]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    assert load_groups(DataConfig(train_file=path, row_rules={"duplicate_response": "keep"}))[1]["train"]["noted"] == {
        "column ?": 1
    }


def test_sources_are_dropped_of_rows_of_one_response(tmp_path):
    rows = [{"prompt": "p", "response": r, "score": n, "source": s} for n, (r, s) in enumerate(["ax", "bx", "cy"])]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    rows, counts = load_groups(DataConfig(train_file=path, drop_sources=["y"], max_dropped_fraction=0.5))
    assert rows["train"][0]["responses"] == ["a", "b"]
    assert (counts["train"]["dropped_by_reason"], counts["train"]["noted"]) == ({"dropped_source": 1}, {})
