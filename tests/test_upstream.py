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
from trl_nca.seams import CONSTRUCTOR, PASSED_ON, SEAMS, arguments, check_seams


@pytest.mark.parametrize("name", SEAMS)
def test_overridden_method_exists_upstream_with_its_signature(name):
    assert arguments(getattr(DPOTrainer, name)) == SEAMS[name]
    assert arguments(getattr(NCATrainer, name)) == SEAMS[name]


@pytest.mark.parametrize("name", PASSED_ON)
def test_what_is_passed_on_exists_upstream_with_its_signature(name):
    assert arguments(getattr(DPOTrainer, name)) == PASSED_ON[name]


def test_nothing_else_of_upstream_is_overridden():
    for trainer_class in (NCATrainer, PairwiseNCATrainer, AtomicCheckpoints):
        overridden = {n for n, v in vars(trainer_class).items() if callable(v) and hasattr(DPOTrainer, n)}
        assert overridden - {"__init__"} <= SEAMS.keys() | PASSED_ON.keys()


def test_constructor_names_the_arguments_that_it_passes_on():
    """So that an editor shows them."""
    assert set(arguments(DPOTrainer.__init__)) >= CONSTRUCTOR
    for trainer_class in (NCATrainer, PairwiseNCATrainer):
        named = inspect.signature(trainer_class).parameters
        assert named.keys() - {"kwargs"} == CONSTRUCTOR - {"data_collator"}
        assert all(parameter.annotation is not inspect.Parameter.empty for parameter in named.values())


def test_constructor_hands_its_arguments_on(monkeypatch):
    given, signature = {name: f"the {name}" for name in CONSTRUCTOR}, inspect.signature(DPOTrainer.__init__)

    class Upstream(Exception):
        pass

    def stop(self, *args, **kwargs):
        raise Upstream(signature.bind(self, *args, **kwargs).arguments)

    monkeypatch.setattr(DPOTrainer, "__init__", stop)
    with pytest.raises(Upstream) as caught:
        NCATrainer(**given)
    received = caught.value.args[0]
    assert {name: received[name] for name in given} == given


def test_changes_of_upstream_are_said_in_one_line():
    class Changed:
        def __init__(self, model, args=None, train_dataset=None, eval_dataset=None, processing_class=None):
            raise NotImplementedError

        def _save(self, folder):
            raise NotImplementedError

    check_seams(DPOTrainer)
    with pytest.raises(ImportError) as caught:
        check_seams(Changed)
    message = str(caught.value)
    assert "\n" not in message
    assert "_prepare_dataset is gone; " in message
    assert "; _save takes (folder), not (output_dir, state_dict); " in message
    assert "its constructor takes no callbacks, data_collator, optimizers, peft_config, " in message
    assert message.startswith(f"NCATrainer cannot extend DPOTrainer (trl {trl.__version__}, transformers ")
    assert "works: trl 1.16" in message


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
