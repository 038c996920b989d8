"""Floating-point operations of a step, and the rate at which a machine does them."""

import time
from typing import Any

import torch


def count_flops(model: torch.nn.Module) -> dict[str, int]:
    """Multiply-adds x 2 of a token's forward: frozen layers, LoRA, head; and per pair of positions, attention."""
    head = model.get_output_embeddings()
    flops = {"frozen": 0, "lora": 0, "head": 2 * head.in_features * head.out_features}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            flops["lora" if "lora_" in name else "frozen"] += 2 * module.in_features * module.out_features
    config = model.get_base_model().config
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    flops["pair"] = 4 * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) * layers
    return flops


def model_flops(
    rows: list[dict[str, Any]], flops: dict[str, int], cached: bool = False, recomputed: bool = False
) -> float:
    """What a step must compute, with each prompt once and no padding: reference and policy forward, and backward.

    Backward costs a forward for frozen weights (the gradient of their input alone), two for LoRA and for attention.

    Args:
        rows: Rows of the step.
        flops: From `count_flops`.
        cached: The reference's log-probs are there.
        recomputed: The layers' forward is counted once more, as checkpointing runs it.
    """
    total, references, again = 0.0, 0 if cached else 1, int(recomputed)
    for row in rows:
        prompt, responses = len(row["prompt_ids"]) - 1, [len(r) for r in row["response_ids"]]
        tokens = prompt + sum(responses)
        pairs = prompt * prompt / 2 + sum(n * (prompt + n / 2) for n in responses)
        total += tokens * ((2 + references + again) * flops["frozen"] + (3 + again) * flops["lora"])
        total += sum(responses) * (2 + references) * flops["head"]
        total += pairs * (3 + references + again) * flops["pair"]
    return total


def matmul_rate(device: str, precision: str) -> float:
    """Floating-point operations a second of a large matrix product."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Without instructions for bf16, a CPU takes a minute for the larger one.
    n = 8192 if device == "cuda" else 2048 if precision == "fp32" else 256
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)
