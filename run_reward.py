"""Aligns a language model with K scored responses a prompt, by the NCA or InfoNCA loss.

On a CPU, the embedded model and data (two cores, about 6 minutes):

    python run_reward.py yamls/reward_cpu.yaml

On 8 GPUs:

    accelerate launch --config_file alignment-handbook/recipes/accelerate_configs/multi_gpu.yaml --num_processes=8 \
        --main_process_port=7000 run_reward.py yamls/reward_qlora.yaml --gradient_accumulation_steps=4 \
        --beta=0.01 --loss_type=NCA --output_dir=data/test_run

Any key of a recipe is a flag: `--help` lists them. Bad input ends with exit code 2 and one line that says what to mend.
"""

import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from alignment import errors, output
from alignment.card import write_card
from alignment.data import DataConfig
from alignment.data_report import summary
from alignment.errors import UserError
from alignment.evaluate import sample_and_score
from alignment.launch import settle_cpu_launch
from alignment.layouts import refuse
from alignment.models import PolicyConfig, adapter_and_quantization, load_tokenizer, model_init_kwargs
from alignment.plan import plan_run, set_global_batch
from alignment.planning import show_plan
from alignment.prepare import prepare_rows
from alignment.recipe import RunConfig, parse_recipe
from alignment.report import compare_samples, final_table, peak_memory_gb
from alignment.score import load_reward_function
from alignment.watch import Watch, write_report
from nca_trainer import NCAConfig, NCATrainer
from trl_nca import memory
from trl_nca.checkpoints import RunStopped, why_torn
from trl_nca.responses import describe_group, tokenize_dataset

prepare = partial(prepare_rows, tokenize=tokenize_dataset)


def align(argv: Sequence[str], trainer_class: type[NCATrainer], pairs: bool) -> None:
    """A run, from the command line to the table: parse, plan, build, train, save.

    Args:
        argv: The command line without the script's name.
        trainer_class: `NCATrainer` or a subclass.
        pairs: Whether the rows are preference pairs.
    """
    started = time.monotonic()
    configs = parse_recipe(argv, [DataConfig, PolicyConfig, RunConfig, NCAConfig])
    data_config, policy_config, run_config, args = configs
    if run_config.plan:
        return show_plan(configs, pairs, prepare, memory)
    refuse(policy_config, args)
    set_global_batch(args, run_config, args.world_size)
    settle_cpu_launch()
    is_main = PartialState().is_main_process
    resume = (args.output_dir, args.resume_from_checkpoint, run_config.overwrite_output_dir, why_torn)
    writes = is_main and not run_config.show_batch
    (checkpoint,) = broadcast_object_list([output.resume_point(*resume) if writes else None])
    reward_function = load_reward_function(run_config.reward_function) if run_config.reward_function else None
    tokenizer = load_tokenizer(policy_config, args.trust_remote_code)
    with PartialState().main_process_first():  # the others then find the rows in the cache
        raw, rows, report = prepare(data_config, args, tokenizer, pairs)
    if run_config.show_batch:
        return print(describe_group(rows["train"][0], tokenizer))
    if "eval" not in rows:
        args.eval_strategy = "no"
    plan = plan_run(args, args.world_size, len(rows["train"]), sum(rows["train"]["length"][:]))
    if is_main:
        print(summary("train", report), plan, sep="\n", flush=True)
    args.recipe = output.resolve(configs)
    args.model_init_kwargs = {**model_init_kwargs(policy_config), **(args.model_init_kwargs or {})}
    try:
        trainer = trainer_class(
            model=policy_config.model_name_or_path,
            args=args,
            train_dataset=rows["train"],
            eval_dataset=rows.get("eval"),
            processing_class=tokenizer,
            **adapter_and_quantization(policy_config),
        )
    except (OSError, ImportError, ValueError) as error:  # what upstream says of weights, packages and modules
        raise UserError(f"{policy_config.model_name_or_path}: cannot be trained as the recipe says: {error}") from error
    trainer.add_callback(Watch(lambda: trainer._metrics["eval"]))
    # Upstream writes a card when it saves or uploads; its own knows no recipe, data or results.
    trainer.create_model_card = lambda **_: is_main and write_card(args.output_dir, policy_config.model_name_or_path)
    if is_main and (checkpoint is None or not output.has_started(args.output_dir)):
        output.start(args.output_dir, args.recipe, plan.as_dict(), report, run_config.overwrite_output_dir)

    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # one process then cannot sample by itself

    def sample(when: str) -> list[dict[str, Any]] | None:
        """Scored samples on held-out prompts, drawn by the main process; kept in `samples_{when}.json`."""
        scored = None
        if reward_function and "eval" in raw and is_main and not sharded:
            policy, prompts = trainer.accelerator.unwrap_model(trainer.model), raw["eval"]["prompt"]
            scored = sample_and_score(policy, tokenizer, prompts, reward_function, run_config, args.seed, when)
            output.write_json(args.output_dir, f"samples_{when}.json", scored)
        trainer.accelerator.wait_for_everyone()
        return scored

    before = sample("before") if checkpoint is None else output.read_json(args.output_dir, "samples_before.json")
    try:
        train_metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    except RunStopped as stopped:
        raise UserError(str(stopped)) from stopped
    trainer.save_model()
    trainer.save_state()
    eval_metrics = trainer.evaluate() if "eval" in rows else None
    after = sample("after")
    if is_main:
        results = {
            "train": train_metrics,
            "eval": eval_metrics,
            "samples": compare_samples(before, after) if before and after else None,
            "beta": args.beta,
            "seconds": time.monotonic() - started,
            "peak_memory_gb": peak_memory_gb(),
            "output_dir": args.output_dir,
        }
        output.finish(args.output_dir, results)
        write_report(args.output_dir)
        trainer.create_model_card()
        print("\n" + final_table(results))
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    errors.run(lambda: align(sys.argv[1:], NCATrainer, pairs=False), exit_on_sigterm=True)
