"""A run's rows on their way to token ids: what the report says of those that meet a rule there."""

import json

import pytest

from alignment.data.load import DataConfig
from alignment.data.prepare import prepare_rows
from alignment.data.report import summary
from alignment.errors import UserError
from nca_trainer import NCAConfig
from tests.rows import write_jsonl
from tests.templates import FAMILIES, TOOLS, family_tokenizer
from tests.tiny import CHATML, tiny_tokenizer

TRIMS = CHATML.replace("m['content']", "m['content'] | trim")
REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + CHATML
)  # fmt: skip
NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
K_LOSSES = ("QRPO", "OAPL", "GVPO", "PL")
SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rome?"}]


def plain(i, responses=("a", "b")):
    return {"prompt": f"Question {i}?", "responses": responses, "scores": [float(k) for k in range(len(responses))]}


def prepare(folder, template, train, held_out=None, keep_columns=False, loss=None, **settings):
    files = {"train_file": write_jsonl(folder / "train.jsonl", train)}
    if held_out:
        files["eval_file"] = write_jsonl(folder / "eval.jsonl", held_out)
    args = NCAConfig(output_dir=str(folder), bf16=False, use_cpu=True, **loss or {})
    config = DataConfig(**files, **{"max_dropped_fraction": 0.5} | settings)
    return prepare_rows(config, args, tiny_tokenizer(template), pairs=False, keep_columns=keep_columns)


def test_responses_that_the_template_makes_equal_are_fixed_and_counted(tmp_path):
    rows = [plain(1, ["a", "b", "c", " a"]), plain(2, ["a", "a", "b", "b "]), plain(3), plain(4, ["a", " a"])]
    _, tokens, report = prepare(tmp_path, TRIMS, rows)
    assert tokens["train"]["scores"][:] == [[1.5, 1.0, 2.0], [0.5, 2.5], [0.0, 1.0]]
    assert report["fixed_by_reason"] == {"duplicate_response": 2}, "the second is fixed twice, and counts once"
    assert report["dropped_by_reason"] == {"too_few_responses": 1}
    assert (report["rows_in"], report["rows_kept"], report["rows_fixed"]) == (4, 3, 2)
    _, tokens, report = prepare(tmp_path, TRIMS, rows, row_rules={"duplicate_response": "keep"})
    assert [len(scores) for scores in tokens["train"]["scores"]] == [4, 4, 2, 2]


def test_a_refused_row_shows_the_templates_words_and_its_place(tmp_path):
    rows = [plain(1), plain(2) | {"prompt": SYSTEM}, plain(3)]
    raw, tokens, report = prepare(tmp_path, REFUSES_SYSTEM, [plain(9)], rows, keep_columns=True)
    place = f"{tmp_path}/eval.jsonl, line 2: the chat template says: No system role"
    assert report["eval"]["examples"] == {"template_refused": [place]}
    assert place in summary("train", report)
    assert len(raw["eval"]) == len(tokens["eval"]) == 2, "nothing is sampled to what the template refuses"
    with pytest.raises(UserError, match="template_refused 2.* line 1: the chat template says: No system role"):
        prepare(tmp_path, REFUSES_SYSTEM, [plain(i) | {"prompt": SYSTEM} for i in (1, 2)])
    with pytest.raises(UserError, match="template_refused in 1 rows: .*eval.jsonl, line 2: .*No system role; fix them"):
        prepare(tmp_path, REFUSES_SYSTEM, [plain(9)], rows, row_rules={"template_refused": "fail"})


def test_a_systems_turn_that_the_template_leaves_out_is_a_warning_or_a_rule(tmp_path):
    rows = [plain(1), plain(2) | {"prompt": SYSTEM}]
    _, tokens, report = prepare(tmp_path, NO_SYSTEM, rows)
    assert len(tokens["train"]) == 2
    assert [
        line for line in report["warnings"] if line.startswith("1 rows are kept though they break the rule system_")
    ]
    _, _, report = prepare(tmp_path, NO_SYSTEM, rows, row_rules={"system_not_rendered": "drop"})
    assert report["dropped_by_reason"] == {"system_not_rendered": 1}
    assert json.dumps(report), "it is written to data_report.json"


