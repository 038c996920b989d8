"""What `--plan` says of responses that do not fit a forward."""

import pytest
from transformers import AutoConfig, LlamaConfig

from alignment.configs import parse_configs
from alignment.errors import UserError
from alignment.models import SHIPPED_CONFIGS
from alignment.plan import estimate, layouts
from alignment.plan.compatibility import check_layout
from alignment.plan.describe import describe
from alignment.plan.estimate import MemoryEstimator
from alignment.plan.show import _memory
from alignment.plan.steps import plan_run
from alignment.plan.trace import StepMemory
from benchmarks.plan import SMALL
from tests.conftest import ROOT

MISTRAL = AutoConfig.from_pretrained(SHIPPED_CONFIGS / "mistralai--Mistral-7B-v0.1.json")
FLAGS = [str(ROOT / "yamls" / "reward_qlora.yaml"), "--plan", "--gradient_checkpointing=true"]


def peak(config, prompt, response, most):
    """Bytes of one process by part, where forwards have at most so many tokens, and the estimator."""
    configs = parse_configs([*FLAGS, f"--max_tokens_per_forward={most}"])
    estimator = MemoryEstimator(configs, config, [(prompt, [response] * 4)], accumulates=False, on_gpu=True)
    return layouts.peak_memory(estimator.footprint("single"), "single", 1)[1], estimator


def test_32k_tokens_of_a_7b_model_fit_80_gb():
    """Keys and values of all of them are a part of their own: 16 bits each, and a gradient of 32."""
    parts, estimator = peak(MISTRAL, 1024, 32768 - 1024, 4096)
    assert [estimator.num_pieces(layout) for layout in ("single", "ddp", "zero2", "fsdp2")] == [8, 8, 1, 1]
    heads, size = MISTRAL.num_key_value_heads, MISTRAL.hidden_size // MISTRAL.num_attention_heads
    assert parts["keys"] == pytest.approx(2 * MISTRAL.num_hidden_layers * heads * size * 32767 * (2 + 4), rel=1e-3)
    assert parts["total"] < 30e9


def test_a_piece_is_bounded_whatever_the_response_is():
    """But for the keys: twice the response, twice these, and nothing else."""
    short, long = (peak(LlamaConfig(**SMALL), 20, length - 19, 100)[0] for length in (500, 1000))
    assert long["keys"] == pytest.approx(2 * short["keys"], rel=0.01)
    rest = [parts["total"] - parts["keys"] * 1.05 for parts in (short, long)]  # with what fragments lose of them
    assert rest[1] == pytest.approx(rest[0], rel=0.01)


@pytest.fixture
def no_tracing(monkeypatch):
    """A step takes a megabyte a token that is run, and a tenth of it for each whose keys are kept."""

    def step(spec, batch, backward=True):
        length = batch["input_ids"].shape[1]
        tokens = batch.get("piece", length)
        kept = 1e5 * length * ("piece" in batch)
        parts = {"activations": 1e6 * tokens, "gradients": 0.0, "logits": 0.0, "working": 0.0, "keys": kept}
        return StepMemory(tokens, 10**6 * tokens, {"head": parts}, 1, 1)

    monkeypatch.setattr(estimate, "trace_step", step)


def plan_of(layout, *flags):
    """Of four responses of 1000 tokens on two GPUs of 2.5 GB."""
    configs = parse_configs([*FLAGS, f"--parallel={layout}", "--gpu_memory_gb=2.5", *flags])
    plan, notes = plan_run(configs.trainer, 2, 100), []
    facts = _memory(configs, LlamaConfig(**SMALL), [(101, [900] * 4)], plan, notes)
    return facts, describe(plan, facts, notes)


def test_a_plan_says_how_a_long_response_runs(no_tracing):
    facts, text = plan_of("ddp", "--max_tokens_per_forward=300")
    assert facts["tokens_per_forward"] == 300 and facts["memory_per_gpu_gb"]["keys"] == 0.1
    assert facts["layouts"]["zero2"]["training_gb"] > facts["layouts"]["ddp"]["training_gb"] + 0.5
    whole = facts["longest_response"]["whole_gb"]["with_checkpointing"]
    assert whole == pytest.approx(facts["memory_per_gpu_gb"]["total"] + 1.05 * (1 - 0.3 - 0.1), abs=0.01)
    assert "has 1000 tokens with its prompt and runs in 4 pieces; whole a step would take" in text
    assert f"{whole:.1f} GB with checkpointing" in text and ", keys 0.10" in text
    for layout, flags, reason in (
        ("zero2", [], "all processes that weights are sharded over must run the same forwards"),
        ("ddp", ["--shared_prompt=false"], "rows are padded"),
    ):
        facts, text = plan_of(layout, "--max_tokens_per_forward=300", *flags)
        assert f"runs whole: {reason}" in text and facts["memory_per_gpu_gb"]["keys"] == 0
        assert facts["tokens_per_forward"] == 1000 and facts["longest_response"]["pieces"] == 1
    facts, text = plan_of("ddp", "--max_tokens_per_forward=1000")
    assert facts["longest_response"] is None and "The longest response" not in text


def test_a_budget_below_the_longest_response_is_named(no_tracing):
    """One that it fits in pieces, where whole it does not fit."""
    facts, _ = plan_of("ddp")
    assert not facts["fits"] and 0 < facts["largest_max_tokens_per_forward"] < 1000
    fits, _ = plan_of("ddp", f"--max_tokens_per_forward={facts['largest_max_tokens_per_forward']}")
    more, _ = plan_of("ddp", f"--max_tokens_per_forward={facts['largest_max_tokens_per_forward'] + 64}")
    assert fits["fits"] and not more["fits"]
    facts, _ = plan_of("zero2")
    assert facts["largest_max_tokens_per_forward"] is None


@pytest.mark.parametrize("key", ["cp_size", "sp_size"])
def test_sequences_that_are_sharded_over_processes_are_refused(key, no_tracing, monkeypatch):
    """The plan says so, and what a process takes without."""
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{key.upper()}", "2")
    facts, text = plan_of("ddp", "--max_tokens_per_forward=300")
    assert not facts["fits"] and f"Refused: {key}: 2: it shards causal sequences, and a packed row is none" in text
    assert facts["layouts"]["ddp"]["training_gb"] > 0 and "Note: The table is of whole sequences" in text
    configs = parse_configs(FLAGS)
    with pytest.raises(UserError, match=f"{key}: 2: .*; use max_tokens_per_forward"):
        check_layout(configs.policy, configs.trainer)
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{key.upper()}", "1")
    check_layout(configs.policy, configs.trainer)
