"""The entry scripts on a tiny model: whole runs, what they leave behind, and what a user's mistake gets."""

import gzip
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from alignment import errors
from alignment.errors import UserError
from nca_trainer import NCATrainer, PairwiseNCATrainer
from run_reward import align
from tests.conftest import ROOT, SHARED, needs_shared
from tests.trainers import text


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder with reward rows of K = 2 to 5 (train, eval), pairs, and a reward function."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for name, n in [("train", 24), ("eval", 5)]:
        with open(folder / f"{name}.jsonl", "w") as rewards, open(folder / f"{name}_pairs.jsonl", "w") as pairs:
            for i in range(n):
                texts = [text(rng, 12) for _ in range(2 + i % 4)]
                row = {"prompt": text(rng, 9), "responses": texts, "scores": [rng.random() for _ in texts]}
                rewards.write(json.dumps(row) + "\n")
                pairs.write(json.dumps({"prompt": row["prompt"], "chosen": texts[0], "rejected": texts[1]}) + "\n")
    (folder / "score.py").write_text(
        "def words(prompts, completions, **columns):\n    return [len(c[0]['content'].split()) for c in completions]\n"
    )
    return folder


@pytest.fixture
def recipe(tmp_path, data, tiny_model):
    """Path of a recipe of six short steps; `out` beside it is its output folder."""
    settings = {
        "model_name_or_path": tiny_model,
        "train_file": str(data / "train.jsonl"), "eval_file": str(data / "eval.jsonl"),
        "output_dir": str(tmp_path / "out"), "use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"],
        "loss_type": "NCA", "beta": 0.1, "alpha": 0.2, "learning_rate": 1e-2, "max_steps": 6, "logging_steps": 1,
        "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3, "gradient_checkpointing": False,
        "report_to": "none", "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def reward(recipe, *flags):
    align([str(recipe), *flags], NCATrainer)


def preference(recipe, *flags):
    align([str(recipe), *flags], PairwiseNCATrainer)


def losses(folder):
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def shell(command, **env):
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=300)


def test_a_whole_run_and_what_it_leaves(recipe, data, capsys):
    out = recipe.parent / "out"
    reward(recipe, f"--reward_function={data}/score.py:words", "--max_new_tokens=5", "--num_eval_samples=2")
    printed = capsys.readouterr().out
    assert printed.startswith("Loss: NCA, beta 0.1, alpha 0.2\n")
    assert "Global batch: 4 per device x 1 accumulation x 1 processes = 4 prompts a step" in printed
    assert "train: 24 of 24 rows kept" in printed
    (line,) = re.findall("^step 2/6 .*", printed, re.M)
    assert re.fullmatch(
        r"step 2/6  loss 1\.\d{3}  margin [+-].*  acc \d\.\d\d  lr 8\.3e-03 .* tok/s  \d\d:\d\d left", line
    )
    assert re.search("^eval 6/6  loss 1.*  acc", printed, re.M)
    assert "{'" not in printed and "train_runtime" not in printed
    for line in ("held-out score (95 %)", "difference (95 %)", "verdict", "mean length", "log p(best response)",
                 "seconds", "peak memory", "files",
                 "talk to it  ", f"scripts/chat.py {out}\n",
                 "merge it  ", f"scripts/merge.py {out} --output {out}-merged"):  # fmt: skip
        assert line in printed
    names = {path.name for path in out.iterdir()}
    assert {
        "recipe.yaml", "plan.json", "data_report.json", "trainer_state.json", "train_results.json", "eval_results.json",
        "samples_before.json", "samples_after.json", "README.md", "adapter_model.safetensors", "tokenizer.json",
        "chat_template.jinja", "checkpoint-3", "checkpoint-6",
    } <= names  # fmt: skip
    assert json.loads((out / "plan.json").read_text())["num_steps"] == 6
    assert yaml.safe_load((out / "recipe.yaml").read_text())["beta"] == 0.1
    assert losses(out)[0] == pytest.approx(1.3863, abs=1e-4)
    samples = json.loads((out / "samples_after.json").read_text())
    assert len(samples) == 5
    assert all(len(row["samples"]) == len(row["scores"]) == 2 for row in samples)
    results = json.loads((out / "train_results.json").read_text())
    assert results["eval"]["eval_loss"] > 0
    assert results["samples"]["num_prompts"] == 5
    card = (out / "README.md").read_text()
    for line in ("library_name: peft", "# out", "beta: 0.1", "| held-out score |", "24 of 24 rows kept"):
        assert line in card


