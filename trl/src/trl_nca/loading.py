"""Loads a 4-bit model that FSDP2 will shard into the memory of the CPU, in place of whole onto each GPU.

Upstream's trainer asks for no device, and bitsandbytes' quantizer then takes the GPU of the process
(`update_device_map` in transformers/quantizers/quantizer_bnb_4bit.py): each process holds all weights before FSDP2
shards them, 43 GB of a model of 70B parameters. From the CPU `fully_shard` moves them to the GPU one decoder layer
after the other, and keeps a part of each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel
from trl.trainer.utils import create_model_from_path


def load_4bit_on_cpu(name: str, **kwargs: Any) -> PreTrainedModel:
    """A model in 4 bits, in the memory of the CPU, with the bits that it has when it is loaded onto the GPU.

    Args:
        name: A model's folder or Hub id.
        **kwargs: Those of `from_pretrained`: `quantization_config`, `dtype`.
    """
    with _quantizing_on(PartialState().device):
        return create_model_from_path(name, **kwargs, device_map={"": "cpu"})


@contextmanager
def _quantizing_on(device: torch.device) -> Iterator[None]:
    """Each weight is quantized on the device and comes back: a CPU takes half a minute a billion numbers on a core."""
    from bitsandbytes.nn import Params4bit

    quantize = Params4bit._quantize

    def quantize_there(self: Params4bit, _: Any) -> Params4bit:
        return quantize(self, device).to("cpu")

    Params4bit._quantize = quantize_there
    try:
        yield
    finally:
        Params4bit._quantize = quantize
