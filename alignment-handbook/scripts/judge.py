"""Judge answers to MT-bench or AlpacaEval: by a model behind an endpoint, a reward function or a reward model.

    python alignment-handbook/scripts/judge.py --benchmark mt_bench --questions question.jsonl \
        --answers runs/mt_bench/model_answer/reward_qlora.jsonl --references reference_answer/gpt-4.jsonl \
        --judge_prompts judge_prompts.jsonl --base_url https://api.openai.com/v1 --model gpt-4 \
        --output_dir runs/mt_bench
    python alignment-handbook/scripts/judge.py --benchmark alpaca_eval --reference_outputs gpt4_turbo.json \
        --answers runs/alpaca_eval/reward_qlora/model_outputs.json --judge_prompts alpaca_eval_clf.txt \
        --base_url http://localhost:8000/v1 --model my-judge --output_dir runs/alpaca_eval
    python alignment-handbook/scripts/judge.py --benchmark alpaca_eval --reward_model org/reward-model \
        --answers runs/alpaca_eval/base/model_outputs.json runs/alpaca_eval/reward_qlora/model_outputs.json \
        --output_dir runs/alpaca_eval

The key of an endpoint is read from the environment (OPENAI_API_KEY) and written nowhere. Every verdict is kept as it
comes: after a kill, a failure or an exhausted budget, the same command asks for the missing ones only.
"""

import argparse

from alignment import errors
from alignment.errors import UserError
from alignment.evaluation.endpoint import EndpointConfig
from alignment.evaluation.judge import VerdictSettings
from alignment.evaluation.judge_alpaca_eval import compare_alpaca_eval
from alignment.evaluation.judge_local import compare_models
from alignment.evaluation.judge_mt_bench import grade_mt_bench
from alignment.sampling.score import Scorer


def main() -> None:
    """Reads the command line and judges."""
    args = _parse()
    scorers = [Scorer.parse(spec, is_model=False) for spec in args.reward_function]
    scorers += [Scorer.parse(spec, is_model=True) for spec in args.reward_model]
    _require(args, "questions", args.benchmark == "mt_bench")
    if args.benchmark == "mt_bench":
        _require(args, "no_logprobs", needed=False)
    if scorers:
        if args.base_url or args.model:
            raise UserError("command line: --base_url is one judge and --reward_function another; give one of them")
        print(compare_models(args.answers, args.questions, args.output_dir, scorers, args.batch_size, args.dtype))
        return
    for name in ("base_url", "model", "judge_prompts"):
        _require(args, name)
    config = EndpointConfig(
        args.base_url, args.model, args.api_key_env, args.max_calls, args.max_cost, args.threads, args.max_retries,
        args.timeout,
    )  # fmt: skip
    settings = _verdict_settings(args)
    if args.benchmark == "mt_bench":
        files = (args.questions, args.answers, args.judge_prompts, args.references, args.output_dir)
        print(grade_mt_bench(*files, config, settings))
    else:
        _require(args, "reference_outputs")
        if len(args.answers) != 1:
            raise UserError(
                "--answers: AlpacaEval compares one model's outputs with --reference_outputs; give one file"
            )
        files = (args.answers[0], args.reference_outputs, args.judge_prompts, args.output_dir)
        print(compare_alpaca_eval(*files, config, settings, args.seed))


def _verdict_settings(args: argparse.Namespace) -> VerdictSettings:
    if args.max_tokens is not None and args.max_completion_tokens is not None:
        raise UserError("command line: --max_tokens and --max_completion_tokens are two names of one thing; give one")
    default = 2048 if args.benchmark == "mt_bench" else 1
    if args.max_completion_tokens is not None:
        limit = (args.max_completion_tokens, "max_completion_tokens")
    else:
        limit = (default if args.max_tokens is None else args.max_tokens, "max_tokens")
    if limit[0] < 1:
        raise UserError(f"--{limit[1]}: must be at least 1, got {limit[0]}")
    return VerdictSettings(*limit, args.judge_temperature, not args.no_logprobs)


