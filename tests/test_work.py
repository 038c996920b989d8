"""Counted work against counts by hand, and against what the plan says."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks import work
from benchmarks.flops import count_flops, model_flops
from benchmarks.gpu import sized
from benchmarks.rows import draw_rows
from benchmarks.sizes import SIZES
from benchmarks.systems import MISTRAL_4BIT, MISTRAL_BF16, SYSTEMS, mistral_config, random_mistral
from benchmarks.work import LORA4, OURS, PAIRS, UNFUSED, Work, count, plan
from trl_nca.cross_entropy import cross_entropy, fused_cross_entropy

RATES = 1e12, 1e9


def test_an_operation_is_its_multiply_adds_or_its_bytes():
    a, b = torch.ones(8, 16), torch.ones(16, 32)
    with Work(rate=1e3, bandwidth=1e9) as slow_to_multiply:
        a @ b
    assert slow_to_multiply.flops == 2 * 8 * 16 * 32
    assert slow_to_multiply.products == pytest.approx(8.192)
    assert slow_to_multiply.memory_bound == 0
    with Work(rate=1e12, bandwidth=1.0) as slow_to_move:
        a @ b
    assert slow_to_move.products == 4 * (8 * 16 + 16 * 32 + 8 * 32)
    one, places, column = torch.ones(1), torch.tensor([0, 1]), torch.zeros(8, 1, dtype=torch.long)
    with Work(*RATES) as counted:
        a[:, :4].t().reshape(-1)  # a copy, for the reshape, of a view
        a.mul_(2)
        one.expand(100).exp()
        a[places]
        a.to(torch.bfloat16)
        torch.exp(a, out=a.new_empty(8, 16, dtype=torch.bfloat16))
        a.scatter_(1, column, a.gather(1, column))
    copied, doubled, spread, taken, narrowed = 2 * 4 * 32, 2 * 4 * 128, 4 + 400, 2 * 4 * 32, (4 + 2) * 128
    gathered, scattered = 2 * 4 * 8, 2 * (8 + 4) * 8  # of places in 8 bytes and numbers in 4
    by_hand = copied + doubled + spread + taken + 2 * narrowed + gathered + scattered
    assert counted.memory_bound * 1e9 == pytest.approx(by_hand)


@pytest.mark.parametrize("system", [OURS, UNFUSED])
def test_products_are_those_that_a_step_must_do(system):
    case = sized(LORA4, tiny=True)
    config = mistral_config(tiny=True, num_hidden_layers=2)
    runner = SYSTEMS[OURS](random_mistral(config, "cpu", torch.float32), case, "cpu")
    by_hand = model_flops(draw_rows(case, case.prompts), count_flops(runner.model), recomputed=True)
    assert count(case, system, MISTRAL_BF16, *RATES, tiny=True).flops == pytest.approx(by_hand, rel=0.06)


def test_attention_is_counted_where_it_looks(monkeypatch):
    case, config = sized(LORA4, tiny=True), mistral_config(tiny=True)
    with_attention = count(case, OURS, MISTRAL_BF16, *RATES, tiny=True)
    monkeypatch.setattr(work, "_pairs", lambda rows, system: 0)
    without = count(case, OURS, MISTRAL_BF16, *RATES, tiny=True)
    a_pair = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    # By hand attention's backward is two forwards; FlashAttention's makes the scores again: two and a half.
    by_hand = model_flops(
        draw_rows(case, case.prompts), {"frozen": 0, "lora": 0, "head": 0, "pair": a_pair}, recomputed=True
    )
    assert with_attention.flops - without.flops == pytest.approx(by_hand * 5.5 / 5)
    assert with_attention.products - without.products == pytest.approx(by_hand * 5.5 / 5 / RATES[0])


def test_fewer_memory_bound_operations_and_no_padding():
    case = sized(PAIRS, tiny=True)
    systems = (*case.systems[:-1], UNFUSED, OURS)
    counts = {system: count(case, system, MISTRAL_4BIT, *RATES, tiny=True) for system in systems}
    ours, unfused = counts[OURS], counts[UNFUSED]
    assert ours.memory_bound < 0.6 * unfused.memory_bound
    assert ours.flops == pytest.approx(unfused.flops, rel=0.02)
    assert all(counts[system].flops > 1.2 * ours.flops for system in case.systems[:-1])
    assert all(c.seconds == c.products + c.memory_bound > 0 for c in counts.values())
    assert 0 < ours.head < 0.5 * ours.seconds and counts["padded"].head == 0  # which has another


@pytest.mark.parametrize(
    ("model", "billions"),
    [("Llama-3-8B", 8.030), ("Qwen3-8B", 8.191), ("Qwen3-0.6B", 0.596), ("Gemma-3-4B", 3.880), ("Gemma-3-1B", 1.000)],
)
def test_models_have_their_published_sizes(model, billions):
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(SIZES[model]).num_parameters()
    assert parameters == pytest.approx(billions * 1e9, rel=1e-3)


def test_the_heads_part():
    a = torch.ones(8, 8)
    with Work(*RATES) as counted:
        (a @ a).exp()
        before = counted.seconds
        counted.of_head(torch.exp)(a)
        counted.of_head(torch.mm)(a, a)
        after = counted.seconds
        a.exp()
    assert counted.head == pytest.approx(after - before)
    assert 0 < counted.head < after < counted.seconds


@pytest.mark.parametrize(
    ("loss", "device", "needs_gradient", "bytes_moved"),
    [
        (cross_entropy, "cpu", False, 14),
        (cross_entropy, "cpu", True, 28),
        (fused_cross_entropy, "cpu", True, 4),
        (fused_cross_entropy, "meta", False, 2),
        (fused_cross_entropy, "meta", True, 4),
    ],
)
def test_passes_over_the_logits(loss, device, needs_gradient, bytes_moved):
    """To float32 6 bytes, log-softmax 8, probabilities 8, to bfloat16 6; fused, logits and gradient."""
    logits = torch.zeros(4, 10000, dtype=torch.bfloat16, device=device)
    targets = torch.zeros(4, dtype=torch.long, device=device)
    with Work(1.0, 1.0) as counted:
        loss(logits, targets, needs_gradient)
    assert counted.memory_bound / logits.numel() == pytest.approx(bytes_moved, rel=0.01)


def test_the_peak_is_the_plans():
    case = replace(sized(LORA4, tiny=True), max_tokens=None)  # in one forward
    parts = plan(case, MISTRAL_BF16, tiny=True)
    above = parts["total"] - sum(parts[part] for part in ("weights", "adapter", "optimizer", "overhead"))
    assert count(case, OURS, MISTRAL_BF16, *RATES, tiny=True).peak == pytest.approx(above, rel=0.05)


def test_torch_counts_the_same_products():
    config = mistral_config(tiny=True)
    model = random_mistral(config, "cpu", torch.float32)
    ids = torch.zeros(1, 9, dtype=torch.long)
    with Work(*RATES) as ours, torch.no_grad():
        model(input_ids=ids)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(input_ids=ids)
    products = sum(n for op, n in counted.get_flop_counts()["Global"].items() if "mm" in str(op))
    assert ours.flops == products
