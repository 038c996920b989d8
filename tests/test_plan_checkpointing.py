"""`gradient_checkpointing: auto`: what is chosen, what is said of it, and that the numbers of a run are the same."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from transformers.integrations import deepspeed

from alignment.configs import parse_configs
from alignment.plan import checkpointing, estimate
from alignment.plan import show as planning
from alignment.plan.checkpointing import SHARE, Checkpointing, choose, decide, free_memory_gb
from alignment.plan.describe import describe
from alignment.plan.estimate import MemoryEstimator, longest_rows
from alignment.plan.show import make_plan
from alignment.plan.steps import plan_run
from nca_trainer import NCATrainer
from run_reward import align
from tests.conftest import ROOT
from tests.tiny import tiny_config
from tests.trainers import reward_rows

QLORA = str(ROOT / "yamls" / "reward_qlora.yaml")


@pytest.fixture
def recipe(tmp_path, tiny_model):
    """Path of a recipe of four steps with dropout that asks for auto; `out` beside it is its output folder."""
    rows = tmp_path / "train.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in reward_rows(16)))
    settings = {
        "model_name_or_path": tiny_model, "train_file": str(rows), "output_dir": str(tmp_path / "out"),
        "use_peft": True, "lora_r": 4, "lora_dropout": 0.2, "disable_dropout": False, "loss_type": "NCA", "beta": 0.1,
        "alpha": 0.2, "learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 2,
        "save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": "auto", "report_to": "none",
        "disable_tqdm": True,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_a_run_chooses_says_so_and_resumes_by_another_choice(recipe, capsys, monkeypatch):
    out = recipe.parent / "out"
    made = []
    build = NCATrainer.__init__
    monkeypatch.setattr(NCATrainer, "__init__", lambda self, *a, **k: (build(self, *a, **k), made.append(self))[0])
    align([str(recipe)], NCATrainer)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Gradient checkpointing"))
    assert line.startswith("Gradient checkpointing (auto): off: a step takes 0.0") and "within 85% of the" in line
    assert made[0].args.gradient_checkpointing is made[0].args.activation_checkpointing is False
    written = (out / "recipe.yaml").read_text()
    assert written.startswith(f"# {line}\n")
    assert yaml.safe_load(written)["gradient_checkpointing"] == "auto"
    plan = json.loads((out / "plan.json").read_text())["gradient_checkpointing"]
    assert plan["asked"] == "auto" and plan["on"] is False and plan["summary"] == line
    assert 0 < plan["with_gb"] <= plan["without_gb"] < plan["free_gb"]
    assert parse_configs([str(out / "recipe.yaml")]).trainer.gradient_checkpointing == "auto"

    whole = losses(out)
    align([str(recipe), "--gradient_checkpointing=false", f"--output_dir={recipe.parent / 'false'}"], NCATrainer)
    assert losses(recipe.parent / "false") == whole, "planning draws no random number"

    for name in ("checkpoint-4", "train_results.json", "trainer_state.json"):
        file = out / name
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    monkeypatch.setattr(checkpointing, "free_memory_gb", lambda device: 1e-6)
    align([str(recipe), "--resume_from_checkpoint=true"], NCATrainer)
    assert "(auto): on: a step takes" in capsys.readouterr().out
    assert made[2].args.activation_checkpointing is True and made[2].model.is_activation_checkpointing
    assert losses(out) == whole, "a machine that decides otherwise goes on alike, with dropout"


def test_what_does_not_fit_either_is_doubted():
    taken = Checkpointing(True, free_gb=9.0, without_gb=30.0, with_gb=10.0)
    assert str(taken) == (
        "Gradient checkpointing (auto): on: a step takes 30.00 GB without it, above 85% of the 9.00 GB free; 10.00 "
        "with it, which may not fit either"
    )


class Estimator:
    """Takes 10 GB without checkpointing and 4 with it."""

    checkpointing = True

    def footprint(self, layout):
        return self.checkpointing


@pytest.mark.parametrize(("free", "on"), [(10 / SHARE + 0.01, False), (10 / SHARE - 0.01, True), (3, True)])
def test_off_where_it_fits_with_a_margin(monkeypatch, free, on):
    parts = {True: 4e9, False: 10e9}
    rest = dict.fromkeys(checkpointing.layouts.PARTS, 0.0)
    monkeypatch.setattr(
        checkpointing.layouts, "peak_memory", lambda footprint, *_: ("head", rest | {"weights": parts[footprint]})
    )
    estimator = Estimator()
    choice = choose(estimator, "ddp", 2, free)
    assert (choice.on, choice.without_gb, choice.with_gb) == (on, 10, 4)
    assert estimator.checkpointing is on


def prepared(*flags):
    configs = parse_configs([QLORA, "--gradient_checkpointing=auto", *flags])
    rows = Dataset.from_list(
        [{"prompt_ids": [1] * 20, "response_ids": [[2] * n] * 2, "scores": [0.0, 1.0], "length": 20 + 2 * n}
         for n in (9, 30, 4)]
    )  # fmt: skip
    return configs, tiny_config(hidden_size=128, intermediate_size=256), rows, plan_run(configs.trainer, 1, len(rows))


def test_a_model_that_cannot_be_planned_is_trained_all_the_same(monkeypatch):
    def fails(*args, **kwargs):
        raise KeyError("its own code")

    monkeypatch.setattr(estimate, "trace_step", fails)
    choice = decide(*prepared())
    assert choice.on and "the memory cannot be planned (KeyError: 'its own code')" in str(choice)


def test_a_launch_that_recomputes_by_itself_is_left_alone(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    assert str(decide(*prepared())) == (
        "Gradient checkpointing (auto): off: the launch recomputes by itself (fsdp_activation_checkpointing)"
    )


def test_true_and_false_trace_nothing(monkeypatch):
    monkeypatch.setattr(checkpointing, "MemoryEstimator", None)
    configs, *rest = prepared("--gradient_checkpointing=true")
    assert decide(configs, *rest) is None


def test_models_are_planned_whole_under_zero3(monkeypatch):
    """transformers would partition the model that is built for the plan over processes that do not build it."""
    config = SimpleNamespace(is_zero3=lambda: True)
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: config)
    partitioned = []

    def step(spec, batch, backward=True):
        partitioned.append(deepspeed.is_deepspeed_zero3_enabled())
        raise RuntimeError

    monkeypatch.setattr(estimate, "trace_step", step)
    decide(*prepared())
    assert partitioned == [False] and deepspeed.is_deepspeed_zero3_enabled()


def test_free_memory_is_that_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * 10**9, 80 * 10**9))
    assert free_memory_gb(torch.device("cuda", 1)) == 30
    monkeypatch.setattr(checkpointing.psutil, "virtual_memory", lambda: SimpleNamespace(available=12 * 10**9))
    for processes in (1, 4):  # which share the machine
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert free_memory_gb(torch.device("cpu")) == 12 / processes


def test_the_fullest_of_the_gpus_decides(monkeypatch):
    monkeypatch.setattr(checkpointing, "gather_object", lambda mine: [80.0, 20.0, 40.0])
    monkeypatch.setattr(checkpointing, "_planned", lambda configs, model_config, rows, plan, free_gb: free_gb)
    assert decide(*prepared()) == 20


def test_a_plan_chooses_for_the_gpu_it_is_asked_about(monkeypatch):
    """Mistral-7B, QLoRA, four responses of 512 tokens."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(checkpointing.layouts, "LAYOUTS", ())  # one is enough
    plan, facts, notes = make_plan(
        parse_configs([QLORA, "--plan", "--num_prompts=1000", "--gpu_memory_gb=16"]), pairs=False
    )
    chosen = facts["gradient_checkpointing"]
    assert (chosen["asked"], chosen["on"], facts["fits"]) == ("auto", True, True)
    assert SHARE * 16 < chosen["without_gb"] < SHARE * 40, "off with 40 GB, on with 16"
    assert facts["memory_per_gpu_gb"]["total"] == chosen["with_gb"] < chosen["without_gb"] / 2
    text = describe(plan, facts, notes).splitlines()
    assert text[1] == chosen["summary"]
    largest = f"that fits, with checkpointing on: {facts['largest_max_tokens_per_forward']}"
    assert any(line.endswith(largest) for line in text)


