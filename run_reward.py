"""Aligns a language model with K scored responses a prompt, by the NCA or InfoNCA loss.

On a CPU, the embedded model and data (two cores, about 7 minutes):

    python run_reward.py yamls/reward_cpu.yaml

On 8 GPUs:

    accelerate launch --config_file alignment-handbook/recipes/accelerate_configs/multi_gpu.yaml --num_processes=8 \
        --main_process_port=7000 run_reward.py yamls/reward_qlora.yaml --gradient_accumulation_steps=4 \
        --beta=0.01 --loss_type=NCA --output_dir=data/test_run

Any key of a recipe is a flag: `--help` lists most, `--help=all` all. Bad input ends with exit code 2 and one line that
says what to fix.
"""

import sys
import time
from collections.abc import Sequence

from alignment import errors
from alignment.recipe.flags import check_command_line

if __name__ == "__main__":  # now: the imports below take seconds
    errors.run(lambda: check_command_line(sys.argv[1:], __doc__))

from accelerate import PartialState

from alignment import output
from alignment.configs import describe_loss, parse_configs
from alignment.data.prepare import describe_group
from alignment.data.report import summary
from alignment.errors import UserError
from alignment.evaluation.held_out import compare_samples
from alignment.job import Job, model_arguments, prepare_job, sample_held_out, start_output, training, write_results
from alignment.launch import peak_memory_gb
from alignment.models import model_init_kwargs
from alignment.plan.show import show_plan
from alignment.report.callback import ReportCallback
from alignment.report.card import ShownOnHub
from alignment.report.console import print_lines
from nca_trainer import NCATrainer


def align(argv: Sequence[str], trainer_class: type[NCATrainer]) -> None:
    """Runs everything, from the command line to the table: parse, plan, build, train, save.

    Args:
        argv: The command line without the script's name.
        trainer_class: `NCATrainer` or a subclass.
    """
    started = time.monotonic()
    configs = parse_configs(argv)
    loss = describe_loss(configs, trainer_class.pairs)
    if PartialState().is_main_process:
        print(loss, flush=True)
    if configs.run.plan:
        return show_plan(configs, trainer_class.pairs)
    job = prepare_job(configs, trainer_class.pairs)
    if configs.run.show_batch:
        return print(describe_group(job.rows["train"][0], job.tokenizer))
    if PartialState().is_main_process:
        lines = [summary("train", job.data_report), job.plan, job.checkpointing]
        print(*(line for line in lines if line is not None), sep="\n", flush=True)
    trainer = build_trainer(job, trainer_class)
    start_output(job)
    before = sample_held_out(job, trainer, "before")
    with training(job, trainer):
        train_metrics = trainer.train(resume_from_checkpoint=job.checkpoint).metrics
    trainer.save_model()
    trainer.save_state()
    eval_metrics = trainer.evaluate() if "eval" in job.rows else None
    after = sample_held_out(job, trainer, "after")
    results = {
        "train": train_metrics,
        "eval": eval_metrics,
        "samples": compare_samples(before, after) if before and after else None,
        "seconds": time.monotonic() - started,
        "peak_memory_gb": peak_memory_gb(),
        "output_dir": configs.trainer.output_dir,
    }
    write_results(trainer, results)
    if configs.trainer.push_to_hub:
        trainer.push_to_hub()


def build_trainer(job: Job, trainer_class: type[NCATrainer]) -> NCATrainer:
    """The trainer with its model loaded, this project's report and model card.

    Args:
        job: From `prepare_job`.
        trainer_class: `NCATrainer` or a subclass.

    Raises:
        UserError: Weights, packages or modules are not what the recipe says.
    """
    policy, args = job.configs.policy, job.configs.trainer
    if "eval" not in job.rows:
        args.eval_strategy = "no"
    args.recipe = output.resolve(job.configs)
    if job.checkpointing is not None:  # the recipe keeps `auto`: another machine may decide otherwise
        args.gradient_checkpointing = args.activation_checkpointing = job.checkpointing.on
    args.model_init_kwargs = {**model_init_kwargs(policy), **(args.model_init_kwargs or {})}

    class Trainer(ShownOnHub, trainer_class):
        """With this project's model card."""

    try:
        trainer = Trainer(
            args=args,
            train_dataset=job.rows["train"],
            eval_dataset=job.rows.get("eval"),
            processing_class=job.tokenizer,
            **model_arguments(policy, args),
        )
    except (OSError, ImportError, ValueError) as error:  # what upstream says of weights, packages and modules
        raise UserError(f"{policy.model_name_or_path}: cannot be trained with these settings: {error}") from error
    print_lines(trainer)
    trainer.add_callback(ReportCallback(trainer))
    return trainer


if __name__ == "__main__":
    errors.run(lambda: align(sys.argv[1:], NCATrainer), exit_on_sigterm=True)
