"""What the trainers override in the installed packages, and hand on to them: checked when the trainers are imported.

tests/test_upstream.py checks the same, and more closely how upstream calls it.
"""

import inspect
from collections.abc import Callable, Iterator
from importlib.metadata import version

#: What the tests were run with.
WORKS_WITH = "trl 1.16 with transformers 5.23 or 5.24"
#: Methods of `DPOTrainer` that the trainers override, with the arguments that they take.
SEAMS = {
    "_prepare_dataset": ["dataset", "processing_class", "args", "dataset_name"],
    "_set_signature_columns_if_needed": [],
    "_precompute_ref_logps": ["dataset", "name", "batch_size"],
    "_get_train_sampler": ["train_dataset"],
    "compute_ref_log_probs": ["model", "inputs"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "get_batch_samples": ["epoch_iterator", "num_batches", "device"],
    "_track_num_input_tokens": ["inputs"],
    "_get_grad_norm": ["model", "grad_norm"],
    "_save_checkpoint": ["model", "trial"],
    "_send_telemetry": [],
}
#: Those whose arguments are handed on as they come.
PASSED_ON = {
    "train": ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "_init_training_state": [
        "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial",
    ],
    "_get_output_dir": ["trial"],
    "_save_checkpoint": ["model", "trial"],
    "_push_from_checkpoint": ["checkpoint_folder"],
    "_save": ["output_dir", "state_dict"],
}  # fmt: skip
#: Arguments of the constructor that are handed to it.
CONSTRUCTOR = {
    "model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class", "peft_config",
    "quantization_config", "callbacks", "optimizers",
}  # fmt: skip


def check_seams(trainer_class: type) -> None:
    """Checks that upstream's trainer is what these trainers are made for.

    Args:
        trainer_class: `trl.DPOTrainer`.

    Raises:
        ImportError: It is not. The message, one line, says what has changed and which versions work.
    """
    changed = "; ".join(_changes(trainer_class))
    if changed:
        found = f"trl {version('trl')}, transformers {version('transformers')}"
        raise ImportError(f"NCATrainer cannot extend DPOTrainer ({found}): {changed}. What works: {WORKS_WITH}")


def arguments(function: Callable[..., object]) -> list[str]:
    """Names of a method's arguments, without `self`."""
    return [name for name in inspect.signature(function).parameters if name != "self"]


def _changes(trainer_class: type) -> Iterator[str]:
    for name, expected in (SEAMS | PASSED_ON).items():
        if not hasattr(trainer_class, name):
            yield f"{name} is gone"
        elif (found := arguments(getattr(trainer_class, name))) != expected:
            yield f"{name} takes ({', '.join(found)}), not ({', '.join(expected)})"
    missing = sorted(CONSTRUCTOR - set(arguments(trainer_class.__init__)))
    if missing:
        yield f"its constructor takes no {', '.join(missing)}"
