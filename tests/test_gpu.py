"""benchmarks/gpu.py at a tiny size: each part gives the figures that the bars are read from."""

import re
import sys
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils._pytree import tree_map
from transformers import LlamaForCausalLM

from benchmarks import gpu
from benchmarks import rows as rows_of_cases
from benchmarks.gpu import OURS, PARTS, sized
from benchmarks.rows import draw_rows, text_ids
from benchmarks.systems import (
    BEST,
    CACHED,
    LORA,
    MISTRAL_BF16,
    SYSTEMS,
    TINY,
    UPSTREAM_BEST,
    load_model,
    mistral_config,
)
from benchmarks.targets import TARGETS, targets_table
from benchmarks.variants import VARIANTS
from benchmarks.work import LORA4, PAIRS
from tests.conftest import ROOT
from tests.tiny import SHAPES, rows_of, tiny_config
from trl_nca import kernels, layers
from trl_nca.collate import GroupCollator
from trl_nca.logps import prepare, response_logps


def test_ours_equals_padded_rows():
    found = PARTS["equality"](True, "cpu")
    assert [(row["shape"], row["precision"], row["system"]) for row in found] == [
        ("tiny", "fp32", "ours"), ("tiny", "fp32", "in pieces"),
        ("tiny", "bf16", "padded"), ("tiny", "bf16", "ours"), ("tiny", "bf16", "in pieces"),
    ]  # fmt: skip
    assert max(row[figure] for row in found[:2] for figure in ("logps", "loss", "gradient")) < 1e-4
    assert all(0 < row[figure] < 0.1 for row in found[2:] for figure in ("logps", "gradient"))


def test_kernels_are_held_against_float32(monkeypatch):
    found = PARTS["kernels"](True, "cpu")
    assert not found.pop("compiled"), "nothing is compiled on a CPU"
    assert len(found) == 7
    for figures in found.values():
        assert 0 < figures["distance"] == figures["plain_distance"] < 0.01
    (target,) = [figure for part, _, figure, *_ in TARGETS if part == "kernels"]
    assert target(found | {"compiled": True}) == 1
    with pytest.raises(ValueError, match="could not be compiled"):
        target(found | {"compiled": False})
    monkeypatch.setattr(kernels, "run", lambda function, *args: tree_map(lambda x: x.float() * 1.1, function(*args)))
    assert target(PARTS["kernels"](True, "cpu") | {"compiled": True}) > 10


@pytest.mark.slow
def test_the_other_parts_have_figures():
    by_k, planned, seconds = (list(PARTS[part](True, "cpu"))[-1] for part in ("by_k", "planned", "variants"))
    profile, job, waits = (PARTS[part](True, "cpu") for part in ("profile", "job", "waits"))
    assert all(sum(places.values()) == 1 for places in waits.values())
    assert [row["num_responses"] for row in by_k] == [2, 4, 8, 16, 32]
    assert all(row["response_tokens_per_second"] > 0 for row in by_k)
    assert [row["case"] for row in planned] == ["QLoRA, K=4", "LoRA, K=4", "LoRA, K=4, no checkpointing"]
    assert profile["aten::mm"] > 0
    assert seconds.keys() == {"ours", *VARIANTS, "ours again"}
    assert "does not support backward on CPU" in seconds.pop("FlexAttention")
    assert all(value > 0 for value in seconds.values()), seconds
    assert (ROOT / job["report"]).is_file() and job["num_prompts"] == 2


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", VARIANTS)
def test_other_ways_to_take_the_step_are_the_same_step(name, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda self, dynamic: None)  # which takes its time
    monkeypatch.setattr(layers, "_has_fused_norm", lambda x, weight: True)
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(tiny_config()), LORA)
    shared, batch = prepare([model]), GroupCollator()(rows_of(SHAPES))
    fused = {id(module): module.forward for module in model.modules()}
    with torch.no_grad():
        exact = response_logps(model, batch, shared)
        with VARIANTS[name](model):
            torch.testing.assert_close(response_logps(model, batch, shared), exact)
            changed = [module for module in model.modules() if module.forward != fused[id(module)]]
    with pytest.raises(RuntimeError, match="no memory"), VARIANTS[name](model):
        raise RuntimeError("no memory")
    expected = {"PEFT's layers": 14 + 5 + 4, "gates and rotations in passes": 4}
    assert len(changed) == expected.get(name, 0)
    assert all(module.forward == fused[id(module)] for module in model.modules()), "and all is as it was"