def temperature(text: str) -> float | None:
    """Converts a flag, whose errors carry this function's name."""
    if text == "none":
        return None
    value = float(text)
    if not value >= 0:
        raise ValueError
    return int(value) if value.is_integer() else value  # 0 and 0.0 are one request


def _require(args: argparse.Namespace, name: str, needed: bool = True) -> None:
    if needed and not getattr(args, name):
        raise UserError(f"command line: {args.benchmark} needs --{name} for this judge; see --help")
    if not needed and getattr(args, name):
        raise UserError(f"command line: --{name} says nothing to {args.benchmark}; leave it out")


def _parse() -> argparse.Namespace:
    parser = errors.ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument(
        "--benchmark", choices=["mt_bench", "alpaca_eval"], required=True, help="whose answers they are"
    )
    parser.add_argument("--answers", nargs="+", required=True, help="files of generate_answers.py; two for a reward "
                        "function or model")  # fmt: skip
    parser.add_argument("--output_dir", required=True, help="folder to write in")
    parser.add_argument("--questions", help="mt_bench only: FastChat's question.jsonl")
    parser.add_argument("--reference_outputs", help="alpaca_eval only: outputs to compare with")
    endpoint = parser.add_argument_group("a judge behind an endpoint")
    endpoint.add_argument("--base_url", help="OpenAI-compatible, such as http://localhost:8000/v1")
    endpoint.add_argument("--model", help="name of the judge there")
    endpoint.add_argument("--api_key_env", default="OPENAI_API_KEY", help="environment variable with the key")
    endpoint.add_argument("--judge_prompts", help="FastChat's judge_prompts.jsonl; for alpaca_eval a text with "
                          "{instruction}, {output_1}, {output_2}")  # fmt: skip
    endpoint.add_argument("--references", help="for mt_bench: FastChat's reference_answer/gpt-4.jsonl")
    endpoint.add_argument("--max_calls", type=int, help="most requests to send in this run")
    endpoint.add_argument("--max_cost", type=int, help="tokens, of prompts and replies, after which none is sent")
    endpoint.add_argument("--max_tokens", type=int, help="longest verdict; by default 2048 for mt_bench, 1 for "
                          "alpaca_eval")  # fmt: skip
    endpoint.add_argument("--max_completion_tokens", type=int, help="the same, by the name that newer endpoints want; "
                          "a judge that thinks needs some thousands")  # fmt: skip
    endpoint.add_argument("--judge_temperature", type=temperature, default=0, help="temperature of a verdict; none "
                          "sends none, for judges that allow their own alone")  # fmt: skip
    endpoint.add_argument("--no_logprobs", action="store_true", help="alpaca_eval only: ask for no probabilities, for "
                          "judges that refuse; the letter in the reply decides")  # fmt: skip
    endpoint.add_argument("--threads", type=int, default=4, help="requests under way at a time")
    endpoint.add_argument("--max_retries", type=int, default=8, help="how often a failed request is sent again")
    endpoint.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for a reply")
    endpoint.add_argument("--seed", type=int, default=0, help="seeds the order of alpaca_eval's two outputs")
    local = parser.add_argument_group("a judge on this machine")
    local.add_argument("--reward_function", nargs="+", action="extend", default=[], metavar="FILE.py:NAME[=WEIGHT]",
                       help="Python functions, as score.py takes them")  # fmt: skip
    local.add_argument("--reward_model", nargs="+", action="extend", default=[], metavar="NAME[=WEIGHT]",
                       help="folders or Hub ids of sequence classifiers")  # fmt: skip
    local.add_argument("--batch_size", type=int, default=16, help="answers scored at once")
    local.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                       help="type of a reward model's weights; auto: as they were saved")  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    errors.run(main)
