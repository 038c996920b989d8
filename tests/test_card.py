"""The model card: what the Hub reads of it, how to use the model, and what was set for the run."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from alignment.report.card import find_hub_name, write_card
from tests.tiny import save_tiny_model, tiny_tokenizer
from trl_nca.portable import make_portable


def head_of(folder):
    return yaml.safe_load((Path(folder) / "README.md").read_text().split("---\n")[1])


@pytest.mark.parametrize(
    ("path", "config", "name"),
    [
        ("base", {}, None),
        ("base", {"_name_or_path": "org/model"}, "org/model"),
        ("base", {"_name_or_path": "models/mine"}, None),
        ("base", {"_name_or_path": "/home/me/model"}, None),
        ("models--org--a--b/snapshots/0123", {}, "org/a--b"),
    ],
)
def test_a_folder_is_named_as_the_hub_knows_it(tmp_path, path, config, name):
    folder = tmp_path / path
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    assert find_hub_name(str(folder)) == name
    assert find_hub_name("org/model") == "org/model"
    assert find_hub_name("/home/me/model") is None, "a folder that has moved"


def test_what_the_hub_reads(tmp_path, monkeypatch):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    (base / "config.json").write_text('{"_name_or_path": "org/model"}')
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# model\n")
    (tmp_path / "rows.jsonl").touch()
    mixer = {"org/rows": 1.0, str(tmp_path / "rows.jsonl"): 0.5}
    (out / "recipe.yaml").write_text(yaml.safe_dump({"dataset_mixer": mixer}))
    write_card(out, str(base))
    head = head_of(out)
    assert (head["base_model"], head["base_model_relation"]) == ("org/model", "finetune")
    assert (head["license"], head["datasets"]) == ("apache-2.0", ["org/rows"])
    write_card(tmp_path, str(out))  # aligned further, from the model that this card is of
    assert head_of(tmp_path)["base_model"] == "org/model"
    assert "license" in head_of(tmp_path)
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    write_card(out, str(base))
    assert "license" not in head_of(out)


@pytest.mark.parametrize("lora", [True, False])
def test_the_code_of_a_card_runs(tmp_path, lora, monkeypatch, capsys):
    base = save_tiny_model(tmp_path / "base")
    folder = tmp_path / "mine"
    if lora:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", r=20))
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        make_portable(folder)
        (folder / "recipe.yaml").write_text("lora_r: 20\n")
    else:
        save_tiny_model(folder)
    write_card(folder, base)
    card = (folder / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(re.search(r"```python\n(.*?)```", card, re.S)[1].replace("256", "3"), {})
    assert capsys.readouterr().out.strip()
    served = f"vllm serve {base} --enable-lora --max-lora-rank 32 --lora-modules mine=mine" if lora else "serve mine\n"
    assert served in card
    assert "docs/serving.md" in card


def test_results_of_samples_and_of_runs_before_there_were_more(tmp_path):
    samples = {
        "score_before": 0.3,
        "score_after": 0.5,
        "score_difference": 0.2,
        "score_difference_interval": [0.1, 0.3],
    }
    more = {"length_controlled_difference": 0.15, "length_controlled_difference_interval": [0.05, 0.25], "kl": 1.5,
            "kl_interval": [1.25, 1.75]}  # fmt: skip
    for found, shown in ((samples, False), (samples | more, True), (samples | more | {"kl": None}, True)):
        (tmp_path / "eval_results.json").write_text(json.dumps({"eval": None, "samples": found}))
        write_card(tmp_path, "org/model")
        card = (tmp_path / "README.md").read_text()
        assert "| its difference (95 %) | 0.200 [0.100, 0.300] |" in card
        assert ("| the same, at the start's length (95 %) | 0.150 [0.050, 0.250] |" in card) == shown
        assert ("| KL from the reference (95 %) | 1.50 [1.25, 1.75] nats a response |" in card) == bool(found.get("kl"))


def test_what_was_set_is_told_from_defaults(tmp_path):
    (tmp_path / "recipe.yaml").write_text("beta: 0.25\nloss_type: NCA\nseed: 42\nlearning_rate: 0.5\n")
    (tmp_path / "figures").mkdir()
    for name in ("speed", "rewards", "margin", "another_one"):
        (tmp_path / "figures" / f"{name}.png").touch()
    write_card(tmp_path, "org/model")
    card = (tmp_path / "README.md").read_text()
    own, folded = re.findall(r"```yaml\n(.*?)```", card, re.S)
    assert yaml.safe_load(own) == {"beta": 0.25, "learning_rate": 0.5}
    assert yaml.safe_load(folded) == {"loss_type": "NCA", "seed": 42}
    assert "2 keys at their defaults" in card
    names = re.findall(r"!\[[A-Z].*?\]\(figures/(\w+)\.png\)\n\n\*[A-Z].*\.\*", card)
    assert names == ["rewards", "margin", "speed", "another_one"]
    assert card.index("margin.png") < card.index("<summary>More figures") < card.index("speed.png")
