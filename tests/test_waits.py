"""A step runs ahead of the device: it waits where its metrics are read, once, and nowhere else."""

import warnings
from collections import Counter

import pytest
import torch

import nca_trainer
from benchmarks.waits import CASES, tiny_trainer, waits_by_step, watch
from nca_trainer import NCAConfig, NCATrainer
from tests.trainers import DEFAULTS, make_trainer, reward_rows

SHORT = {"gradient_accumulation_steps": 2, "max_steps": 2, "logging_steps": 2}


def by_function(step):
    """How often each function waited, of places like "item at file.py:3 function < caller.py:5 name"."""
    times = Counter()
    for place, n in step.items():
        times[place.split(" < ")[0].split()[-1]] += n
    return times


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_its_metrics_alone(tmp_path, case):
    first, second = waits_by_step(tiny_trainer(tmp_path, "cpu", **CASES[case] | SHORT))
    assert by_function(first) == {"gather": 1}, first
    assert by_function(second) == {"gather": 1, "_maybe_log_save_evaluate": 1}, second  # of the loss that is logged


def test_processes_with_sharded_weights_agree_on_their_forwards_before_the_step(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, "cpu", **CASES["InfoNCA in chunks"] | SHORT)
    monkeypatch.setattr(NCATrainer, "_is_sharded", True)
    first, _ = waits_by_step(trainer)
    assert by_function(first) == {"most_forwards": 1, "gather": 1}, first


def test_a_wait_anywhere_is_seen(tmp_path, monkeypatch):
    """Of each kind, in each micro-batch, by the line that it is at."""

    def wait(losses, *args):
        losses.mean().item()
        if losses.sum() > 0:
            losses[losses > 0].mean()
        losses.cpu()
        torch.tensor([1.0], device=losses.device)
        return metrics(losses, *args)

    metrics = nca_trainer.group_metrics
    monkeypatch.setattr(nca_trainer, "group_metrics", wait)
    first, _ = waits_by_step(tiny_trainer(tmp_path, "cpu", **SHORT))
    found = sorted(place.partition(" ")[0] for place in first if place.endswith(" wait") for _ in range(first[place]))
    assert found == 2 * ["_local_scalar_dense"] * 2 + ["_to_copy"] * 4 + ["index"] * 2
    assert all(f"tests/{__name__.partition('.')[2]}.py:" in place for place in first if place.endswith(" wait"))


def test_what_upstream_does_by_itself_is_seen(tmp_path):
    settings = {"logging_nan_inf_filter": True, "accelerator_config": {"non_blocking": False}}
    first, _ = waits_by_step(tiny_trainer(tmp_path, "cpu", **SHORT | settings))
    assert by_function(first) == {"gather": 1, "send_to_device": 2 * 6, "_run_epoch": 2 * 2}, first


def test_an_evaluation_waits_once_a_batch(tmp_path):
    """And upstream once for the losses of them all."""
    settings = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2, "optim": "adamw_torch"}
    settings |= {"accelerator_config": {"non_blocking": True}, "per_device_train_batch_size": 2, **SHORT}
    trainer = make_trainer(tmp_path, reward_rows(8), eval_rows=reward_rows(6), **settings)
    _, second = waits_by_step(trainer)
    assert by_function(second) == {"gather": 1 + 3, "_maybe_log_save_evaluate": 1, "nested_numpify": 1}, second


def test_torchs_warnings_are_counted_each_time(monkeypatch):
    """What a GPU would do, by what torch says there: a line that waits twice counts twice, and the rest is shown."""
    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.warns(UserWarning) as shown, watch("cuda") as places:
        assert modes[-1] == "warn"
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at a.cpp:1.)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert modes[-1] == 0
    assert [str(w.message) for w in shown] == ["something else"]
    assert len(places) == 2 and len(set(places)) == 1
    assert places[0].endswith(" test_torchs_warnings_are_counted_each_time")


def test_batches_are_copied_without_a_wait_where_there_is_a_gpu(tmp_path, monkeypatch):
    assert not NCAConfig(output_dir=str(tmp_path), **DEFAULTS).accelerator_config.non_blocking
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    make = lambda **settings: NCAConfig(output_dir=str(tmp_path), **DEFAULTS | settings).accelerator_config  # noqa: E731
    assert make().non_blocking
    assert make(accelerator_config={"split_batches": True}).non_blocking
    assert not make(accelerator_config={"non_blocking": False}).non_blocking
    assert not make(dataloader_pin_memory=False).non_blocking
