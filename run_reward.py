"""Aligns a language model with K scored responses a prompt, by the NCA or InfoNCA loss.

On a CPU, the embedded model and data (two cores, about 5 minutes):

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

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from trl import get_peft_config, get_quantization_config

from alignment import errors, output
from alignment.data import DataConfig, load_groups
from alignment.errors import UserError
from alignment.evaluate import load_reward_function, score_samples
from alignment.models import PolicyConfig, load_tokenizer, model_init_kwargs
from alignment.plan import plan_run
from alignment.recipe import RunConfig, parse_recipe
from alignment.report import compare_samples, final_table, peak_memory_gb
from alignment.sample import sample_responses
from nca_trainer import NCAConfig, NCATrainer
from trl_nca.responses import describe_group, tokenize_dataset


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
    checkpoint = output.resume_point(args.output_dir, args.resume_from_checkpoint, run_config.overwrite_output_dir)
    reward_function = load_reward_function(run_config.reward_function) if run_config.reward_function else None
    tokenizer = load_tokenizer(policy_config, args.trust_remote_code)

    with PartialState().main_process_first():  # the others then find the rows in the cache
        raw_train, raw_eval = load_groups(data_config, pairs)
        _check_rows(raw_train, args.loss_type, tokenizer.chat_template is not None)
        lengths = (args.max_length, args.max_prompt_length, args.dataset_num_proc)
        train_rows, train_report = tokenize_dataset(raw_train, tokenizer, *lengths, desc="Tokenizing train")
        eval_rows, eval_report = None, None
        if raw_eval is not None:
            eval_rows, eval_report = tokenize_dataset(raw_eval, tokenizer, *lengths, desc="Tokenizing eval")
    for name, rows, report in [("train", train_rows, train_report), ("eval", eval_rows, eval_report)]:
        if rows is not None and not len(rows):
            raise UserError(f"{name} data: no row is left; dropped: {report['dropped_by_reason']}: raise max_length")
    if run_config.show_batch:
        print(describe_group(train_rows[0], tokenizer))
        return
    if eval_rows is None:
        args.eval_strategy, args.do_eval = "no", False
    plan = plan_run(args, len(train_rows))
    say = print if PartialState().is_main_process else (lambda *_: None)
    say(f"Data: {train_report} train, {eval_report} eval")
    say(plan)

    args.model_init_kwargs = {**model_init_kwargs(policy_config), **(args.model_init_kwargs or {})}
    trainer = trainer_class(
        model=policy_config.model_name_or_path,
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=get_peft_config(policy_config),
        quantization_config=get_quantization_config(policy_config),
    )
    main_process = trainer.is_world_process_zero()
    if main_process and checkpoint is None:
        output.start_output(args.output_dir, configs, run_config.overwrite_output_dir)
        output.write_json(args.output_dir, "plan.json", plan.as_dict())
        output.write_json(args.output_dir, "data_report.json", {"train": train_report, "eval": eval_report})
    trainer.accelerator.wait_for_everyone()

    def look(file: str) -> dict:
        """Evaluates on the held-out rows and samples on their prompts; a resumed run finds the first look in its file."""
        found = broadcast_object_list([output.read_json(args.output_dir, file) if main_process else None])[0]
        if found is not None:
            return found
        look = {"eval": trainer.evaluate() if eval_rows is not None else None, "samples": None}
        if reward_function and raw_eval is not None and main_process:
            prompts = raw_eval["prompt"][: run_config.max_eval_prompts]
            samples = sample_responses(
                trainer.accelerator.unwrap_model(trainer.model),
                tokenizer,
                prompts,
                num_samples=run_config.num_eval_samples,
                max_new_tokens=run_config.max_new_tokens,
                temperature=run_config.temperature,
                seed=args.seed,
                desc=f"Sampling {file.removesuffix('.json')} training",
            )
            look["samples"] = score_samples(reward_function, prompts, samples)
        trainer.accelerator.wait_for_everyone()
        if main_process:
            output.write_json(args.output_dir, file, look)
        return look

    before = look("before.json")
    train_metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model()
    trainer.save_state()
    after = look("after.json")
    if main_process:
        samples = compare_samples(before["samples"], after["samples"]) if before["samples"] else None
        results = {
            "train": train_metrics,
            "eval_before": before["eval"],
            "eval_after": after["eval"],
            "samples": samples,
            "peak_memory_gb": peak_memory_gb(),
            "seconds": time.monotonic() - started,
            "output_dir": args.output_dir,
        }
        output.write_json(args.output_dir, "eval_results.json", {k: results[k] for k in ("eval_after", "samples")})
        output.write_json(args.output_dir, output.FINISHED, results)
        print("\n" + final_table(results))
    if args.push_to_hub:
        trainer.push_to_hub()


def _check_rows(rows: Dataset, loss_type: str, has_template: bool) -> None:
    for i, (prompt, scores) in enumerate(zip(rows["prompt"], rows["scores"], strict=True)):
        if loss_type in ("DPO", "biasedNCA") and len(scores) > 2:
            raise UserError(
                f"loss_type: {loss_type} compares two responses, and row {i + 1} has {len(scores)}; use NCA or InfoNCA, "
                "or run_preference.py with pairs"
            )
        if not has_template and len(prompt) > 1:
            raise UserError(
                f"chat_template: the tokenizer has none, and the prompt of row {i + 1} has {len(prompt)} messages; set "
                "chat_template to a Jinja template or a .jinja file"
            )


if __name__ == "__main__":
    errors.run(lambda: align(sys.argv[1:], NCATrainer, pairs=False))
