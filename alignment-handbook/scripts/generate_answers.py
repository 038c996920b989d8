"""Answer MT-bench's questions or AlpacaEval's instructions with a model, in the files that their evaluators read.

    python alignment-handbook/scripts/generate_answers.py --benchmark mt_bench --questions question.jsonl \
        --model_name_or_path runs/reward_qlora --output_dir runs/mt_bench
    python alignment-handbook/scripts/generate_answers.py --benchmark alpaca_eval --questions alpaca_eval.json \
        --model_name_or_path runs/reward_qlora --output_dir runs/alpaca_eval

Writes OUTPUT_DIR/model_answer/MODEL_ID.jsonl (FastChat's) or OUTPUT_DIR/MODEL_ID/model_outputs.json (AlpacaEval's). A
model is a folder, a Hub id or the folder of a PEFT adapter. A run that was killed resumes where it stopped. docs/
evaluation.md tells where the questions come from.
"""

import argparse
from pathlib import Path

from alignment import errors
from alignment.errors import UserError


def main() -> None:
    """Reads the command line and answers."""
    args = _parse()
    from alignment.evaluation.answers import answer_alpaca_eval, answer_mt_bench  # now: it takes seconds
    from alignment.sampling.sample import SamplingConfig

    model_id = args.model_id or Path(args.model_name_or_path).name
    if not model_id or Path(model_id).name != model_id:
        raise UserError(f"--model_id: {model_id!r} is to name a file; give a name without slashes")
    if args.benchmark == "mt_bench" and args.temperature is not None:
        raise UserError("--temperature: MT-bench has one for each category; leave it out")
    config = SamplingConfig(
        num_samples=1,
        max_new_tokens=args.max_new_tokens,
        temperature=0.7 if args.temperature is None else args.temperature,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    if args.benchmark == "mt_bench":
        answer, output = answer_mt_bench, Path(args.output_dir) / "model_answer" / f"{model_id}.jsonl"
    else:
        answer, output = answer_alpaca_eval, Path(args.output_dir) / model_id / "model_outputs.json"
    model = args.model_name_or_path
    print(answer(args.questions, model, str(output), model_id, config, args.dtype, args.overwrite, args.base))


def _parse() -> argparse.Namespace:
    parser = errors.ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--benchmark", choices=["mt_bench", "alpaca_eval"], required=True, help="whose files to write")
    parser.add_argument("--questions", required=True, help="FastChat's question.jsonl; for AlpacaEval .json or .jsonl "
                        "rows with instruction and dataset")  # fmt: skip
    parser.add_argument("--model_name_or_path", required=True, help="folder, Hub id, or an adapter's folder")
    parser.add_argument("--output_dir", required=True, help="folder to write in")
    parser.add_argument("--model_id", help="name of the model in the files; by default the last part of its path")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="longest answer to a turn, in tokens")
    parser.add_argument(
        "--temperature", type=float, help="for AlpacaEval, by default 0.7; MT-bench sets it by category"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="answers written at once")
    parser.add_argument("--seed", type=int, default=0, help="batch i has the seed SEED + i")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                        help="type of the weights; auto: as they were saved")  # fmt: skip
    parser.add_argument("--base", help="the base of an adapter, where the one that it names has moved")
    parser.add_argument("--overwrite", action="store_true", help="replace the answers if they exist")
    return parser.parse_args()


if __name__ == "__main__":
    errors.run(main)