def test_a_finished_run_is_not_overwritten_unasked(recipe, capsys):
    reward(recipe, "--max_steps=1")
    marker = recipe.parent / "out" / "plan.json"
    before = marker.read_bytes()
    with pytest.raises(UserError, match="holds a finished run"):
        reward(recipe, "--max_steps=2")
    capsys.readouterr()
    reward(recipe, "--show_batch=true")
    assert "response 2, score" in capsys.readouterr().out, "to look is no run"
    assert marker.read_bytes() == before
    reward(recipe, "--max_steps=2", "--overwrite_output_dir=true")
    assert json.loads(marker.read_text())["num_steps"] == 2


def test_resumed_equals_uninterrupted(recipe, tmp_path):
    reward(recipe)
    whole, out = losses(tmp_path / "out"), tmp_path / "killed"
    reward(recipe, f"--output_dir={out}")
    (out / "train_results.json").unlink()
    for path in (out / "checkpoint-6").iterdir():  # as if the machine had died after step 3
        path.unlink()
    (out / "checkpoint-6").rmdir()
    with pytest.raises(UserError, match="unfinished run; resume it with --resume_from_checkpoint=true"):
        reward(recipe, f"--output_dir={out}")
    reward(recipe, f"--output_dir={out}", "--resume_from_checkpoint=true")
    assert losses(out) == pytest.approx(whole, abs=1e-6)
    assert (out / "train_results.json").exists()
    reward(recipe, f"--output_dir={tmp_path / 'third'}", f"--resume_from_checkpoint={tmp_path}/out/checkpoint-3")
    assert losses(tmp_path / "third") == pytest.approx(whole, abs=1e-6)
    assert (tmp_path / "third" / "recipe.yaml").exists()


@pytest.mark.parametrize("loss", ["NCA", "dpo", "InfoNCA", "biasednca"])
def test_preference_losses(recipe, data, loss):
    preference(
        recipe, f"--train_file={data}/train_pairs.jsonl", f"--eval_file={data}/eval_pairs.jsonl", f"--loss_type={loss}",
        "--max_steps=2",
    )  # fmt: skip
    start = {"nca": 1.38629, "biasednca": 1.38629, "dpo": 0.69315, "infonca": 0.69315}[loss.lower()]
    assert losses(recipe.parent / "out")[0] == pytest.approx(start, abs=1e-5)


def sampling(data):
    return [f"--reward_function={data}/score.py:words", "--max_new_tokens=5", "--num_eval_samples=2"]


def divergence(recipe):
    return json.loads((recipe.parent / "out" / "eval_results.json").read_text())["samples"]["kl"]


def test_full_finetuning_writes_a_model(recipe, data, capsys):
    reward(recipe, "--use_peft=false", "--max_steps=2", "--learning_rate=1e-4", *sampling(data))
    assert (recipe.parent / "out" / "model.safetensors").exists()
    assert "merge it" not in capsys.readouterr().out
    assert divergence(recipe) != 0


def test_qlora_on_a_cpu(recipe, data):
    reward(recipe, "--load_in_4bit=true", "--max_steps=2", "--optim=paged_adamw_32bit", *sampling(data))
    assert losses(recipe.parent / "out")[0] == pytest.approx(1.3863, abs=1e-4)
    assert (recipe.parent / "out" / "adapter_model.safetensors").exists()
    assert divergence(recipe) != 0


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--temperature=0"], "at temperature 0"),
        (["--use_peft=false", "--precompute_ref_log_probs=true"], "no reference is kept"),
    ],
)
def test_where_no_divergence_can_be_measured_there_is_none(recipe, data, tmp_path, capsys, caplog, flags, reason):
    reward(recipe, *flags, "--max_steps=1", f"--ref_logps_dir={tmp_path}", *sampling(data))
    assert divergence(recipe) is None
    assert "KL from the reference  -\n" in capsys.readouterr().out
    assert f"No KL divergence from the reference is measured: {reason}" in caplog.text


def test_without_held_out_rows(recipe, data, tmp_path):
    settings = yaml.safe_load(recipe.read_text())
    del settings["eval_file"]
    recipe.write_text(yaml.safe_dump(settings | {"eval_strategy": "steps"}))
    reward(recipe, "--max_steps=1")
    assert json.loads((tmp_path / "out" / "train_results.json").read_text())["eval"] is None


def test_show_batch_prints_a_group_and_stops(recipe, capsys):
    reward(recipe, "--show_batch=true")
    printed = capsys.readouterr().out
    assert "<|im_start|>user" in printed
    assert "response 2, score" in printed
    assert not (recipe.parent / "out").exists()


