"""`--plan`: what a run would take, in steps and in memory, before anything is loaded and on any machine.

A real run prints and writes the arithmetic of steps, and traces memory only where the recipe says
`gradient_checkpointing: auto`: that takes a few seconds, and a run that starts will soon know.
"""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import datasets
import psutil
import torch
from accelerate import PartialState
from datasets import Dataset
from huggingface_hub import constants
from transformers import PretrainedConfig

from alignment import output
from alignment.configs import Configs
from alignment.data.load import load_groups
from alignment.data.prepare import prepare_rows
from alignment.errors import UserError
from alignment.files import write_json
from alignment.launch import launched_layout, processes_here
from alignment.models import load_config, load_tokenizer
from alignment.plan import layouts
from alignment.plan.check import check_model
from alignment.plan.checkpointing import Checkpointing, choose, free_memory_gb
from alignment.plan.compatibility import incompatibilities, sharded_sequences
from alignment.plan.describe import describe
from alignment.plan.estimate import GroupLengths, MemoryEstimator, longest_rows
from alignment.plan.hours import GPUS, Hours, gpu_here, named_gpu
from alignment.plan.steps import Plan, plan_run, set_global_batch
from alignment.recipe import RunConfig

DEFAULT_GPU_GB = 80.0


def show_plan(configs: Configs, pairs: bool) -> None:
    """Prints the plan and writes it to output_dir/plan.json, unless a run's files are there.

    Args:
        configs: The settings of the run.
        pairs: Whether the rows are preference pairs.

    Raises:
        UserError: The batch cannot be split so, or there is no config of the model.
    """
    if not PartialState().is_main_process:
        return
    with offline_if_unreachable():
        plan, facts, notes = make_plan(configs, pairs)
    print(describe(plan, facts, notes), flush=True)
    folder = configs.trainer.output_dir
    if output.has_started(folder):
        print(f"{folder} holds a run, whose plan.json stays: this plan is printed only.")
    else:
        output.make_folder(folder)
        write_json(Path(folder) / "plan.json", plan.as_dict() | facts | {"notes": notes})


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Keeps the Hub's clients offline where its name cannot be resolved: each would try for half a minute."""
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not getproxies():  # behind which names are resolved elsewhere
        try:
            socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def make_plan(configs: Configs, pairs: bool) -> tuple[Plan, dict[str, Any], list[str]]:
    """The arithmetic of steps, that of memory for plan.json, and notes on both. Arguments as in `show_plan`."""
    run, args, notes = configs.run, configs.trainer, []
    num_processes = run.num_processes or args.world_size
    set_global_batch(args, run, num_processes)
    model_config, note = load_config(configs.policy, args.trust_remote_code, run.model_config)
    notes += [note] if note else []
    rows = _rows(configs, pairs, notes)
    lengths = rows["length"][:] if rows is not None and "length" in rows.column_names else None
    num_prompts = run.num_prompts if rows is None else len(rows)
    if num_prompts is None and args.max_steps <= 0:
        notes.append("Steps are not known without the data: --num_prompts=N plans for N rows")
    checked = check_model(configs.policy, args) if run.model_config is None else None
    notes += [checked] if checked else []
    plan = plan_run(args, num_processes, num_prompts, sum(lengths) if lengths else None)
    if lengths:
        groups = longest_rows(rows, lengths, plan.per_device_train_batch_size)
    else:
        groups = _assumed(configs, model_config, pairs, notes) * plan.per_device_train_batch_size
    return plan, _memory(configs, model_config, groups, plan, notes), notes


def _rows(configs: Configs, pairs: bool, notes: list[str]) -> Dataset | None:
    """The rows to train on: tokenized, or as texts where there is no tokenizer, or None."""
    args = configs.trainer
    if configs.run.num_prompts is not None:
        return None
    try:
        tokenizer = load_tokenizer(configs.policy, args.trust_remote_code)
    except UserError:
        tokenizer = None
        notes.append("There is no tokenizer at hand: tokens are not counted")
    try:
        if tokenizer is None:
            return load_groups(configs.data, pairs, None, args.dataset_num_proc)[0]["train"]
        return prepare_rows(configs.data, args, tokenizer, pairs)[1]["train"]
    except UserError as error:
        notes.append(f"The data cannot be read: {error}")
        return None


