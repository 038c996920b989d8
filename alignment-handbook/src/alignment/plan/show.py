"""`--plan`: what a run would take, in steps and in memory, before anything is loaded and on any machine.

A real run prints and writes the arithmetic of steps, and traces memory only where the recipe says
`gradient_checkpointing: auto`: that takes a few seconds, and a run that starts will soon know.
"""

import contextlib
import socket
from collections.abc import Iterator, Mapping, Sequence
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
from alignment.launch import launched_layout
from alignment.models import load_config, load_tokenizer
from alignment.plan import layouts
from alignment.plan.check import check_model
from alignment.plan.checkpointing import Checkpointing, choose, free_memory_gb
from alignment.plan.compatibility import incompatibilities
from alignment.plan.estimate import GroupLengths, MemoryEstimator, longest_rows
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
    model_config, note = load_config(configs.policy, args.trust_remote_code)
    notes += [note] if note else []
    rows = _rows(configs, pairs, notes)
    lengths = rows["length"][:] if rows is not None and "length" in rows.column_names else None
    num_prompts = run.num_prompts if rows is None else len(rows)
    if num_prompts is None and args.max_steps <= 0:
        notes.append("Steps are not known without the data: --num_prompts=N plans for N rows")
    checked = check_model(configs.policy, args)
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
    """What plan.json says of memory. Arguments as in `make_plan`; `groups` is the micro-batch to plan for."""
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
    for name in layouts.LAYOUTS:
        checkpointing(name)
        total = layouts.in_gb(layouts.peak_memory(estimator.footprint(name), name, num_processes)[1])["total"]
        refused = incompatibilities(policy, args, name)
        reasons = "; ".join(f"{r['what']}: {r['reason']}" for r in refused) or None
        table[name] = {"total_gb": total, "fits": total <= limit and not refused, "refused": reasons}
    refused, chosen = incompatibilities(policy, args, layout), checkpointing(layout)
    phase, held = layouts.peak_memory(estimator.footprint(layout), layout, num_processes)
    parts = layouts.in_gb(held)
    activations = {name: round(estimator.activations(on) / layouts.GB, 3) for name, on in _CHECKPOINTING.items()}
    return {
        "parallel": layout,
        "gradient_checkpointing": chosen.as_dict() if chosen else args.gradient_checkpointing,
        "memory_per_gpu_gb": parts,
        "fullest_moment": phase,
        "activations_gb": activations,
        "tokens_per_forward": estimator.tokens,
        "gpu_memory_gb": limit,
        "fits": parts["total"] <= limit and not refused,
        "largest_max_tokens_per_forward": estimator.largest_budget(layout, num_processes, limit),
        "layouts": table,
        "refused": refused,
    }


_CHECKPOINTING = {"with_checkpointing": True, "without_checkpointing": False}


def _on_gpu(run: RunConfig) -> bool:
    """Whether the recipe is one for GPUs: it does not say use_cpu. (Without a GPU the trainer sets that itself.)"""
    return not any(flag.lower().endswith(("use_cpu", "use_cpu=true")) for flag in run.given.get("use_cpu", ()))


def _gpu_memory_gb(run: RunConfig, notes: list[str]) -> float:
    """Memory to fit, in GB: what was asked for, or that of the machine at hand, or `DEFAULT_GPU_GB`."""
    if run.gpu_memory_gb is not None:
        return run.gpu_memory_gb
    if not _on_gpu(run):
        return round(psutil.virtual_memory().total / layouts.GB, 1)
    if torch.cuda.is_available():
        return round(torch.cuda.get_device_properties(0).total_memory / layouts.GB, 1)
    notes.append(f"No GPU here: planned for one of {DEFAULT_GPU_GB:g} GB; --gpu_memory_gb=N plans for another")
    return DEFAULT_GPU_GB


def _free_gb(configs: Configs, limit: float) -> float:
    """Memory that a run here would find free, in GB; that of the GPU to plan for where it is another."""
    here = configs.trainer.device.type == ("cuda" if _on_gpu(configs.run) else "cpu")
    return free_memory_gb(configs.trainer.device) if here and configs.run.gpu_memory_gb is None else limit


def describe(plan: Plan, facts: Mapping[str, Any], notes: Sequence[str]) -> str:
    """The plan as it is printed."""
    parts = facts["memory_per_gpu_gb"]
    listed = ", ".join(f"{name} {parts[name]:.2f}" for name in layouts.PARTS if parts[name])
    activations = facts["activations_gb"]
    verdict = "fits" if facts["fits"] else "DOES NOT FIT" if not facts["refused"] else "REFUSED"
    budget = facts["largest_max_tokens_per_forward"]
    with_checkpointing, without = activations["with_checkpointing"], activations["without_checkpointing"]
    checkpointing = facts["gradient_checkpointing"]
    is_auto = isinstance(checkpointing, Mapping)
    so = f", with checkpointing {'on' if checkpointing['on'] else 'off'}" if is_auto else ""
    lines = [
        str(plan),
        *([checkpointing["summary"]] if is_auto else []),
        f"Memory per process ({facts['parallel']}): {parts['total']:.2f} GB of {facts['gpu_memory_gb']:g}: {verdict}.",
        f"  peak ({facts['fullest_moment']}): {listed}",
        f"  {facts['tokens_per_forward']} tokens a forward; activations {with_checkpointing:.2f} GB with "
        f"checkpointing, {without:.2f} without; "
        + (f"largest max_tokens_per_forward that fits{so}: {budget}" if budget else "no max_tokens_per_forward fits"),
    ]
    for name, layout in facts["layouts"].items():
        fits = "refused: " + layout["refused"] if layout["refused"] else "fits" if layout["fits"] else "does not fit"
        lines.append(f"  {name:6} {layout['total_gb']:9.2f} GB  {fits}")
    lines += [f"Refused: {r['what']}: {r['reason']}; use {r['fix']}" for r in facts["refused"]]
    return "\n".join([*lines, *(f"Note: {note}." for note in notes)])
