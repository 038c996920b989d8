"""Rounds of on-policy alignment, and the table that they end with."""

import json
import os
import subprocess
import sys

import pytest

from alignment.errors import UserError
from alignment.report.tables import rounds_table
from tests.conftest import ROOT
from tests.scripts import save_stopping_model


def scored(means, first="p0"):
    texts = [first, *(f"p{i}" for i in range(1, len(means)))]
    prompts = [[{"role": "user", "content": text}] for text in texts]
    scores = [[mean - 0.1, mean + 0.1] for mean in means]
    return [{"prompt": p, "samples": ["a"] * 2, "scores": s} for p, s in zip(prompts, scores, strict=True)]


def test_the_table_of_rounds_says_what_the_intervals_show():
    start = [0.5, 0.6, 0.4, 0.5] * 10
    up = [mean + 0.2 for mean in start]
    noise = [mean + shift for mean, shift in zip(up, [0.1, -0.1, 0.1, -0.1] * 10, strict=True)]
    header, *lines = rounds_table([scored(means) for means in (start, up, noise, start)]).splitlines()
    assert header.split("  ")[0] == "round"
    assert lines[0].startswith("start  0.500 [")
    assert "0.700 [" in lines[1]
    assert lines[1].endswith("+0.200 [+0.200, +0.200]          improved")
    assert lines[2].startswith("2 ")
    assert lines[2].endswith("NOT SHOWN to improve")
    assert lines[3].endswith("WORSE")
    with pytest.raises(UserError, match="round 1 was sampled on other prompts"):
        rounds_table([scored(start), scored(start, first="another")])


def test_rounds_from_samples_to_the_next_model(tmp_path, forked_python):
    model = save_stopping_model(tmp_path / "model")
    for name, asked in [("train", "What"), ("eval", "Where")]:
        rows = [{"prompt": f"{asked} is {i}?", "responses": ["a", "b"], "scores": [1, 0]} for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text(
        "def e(completions, **columns):\n    return [c[0]['content'].count('e') for c in completions]\n"
    )
    (tmp_path / "recipe.yaml").write_text(f"""
model_name_or_path: {model}
train_file: {tmp_path}/train.jsonl
eval_file: {tmp_path}/eval.jsonl
reward_function: {tmp_path}/reward.py:e
use_peft: true
lora_target_modules: [q_proj, v_proj]
loss_type: NCA
learning_rate: 1.0e-2
max_steps: 1
max_new_tokens: 12
num_eval_samples: 2
gradient_checkpointing: false
report_to: none
use_cpu: true
""")
    command = ["bash", f"{ROOT}/alignment-handbook/scripts/iterate.sh", f"{tmp_path}/recipe.yaml"]
    env = os.environ | {"PYTHON": forked_python, "MIN_RESPONSES": "2", "NUM_SAMPLES": "4", "MAX_NEW_TOKENS": "16"}
    out = tmp_path / "rounds"

    def iterate(rounds, **changed):
        return subprocess.run([*command, str(rounds), str(out), "--per_device_train_batch_size=2"], env=env | changed,
                              capture_output=True, text=True, timeout=300)  # fmt: skip

    first = out / "round-1"
    one = iterate(1)
    assert one.returncode == 0, one.stderr[-3000:]
    assert [line.split()[0] for line in one.stdout.splitlines()[-3:]] == ["round", "start", "1"]
    samples = [json.loads(line) for line in (first / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"][0]["content"] for row in samples] == [f"What is {i}?" for i in range(6)]
    assert f"train_file: {first}/train.jsonl" in (first / "run" / "recipe.yaml").read_text()
    assert (first / "merged" / "model.safetensors").exists()

    # A Python that only reads the recipe: it shows what would be run next.
    recorder = tmp_path / "python"
    recorder.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\necho "$@" >&2\nexit 3\n')
    recorder.chmod(0o755)
    two = iterate(2, PYTHON=str(recorder))
    assert two.returncode == 3
    (launched,) = two.stderr.splitlines()  # of round 1, nothing is done again
    assert launched.endswith("--seed 2 --finished_only")
    assert f"sample.py {tmp_path}/train.jsonl --model_name_or_path {first}/merged --output {out}/round-2/" in launched
    other = iterate(2, NUM_SAMPLES="5")
    assert other.returncode == 2
    assert "holds rounds with other settings" in other.stderr
