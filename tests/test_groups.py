"""Sets of runs side by side: groups over seeds, their numbers, and figures that stay readable."""

import csv
import re
import runpy
import sys

import numpy as np
import pytest

from alignment.evaluation.length_control import control_length, control_length_interval
from alignment.report.axes import name_lines, new_axes, style
from alignment.report.figures import draw_all, save_all
from alignment.report.groups import group_runs, warnings
from alignment.report.html import report_comparison
from alignment.report.runs import Run, read_run, read_runs
from alignment.report.tables import run_rows, runs_table
from tests.conftest import ROOT
from tests.reports import Page, history, write_run


def test_runs_side_by_side(tmp_path):
    runs = [read_run(write_run(tmp_path / "one")), read_run(write_run(tmp_path / "two", loss="DPO", best=-0.05))]
    groups = group_runs(runs)
    table = runs_table(groups)
    head, *rows = [re.split(r"\s{2,}", line) for line in table.splitlines()]
    cells = [dict(zip(head[1:], row[1:], strict=True)) for row in rows[:2]]
    assert [row[0] for row in rows[:2]] == ["NCA", "DPO"]
    assert [row["accuracy (share)"] for row in cells] == ["0.700", "0.700"]
    assert [row["best (nats)"] for row in cells] == ["+2.00 [+1.93, +2.07]", "-5.00 [-5.07, -4.93]"]
    assert [row["speed (tokens/s)"] for row in cells] == ["200", "200"]
    assert not [name for name in head if "loss" in name], "two losses are no quantity to compare"
    assert "ALARM, DPO: best responses -5 +- " in table
    assert "ALARM, NCA" not in table
    report_comparison(groups, tmp_path / "new" / "page.html")
    page = Page(tmp_path / "new" / "page.html")
    assert page.tags.count("figure") == 10
    assert "Alarm, DPO" in page.text
    assert "loss_type" in page.text, "what differs in the recipes"
    assert "some-model" not in page.text.partition("What differs")[2], "and nothing else of them"


def seeds(folder, losses=("NCA", "DPO"), num_seeds=3, **recipe):
    """Runs of each loss and seed."""
    rng = np.random.default_rng(0)
    return [
        read_run(write_run(folder / f"{loss}-seed{seed}", loss, 0.02 + 0.01 * rng.random(), seed=seed,
                           output_dir=f"runs/{loss}-{seed}", **recipe))
        for loss in losses for seed in range(num_seeds)
    ]  # fmt: skip


def test_runs_that_differ_in_their_seed_are_one_group(tmp_path):
    groups = group_runs(seeds(tmp_path))
    assert [(group.name, len(group.runs)) for group in groups] == [("NCA", 3), ("DPO", 3)]
    means = np.array([run.of_prompts("rewards/chosen").mean() / 0.1 for run in groups[0].runs])
    found = groups[0].estimate("best (nats)")
    assert found.mean == pytest.approx(means.mean())
    assert found.high - found.mean == pytest.approx(4.303 * means.std(ddof=1) / np.sqrt(3)), "Student's t, two degrees"
    epochs, values = groups[0].curve("eval_rewards/chosen")
    assert epochs.tolist() == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert values.shape == (3, 6)
    report_comparison(groups, tmp_path / "page.html")
    assert "over 3 runs" in (tmp_path / "page.html").read_text()
    groups[0].runs[0].history = [line for line in groups[0].runs[0].history if line["step"] <= 4]
    assert groups[0].curve("loss")[0].tolist() == [0, 0.1, 0.2, 0.3, 0.4], "what all runs have"


