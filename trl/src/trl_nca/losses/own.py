"""A loss of a user's file, `--loss_type=my_losses.py:my_loss`, held to what the trainers need of it."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl_nca.losses import LOSSES, Loss
from trl_nca.losses.targets import soft_labels
from trl_nca.user_code import in_words, load_function, names_a_file


def find_loss(loss_type: str, content: str | None = None) -> Loss:
    """The loss of a name, in any case, or of `FILE.py:NAME`.

    A user's function takes (rewards, targets, response_mask) and returns the loss of each prompt, as those of
    `trl_nca.losses` do. It is loaded and tried once for each `content`. As attributes it may have `targets`, a function
    (scores, response_mask, alpha, beta) of the scores (default: softmax(scores / alpha)), and `separable`,
    `num_responses` and the others of `Loss`.

    Args:
        loss_type: The name, or `FILE.py:NAME`.
        content: `file_hash` of the file when it was loaded; None: of the file as it is now.

    Raises:
        ValueError: There is no such loss, or it cannot be trained with: it fails on a small example, returns another
            shape, a number that is not finite, or no gradient, looks at padding, or is not separable though it says so.
    """
    if names_a_file(loss_type):
        return _own_loss(loss_type, content or file_hash(loss_type))
    return LOSSES[loss_name(loss_type)]


def loss_name(loss_type: str) -> str:
    """A loss's name as the table spells it; a user's loss keeps its own.

    Raises:
        ValueError: There is no such loss.
    """
    if names_a_file(loss_type):
        return loss_type
    by_lower = {name.lower(): name for name in LOSSES}
    if loss_type.lower() not in by_lower:
        any_number = [name for name, loss in LOSSES.items() if loss.num_responses is None]
        pairs = [name for name in LOSSES if name not in any_number]
        raise ValueError(
            f"unknown loss {loss_type!r}, and no FILE.py:NAME; choose one of {', '.join(any_number)}, or, with pairs, "
            f"{', '.join(pairs)}"
        )
    return by_lower[loss_type.lower()]


def file_hash(loss_type: str) -> str | None:
    """SHA-256 of the file of a user's loss; None for a name, and where there is no such file."""
    file = Path(loss_type.rpartition(":")[0])
    return hashlib.sha256(file.read_bytes()).hexdigest() if names_a_file(loss_type) and file.is_file() else None


@functools.cache
def _own_loss(spec: str, content: str | None) -> Loss:
    """Loads and tries a user's loss, again where the content of its file has changed."""
    function = load_function(spec)
    settings = {key: getattr(function, key) for key in Loss.__dataclass_fields__ if hasattr(function, key)}
    unknown = {key for key in vars(function) if not key.startswith("_")} - settings.keys()
    if unknown:
        raise ValueError(
            f"{spec} has the attribute {min(unknown)!r}; a loss has {', '.join(Loss.__dataclass_fields__)}"
        )
    defaults: dict[str, Any] = {"targets": soft_labels, "uses_alpha": "targets" not in settings}
    loss = Loss(**defaults | settings | {"loss": function})
    try:
        _try(loss)
    except ValueError as error:
        raise ValueError(f"{spec} {error}") from error
    except Exception as error:
        file = getattr(getattr(function, "__code__", None), "co_filename", None)
        raise ValueError(f"{spec} fails on rewards and targets of shape (2, K): {in_words(error, file)}") from error
    return loss


def _try(loss: Loss) -> None:
    """Runs a loss on two prompts, one of them with fewer responses where it takes any number.

    Raises:
        ValueError: What is wrong, as the end of a sentence that begins with the loss's name.
    """
    k = loss.num_responses or 3
    mask = torch.ones(2, k, dtype=torch.bool)
    mask[1, -1] = loss.num_responses is not None
    scores = torch.linspace(0.0, 1.0, 2 * k, dtype=torch.float64).view(2, k).flip(0)
    targets = loss.targets(scores, mask, 0.5, 0.1)
    if not isinstance(targets, Tensor) or targets.shape != scores.shape:
        raise ValueError(f"makes {_form(targets)} of scores of shape {tuple(scores.shape)}; targets have the same")
    rewards = torch.linspace(-0.3, 0.4, 2 * k, dtype=torch.float64).view(2, k).requires_grad_()
    losses = loss.loss(rewards, targets, mask)
    if not isinstance(losses, Tensor) or losses.shape != (2,):
        raise ValueError(f"returns {_form(losses)}; it must return one loss a prompt, shape (2,) for 2 prompts")
    if not losses.isfinite().all():
        raise ValueError(f"returns {losses.tolist()}, which is not finite")
    if not losses.requires_grad:
        raise ValueError("has no gradient by the rewards; compute it from them, in torch")
    (gradient,) = torch.autograd.grad(losses.sum(), rewards, create_graph=True)
    if not gradient.isfinite().all() or not gradient.any(dim=1).all():
        raise ValueError(
            f"has the gradient {gradient.tolist()} by the rewards; it must be finite, and not 0 throughout"
        )
    if gradient[~mask].any():
        raise ValueError("depends on padded responses; leave out those where response_mask is False")
    if loss.separable and _is_coupled(loss, rewards.detach(), targets, mask, gradient):
        raise ValueError("says that it is separable, but a response's gradient depends on another's reward")


def _is_coupled(loss: Loss, rewards: Tensor, targets: Tensor, mask: Tensor, gradient: Tensor) -> bool:
    """Whether the gradient by the other responses' rewards changes with that of the first."""
    moved = rewards.clone()
    moved[:, 0] += 0.5
    moved.requires_grad_()
    (other,) = torch.autograd.grad(loss.loss(moved, targets, mask).sum(), moved)
    return not torch.allclose(other[:, 1:], gradient[:, 1:], rtol=1e-9, atol=1e-12)


def _form(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.60}"
