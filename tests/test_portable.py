"""What is saved is read by others: transformers 4's names, the tokens that generation stops at."""

import json

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from tests.tiny import CHATML, save_tiny_model, tiny_tokenizer
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


def test_a_process_that_saves_nothing_rewrites_nothing(tmp_path, monkeypatch):
    """Others write while it would read."""
    trainer = make_trainer(tmp_path / "run", reward_rows(2))
    seen = []
    monkeypatch.setattr("trl_nca.checkpoints.make_portable", seen.append)
    trainer.save_model(str(tmp_path / "a"))
    monkeypatch.setattr(type(trainer.args), "should_save", False)
    trainer.save_model(str(tmp_path / "b"))
    assert seen == [str(tmp_path / "a")]
