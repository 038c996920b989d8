"""Figure 2, small: its verdict follows the numbers, whichever way they fall, and no run is run twice."""

import numpy as np
import pytest

from alignment.errors import UserError
from alignment.sweep import running
from alignment.sweep.commands import plan_runs
from alignment.sweep.paired import estimate
from benchmarks.claims import above_zero, claims, verdict
from benchmarks.figure2 import FIGURE2, SETTINGS, arm_of, main, parse_sweep
from tests.reports import faked_run

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
    assert above_zero(paired) == "yes"
    assert above_zero(apart) == "not shown"


def test_seeds_that_differ_widen_the_interval():
    alike, apart = np.full((3, 40), 0.5), np.repeat([[0.0], [0.5], [1.0]], 40, axis=1)
    assert (estimate(alike).low, estimate(alike).high) == (0.5, 0.5)
    assert (estimate(apart).low, estimate(apart).high) == (0.0, 1.0)


@pytest.fixture
def fake_runs(monkeypatch):
    """Runs that write what a run writes, at once: those that were started, and the rewards that they end with."""
    started = []
    #: Implicit rewards of best and others at the end.
    ends = {"DPO": (-0.9, -2.0), "NCA": (0.1, -0.5), "InfoNCA": (-0.9, -2.0)}

    def start(run, shared, environment):
        started.append(run)
        return faked_run(run, *ends[run.arm.resolved["loss_type"]])

    monkeypatch.setattr(running, "start", start)
    return started, ends


def call(tmp_path, *words):
    main([f"--runs={tmp_path}/runs", f"--docs={tmp_path}/docs", "--steps=4", "--jobs=1", *words])


def test_the_page_is_computed_from_the_runs_and_no_run_is_run_twice(tmp_path, fake_runs, capsys):
    started, ends = fake_runs
    call(tmp_path, "--seeds", "1", "2")
    assert len(started) == 8
    assert sorted((run.arm.script, run.arm.resolved["loss_type"]) for run in started[:4]) == [
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
    assert len(started) == 8, "finished runs are taken as they are"
    with pytest.raises(UserError, match="has eval_steps 1.0, not 2: it is a run with other settings"):
        call(tmp_path, "--seeds", "1", "--steps=6")
    ends["DPO"], ends["NCA"] = (0.3, 0.1), (-0.4, -1.5)
    call(tmp_path, "--seeds", "5", "6")
    page = (tmp_path / "docs" / "figure2.md").read_text()
    assert "NOT reproduced in full. Under DPO, the best responses lose likelihood: no. Under NCA, the best" in page


def test_a_sweep_changes_one_key_at_a_time(tmp_path, fake_runs):
    started, _ = fake_runs
    beta = SETTINGS["beta"]
    call(tmp_path, "--seeds", "1", "2", "--sweep", f"beta=0.7,{beta},0.1", "num_responses=2,4,8")
    assert len(started) == 2 * 2 * 5, "Figure 2's own runs are those of its beta, and of all responses"
    recipes = [run.arm.resolved for run in started]
    assert {(recipe["beta"], recipe.get("num_responses")) for recipe in recipes} == {
        (0.7, None), (0.1, None), (float(beta), None), (float(beta), 2), (float(beta), 4),
    }  # fmt: skip
    page = (tmp_path / "docs" / "sweep.md").read_text()
    assert "| beta | 0.1 | 0.7 | NCA | -0.796 [" in page, "of 0.929 nats a seventh is left"
    assert page.count("\n| beta | 0.7 | NCA | +0.133 [") == 1, "its value, in nats"
    assert "| num_responses | 2 | 6 | InfoNCA |" in page, "no row has more than 6"
    assert (tmp_path / "docs" / "figures" / "sweep.png").exists()
    assert not (tmp_path / "docs" / "figure2.md").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gamma=1,2", "unknown key 'gamma'"),
        ("lora_r=1,2", "'lora_r' is none of beta"),
        ("beta=1", "compares nothing"),
        ("beta=a,b", "could not convert"),
    ],
)
def test_sweeps_that_cannot_be(given, message):
    with pytest.raises(UserError, match=message):
        parse_sweep([given])


def test_the_runs_are_those_of_make_train_but_for_what_the_page_says(tmp_path):
    arms = [arm_of(*place, 10) for place in FIGURE2] + [arm_of("rewards", "NCA", 10, {"num_responses": "2"})]
    for arm, run in zip(arms, plan_runs(arms, [7], tmp_path), strict=True):
        assert run.folder == tmp_path / arm.name / "seed-7"
        assert [arm.resolved[key] for key in ("max_steps", "eval_steps", "learning_rate")] == [10, 3, 3e-4]
        assert arm.resolved["eval_strategy"] == ("no" if "num_responses" in arm.name else "steps")
        assert not {"reward_function", "eval_prompts_in_training"} & arm.resolved.keys()
    assert [arm.resolved.get("num_responses") for arm in arms] == [None] * 4 + [2]
