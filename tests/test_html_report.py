"""The report on a run: made from the folder alone, one page that needs nothing else, and its alarm."""

import json
import logging
import math
import re
import runpy
import sys

import numpy as np
import pytest
import yaml

from alignment.data.lengths import Columns
from alignment.data.report import describe
from alignment.errors import UserError
from alignment.report.alarm import alarm
from alignment.report.callback import write_report
from alignment.report.groups import group_runs
from alignment.report.html import report_comparison, report_run
from alignment.report.runs import Run, read_run
from tests.conftest import ROOT
from tests.reports import Page, history, write_run

EVIL = "<script>alert('x')</script> & $x^{2$ <img src=https://example.org/a.png>"


@pytest.fixture
def folder(tmp_path):
    """Output folder of a finished run."""
    return write_run(tmp_path / "my-run")


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes time, and not all tests look at what is drawn."""
    monkeypatch.setattr("alignment.report.html.draw_all", lambda groups: [])


def test_a_page_with_all_parts_from_the_folder_alone(folder):
    report_run(folder)
    page = Page(folder / "report.html")
    for part in ("my-run", "Finished, 80 s", "Answer 2 before", "Answer 2 after", "global_batch_size", "some-model",
                 "train: 10 of 10 rows kept", "0.700", "+2.00"):  # fmt: skip
        assert part in page.text, part
    assert "Answer 9" in page.text
    assert "Answer 10" not in page.text, "ten prompts are shown"
    assert "Alarm" not in page.text
    drawn = {file.stem for file in (folder / "figures").iterdir()}
    assert drawn == {"rewards", "margin", "ranks", "accuracy", "loss", "entropy", "token_accuracy", "learning_rate",
                     "grad_norm", "speed", "lengths", "sampled_lengths", "scores", "responses"}  # fmt: skip
    assert page.tags.count("svg") == len(drawn)
    # It needs nothing else.
    assert {target[0] for target in page.targets} == {"#"}, "marks of the figures themselves"
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    source = (folder / "report.html").read_text()
    assert not re.search(r"https?://|file://|@import|url\((?!#)", source)
    ids = re.findall(r' id="([^"]*)"', source)
    assert len(ids) == len(set(ids)), "of two figures in one page"
    assert {target[1:] for target in page.targets} <= set(ids)


def test_each_point_says_what_it_is_and_the_start_is_drawn(folder):
    report_run(folder)
    titles = re.findall(r"<title>(.*?)</title>", (folder / "report.html").read_text())
    for point in ("best, held-out, epoch 0: 0", "best, held-out, epoch 1: 0.2", "best, training, epoch 0.5: 0.1",
                  "NCA, held-out, epoch 0: 0.5", "NCA, training, epoch 0: 1.386", "4 responses: 10 rows"):  # fmt: skip
        assert point in titles, point


def test_texts_of_data_and_recipes_are_never_markup(tmp_path):
    folder = write_run(tmp_path / "a&b $x^{2$", model_name_or_path=EVIL, note=EVIL)
    (folder / "samples_before.json").unlink()
    samples = [{"prompt": [{"role": "user", "content": EVIL}], "samples": [EVIL], "scores": [1.0]}]
    (folder / "samples_after.json").write_text(json.dumps(samples))
    report = json.loads((folder / "data_report.json").read_text())
    (folder / "data_report.json").write_text(json.dumps(report | {"warnings": [EVIL], "examples": {"why": [EVIL]}}))
    report_run(folder)
    page = Page(folder / "report.html")
    assert page.text.count(EVIL) == 6, "prompt, answer, warning, example, two keys"
    assert "script" not in page.tags
    other = write_run(tmp_path / "<b>", loss=f"$x^{{2$ {EVIL}")
    report_comparison(group_runs([read_run(folder), read_run(other)]), tmp_path / "both.html")
    assert not {"script", "b"} & set(Page(tmp_path / "both.html").tags)


def test_an_unfinished_run_tells_what_it_has(folder, no_figures):
    for file in folder.glob("*.json"):
        if file.name != "plan.json":
            file.unlink()
    report_run(folder)
    assert "Nothing is logged yet" in Page(folder / "report.html").text
    for step in (4, 10):  # the newest by number, not by name
        (folder / f"checkpoint-{step}").mkdir()
        state = {"log_history": history(steps=step)}
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history(steps=6)}))  # before it went on
    run = report_run(folder)
    assert run.step == 10
    assert "Unfinished: step 10 of 10" in Page(folder / "report.html").text
    assert read_run(folder, history(steps=6)).step == 6, "what is logged and not yet written is told by the caller"


@pytest.mark.parametrize(
    ("rewards", "fires"),
    [
        ([-0.2, -0.1, -0.3, -0.2], True),
        ([0.2, 0.1, 0.3, 0.2], False),
        ([-0.9, 0.8, -0.7, 0.6], False),  # below zero by less than the noise
        ([-0.2], False),  # of one prompt no noise is known
        ([float("nan")] * 4, False),
    ],
)
def test_the_alarm(rewards, fires):
    run = Run("r", {"beta": 0.1, "loss_type": "DPO"}, [], held_out={"step": 7, "rewards/chosen": rewards})
    found = alarm(run)
    assert (found is not None) == fires
    if fires:
        assert "-2 +- 0.41 nats a response" in found.text, "the implicit reward over beta"
        assert "4 held-out prompts, step 7" in found.text
        assert found.is_large, "of an unknown likelihood"


@pytest.mark.parametrize(("logps", "share", "is_large"), [(-52.0, "of 50 a response (4.0 %)", False),
                                                         (-22.0, "of 20 a response (10.0 %)", True)])  # fmt: skip
def test_the_alarm_is_in_proportion(logps, share, is_large):
    lines = [{"step": 7, "epoch": 1, "eval_logps/chosen": logps, "eval_rewards/chosen": -0.2}]
    run = Run(
        "r", {"beta": 0.1, "loss_type": "NCA"}, lines, held_out={"step": 7, "rewards/chosen": [-0.2, -0.21, -0.19]}
    )
    found = alarm(run)
    assert f"-2 +- 0.058 nats {share}" in found.text
    assert found.is_large == is_large


def test_the_alarm_goes_by_the_last_windows_where_nothing_is_held_out():
    recipe = {"beta": 0.1, "loss_type": "NCA"}
    falling = [{"step": s, "epoch": s, "rewards/chosen": 1.0 if s < 6 else -0.1 - 0.001 * s} for s in range(11)]
    assert "the last 5 logged windows of training" in alarm(Run("r", recipe, falling)).text
    rising = [{"step": s, "epoch": s, "rewards/chosen": -1.0 if s < 6 else 0.1 + 0.001 * s} for s in range(11)]
    assert alarm(Run("r", recipe, rising)) is None


def test_the_alarm_is_on_the_page_and_in_the_log(tmp_path, caplog, no_figures):
    folder = write_run(tmp_path / "falling", loss="DPO", best=-0.05)
    write_report(str(folder))
    assert "Alarm" in Page(folder / "report.html").text
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("!!! The likelihood of the best responses is below its start: -5 +- ")


def test_a_failure_to_draw_is_one_warning_line(folder, caplog, monkeypatch):
    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("alignment.report.html.draw_all", fail)
    write_report(str(folder))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "No space left on device" in record.message


def test_speed_is_that_of_each_window():
    lines = [(1, 100, 1.0), (2, 300, 2.0), (3, 350, 0.5), (4, 450, 1.0)]  # the third is the first of another launch
    names = ("epoch", "num_input_tokens_seen", "train_runtime")
    epochs, rates = Run("r", {}, [dict(zip(names, line, strict=True)) for line in lines]).speed()
    assert epochs.tolist() == [1, 2, 4]
    assert rates.tolist() == [100, 200, 200]


def test_speed_is_that_of_training_alone():
    lines = [{"step": s, "epoch": s, "num_input_tokens_seen": 100 * s, "train_runtime": 10.0 * s} for s in (1, 2, 3)]
    lines.insert(1, {"step": 1, "eval_runtime": 5.0})
    assert Run("r", {}, lines).speed()[1].tolist() == [10, 20, 10]


def test_evaluations_of_fewer_prompts_are_a_curve_without_the_one_at_the_end(folder):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"eval_prompts_in_training": 16}))
    results = {"seconds": 1.0, "train": {}, "eval": {"epoch": 1.0, "eval_rewards/chosen": 0.7}}
    (folder / "train_results.json").write_text(json.dumps(results))
    run = report_run(folder)
    assert run.curve("eval_rewards/chosen")[1][-1] == pytest.approx(0.2)
    assert run.last("eval_rewards/chosen") == 0.7
    assert "of the first 16 held-out prompts, the numbers above of all" in Page(folder / "report.html").text


def test_the_evaluation_at_the_end_counts(folder):
    evaluation = {"epoch": 1.2, "eval_loss": 1.1, "eval_rewards/chosen": 0.7}
    results = {"seconds": 1.0, "train": {}, "eval": evaluation}
    (folder / "train_results.json").write_text(json.dumps(results))
    run = read_run(folder)
    assert run.last("eval_rewards/chosen") == 0.7
    assert run.curve("eval_loss")[0].tolist() == [0.2, 0.4, 0.6, 0.8, 1.0, 1.2]


def test_no_figure_of_an_earlier_run_is_left(folder):
    (folder / "figures").mkdir()
    for name in ("best-of-mine", "sampled_lengths"):
        (folder / "figures" / f"{name}.png").touch()
    (folder / "samples_after.json").unlink()
    (folder / "samples_before.json").unlink()
    report_run(folder)
    assert not (folder / "figures" / "sampled_lengths.png").exists()
    assert (folder / "figures" / "best-of-mine.png").exists()


def test_length_by_score_keeps_equal_scores_together():
    def found(scores, lengths):
        columns = Columns(np.array(scores), np.array(lengths), np.array([3]), np.array([len(scores)]), "tokens")
        return describe(columns)["scores"]["length_by_score"]

    assert found([0.5, 1.0, 0.5], [10, 40, 20]) == {"score": [0.5, 1.0], "length": [15, 40]}
    assert found([0.5] * 4, [1, 2, 3, 4]) == {"score": [0.5], "length": [2.5]}
    many = found([*range(50)] + [7] * 50, [*range(50)] + [7] * 50)
    assert 5 < len(many["score"]) <= 10
    assert many["score"] == many["length"]
    assert 7 < many["score"][1] < 8, "all responses of score 7 are in one part"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.yaml", None, "holds no run .no recipe.yaml.; give the output_dir of one"),
        ("recipe.yaml", "loss_type: NCA", "has no beta"),
        ("plan.json", "{", "plan.json: not valid JSON"),
    ],
)
def test_a_folder_that_is_no_run(folder, no_figures, name, content, message):
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        report_run(folder)


def test_the_script(folder, tmp_path, capsys, no_figures, monkeypatch):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
        runpy.run_path(str(ROOT / "alignment-handbook/scripts/report.py"), run_name="__main__")

    run(folder)
    assert (folder / "report.html").exists()
    run(folder, folder, "--output", tmp_path / "c.html")
    assert (tmp_path / "c.html").exists()
    assert "measured on" in capsys.readouterr().out
    for words in ([tmp_path / "nowhere"], [folder, "--output", tmp_path], [], [folder, "--outptu=x"]):
        with pytest.raises(SystemExit) as ended:
            run(*words)
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")


def test_the_loss_at_the_start_is_drawn_where_it_is_known():
    def start(loss, key="loss", **recipe):
        rows = {"k_histogram": {"2": 1, "4": 3}}
        report = rows | {"eval": rows | {"weights": {"mean": 2.0}}}
        return Run("r", {"beta": 0.1, "loss_type": loss} | recipe, [], data_report=report).start(key)

    assert start("NCA") == pytest.approx(2 * math.log(2))
    assert start("InfoNCA") == pytest.approx((math.log(2) + 3 * math.log(4)) / 4)
    assert start("PL") == pytest.approx((math.log(2) + 3 * math.log(24)) / 4)
    assert start("NCA", "eval_loss") is None, "its rows have weights"
    assert start("OAPL") is None
    assert start("NCA", sft_weight=0.1) is None
    assert start("DPO", reference_free=True) is None
    assert start("mine.py:loss") is None
