"""Checkpoints through kills, corruption and full disks: what is left, and how a run resumes."""

import errno
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from trl import DPOTrainer

from alignment.errors import UserError
from alignment.output import check_kind, resume_point
from nca_trainer import NCATrainer
from run_reward import align
from tests.conftest import ROOT
from tests.forked import start
from tests.launch_runs import fork_workers, free_port
from tests.runs import assert_same_run, history, launch, wait_for
from tests.trainers import make_trainer, reward_rows
from trl_nca.checkpoints import (
    MARKER,
    STAGING,
    find_corruption,
    find_missing_state,
    rotate,
    seal,
    write_error_reason,
)


def test_ten_kills_and_the_run_ends_as_if_there_had_been_none(saving_recipe, whole_run, tmp_path):
    rng, out = random.Random(0), tmp_path / "out"
    staging, passed = out / STAGING, []
    for kill in range(10):
        child = launch(saving_recipe, out, "--resume_from_checkpoint=true")
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
    child = launch(saving_recipe, out, "--resume_from_checkpoint=true")
    child.join()
    assert child.exitcode == 0, Path(f"{out}.log").read_text()[-3000:]
    assert_same_run(whole_run, out)
    assert not staging.exists()


def test_a_corrupt_checkpoint_is_skipped_with_a_line(saving_recipe, whole_run, tmp_path, caplog):
    out = tmp_path / "out"
    shutil.copytree(whole_run, out)
    for name in ("train_results.json", "adapter_model.safetensors"):
        (out / name).unlink()
    steps = sorted(int(path.name[11:]) for path in out.glob("checkpoint-*"))
    newest, second, third = (out / f"checkpoint-{step}" for step in reversed(steps))
    with (newest / "optimizer.pt").open("r+b") as stream:
        stream.truncate(1000)
    (second / MARKER).unlink()
    with caplog.at_level(logging.WARNING):
        align([str(saving_recipe), f"--output_dir={out}", "--resume_from_checkpoint=true"], NCATrainer)
    assert f"{newest} is skipped, it is corrupt: optimizer.pt is not as it was written" in caplog.text
    assert f"{second} is skipped, it is corrupt: it has no {MARKER}" in caplog.text
    assert f"Resuming from {third}" in caplog.text
    assert_same_run(whole_run, out)
    (newest / "trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match=f"{newest.name} is corrupt: trainer_state.json is not as it was written"):
        align([str(saving_recipe), f"--output_dir={out}", f"--resume_from_checkpoint={newest}"], NCATrainer)


@pytest.mark.parametrize("resume", ["true", "checkpoint-4"])
def test_a_checkpoint_without_its_optimizer_is_not_resumed_from(tmp_path, resume):
    trainer = make_trainer(
        tmp_path, reward_rows(8), max_steps=4, save_strategy="steps", save_steps=4, save_only_model=True
    )
    trainer.train()
    assert find_corruption(tmp_path / "checkpoint-4") is None
    message = r"checkpoint-4 cannot be resumed from: it was saved without its optimizer and scheduler .as save_only"
    with pytest.raises(UserError, match=message):
        resume_point(str(tmp_path), resume if resume == "true" else f"{tmp_path}/{resume}", overwrite=False)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["optimizer.pt", "scheduler.pt"], None),
        (["optimizer.bin", "scheduler.pt"], None),
        (["optimizer_0", "scheduler.pt"], None),
        (["global_step4"], None),
        (["optimizer.pt"], "it was saved without its scheduler"),
        ([], "it was saved without its optimizer and scheduler"),
    ],
)
def test_what_a_checkpoint_lacks(tmp_path, names, missing):
    for name in [*names, "model.safetensors"]:
        (tmp_path / name).mkdir()
    assert find_missing_state(tmp_path) == missing


@pytest.mark.parametrize(("use_peft", "file"), [(True, "model.safetensors"), (False, "adapter_config.json")])
def test_a_checkpoint_of_the_other_kind_is_not_resumed_from(tmp_path, use_peft, file):
    (tmp_path / file).touch()
    check_kind(str(tmp_path), not use_peft)
    with pytest.raises(UserError, match=f"holds .*, and the recipe says use_peft: {str(use_peft).lower()}"):
        check_kind(str(tmp_path), use_peft)


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


