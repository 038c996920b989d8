"""FlashAttention 3 or 4 in place of torch's own 2, where one is installed that this GPU and these models can use.

Legend: H heads, T packed tokens, D head dimension.
"""

import importlib.util
import itertools
import logging
from collections.abc import Sequence

import torch
import torch.nn.attention as switch
from torch import Tensor, nn
from transformers import PretrainedConfig

from trl_nca.layout import GroupLayout
from trl_nca.shared_prompt import _attend_by_flash

logger = logging.getLogger(__name__)

#: By the GPU's major compute capability (Hopper, Blackwell): torch's name, and the package that has the kernels.
_NEWER = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn")}
#: Distance of bfloat16 results that rounding makes, of their norm.
_TOLERANCE = 0.02


def use_newer_flash(models: Sequence[nn.Module]) -> None:
    """Makes torch call FlashAttention 3 or 4, if it is installed and agrees with torch's own on these models' shapes.

    It does so for all of the process: `torch.nn.attention.restore_flash_attention_impl` undoes it. What somebody has
    switched on before stays.
    """
    configs = [model.config.get_text_config() for model in models]
    device = next(models[0].parameters()).device
    name, package = _NEWER.get(_capability(device), ("", ""))
    # torch's padded rows would fail with dropout, which those kernels do not have.
    if not _is_there(name, package) or any(getattr(config, "attention_dropout", 0) for config in configs):
        return
    shapes = list(dict.fromkeys(shape for config in configs for shape in _shapes(config)))
    try:
        expected = [_trial(shape, device) for shape in shapes]
        switch.activate_flash_attention_impl(name)
        if not _agree(expected, [_trial(shape, device) for shape in shapes]):
            raise ValueError("its results are not those of torch's own")
    except Exception as error:  # another version of the package, a shape that it does not take
        if switch.current_flash_attention_impl():
            switch.restore_flash_attention_impl()
        if not isinstance(error, ModuleNotFoundError):  # FlashAttention 2 is a package of FA4's name
            reason = (str(error) or type(error).__name__).splitlines()[0]
            logger.warning("%s is installed and not used: %s", name, reason)
    else:
        logger.warning("Attention runs by %s.", name)


def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _is_there(name: str, package: str) -> bool:
    """Whether torch knows the kernels, they are installed, and nobody has chosen others."""
    if not hasattr(switch, "restore_flash_attention_impl") or name not in switch.list_flash_attention_impls():
        return False
    return not switch.current_flash_attention_impl() and importlib.util.find_spec(package) is not None


def _shapes(config: PretrainedConfig) -> list[tuple[int, int, int, int | None]]:
    """Heads of queries and of keys, head dimension, and window, each way that a model may call attention."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    windows = {None, getattr(config, "sliding_window", None)}
    return [(heads, getattr(config, "num_key_value_heads", None) or heads, size, window) for window in windows]


def _trial(shape: tuple[int, int, int, int | None], device: torch.device) -> list[Tensor]:
    """Output and gradients of attention over a small group, as in a training step."""
    heads, key_heads, size, window = shape
    layout = GroupLayout([40], [[30, 17, 5]], device)  # queries that end with their keys, and begin after them
    generator = torch.Generator().manual_seed(0)

    def draw(num_heads: int) -> Tensor:
        return torch.randn(1, num_heads, 92, size, generator=generator).to(device, torch.bfloat16)  # (1, H, T, D)

    inputs = [draw(n).requires_grad_() for n in (heads, key_heads, key_heads)]
    window = min(window, 16) if window else None  # one that hides something here
    with torch.enable_grad():
        out = _attend_by_flash(*inputs, None, window, layout)
        return [x.float() for x in (out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out) + out))]


def _agree(expected: list[list[Tensor]], found: list[list[Tensor]]) -> bool:
    pairs = zip(itertools.chain(*expected), itertools.chain(*found), strict=True)
    return all((a - b).norm() <= _TOLERANCE * a.norm() for a, b in pairs)  # NaN is not