@needs_shared
@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("alpacaeval_reward", reward),
        ("alpacaeval_ragged", reward),
        ("ultrafeedback_format", reward),
        ("pairwise", reward),
        ("pairwise", preference),
    ],
)
def test_shared_formats_train(recipe, tmp_path, name, start):
    files = []
    for part in ("train", "eval"):
        files.append(f"--{part}_file={tmp_path}/{part}.jsonl")
        with gzip.open(SHARED / f"data/{name}_{part}.jsonl.gz", "rt") as rows:
            (tmp_path / f"{part}.jsonl").write_text("".join(itertools.islice(rows, 40)))
    limits = ["--max_steps=1", "--max_length=200", "--max_prompt_length=64", "--per_device_train_batch_size=2"]
    start(recipe, *files, *limits, "--per_device_eval_batch_size=64")
    assert losses(tmp_path / "out")[0] == pytest.approx(1.3863, abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_dir="], "^output_dir: is empty or not given"),
        (["--betta=1"], "unknown flag --betta; did you mean --beta"),
        (["--loss_type=foo"], "unknown loss"),
        (
            ["--loss_type=DPO"],
            "DPO compares 2 responses, and .*train.jsonl, line 2 has 3; .* or set make_pairs: best_worst",
        ),
        (["--model_name_or_path=models/nowhere"], "'models/nowhere' is neither a folder with a model nor a Hub id"),
        (["--train_file=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--max_length=5"], "train: 24 of 24 rows had to be dropped .prompt_too_long 24"),
        (["--per_device_train_batch_size=0"], "^--per_device_train_batch_size=0: must be at least 1"),
        (["--attn_implementation=nope"], "cannot be trained with these settings: .*nope"),
        (["--lora_target_modules=nope"], "cannot be trained with these settings: .*nope"),
        (["--reward_function=nowhere.py:f"], "names no file"),
        (["--chat_template=nowhere.jinja"], "no such file"),
        (
            ["--chat_template=chatml"],
            "chat_template: no such file chatml, and a Jinja template has {{ }} or {% %} in it",
        ),
        (["--chat_template=LICENSE"], "chat_template: LICENSE holds no Jinja template"),
        (["--chat_template_kwargs=true"], "chat_template_kwargs are no mapping: 'true'"),
        (['--chat_template_kwargs={"a b": 1}'], "'a b': 1 cannot be set"),
        (['--chat_template_kwargs={"tools": []}'], "tools cannot be set"),
        (['--chat_template_kwargs={"a": NaN}'], "'a': nan cannot be set"),
        (['--chat_template_kwargs={"enable_thinking": false}'], "the chat template reads no enable_thinking"),
        (["--resume_from_checkpoint=/nowhere"], "holds no checkpoint"),
        (["--model_name_or_path=org/name"], "loaded .offline, HF_HUB_OFFLINE is set, and it is not in the cache"),
        (["--train_file=org/name"], "org/name: no such file; .* Hub id, the Hub is not asked, HF_HUB_OFFLINE is set"),
        (["--train_file=", '--dataset_mixer={"org/name": 1}', "--eval_file="], "org/name: .*; offline, HF_HUB_OFFLINE"),
        (["--push_to_hub=true"], "^push_to_hub: offline, HF_HUB_OFFLINE is set"),
    ],
)
def test_mistakes_end_the_run_before_anything_is_written(recipe, flags, message):
    with pytest.raises(UserError, match=message):
        reward(recipe, *flags)
    assert not (recipe.parent / "out").exists()


def test_an_upload_that_fails_is_not_the_models_fault(recipe, monkeypatch):
    monkeypatch.setattr("alignment.job.is_offline_mode", lambda: False)
    with pytest.raises(UserError, match="^push_to_hub: the Hub makes no repository: .*offline"):
        reward(recipe, "--push_to_hub=true")


def test_exit_code_two_and_one_line(recipe):
    run = shell([sys.executable, "run_reward.py", str(recipe), "--los_type=NCA"])
    assert run.returncode == 2
    assert run.stderr == "error: unknown flag --los_type; did you mean --loss_type?\n"
    assert run.stdout == ""


def test_a_bad_row_is_named(recipe, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "responses": ["a", "b"], "scores": [1, null]}')
    with pytest.raises(SystemExit) as stopped:
        errors.run(lambda: reward(recipe, f"--train_file={tmp_path}/bad.jsonl"))
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "bad.jsonl, line 1: 1 usable response (after missing_score)" in line