def test_a_kill_while_old_checkpoints_are_removed_leaves_none_that_is_half_there(tmp_path, monkeypatch):
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").touch()
        seal(tmp_path / f"checkpoint-{step}")

    def killed(folder, *args, **kwargs):
        next(Path(folder).rglob("weights")).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        rotate(str(tmp_path), 1, {"checkpoint-4"})
    assert [find_corruption(folder) for folder in tmp_path.glob("checkpoint-*")] == [None]


def test_a_killed_worker_ends_all_processes_and_the_run_goes_on(saving_recipe, tmp_path):
    flags = ["--lora_dropout=0", "--disable_dropout=true", "--logging_steps=1"]
    align([str(saving_recipe), f"--output_dir={tmp_path}/one", *flags], NCATrainer)
    out, log = tmp_path / "out", tmp_path / "log"
    config = f"{ROOT}/alignment-handbook/recipes/accelerate_configs/multi_gpu.yaml"
    command = [f"--config_file={config}", "--num_processes=2",
               f"--main_process_port={free_port()}", f"{ROOT}/run_reward.py", str(saving_recipe), f"--output_dir={out}",
               "--resume_from_checkpoint=true", *flags]  # fmt: skip
    launcher = start(fork_workers, command, log=log, daemon=False)
    wait_for(lambda: any(out.glob("checkpoint-*")), launcher, seconds=120)
    workers = psutil.Process(launcher.pid).children(recursive=True)
    assert len(workers) == 2
    workers[1].kill()
    launcher.join(60)
    assert launcher.exitcode not in (0, None)
    assert not any(worker.is_running() for worker in workers)
    assert "another process of this run has died" in log.read_text()
    assert all(find_corruption(checkpoint) is None for checkpoint in out.glob("checkpoint-*"))
    again = start(fork_workers, command, log=tmp_path / "again", daemon=False)
    again.join(200)
    assert again.exitcode == 0, (tmp_path / "again").read_text()[-3000:]
    assert "Resuming from" in (tmp_path / "again").read_text()
    losses = [[entry["loss"] for entry in history(folder) if "loss" in entry] for folder in (tmp_path / "one", out)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "one", out))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-4)


def test_a_checkpoint_is_uploaded_from_where_it_stays(tmp_path, monkeypatch):
    uploaded = []

    def upload(self, folder):
        assert self.processing_class is None, "upstream would write it again"
        saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
        uploaded.append(Path(folder))

    monkeypatch.setattr(DPOTrainer, "_push_from_checkpoint", upload)
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


def test_of_an_error_that_does_not_say_why_the_disk_is_asked(small_disk, tmp_path):
    hidden = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    assert write_error_reason(hidden, small_disk) == "No space left on device"
    for folder in (tmp_path, tmp_path / "gone"):
        assert write_error_reason(hidden, folder).startswith("is the disk full? ([enforce fail")


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


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(saving_recipe, whole_run, small_disk, tmp_path):
    out = small_disk / "out"
    flags = [str(saving_recipe), f"--output_dir={out}", "--save_total_limit=20", "--resume_from_checkpoint=true"]
    with pytest.raises(UserError, match="a checkpoint cannot be written: .*No space left.* Fix that; .*--resume"):
        align(flags, NCATrainer)
    found = list(out.glob("checkpoint-*"))
    assert found and all(find_corruption(checkpoint) is None for checkpoint in found)
    assert not (out / STAGING).exists()
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    align(flags, NCATrainer)
    assert_same_run(whole_run, out)


def test_a_read_only_folder_is_found_before_the_model_is_loaded(saving_recipe, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match=f"output_dir: {small_disk}/out cannot be written .{small_disk} is read-only"):
        align([str(saving_recipe), f"--output_dir={small_disk}/out", "--model_name_or_path=nowhere"], NCATrainer)
