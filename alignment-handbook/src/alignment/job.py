"""A run around its training: what is checked and read before the trainer is built, and what is written after it."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from huggingface_hub.constants import is_offline_mode
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer

from alignment import output
from alignment.checks.best_model import check_best_model
from alignment.checks.limits import check_limits
from alignment.checks.no_effect import keys_without_effect
from alignment.configs import Configs
from alignment.data.prepare import prepare_rows
from alignment.errors import UserError
from alignment.evaluation.held_out import OfResponses, check_prompts, sample_and_score
from alignment.files import read_json, write_json
from alignment.launch import enable_cpu_sharding, launched_layout
from alignment.models import PolicyConfig, adapter_and_quantization, load_config, load_tokenizer
from alignment.plan.checkpointing import Checkpointing, decide
from alignment.plan.compatibility import check_layout
from alignment.plan.steps import Plan, plan_run, set_global_batch
from alignment.report.callback import write_report
from alignment.report.environment import describe_environment
from alignment.report.runs import ENVIRONMENT
from alignment.report.tables import final_table
from alignment.report.trackers import sample_logs, send
from alignment.sampling.reward_function import RewardFunction, load_reward_function
from trl_nca.checkpoints import RunStopped
from trl_nca.config import NCAConfig
from trl_nca.divergence import response_logratios, why_no_divergence
from trl_nca.loading import load_4bit_on_cpu

logger = logging.getLogger(__name__)

_LESS_MEMORY = (
    "The step does not fit the memory of the device. What takes less: --gradient_checkpointing=true, then a smaller "
    "--max_tokens_per_forward; --plan=true says how much it would be."
)


class Job(NamedTuple):
    """A run that is ready to be built.

    Attributes:
        configs: What the recipe and the command line say.
        tokenizer: The policy's tokenizer.
        raw: The rows as texts, by `train` and `eval`.
        rows: The same as token ids.
        data_report: What became of the rows and what they look like, for data_report.json.
        plan: The arithmetic of the batch and the steps.
        checkpointing: What `gradient_checkpointing: auto` came to; None where the recipe says true or false.
        checkpoint: What the run resumes from; None for a run from the start.
        reward_function: Scores samples before and after training; None: nothing is sampled.
    """

    configs: Configs
    tokenizer: PreTrainedTokenizerBase
    raw: dict[str, Dataset]
    rows: dict[str, Dataset]
    data_report: dict[str, Any]
    plan: Plan
    checkpointing: Checkpointing | None
    checkpoint: str | None
    reward_function: RewardFunction | None


def prepare_job(configs: Configs, pairs: bool) -> Job:
    """Checks the settings and reads the rows: all that can fail before a model is loaded.

    Args:
        configs: What the recipe and the command line say.
        pairs: Whether the rows are preference pairs.

    Raises:
        UserError: The launch, the output folder, the reward function, the model or the data cannot be used.
    """
    policy, run, args = configs.policy, configs.run, configs.trainer
    if args.push_to_hub and is_offline_mode():
        raise UserError("push_to_hub: offline, HF_HUB_OFFLINE is set; unset it, or --push_to_hub=false")
    check_layout(policy, args)
    set_global_batch(args, run, args.world_size)
    enable_cpu_sharding()
    checkpoint = None
    if PartialState().is_main_process and not run.show_batch:
        checkpoint = output.resume_point(args.output_dir, args.resume_from_checkpoint, run.overwrite_output_dir)
    (checkpoint,) = broadcast_object_list([checkpoint])  # after an error the launcher ends those that wait here
    if checkpoint is not None:
        output.check_kind(checkpoint, policy.use_peft)
    reward_function = load_reward_function(run.reward_function) if run.reward_function else None
    tokenizer = load_tokenizer(policy, args.trust_remote_code)
    with PartialState().main_process_first():  # the others then find the rows in the cache
        raw, rows, report = prepare_rows(configs.data, args, tokenizer, pairs, keep_columns=reward_function is not None)
    model_config, _ = load_config(policy, args.trust_remote_code)
    check_limits(rows, model_config, tokenizer)
    check_best_model(args, rows.get("eval"), model_config)
    if without := keys_without_effect(configs, pairs, "eval" in rows):
        logger.warning("Without effect in this run: %s", "; ".join(without))
    plan = plan_run(args, args.world_size, len(rows["train"]), sum(rows["train"]["length"][:]))
    checkpointing = decide(configs, model_config, rows["train"], plan) if not run.show_batch else None
    return Job(configs, tokenizer, raw, rows, report, plan, checkpointing, checkpoint, reward_function)


def model_arguments(policy: PolicyConfig, args: NCAConfig) -> dict[str, Any]:
    """Arguments of the trainer: the policy's name or the policy, its adapter, its quantization.

    The policy itself, where upstream would load all of it onto each GPU though FSDP2 will shard it: in 4 bits, stored
    in a type that FSDP2 shards. (Weights that are stored as whole bytes it leaves where they are.)

    Args:
        policy: The model to align.
        args: Training arguments; `model_init_kwargs` is None afterwards where the policy is loaded.
    """
    arguments = {"model": policy.model_name_or_path, **adapter_and_quantization(policy)}
    is_fsdp2 = launched_layout(args.world_size).startswith("fsdp2")
    if is_fsdp2 and policy.load_in_4bit and policy.bnb_4bit_quant_storage not in (None, "uint8"):
        kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
        kwargs["quantization_config"] = arguments.pop("quantization_config")
        arguments["model"], args.model_init_kwargs = load_4bit_on_cpu(policy.model_name_or_path, **kwargs), None
    return arguments


def start_output(job: Job) -> None:
    """Writes the resolved recipe, the plan and the data report, unless the run resumes and has them."""
    args = job.configs.trainer
    if PartialState().is_main_process and (job.checkpoint is None or not output.has_started(args.output_dir)):
        overwrite, plan = job.configs.run.overwrite_output_dir, job.plan.as_dict()
        if job.checkpointing is not None:
            plan["gradient_checkpointing"] = job.checkpointing.as_dict()
        notes = [str(job.checkpointing)] if job.checkpointing else []
        output.start(args.output_dir, args.recipe, plan, job.data_report, overwrite, notes)
        environment = describe_environment(args.device, args.world_size)
        write_json(Path(args.output_dir) / ENVIRONMENT, environment | {"given": sorted(job.configs.run.given)})


def sample_held_out(job: Job, trainer: DPOTrainer, when: str) -> list[dict[str, Any]] | None:
    """Scored samples on held-out prompts, drawn by the main process and kept in `samples_{when}.json`.

    Args:
        job: From `prepare_job`.
        trainer: Holds the policy.
        when: "before" or "after" training. A run that resumes reads what it sampled before.

    Returns:
        See `evaluation.held_out.sample_and_score`; None without a reward function or held-out rows, on the other
        processes, and where weights are sharded: one process then cannot sample by itself.
    """
    file = Path(trainer.args.output_dir) / f"samples_{when}.json"
    if when == "before" and job.checkpoint is not None:
        return read_json(file)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    scored = None
    if job.reward_function and "eval" in job.raw and trainer.is_world_process_zero() and not sharded:
        policy = trainer.accelerator.unwrap_model(trainer.model)
        run, seed, held_out = job.configs.run, job.configs.trainer.seed, job.raw["eval"]
        check_prompts(policy, job.tokenizer, held_out, run)
        logratios = _logratios(trainer, run.temperature) if when == "after" else None
        scored = sample_and_score(policy, job.tokenizer, held_out, job.reward_function, run, seed, when, logratios)
        write_json(file, scored)
    trainer.accelerator.wait_for_everyone()
    return scored


def _logratios(trainer: DPOTrainer, temperature: float) -> OfResponses | None:
    """Gives log-ratios of samples at a temperature; None, and a line that says why, where there are none."""
    if reason := why_no_divergence(trainer, temperature):
        logger.warning("No KL divergence from the reference is measured: %s", reason)
        return None
    return functools.partial(response_logratios, trainer, temperature=temperature)


@contextlib.contextmanager
def training(job: Job, trainer: DPOTrainer) -> Iterator[None]:
    """A context to train in: evaluations take the first `eval_prompts_in_training` rows alone, where that is set.

    Raises:
        UserError: The run was stopped, and why.
    """
    whole, most = trainer.eval_dataset, job.configs.run.eval_prompts_in_training
    if whole is not None and most is not None:
        trainer.eval_dataset = whole.select(range(min(most, len(whole))))
    try:
        yield
    except RunStopped as stopped:
        raise UserError(str(stopped)) from stopped
    except torch.OutOfMemoryError as error:
        error.add_note(_LESS_MEMORY)  # the last line of the traceback
        raise
    finally:
        trainer.eval_dataset = whole


def write_results(trainer: DPOTrainer, results: dict[str, Any]) -> None:
    """Writes the results, the report and the model card, and prints the table; on the main process.

    Args:
        trainer: The trainer, after training.
        results: As in train_results.json; see `report.tables.final_table`.
    """
    if trainer.is_world_process_zero():
        output.finish(trainer.args.output_dir, results)
        write_report(trainer.args.output_dir)
        trainer.create_model_card()
        print("\n" + final_table(results))
        if samples := results["samples"]:
            send(trainer, sample_logs(samples["score_after"], samples["score_after_interval"], samples["kl"]))
