"""Safe by default: no code from a model's folder, no pickles, no network, no secrets in what a run writes."""

import json
import os
import socket

import pytest
import torch
import yaml
from huggingface_hub import constants
from transformers import LlamaForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from alignment.errors import UserError
from alignment.models import load_trained_model
from alignment.recipe import read_yaml
from nca_trainer import NCAConfig, NCATrainer, PairwiseNCATrainer
from run_reward import align
from tests.tiny import tiny_config, tiny_tokenizer
from tests.trainers import make_trainer, pair_rows, reward_rows


@pytest.fixture
def recipe(tmp_path, tiny_model):
    """Path of a recipe of one step."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reward_rows(6)))
    settings = {
        "model_name_or_path": tiny_model, "train_file": f"{tmp_path}/train.jsonl", "output_dir": f"{tmp_path}/out",
        "use_peft": True, "lora_target_modules": ["q_proj"], "max_steps": 1, "per_device_train_batch_size": 2,
        "save_strategy": "steps", "save_steps": 1, "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "recipe.yaml"


def reward(recipe, *flags):
    align([str(recipe), *flags], NCATrainer)


@pytest.mark.parametrize("trainer_class", [NCATrainer, PairwiseNCATrainer])
def test_no_telemetry_is_sent(tmp_path, monkeypatch, trainer_class):
    """Whatever the environment says: upstream asks it before it sends."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    sent = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *args, **kwargs: sent.append(args))
    rows = reward_rows(2) if trainer_class is NCATrainer else pair_rows(2)
    make_trainer(tmp_path, rows, trainer_class)
    assert not sent
    make_trainer(tmp_path, pair_rows(2), DPOTrainer, DPOConfig)
    assert sent, "upstream's own trainer does: this test can fail"


def test_code_beside_a_model_is_not_run(recipe, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(UserError, match="brings code of its own; read it, then set trust_remote_code: true"):
        reward(recipe, f"--model_name_or_path={folder}")
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_loaded(recipe, tmp_path):
    folder = tmp_path / "model"
    model = LlamaForCausalLM(tiny_config())
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        reward(recipe, f"--model_name_or_path={folder}")
    with pytest.raises(UserError, match="safetensors"):
        load_trained_model(str(folder))


def test_a_pickled_adapter_is_not_loaded(recipe, tmp_path):
    reward(recipe)
    (tmp_path / "out" / "adapter_model.safetensors").rename(tmp_path / "out" / "adapter_model.bin")
    with pytest.raises(UserError, match="no adapter_model.safetensors; only safetensors are loaded"):
        load_trained_model(str(tmp_path / "out"))


def test_yaml_makes_no_objects(tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"beta: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    with pytest.raises(UserError, match="not valid YAML"):
        read_yaml(str(tmp_path / "recipe.yaml"))
    assert not (tmp_path / "made").exists()


def test_a_run_offline_asks_no_one(recipe, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: asked.append(args) or [])
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    reward(recipe)
    assert not asked


def test_tokens_are_written_nowhere(recipe, tmp_path, capfd):
    secret = "hf_" + "s3cr3t" * 4
    reward(recipe, f"--hub_token={secret}", f'--model_init_kwargs={{"token": "{secret}"}}')
    printed = capfd.readouterr()
    assert secret not in printed.out + printed.err
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert secret.encode() not in path.read_bytes(), path
    assert "token" not in yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text()).get("model_init_kwargs", {})


def test_no_tracker_unless_asked_and_then_it_gets_the_recipe(recipe, tmp_path, monkeypatch):
    assert NCAConfig(output_dir="x").report_to == []
    logged = []

    class Tracker(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            logged.append(args.to_dict())

    class WithTracker(NCATrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, callbacks=[Tracker()], **kwargs)

    align([str(recipe), "--beta=0.25"], WithTracker)
    (seen,) = logged
    assert seen["recipe"] == yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert seen["recipe"]["beta"] == 0.25
    assert seen["recipe"]["train_file"] == f"{tmp_path}/train.jsonl"


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named(recipe, tracker, monkeypatch):
    monkeypatch.setattr("trl_nca.config.get_available_reporting_integrations", list)
    with pytest.raises(UserError, match=f"^--report_to={tracker}: {tracker} is not installed"):
        reward(recipe, f"--report_to={tracker}")
