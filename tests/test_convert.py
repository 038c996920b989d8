"""The converter: every form in, both forms out, the same bytes twice, awkward rows named, and its report."""

import gzip
import json
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from alignment.data.convert import ConvertConfig, convert
from alignment.data.lengths import Columns
from alignment.data.report import describe, summary
from alignment.errors import UserError
from tests.conftest import SHARED, needs_shared
from tests.rows import LONG, PAIR, ROW, ULTRAFEEDBACK, USER, numbered, said, write_jsonl
from tests.scripts import script
from tests.tiny import CHATML, save_tiny_model


def run(tmp_path, rows, to="list", name="out.jsonl", **settings):
    """Report and output of a conversion."""
    source, output = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / name
    report = convert([source], ConvertConfig(to=to, output=str(output), overwrite=True, **settings))
    return report, output


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_list_form(tmp_path):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    report, output = run(tmp_path, [ROW, pair, pair | {"prompt": "r", "score_chosen": 5, "score_rejected": 4}])
    assert lines(output) == [
        {"prompt": USER, "responses": ROW["responses"], "scores": ROW["scores"]},
        {"prompt": [{"role": "user", "content": "q"}], "responses": ["a", "b"], "scores": [1.0, 0.0]},
        {"prompt": [{"role": "user", "content": "r"}], "responses": ["a", "b"], "scores": [5.0, 4.0]},
    ]
    assert (report["rows_in"], report["rows_kept"], report["k_histogram"]) == (3, 3, {"2": 2, "3": 1})


@pytest.mark.parametrize("rows", [[ROW], LONG[::2], [ULTRAFEEDBACK]], ids=["list", "long", "ultrafeedback"])
def test_pairs(tmp_path, rows):
    _, output = run(tmp_path, rows, "pairs")
    pair = {"prompt": USER, "chosen": said("Paris"), "score_chosen": 0.9}
    assert lines(output) == [pair | {"rejected": said("Rome"), "score_rejected": 0.1}]
    _, output = run(tmp_path, rows, "pairs", make_pairs="all")
    assert [line["rejected"] for line in lines(output)] == [said("Oslo"), said("Rome"), said("Rome")]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
@pytest.mark.parametrize("to", ["list", "pairs"])
def test_the_same_bytes_twice(tmp_path, name, to):
    rows = [numbered(i, scores=[i, 2, 3.5]) for i in range(30)]
    first = run(tmp_path, rows, to, name, make_pairs="best_random")[1].read_bytes()
    (tmp_path / "elsewhere").mkdir()
    again = run(tmp_path / "elsewhere", rows, to, name, make_pairs="best_random")[1]
    assert again.read_bytes() == first
    if name.endswith("parquet"):
        assert len(Dataset.from_parquet(str(again))) == 30
    else:
        assert len((gzip.decompress(first) if name.endswith(".gz") else first).splitlines()) == 30


def test_what_was_converted_converts_to_itself(tmp_path):
    rows = [numbered(i, scores=[i, 2, 3.5]) for i in range(5)]
    _, output = run(tmp_path, rows)
    first = output.read_bytes()
    convert([str(output)], ConvertConfig(output=str(tmp_path / "again.jsonl")))
    assert (tmp_path / "again.jsonl").read_bytes() == first
    _, output = run(tmp_path, rows, "pairs")
    convert([str(output)], ConvertConfig(to="pairs", output=str(tmp_path / "pairs.jsonl")))
    assert (tmp_path / "pairs.jsonl").read_bytes() == output.read_bytes()


def test_nothing_is_overwritten_or_left_half_written(tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    source = write_jsonl(tmp_path / "in.jsonl", [ROW])
    with pytest.raises(UserError, match="is there already"):
        convert([source], ConvertConfig(output=str(output)))
    bad = write_jsonl(tmp_path / "bad.jsonl", ["{torn"])
    with pytest.raises(UserError, match="1 of 1 rows had to be dropped"):
        convert([bad], ConvertConfig(output=str(tmp_path / "none.jsonl")))
    assert output.read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "in.jsonl", "bad.jsonl"}
    with pytest.raises(ValueError, match="output: ends in one of"):
        ConvertConfig(output="rows.csv")


