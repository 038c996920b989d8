"""What lets a run survive: it stops when asked to, leaves out steps that are not finite, and goes on where it was.

`NCATrainer._record` tells `Survival` of rows that are not finite, and lets the processes agree on a stop, through the
table of metrics that they gather anyway.
"""

import logging
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from trl import DPOTrainer

from trl_nca.checkpoints import GO_ON, RunStopped, rotate, staged

logger = logging.getLogger(__name__)

#: Where trainer_state.json keeps what was seen since the last logged step.
CARRIED = "since_last_log"


class SurvivingTrainer(DPOTrainer):
    """Upstream's trainer, with checkpoints that are complete or absent, and `Survival`.

    Attributes:
        survival: What every step asks.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.survival = Survival(self)
        self.add_callback(self.survival)
        self._staging: str | None = None  # where a checkpoint is being written

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.survival.listening():
            return super().train(*args, **kwargs)

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        begin = super()._init_training_state(max_steps, *args)
        # Upstream would train one step more, where all steps are done and the last is inside an epoch.
        return begin if self.state.global_step < max_steps else (self.state.num_train_epochs, 0)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # (The scaler of float16 looks for such gradients itself, and leaves the step out.)
        if grad_norm is not None and self.accelerator.scaler is None and not math.isfinite(grad_norm):
            self.survival.note_bad([])
        return grad_norm

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_weights()
        self.survival.carry()
        with staged(self.args.output_dir) as self._staging:
            super()._save_checkpoint(model, trial)
            best = Path(self.state.best_model_checkpoint or "")
            if best.parent == Path(self._staging):  # this one: named by the place it is moved to
                self.state.best_model_checkpoint = str(Path(self.args.output_dir) / best.name)
                if self.args.should_save:
                    self.state.save_to_json(str(best / TRAINER_STATE_NAME))
        self._staging = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"))
        if self.args.should_save:
            kept = {f"checkpoint-{self.state.global_step}", Path(self.state.best_model_checkpoint or "").name}
            rotate(self.args.output_dir, self.args.save_total_limit, kept)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else it is about to move, and an upload goes on for a while
            super()._push_from_checkpoint(checkpoint_folder)

    @torch.no_grad()
    def _check_weights(self) -> None:
        """A step may be finite and leave weights that are not, which the next step would find: too late to go on from.

        Raises:
            RunStopped: A trained weight is not finite, on any process.
        """
        parts = (p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters() if p.requires_grad)
        num_bad = sum((~part.isfinite()).sum() for part in parts)
        if self.accelerator.reduce(torch.as_tensor(num_bad, device=self.accelerator.device)).item():
            raise RunStopped(
                f"Step {self.state.global_step}: weights are not finite, and no checkpoint is written of them. Lower "
                f"learning_rate; {GO_ON}"
            )


class Survival(TrainerCallback):
    """Stops on SIGTERM with a checkpoint, counts steps that are not finite, and carries what upstream forgets.

    A stop is at the next micro-batch: the step that it cuts short is left to the run that goes on, and the checkpoint
    is of the moment before it. Upstream's checkpoint holds weights, optimizer, scheduler, random numbers and position;
    this adds the losses and metrics since the last logged step, so that what is logged next is what an uninterrupted
    run logs.

    Args:
        trainer: The trainer that this is a callback of.

    Attributes:
        asked: Whether this process got SIGTERM.
        stopped: Whether any process did, as all of them know since the last gathered table.
        num_bad: Steps in a row that were not finite.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.asked = self.stopped = False
        self.num_bad = 0
        self._is_bad, self._bad_rows = False, []  # of the step that runs
        self._first_step = self._saved_step = 0
        self._cut_short = self._evaluating = False

    # Stopping

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM is noted, and acted on at the next micro-batch: then the program ends with exit code 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        owner = os.getpid()

        def note(number: int, frame: Any) -> None:
            if os.getpid() != owner:  # a worker that has this handler from us
                os._exit(128 + number)
            self.asked = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
            if self.stopped:
                self.leave()
        finally:
            # Where one process of several fails, the launcher sends the others SIGTERM: what they have to say of it is
            # not to be cut short.
            if self.trainer.accelerator.num_processes == 1 or sys.exc_info()[0] in (None, SystemExit):
                signal.signal(signal.SIGTERM, before)

    def leave(self) -> NoReturn:
        """Ends the program."""
        step = self.trainer.state.global_step
        saved = f"checkpoint-{step} is there" if step else "nothing to save yet"
        logger.warning("Stopped by SIGTERM after step %d: %s; --resume_from_checkpoint=true goes on", step, saved)
        raise SystemExit(0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Goes on with the losses and metrics since the last logged step, and with an evaluation that was cut short."""
        carried, trainer = state.stateful_callbacks.get(CARRIED), self.trainer
        self._first_step = self._saved_step = state.global_step  # where this launch goes on from is saved
        if not carried:
            return
        trainer._tr_loss += carried["tr_loss"]
        trainer._total_loss_scalar -= carried["tr_loss"]  # train_loss is of the steps of this launch
        trainer._globalstep_last_logged = carried["last_logged"]
        for name, values in carried["metrics"].items():
            trainer._metrics["train"][name] += values
        if carried["evaluating"]:
            control.should_evaluate = True
            trainer._maybe_log_save_evaluate(trainer._tr_loss, None, trainer.model_wrapped, None, 0, None, time.time())

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the random state before the order of the epoch is drawn: an epoch is resumed from there."""
        self._epoch_random = _random_states()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes where the step begins, should it be cut short."""
        trainer = self.trainer
        self._is_bad, self._bad_rows = False, []
        self._start = {
            "random": self._epoch_random if float(state.epoch).is_integer() else _random_states(),
            "tr_loss": trainer._tr_loss.clone(),
            "flos": trainer.current_flos,
            "tokens": state.num_input_tokens_seen,
            "metrics": {name: len(values) for name, values in trainer._metrics["train"].items()},
        }

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cuts the step short, and takes back what it did."""
        if not self.stopped:
            return
        trainer, start = self.trainer, self._start
        _set_random_states(start["random"])
        trainer._tr_loss.copy_(start["tr_loss"])
        trainer.current_flos, state.num_input_tokens_seen = start["flos"], start["tokens"]
        kept = {name: trainer._metrics["train"][name][:length] for name, length in start["metrics"].items()}
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update(kept)
        self._cut_short = control.should_training_stop = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stops, once this step is logged and saved."""
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where upstream comes by after a stop: the last chance to save, and an evaluation only where one is due."""
        if self.stopped:
            control.should_save = state.global_step != self._saved_step
            control.should_evaluate &= float(state.epoch).is_integer() and not self._cut_short

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves an evaluation, which is between two steps, to the run that goes on."""
        if self.stopped:
            if state.global_step != self._first_step:
                self._evaluating = True
                self.trainer._save_checkpoint(self.trainer.model, trial=None)
            self.leave()

    # Saving

    def carry(self) -> None:
        """Puts what the checkpoint of this moment must hold into the trainer's state; called by all processes."""
        trainer = self.trainer
        self._saved_step = trainer.state.global_step
        trainer.state.stateful_callbacks[CARRIED] = {
            "tr_loss": trainer.accelerator.gather(trainer._tr_loss.detach()).mean().item(),
            "last_logged": trainer._globalstep_last_logged,
            "evaluating": self._evaluating,
            "metrics": {name: list(values) for name, values in trainer._metrics["train"].items() if values},
        }

    # Steps that are not finite

    def note_bad(self, rows: list[str]) -> None:
        """The step that runs is not finite.

        Args:
            rows: Where the rows stand whose loss is not; none, where only the gradient is not.
        """
        self._is_bad = True
        self._bad_rows += rows

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the step out, if it is not finite.

        Raises:
            RunStopped: It is the `max_nan_steps`-th in a row.
        """
        if not self._is_bad:
            self.num_bad = 0
            return
        self.num_bad += 1
        what = f"the loss of {', '.join(self._bad_rows)}" if self._bad_rows else "the gradient, of finite losses,"
        step = f"Step {state.global_step + 1}: {what} is not finite"
        # DeepSpeed has made its step inside the backward pass: it cannot be left out.
        if self.num_bad >= args.max_nan_steps or self.trainer.is_deepspeed_enabled:
            raise RunStopped(
                f"{step}, for {self.num_bad} steps in a row (max_nan_steps {args.max_nan_steps}). Look at these rows, "
                f"or lower learning_rate; {GO_ON}"
            )
        logger.warning("!!! %s; the step is left out (%d of max_nan_steps %d)", step, self.num_bad, args.max_nan_steps)
        if self.trainer.accelerator.scaler is None:  # the scaler of float16 leaves such steps out by itself
            self.trainer.model.zero_grad(set_to_none=True)  # without gradients an optimizer changes nothing


def _random_states() -> dict[str, Any]:
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