def test_text_is_drawn_with_the_lengths_of_the_case(monkeypatch):
    case = replace(LORA4, vocabulary=300)
    rows = draw_rows(case, 20)
    text = text_ids(300)
    assert max(text) < 300
    lengths = [(len(row["prompt_ids"]), [len(r) for r in row["response_ids"]]) for row in rows]
    assert max(p + max(ns) for p, ns in lengths) == 1024
    monkeypatch.setattr(rows_of_cases, "text_ids", lambda vocabulary: list(range(5000)))
    others = draw_rows(case, 20)
    assert lengths == [(len(row["prompt_ids"]), [len(r) for r in row["response_ids"]]) for row in others]
    assert all(r == list(range(r[0], r[0] + len(r))) for row in others for r in row["response_ids"]), "a piece of it"


def speed(slower, cached=1.0, **ours):
    """Figures of a part in which a step of ours takes a second, and of the others `slower` times as long."""
    others = {"memory_of_ours": 0.5, "seconds": [slower] * 3}
    mine = {"whole_memory_gb": 20.0, "utilisation": 0.5, "utilisation_recomputed": 0.5, "seconds": [1.0] * 3} | ours
    systems = dict.fromkeys(("padded", UPSTREAM_BEST), others) | dict.fromkeys((OURS, BEST), mine)
    return {"result": {"systems": systems | {CACHED: {"seconds": [cached] * 3}}}}


def test_the_table_says_of_each_bar_whether_it_holds():
    exact = [{"precision": p, "system": s, "logps": e, "loss": e, "gradient": e}
             for p, s, e in [("fp32", "ours", 1e-6), ("bf16", "padded", 0.01), ("bf16", "ours", 0.02)]]  # fmt: skip
    by_k = [{"num_responses": k, "peak_memory_gb": peak} for k, peak in [(4, 10.0), (32, 11.0)]]
    found = {"equality": {"result": exact}, "by_k": {"result": by_k},
             "qlora": speed(2.5), "lora": speed(1.5, cached=0.5),
             "planned": {"result": [{"plan_over_measured": 1.1}, {"plan_over_measured": 0.8}]},
             "pairs": {"not_run": "no time was left"}}  # fmt: skip
    lines = targets_table({"device": "NVIDIA H100", "parts": found}).splitlines()[2:]
    said = {cells[0]: (cells[1], cells[3]) for cells in (re.split(r" \| |^\| | \|$", line)[1:] for line in lines)}
    assert said["fp32: furthest of ours from padded"] == ("1e-06", "holds")
    assert said["bf16: ours from fp32, over padded from fp32"] == ("2", "FAILS")
    assert said["QLoRA, K=4: times as fast as padded"] == ("2.5", "holds")
    assert said["LoRA, K=4: times as fast as padded"] == ("1.5", "FAILS")
    assert said["LoRA, K=4, reference cached: times as fast as padded"] == ("3", "holds")
    assert said["peak at K=32, over that at K=4"] == ("1.1", "holds")
    assert said["plan over measured: furthest from 1"] == ("0.2", "FAILS")
    assert len(said) == len(TARGETS)
    (pairs,) = [line for line in lines if "pairs" in line]
    assert pairs.endswith("| not run: no time was left |")
    assert "holds" not in targets_table({"device": "cpu", "parts": found}), "a rehearsal proves nothing"


def test_the_table_is_there_when_nothing_was_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--device=cpu", "--seconds=0", f"--output={tmp_path}/out.json"])
    gpu.main()
    assert capsys.readouterr().out.count("not run: no time was left") == len(TARGETS)


def test_a_rehearsal_has_fewer_layers_and_proves_nothing(monkeypatch):
    monkeypatch.setenv("MISTRAL_LAYERS", "2")
    assert mistral_config(tiny=False).num_hidden_layers == 2
    found = [{"plan_over_measured": 1.1}]
    results = {"device": "NVIDIA H100", "layers": 2, "parts": {"planned": {"result": found}, "by_k": {"result": []}}}
    lines = targets_table(results)
    assert "holds" not in lines and "FAILS" not in lines
    assert "no figure: StopIteration" in lines, "and the bars after it are there"


@pytest.mark.parametrize("name", [OURS, "upstream"])
def test_systems_run_the_policy_as_a_training_run_does(name, monkeypatch):
    """Under autocast, which upstream's `train` sees to: without it LoRA's products would be PEFT's own, in float32."""
    case = sized(PAIRS, tiny=True)
    runner = SYSTEMS[name](load_model(MISTRAL_BF16 + TINY, case, "cpu"), case, "cpu")
    layer = next(module for module in runner.model.modules() if isinstance(module, LoraLayer))
    seen = []
    layer.register_forward_pre_hook(lambda *args: seen.append(torch.is_autocast_enabled("cpu")))
    runner.backward(draw_rows(case, case.prompts))
    assert seen and all(seen)