def _assumed(configs: Configs, model_config: PretrainedConfig, pairs: bool, notes: list[str]) -> list[GroupLengths]:
    """A row as long as the recipe lets it be: tokens of its prompt and of each response."""
    args = configs.trainer
    longest = args.max_length or min(2048, getattr(model_config.get_text_config(), "max_position_embeddings", 2048))
    prompt = min(args.max_prompt_length or longest // 2, longest - 1)
    num_responses = 2 if pairs else 4
    notes.append(
        f"Memory is that of rows with {prompt} tokens of prompt and {num_responses} x {longest - prompt} of responses"
    )
    return [(prompt, [longest - prompt] * num_responses)]


def _memory(
    configs: Configs, model_config: PretrainedConfig, groups: list[GroupLengths], plan: Plan, notes: list[str]
) -> dict[str, Any]:
    """What plan.json says of memory and hours. Arguments as in `make_plan`; `groups` is the micro-batch to plan for."""
    policy, run, args = configs.policy, configs.run, configs.trainer
    num_processes = plan.num_processes
    layout = run.parallel or launched_layout(num_processes)
    limit = _gpu_memory_gb(run, notes)
    estimator = MemoryEstimator(configs, model_config, groups, plan.gradient_accumulation_steps > 1, _on_gpu(run))
    notes += estimator.notes
    free = _free_gb(configs, limit) if args.gradient_checkpointing == "auto" else None

    def checkpointing(layout: str) -> Checkpointing | None:
        """What `auto` comes to in a layout; the estimator is left there."""
        return choose(estimator, layout, num_processes, free) if free is not None else None

    table = {}
    for name in (name for name in layouts.LAYOUTS if _on_gpu(run) or not name.endswith("_offload")):
        if reasons := "; ".join(f"{r['what']}: {r['reason']}" for r in incompatibilities(policy, args, name)):
            table[name] = {"loading_gb": None, "training_gb": None, "fits": False, "refused": reasons}
            continue
        checkpointing(name)
        loading, training = (parts["total"] for _, parts in _moments(estimator, name, num_processes).values())
        fits = max(loading, training) <= limit
        table[name] = {"loading_gb": loading, "training_gb": training, "fits": fits, "refused": None}
    if table and not any(found["fits"] for found in table.values()) and not policy.load_in_4bit:
        less = "--load_in_4bit=true" if policy.use_peft else "--use_peft=true (LoRA)"
        notes.append(f"No layout fits; {less} takes less")
    refused, chosen = incompatibilities(policy, args, layout), checkpointing(layout)
    if shards := sharded_sequences():
        refused += shards
        notes.append("The table is of whole sequences on each process: none is planned that is sharded over several")
    moments = _moments(estimator, layout, num_processes)
    fullest, parts = max(moments.values(), key=lambda moment: moment[1]["total"])
    activations = {
        name: round(estimator.activations(on, layout) / layouts.GB, 3) for name, on in _CHECKPOINTING.items()
    }
    host = layouts.host_memory(estimator.footprint(layout), layout, num_processes) / layouts.GB
    hours = estimate_hours(run, estimator, plan, layout, groups) if not refused else None
    return {
        "parallel": layout,
        "gradient_checkpointing": chosen.as_dict() if chosen else args.gradient_checkpointing,
        "memory_per_gpu_gb": parts,
        "fullest_moment": fullest,
        "moments_gb": {name: {"at": phase} | held for name, (phase, held) in moments.items()},
        "cpu_memory_gb": round(host, 3),
        "processes_a_node": _processes_a_node(run, num_processes),
        "activations_gb": activations,
        "tokens_per_forward": args.max_tokens_per_forward if estimator.num_pieces(layout) > 1 else estimator.tokens,
        "longest_response": _longest_response(estimator, layout, num_processes),
        "gpu_memory_gb": limit,
        "fits": parts["total"] <= limit and not refused,
        "largest_max_tokens_per_forward": estimator.largest_budget(layout, num_processes, limit),
        "layouts": table,
        "refused": refused,
        "time": hours.as_dict() | {"summary": str(hours)} if hours else None,
    }


def _longest_response(estimator: MemoryEstimator, layout: str, num_processes: int) -> dict[str, Any] | None:
    """How a response is run that does not fit a forward, and what a step would take with it whole; None: all fit."""
    most, length = estimator.args.max_tokens_per_forward, estimator.longest_response - 1
    if most is None or length <= most:
        return None
    chosen, whole = estimator.checkpointing, {}
    for name, estimator.checkpointing in _CHECKPOINTING.items():
        _, parts = layouts.peak_memory(estimator.footprint(layout, whole=True), layout, num_processes)
        whole[name] = layouts.in_gb(parts)["total"]
    estimator.checkpointing, pieces = chosen, estimator.num_pieces(layout)
    reason = estimator.cutting(layout).reason if pieces == 1 else None
    return {"tokens": length, "pieces": pieces, "whole_gb": whole, "reason": reason}


def _moments(estimator: MemoryEstimator, layout: str, num_processes: int) -> dict[str, tuple[str, dict[str, float]]]:
    """The two moments of a run, as of `layouts.moments`, in GB."""
    moments = layouts.moments(estimator.footprint(layout), layout, num_processes)
    return {name: (phase, layouts.in_gb(held)) for name, (phase, held) in moments.items()}


def estimate_hours(
    run: RunConfig, estimator: MemoryEstimator, plan: Plan, layout: str, groups: list[GroupLengths]
) -> Hours | None:
    """The time of the run on GPUs whose rate is known; None on others, on a CPU, or without the number of steps."""
    gpu = named_gpu(run.gpu) if run.gpu else gpu_here()
    if gpu is None and not torch.cuda.is_available() and run.gpu_memory_gb is None:
        gpu = "H100"
    if plan.num_steps is None or gpu is None or not _on_gpu(run):
        return None
    tokens, at_most = plan.num_tokens, plan.num_tokens is None
    if tokens is None:
        of_groups = sum(prompt + sum(responses) for prompt, responses in groups) / len(groups)
        tokens = of_groups * plan.num_steps * plan.global_batch_size
    policy, reference = estimator.flops_per_token(layout)
    once = estimator.args.precompute_ref_log_probs
    epochs = max(plan.num_epochs or 1, 1)
    a_step = (policy + reference * (not once)) * tokens / plan.num_steps
    before = reference * tokens / epochs if once else 0
    return Hours(gpu, plan.num_processes, a_step, a_step * plan.num_steps + before, at_most)


def _processes_a_node(run: RunConfig, num_processes: int) -> int:
    """Processes of one machine: those that were launched here, or, of a launch that is planned, at most eight."""
    return min(num_processes, 8) if run.num_processes else processes_here()


_CHECKPOINTING = {"with_checkpointing": True, "without_checkpointing": False}


def _on_gpu(run: RunConfig) -> bool:
    """Whether the recipe is one for GPUs: it does not say use_cpu. (Without a GPU the trainer sets that itself.)"""
    return not any(flag.lower().endswith(("use_cpu", "use_cpu=true")) for flag in run.given.get("use_cpu", ()))


def _gpu_memory_gb(run: RunConfig, notes: list[str]) -> float:
    """Memory to fit, in GB: what was asked for, or that of the machine at hand, or `DEFAULT_GPU_GB`."""
    if run.gpu_memory_gb is not None:
        return run.gpu_memory_gb
    if run.gpu is not None:
        return float(GPUS[named_gpu(run.gpu)][1])
    if not _on_gpu(run):
        return round(psutil.virtual_memory().total / layouts.GB, 1)
    if torch.cuda.is_available():
        return round(torch.cuda.get_device_properties(0).total_memory / layouts.GB, 1)
    notes.append(
        f"No GPU here: planned for one of {DEFAULT_GPU_GB:g} GB; --gpu_memory_gb=N or --gpu=NAME plans for another"
    )
    return DEFAULT_GPU_GB


def _free_gb(configs: Configs, limit: float) -> float:
    """Memory that a run here would find free, in GB; that of the GPU to plan for where it is another."""
    here = configs.trainer.device.type == ("cuda" if _on_gpu(configs.run) else "cpu")
    asked = configs.run.gpu_memory_gb is not None or configs.run.gpu is not None
    return free_memory_gb(configs.trainer.device) if here and not asked else limit
