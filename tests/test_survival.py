"""Runs that are killed, stopped, starved of disk or fed rows that are not finite: what is left, and how they go on."""

import contextlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from alignment import errors
from alignment.errors import UserError
from nca_trainer import NCATrainer
from run_reward import align
from tests.test_trainer import logged, make_trainer, reward_rows
from trl_nca.checkpoints import MARKER, STAGING, RunStopped, seal, why_torn

# Children are forked from a server that has the slow imports behind it.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["run_reward", "tests.test_survival"])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    """Path of a recipe of twelve steps with dropout, logged every third, saved every second."""
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
        "max_steps": 12, "global_batch_size": 4, "per_device_train_batch_size": 2, "logging_steps": 3,
        "save_strategy": "steps", "save_steps": 2, "save_total_limit": 3, "gradient_checkpointing": False,
        "report_to": "none", "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": 6,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def whole(recipe):
    """Output folder of the run that nothing happens to."""
    align([str(recipe)], NCATrainer, pairs=False)
    return recipe.parent / "whole"


def run_script(argv, log):
    """What run_reward.py does, in a child; its output goes to a file."""
    with open(log, "a", buffering=1) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        errors.run(lambda: align(argv, NCATrainer, pairs=False), exit_on_sigterm=True)


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
    rng, out, kills = random.Random(0), tmp_path / "out", {"at random": 0, "while saving": 0}
    staging = out / STAGING
    while sum(kills.values()) < 10:
        child = launch(recipe, out, "--resume_from_checkpoint=true")
        if rng.random() < 0.5:
            for _ in range(rng.randint(1, 2)):
                wait_for(staging.exists, child)
            time.sleep(rng.random() * 0.03)
            kind = "while saving"
        else:
            child.join(rng.random() * 4)
            kind = "at random"
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            kills[kind] += 1
        child.join()
        if child.exitcode == 0:  # it came through: once more from the start
            shutil.rmtree(out)
        for checkpoint in out.glob("checkpoint-*"):
            assert why_torn(checkpoint) is None
    child = launch(recipe, out, "--resume_from_checkpoint=true")
    child.join()
    assert child.exitcode == 0, Path(f"{out}.log").read_text()[-3000:]
    assert min(kills.values()) > 0
    assert_same_run(whole, out)
    assert not staging.exists()
