"""Which objective is better when, on a task small enough for three seeds of everything: docs/evidence.md.

    python -m benchmarks.evidence

Six losses at three betas each, and three of them with 4, 8 and 16 answers a prompt: the same rows, steps and held-out
prompts, one cached reference. It is a sweep (`alignment.sweep`): it can be stopped and given again. The page has the
predictions that were written before the first run, and what became of them.
"""

from collections.abc import Sequence
from pathlib import Path

from alignment import errors
from alignment.report.runs import read_run
from alignment.sweep.arms import make_arms
from alignment.sweep.commands import plan_runs
from alignment.sweep.page import group_arms, run_line
from alignment.sweep.running import environments_of, finish_all
from benchmarks import evidence_page, letters

RECIPE = "yamls/reward_cpu.yaml"
#: What all runs share, beside the recipe. Steps and rate are from pilots with one seed.
SETTINGS = {
    "reward_function": "benchmarks/letters.py:letters_score",
    "choose_responses": "random",
    "temperature": 1.0,  # of the samples: KL is then that of the model as it is
    "max_steps": 128,
    "global_batch_size": 16,
    "per_device_train_batch_size": 16,
    "learning_rate": 1.0e-3,
    "eval_strategy": "no",
    "save_strategy": "no",
    "per_device_eval_batch_size": 50,
    "max_eval_prompts": letters.NUM_EVAL,
    "max_new_tokens": 16,
}
#: Losses and betas. Labels are not in the unit of the scores, so that their losses need another beta for as many nats.
BETAS = {
    "NCA": (0.1, 0.2, 0.5),
    "InfoNCA": (0.1, 0.2, 0.5),
    "DPO": (0.1, 0.2, 0.5),
    "QRPO": (0.1, 0.3, 1.0),
    "OAPL": (0.1, 0.3, 1.0),
    "GVPO": (0.1, 0.3, 1.0),
}
#: Answers a prompt of those runs; and of the others, at each loss's smallest beta.
NUM_RESPONSES = 4
MORE_RESPONSES = {"NCA": (8, 16), "InfoNCA": (8, 16), "DPO": (8, 16)}
#: Arms that were added when the others had been seen, as loss, beta and answers a prompt: how far do the regressions
#: get at a smaller beta, how good are the rankings at a larger one, and what do more answers do there?
LATER = [
    *(evidence_page.Place(loss, 0.05, NUM_RESPONSES) for loss in ("QRPO", "OAPL", "GVPO")),
    *(evidence_page.Place(loss, beta, NUM_RESPONSES) for loss in ("InfoNCA", "DPO") for beta in (1.0, 2.0)),
    *(evidence_page.Place(loss, 0.5, number) for loss in ("NCA", "DPO") for number in (8, 16)),
]
SEEDS = (42, 43, 44)


def arm_words() -> list[list[str]]:
    """The arms as `--arm` takes them."""
    of_betas = [(loss, beta, NUM_RESPONSES) for loss, betas in BETAS.items() for beta in betas]
    of_responses = [(loss, min(BETAS[loss]), number) for loss, numbers in MORE_RESPONSES.items() for number in numbers]
    return [
        [f"loss_type={loss}", f"beta={beta}", f"num_responses={number}"]
        for loss, beta, number in [*of_betas, *of_responses, *LATER]
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs, then writes the page."""
    parser = errors.ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; they share the cores")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the page and its figures")
    args = parser.parse_args(argv)
    folder = args.runs.resolve()
    letters.make_task(folder)
    rows = {f"{name}_file": folder / f"{name}.jsonl" for name in ("train", "eval")}
    settings = SETTINGS | rows | {"model_name_or_path": folder / "model"}
    arms = make_arms(RECIPE, [f"{key}={value}" for key, value in settings.items()], arm_words())
    planned = plan_runs(arms, SEEDS, folder)
    places = environments_of(args.jobs, str(arms[0].resolved["model_name_or_path"]), use_cpu=True)
    for number, run in enumerate(finish_all(planned, folder, places), start=1):
        print(f"{number} of {len(planned)}  {run.name}  {run_line(read_run(run.folder))}", flush=True)
    page = evidence_page.write(group_arms(planned), LATER, args.jobs, args.docs)
    print(f"\n{page.read_text()}\npage  {page}")


if __name__ == "__main__":
    errors.run(main, exit_on_sigterm=True)
