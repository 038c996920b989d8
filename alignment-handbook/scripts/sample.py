"""Sample responses to prompts: prompts in, K responses a prompt out.

    python alignment-handbook/scripts/sample.py prompts.jsonl --model_name_or_path runs/reward_cpu \
        --output samples.jsonl --num_samples 6 --max_new_tokens 256 --finished_only

A row of PROMPTS has a column `prompt`: text, which is one turn of the user's, or messages, of which the last may be a
tool's; a `.txt` has a prompt a line. Its `tools` and `chat_template_kwargs` reach the chat template. A model is a
folder, a Hub id or the folder of a PEFT adapter; several give `num_samples` responses each. A run that was killed
resumes where it stopped (`OUTPUT.part`) and gives the same file. vLLM is used where it is installed.
"""

from alignment import errors

#: Responses in a batch: what is written at once, and what a kill can cost.
BATCH_SIZES = {"transformers": 64, "vllm": 1024}


def main() -> None:
    """Reads the command line and samples."""
    parser = errors.ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("prompts", help=".jsonl, .json, .csv (each also .gz), .parquet, or .txt with a prompt a line")
    parser.add_argument("--model_name_or_path", nargs="+", action="extend", required=True, help="one model or several")
    parser.add_argument("--output", required=True, help="file to write, a .jsonl")
    parser.add_argument("--num_samples", type=int, default=6, help="responses of each model to a prompt")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest response, in tokens")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token at every step")
    parser.add_argument("--top_p", type=float, default=1.0, help="share of the probability mass to sample from")
    parser.add_argument("--batch_size", type=int, help=f"responses written at once; by default {BATCH_SIZES}")
    parser.add_argument("--seed", type=int, default=0, help="batch i has the seed SEED + i")
    parser.add_argument("--finished_only", action="store_true", help="leave out responses cut at max_new_tokens, which "
                        "would teach to stop in mid-sentence")  # fmt: skip
    parser.add_argument("--engine", choices=["auto", "transformers", "vllm"], default="auto",
                        help="auto: vLLM where it is installed")  # fmt: skip
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                        help="type of the weights; auto: as they were saved")  # fmt: skip
    parser.add_argument("--base", help="the base of adapters, where the one that they name has moved")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    args = parser.parse_args()
    from alignment.sampling.sample import SamplingConfig  # now: it takes seconds
    from alignment.sampling.sample_file import choose_engine, sample_file

    engine = choose_engine(args.engine)
    config = SamplingConfig(
        num_samples=args.num_samples,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        batch_size=BATCH_SIZES[engine] if args.batch_size is None else args.batch_size,
        seed=args.seed,
    )
    written = sample_file(
        args.prompts,
        args.model_name_or_path,
        args.output,
        config,
        finished_only=args.finished_only,
        engine=engine,
        dtype=args.dtype,
        base=args.base,
        overwrite=args.overwrite,
    )
    print(written)


if __name__ == "__main__":
    errors.run(main)
