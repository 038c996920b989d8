"""What the trainers rely on in the installed packages. A failure here means: read upstream's change before going on."""

import inspect
import re
from pathlib import Path

import pytest
import trl
from transformers import Trainer
from trl import DPOTrainer

from nca_trainer import NCAConfig, NCATrainer, PairwiseNCATrainer
from trl_nca.checkpoints import AtomicCheckpoints
from trl_nca.config import UNSUPPORTED

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
#: Seams whose arguments are handed on as they come.
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


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("name", SEAMS)
def test_overridden_method_exists_upstream_with_its_signature(name):
    assert parameters(getattr(DPOTrainer, name)) == SEAMS[name]
    assert parameters(getattr(NCATrainer, name)) == SEAMS[name]


@pytest.mark.parametrize("name", PASSED_ON)
def test_what_is_passed_on_exists_upstream_with_its_signature(name):
    assert parameters(getattr(DPOTrainer, name)) == PASSED_ON[name]


def test_nothing_else_of_upstream_is_overridden():
    for trainer_class in (NCATrainer, PairwiseNCATrainer, AtomicCheckpoints):
        overridden = {n for n, v in vars(trainer_class).items() if callable(v) and hasattr(DPOTrainer, n)}
        assert overridden - {"__init__"} <= SEAMS.keys() | PASSED_ON.keys()


def test_constructor_keeps_the_arguments_that_are_passed_on():
    assert {
        "data_collator", "processing_class", "peft_config", "quantization_config", "callbacks", "optimizers",
    } <= set(parameters(DPOTrainer.__init__))  # fmt: skip


def test_upstream_calls_the_seams():
    calls = inspect.getsource(Trainer)
    for name in (
        PASSED_ON.keys() | {"_track_num_input_tokens", "_get_grad_norm", "compute_loss", "get_batch_samples"}
    ) - {"train"}:
        assert f"self.{name}(" in calls
    for attribute in ("_tr_loss", "_globalstep_last_logged", "_total_loss_scalar", "current_flos"):
        assert f"self.{attribute}" in calls
    assert re.search(
        r"grad_norm = self._get_grad_norm\(.*\)\s*self.control = self.callback_handler.on_pre_optimizer_step\(", calls
    ), "metrics are gathered with the one, and looked at in the other"
    calls = inspect.getsource(DPOTrainer)
    for name in ("_prepare_dataset", "_precompute_ref_logps", "compute_ref_log_probs"):
        assert f"self.{name}(" in calls


def test_neutral_values_are_upstreams_defaults():
    fields = NCAConfig.__dataclass_fields__
    for key, (neutral, _) in UNSUPPORTED.items():
        assert fields[key].default == neutral


def test_trl_is_the_installed_package_and_not_this_folder():
    assert "site-packages" in trl.__file__ or "dist-packages" in trl.__file__
    root = Path(__file__).resolve().parent.parent
    assert not (root / "trl" / "__init__.py").exists()
    assert not (root / "alignment-handbook" / "__init__.py").exists()
