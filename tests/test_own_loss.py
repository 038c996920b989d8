"""A loss of a user's file: found, tried before anything is loaded, and kept to its file. Imports torch only."""

import re

import pytest
import torch

from tests.conftest import ROOT
from trl_nca.losses import LOSSES, info_nca_loss
from trl_nca.losses.own import file_hash, find_loss, loss_name

HINGE = """
from torch import Tensor, relu

def hinge(rewards, targets, response_mask):
    margins = rewards[..., 0] - rewards[..., 1]
    return relu(1 - margins * (targets[..., 0] - targets[..., 1]).sign())

hinge.num_responses = 2
"""
SQUARES = """
def ranks(scores, response_mask, alpha, beta):
    return scores.argsort(-1).argsort(-1).to(scores.dtype)

def squares(rewards, targets, response_mask):
    return ((rewards - targets) ** 2 * response_mask).sum(-1)

squares.separable = True
squares.targets = ranks
"""


def write(folder, text, name="mine.py"):
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_users_loss_is_what_its_file_says(tmp_path):
    loss = find_loss(write(tmp_path, HINGE) + ":hinge")
    assert (loss.num_responses, loss.separable, loss.start) == (2, False, None)
    assert loss.uses_alpha, "its targets are softmax(score / alpha)"
    one_hot = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert loss.loss(torch.tensor([[0.3, 0.1], [0.3, 0.1]]), one_hot, None).tolist() == pytest.approx([0.8, 1.2])
    assert loss.targets(one_hot, None, 0.5, 1.0).tolist()[0] == pytest.approx([0.8808, 0.1192], abs=1e-4)
    own = find_loss(write(tmp_path, SQUARES, "squares.py") + ":squares")
    assert own.separable and not own.uses_alpha
    assert own.targets(torch.tensor([[5.0, 1.0, 3.0]]), None, 0.0, 1.0).tolist() == [[2, 0, 1]]


def test_names_are_found_in_any_case():
    assert loss_name("qrpo") == "QRPO"
    assert find_loss("infonca") is LOSSES["InfoNCA"]
    assert LOSSES["InfoNCA"].loss is info_nca_loss


def test_a_changed_file_is_another_loss(tmp_path):
    """While a run that has begun keeps the one that it was loaded with."""
    spec = write(tmp_path, HINGE) + ":hinge"
    before = file_hash(spec)
    old = find_loss(spec)
    write(tmp_path, HINGE.replace("1 - margins", "2 - margins"))
    rewards, targets = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    assert find_loss(spec).loss(rewards, targets, None).item() == 2
    assert find_loss(spec, before) is old
    assert file_hash(spec) != before
    assert file_hash("NCA") is None


LOSS = "def loss(rewards, targets, response_mask):\n    "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def other(): ...", "has no function 'loss'"),
        ("import nothing_of_that_name", r"cannot be loaded: ModuleNotFoundError: .* \(mine.py, line 1\)"),
        (LOSS + "return rewards.nothing", r"fails on rewards and targets of shape \(2, K\): .* \(mine.py, line 2\)"),
        (
            LOSS + "return rewards.sum()",
            r"returns a tensor of shape \(\); it must return one loss a prompt, shape \(2,\)",
        ),
        (LOSS + "return 1.0", "returns 1.0; it must return one loss a prompt"),
        (LOSS + "return rewards.sum(-1) / 0", "which is not finite"),
        (LOSS + "return targets.sum(-1)", "has no gradient by the rewards"),
        (LOSS + "return 0 * rewards.sum(-1)", "it must be finite, and not 0 throughout"),
        (LOSS + "return (rewards**2).sum(-1)", "depends on padded responses"),
        (
            LOSS + "return (rewards * response_mask).sum(-1) ** 2\nloss.separable = True",
            "says that it is separable, but a response's gradient depends on another's reward",
        ),
        (LOSS + "return rewards.sum(-1)\nloss.seperable = True", "has the attribute 'seperable'; a loss has targets, "),
        (LOSS + "return rewards.sum(-1)\nloss.targets = lambda *_: 1", "makes 1 of scores of shape"),
        ("def loss(rewards, targets): return rewards.sum(-1)", "takes 2 positional arguments but 3 were given"),
    ],
)
def test_what_cannot_be_trained_with_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        find_loss(write(tmp_path, text) + ":loss")


def test_a_file_that_is_not_there():
    with pytest.raises(ValueError, match="'nowhere.py:loss' names no file; write FILE.py:NAME"):
        find_loss("nowhere.py:loss")
    with pytest.raises(ValueError, match="unknown loss 'NCAA', and no FILE.py:NAME; choose one of NCA, "):
        find_loss("NCAA")


def test_the_documented_example_is_one(tmp_path):
    page = (ROOT / "docs/choosing.md").read_text()
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", page, flags=re.S) if "hinge" in code)
    assert find_loss(write(tmp_path, example) + ":hinge").num_responses == 2
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