def test_a_run_without_a_template_or_ends_is_warned_of(tmp_path):
    _, _, report = prepare(tmp_path, None, [plain(1)])
    assert "WARNING: the tokenizer has no chat template: responses follow" in summary("train", report)
    with pytest.raises(UserError, match="template_refused 1.* no chat template for several turns; set chat_template"):
        prepare(tmp_path, None, [plain(1)], [plain(2) | {"prompt": SYSTEM}])
    _, _, report = prepare(tmp_path, CHATML.replace("<|im_end|>", "#"), [plain(1)])
    assert "WARNING: no response ends where sampling stops (at <|im_start|>, <|im_end|>)" in summary("train", report)


def scored(i, scores):
    return plain(i, [f"answer {k}" for k in range(len(scores))]) | {"scores": scores}


@pytest.mark.parametrize(
    ("loss_type", "beta", "scores", "warning"),
    [
        *[(name, 0.1, [0.5, 0.5, 0.5], "the scores of each row are equal: they do not tell") for name in K_LOSSES],
        *[(name, 0.1, [0.1, 0.9, 0.5], None) for name in K_LOSSES],
        ("OAPL", 0.1, [0.501, 0.5, 0.502], "asks for log-ratios of a prompt's responses that spread by 0.0082 nats"),
        ("GVPO", 0.1, [0.501, 0.5, 0.502], "asks for log-ratios of a prompt's responses that spread by 0.0082 nats"),
        ("GVPO", 1e-3, [0.501, 0.5, 0.502], None),
        ("QRPO", 0.1, [0.501, 0.5, 0.502], None),
    ],
)
def test_scores_without_spread_are_warned_of(tmp_path, loss_type, beta, scores, warning):
    rows = [scored(i, scores) for i in range(4)]
    loss = {"loss_type": loss_type, "beta": beta}
    _, _, report = prepare(tmp_path, CHATML, rows, loss=loss, row_rules={"identical_scores": "keep"})
    found = [text for text in report["warnings"] if loss_type in text]
    assert [warning in text for text in found] == ([True] if warning else [])
    assert "mean_largest_target" not in report["scores"], "alpha is not used"


def test_many_rows_without_spread_are_counted(tmp_path):
    rows = [scored(i, [0.1, 0.9] if i else [0.5, 0.5]) for i in range(4)]
    loss, rules = {"loss_type": "OAPL", "beta": 0.1}, {"identical_scores": "keep"}
    _, _, report = prepare(tmp_path, CHATML, rows, loss=loss, row_rules=rules)
    assert any("in 1 of 4 rows all scores are equal: they do not tell OAPL" in text for text in report["warnings"])
    _, _, report = prepare(tmp_path, CHATML, rows, loss=loss)
    assert not any("OAPL" in text for text in report["warnings"]), "they were dropped"


@pytest.mark.parametrize("held_out", [False, True], ids=["train", "eval"])
def test_a_loss_of_pairs_names_the_row_that_has_more(tmp_path, held_out):
    files = ([scored(1, [0, 1])], [scored(2, [0, 1, 2])])
    with pytest.raises(UserError, match="loss_type: IPO compares 2 responses, and .*, line 1 has 3; .*NCA or InfoNCA"):
        prepare(tmp_path, CHATML, *(files if held_out else files[::-1]), loss={"loss_type": "ipo"})


def test_so_does_a_loss_of_your_own(tmp_path):
    (tmp_path / "own.py").write_text(
        "from trl_nca.losses import dpo_loss\n"
        "def mine(rewards, targets, response_mask):\n    return dpo_loss(rewards, targets, response_mask)\n"
        "mine.num_responses = 2\n"
    )
    loss = {"loss_type": f"{tmp_path}/own.py:mine"}
    with pytest.raises(UserError, match="own.py:mine compares 2 responses, and .*train.jsonl, line 1 has 3"):
        prepare(tmp_path, CHATML, [scored(1, [0, 1, 2])], loss=loss)
    assert len(prepare(tmp_path, CHATML, [scored(1, [0, 1])], loss=loss)[1]["train"]) == 1


