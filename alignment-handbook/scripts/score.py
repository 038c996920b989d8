"""Score responses: rows of prompt and responses in, the same rows with scores out.

    python alignment-handbook/scripts/score.py samples.jsonl --output scored.jsonl \
        --reward_function data/checkable.py:checkable_score --reward_model org/reward-model=0.5

A reward function has TRL's signature, (prompts, completions, **columns) -> scores; a reward model is a sequence
classifier with one output. The score is their weighted sum; `score_parts` keeps each one's own. A run that was killed
resumes where it stopped (`OUTPUT.part`) and gives the same file.
"""

from alignment import errors
from alignment.sampling.score import Scorer, score_file


def main() -> None:
    """Reads the command line and scores."""
    parser = errors.ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("input", help="rows with prompt and responses, as sample.py writes them")
    parser.add_argument("--output", required=True, help="file to write, a .jsonl")
    parser.add_argument("--reward_function", nargs="+", action="extend", default=[], metavar="FILE.py:NAME[=WEIGHT]",
                        help="Python functions; a weight is 1 by default")  # fmt: skip
    parser.add_argument("--reward_model", nargs="+", action="extend", default=[], metavar="NAME[=WEIGHT]",
                        help="folders or Hub ids of sequence classifiers")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=16, help="responses scored at once, of whole rows")
    parser.add_argument("--digits", type=int, help="decimals to round scores to")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                        help="type of a reward model's weights; auto: as they were saved")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    args = parser.parse_args()
    scorers = [Scorer.parse(spec, is_model=False) for spec in args.reward_function]
    scorers += [Scorer.parse(spec, is_model=True) for spec in args.reward_model]
    written = score_file(
        args.input,
        args.output,
        scorers,
        batch_size=args.batch_size,
        digits=args.digits,
        dtype=args.dtype,
        overwrite=args.overwrite,
    )
    print(written)


if __name__ == "__main__":
    errors.run(main)
