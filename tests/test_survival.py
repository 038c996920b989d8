"""Runs that are killed, stopped, starved of disk or fed rows that are not finite: what is left, and how they resume."""

import errno
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import DPOTrainer

from alignment import errors
from alignment.errors import UserError
from nca_trainer import NCATrainer
from run_reward import align
from tests.conftest import ROOT, draw_nothing
from tests.trainers import LORA, logged, make_trainer, reward_rows
from trl_nca.checkpoints import (
    MARKER,
    STAGING,
    UNLOGGED_STATE,
    RunStopped,
    find_corruption,
    rotate,
    seal,
    write_error_reason,
)

# Children are forked from a server that has the slow imports behind it.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["run_reward", "tests.test_survival"])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    """Path of a recipe of forty steps with dropout, logged every third, saved every second."""
    folder = tmp_path_factory.mktemp("survival")
    for name, n in (("train", 40), ("eval", 4)):
        rows = reward_rows(n)
        if name == "eval":
            rows = [row | {"prompt": [{"role": "user", "content": f"Held out {i}"}]} for i, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": tiny_model, "train_file": f"{folder}/train.jsonl", "eval_file": f"{folder}/eval.jsonl",
        "output_dir": f"{folder}/whole", "use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"],
        "lora_dropout": 0.2, "disable_dropout": False, "beta": 0.1, "alpha": 0.3, "learning_rate": 1e-2,
        "max_steps": 40, "global_batch_size": 4, "per_device_train_batch_size": 2, "logging_steps": 3,
        "save_strategy": "steps", "save_steps": 2, "save_total_limit": 3, "gradient_checkpointing": False,
        "report_to": "none", "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": 20,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def whole(recipe):
    """Output folder of the run that nothing happens to."""
    align([str(recipe)], NCATrainer)
    return recipe.parent / "whole"


def run_script(argv, log):
    """What run_reward.py does, in a child; its output goes to a file."""
    with open(log, "a", buffering=1) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        draw_nothing()
        errors.run(lambda: align(argv, NCATrainer), exit_on_sigterm=True)


def launch(recipe, out, *flags):
    child = CHILDREN.Process(
        target=run_script, args=([str(recipe), f"--output_dir={out}", *flags], f"{out}.log"), daemon=True
    )
    child.start()
    return child


def history(folder):
    """All that was logged, but for speeds."""
    entries = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "per_second", "train_loss", "flos")
    return [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in entries]


