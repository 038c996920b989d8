"""`--plan`: what a run would take, in steps and in memory, before anything is loaded and on any machine.

A real run prints and writes the arithmetic of steps alone: counting memory takes a few seconds, and a run that starts
will soon know.
"""

import socket
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
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

from alignment import layouts, output
from alignment.counted import Counted
from alignment.data import load_groups
from alignment.errors import UserError
from alignment.models import load_config, load_tokenizer
from alignment.plan import Plan, plan_run, set_global_batch

DEFAULT_GPU_GB = 80.0


def show_plan(configs: Sequence[Any], pairs: bool, prepare: Callable[..., Any], engine: ModuleType) -> None:
    """Prints the plan and writes it to output_dir/plan.json, unless a run's files are there.

    Args:
        configs: The data's, the policy's, the script's and the trainer's.
        pairs: Whether the rows are preference pairs.
        prepare: Takes the data's and the trainer's config, tokenizer and `pairs`; gives the rows as texts, the rows as
            token ids, and a report.
        engine: `trl_nca.memory`.

    Raises:
        UserError: The batch cannot be split so, or there is no config of the model.
    """
    if not PartialState().is_main_process:
        return
    _settle_offline()
    plan, facts, notes = make_plan(configs, pairs, prepare, engine)
    print(describe(plan, facts, notes), flush=True)
    folder = configs[3].output_dir
    if output.has_started(folder):
        print(f"{folder} holds a run, whose plan.json stays: this plan is printed only.")
    else:
        output.make_folder(folder)
        output.write_json(folder, "plan.json", plan.as_dict() | facts | {"notes": notes})


def _settle_offline() -> None:
    """Asks the Hub for nothing, where its name cannot be found: each of its clients would try for half a minute."""
    if getproxies():
        return  # behind which names are found elsewhere
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def make_plan(
    configs: Sequence[Any], pairs: bool, prepare: Callable[..., Any], engine: ModuleType
) -> tuple[Plan, dict[str, Any], list[str]]:
    """The arithmetic of steps, that of memory for plan.json, and what is to be said of both. Arguments: `show_plan`."""
    _, policy, run, args = configs
    num_processes, notes = run.num_processes or args.world_size, []
    set_global_batch(args, run, num_processes)
    config, note = load_config(policy, args.trust_remote_code)
    notes += [note] if note else []
    rows = _rows(configs, pairs, prepare, notes)
    lengths = rows["length"][:] if rows is not None and "length" in rows.column_names else None
    num_prompts = run.num_prompts if rows is None else len(rows)
    if num_prompts is None and args.max_steps <= 0:
        notes.append("Steps are not known without the data: --num_prompts=N plans for N rows")
    plan = plan_run(args, num_processes, num_prompts, sum(lengths) if lengths else None)
    groups = _longest(rows, lengths, plan.per_device_train_batch_size) if lengths else None
    if groups is None:
        groups = _made_up(args, config, pairs, notes) * plan.per_device_train_batch_size
    return plan, _memory(configs, config, groups, plan, engine, notes), notes


def _rows(configs: Sequence[Any], pairs: bool, prepare: Callable[..., Any], notes: list[str]) -> Dataset | None:
    """The rows to train on: tokenized, or as texts where there is no tokenizer, or None."""
    data, policy, run, args = configs
    if run.num_prompts is not None:
        return None
    try:
        tokenizer = load_tokenizer(policy, args.trust_remote_code)
    except UserError:
        notes.append("There is no tokenizer at hand: tokens are not counted")
        try:
            return load_groups(data, pairs, None, args.dataset_num_proc)[0]["train"]
        except UserError as error:
            notes.append(f"The data cannot be read: {error}")
            return None
    try:
        return prepare(data, args, tokenizer, pairs)[1]["train"]
    except UserError as error:
        notes.append(f"The data cannot be read: {error}")
        return None


