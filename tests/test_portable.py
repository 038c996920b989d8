"""What is saved is read by others: transformers 4's names, the tokens that generation stops at, other users."""

import json
import os
import stat
import subprocess

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.conftest import ROOT
from tests.tiny import CHATML, SIZES, save_tiny_model, tiny_tokenizer
from tests.trainers import make_trainer, reward_rows
from trl_nca.portable import make_portable

#: Some of transformers 4; its AutoTokenizer looks for the name with "Fast" behind it too.
CLASSES_OF_4 = {"PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer"}
TEXT = "It is  Paris<|im_end|>, isn't it?\n\n\u00e9"


def saved(folder):
    """A folder's tokenizer_config.json, checked as transformers 4 reads it."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] in CLASSES_OF_4
    assert not {"is_local", "local_files_only"} & config.keys()
    assert isinstance(config.get("extra_special_tokens", {}), dict)
    assert config["chat_template"] == (folder / "chat_template.jinja").read_text()
    return config


@pytest.mark.parametrize("name", sorted(CLASSES_OF_4 | {"TokenizersBackend"}))
def test_a_tokenizer_is_read_as_before_and_by_transformers_4(name, tmp_path):
    base, folder = save_tiny_model(tmp_path / "base"), tmp_path / "saved"
    file = tmp_path / "base" / "tokenizer_config.json"
    given = {"tokenizer_class": name, "extra_special_tokens": ["<|im_start|>"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | given))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)
    before = AutoTokenizer.from_pretrained(folder)
    for _ in range(2):  # a folder that was written so is saved again, and merged
        make_portable(folder)
        config, after = saved(folder), AutoTokenizer.from_pretrained(folder)
        assert after(TEXT)["input_ids"] == before(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
        assert after.chat_template == CHATML
        assert after.all_special_tokens == before.all_special_tokens
        assert "<|im_start|>" in config["additional_special_tokens"]
        assert not config.get("add_bos_token", False), "transformers 4 adds one by default"
        after.save_pretrained(folder)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_type": "default"},
        {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 128},
    ],
)  # fmt: skip
def test_a_model_config_has_the_older_names_too(rope, tmp_path):
    LlamaConfig(rope_parameters=dict(rope), dtype="bfloat16").save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path)
    make_portable(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["rope_theta"], written["torch_dtype"]) == (5e5, "bfloat16")
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert written.get("rope_scaling") == (scaling if len(scaling) > 1 else None)
    after = AutoConfig.from_pretrained(tmp_path)
    assert after.to_dict() == before.to_dict()
    assert after.rope_parameters == rope


@pytest.mark.parametrize("lora", [True, False])
def test_runs_and_checkpoints_are_saved_for_others(tmp_path, lora):
    trainer = make_trainer(tmp_path, reward_rows(4), lora=lora, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.processing_class.eos_token = "<|endoftext|>"  # as base models have it beside a chat template
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        saved(folder)
        assert AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]
        if not lora:
            assert GenerationConfig.from_pretrained(folder).eos_token_id == [0, 2]
            assert json.loads((folder / "config.json").read_text())["rope_theta"] == 10_000.0
            LlamaForCausalLM.from_pretrained(folder)


#: Rotary settings of families that transformers 4 reads differently: `rope_parameters`, other keys of the config.
_ROPE = {"rope_type": "default", "rope_theta": 54_321.0}
_LINEAR = {"rope_type": "linear", "rope_theta": 54_321.0, "factor": 4.0}
_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_LOCAL = {"rope_type": "default", "rope_theta": 321.0}
FAMILIES = {
    "llama": (_ROPE, {}),
    "mistral": (_ROPE, {"sliding_window": 8}),
    "qwen2": (_LINEAR, {}),
    "qwen3": (_ROPE, {}),
    "qwen3_moe": (_ROPE, {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}),
    "phi": (_ROPE | {"partial_rotary_factor": 0.5}, {}),
    "gpt_neox": (_ROPE | {"partial_rotary_factor": 0.5}, {}),
    "gemma3_text": ({"full_attention": _LINEAR, "sliding_attention": _LOCAL}, _KINDS),
    "olmo3": ({"full_attention": _LINEAR, "sliding_attention": _ROPE}, _KINDS),
}


def save_family(name, folder):
    """Writes a tiny model of a family as a run does, with what transformers 5 makes of it."""
    rope, others = FAMILIES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SIZES | {"rope_parameters": json.loads(json.dumps(rope))} | others)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    make_portable(folder)
    keep_expected(folder)


def keep_expected(folder):
    """Writes what transformers 5 makes of a folder beside it, for tests/transformers_4.py."""
    ids = torch.arange(3, 67)[None]
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits.numpy()
    text_ids = tiny_tokenizer()(TEXT)["input_ids"]
    np.savez(folder / "expected.npz", input_ids=ids, logits=logits, text=np.array(TEXT), text_ids=text_ids)


def frequencies_in_4(config, layers="full_attention"):
    """Rotary frequencies that transformers 4.57 takes from a config.json: by its keys and its defaults."""
    family = config["model_type"]
    theta = config.get(*(("rotary_emb_base", 1e4) if family == "gpt_neox" else ("rope_theta", 1e4)))
    part = config.get("rotary_pct", 0.25) if family == "gpt_neox" else config.get("partial_rotary_factor", 1.0)
    scaling = config.get("rope_scaling") or {}
    if layers == "sliding_attention":
        theta, scaling = config.get("rope_local_base_freq", 1e4) if family == "gemma3_text" else theta, {}
    dim = int((config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]) * part)
    return theta ** (-torch.arange(0, dim, 2) / dim) / scaling.get("factor", 1.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_4_reads_the_same_rotary_embeddings(name, tmp_path):
    save_family(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    buffers = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_buffers())
    rotary = {key.split("rotary_emb.")[1]: value for key, value in buffers.items() if "original" not in key
              and "rotary_emb." in key}  # fmt: skip
    for key, expected in rotary.items():
        layers = key.removesuffix("inv_freq").strip("_") or "full_attention"
        torch.testing.assert_close(frequencies_in_4(config, layers), expected)
    assert config.get("num_experts") == config.get("num_local_experts"), "transformers 4's name of it"


@pytest.mark.skipif("TRANSFORMERS_4_PYTHON" not in os.environ, reason="TRANSFORMERS_4_PYTHON names no Python with it")
def test_transformers_4_gives_the_same_logits(tmp_path):
    folders = [tmp_path / name for name in FAMILIES]
    for folder in folders:
        save_family(folder.name, folder)
    run = tmp_path / "run"
    trainer = make_trainer(run, reward_rows(2), lora=False, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    for folder in (run, run / "checkpoint-1"):
        keep_expected(folder)
        folders.append(folder)
    command = [os.environ["TRANSFORMERS_4_PYTHON"], "tests/transformers_4.py", *map(str, folders)]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    for name, found in json.loads(run.stdout).items():
        assert found["same_ids"], name
        assert found["difference"] < 1e-5, name


def test_the_text_half_of_a_model_that_sees_is_read_too(tmp_path):
    text = {"model_type": "gemma3_text", "rope_parameters": {"full_attention": _LINEAR, "sliding_attention": _LOCAL}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    make_portable(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (54_321.0, 321.0)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
@pytest.mark.parametrize("lora", [True, False])
def test_files_are_for_those_whom_the_umask_lets_read(tmp_path, lora, umask):
    before = os.umask(umask)
    try:
        trainer = make_trainer(tmp_path, reward_rows(2), lora=lora, max_steps=1, save_strategy="steps", save_steps=1)
        trainer.train()
        trainer.save_model()
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent for path in files} == {tmp_path, tmp_path / "checkpoint-1"}
    assert any(path.suffix == ".safetensors" for path in files)
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {oct(0o666 & ~umask)}


def test_a_file_of_somebody_else_ends_no_run(tmp_path, monkeypatch):
    (tmp_path / "theirs").touch(mode=0o600)
    monkeypatch.setattr("pathlib.Path.chmod", lambda self, mode: os.chmod("/proc/nowhere", mode))
    make_portable(tmp_path)


def test_an_adapter_names_its_base_for_any_folder(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "adapter_config.json"
    for given, written in ((os.path.relpath(tiny_model), tiny_model), ("org/base", "org/base"), (None, None)):
        file.write_text(json.dumps({"base_model_name_or_path": given}))
        make_portable(tmp_path)
        assert json.loads(file.read_text())["base_model_name_or_path"] == written


def test_a_process_that_saves_nothing_rewrites_nothing(tmp_path, monkeypatch):
    """Others write while it would read."""
    trainer = make_trainer(tmp_path / "run", reward_rows(2))
    seen = []
    monkeypatch.setattr("trl_nca.checkpoints.make_portable", seen.append)
    trainer.save_model(str(tmp_path / "a"))
    monkeypatch.setattr(type(trainer.args), "should_save", False)
    trainer.save_model(str(tmp_path / "b"))
    assert seen == [str(tmp_path / "a")]
