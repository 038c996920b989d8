"""The same result however it is launched: one process is the measure that every launch is held to.

`STEPS=20 pytest tests/test_launches.py -n 0 -rP` prints the largest differences, for benchmarks/RESULTS.md.
"""

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file

from nca_trainer import NCATrainer, PairwiseNCATrainer
from run_reward import align
from tests.conftest import ROOT
from tests.forked import start
from tests.launch_runs import fork_launches, free_port
from tests.scripts import documentation
from tests.trainers import text

CONFIGS = ROOT / "alignment-handbook" / "recipes" / "accelerate_configs"
SLURM = ROOT / "alignment-handbook" / "recipes" / "slurm.sh"
RUNS = {
    "lora": [],
    "full": ["--use_peft=false", "--learning_rate=1e-3"],
    "pairs": ["--make_pairs=best_worst", "--loss_type=DPO", "--sft_weight=0.2"],
}
MIXED = ["--gradient_checkpointing=true", "--max_tokens_per_forward=70"]
STEPS = int(os.environ.get("STEPS", 10))  # two epochs
#: Largest difference from one process, by the beginning of what is logged; of anything else, 1e-4.
TOLERANCES = {"logps": 1e-3, "eval_logps": 1e-3}  # sums of some 20 log-probs, around -100
NOT_COMPARED = ("runtime", "per_second", "total_flos")

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs `make deepspeed`")


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny_model):
    """Folder with rows of K = 2 to 5 and a recipe of two epochs by 8 prompts, in float32."""
    folder, rng = tmp_path_factory.mktemp("launches"), random.Random(0)
    for name, n in [("train", 40), ("eval", 5), ("unweighted", 40)]:
        with open(folder / f"{name}.jsonl", "w") as rows:
            for i in range(n):
                texts = [text(rng, 12) for _ in range(2 + i % 4)]
                row = {"prompt": text(rng, 9), "responses": texts, "scores": [rng.random() for _ in texts]}
                row |= {"weight": 0.5 + i % 3} if i % 4 and name != "unweighted" else {}  # some have none
                rows.write(json.dumps(row) + "\n")
    settings = {
        "model_name_or_path": tiny_model, "use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"],
        "train_file": str(folder / "train.jsonl"), "eval_file": str(folder / "eval.jsonl"), "dataset_num_proc": 1,
        "beta": 0.1, "alpha": 0.2, "learning_rate": 1e-2, "max_steps": STEPS, "global_batch_size": 8,
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "gradient_checkpointing": False,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder


def command(work, name, *flags):
    return [str(work / "recipe.yaml"), f"--output_dir={work / name}", *flags]


@pytest.fixture(scope="module")
def one_process(work):
    """What one process logs and saves, by LoRA and by full fine-tuning."""
    for run, flags in RUNS.items():
        trainer = PairwiseNCATrainer if run == "pairs" else NCATrainer
        align(command(work, run, *flags, "--per_device_train_batch_size=8"), trainer)
    return {run: outcome(work / run) for run in RUNS}