def _longest(rows: Dataset, lengths: Sequence[int], count: int) -> list[tuple[int, list[int]]]:
    """Tokens of prompt and responses of the longest rows: the micro-batch that takes the most."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)[:count]
    return [(len(row["prompt_ids"]), [len(r) for r in row["response_ids"]]) for row in map(rows.__getitem__, order)]


def _made_up(args: Any, config: PretrainedConfig, pairs: bool, notes: list[str]) -> list[tuple[int, list[int]]]:
    """A row as long as the recipe lets it be: tokens of its prompt and of each response."""
    longest = args.max_length or min(2048, getattr(config.get_text_config(), "max_position_embeddings", 2048))
    prompt = min(args.max_prompt_length or longest // 2, longest - 1)
    num_responses = 2 if pairs else 4
    notes.append(
        f"Memory is that of rows with {prompt} tokens of prompt and {num_responses} x {longest - prompt} of responses"
    )
    return [(prompt, [longest - prompt] * num_responses)]


def _memory(
    configs: Sequence[Any], config: PretrainedConfig, groups: Any, plan: Plan, engine: ModuleType, notes: list[str]
) -> dict[str, Any]:
    """What plan.json says of memory. Arguments as in `make_plan`; `groups` is the micro-batch to plan for."""
    _, policy, run, args = configs
    num_processes = plan.num_processes
    layout = run.parallel or layouts.launched_layout(num_processes)
    limit = _gpu_memory_gb(run, notes)
    counted = Counted(configs, config, groups, plan.gradient_accumulation_steps > 1, _on_gpu(run), engine)
    notes += counted.notes
    table = {}
    for name in layouts.LAYOUTS:
        total = layouts.in_gb(layouts.memory(counted.footprint(name), name, num_processes)[1])["total"]
        refused = layouts.refusals(policy, args, name)
        reasons = "; ".join(f"{r['what']}: {r['reason']}" for r in refused) or None
        table[name] = {"total_gb": total, "fits": total <= limit and not refused, "refused": reasons}
    refused = layouts.refusals(policy, args, layout)
    moment, held = layouts.memory(counted.footprint(layout), layout, num_processes)
    parts = layouts.in_gb(held)
    kept = {name: round(counted.kept(on) / layouts.GB, 3) for name, on in _CHECKPOINTING.items()}
    return {
        "parallel": layout,
        "memory_per_gpu_gb": parts,
        "fullest_moment": moment,
        "activations_gb": kept,
        "tokens_per_forward": counted.batch["input_ids"].shape[1],
        "gpu_memory_gb": limit,
        "fits": parts["total"] <= limit and not refused,
        "largest_max_tokens_per_forward": counted.largest_budget(layout, num_processes, limit),
        "layouts": table,
        "refused": refused,
    }


_CHECKPOINTING = {"with_checkpointing": True, "without_checkpointing": False}


def _on_gpu(run: Any) -> bool:
    """Whether the recipe is one for GPUs: it does not say use_cpu. (Without a GPU the trainer sets that itself.)"""
    return not any(flag.lower().endswith(("use_cpu", "use_cpu=true")) for flag in run.given.get("use_cpu", ()))


def _gpu_memory_gb(run: Any, notes: list[str]) -> float:
    """Memory to fit, in GB: what was asked for, or that of the machine at hand, or `DEFAULT_GPU_GB`."""
    if run.gpu_memory_gb is not None:
        return run.gpu_memory_gb
    if not _on_gpu(run):
        return round(psutil.virtual_memory().total / layouts.GB, 1)
    if torch.cuda.is_available():
        return round(torch.cuda.get_device_properties(0).total_memory / layouts.GB, 1)
    notes.append(f"No GPU here: planned for one of {DEFAULT_GPU_GB:g} GB; --gpu_memory_gb=N plans for another")
    return DEFAULT_GPU_GB


def describe(plan: Plan, facts: Mapping[str, Any], notes: Sequence[str]) -> str:
    """The plan as it is printed."""
    parts = facts["memory_per_gpu_gb"]
    listed = ", ".join(f"{name} {parts[name]:.2f}" for name in layouts.PARTS if parts[name])
    kept = facts["activations_gb"]
    verdict = "fits" if facts["fits"] else "DOES NOT FIT" if not facts["refused"] else "REFUSED"
    budget = facts["largest_max_tokens_per_forward"]
    lines = [
        str(plan),
        f"Memory per process ({facts['parallel']}): {parts['total']:.2f} GB of {facts['gpu_memory_gb']:g}: {verdict}.",
        f"  at its fullest ({facts['fullest_moment']}): {listed}",
        f"  {facts['tokens_per_forward']} tokens a forward; activations {kept['with_checkpointing']:.2f} GB with "
        f"checkpointing, {kept['without_checkpointing']:.2f} without; "
        + (f"largest max_tokens_per_forward that fits: {budget}" if budget else "no max_tokens_per_forward fits"),
    ]
    for name, layout in facts["layouts"].items():
        fits = "refused: " + layout["refused"] if layout["refused"] else "fits" if layout["fits"] else "does not fit"
        lines.append(f"  {name:6} {layout['total_gb']:9.2f} GB  {fits}")
    lines += [f"Refused: {r['what']}: {r['reason']}; use {r['fix']}" for r in facts["refused"]]
    return "\n".join([*lines, *(f"Note: {note}." for note in notes)])
