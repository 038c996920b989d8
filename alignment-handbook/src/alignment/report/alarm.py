"""The alarm of a run: the likelihood of the best responses has fallen below its start, and by how large a part."""

import math
from typing import NamedTuple

import numpy as np

from alignment.report.runs import Run

#: Alarm threshold, in standard errors below zero.
_BEYOND_NOISE = 2.0
#: Logged windows of training that are used where there are no held-out prompts.
_WINDOWS = 5
#: From this share of the log-likelihood on, the loss is called large.
_LARGE = 0.05


class Alarm(NamedTuple):
    """A loss of likelihood of the best responses.

    Attributes:
        nats: What a best response has lost, in nats; above 0.
        start: Its log-likelihood at the start, in nats, without its sign; None where that is not logged.
        size: The same in words, in proportion.
        text: The alarm in words, with advice.
    """

    nats: float
    start: float | None
    size: str
    text: str

    @property
    def is_large(self) -> bool:
        """Whether the loss is large in proportion to the log-likelihood; so it is where the proportion is unknown."""
        return self.start is None or self.nats >= _LARGE * self.start

    def __str__(self) -> str:
        return self.text


def alarm(run: Run) -> Alarm | None:
    """The alarm, where the likelihood of the best responses has fallen below its start, beyond noise; else None.

    The start is zero: the policy begins as the reference. Noise is two standard errors, over the held-out prompts of
    the newest evaluation; without such, over the last windows of training that were logged.
    """
    values, what, part = _nats_of_best(run)
    if len(values) < 2:
        return None
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    if not mean + _BEYOND_NOISE * error < 0:  # NaN is no alarm of this kind
        return None
    start = run.start_of_best(part)
    proportion = f" of {-start:.3g} a response ({100 * mean / start:.1f} %)" if start else " a response"
    size = f"{mean:.3g} +- {error:.2g} nats{proportion}"
    advice = "Try a smaller learning_rate, or a larger beta"
    if run.recipe.get("loss_type") != "NCA":
        advice += "; NCA is the loss that is to keep it up"
    text = f"The likelihood of the best responses is below its start: {size}, beta {run.beta:g}, {what}. {advice}."
    return Alarm(-mean, -start if start else None, size, text)


def _nats_of_best(run: Run) -> tuple[np.ndarray, str, str]:
    """What the best responses have gained, by prompt or by window, what they are of, and the prefix of their log."""
    held_out = run.gained_by_best(run.of_prompts)
    if len(held_out):
        return held_out, f"{len(held_out)} held-out prompts, step {run.held_out['step']}", "eval_"
    windows = run.gained_by_best(lambda key: run.curve(key)[1])[-_WINDOWS:]
    return windows, f"the last {len(windows)} logged windows of training, step {run.step}", ""