def assert_same_run(one, other):
    """Equal to the last bit: what was logged, and the weights."""
    assert history(one) == history(other)
    weights = [load_file(Path(folder) / "adapter_model.safetensors") for folder in (one, other)]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def wait_for(condition, child=None, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        if child is not None and not child.is_alive():
            return
        time.sleep(0.002)


def test_ten_kills_and_the_run_ends_as_if_there_had_been_none(recipe, whole, tmp_path):
    rng, out = random.Random(0), tmp_path / "out"
    staging, passed = out / STAGING, []
    for kill in range(10):
        child = launch(recipe, out, "--resume_from_checkpoint=true")
        wait_for(staging.exists, child)
        if kill % 2:  # some time after a save, else during one
            wait_for(lambda: not staging.exists(), child)
        time.sleep(rng.random() * (0.2 if kill % 2 else 0.02))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL, "it had ended before"
        assert [find_corruption(checkpoint) for checkpoint in out.glob("checkpoint-*")] == [None] * len(
            list(out.glob("c*-*"))
        )
        passed.append(staging.exists())
    assert any(passed), "no kill came while saving"
    assert not (out / "train_results.json").exists()
    child = launch(recipe, out, "--resume_from_checkpoint=true")
    child.join()
    assert child.exitcode == 0, Path(f"{out}.log").read_text()[-3000:]
    assert_same_run(whole, out)
    assert not staging.exists()


def test_sigterm_saves_and_exits_0(recipe, whole, tmp_path):
    out = tmp_path / "out"
    child = launch(recipe, out, "--save_steps=1000")
    wait_for(lambda: "'loss'" in Path(f"{out}.log").read_text() if Path(f"{out}.log").exists() else False, child)
    begun = time.monotonic()
    os.kill(child.pid, signal.SIGTERM)
    child.join(30)
    assert child.exitcode == 0 and time.monotonic() - begun < 30
    (checkpoint,) = out.glob("checkpoint-*")
    assert find_corruption(checkpoint) is None
    assert f"{checkpoint.name} is saved" in Path(f"{out}.log").read_text()
    assert not (out / "train_results.json").exists()
    child = launch(recipe, out, "--resume_from_checkpoint=true")
    child.join()
    assert child.exitcode == 0
    assert_same_run(whole, out)


class TermAt(TrainerCallback):
    """Sends SIGTERM to its own process at a moment of the run."""

    def __init__(self, moment, when):
        def send(args, state, control, **kwargs):
            if when(state):
                os.kill(os.getpid(), signal.SIGTERM)

        setattr(self, moment, send)


@pytest.mark.parametrize("evaluated", ["steps", "epoch"])
@pytest.mark.parametrize(
    ("moment", "step", "left"),
    [
        ("on_substep_end", 4, 5),  # the stop is at the end of the step that it comes in
        ("on_substep_end", 5, 6),  # the last of an epoch
        ("on_step_end", 5, 6),  # after the step's metrics were gathered: the next one is done too
        ("on_step_end", 6, 6),  # the last of an epoch: the evaluation that follows is interrupted
        ("on_prediction_step", 6, 6),
        ("on_substep_end", 0, 1),
    ],
)
def test_a_stop_at_any_moment_loses_nothing(tmp_path, monkeypatch, moment, step, left, evaluated):
    monkeypatch.setitem(LORA, "lora_dropout", 0.3)
    settings = {
        "max_steps": 9, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "logging_steps": 4,
        "save_strategy": "steps", "save_steps": 100, "eval_strategy": evaluated, "eval_steps": 3, "num_train_epochs": 2,
        "per_device_eval_batch_size": 1, "disable_dropout": False,
    }  # fmt: skip
    rows, held_out = reward_rows(24), reward_rows(3)

    def make(name):  # sets the seed
        return make_trainer(tmp_path / name, rows, eval_rows=held_out, **settings)

    runs = [make("whole")]
    runs[0].train()
    runs.append(make("out"))
    runs[1].add_callback(TermAt(moment, lambda state: state.global_step == step))
    with pytest.raises(SystemExit) as exit_code:
        runs[1].train()
    assert exit_code.value.code == 0
    assert runs[1].state.global_step == left
    found = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert found == [f"checkpoint-{left}"]
    runs.append(make("out"))
    runs[2].train(resume_from_checkpoint=str(tmp_path / "out" / found[0]))
    for key in ("loss", "logps/chosen", "grad_norm", "eval_loss", "num_input_tokens_seen"):
        assert logged(runs[2], key) == logged(runs[0], key), key
    for one, other in zip(runs[0].model.parameters(), runs[2].model.parameters(), strict=True):
        assert torch.equal(one, other)
    state = json.loads((tmp_path / "out" / found[0] / "trainer_state.json").read_text())
    before = sum(4 * loss for loss in logged(runs[0])[: left // 4])
    before += state["stateful_callbacks"][UNLOGGED_STATE]["tr_loss"]
    rest = (9 * logged(runs[0], "train_loss")[0] - before) / (9 - left)
    assert logged(runs[2], "train_loss")[-1] == pytest.approx(rest, abs=1e-5), "of this launch's steps"


def test_a_corrupt_checkpoint_is_skipped_with_a_line(recipe, whole, tmp_path, caplog):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in ("train_results.json", "adapter_model.safetensors"):
        (out / name).unlink()
    steps = sorted(int(path.name[11:]) for path in out.glob("checkpoint-*"))
    newest, second, third = (out / f"checkpoint-{step}" for step in reversed(steps))
    with (newest / "optimizer.pt").open("r+b") as stream:
        stream.truncate(1000)
    (second / MARKER).unlink()
    with caplog.at_level(logging.WARNING):
        align([str(recipe), f"--output_dir={out}", "--resume_from_checkpoint=true"], NCATrainer)
    assert f"{newest} is skipped, it is corrupt: optimizer.pt is not as it was written" in caplog.text
    assert f"{second} is skipped, it is corrupt: it has no {MARKER}" in caplog.text
    assert f"Resuming from {third}" in caplog.text
    assert_same_run(whole, out)
    (newest / "trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match=f"{newest.name} is corrupt: trainer_state.json is not as it was written"):
        align([str(recipe), f"--output_dir={out}", f"--resume_from_checkpoint={newest}"], NCATrainer)


def test_all_steps_done_inside_an_epoch_means_none_more(tmp_path):
    runs = [make_trainer(tmp_path, reward_rows(24), max_steps=4, save_strategy="steps", save_steps=4) for _ in range(2)]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert runs[1].state.global_step == 4
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_best_checkpoint_is_named_by_its_place_and_kept(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    trainer = make_trainer(
        tmp_path, reward_rows(24), eval_rows=reward_rows(3), save_total_limit=2, metric_for_best_model="logps/rejected",
        load_best_model_at_end=True, greater_is_better=False, **settings
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and find_corruption(best) is None
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", best.name} | (
        {"checkpoint-3"} if best.name == "checkpoint-4" else set()
    )
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)


def test_rotation_keeps_the_one_just_written(tmp_path):
    for step in (2, 4, 6, 99):  # the last is corrupt, from before a resume
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate(str(tmp_path), None, {"checkpoint-6"})
    assert len(list(tmp_path.iterdir())) == 4
    rotate(str(tmp_path), 3, {"checkpoint-6", ""})
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-6", "checkpoint-99"}
    rotate(str(tmp_path), 1, {"checkpoint-6", ""})
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-6"}


def test_a_killed_worker_ends_all_processes_and_the_run_goes_on(recipe, tmp_path):
    flags = ["--lora_dropout=0", "--disable_dropout=true", "--logging_steps=1"]
    align([str(recipe), f"--output_dir={tmp_path}/one", *flags], NCATrainer)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = tmp_path / "out"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
               "alignment-handbook/recipes/accelerate_configs/multi_gpu.yaml", "--num_processes=2",
               f"--main_process_port={port}", "run_reward.py", str(recipe), f"--output_dir={out}",
               "--resume_from_checkpoint=true", *flags]  # fmt: skip
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) as launcher:
        wait_for(lambda: any(out.glob("checkpoint-*")), seconds=120)
        workers = [p for p in psutil.Process(launcher.pid).children(recursive=True) if "run_reward.py" in p.cmdline()]
        assert len(workers) == 2
        workers[1].kill()
        assert launcher.wait(60) != 0
    assert not any(worker.is_running() for worker in workers)
    assert "another process of this run has died" in (tmp_path / "log").read_text()
    assert all(find_corruption(checkpoint) is None for checkpoint in out.glob("checkpoint-*"))
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "Resuming from" in again.stdout
    losses = [[entry["loss"] for entry in history(folder) if "loss" in entry] for folder in (tmp_path / "one", out)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "one", out))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-4)


