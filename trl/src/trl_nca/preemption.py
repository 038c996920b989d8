"""Stop on SIGTERM, as a batch system sends it before it takes the machine: with a checkpoint, and exit code 0."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

#: Where trainer_state.json says that a stop cut an evaluation short.
INTERRUPTED_EVALUATION = "interrupted_evaluation"


class StopOnSigterm(TrainerCallback):
    """Stops a run at the end of the optimizer step in which SIGTERM comes, or at the next batch of an evaluation.

    The processes agree on the stop through the metrics that they gather once a step (`StepMetrics`). An
    evaluation that is cut short is done again by the run that resumes.

    Args:
        trainer: The trainer that this is a callback of.

    Attributes:
        stop_requested: Whether this process received SIGTERM.
        stopped: Whether any process did, as all of them know since metrics were last gathered.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.stop_requested = self.stopped = False
        self._first_step = self._saved_step = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which SIGTERM requests a stop; after a stop it ends the program."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        owner = os.getpid()

        def request_stop(number: int, frame: Any) -> None:
            if os.getpid() != owner:  # a data loader's worker, which inherited this handler
                os._exit(128 + number)
            self.stop_requested = True

        before = signal.signal(signal.SIGTERM, request_stop)
        try:
            yield
            if self.stopped:
                self.exit()
        finally:
            # Where one process of several fails, the launcher sends the others SIGTERM, which must not cut short what
            # they still have to print.
            if self.trainer.accelerator.num_processes == 1 or sys.exc_info()[0] in (None, SystemExit):
                signal.signal(signal.SIGTERM, before)

    def exit(self) -> NoReturn:
        """Ends the program with exit code 0: the run can be resumed."""
        step = self.trainer.state.global_step
        saved = f"checkpoint-{step} is saved" if step else "there is nothing to save yet"
        logger.warning("Stopped by SIGTERM after step %d: %s; resume with --resume_from_checkpoint=true", step, saved)
        raise SystemExit(0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restores what was not logged yet, and repeats an evaluation that was cut short."""
        trainer = self.trainer
        trainer.restore_unlogged_state()
        self._first_step = self._saved_step = state.global_step  # there is a checkpoint of it already
        if state.stateful_callbacks.pop(INTERRUPTED_EVALUATION, False):
            control.should_evaluate = True
            trainer._maybe_log_save_evaluate(trainer._tr_loss, None, trainer.model_wrapped, None, 0, None, time.time())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stops, once this step is logged and saved."""
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Notes the step of the newest checkpoint."""
        self._saved_step = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves only what is due at the end of an epoch, where upstream passes by after a stop."""
        if self.stopped:
            control.should_save = state.global_step != self._saved_step
            control.should_evaluate &= float(state.epoch).is_integer()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves an evaluation to the run that resumes."""
        if self.stopped:
            if state.global_step != self._first_step:
                state.stateful_callbacks[INTERRUPTED_EVALUATION] = True
                self.trainer._save_checkpoint(self.trainer.model, trial=None)
            self.exit()
