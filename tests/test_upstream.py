"""What the trainers rely on in the installed packages. A failure here means: read upstream's change before going on."""

import inspect
from pathlib import Path

import pytest
import trl
from transformers import Trainer
from trl import DPOTrainer

from nca_trainer import NCAConfig, NCATrainer, PairwiseNCATrainer
from trl_nca.config import UNSUPPORTED
from trl_nca.survival import SurvivingTrainer

SEAMS = {
    "_prepare_dataset": ["dataset", "processing_class", "args", "dataset_name"],
    "_set_signature_columns_if_needed": [],
    "_precompute_ref_logps": ["dataset", "name", "batch_size"],
    "_get_train_sampler": ["train_dataset"],
    "compute_ref_log_probs": ["model", "inputs"],
    "_compute_loss": ["model", "inputs", "return_outputs"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "get_batch_samples": ["epoch_iterator", "num_batches", "device"],
}
#: Of `SurvivingTrainer`, which hands its arguments on as they come.
SURVIVAL_SEAMS = {
    "train": ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "_init_training_state": [
        "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial",
    ],
    "_get_grad_norm": ["model", "grad_norm"],
    "_get_output_dir": ["trial"],
    "_save_checkpoint": ["model", "trial"],
    "_push_from_checkpoint": ["checkpoint_folder"],
}  # fmt: skip


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("name", SEAMS)
def test_overridden_method_exists_upstream_with_its_signature(name):
    assert parameters(getattr(DPOTrainer, name)) == SEAMS[name]
    assert parameters(getattr(NCATrainer, name)) == SEAMS[name]


@pytest.mark.parametrize("name", SURVIVAL_SEAMS)
def test_what_keeps_a_run_alive_exists_upstream_with_its_signature(name):
    assert parameters(getattr(DPOTrainer, name)) == SURVIVAL_SEAMS[name]


def test_nothing_else_of_upstream_is_overridden():
    seams = {NCATrainer: SEAMS, PairwiseNCATrainer: SEAMS, SurvivingTrainer: SURVIVAL_SEAMS}
    for trainer_class, known in seams.items():
        overridden = {n for n, v in vars(trainer_class).items() if callable(v) and hasattr(DPOTrainer, n)}
        assert overridden - {"__init__"} <= set(known)


def test_constructor_keeps_the_arguments_that_are_passed_on():
    assert {
        "data_collator", "processing_class", "peft_config", "quantization_config", "callbacks", "optimizers",
    } <= set(parameters(DPOTrainer.__init__))  # fmt: skip


def test_upstream_calls_the_seams():
    calls = inspect.getsource(Trainer)
    for name in SURVIVAL_SEAMS.keys() - {"train"}:
        assert f"self.{name}(" in calls
    for attribute in ("_tr_loss", "_globalstep_last_logged", "_total_loss_scalar", "current_flos"):
        assert f"self.{attribute}" in calls
    calls = inspect.getsource(DPOTrainer)
    for name in ("_prepare_dataset", "_precompute_ref_logps", "compute_ref_log_probs", "_compute_loss"):
        assert f"self.{name}(" in calls


def test_neutral_values_are_upstreams_defaults():
    fields = NCAConfig.__dataclass_fields__
    for key, neutral in UNSUPPORTED:
        assert fields[key].default == neutral


def test_trl_is_the_installed_package_and_not_this_folder():
    assert "site-packages" in trl.__file__ or "dist-packages" in trl.__file__
    root = Path(__file__).resolve().parent.parent
    assert not (root / "trl" / "__init__.py").exists()
    assert not (root / "alignment-handbook" / "__init__.py").exists()
