"""What a training step asks of the device and of the other processes."""

import pytest
import torch
from accelerate import Accelerator

from tests.engine import FAMILIES, losses_of, make, step
from tests.tiny import SHAPES, rows_of
from tests.trainers import make_trainer, reward_rows
from trl_nca.collate import GroupCollator
from trl_nca.distributed import no_sync
from trl_nca.logps import prepare
from trl_nca.metrics import group_metrics


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("most", [None, 12])
def test_a_packed_step_never_waits_for_the_device(family, most):
    """Tensors without storage refuse to say what is in them, as a GPU does before its queue is done."""
    model = make(family).train()
    prepare([model])
    model.to("meta")
    batch = GroupCollator()(rows_of(SHAPES))
    batch = {name: value.to("meta") if hasattr(value, "to") else value for name, value in batch.items()}
    logps = step(model, batch, "NCA", most)
    losses = losses_of("NCA", batch)(logps)
    group_metrics(losses, logps, logps, batch["scores"], batch["response_mask"])
    assert all(weight.grad is not None for weight in model.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        losses.mean().item()


def test_processes_exchange_once_a_step(tmp_path, monkeypatch):
    """Beside the number of prompts, which the loss needs before it."""
    settings = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "max_steps": 3}
    trainer = make_trainer(tmp_path, reward_rows(12), max_tokens_per_forward=25, logging_steps=100, **settings)
    gathered, gather = [], trainer.accelerator.gather
    monkeypatch.setattr(trainer.accelerator, "gather", lambda tensor: gathered.append(tensor.shape) or gather(tensor))
    trainer.train()
    assert [shape[0] for shape in gathered if len(shape) == 2] == [4, 4, 4]
    assert len(gathered) == 3
    assert trainer.state.num_input_tokens_seen == sum(trainer.train_dataset["length"])


def test_an_error_leaves_gradients_synchronised():
    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(1, 1)
    accelerator.gradient_state._set_sync_gradients(True)
    with pytest.raises(MemoryError), no_sync(accelerator, model):
        assert not accelerator.sync_gradients
        raise MemoryError
    assert accelerator.sync_gradients


def test_a_checkpoint_that_fails_leaves_the_output_folder_in_place(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, reward_rows(4), max_steps=1)
    trainer.train()
    with monkeypatch.context() as patch:
        patch.setattr(type(trainer), "_save_optimizer_and_scheduler", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer._save_checkpoint(trainer.model, trial=None)
    assert trainer._get_output_dir(None) == str(tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))
    trainer._save_checkpoint(trainer.model, trial=None)
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
