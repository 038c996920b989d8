"""The arithmetic of a run: the global batch on any number of processes, steps, tokens."""

import logging
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from alignment.errors import UserError
from alignment.plan.steps import plan_run, set_global_batch
from alignment.recipe import RunConfig
from tests.conftest import ROOT

LAUNCHES = ROOT / "alignment-handbook" / "recipes" / "accelerate_configs"


def make_args(per_device=1, accumulation=1, **changes):
    settings = {
        "per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation,
        "dataloader_drop_last": False, "max_tokens_per_forward": None, "max_steps": -1, "num_train_epochs": 1,
        "get_warmup_steps": lambda n: n // 10,
    }  # fmt: skip
    return SimpleNamespace(**settings | changes)


def run_config(size, *given):
    config = RunConfig(global_batch_size=size)
    config.given = {key: [f"--{key}=1"] for key in given}
    return config


@pytest.mark.parametrize(
    ("processes", "per_device", "accumulation"), [(8, 1, 4), (2, 1, 16), (4, 2, 4), (1, 1, 32), (32, 1, 1), (1, 32, 1)]
)
def test_accumulation_follows_from_the_global_batch(processes, per_device, accumulation):
    args = make_args(per_device)
    set_global_batch(args, run_config(32), processes)
    assert args.gradient_accumulation_steps == accumulation
    assert plan_run(args, processes, 320, 3200).global_batch_size == 32


@pytest.mark.parametrize(
    ("processes", "per_device", "message"),
    [
        (3, 1, "--global_batch_size=30 or 33; 2 or 4 processes$"),
        (5, 1, "--global_batch_size=30 or 35; 4 or 8 processes$"),
        (4, 3, "--global_batch_size=24 or 36; --per_device_train_batch_size=2$"),
        (64, 1, "--global_batch_size=64; 16 or 32 processes$"),
    ],
)
def test_an_impossible_split_names_the_nearest(processes, per_device, message):
    args = make_args(per_device, accumulation=7)
    with pytest.raises(UserError, match=f"global_batch_size: 32 prompts cannot be split over {processes}.*{message}"):
        set_global_batch(args, run_config(32), processes)


def test_by_hand_wins_and_is_loud(caplog):
    args = make_args(accumulation=4)
    with caplog.at_level(logging.WARNING):
        set_global_batch(args, run_config(32, "gradient_accumulation_steps"), 4)
    assert args.gradient_accumulation_steps == 4
    assert "a step sees 16 prompts, not the recipe's 32" in caplog.text
    caplog.clear()
    args = make_args(accumulation=4)
    set_global_batch(args, run_config(32, "gradient_accumulation_steps"), 8)
    assert not caplog.text


@pytest.mark.parametrize(
    ("processes", "given", "per_device", "accumulation"),
    [
        (8, {}, 4, 1),
        (1, {}, 32, 1),
        (8, {"gradient_accumulation_steps": 4}, 1, 4),
        (1, {"gradient_accumulation_steps": 4}, 8, 4),
        (8, {"per_device_train_batch_size": 2}, 2, 2),
    ],
)
def test_with_a_bound_on_tokens_a_process_gets_its_prompts_at_once(processes, given, per_device, accumulation):
    args = make_args(max_tokens_per_forward=4096, **given)
    set_global_batch(args, run_config(32, *given), processes)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (per_device, accumulation)


def test_without_a_global_batch_nothing_changes():
    args = make_args(accumulation=7)
    set_global_batch(args, run_config(None), 3)
    assert args.gradient_accumulation_steps == 7
    with pytest.raises(UserError, match="at least 1"):
        set_global_batch(args, run_config(0), 3)


def test_steps_and_tokens():
    plan = plan_run(make_args(2, 2, num_train_epochs=2), 2, 20, 80)
    assert (plan.num_prompts, plan.num_steps, plan.global_batch_size, plan.warmup_steps) == (20, 6, 8, 0)
    assert plan.num_tokens == 2 * 80
    assert plan_run(make_args(2, 2, max_steps=1), 2, 24, 96).num_tokens == 32
    assert "2 per device x 2 accumulation x 2 processes = 8 prompts a step" in str(plan)


@pytest.mark.parametrize("file", sorted(LAUNCHES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_launch_config_loads(file):
    config = load_config_from_file(str(file))
    assert config.num_processes >= config.num_machines >= 1
    assert config.mixed_precision == "no"  # the recipe says it
    assert file.read_text().startswith("# ")
