"""The page of `benchmarks.evidence`: predictions, tables, a figure. Every word that depends on a number is computed.

S seeds, P held-out prompts: a number of each prompt after each run, in arrays of shape (S, P).
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from alignment.report.axes import COLOURS, GREY, tidy
from alignment.report.groups import MEASURES, Estimate, Group, measure
from alignment.sweep.paired import estimate
from benchmarks.claims import above_zero
from benchmarks.pages import save_figure, table, write_page

SCORE, GAIN, CONTROLLED, KL, BEST = (
    "held-out score", "gain in score", "gain at the start's length", "KL (nats)", "best (nats)"
)  # fmt: skip
SHOWN = (SCORE, GAIN, CONTROLLED, KL, BEST)
#: Losses by what of the implicit rewards counts in them.
POINTWISE, DIFFERENCES = ("NCA", "QRPO", "OAPL"), ("DPO", "InfoNCA", "GVPO")
ORDER = (*POINTWISE, *DIFFERENCES)
#: The loss that the others are compared with.
REFERENCE = "NCA"


class Place(NamedTuple):
    """What an arm is."""

    loss: str
    beta: float
    num_responses: int


Found = Mapping[Place, Group]


def write(groups: Sequence[Group], later: Collection[Place], jobs: int, docs: Path) -> Path:
    """Writes evidence.md and figures/frontier.png.

    Args:
        groups: The arms' runs, over the same seeds.
        later: Arms that were added when the others had been seen. The predictions are not on them.
        jobs: Runs at a time.
        docs: Folder of the page.

    Returns:
        The page.
    """
    found = {place_of(group): group for group in groups}
    fewest = min(place.num_responses for place in found)
    predicted = {place: group for place, group in found.items() if place not in later}
    of_losses = {place: group for place, group in found.items() if place.num_responses == fewest}
    save_figure(draw_frontier(of_losses), docs, "frontier.png")
    parts = [
        "# Which objective is better when",
        "Six losses on the same rows, steps, held-out prompts and cached reference. The policy is a model of a hundred "
        "thousand weights that writes letters: the score of an answer is the share of its letters that are of the "
        "prompt, whose expectation does not depend on the length (`benchmarks/letters.py`). So small a task has three "
        "seeds of everything in minutes, and anybody can run it again. It shows directions, on a language model that "
        "is none; [figure2.md](figure2.md) has DPO, InfoNCA and NCA on SmolLM2-135M.",
        _how(groups, jobs),
        "## Predictions, written before the first run",
        PREDICTIONS,
        "## What became of them",
        table(("", "prediction", "holds", "by (95 %)"), list(outcomes(predicted))),
        "## Losses and betas",
        "![Held-out score against KL](figures/frontier.png)",
        f"With {fewest} answers a prompt. A point is the mean over seeds and held-out prompts, and a line joins the "
        "betas of a loss, from the largest to the smallest.",
        _table_of(of_losses),
        "Added when the others had been seen, so that no prediction was made of them: "
        + ", ".join(f"{place.loss} at {place.beta:g}, K {place.num_responses}" for place in later)
        + ".",
        "## Each loss at its best beta",
        f"Of the arms above, those with the best score, and by how much it is above that of {REFERENCE}'s. They were "
        "chosen by the score that is shown, which flatters a loss with more betas.",
        _best_table(of_losses),
        "## More answers a prompt",
        "DPO is given the best and the worst of them, the others all.",
        _table_of({place: group for place, group in found.items() if _has_more(place, found)}),
        "## How to read it",
        "Intervals (95 %) are bootstraps that draw seeds and held-out prompts; those of differences draw the same ones "
        "for both arms. Three seeds are few: the intervals are rough, and rather too narrow. Each is for itself: among "
        "twenty differences that are none, one interval leaves out zero. *Gain at the start's length* is the gain by "
        "a regression on the number of words; *KL* is that of the policy from the reference, a response, estimated "
        "on its own samples; *best* is what the log-likelihood of the held-out best responses gained; *score a root "
        "of KL* is the gain divided by the square root of KL, a rough measure of what a nat buys. *Holds* is `yes` or "
        "`no` where the interval leaves out zero on the side that says so, else `not shown`.",
    ]
    return write_page(docs / "evidence.md", parts)


PREDICTIONS = """1. Each loss raises the held-out score at its smallest beta, and goes further from the
reference there than at its largest one.
2. At the smallest beta the held-out best answers keep their likelihood under the losses in which
each answer counts by itself (NCA, QRPO, OAPL), and lose it under those of differences (DPO,
InfoNCA, GVPO), which leave the level free.
3. More samples a prompt: DPO on the best and the worst of them gets pairs further apart. As arXiv
2502.16825 reports, its score falls from 4 samples to 16, and the best answers lose more likelihood;
the scores of NCA and InfoNCA, which learn from all samples, do not fall.