def test_script(tmp_path, monkeypatch, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", [ROW, "{torn", numbered(1, scores=["1", 2, 3])])
    words = [source, "--to", "list", "--output", tmp_path / "out.jsonl"]
    assert script(monkeypatch, "convert.py", *words, "--report", tmp_path / "report") == 0
    printed = capsys.readouterr().out
    assert "2 of 3 rows kept (dropped: not_json 1); fixed: text_score 1; 6 responses" in printed
    report = json.loads((tmp_path / "report" / "data_report.json").read_text())
    assert (report["rows_in"], report["rows_kept"], report["rows_fixed"], report["rows_dropped"]) == (3, 2, 1, 1)
    assert report["examples"]["not_json"][0].startswith(f"{source}, line 2: not JSON")
    assert (tmp_path / "report" / "data_report.png").read_bytes()[1:4] == b"PNG"
    assert script(monkeypatch, "convert.py", *words, "--too", "x") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")


def test_lengths_in_tokens(tmp_path, tiny_model, monkeypatch):
    source = write_jsonl(tmp_path / "in.jsonl", [ROW | {"responses": ["Rome<|im_end|>", "Paris", "Oslo"]}])
    words = ["--output", tmp_path / "out.jsonl", "--tokenizer", tiny_model, "--report", tmp_path]
    assert script(monkeypatch, "convert.py", source, *words, "--row_rules", '{"control_tokens": "fix"}') == 0
    assert json.loads((tmp_path / "data_report.json").read_text())["lengths"]["unit"] == "tokens"
    assert lines(tmp_path / "out.jsonl")[0]["responses"] == ROW["responses"]


def columns(scores, lengths=None):
    flat = np.concatenate(scores).astype(float)
    ks = np.array([len(row) for row in scores])
    return Columns(flat, np.concatenate(lengths) if lengths else np.ones(len(flat)), np.full(len(ks), 9), ks, "tokens")


def test_what_the_report_says_of_scores():
    about = describe(columns([[1, 2, 3], [5, 5], [4, 1, 4, 0]], [[10, 20, 30], [1, 2], [9, 6, 9, 5]]))
    assert about["k_histogram"] == {"2": 1, "3": 1, "4": 1}
    scores = about["scores"]
    assert (scores["rows_constant"], scores["rows_with_ties"], scores["rows_with_tied_best"]) == (1, 2, 2)
    assert (scores["min"], scores["max"], scores["mean"]) == (0, 5, pytest.approx(25 / 9))
    assert scores["length_correlation"] == pytest.approx(1.0)  # in each row that has one, a straight line
    assert scores["spread_in_row"] == pytest.approx((2 + 0 + 4) / 3)
    assert scores["std_in_row"] == pytest.approx(np.mean([np.std([1, 2, 3]), 0, np.std([4, 1, 4, 0])]))
    assert sum(scores["histogram"]["counts"]) == 9
    assert about["lengths"]["response"]["max"] == 30
    assert about["warnings"] == []


@pytest.mark.parametrize(
    ("alpha", "largest", "warning"),
    [(0, 1.0, None), (1e-4, 1.0, "one-hot"), (1.0, 0.6652, None), (1e4, 0.3334, "nearly uniform")],
)
def test_labels_that_alpha_makes(alpha, largest, warning):
    about = describe(columns([[1, 2, 3], [7, 8, 6]]), alpha)
    assert about["scores"]["mean_largest_target"] == pytest.approx(largest, abs=1e-4)
    assert [warning in text for text in about["warnings"]] == ([True] if warning else [])


def test_a_misspelt_option_is_named(monkeypatch, capsys):
    assert script(monkeypatch, "convert.py", "rows.jsonl", "--to=list", "--ouput", "x") == 2
    assert "error: unknown flag --ouput; did you mean --output?" in capsys.readouterr().err
    assert script(monkeypatch, "convert.py", "rows.jsonl", "--to=lists", "--output", "x.jsonl") == 2
    assert "error: command line: to: invalid choice: 'lists' " in capsys.readouterr().err


def test_report_in_lines(tmp_path):
    report, _ = run(tmp_path, [ROW, "{torn", numbered(1)], alpha=1e-4)
    text = summary("rows", report)
    for part in (
        "rows: 2 of 3 rows kept (dropped: not_json 1)",
        "  3 responses in 2 prompts; scores",
        "within a prompt +- ",
        "from 0.1 to 0.9",
        "WARNING: alpha 0.0001",
    ):
        assert part in text
    assert "2 responses in 1 prompt;" in summary("rows", report | {"k_histogram": {"2": 1}})
    many = report | {"k_histogram": {str(k): 1 for k in range(2, 40)}}
    assert "  2 to 39 responses a prompt; scores" in summary("rows", many)
    assert "  2 responses in 7 prompts, 4 in 1, 10 in 3; scores" in summary(
        "rows", report | {"k_histogram": {"10": 3, "2": 7, "4": 1}}
    )


def test_rows_that_a_template_would_lose_are_said_and_not_measured(tmp_path):
    template = CHATML.replace("m['content']", "m['content'][:40]")
    save_tiny_model(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    long = numbered(1, responses=["Well, " * 9, "b", "c"])
    for rows, unit, num_lost in ([long, ROW], "tokens", 1), ([long], "characters", 1), ([ROW], "tokens", 0):
        report, output = run(tmp_path, rows, tokenizer=str(tmp_path / "model"))
        assert (report["lengths"]["unit"], report["rows_kept"]) == (unit, len(lines(output))) == (unit, len(rows))
        assert len([line for line in report["warnings"] if "leaves out the text of response 1" in line]) == num_lost


#: What becomes of the awkward rows with the default rules, by their number in the file: a reason, or what was fixed.
DROPPED = {
    5: "identical_scores", 14: "too_few_responses", 15: "too_few_responses", 16: "too_few_responses",
    17: "too_few_responses", 19: "too_few_responses", 20: "too_few_responses", 21: "no_prompt",
    22: "identical_scores", 23: "prompts_differ", 24: "too_few_responses", 25: "roles_do_not_alternate",
    28: "unknown_format", 29: "too_few_responses",
}  # fmt: skip
FIXED = {0: "empty_response", 1: "empty_response", 3: "duplicate_response", 4: "duplicate_response",
          6: "empty_response", 9: "duplicate_response"}  # fmt: skip


@needs_shared
def test_awkward_real_rows_are_kept_fixed_or_dropped_under_a_name(tmp_path):
    rows = [json.loads(line)["row"] for line in (SHARED / "data" / "messy_rows.jsonl").read_text().splitlines()]
    dropped, fixed = {}, {}
    for i, row in enumerate(rows):
        report, _ = run(tmp_path, [row, numbered(i)])
        assert report["rows_in"] == report["rows_kept"] + report["rows_dropped"] == 2
        for what, found in ((dropped, report["dropped_by_reason"]), (fixed, report["fixed_by_reason"])):
            if found:
                (what[i],) = found
    assert (dropped, fixed) == (DROPPED, FIXED)
    report, output = run(tmp_path, rows)
    assert report["dropped_by_reason"] == Counter(DROPPED.values())
    assert len(lines(output)) == report["rows_kept"] == 30 - len(DROPPED)
    assert report["rows_fixed"] == len(FIXED)


@needs_shared
def test_both_releases_of_ultrafeedback(tmp_path):
    path = SHARED / "data" / "ultrafeedback_raw_sample.jsonl"
    report, _ = run(tmp_path, [*map(json.loads, path.read_text().splitlines()), ROW])
    assert report["dropped_by_reason"] == {"too_few_responses": 2}  # the examples have ratings of one completion each
    for row in map(json.loads, path.read_text().splitlines()):
        rated = row["completions"][0]
        row["completions"] = [rated, rated | {"response": "Another."}]
        annotations = json.loads(json.dumps(rated["annotations"]).replace('"Rating": "3"', '"Rating": "N/A"'))
        row["completions"][1]["annotations"] = annotations
        report, output = run(tmp_path, [row])
        assert report["fixed_by_reason"] == {"no_overall_score": 1}
        (line,) = lines(output)
        assert line["scores"] in ([2.75, 2.0], [2.5, 2.0])


@needs_shared
@pytest.mark.parametrize("to", ["list", "pairs"])
def test_shared_files_convert(tmp_path, to):
    files = sorted((SHARED / "data").glob("*_eval.jsonl.gz")) + [
        SHARED / "data" / "ultrafeedback_layout_vicuna.jsonl.gz"
    ]
    config = ConvertConfig(
        to=to, output=str(tmp_path / "all.jsonl"), make_pairs="best_random" if to == "pairs" else None
    )
    report = convert([str(file) for file in files], config)
    assert report["rows_in"] == report["rows_kept"] + report["rows_dropped"] > 500
    assert report["rows_kept"] > 0.9 * report["rows_in"]
    assert len(lines(tmp_path / "all.jsonl")) == report["rows_kept"]
    assert PAIR["prompt"][0].keys() == lines(tmp_path / "all.jsonl")[0]["prompt"][0].keys()
