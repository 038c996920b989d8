"""Sends what training does not log itself to the experiment trackers: the held-out score, and the alarm."""

from collections.abc import Sequence

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import DPOTrainer

_TRACKERS = tuple(INTEGRATION_TO_CALLBACK.values())


def sample_logs(score: float, interval: Sequence[float], kl: float | None = None) -> dict[str, float]:
    """The mean score of samples, its 95 % interval, and the KL divergence, under the names that trackers get."""
    low, high = interval
    logs = {"samples/score": score, "samples/score_low": low, "samples/score_high": high}
    return logs if kl is None else logs | {"samples/kl": kl}


def send(trainer: DPOTrainer, logs: dict[str, float]) -> None:
    """Sends numbers to the trackers of `report_to` alone: neither the console nor trainer_state.json has them.

    Args:
        trainer: Its trackers and its step. Training has begun: before, they do not know where to write.
        logs: Numbers by name.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, _TRACKERS):
            callback.on_log(trainer.args, trainer.state, trainer.control, logs=dict(logs), model=trainer.model)
