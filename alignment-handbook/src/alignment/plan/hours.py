"""How long a run may take: its floating-point operations, over a share of what its GPUs can do. An estimate."""

from dataclasses import dataclass
from typing import Any

import torch

from alignment.errors import UserError

#: Share of a GPU's rate that a step is taken to reach, recomputation counted. LoRA and QLoRA steps of Mistral-7B with
#: K = 4 reached 0.37 to 0.40 on one H100 (benchmarks/RESULTS.md, whose utilisation is of the 763 TFLOP/s that a large
#: product reached there). Other models, GPUs and launches were not measured.
SHARE = 0.4

#: Dense bfloat16 rate in TFLOP/s and memory in GB, by the words of a GPU's name. From NVIDIA's data sheets, where the
#: rate "with sparsity" is twice that; RTX 3090 and A6000 from the whitepaper on GA102, 4090 from that on Ada (both with
#: sums in float32).
GPUS = {
    "A100": (312, 80),
    "A100 40GB": (312, 40),
    "H100": (989, 80),
    "H100 PCIe": (756, 80),
    "H100 NVL": (835, 94),
    "H200": (989, 141),
    "L4": (121, 24),
    "L40S": (362, 48),
    "A40": (150, 48),
    "RTX A6000": (155, 48),
    "RTX 3090": (71, 24),
    "RTX 4090": (165, 24),
}


@dataclass(frozen=True)
class Hours:
    """What a run computes, and how long that takes.

    Args:
        gpu: Key of `GPUS`.
        num_gpus: How many of them.
        flops_per_step: Floating-point operations of an optimizer step: the policy's forward and backward, recomputed
            activations, and the reference's forward where it runs at each step.
        flops: Those of the run, with the reference's before the first step where it is computed there.
        at_most: Whether the rows are not known, and were taken as long as the recipe lets them be.
    """

    gpu: str
    num_gpus: int
    flops_per_step: float
    flops: float
    at_most: bool

    @property
    def hours(self) -> float:
        """Hours of the run, without loading, evaluation, sampling and saving."""
        return self.flops / (GPUS[self.gpu][0] * 1e12 * SHARE * self.num_gpus) / 3600

    def __str__(self) -> str:
        hours = self.hours
        amount, unit = (
            (hours * 60, "minutes") if hours < 1 else (hours, "hours") if hours < 72 else (hours / 24, "days")
        )
        about = "at most about" if self.at_most else "about"
        return (
            f"Time (estimate): {about} {amount:.2g} {unit} on {self.num_gpus} x {self.gpu}: "
            f"{self.flops_per_step:.2g} FLOPs a step, at {SHARE:.0%} of {GPUS[self.gpu][0]} TFLOP/s each"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for plan.json."""
        facts = {"gpu": self.gpu, "tflops": GPUS[self.gpu][0], "share": SHARE, "flops_per_step": self.flops_per_step}
        return facts | {"hours": round(self.hours, 3), "at_most": self.at_most}


def named_gpu(name: str) -> str:
    """The key of `GPUS` that a user means, in any case.

    Raises:
        UserError: There is none.
    """
    for known in GPUS:
        if known.lower() == name.lower():
            return known
    raise UserError(f"gpu: the rate of {name!r} is not known here; known are {', '.join(GPUS)}")


def gpu_here() -> str | None:
    """The key of `GPUS` whose words are in the name of the GPU here; None where there is none, or it is not known."""
    if not torch.cuda.is_available():
        return None
    words = torch.cuda.get_device_name(0).replace("-", " ").lower().split()
    fitting = [known for known in GPUS if set(known.lower().split()) <= set(words)]
    return max(fitting, key=len, default=None)