def outcome(folder):
    """What was logged, and the weights that were saved."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    held_out = json.loads((folder / "train_results.json").read_text())["eval"]
    (file,) = folder.glob("*model.safetensors")
    return [entry for entry in history if "loss" in entry] + [held_out], load_file(file)


def assert_same(launch, folder, expected):
    logged, weights = outcome(folder)
    logged_by_one, weights_of_one = expected
    assert len(logged) == STEPS + 1
    assert [set(entry) for entry in logged] == [set(entry) for entry in logged_by_one]
    furthest = {}
    for ours, theirs in zip(logged, logged_by_one, strict=True):
        for key in ours:
            if not any(word in key for word in NOT_COMPARED):
                furthest[key] = max(furthest.get(key, 0), abs(ours[key] - theirs[key]))
    assert set(weights) == set(weights_of_one)
    furthest["weights"] = max(float((w - weights_of_one[name]).abs().max()) for name, w in weights.items())
    moved = [entry["loss"] for entry in logged_by_one[:-1]]
    assert max(moved) - min(moved) > 0.05, "nothing was learned, so nothing was compared"
    largest = max((key for key in furthest if key not in ("loss", "weights")), key=furthest.get)
    print(
        f"| {launch} | {folder.name} | {furthest['loss']:.1e} | {furthest['weights']:.1e} | "
        f"{furthest['eval_loss']:.1e} | {furthest[largest]:.1e} ({largest}) |"
    )
    for key, difference in furthest.items():
        tolerance = next((t for start, t in TOLERANCES.items() if key.startswith(start)), 1e-4)
        assert difference <= tolerance, f"{launch}, {folder.name}: {key}"


@pytest.mark.parametrize(
    "flags",
    [
        ["--per_device_train_batch_size=1"],
        ["--shared_prompt=false"],
        ["--max_tokens_per_forward=70"],
        ["--gradient_checkpointing=true"],
        ["--precompute_ref_log_probs=true"],
    ],
    ids=["accumulation", "padded", "chunks", "checkpointing", "cached-reference"],
)
def test_one_process_otherwise(work, one_process, tmp_path, flags):
    align(command(work, tmp_path / "lora", *flags, f"--ref_logps_dir={tmp_path}/ref"), NCATrainer)
    assert_same(" ".join(flags), tmp_path / "lora", one_process["lora"])


def shell(arguments, **env):
    env = os.environ | {"PYTHONPATH": str(ROOT)} | env
    run = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return run.stdout


def write_runs(work, launch, folder):
    """A file for launch_runs.py: LoRA by `auto`, full fine-tuning with checkpointing and in chunks; with DDP, pairs."""
    runs = [
        command(work, folder / "lora", "--gradient_checkpointing=auto"),
        command(work, folder / "full", *RUNS["full"], *MIXED),
    ]
    if launch == "multi_gpu":
        cached = ["--precompute_ref_log_probs=true", f"--ref_logps_dir={folder}/ref"]
        runs.append(command(work, folder / "pairs", *RUNS["pairs"], *cached))
    (work / f"{launch}.json").write_text(json.dumps(runs))
    return str(work / f"{launch}.json")


def assert_launched(launch, folder, expected, processes, sharded):
    for run in [run for run in RUNS if (folder / run).exists()]:
        facts = [json.loads(file.read_text()) for file in sorted((folder / run).glob("rank_*.json"))]
        assert len(facts) == processes == facts[0]["processes"]
        kind = {"fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}
        assert facts[0]["type"] == kind.get(launch.split()[0], "MULTI_CPU")
        for fact in facts:
            assert (fact["local"] < 0.7 * fact["whole"]) == sharded, "a process holds all weights"
        plan = json.loads((folder / run / "plan.json").read_text())
        assert plan.get("gradient_checkpointing", {"on": False})["on"] is False, "the tiny model fits without"
        assert_same(f"{launch}, {processes} processes", folder / run, expected[run])


@pytest.mark.parametrize(
    "launches",
    [
        {"multi_gpu": 2, "multi_cpu": 4},
        {"fsdp2": 4},
        pytest.param({"deepspeed_zero2": 2}, marks=needs_deepspeed),
    ],
    ids=",".join,
)
def test_processes(work, one_process, tmp_path, launches):
    arguments = []
    for config, n in launches.items():
        launch = [f"--config_file={CONFIGS / config}.yaml", f"--num_processes={n}"]
        arguments.append([launch, write_runs(work, config, tmp_path / config)])
    child = start(fork_launches, arguments, log=tmp_path / "log")
    child.join(600)
    assert child.exitcode == 0, (tmp_path / "log").read_text()[-4000:]
    for config, n in launches.items():
        assert_launched(config, tmp_path / config, one_process, n, sharded=config == "fsdp2")
        if config == "multi_gpu":
            cached = list((tmp_path / config / "ref").iterdir())
            assert len(cached) == 2, "a file for the training rows, one for the held-out ones, of both processes"


def test_fsdp2_shards_4_bit_weights_and_runs_the_reference_on_them(work, tmp_path):
    """Loaded on the CPU; a reference that runs before training is sharded as well, and gives what it gives later.

    Offload changes no number. (Without a GPU nothing moves: this is the way through the trainer.)
    """
    flags = ["--load_in_4bit=true", "--bnb_4bit_quant_storage=bfloat16", "--dtype=bfloat16", "--bf16=true"]
    flags += [f"--train_file={work}/unweighted.jsonl"]  # so that the loss of the first step is 2 log 2
    of_cache = ["--precompute_ref_log_probs=true", f"--ref_logps_dir={tmp_path}/ref"]
    online, cached, offload = (command(work, tmp_path / run, *flags) for run in ("online", "cached", "offload"))
    launches = []
    for config, runs in [("fsdp2_qlora", [online, [*cached, *of_cache]]), ("fsdp2_offload", [offload])]:
        (tmp_path / f"{config}.json").write_text(json.dumps([[*run, "--max_steps=2"] for run in runs]))
        arguments = [f"--config_file={CONFIGS}/{config}.yaml", "--num_processes=2"]
        launches.append((arguments, str(tmp_path / f"{config}.json")))
    child = start(fork_launches, launches, log=tmp_path / "log")
    child.join(600)
    assert child.exitcode == 0, (tmp_path / "log").read_text()[-4000:]
    logs = {}
    for run in ("online", "cached", "offload"):
        logs[run] = [
            {k: v for k, v in entry.items() if not any(word in k for word in NOT_COMPARED)}
            for entry in outcome(tmp_path / run)[0]
        ]
        facts = json.loads((tmp_path / run / "rank_1.json").read_text())
        for held in (facts, facts["reference"]):
            assert held["local"] < 0.7 * held["whole"], "a process holds all weights"
    assert logs["online"] == logs["cached"] == logs["offload"]
    assert logs["online"][0]["loss"] == pytest.approx(1.3863, abs=1e-4) and logs["online"][1]["grad_norm"] > 0


@needs_deepspeed
def test_launched_with_zero3(work, one_process, tmp_path):
    runs = write_runs(work, "zero3", tmp_path)
    launch = ["--config_file", str(CONFIGS / "deepspeed_zero3.yaml"), "--num_processes=2"]
    shell([*ACCELERATE, *launch, f"--main_process_port={free_port()}", "tests/launch_runs.py", runs])
    assert_launched("deepspeed_zero3", tmp_path, one_process, 2, sharded=True)


ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
#: A cluster of two nodes that are this machine, with a process each.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first && wait $second
"""
SCONTROL = """#!/bin/bash
printf '127.0.0.1\\n127.0.0.1\\n'
"""


