"""Where an optimizer step waits for the device, instead of running ahead of it.

    python -m benchmarks.waits                 steps of a tiny model, on a GPU if there is one
    python -m benchmarks.waits --device cpu    the same without

On a GPU torch says so itself. On a CPU there is nothing to wait for: there a GPU is played (`played_gpu`).
"""

import argparse
import contextlib
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForCausalLM

from benchmarks import played_gpu
from benchmarks.played_gpu import PLAYED, PlayedGPU
from benchmarks.tiny import tiny_config, tiny_tokenizer
from nca_trainer import NCAConfig, NCATrainer

#: The steps that are looked at, of four micro-batches each, by what is set.
CASES: dict[str, dict[str, Any]] = {
    "NCA": {},
    "NCA in chunks": {"max_tokens_per_forward": 40, "gradient_checkpointing": True},
    "InfoNCA in chunks": {"loss_type": "InfoNCA", "max_tokens_per_forward": 40},
    "NCA in pieces": {"max_tokens_per_forward": 12},
    "DPO": {"loss_type": "DPO"},
    "NCA, padded rows in chunks": {"shared_prompt": "false", "max_tokens_per_forward": 40},
    "DPO, padded rows": {"shared_prompt": "false", "loss_type": "DPO"},
}

#: What torch's warning begins with.
_WARNING = "called a synchronizing CUDA operation"
#: Of this project, of torch, and of any installed package.
_ROOT, _TORCH, _PACKAGES = f"{Path(__file__).resolve().parent.parent}/", f"{Path(torch.__file__).parent}/", "-packages/"


def tiny_trainer(folder: str, device: str, **settings: Any) -> NCATrainer:
    """A trainer of a tiny model with an adapter, on random rows, for three steps, of which the last is logged."""
    rng, num_responses = random.Random(0), (2,) if settings.get("loss_type") == "DPO" else (2, 3, 5)
    ids = lambda: [rng.randrange(320) for _ in range(rng.randint(1, 12))]  # noqa: E731
    rows = [
        {"prompt_ids": ids(), "response_ids": [ids() for _ in range(k)], "scores": [rng.random() for _ in range(k)]}
        for k in (rng.choice(num_responses) for _ in range(24))
    ]
    defaults = {
        "max_steps": 3, "logging_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
        "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "optim": "adamw_torch", "use_cpu": device == "cpu", "bf16": device == "cuda",
    }  # fmt: skip
    if device == "cpu":  # batches are not pinned there, which is why they are not copied as they are on a GPU
        defaults["accelerator_config"] = {"non_blocking": True}
    torch.manual_seed(0)
    return NCATrainer(
        model=LlamaForCausalLM(tiny_config()), args=NCAConfig(output_dir=folder, **defaults | settings),
        train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer(), peft_config=LoraConfig(r=4),
    )  # fmt: skip


def waits_by_step(trainer: Any) -> list[Counter[str]]:
    """Trains, on a GPU or on one that is played, and says where each optimizer step waited, and how often.

    A step begins where its batches are fetched, and ends with what is logged of it.

    Args:
        trainer: A Trainer that has not trained yet.
    """
    steps: list[Counter[str]] = []
    get_batch_samples = trainer.get_batch_samples
    with watch(trainer.args.device.type) as places, contextlib.ExitStack() as stack:

        def end_step() -> None:
            steps.append(Counter(places))
            places.clear()

        def begin_step(*args: Any) -> Any:
            end_step()
            return get_batch_samples(*args)

        if trainer.args.device.type == "cpu":
            stack.enter_context(_played_on(trainer))
        stack.enter_context(patch.object(trainer, "get_batch_samples", begin_step))
        finish = trainer._finalize_training  # once: it is no step's
        stack.enter_context(patch.object(trainer, "_finalize_training", lambda *args: (end_step(), finish(*args))[1]))
        trainer.train()
    return steps[1:]


@contextlib.contextmanager
def watch(device: str) -> Iterator[list[str]]:
    """A context that lists where Python waits for the device: a place for each time, innermost call first.

    Args:
        device: "cuda", where torch sees all but what the driver or NCCL waits for by itself. Or "cpu": then what is on
            `PLAYED`, or brought there in the context, counts as on a GPU.
    """
    places: list[str] = []
    if device == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("always")  # each time, not once a line
            warnings.showwarning = partial(_note, places, warnings.showwarning)
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield places
            finally:
                torch.cuda.set_sync_debug_mode(before)
    else:
        with PlayedGPU(lambda operation: places.append(f"{operation} at {_place()}")):
            yield places


def _note(places: list[str], show: Any, message: Warning | str, *args: Any, **kwargs: Any) -> None:
    if str(message).startswith(_WARNING):
        places.append(_place())
    else:
        show(message, *args, **kwargs)


def _place() -> str:
    """The call that waits, and where in this project it was made, without torch's own lines."""
    frames, frame = [], sys._getframe(1)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    skipped = (_TORCH, __file__, played_gpu.__file__, "<")
    outside = [frame for frame in frames if not frame.f_code.co_filename.startswith(skipped)]
    ours = [f for f in outside if f.f_code.co_filename.startswith(_ROOT) and _PACKAGES not in f.f_code.co_filename]
    return " < ".join(dict.fromkeys(map(_line, [*outside[:1], *ours[:1]])))


def _line(frame: Any) -> str:
    file = frame.f_code.co_filename.rpartition(_PACKAGES)[2].removeprefix(_ROOT)
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"


@contextlib.contextmanager
def _played_on(trainer: Any) -> Iterator[None]:
    """The trainer, its models and its batches are on `PLAYED`."""
    with (
        patch.dict(PartialState._shared_state, device=PLAYED),
        patch.dict(trainer.accelerator.state.__dict__, device=PLAYED),
        patch.object(type(trainer.args), "device", PLAYED),
    ):
        for model in filter(None, (trainer.model, trainer.ref_model)):
            model.to(PLAYED)
        yield


def count_waits(device: str) -> dict[str, Counter[str]]:
    """For each of `CASES` where the second step waited, and how often: one that is not logged.

    Args:
        device: "cuda" or "cpu".
    """
    found = {}
    for name, settings in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = waits_by_step(tiny_trainer(folder, device, **settings))[1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    found = count_waits(parser.parse_args().device)
    print("\n| step | waits | where |\n|---|---|---|")
    for name, step in found.items():
        print(f"| {name} | {sum(step.values())} | {'; '.join(f'{n}x {place}' for place, n in step.most_common())} |")


if __name__ == "__main__":
    main()
