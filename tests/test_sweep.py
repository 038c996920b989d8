"""Sweeps: which arms they have, that no run is run twice, and what they say of them."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from alignment.errors import UserError
from alignment.report.groups import Group
from alignment.report.runs import Run
from alignment.sweep import running
from alignment.sweep.arms import make_arms
from alignment.sweep.commands import plan_runs
from alignment.sweep.paired import about_differences, difference, difference_rows, estimate
from tests.conftest import ROOT
from tests.reports import Ended, faked_run
from tests.scripts import script
from tests.trainers import reward_rows


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model) -> Path:
    """Path of a recipe of two short steps, with a reward function."""
    folder = tmp_path_factory.mktemp("sweep")
    for name, n in (("train", 8), ("eval", 4)):
        rows = [dict(row) for row in reward_rows(n)]
        for i, row in enumerate(rows):
            row["prompt"] = f"{name} {i}"
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "score.py").write_text(
        "def words(prompts, completions, **columns):\n    return [len(c[0]['content'].split()) for c in completions]\n"
    )
    settings = {
        "model_name_or_path": tiny_model, "train_file": f"{folder}/train.jsonl", "eval_file": f"{folder}/eval.jsonl",
        "use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj"], "loss_type": "NCA", "beta": 0.1, "alpha": 0.2,
        "learning_rate": 1e-2, "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4, "seed": 5,
        "save_strategy": "steps", "save_steps": 1, "gradient_checkpointing": False, "report_to": "none",
        "disable_tqdm": True, "reward_function": f"{folder}/score.py:words", "max_new_tokens": 4, "use_cpu": True,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def fake_runs(monkeypatch):
    """Runs that are at their end at once: those that were started, and what their processes end with, by seed."""
    started, codes = [], {}

    def start(run, shared, environment):
        started.append((run.name, environment))
        if run.seed not in codes:
            return faked_run(run, 0.1, -0.1)
        run.folder.mkdir(parents=True)
        (run.folder / running.LOG).write_text("Loss: NCA\nerror: it broke\n")
        return Ended(codes[run.seed])

    monkeypatch.setattr(running, "start", start)
    return started, codes


def sweep(monkeypatch, capsys, recipe, *words):
    """Exit code, and what is printed."""
    code = script(monkeypatch, "sweep.py", recipe, *words)
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_two_arms_are_run_and_compared(recipe, tmp_path, monkeypatch, capsys, forked_python):
    monkeypatch.setattr(sys, "executable", forked_python)
    words = ["--set", "loss_type=NCA,dpo", "--output_dir", tmp_path / "out", "--jobs", 2]
    assert script(monkeypatch, "sweep.py", recipe, *words) == 0
    printed = capsys.readouterr().out
    assert "dpo: run_preference.py --make_pairs=best_worst\n2 runs, 2 at a time" in printed
    assert "2 of 2  " in printed and "held-out score" in printed
    assert (tmp_path / "out" / "sweep.html").exists()
    assert len(list((tmp_path / "out" / "samples_before").glob("*.json"))) == 1, "drawn once for both"
    assert len(list((tmp_path / "out" / "ref_logps").glob("*.jsonl"))) == 4, "of all responses, and of pairs"
    recipes = {arm: yaml.safe_load((tmp_path / "out" / arm / "seed-5" / "recipe.yaml").read_text())
               for arm in ("NCA", "dpo")}  # fmt: skip
    assert recipes["dpo"]["make_pairs"] == "best_worst" and recipes["dpo"]["loss_type"] == "DPO"
    assert "make_pairs" not in recipes["NCA"]
    monkeypatch.setattr(running.subprocess, "Popen", None)  # nothing is started
    assert script(monkeypatch, "sweep.py", recipe, *words) == 0
    capsys.readouterr()
    assert script(monkeypatch, "sweep.py", recipe, *words, "--set", "learning_rate=0.5") == 2
    assert "has learning_rate 0.01, not 0.5: it is a run with other settings" in capsys.readouterr().err


def test_combinations_and_listed_arms_are_named_by_what_differs(recipe):
    arms = make_arms(str(recipe), ["loss_type=NCA,DPO", "beta=0.1,0.5", "max_steps=3"])
    assert [arm.name for arm in arms] == ["NCA-beta=0.1", "NCA-beta=0.5", "DPO-beta=0.1", "DPO-beta=0.5"]
    assert {arm.resolved["max_steps"] for arm in arms} == {3}
    assert [arm.resolved["beta"] for arm in arms] == [0.1, 0.5] * 2
    listed = [["loss_type=NCA", "learning_rate=1e-3"], ["loss_type=InfoNCA", "beta=0.5"], ["make_pairs=best_random"]]
    arms = make_arms(str(recipe), ["num_responses=2,3"], listed)
    assert [(arm.name, arm.runs_as) for arm in arms] == [
        ("NCA-learning_rate=1e-3-num_responses=2", "run_reward.py"),
        ("NCA-learning_rate=1e-3-num_responses=3", "run_reward.py"),
        ("InfoNCA-beta=0.5-num_responses=2", "run_reward.py"),
        ("InfoNCA-beta=0.5-num_responses=3", "run_reward.py"),
        ("make_pairs=best_random-num_responses=2", "run_preference.py --make_pairs=best_random"),
        ("make_pairs=best_random-num_responses=3", "run_preference.py --make_pairs=best_random"),
    ]
    assert arms[0].resolved["learning_rate"] == 1e-3 and arms[2].resolved["learning_rate"] == 1e-2
    (alone,) = make_arms(str(recipe), ["lora_target_modules=[q_proj, k_proj]"])
    assert alone.resolved["lora_target_modules"] == ["q_proj", "k_proj"]
    (one,) = make_arms(str(recipe), [], script="run_preference.py")
    assert (one.name, one.script, "make_pairs" in one.resolved) == ("recipe", "run_preference.py", False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "betta=1,2"], "--set: unknown key 'betta'; did you mean 'beta'?"),
        (["--set", "beta"], "--set: 'beta' is no key=value; write --set beta=0.1,0.5"),
        (["--set", "beta=x,1"], "--beta=x: invalid float value: 'x'"),
        (["--set", "beta=-1"], "--beta=-1: must be > 0"),
        (["--set", "loss_type=NCE"], "NCE"),
        (["--set", "seed=1,2"], "--set: seed is set by the sweep itself"),
        (["--set", "beta=1", "beta=2"], "--set: beta stands twice"),
        (["--set", "plan=true"], "--set: plan asks for no run"),
        (["--set", "loss_type=NCA,nca"], "two arms are the same: NCA and nca"),
        (["--set", "beta=0.1,0.10"], "two arms are the same: beta=0.1 and beta=0.10"),
        (["--arm", "beta=0.1,0.2"], "--arm: beta has 2 values"),
        (["--arm", "beta=0.1", "--set", "beta=0.2"], "--arm: beta is in --set too"),
        (["--set", "beta=0.1,0.2", "--baseline", "beta=0.3"], "there is no arm 'beta=0.3'; did you mean 'beta=0."),
        (["--seeds", "0"], "--seeds, --jobs: must be at least 1"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_runs(
    recipe, tmp_path, monkeypatch, capsys, fake_runs, words, message
):
    code, printed = sweep(monkeypatch, capsys, recipe, *words, "--output_dir", tmp_path)
    assert code == 2 and message in printed
    assert not fake_runs[0] and not list(tmp_path.iterdir())


def test_finished_runs_stay_and_others_are_added(recipe, tmp_path, monkeypatch, capsys, fake_runs):
    started, _ = fake_runs
    words = ["--set", "beta=0.1,0.2", "--output_dir", tmp_path, "--jobs", 2]
    assert sweep(monkeypatch, capsys, recipe, *words, "--seeds", 2)[0] == 0
    names = ["beta=0.1, seed 5", "beta=0.2, seed 5", "beta=0.1, seed 6", "beta=0.2, seed 6"]
    assert [name for name, _ in started] == names, "a whole seed before the next one"
    code, printed = sweep(monkeypatch, capsys, recipe, *words, "--seeds", 3, "--baseline", "beta=0.2")
    assert [name for name, _ in started[4:]] == ["beta=0.1, seed 7", "beta=0.2, seed 7"]
    assert "6 of 6  beta=0.2, seed 7  accuracy (share) 0.750  best (nats) +" in printed
    assert "Differences from beta=0.2  best (nats)" in printed and "draws the 3 seeds and the prompts" in " ".join(
        printed.split()
    )
    page = (tmp_path / "sweep.html").read_text()
    assert "<h2>Differences from beta=0.2</h2>" in page
    recipe_file = tmp_path / "beta=0.1" / "seed-5" / "recipe.yaml"
    recipe_file.write_text(recipe_file.read_text().replace("alpha: 0.2", "alpha: 0.3"))
    code, printed = sweep(monkeypatch, capsys, recipe, *words)
    assert code == 2 and "seed-5: has alpha 0.3, not 0.2: it is a run with other settings" in printed
    recipe_file.with_name("environment.json").write_text(json.dumps({"command": "python run_preference.py x"}))
    recipe_file.write_text(recipe_file.read_text().replace("alpha: 0.3", "alpha: 0.2"))
    assert "seed-5: is not a run of run_reward.py" in sweep(monkeypatch, capsys, recipe, *words)[1]


def test_the_commands_resume_and_share_what_they_can(recipe, tmp_path, monkeypatch, capsys, fake_runs):
    words = ["--set", "beta=0.1,0.2", "--output_dir", tmp_path / "out", "--seeds", 2, "--dry_run"]
    code, printed = sweep(monkeypatch, capsys, recipe, *words)
    commands = [shlex.split(line) for line in printed.splitlines()]
    assert code == 0 and len(commands) == 4 and not fake_runs[0] and not (tmp_path / "out").exists()
    assert commands[3][:3] == [sys.executable, str(ROOT / "run_reward.py"), str(recipe)]
    shared = [f"--ref_logps_dir={tmp_path}/out/ref_logps", f"--samples_before_dir={tmp_path}/out/samples_before"]
    own = ["--beta=0.2", "--seed=6", f"--output_dir={tmp_path}/out/beta=0.2/seed-6", "--resume_from_checkpoint=true"]
    assert {*shared, *own, "--precompute_ref_log_probs=true"} < {*commands[3]}


def test_a_key_that_was_given_then_and_is_not_now_is_another_setting(recipe, tmp_path, fake_runs):
    with_it, without = (make_arms(str(recipe), words)[0] for words in (["warmup_steps=3"], []))
    (run,) = plan_runs([with_it], [5], tmp_path)
    faked_run(run, 0, 0)
    (run.folder / "environment.json").write_text(json.dumps({"given": sorted(with_it.given)}))
    renamed = [dataclasses.replace(arm, name=with_it.name) for arm in (with_it, without)]
    plan_runs(renamed[:1], [5], tmp_path)
    with pytest.raises(UserError, match="has warmup_steps 3.*, not 0"):
        plan_runs(renamed[1:], [5], tmp_path)


def test_a_run_that_fails_is_named_and_no_other_is_started(recipe, tmp_path, monkeypatch, capsys, fake_runs):
    started, codes = fake_runs
    codes[6] = 1
    words = ["--set", "beta=0.1,0.2", "--output_dir", tmp_path, "--jobs", 1, "--seeds", 3]
    code, printed = sweep(monkeypatch, capsys, recipe, *words)
    log = tmp_path / "beta=0.1" / "seed-6" / "log.txt"
    assert code == 2 and f"error: beta=0.1, seed 6: ended with code 1 ({log}): error: it broke" in printed
    assert [name for name, _ in started] == ["beta=0.1, seed 5", "beta=0.2, seed 5", "beta=0.1, seed 6"]
    assert "2 of 6  beta=0.2, seed 5" in printed


def planned_runs(recipe, folder, *seeds):
    return plan_runs(make_arms(str(recipe), []), seeds, folder)


@pytest.fixture
def slow_runs(monkeypatch):
    """Runs that take a minute, if nothing ends them."""
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, lambda *_: print('saved') or exit()); "
        "print('on', flush=True); time.sleep(60)"
    )
    monkeypatch.setattr(running, "command", lambda run, shared: [sys.executable, "-c", code])


def test_what_ends_a_sweep_ends_its_runs(recipe, tmp_path, monkeypatch, slow_runs):
    runs, place = planned_runs(recipe, tmp_path, 1, 2, 3), [{}, {}]
    logs = [run.folder / running.LOG for run in runs[:2]]

    def interrupt(seconds):
        if all(log.exists() and log.read_text() == "on\n" for log in logs):
            raise KeyboardInterrupt

    monkeypatch.setattr(running, "time", SimpleNamespace(sleep=interrupt))  # not that of subprocess
    with pytest.raises(KeyboardInterrupt):
        list(running.finish_all(runs, tmp_path, place))
    assert [log.read_text() for log in logs] == ["on\nsaved\n"] * 2
    assert not runs[2].folder.exists()


def test_a_run_is_at_work_once(recipe, tmp_path, slow_runs):
    (run,) = planned_runs(recipe, tmp_path, 1)
    process = running.start(run, tmp_path, {})
    with pytest.raises(UserError, match="seed-1: another process is at work there"):
        list(running.finish_all([run], tmp_path, [{}]))
    running.end([running.Started(run, process, 0)])
    process = running.start(run, tmp_path, {})  # which has let go of it
    process.kill()
    process.wait()


def test_processes_share_the_cores_or_have_a_gpu_each(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(running.os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(running.psutil, "virtual_memory", lambda: SimpleNamespace(available=20e9))
    (tmp_path / "model.safetensors").write_bytes(b"0" * 400)
    monkeypatch.setattr(running, "_TIMES_WEIGHTS", 5e6)  # so that these are 0.4 GB
    assert running.environments_of(None, str(tmp_path), True) == [{"OMP_NUM_THREADS": "1"}] * 5, "20 / (2 + 5 * 0.4)"
    assert running.environments_of(2, str(tmp_path), True) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert running.environments_of(None, "org/model", True) == [{"OMP_NUM_THREADS": "8"}], "of an unknown size"
    monkeypatch.setattr(running.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(running.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus = [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert running.environments_of(None, "org/model", False) == gpus
    assert running.environments_of(3, "org/model", False) == [*gpus, gpus[0]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert running.environments_of(None, "org/model", False) == [{"CUDA_VISIBLE_DEVICES": "5"}]


def test_differences_are_paired_by_seed_and_prompt():
    common = np.random.default_rng(0).standard_normal((2, 40)) * 5  # of a seed and prompt, whatever the arm
    arms = [group(name, common + shift) for name, shift in (("a", 0.0), ("b", 0.1))]
    found = difference(arms[1], arms[0], "best (nats)")
    assert found.text(".3f") == "1.000 [1.000, 1.000]", "0.1 of a reward at beta 0.1"
    apart = difference(arms[1], group("c", common[:, ::-1]), "best (nats)")
    assert apart.high - apart.low > 10
    head, row = difference_rows(arms, arms[0])
    assert (head, row) == (["", "best (nats)"], ["b", "+1.00 [+1.00, +1.00]"])
    assert difference_rows([arms[0], group("d", common[:, :7])], arms[0]) == [], "other prompts"
    assert difference(group("e", common[:1]), arms[0], "best (nats)").text(".1f") == "0.0 [0.0, 0.0]"
    assert "another seed may give another difference" in about_differences(group("e", common[:1]))


@pytest.mark.parametrize(("num_seeds", "share"), [(2, 0.5), (3, 0.75)])
def test_few_seeds_hold_the_truth_as_often_as_the_page_says(num_seeds, share):
    rng = np.random.default_rng(0)
    bounds = [estimate(np.repeat(rng.standard_normal((num_seeds, 1)), 2, axis=1), 500) for _ in range(400)]
    assert np.mean([found.low <= 0 <= found.high for found in bounds]) == pytest.approx(share, abs=0.07)


def group(name, rewards):
    """Runs that end with these implicit rewards of the best responses, shape (seeds, prompts)."""
    recipe = {"beta": 0.1, "loss_type": "NCA"}
    return Group(name, [Run("r", recipe | {"seed": seed}, [], held_out={"rewards/chosen": of_seed.tolist()})
                        for seed, of_seed in enumerate(rewards)])  # fmt: skip