No winner is predicted: for a KL that two losses share, nothing says which has the better score.
Three pilots with one seed had chosen the steps and the rate before: NCA at beta 0.1, and OAPL at
0.05, where it lost likelihood and went far from the reference; hence the larger betas."""


def place_of(group: Group) -> Place:
    """The arm of a group of runs."""
    recipe = group.runs[0].recipe
    return Place(str(recipe["loss_type"]), float(recipe["beta"]), int(recipe["num_responses"]))


def of_prompts(group: Group, name: str) -> np.ndarray:
    """A number of each held-out prompt after each run. Shape (S, P)."""
    return np.array([measure(run, name) for run in group.runs], dtype=float)


def outcomes(found: Found) -> list[tuple[str, str, str, str]]:
    """Each prediction in short, whether it holds, and the number that says so."""
    small = {place.loss: group for place, group in found.items() if _is_at(place, found, min)}
    large = {place.loss: group for place, group in found.items() if _is_at(place, found, max)}
    rows: list[tuple[str, str, str, str]] = []

    def add(number: str, text: str, values: np.ndarray, form: str, keeps: bool = False) -> None:
        value = estimate(values)
        answer = above_zero(value)
        if keeps:  # that nothing is lost: an interval that is not below zero will do
            answer = "no" if answer == "no" else "yes"
        rows.append((number, text, answer, value.text(form)))

    for loss in small:
        add("1", f"{loss}: the score rises at the smallest beta", of_prompts(small[loss], GAIN), "+.3f")
    for loss in small:
        further = of_prompts(small[loss], KL) - of_prompts(large[loss], KL)
        add("1", f"{loss}: KL is larger at the smallest beta than at the largest", further, "+.2f")
    for loss in POINTWISE:
        add("2", f"{loss}: the best responses keep their likelihood", of_prompts(small[loss], BEST), "+.2f", keeps=True)
    for loss in DIFFERENCES:
        add("2", f"{loss}: the best responses lose likelihood", -of_prompts(small[loss], BEST), "+.2f")
    add("2", "NCA keeps more of it than DPO", of_prompts(small["NCA"], BEST) - of_prompts(small["DPO"], BEST), "+.2f")
    for loss in ("DPO", "NCA", "InfoNCA"):
        few, many = (_by_count(found, loss)[at] for at in (0, -1))
        more = of_prompts(many, GAIN) - of_prompts(few, GAIN)
        if loss == "DPO":
            add("3", "DPO: the score falls from the fewest responses to the most", -more, "+.3f")
            lost = of_prompts(few, BEST) - of_prompts(many, BEST)
            add("3", "DPO: the best responses lose more likelihood with them", lost, "+.2f")
        else:
            add("3", f"{loss}: the score does not fall", more, "+.3f", keeps=True)
    return rows


def _by_count(found: Found, loss: str) -> list[Group]:
    """A loss's arms at its smallest beta, by the number of responses."""
    beta = min(place.beta for place in found if place.loss == loss)
    places = sorted(place for place in found if (place.loss, place.beta) == (loss, beta))
    return [found[place] for place in places]


def _is_at(place: Place, found: Found, end: Callable[[Iterable[float]], float]) -> bool:
    betas = [other.beta for other in found if other.loss == place.loss]
    return place.beta == end(betas) and place.num_responses == min(other.num_responses for other in found)


def _has_more(place: Place, found: Found) -> bool:
    return len([other for other in found if (other.loss, other.beta) == (place.loss, place.beta)]) > 1


def _table_of(found: Found) -> str:
    rows = []
    for place, group in sorted(found.items(), key=lambda item: (ORDER.index(item[0].loss), item[0])):
        numbers = [estimate(of_prompts(group, name)).text(MEASURES[name]) for name in SHOWN]
        rate = of_root_of_kl(of_prompts(group, GAIN), of_prompts(group, KL)).text("+.3f")
        seconds = np.mean([run.results["train"]["train_runtime"] for run in group.runs])
        rows.append((place.loss, f"{place.beta:g}", str(place.num_responses), *numbers, rate, f"{seconds:.0f}"))
    head = ("loss", "beta", "K", *SHOWN, "score a root of KL", "training (s)")
    return table(head, rows)