def slurm(folder, *arguments, **env):
    """Runs slurm.sh on that cluster; returns what it prints."""
    (folder / "bin").mkdir()
    for name, script in [("srun", SRUN), ("scontrol", SCONTROL)]:
        (folder / "bin" / name).write_text(script)
        (folder / "bin" / name).chmod(0o755)
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    return shell([SLURM, *arguments], PATH=path, SLURM_JOB_ID=str(os.getpid()), **job, **env)


@pytest.mark.slow
def test_two_nodes_under_slurm_with_fsdp2(work, one_process, tmp_path):
    """Each run is also told to resume from the newest checkpoint, and has none."""
    slurm(tmp_path, "fsdp2", "tests/launch_runs.py", write_runs(work, "slurm", tmp_path))
    assert_launched("fsdp2 by slurm.sh on 2 nodes", tmp_path, one_process, 2, sharded=True)


#: A process says who it is, in one write: pieces of two processes' lines could mix.
HELLO = """
import os, sys
who = " ".join(os.environ[name] for name in ("RANK", "WORLD_SIZE", "GROUP_RANK"))
os.write(1, f"{who} {sys.argv[1:]}\\n".encode())
"""


@pytest.mark.parametrize("config", ["multi_node", pytest.param("deepspeed_zero3", marks=needs_deepspeed)])
def test_two_nodes_under_slurm_are_one_launch(tmp_path, forked_python, config):
    (tmp_path / "hello.py").write_text(HELLO)
    submitted = tmp_path / "submitted"  # a clone whose accelerate is forked
    (submitted / ".venv" / "bin").mkdir(parents=True)
    (submitted / "alignment-handbook").symlink_to(ROOT / "alignment-handbook")
    accelerate = submitted / ".venv" / "bin" / "accelerate"
    accelerate.write_text(f'#!/bin/sh\nexec {forked_python} -m accelerate.commands.accelerate_cli "$@"\n')
    accelerate.chmod(0o755)
    hello = str(tmp_path / "hello.py")
    printed = slurm(tmp_path, config, hello, "RECIPE", "--a=b c", SLURM_SUBMIT_DIR=str(submitted))
    flags = "['RECIPE', '--resume_from_checkpoint=true', '--a=b c']"
    assert {f"0 2 0 {flags}", f"1 2 1 {flags}"} <= set(printed.splitlines())


def test_multi_cpu_starts_the_processes_that_it_is_asked_for(tmp_path):
    (tmp_path / "hello.py").write_text(HELLO)
    launch = ["--config_file", str(CONFIGS / "multi_cpu.yaml"), f"--main_process_port={free_port()}"]
    assert shell([*ACCELERATE, *launch, str(tmp_path / "hello.py")]).count("2 0 []") == 2


def documented_launches():
    return sorted(set(re.findall(r"accelerate launch (--config_file [^`\n]*run_\w+\.py[^`\n]*)", documentation())))


@pytest.mark.parametrize("launch", documented_launches())
def test_every_documented_launch_parses(launch):
    args = launch_command_parser().parse_args(launch.split())
    assert (ROOT / args.config_file).is_file()
    assert (ROOT / args.training_script).is_file()
    assert args.num_processes
    assert len(documented_launches()) >= 8


def test_the_slurm_script_is_bash():
    shell(["bash", "-n", str(SLURM)])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="4-bit weights are sharded on GPUs: needs 2")
def test_fsdp2_over_4bit_weights(work, tmp_path):
    flags = ["--load_in_4bit=true", "--bnb_4bit_quant_storage=bfloat16", "--dtype=bfloat16", "--bf16=true"]
    flags += [f"--train_file={work}/unweighted.jsonl"]  # so that the loss of the first step is 2 log 2
    launch = ["--config_file", str(CONFIGS / "fsdp2_qlora.yaml"), "--num_processes=2"]
    shell([*ACCELERATE, *launch, "run_reward.py", *command(work, tmp_path / "out", *flags)])
    logged, _ = outcome(tmp_path / "out")
    assert logged[0]["loss"] == pytest.approx(1.3863, abs=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU's optimizer is paged: needs one")
def test_qlora_with_a_paged_optimizer(work, tmp_path):
    flags = ["--load_in_4bit=true", "--dtype=bfloat16", "--bf16=true", "--optim=paged_adamw_32bit"]
    flags += [f"--train_file={work}/unweighted.jsonl"]  # so that the loss of the first step is 2 log 2
    align(command(work, tmp_path / "out", *flags), NCATrainer)
    logged, _ = outcome(tmp_path / "out")
    assert logged[0]["loss"] == pytest.approx(1.3863, abs=1e-3)