@pytest.mark.parametrize(
    ("recipe", "flags", "free"),
    [("reward_cpu", [], 7), ("reward_cpu", ["--gpu_memory_gb=3"], 3), ("reward_qlora", [], planning.DEFAULT_GPU_GB)],
)
def test_a_plan_looks_at_the_memory_that_the_run_would_have(monkeypatch, recipe, flags, free):
    """That of the machine, unless the plan is for another: there is no GPU here."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(planning, "free_memory_gb", lambda device: 7)
    configs = parse_configs([f"yamls/{recipe}.yaml", "--plan", *flags])
    assert planning._free_gb(configs, planning._gpu_memory_gb(configs.run, [])) == free


def test_a_micro_batch_in_chunks_is_planned_for_full_ones():
    """The longest rows may leave a rest in each forward that shorter ones fill."""
    configs, config, _, _ = prepared("--max_tokens_per_forward=100", "--per_device_train_batch_size=2")
    rows = Dataset.from_list(
        [{"prompt_ids": [1] * 20, "response_ids": [[2] * n] * 2, "scores": [0.0, 1.0]} for n in (4, 30, 28)]
    )
    lengths = [20 + 2 * len(row["response_ids"][0]) for row in rows]
    groups = longest_rows(rows, lengths, 2)
    assert groups == [(20, [30, 30]), (20, [28, 28])]
    estimator = MemoryEstimator(configs, config, groups, accumulates=False, on_gpu=False)
    assert estimator.batch["input_ids"].shape[1] == 79 and estimator.tokens == 100
    assert estimator.footprint("single").phases == estimator.footprint("single", 100).phases
    assert estimator.footprint("single").phases != estimator.footprint("single", 79).phases


def test_a_step_that_does_not_fit_says_what_takes_less(recipe, monkeypatch):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(NCATrainer, "train", full)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        align([str(recipe)], NCATrainer)
    assert "--gradient_checkpointing=true" in raised.value.__notes__[0]
