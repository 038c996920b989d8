"""SIGTERM at any moment: the run saves, ends with exit code 0, and the run that resumes is as if nothing had been."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests.runs import assert_same_run, launch, wait_for
from tests.trainers import LORA, logged, make_trainer, reward_rows
from trl_nca.checkpoints import UNLOGGED_STATE, find_corruption


def test_sigterm_saves_and_exits_0(saving_recipe, whole_run, tmp_path):
    out = tmp_path / "out"
    child = launch(saving_recipe, out, "--save_steps=1000")
    wait_for(lambda: "\nstep " in Path(f"{out}.log").read_text() if Path(f"{out}.log").exists() else False, child)
    begun = time.monotonic()
    os.kill(child.pid, signal.SIGTERM)
    child.join(30)
    assert child.exitcode == 0 and time.monotonic() - begun < 30
    (checkpoint,) = out.glob("checkpoint-*")
    assert find_corruption(checkpoint) is None
    assert f"{checkpoint.name} is saved" in Path(f"{out}.log").read_text()
    assert not (out / "train_results.json").exists()
    child = launch(saving_recipe, out, "--resume_from_checkpoint=true")
    child.join()
    assert child.exitcode == 0
    assert_same_run(whole_run, out)


class TermAt(TrainerCallback):
    """Sends SIGTERM to its own process at a moment of the run."""

    def __init__(self, moment, when):
        def send(args, state, control, **kwargs):
            if when(state):
                os.kill(os.getpid(), signal.SIGTERM)

        setattr(self, moment, send)


@pytest.fixture(scope="module", params=["steps", "epoch"])
def uninterrupted(request, tmp_path_factory):
    """Makes a trainer with dropout, of 9 steps and their evaluations; and one that has been trained by itself."""
    settings = {
        "max_steps": 9, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "logging_steps": 4,
        "save_strategy": "steps", "save_steps": 100, "eval_strategy": request.param, "eval_steps": 3,
        "num_train_epochs": 2, "per_device_eval_batch_size": 1, "disable_dropout": False,
    }  # fmt: skip
    rows, held_out = reward_rows(24), reward_rows(3)

    def make(folder):  # sets the seed
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(LORA, "lora_dropout", 0.3)
            return make_trainer(folder, rows, eval_rows=held_out, **settings)

    whole = make(tmp_path_factory.mktemp("whole"))
    whole.train()
    return make, whole


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
def test_a_stop_at_any_moment_loses_nothing(tmp_path, uninterrupted, moment, step, left):
    make, whole = uninterrupted
    stopped = make(tmp_path)
    stopped.add_callback(TermAt(moment, lambda state: state.global_step == step))
    with pytest.raises(SystemExit) as exit_code:
        stopped.train()
    assert exit_code.value.code == 0
    assert stopped.state.global_step == left
    found = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert found == [f"checkpoint-{left}"]
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / found[0]))
    for key in ("loss", "logps/chosen", "grad_norm", "eval_loss", "num_input_tokens_seen"):
        assert logged(resumed, key) == logged(whole, key), key
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    state = json.loads((tmp_path / found[0] / "trainer_state.json").read_text())
    before = sum(4 * loss for loss in logged(whole)[: left // 4])
    before += state["stateful_callbacks"][UNLOGGED_STATE]["tr_loss"]
    rest = (9 * logged(whole, "train_loss")[0] - before) / (9 - left)
    assert logged(resumed, "train_loss")[-1] == pytest.approx(rest, abs=1e-5), "of this launch's steps"
