"""Compare runs that followed one another, each on the model of the one before, by their samples on held-out prompts.

    python alignment-handbook/scripts/compare_rounds.py runs/iterate/round-1/run runs/iterate/round-2/run

A RUN is the output folder of run_reward.py with a `reward_function` (`samples_before.json`, `samples_after.json`).
"""

from pathlib import Path

from alignment import errors
from alignment.errors import UserError
from alignment.files import read_json
from alignment.report.tables import rounds_table


def main() -> None:
    """Reads the samples and prints the table."""
    parser = errors.ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders, in the order of the rounds")
    runs = parser.parse_args().runs
    files = [(runs[0], "samples_before.json"), *((run, "samples_after.json") for run in runs)]
    rounds = [read_json(Path(run) / name) for run, name in files]
    for (run, name), samples in zip(files, rounds, strict=True):
        if not samples:
            raise UserError(f"{run}: no {name}; set eval_file and reward_function in the recipe")
    print(rounds_table(rounds))


if __name__ == "__main__":
    errors.run(main)
