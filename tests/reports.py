"""Output folders of runs that never ran, and what a page holds."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import yaml

from alignment.data.lengths import Columns
from alignment.data.report import describe


def history(best=0.02, steps=10):
    """A line of training a step, an evaluation every other one; the best responses move by `best` a step."""
    lines = []
    for step in range(1, steps + 1):
        reward, rest = best * step, (best - 0.03) * step
        at = {"step": step, "epoch": step / 10}
        metrics = {"loss": 1.38 - 0.01 * step, "rewards/chosen": reward, "rewards/rejected": rest,
                   "rewards/margins": reward - rest, "rewards/accuracies": 0.7, "entropy": 1.5,
                   "mean_token_accuracy": 0.6, "rewards/rank_0": reward, "rewards/rank_1": rest}  # fmt: skip
        lines.append(at | metrics | {"learning_rate": 1e-3, "grad_norm": 2.0, "num_input_tokens_seen": 100 * step,
                                     "train_runtime": 0.5 * step})  # fmt: skip
        if step % 2 == 0:
            lines.append(at | {f"eval_{key}": value for key, value in metrics.items()})
    return lines


def write_run(folder, loss="NCA", best=0.02, **recipe):
    folder.mkdir()
    rng = np.random.default_rng(0)
    columns = Columns(rng.random(40), rng.integers(5, 50, 40), rng.integers(5, 9, 10), np.full(10, 4), "tokens")
    counts = {"rows_in": 10, "rows_kept": 10, "rows_dropped": 0, "dropped_by_reason": {}, "fixed_by_reason": {}}
    recipe = {"model_name_or_path": "models/some-model", "loss_type": loss, "beta": 0.1, "alpha": 0.5} | recipe
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    files = {
        "trainer_state.json": {"log_history": history(best)},
        "plan.json": {"num_steps": 10, "global_batch_size": 4},
        "data_report.json": counts | {"responses": 40} | describe(columns, 0.5),
        "held_out.json": {"step": 10, "rewards/chosen": [best * 10 + 0.01, best * 10 - 0.01] * 3,
                          "rewards/rejected": [0.0] * 6},
        "train_results.json": {"seconds": 80.0, "train": {"train_runtime": 60.0}},
        **{f"samples_{when}.json": [{"prompt": [{"role": "user", "content": f"Question {i}"}],
                                     "samples": [f"Answer {i} {when}"], "scores": [0.5]} for i in range(12)]
           for when in ("before", "after")},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


class Ended:
    """Stands for the process of a run that has ended."""

    def __init__(self, returncode=0):
        self.returncode = returncode

    def poll(self):
        return self.returncode


def faked_run(run, best, rest):
    """Writes at once what a run of a sweep writes; `best` and `rest`: implicit rewards that it ends with."""
    recipe, rng = run.arm.resolved | {"seed": run.seed}, np.random.default_rng(run.seed)
    best, rest = (end + 0.1 * rng.standard_normal(30) for end in (best, rest))
    lines = [{"step": step, "epoch": step / 10, "eval_loss": 1.0, "eval_rewards/chosen": best.mean() * step / 4,
              "eval_rewards/rejected": rest.mean() * step / 4, "eval_rewards/margins": (best - rest).mean()}
             for step in (2, 4)]  # fmt: skip
    held_out = {"step": 4, "rewards/chosen": best.tolist(), "rewards/rejected": rest.tolist(),
                "rewards/accuracies": [0.75] * 30}  # fmt: skip
    files = {"trainer_state.json": {"log_history": lines}, "held_out.json": held_out,
             "train_results.json": {"seconds": 60.0}}  # fmt: skip
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name, content in files.items():
        (run.folder / name).write_text(json.dumps(content))
    return Ended()


class Page(HTMLParser):
    """What a page holds: text, tags, and what its attributes point to."""

    def __init__(self, file):
        super().__init__()
        self.text, self.tags, self.targets = "", [], []
        self.feed(Path(file).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.targets += [
            value for name, value in attrs if name in ("src", "href", "action", "data", "srcset", "xlink:href")
        ]

    def handle_data(self, data):
        self.text += data