def test_the_score_against_the_divergence(tmp_path):
    runs = seeds(tmp_path, num_seeds=2)
    assert "frontier" not in [figure.name for figure in draw_all(group_runs(runs))], "of samples without log-ratios"
    assert "KL (nats)" not in runs_table(group_runs(runs))
    for i, run in enumerate(runs):  # NCA's two seeds, and DPO's
        kl, score = [(1.0, 0.7), (2.0, 0.8), (5.0, 0.6), (7.0, 0.6)][i]
        run.after = [row | {"logratios": [kl - 0.5, kl + 0.5], "scores": [score] * 2, "samples": ["a b"] * 2}
                     for row in run.after]  # fmt: skip
    groups = group_runs(runs)
    kls, scores = ([group.estimate(name) for group in groups] for name in ("KL (nats)", "held-out score"))
    assert [kl.mean for kl in kls] == pytest.approx([1.5, 6.0])
    assert kls[0].high - 1.5 == pytest.approx(12.706 * 0.5), "Student's t over the seeds: one degree of freedom"
    figure = next(figure for figure in draw_all(groups) if figure.name == "frontier")
    points = {line.get_label(): line.get_xydata()[0] for line in figure.axes.lines if len(line.get_xdata()) == 1}
    assert points["start"] == pytest.approx([0.0, 0.5])
    assert points["NCA"] == pytest.approx([1.5, 0.75])
    assert points["DPO"] == pytest.approx([6.0, 0.6])
    bars = [
        segment for bar in figure.axes.collections if hasattr(bar, "get_segments") for segment in bar.get_segments()
    ]
    assert any(bar == pytest.approx(np.array([[kls[0].low, 0.75], [kls[0].high, 0.75]])) for bar in bars)
    assert any(bar == pytest.approx(np.array([[1.5, scores[0].low], [1.5, scores[0].high]])) for bar in bars)
    report_comparison(groups, tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text()
    for said in ("<title>start: score 0.500", "<title>NCA, a run: score 0.800, KL 2.00", "<title>DPO: score 0.600 ["):
        assert said in source, said
    single = groups[0].runs[:1]
    assert group_runs(single)[0].estimate("KL (nats)") == pytest.approx((1.0, 1.0, 1.0)), "over prompts, all alike"


def test_the_gain_at_one_length_of_a_run_has_the_interval_of_its_regression(tmp_path):
    (run,) = seeds(tmp_path, losses=("NCA",), num_seeds=1)
    for when, fewer in (("before", 0), ("after", 3)):
        rows = []
        for i, row in enumerate(run.before):
            words = [6 + i % 3 - fewer, 4 + i % 2 - fewer]
            scores = [1 - 0.01 * (i % 7) * n + 0.01 * i * bool(fewer) for n in words]
            rows.append(row | {"samples": ["w " * n for n in words], "scores": scores})
        setattr(run, when, rows)
    (group,) = group_runs([run])
    found = group.estimate("gain at the start's length")
    assert found.mean == pytest.approx(control_length(run.before, run.after).mean())
    assert found[1:] == pytest.approx(control_length_interval(run.before, run.after))
    assert found.mean < group.estimate("gain in score").mean - 0.05, "shorter answers score higher"


def test_names_of_groups_are_what_differs(tmp_path):
    def names(**keys):
        recipes = [
            {"loss_type": "NCA", "seed": i, **{key: values[i] for key, values in keys.items()}} for i in range(3)
        ]
        runs = [Run(f"sweep/{i}", {"beta": 0.1} | recipe, []) for i, recipe in enumerate(recipes)]
        return [group.name for group in group_runs(runs)]

    assert names() == ["NCA"]
    assert names(learning_rate=[1, 2, 3]) == ["learning_rate 1", "learning_rate 2", "learning_rate 3"]
    assert names(loss_type=["NCA", "NCA", "DPO"], alpha=[1, 2, 2]) == ["NCA, alpha 1", "NCA, alpha 2", "DPO, alpha 2"]
    assert names(a=[1, 2, 2], b=[1, 2, 3], c=[1, 2, 3]) == ["sweep/0", "sweep/1", "sweep/2"]


def test_twenty_groups_stay_readable(tmp_path):
    looks = [style(i) for i in range(20)]
    assert len(set(looks)) == 20
    runs = [Run(f"a-name-of-a-run-that-is-long-{i}", {"beta": 0.1, "loss_type": "NCA", "lr": i}, history()[:6])
            for i in range(20)]  # fmt: skip
    groups = group_runs(runs)
    drawn = {figure.name: figure.axes for figure in draw_all(groups)}
    low, high = drawn["accuracy"].get_ylim()
    assert 0 <= low < high <= 1, "names and margins never push an axis out of its range"
    assert not drawn["margin"].texts, "no names at the ends"
    report_comparison(groups, tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text()
    assert all(f"</svg>lr {i}</th>" in source and f"</svg>lr {i}</li>" in source for i in range(20)), "table and legend"
    (drawn, *_) = draw_all(groups)
    save_all([drawn], tmp_path, [group.name for group in groups], "svg")
    names = [text.get_text() for text in drawn.axes.get_legend().get_texts()]
    assert names == [f"lr {i}" for i in range(20)], "a file stands alone"


def test_names_at_the_ends_of_lines_stay_inside_and_apart():
    axes = new_axes()
    axes.plot([0, 1], [0, 1])
    axes.set_ylim(0, 1)
    name_lines(axes, [(1, 0.99, f"name {i}", "#000000") for i in range(6)])
    places = sorted(text.xy[1] for text in axes.texts)
    assert axes.get_ylim() == (0, 1)
    assert places[-1] <= 1
    assert min(np.diff(places)) > 0.07


def test_a_group_has_one_line_of_alarm(tmp_path):
    groups = group_runs(seeds(tmp_path, losses=("DPO",)))
    for run, best in zip(groups[0].runs, (-0.3, 0.2, -0.5), strict=True):
        run.held_out["rewards/chosen"] = [best, best + 0.01]
    lines = [line for line in runs_table(groups).splitlines() if line.startswith("ALARM")]
    assert lines == ["ALARM, DPO: best responses at worst -4.95 +- 0.05 nats a response, in 2 of 3 runs"]


def test_other_held_out_rows_are_warned_of(tmp_path):
    runs = seeds(tmp_path, num_seeds=1)
    for run, mean in zip(runs, (0.5, 0.5), strict=True):
        run.data_report = run.data_report | {"eval": {"rows_kept": 55, "k_histogram": {"4": 9, "6": 2},
                                                      "scores": {"mean": mean}}}  # fmt: skip
    assert warnings(group_runs(runs)) == []
    runs[1].data_report["eval"]["k_histogram"] = {"2": 11}
    (warning,) = warnings(group_runs(runs))
    assert "55 prompts, K 4-6 (NCA); 55 prompts, K 2 (DPO)" in warning
    assert "numbers cannot be compared" in warning
    assert warning in runs_table(group_runs(runs))
    for run, start in zip(runs, (-36.6, -36.65), strict=True):
        run.history[-1] |= {"eval_logps/chosen": start + run.gained_by_best(run.last, "eval_")}
    (warning,) = warnings(group_runs(runs))
    assert "K 2 (DPO). Accuracy, margin and loss cannot be compared" in warning, "the best ones are the same"
    runs[1].history[-1]["eval_logps/chosen"] -= 1
    assert "numbers cannot be compared" in warnings(group_runs(runs))[0]


def test_figures_and_numbers_for_a_paper(tmp_path, capsys, monkeypatch):
    seeds(tmp_path)
    folders = [*map(str, sorted(tmp_path.glob("*seed*")))]
    monkeypatch.setattr(sys, "argv", ["report.py", *folders, "--figures", str(tmp_path / "f"), "--format", "pdf"])
    runpy.run_path(str(ROOT / "alignment-handbook/scripts/report.py"), run_name="__main__")
    assert (tmp_path / "f" / "margin.pdf").read_bytes().startswith(b"%PDF")
    with open(tmp_path / "f" / "numbers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 10
    assert rows[1]["run"], rows[1]["step"] == ("DPO-seed0", "2")
    assert float(rows[1]["eval_rewards/margins"]) == pytest.approx(0.06)
    with open(tmp_path / "f" / "groups.csv", newline="") as file:
        numbers = {(row["group"], row["number"]): row for row in csv.DictReader(file)}
    assert float(numbers["NCA", "accuracy (share)"]["mean"]) == pytest.approx(0.7)
    assert numbers["NCA", "best (nats)"]["runs"] == "3"


def test_runs_in_folders_of_the_same_name_are_told_apart(tmp_path):
    folders = [tmp_path / path for path in ("a/nca/seed-1", "a/dpo/seed-1", "b/nca/seed-1", "a/nca/seed-2")]
    for folder in folders:
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_run(folder)
    assert [run.name for run in read_runs(folders)] == ["a/nca/seed-1", "dpo/seed-1", "b/nca/seed-1", "seed-2"]
    assert {run.name for run in read_runs([folders[0]] * 2)} == {"/".join(folders[0].parts[1:])}


def test_figures_of_runs_without_evaluations_and_ragged_ranks(tmp_path):
    runs = [Run(name, {"beta": 0.1, "loss_type": "NCA"}, history()[:2]) for name in ("a", "b")]
    runs[1].history[0] = runs[1].history[0] | {"rewards/rank_2": -0.5}
    runs[1].recipe["alpha"] = 0.2
    assert len(draw_all(group_runs(runs))) == 11
    assert run_rows(Run("a", {"beta": 0.1}, history()[:1]))[0] == ("measured on", "", "training")
    assert draw_all(group_runs([Run("c", {"beta": 0.1}, [])])) == []
