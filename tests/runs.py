"""Runs in processes that a test can kill or stop, and what they are held to afterwards."""

import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.forked import run_as_main, start


def launch(recipe, out, *flags):
    """Starts run_reward.py in a child; what it prints goes to a file beside the output folder."""
    return start(run_as_main, [f"{ROOT}/run_reward.py", str(recipe), f"--output_dir={out}", *flags], log=f"{out}.log")


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