def asks(identity="call00001", expression="17 * 23", **more):
    arguments = {"expression": expression}
    call = {"id": identity, "type": "function", "function": {"name": "calculator", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call], **more}


def returns(text, identity="call00001"):
    return {"role": "tool", "content": text, "tool_call_id": identity, "name": "calculator"}


def answers(text):
    return {"role": "assistant", "content": text}


#: A row each, with its second response and more columns, and what drops it: the rule by family of templates, or by all.
BESIDE = [
    ([asks(), returns("391"), answers("391.")], {"tools": TOOLS}, {"deepseek_r1": "calls_not_rendered"}),
    ([asks(), returns("391"), answers("391.")], {"tools": json.dumps(TOOLS)}, {"deepseek_r1": "calls_not_rendered"}),
    ([asks()], {}, {"deepseek_r1": "prompt_not_as_sampled"}),
    ([answers("Which?"), {"role": "user", "content": "That."}, answers("391.")], {},
     {"deepseek_r1": "prompt_not_as_sampled"}),
    ([asks(), answers("391.")], {"tools": TOOLS}, "roles_do_not_alternate"),
    ([asks(), {"role": "user", "content": "Well?"}, answers("391.")], {"tools": TOOLS}, "call_without_result"),
    ([answers("Hm."), returns("391"), answers("391.")], {"tools": TOOLS}, "result_without_call"),
    ([asks(), returns("391", "call00009"), answers("391.")], {"tools": TOOLS}, "result_without_call"),
    ([{"role": "user", "content": "Well?"}], {}, "no_assistant_turn"),
    ([asks() | {"tool_calls": [{"name": "calculator", "arguments": "17 *"}]}], {"tools": TOOLS}, "bad_tools"),
    ([asks(), returns("391"), answers("391.")], {"tools": "calculator"}, "bad_tools"),
    ([answers("391.")], {"chat_template_kwargs": {"tokenize": True}}, "bad_tools"),
    ([{"role": "critic", "content": "Hm."}], {}, "bad_messages"),
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_with_calls_is_kept_or_dropped_under_a_name(tmp_path, family):
    rows = [plain(i, [[answers("Cold.")], response]) | more for i, (response, more, _) in enumerate(BESIDE)]
    found = [rule.get(family, "") if isinstance(rule, dict) else rule for *_, rule in BESIDE]
    file = {"train_file": write_jsonl(tmp_path / "train.jsonl", [*rows, plain(99, ["</think>a", "</think>b"])])}
    args = NCAConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    config = DataConfig(**file, max_dropped_fraction=1)
    _, tokens, report = prepare_rows(config, args, family_tokenizer(FAMILIES[family]), pairs=False)
    lines = {int(location.rpartition("line ")[2]) - 1 for location in tokens["train"]["location"]}
    assert {i for i, rule in enumerate(found) if not rule} == lines - {len(BESIDE)}
    assert report["rows_in"] == len(rows) + 1 == report["rows_kept"] + report["rows_dropped"]
    assert {rule: found.count(rule) for rule in found if rule} == report["dropped_by_reason"]


def test_only_the_assistants_tokens_of_a_trajectory_count(tmp_path):
    """From the file to the ids: what the tool returned is among them, and does not count."""
    row = plain(1, [[asks(), returns("391"), answers("It is 391.")], "Warm."]) | {"tools": TOOLS}
    config = DataConfig(train_file=write_jsonl(tmp_path / "train.jsonl", [row, plain(2)]))
    args = NCAConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    tokenizer = family_tokenizer(FAMILIES["qwen3"])
    _, tokens, report = prepare_rows(config, args, tokenizer, pairs=False)
    first, second = tokens["train"]
    ids, mask = first["response_ids"][0], first["token_masks"][0]
    counted = tokenizer.decode([i for i, counts in zip(ids, mask, strict=True) if counts])
    assert "17 * 23" in counted
    assert counted.count("391") == 1
    assert tokenizer.decode(ids).count("391") == 2
    assert "calculator" in tokenizer.decode(first["prompt_ids"])
    assert second["token_masks"] is None
    assert report["rows_kept"] == 2