def test_a_checkpoint_is_uploaded_from_where_it_stays(tmp_path, monkeypatch):
    uploaded = []
    monkeypatch.setattr(DPOTrainer, "_push_from_checkpoint", lambda self, folder: uploaded.append(Path(folder)))
    trainer = make_trainer(tmp_path, reward_rows(12), max_steps=2, save_strategy="steps", save_steps=1)
    trainer.args.push_to_hub = True
    trainer.train()
    assert uploaded == [tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"]
    assert [find_corruption(folder) for folder in uploaded] == [None, None]


def test_only_what_cannot_be_written_is_said_to_be():
    assert write_error_reason(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
    assert (
        write_error_reason(SafetensorError("I/O error: Read-only file system (os error 30)")) == "Read-only file system"
    )
    assert "is the disk full?" in write_error_reason(RuntimeError("PytorchStreamWriter failed writing file"))
    for other in (OSError("401 Client Error"), ConnectionResetError(errno.ECONNRESET, "reset"), RuntimeError("a bug")):
        assert write_error_reason(other) is None


def test_what_a_seal_covers(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("one", "deep/two"):
        (tmp_path / name).write_text(name)
    seal(tmp_path)
    assert find_corruption(tmp_path) is None
    (tmp_path / "deep/two").write_text("owt")
    assert find_corruption(tmp_path) == "deep/two is not as it was written"
    (tmp_path / "deep/two").unlink()
    assert find_corruption(tmp_path) == "deep/two is missing"
    (tmp_path / MARKER).write_text('{"files"')
    assert find_corruption(tmp_path) == f"it has no {MARKER}"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(recipe, whole, small_disk, tmp_path):
    out = small_disk / "out"
    flags = [str(recipe), f"--output_dir={out}", "--save_total_limit=20", "--resume_from_checkpoint=true"]
    with pytest.raises(UserError, match="a checkpoint cannot be written: .*No space left.* Fix that; .*--resume"):
        align(flags, NCATrainer)
    found = list(out.glob("checkpoint-*"))
    assert found and all(find_corruption(checkpoint) is None for checkpoint in found)
    assert not (out / STAGING).exists()
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    align(flags, NCATrainer)
    assert_same_run(whole, out)


def test_a_read_only_folder_is_found_before_the_model_is_loaded(recipe, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match=f"output_dir: {small_disk}/out cannot be written .{small_disk} is read-only"):
        align([str(recipe), f"--output_dir={small_disk}/out", "--model_name_or_path=nowhere"], NCATrainer)


def bad_rows(*bad):
    """Rows of which some have a score that makes their loss NaN."""
    rows = reward_rows(12)
    return Dataset.from_list(
        [row | {"scores": [float("nan")] * len(row["scores"]), "location": f"line {i}"} if i in bad else
         row | {"location": f"line {i}"} for i, row in enumerate(rows)]
    )  # fmt: skip


def test_a_step_that_is_not_finite_is_skipped_and_its_row_named(tmp_path, caplog):
    settings = {"max_steps": 3, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(tmp_path, bad_rows(5), **settings)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "Step 2: the loss of line 5 is not finite; the step is skipped (1 of max_nan_steps 3)" in caplog.text
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert logged(trainer, "rewards/chosen")[2] != 0, "the other steps count"


def test_only_steps_in_a_row_are_too_many(tmp_path):
    trainer = make_trainer(tmp_path, bad_rows(1, 9), max_nan_steps=2, max_steps=3, train_sampling_strategy="sequential")
    trainer.train()
    assert trainer.state.global_step == 3


def test_too_many_of_them_end_the_run_with_the_last_good_checkpoint(tmp_path):
    settings = {"max_steps": 3, "train_sampling_strategy": "sequential", "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, bad_rows(5, 7, 9), max_nan_steps=2, **settings)
    with pytest.raises(
        RunStopped, match="Step 3: the loss of line 9 is not finite, for 2 steps in a row .max_nan_steps 2"
    ):
        trainer.train()
    assert (tmp_path / "checkpoint-2").exists() and not (tmp_path / "checkpoint-3").exists()
    weights = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_run_that_blows_up_names_rows_and_keeps_no_broken_weights(recipe, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="not finite"):
        align(
            [str(recipe), f"--output_dir={out}", "--learning_rate=1e38", "--max_grad_norm=0", "--optim=sgd"],
            NCATrainer,
        )  # fmt: skip
    for checkpoint in out.glob("checkpoint-*"):
        weights = load_file(checkpoint / "adapter_model.safetensors")
        assert all(torch.isfinite(value).all() for value in weights.values())
