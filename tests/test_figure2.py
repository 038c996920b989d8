"""Figure 2, small: its verdict follows the numbers, whichever way they fall, and no run is run twice."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from alignment.errors import UserError
from benchmarks import figure2
from benchmarks.claims import claims, estimate, verdict
from benchmarks.figure2 import FIGURE2, SETTINGS, Arm, command_of, finish, main, parse_sweep, settings_of
from tests.conftest import ROOT

SEEDS, PROMPTS = 3, 40


def rewards(mean, noise=0.3, seed=0):
    """Of each held-out prompt after each run: shape (S, P)."""
    return mean + noise * np.random.default_rng(seed).standard_normal((SEEDS, PROMPTS))


def answers(dpo, nca, dpo_margin, nca_margin, noise=0.3):
    best = {"DPO": rewards(dpo, noise, 1), "NCA": rewards(nca, noise, 2)}
    found = claims(best, {"DPO": rewards(dpo_margin, noise, 3), "NCA": rewards(nca_margin, noise, 4)}, "DPO")
    return [claim.answer for claim in found], verdict(found)


def test_the_papers_figure_is_reproduced():
    assert answers(-0.9, 0.05, 1.1, 0.6) == (["yes"] * 4, "Reproduced: each claim holds.")


def test_what_does_not_reproduce_is_said():
    found, said = answers(-0.9, -0.5, 0.6, 1.1)
    assert found == ["yes", "no", "yes", "no"]
    assert said == (
        "NOT reproduced in full. Under NCA, the best responses do not lose likelihood: no. "
        "The margin is larger under DPO than under NCA: no."
    )
    assert answers(0.5, 0.6, 1.1, 0.6)[0][0] == "no", "DPO's best responses gain"


def test_what_the_noise_hides_is_not_shown():
    found, said = answers(-0.02, -0.02, 0.6, 0.6, noise=1.0)
    assert found == ["not shown", "yes", "not shown", "not shown"]
    assert said.startswith("NOT reproduced in full")


def test_pairing_by_seed_and_prompt_narrows_the_interval():
    common = rewards(0.0, noise=5.0)
    paired = estimate((common + rewards(0.1, 0.01, 5)) - common)
    apart = estimate(rewards(0.1, 5.0, 6) - common)
    assert paired.is_positive == "yes"
    assert apart.is_positive == "not shown"


def test_seeds_that_differ_widen_the_interval():
    alike, apart = np.full((3, 40), 0.5), np.repeat([[0.0], [0.5], [1.0]], 40, axis=1)
    assert (estimate(alike).low, estimate(alike).high) == (0.5, 0.5)
    assert (estimate(apart).low, estimate(apart).high) == (0.0, 1.0)


@pytest.fixture
def fake_runs(monkeypatch, tmp_path):
    """Runs that write what a run writes, at once; the commands that were called."""
    calls, threads = [], []
    #: Implicit rewards of best and others at the end.
    ends = {"DPO": (-0.9, -2.0), "NCA": (0.1, -0.5), "InfoNCA": (-0.9, -2.0)}

    def run(command, cwd, env, stdout, stderr):
        flags = dict(word[2:].split("=", 1) for word in command[3:])
        calls.append((command[1], flags))
        threads.append(env["OMP_NUM_THREADS"])
        folder = Path(flags["output_dir"])
        keys = ("loss_type", "beta", "alpha", "seed", "max_steps", "learning_rate", "train_file")
        given = {key: yaml.safe_load(flags[key]) for key in keys if key in flags}
        given["learning_rate"] = float(flags["learning_rate"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(given))
        rng = np.random.default_rng(int(flags["seed"]))
        best, rest = (end + 0.1 * rng.standard_normal(30) for end in ends[flags["loss_type"]])
        lines = [{"step": step, "epoch": step / 10, "eval_loss": 1.0, "eval_rewards/chosen": best.mean() * step / 4,
                  "eval_rewards/rejected": rest.mean() * step / 4, "eval_rewards/margins": (best - rest).mean()}
                 for step in (2, 4)]  # fmt: skip
        held_out = {"step": 4, "rewards/chosen": best.tolist(), "rewards/rejected": rest.tolist(),
                    "rewards/accuracies": [0.75] * 30}  # fmt: skip
        files = {"trainer_state.json": {"log_history": lines}, "held_out.json": held_out,
                 "train_results.json": {"seconds": 60.0}}  # fmt: skip
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(figure2.subprocess, "run", run)
    return calls, ends, threads


def call(tmp_path, *words):
    main([f"--runs={tmp_path}/runs", f"--docs={tmp_path}/docs", "--steps=4", "--jobs=1", *words])


def test_the_page_is_computed_from_the_runs_and_no_run_is_run_twice(tmp_path, fake_runs, capsys):
    calls, ends, _ = fake_runs
    call(tmp_path, "--seeds", "1", "2")
    assert len(calls) == 8
    assert sorted((script, flags["loss_type"]) for script, flags in calls[:4]) == [
        ("run_preference.py", "DPO"), ("run_preference.py", "NCA"),
        ("run_reward.py", "InfoNCA"), ("run_reward.py", "NCA"),
    ]  # fmt: skip
    page = (tmp_path / "docs" / "figure2.md").read_text()
    assert page.count("**Reproduced: each claim holds.**") == 2
    assert "8 runs of 1.0 minutes by their own clocks, 1 at a time" in page
    assert "seeds 1, 2; 30 held-out prompts" in page
    assert f"--runs={tmp_path}/runs" in page, "the command"
    assert "| pairs | NCA | +0.093 [" in page
    assert (tmp_path / "docs" / "figures" / "figure2.png").read_bytes()[1:4] == b"PNG"
    assert "8 of 8: rewards-NCA, seed 2: best +0.092" in capsys.readouterr().out
    call(tmp_path, "--seeds", "1", "2")
    assert len(calls) == 8, "finished runs are taken as they are"
    ends["DPO"], ends["NCA"] = (0.3, 0.1), (-0.4, -1.5)
    call(tmp_path, "--seeds", "5", "6")
    page = (tmp_path / "docs" / "figure2.md").read_text()
    assert "NOT reproduced in full. Under DPO, the best responses lose likelihood: no. Under NCA, the best" in page


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path, fake_runs):
    call(tmp_path, "--seeds", "1")
    with pytest.raises(UserError, match="has max_steps 4, not 6; name another folder by --runs"):
        call(tmp_path, "--seeds", "1", "--steps=6")


def test_a_run_that_fails_says_why(tmp_path, monkeypatch):
    def fail(command, cwd, env, stdout, stderr):
        stdout.write("error: it broke\n")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(figure2.subprocess, "run", fail)
    with pytest.raises(UserError, match="pairs-DPO, seed 1: ended with code 1 .*error: it broke"):
        finish(FIGURE2[0], 1, 4, tmp_path, num_threads=1)


def test_runs_at_a_time_share_the_cores_and_none_follows_one_that_failed(tmp_path, fake_runs, monkeypatch):
    calls, _, threads = fake_runs
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(figure2.os, "cpu_count", lambda: 7)
    call(tmp_path, "--seeds", "1", "2", "--jobs=3")
    assert len(calls) == 8 and set(threads) == {"2"}
    page = (tmp_path / "docs" / "figure2.md").read_text()
    assert "| pairs | NCA | +0.093 [" in page, "each run is where it belongs, whichever ended first"
    gone = tmp_path / "runs" / "pairs-DPO" / "seed-1" / "train_results.json"
    gone.unlink()
    monkeypatch.setattr(figure2.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(UserError, match="pairs-DPO, seed 1: ended with code 1"):
        call(tmp_path, "--seeds", "1", "3")
    assert not (tmp_path / "runs" / "rewards-NCA" / "seed-3").exists()


def test_a_sweep_changes_one_key_at_a_time(tmp_path, fake_runs):
    calls, *_ = fake_runs
    beta = str(SETTINGS["beta"])
    call(tmp_path, "--seeds", "1", "2", "--sweep", f"beta=0.7,{beta},0.1", "num_responses=2,4,8")
    assert len(calls) == 2 * 2 * 5, "Figure 2's own runs are those of its beta, and of all responses"
    assert {(flags["beta"], flags.get("train_file", "").rpartition("/")[2]) for _, flags in calls} == {
        ("0.7", ""), ("0.1", ""), (beta, ""), (beta, "train_2.jsonl"), (beta, "train_4.jsonl"),
    }  # fmt: skip
    assert not any("num_responses" in flags for _, flags in calls), "it would cut the held-out rows too"
    row = (tmp_path / "runs" / "train_2.jsonl").read_text().splitlines()[0]
    assert len(json.loads(row)["responses"]) == 2
    page = (tmp_path / "docs" / "sweep.md").read_text()
    assert "| beta | 0.1 | 0.7 | NCA | -0.796 [" in page, "of 0.929 nats a seventh is left"
    assert page.count("\n| beta | 0.7 | NCA | +0.133 [") == 1, "its value, in nats"
    assert "| num_responses | 2 | 6 | InfoNCA |" in page, "no row has more than 6"
    assert (tmp_path / "docs" / "figures" / "sweep.png").exists()
    assert not (tmp_path / "docs" / "figure2.md").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gamma=1,2", "'gamma' is none of beta"),
        ("beta=1", "compares nothing"),
        ("beta=a,b", "could not convert"),
        ("num_responses=1,2", "a row has at least 2 responses, not 1"),
    ],
)
def test_sweeps_that_cannot_be(given, message):
    with pytest.raises(UserError, match=message):
        parse_sweep([given])


def test_the_commands_parse():
    from alignment.data.load import DataConfig
    from alignment.models import PolicyConfig
    from alignment.recipe import RunConfig
    from alignment.recipe.parse import parse_recipe
    from nca_trainer import NCAConfig

    for arm in [*FIGURE2, Arm("rewards", "NCA", (("num_responses", 2),))]:
        command = command_of(arm, settings_of(arm, 7, 10, ROOT / "runs"), ROOT / "runs/x", ROOT / "runs")
        recipe, flags = str(ROOT / command[2]), command[3:]
        data, _, run, args = parse_recipe([recipe, *flags], [DataConfig, PolicyConfig, RunConfig, NCAConfig])
        assert (args.loss_type, args.seed, args.max_steps, args.eval_steps) == (arm.loss, 7, 10, 3)
        assert args.eval_strategy == ("no" if arm.changed else "steps")
        assert run.reward_function is None
        assert data.num_responses is None
        assert args.resume_from_checkpoint == "true"