def _best_table(found: Found) -> str:
    """The arm of each loss with the best score, less that of the reference."""

    def best(loss: str) -> Place:
        places = [place for place in found if place.loss == loss]
        return max(places, key=lambda place: of_prompts(found[place], SCORE).mean())

    places = [best(loss) for loss in ORDER if any(place.loss == loss for place in found)]
    rows, ours = [], found[best(REFERENCE)]
    for place in sorted(places, key=lambda place: -of_prompts(found[place], SCORE).mean()):
        more = estimate(of_prompts(found[place], SCORE) - of_prompts(ours, SCORE)).text("+.3f")
        numbers = [estimate(of_prompts(found[place], name)).text(MEASURES[name]) for name in (SCORE, KL, BEST)]
        rows.append((place.loss, f"{place.beta:g}", *numbers, "" if place.loss == REFERENCE else more))
    return table(("loss", "beta", SCORE, KL, BEST, f"score less {REFERENCE}'s"), rows)


def of_root_of_kl(gains: np.ndarray, kls: np.ndarray, num_resamples: int = 2000) -> Estimate:
    """Mean gain divided by the root of the mean KL, with a bootstrap over seeds and prompts; both of shape (S, P)."""
    rng, (num_seeds, num_prompts) = np.random.default_rng(0), gains.shape
    seeds = rng.integers(num_seeds, size=(num_resamples, num_seeds, 1))
    prompts = rng.integers(num_prompts, size=(num_resamples, 1, num_prompts))

    def rate(gain: np.ndarray, kl: np.ndarray) -> np.ndarray:
        return gain / np.sqrt(np.maximum(kl, 1e-3))  # the estimate of a small KL may be below zero

    draws = rate(gains[seeds, prompts].mean(axis=(1, 2)), kls[seeds, prompts].mean(axis=(1, 2)))
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(float(rate(gains.mean(), kls.mean())), float(low), float(high))


def draw_frontier(found: Found) -> Figure:
    """Held-out score against KL: a line a loss, through its betas."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    tidy(axes)
    start = np.mean([of_prompts(group, SCORE).mean() - of_prompts(group, GAIN).mean() for group in found.values()])
    axes.axhline(start, color=GREY, linewidth=1, linestyle=":")
    axes.plot(0, start, marker="o", color=GREY, linestyle="", label="start")
    for i, loss in enumerate(loss for loss in ORDER if any(place.loss == loss for place in found)):
        groups = [found[place] for place in sorted(found, reverse=True) if place.loss == loss]
        kls, scores = ([estimate(of_prompts(group, name)) for group in groups] for name in (KL, SCORE))
        axes.errorbar(
            [kl.mean for kl in kls],
            [score.mean for score in scores],
            xerr=np.array([(kl.mean - kl.low, kl.high - kl.mean) for kl in kls]).T,
            yerr=np.array([(score.mean - score.low, score.high - score.mean) for score in scores]).T,
            color=COLOURS[i % len(COLOURS)],
            linestyle="-" if loss in POINTWISE else "--",
            marker="os^Dvx"[i],
            elinewidth=0.6,
            label=f"{loss}, each by itself" if loss in POINTWISE else f"{loss}, differences",
        )
    axes.set(xlabel="KL from the reference (nats a response)", ylabel="held-out score")
    axes.legend(frameon=False, fontsize=9)
    return figure


def _how(groups: Sequence[Group], jobs: int) -> str:
    """The command, the settings that all runs share, and the time."""
    runs = [run for group in groups for run in group.runs]
    recipe, hours = runs[0].recipe, sum(run.results["seconds"] for run in runs) / 3600
    names = ("learning_rate", "max_steps", "global_batch_size", "lora_r", "alpha", "dtype", "choose_responses")
    settings = ", ".join(f"`{name}: {recipe[name]}`" for name in names if name in recipe)
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(run.recipe["seed"] for run in runs))
    samples = runs[0].results["samples"]
    return (
        f"```\npython -m benchmarks.evidence\n```\n\n{len(runs)} runs of {60 * hours / len(runs):.1f} minutes by their "
        f"own clocks, {jobs} at a time on {os.cpu_count()} CPU cores. In all of them {settings}; seeds {seeds}; "
        f"{samples['num_prompts']} held-out prompts, {samples['samples_per_prompt']} samples of each."
    )
