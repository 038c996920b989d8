"""Sweeps: which arms they have, that no run is run twice, and what they say of them."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from alignment.sweep import running
from tests.scripts import script
from tests.trainers import reward_rows


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model) -> Path:
    """Path of a recipe of two short steps, with a reward function."""
    folder = tmp_path_factory.mktemp("sweep")
    for name, n in (("train", 8), ("eval", 4)):
        rows = [dict(row) for row in reward_rows(n)]
        for i, row in enumerate(rows):
            row["prompt"] = f"{name} {i}"
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "score.py").write_text(
        "def words(prompts, completions, **columns):\n    return [len(c[0]['content'].split()) for c in completions]\n"
    )
    settings = {
        "model_name_or_path": tiny_model, "train_file": f"{folder}/train.jsonl", "eval_file": f"{folder}/eval.jsonl",
        "use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj"], "loss_type": "NCA", "beta": 0.1, "alpha": 0.2,
        "learning_rate": 1e-2, "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4, "seed": 5,
        "save_strategy": "steps", "save_steps": 1, "gradient_checkpointing": False, "report_to": "none",
        "disable_tqdm": True, "reward_function": f"{folder}/score.py:words", "max_new_tokens": 4, "use_cpu": True,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_two_arms_are_run_and_compared(recipe, tmp_path, monkeypatch, capsys, forked_python):
    monkeypatch.setattr(sys, "executable", forked_python)
    words = ["--set", "loss_type=NCA,dpo", "--output_dir", tmp_path / "out", "--jobs", 2]
    assert script(monkeypatch, "sweep.py", recipe, *words) == 0
    printed = capsys.readouterr().out
    assert "dpo: run_preference.py --make_pairs=best_worst\n2 runs, 2 at a time" in printed
    assert "2 of 2  " in printed and "held-out score" in printed
    assert (tmp_path / "out" / "sweep.html").exists()
    assert len(list((tmp_path / "out" / "samples_before").glob("*.json"))) == 1, "drawn once for both"
    assert len(list((tmp_path / "out" / "ref_logps").glob("*.jsonl"))) == 4, "of all responses, and of pairs"
    recipes = {arm: yaml.safe_load((tmp_path / "out" / arm / "seed-5" / "recipe.yaml").read_text())
               for arm in ("NCA", "dpo")}  # fmt: skip
    assert recipes["dpo"]["make_pairs"] == "best_worst" and recipes["dpo"]["loss_type"] == "DPO"
    assert "make_pairs" not in recipes["NCA"]
    monkeypatch.setattr(running.subprocess, "Popen", None)  # nothing is started
    assert script(monkeypatch, "sweep.py", recipe, *words) == 0
    capsys.readouterr()
    assert script(monkeypatch, "sweep.py", recipe, *words, "--set", "learning_rate=0.5") == 2
    assert "has learning_rate 0.01, not 0.5: it is a run with other settings" in capsys.readouterr().err
