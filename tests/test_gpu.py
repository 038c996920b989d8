"""benchmarks/gpu.py at a tiny size: each part gives the figures that the bars are read from."""

import re
import sys

import pytest

from benchmarks import gpu
from benchmarks.gpu import BARS, OURS, PARTS, bars_table
from tests.conftest import ROOT


def test_ours_equals_padded_rows():
    found = PARTS["equality"](True, "cpu")
    assert [(row["shape"], row["precision"], row["system"]) for row in found] == [
        ("tiny", "fp32", "ours"), ("tiny", "bf16", "padded"), ("tiny", "bf16", "ours"),
    ]  # fmt: skip
    assert max(found[0][figure] for figure in ("logps", "loss", "gradient")) < 1e-4
    assert all(0 < row[figure] < 0.1 for row in found[1:] for figure in ("logps", "gradient"))


@pytest.mark.slow
def test_the_other_parts_have_figures():
    by_k, planned, profile = (PARTS[part](True, "cpu") for part in ("by_k", "planned", "profile"))
    assert [row["num_responses"] for row in by_k] == [2, 4, 8, 16, 32]
    assert all(row["response_tokens_per_second"] > 0 for row in by_k)
    assert [row["case"] for row in planned] == ["QLoRA, K=4", "LoRA, K=4"]
    assert profile["kernels_ms"] and profile["seconds_sdpa"] > 0


def speed(slower, **ours):
    systems = {name: {"times_slower_than_ours": slower, "memory_of_ours": 0.5} for name in ("padded", "upstream")}
    return {"result": {"systems": systems | {OURS: {"whole_memory_gb": 20.0, "utilisation_recomputed": 0.5} | ours}}}


def test_the_table_says_of_each_bar_whether_it_holds():
    exact = [{"precision": p, "system": s, "logps": e, "loss": e, "gradient": e}
             for p, s, e in [("fp32", "ours", 1e-6), ("bf16", "padded", 0.01), ("bf16", "ours", 0.02)]]  # fmt: skip
    by_k = [{"num_responses": k, "peak_memory_gb": peak} for k, peak in [(4, 10.0), (32, 11.0)]]
    parts = {"equality": {"result": exact}, "by_k": {"result": by_k}, "qlora": speed(2.5), "lora": speed(1.5),
             "planned": {"result": [{"plan_over_measured": 1.1}, {"plan_over_measured": 0.8}]},
             "pairs": {"not_run": "no time was left"}}  # fmt: skip
    lines = bars_table({"device": "NVIDIA H100", "parts": parts}).splitlines()[2:]
    said = {cells[0]: (cells[1], cells[3]) for cells in (re.split(r" \| |^\| | \|$", line)[1:] for line in lines)}
    assert said["fp32: furthest of ours from padded"] == ("1e-06", "holds")
    assert said["bf16: ours from fp32, over padded from fp32"] == ("2", "FAILS")
    assert said["QLoRA, K=4: times as fast as padded"] == ("2.5", "holds")
    assert said["LoRA, K=4: times as fast as padded"] == ("1.5", "FAILS")
    assert said["peak at K=32, over that at K=4"] == ("1.1", "holds")
    assert said["plan over measured: furthest from 1"] == ("0.2", "FAILS")
    assert len(said) == len(BARS)
    (pairs,) = [line for line in lines if "pairs" in line]
    assert pairs.endswith("| not run: no time was left |")
    assert "holds" not in bars_table({"device": "cpu", "parts": parts}), "a rehearsal proves nothing"


def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "LAST_START", 0)
    monkeypatch.setattr(sys, "argv", ["gpu", "--device=cpu", f"--output={tmp_path}/out.json"])
    gpu.main()
    assert capsys.readouterr().out.count("not run: no time was left") == len(BARS)
    sent = []

    class Pipe:
        send = staticmethod(sent.append)

    monkeypatch.setitem(PARTS, "qlora", lambda tiny, device: 1 / 0)
    gpu._run("qlora", True, "cpu", Pipe)
    assert sent == [{"not_run": "ZeroDivisionError: division by zero"}]


def test_the_wheels_that_the_script_lists_are_in_the_lock():
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    (wheels,) = re.findall(r"^wheels=\((.*?)\)", script, re.M | re.S)
    locked = {line.partition("==")[0].lower() for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert {wheel.lower() for wheel in wheels.split()} <= locked
