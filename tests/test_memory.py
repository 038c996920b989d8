"""What `--plan` says of memory: against real training, against known models, and by how it grows."""

import json
import os
import re
import socket
import subprocess
from types import SimpleNamespace

import datasets
import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from alignment.configs import parse_configs
from alignment.errors import UserError
from alignment.launch import launched_layout
from alignment.models import SHIPPED_CONFIGS, PolicyConfig
from alignment.plan import estimate, layouts, meta_model, trace
from alignment.plan import show as planning
from alignment.plan.compatibility import check_layout, incompatibilities
from alignment.plan.describe import describe
from alignment.plan.meta_model import StepSpec
from alignment.plan.show import make_plan, offline_if_unreachable, show_plan
from alignment.plan.timeline import Timeline
from alignment.plan.trace import StepMemory, largest_forward, repeat_batch, trace_step, weight_sizes
from alignment.recipe import PLAN_KEYS
from benchmarks.plan import LORA, SMALL, Case, measured, planned
from tests.conftest import ROOT
from tests.tiny import tiny_config
from trl_nca import layers, one_pass

RECIPES = sorted((ROOT / "yamls").glob("*.yaml"))
SHORT = {"lengths": (50, 50)}

CASES = [
    *(Case(kind, checkpointing, **SHORT) for kind in ("full", "lora", "4bit") for checkpointing in (False, True)),
    Case("full", True, "bf16", lengths=(30, 20)),
    Case("lora", False, "bf16", lengths=(12, 6)),
    Case("4bit", False, "bf16", lengths=(30, 20)),
    Case("full", False, prompts=2, **SHORT),
    Case("lora", False, max_tokens=200, **SHORT),
    Case("lora", False, max_tokens=50, lengths=(20, 80)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plan_is_what_training_takes(case):
    plan, peak = planned(case), measured(case)
    assert abs(plan["total"] / peak - 1) < 0.05, (plan, peak)  # 15 % is what is promised


def spec_of(name="mistralai--Mistral-7B-v0.1", **changes):
    config = AutoConfig.from_pretrained(SHIPPED_CONFIGS / f"{name}.json")
    return StepSpec(config, torch.bfloat16, autocast=torch.bfloat16, **changes)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mistralai--Mistral-7B-v0.1", 7.242),
        ("mistralai--Mixtral-8x7B-v0.1", 46.703),
        ("meta-llama--Llama-2-70b-hf", 68.977),
        ("meta-llama--Llama-3.1-70B", 70.554),
        ("meta-llama--Llama-3.1-8B", 8.030),
        ("Qwen--Qwen2.5-7B-Instruct", 7.6156),
        ("HuggingFaceTB--SmolLM2-135M-Instruct", 0.134515),
    ],
)
def test_shipped_configs_have_the_published_sizes(name, billions):
    weights = weight_sizes(spec_of(name))
    assert weights.num_trained == pytest.approx(billions * 1e9, rel=1e-4)
    assert weights.base == weights.trained == 2 * weights.num_trained


def test_quantization_takes_linear_layers_and_no_experts():
    mistral = weight_sizes(spec_of(quantization="4bit", peft_config=LORA))
    num_linear = 32 * (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert mistral.quantized == num_linear * (1 / 2 + 4 / 64)
    assert mistral.adapter == 4 * 41_943_040 == weight_sizes(spec_of(peft_config=LORA)).adapter
    lora = LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    mixtral = weight_sizes(spec_of("mistralai--Mixtral-8x7B-v0.1", quantization="4bit", peft_config=lora))
    assert mixtral.quantized < 0.01 * mixtral.base


def small_spec(num_layers=2, **changes):
    return StepSpec(LlamaConfig(**SMALL | {"num_hidden_layers": num_layers}), torch.float32, **changes)


def test_layers_are_counted_by_two_and_three(monkeypatch):
    batch, _ = largest_forward([(30, [40] * 2)], None)
    spec = small_spec(4, peft_config=LORA, checkpointing={"use_reentrant": False})
    by_line = trace_step(spec, batch)
    monkeypatch.setattr(trace, "_DEPTHS", (4, 5))
    assert trace_step(spec, batch) == by_line


def test_a_gate_is_not_kept(monkeypatch):
    """Of a feed-forward layer the gate's input, the product beside it, and theirs: not what the activation made."""
    batch, _ = largest_forward([(30, [40] * 2)], None)
    spec = small_spec(autocast=torch.bfloat16)
    fused = trace_step(spec, batch)
    monkeypatch.setattr(one_pass, "fuse_passes", lambda module: None)
    monkeypatch.setattr(layers, "fuse_passes", lambda module: None)
    monkeypatch.setattr(meta_model, "is_gated", lambda module: False)
    saved = fused.tokens * spec.config.intermediate_size * 2 * spec.config.num_hidden_layers
    assert trace_step(spec, batch).activations - fused.activations == saved


def test_a_rotation_takes_no_more_than_its_result():
    """While it runs: queries, keys and what they become, and none of the products between."""
    query, key = (torch.zeros(1, heads, 100, 8) for heads in (4, 2))
    cos = sin = torch.zeros(1, 100, 8)
    peaks = {}
    for rotate in (apply_rotary_pos_emb, meta_model._meta_rotation):
        with Timeline([query, key, cos], 320) as timeline:
            turned = rotate(query, key, cos, sin)
        peaks[rotate] = sum(timeline.peak(0, timeline.now).values())
        assert [t.shape for t in turned] == [query.shape, key.shape]
    assert peaks[meta_model._meta_rotation] == 4 * (query.numel() + key.numel()) < peaks[apply_rotary_pos_emb]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_grows_with_the_tokens_and_not_their_square(device):
    """In one kernel; part by part, a mask grows with the square."""
    kept = []
    for length in (200, 800):
        batch, _ = largest_forward([(length, [length] * 4)], None)
        spec = small_spec(device=device, autocast=torch.bfloat16)
        kept.append(trace_step(spec, batch, backward=False).activations / batch["targets"].numel())
    assert kept[1] < 1.01 * kept[0]


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 128), ("cuda", 512)])
def test_logits_are_held_as_on_the_runs_device(device, tokens):
    spec = StepSpec(LlamaConfig(**SMALL | {"vocab_size": 2**17}), torch.float32, peft_config=LORA, device=device)
    forward = trace_step(spec, largest_forward([(8, [150] * 4)], None)[0]).phases["forward"]
    size = tokens * 2**17 * 4  # of 600 tokens
    assert forward["logits"] == 2 * size, "logits, and their gradient"
    assert forward["working"] < 0.1 * size, "no other tensor of that size"


def test_what_flash_attention_does_not_take_is_planned_part_by_part(monkeypatch):
    """A prompt's keys and values are then copied for each of its responses, and for each head."""
    batch, _ = largest_forward([(200, [200] * 4)], None)
    spec = small_spec(device="cuda", peft_config=LORA, autocast=torch.bfloat16)

    def kept():
        return trace_step(spec, batch, backward=False).activations

    flash = kept()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    heads, layers, size = 6 * 64, 2, 2
    copied = 2 * heads * size * (200 + 4 * 400) * layers  # keys and values that each part attends to, for all heads
    assert copied / 2 < kept() - flash < 2 * copied
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert kept() == flash


def test_a_budget_cuts_the_batch():
    batch, num_chunks = largest_forward([(101, [50] * 8)], 300)
    assert num_chunks == 2 and batch["input_ids"].shape == (1, 300)
    assert repeat_batch(batch, 3)["input_ids"].shape == (1, 900)


WEIGHTS = SimpleNamespace(
    base=1000.0, adapter=0, trained=1000.0, num_trained=500.0, num_factors=50.0, largest_trained=100.0,
    largest_layer=100.0, outside_layers=50.0, quantized=0, scales=0,
)  # fmt: skip


def footprint(**changes):
    moment = {"activations": 3000.0, "gradients": 100.0, "logits": 7.0, "working": 5.0}
    settings = {
        "weights": WEIGHTS, "phases": {"head": moment}, "optim": "adamw_torch", "mixed_precision": True,
        "reference_copy": True, "loads_reference": True, "shards_quantized": False, "on_gpu": False,
    }  # fmt: skip
    return layouts.Footprint(**settings | changes)


def test_one_process_and_ddp():
    moment, parts = layouts.peak_memory(footprint(), "single", 1)
    assert moment == "head"
    assert parts == {
        "weights": 1000, "adapter": 0, "gradients": 100, "optimizer": 2000, "activations": 3000, "keys": 0, "logits": 7,
        "reference": 1000, "working": 5, "overhead": 0, "total": 7112,
    }  # fmt: skip
    assert layouts.peak_memory(footprint(), "ddp", 2)[1]["gradients"] == 1100  # DDP's buckets
    small = footprint(phases={"head": dict.fromkeys(("activations", "gradients", "logits", "working"), 0.0)})
    assert layouts.peak_memory(small, "single", 1)[0] == "optimizer step"


def test_sharding_divides_by_the_processes():
    for layout, shared in [("zero2", 1000), ("zero3", 1000 / 8), ("fsdp2", 4 * 500 / 8)]:
        parts = layouts.peak_memory(footprint(phases={}, reference_copy=False, loads_reference=False), layout, 8)[1]
        assert parts["weights"] == shared
        assert parts["optimizer"] == (12 if "zero" in layout else 8) * 500 / 8
    whole = layouts.peak_memory(footprint(phases={}), "fsdp2", 8)  # TRL gathers the reference whole
    assert whole[0] == "reference" and whole[1]["working"] == 1000


def test_fsdp2_keeps_a_4_bit_models_adapter_in_bfloat16():
    weights = SimpleNamespace(**vars(WEIGHTS) | {"adapter": 2000.0, "trained": 2000.0, "quantized": 900.0})
    settings = {"weights": weights, "phases": {}, "optim": "sgd", "reference_copy": False, "loads_reference": False}
    moment, parts = layouts.peak_memory(footprint(**settings), "fsdp2", 2)
    assert (moment, parts["weights"], parts["adapter"]) == ("loading", 1000 + 100 / 2, 2 * 500)  # and the shards
    assert layouts.peak_memory(footprint(**settings), "ddp", 2)[1]["adapter"] == 4 * 500


def four_bit(**changes):
    """Stored in a type that FSDP2 shards; a fifth of the 4-bit weights is scales."""
    weights = SimpleNamespace(**vars(WEIGHTS) | {"quantized": 900.0, "scales": 180.0, "adapter": 200.0})
    return footprint(weights=weights, shards_quantized=True, reference_copy=False, loads_reference=False, **changes)


def test_a_4_bit_model_is_loaded_on_the_cpu_and_its_scales_are_whole_on_each_gpu():
    moments = layouts.moments(four_bit(), "fsdp2", 8)
    weights = (1000 - 180) / 8 + 180
    (_, loading), (phase, training) = moments["loading"], moments["training"]
    assert loading["weights"] == training["weights"] == weights and phase == "head"
    assert loading["working"] == 100 and loading["total"] < training["total"], "one layer beside the shards"
    assert layouts.host_memory(four_bit(), "fsdp2", 8) == 1000
    assert layouts.host_memory(footprint(), "fsdp2", 8) == layouts.host_memory(four_bit(), "ddp", 8) == 0


def test_fsdp2_shards_gradients_only_after_the_last_forward_of_a_step():
    for mixed, size in [(True, 2), (False, 2)]:  # 1000 bytes of 500 numbers
        moment = layouts.moments(footprint(accumulates=True, mixed_precision=mixed), "fsdp2", 8)["training"][1]
        assert moment["gradients"] == size * 500
    once, several = (layouts.moments(four_bit(accumulates=a), "fsdp2_offload", 8)["training"][1] for a in (False, True))
    assert once["gradients"] == 0 and several["gradients"] == 2 * 500


def test_offload_leaves_activations_and_what_is_gathered_on_the_gpu():
    kept = ("activations", "logits", "working")
    for layout, whole in [("zero2", 1000), ("zero3", 1000 / 8)]:
        here, offloaded = (
            layouts.moments(footprint(), name, 8)["training"][1] for name in (layout, layout + "_offload")
        )
        assert here["optimizer"] and offloaded == here | {"optimizer": 0, "total": here["total"] - here["optimizer"]}
        assert offloaded["weights"] == whole
        assert layouts.host_memory(footprint(), layout + "_offload", 8) == (12 + 4) * 500 / 8
    here, offloaded = (layouts.moments(four_bit(), name, 8)["training"][1] for name in ("fsdp2", "fsdp2_offload"))
    assert {part: offloaded[part] for part in kept} == {part: here[part] for part in kept}
    assert offloaded["weights"] == 180 and not offloaded["adapter"] and not offloaded["optimizer"]
    full = layouts.host_memory(footprint(optim="sgd"), "fsdp2_offload", 8)
    assert full == (4 * 500 + 1000 + 4 * 500) / 8, "weights, reference and gradients; sgd has no state"


@pytest.mark.parametrize(
    ("optim", "state"), [("adamw_torch", 2000), ("paged_adamw_32bit", 4000), ("adamw_bnb_8bit", 1000), ("sgd", 0),
                         ("adafactor", 200)],
)  # fmt: skip
def test_optimizer_states(optim, state):
    assert layouts.peak_memory(footprint(optim=optim), "single", 1)[1]["optimizer"] == state


def policy(**changes):
    return PolicyConfig(model_name_or_path="m", **changes)


@pytest.mark.parametrize(
    ("layout", "settings", "optim", "what"),
    [
        ("fsdp2", {"load_in_8bit": True, "use_peft": True}, "adamw_torch", "load_in_8bit with fsdp2"),
        ("zero3", {"load_in_8bit": True, "use_peft": True}, "adamw_torch", "load_in_8bit with zero3"),
        ("zero3", {"load_in_4bit": True, "use_peft": True}, "adamw_torch", "load_in_4bit with zero3"),
        ("fsdp2", {}, "paged_adamw_32bit", "optim: paged_adamw_32bit with fsdp2"),
        ("fsdp2", {}, "adamw_bnb_8bit", "optim: adamw_bnb_8bit with fsdp2"),
        ("fsdp2", {"load_in_4bit": True, "use_peft": True, "bnb_4bit_quant_storage": "float16"}, "adamw_torch",
         "bnb_4bit_quant_storage: float16 with fsdp2"),
        ("fsdp2", {"load_in_4bit": True, "use_peft": True, "bnb_4bit_quant_storage": "bfloat16"}, "adamw_torch", None),
        ("fsdp2", {"load_in_4bit": True, "use_peft": True}, "adamw_torch", None),
        ("zero2", {"load_in_4bit": True, "use_peft": True}, "paged_adamw_32bit", None),
        ("fsdp2_offload", {"load_in_8bit": True, "use_peft": True}, "adamw_torch", "load_in_8bit with fsdp2"),
        ("zero3_offload", {"load_in_4bit": True, "use_peft": True}, "adamw_torch", "load_in_4bit with zero3"),
        ("zero2_offload", {}, "adamw_bnb_8bit", "optim: adamw_bnb_8bit with zero2_offload"),
        ("zero2_offload", {}, "paged_adamw_32bit", None),
        ("ddp", {"load_in_8bit": True, "use_peft": True}, "paged_adamw_8bit", None),
    ],
)  # fmt: skip
def test_refused_combinations(layout, settings, optim, what, monkeypatch):
    args = SimpleNamespace(optim=optim, bf16=True, fp16=False, world_size=2)
    found = incompatibilities(policy(**settings), args, layout)
    assert [entry["what"] for entry in found] == ([what] if what else [])
    environ = {"zero": "ACCELERATE_USE_DEEPSPEED", "fsdp": "ACCELERATE_USE_FSDP"}
    for name in environ.values():
        monkeypatch.delenv(name, raising=False)
    if layout[:4] in environ:
        monkeypatch.setenv(environ[layout[:4]], "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", layout[4])
        offloads = layout.endswith("offload")
        monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", str(offloads).lower())
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu" if offloads else "none")
    assert launched_layout(2) == layout
    if what:  # a real run ends too
        with pytest.raises(UserError, match=what):
            check_layout(policy(**settings), args)
    else:
        check_layout(policy(**settings), args)


@pytest.fixture
def no_tracing(monkeypatch):
    """Memory is not traced: a step takes a megabyte a token."""

    def step(spec, batch, backward=True):
        tokens = batch["input_ids"].shape[1]
        parts = dict.fromkeys(("activations", "gradients", "logits", "working"), 1e6 * tokens)
        return StepMemory(tokens, 10**6 * tokens, {"head": parts})

    monkeypatch.setattr(estimate, "trace_step", step)
    monkeypatch.setattr(estimate, "weight_sizes", lambda spec: WEIGHTS)


def plan_of(recipe, *flags):
    configs = parse_configs([str(recipe), "--plan", "--num_prompts=1000", *flags])
    return make_plan(configs, recipe.stem.startswith("preference"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
@pytest.mark.parametrize("num_processes", [1, 2, 4, 8, 16])
def test_every_recipe_plans_on_any_number_of_processes(recipe, num_processes, monkeypatch, no_tracing):
    monkeypatch.chdir(ROOT)
    try:
        plan, facts, _ = plan_of(recipe, f"--num_processes={num_processes}")
    except UserError as error:
        assert "cannot be split over" in str(error) and recipe.stem.endswith("_cpu") and num_processes > 1
        return
    assert plan.num_processes == num_processes and plan.num_steps > 0
    assert plan.global_batch_size == num_processes * plan.gradient_accumulation_steps * plan.per_device_train_batch_size
    assert facts["parallel"] == ("ddp" if num_processes > 1 else "single")


#: What recipes say they run on; the rest are like one of these, or small.
FITS = {
    "reward_qlora": ("ddp", 8, 24), "reward_lora": ("ddp", 8, 40),
    "reward_full": ("zero3", 8, 80), "preference_eurus": ("zero3", 8, 80), "reward_mixtral": ("fsdp2", 8, 80),
    "reward_70b": ("fsdp2", 16, 80), "reward_trajectories": ("ddp", 8, 24),
}  # fmt: skip


@pytest.mark.parametrize("name", FITS)
def test_recipes_fit_where_they_say(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    layout, num_processes, gpu = FITS[name]
    flags = [f"--parallel={layout}", f"--num_processes={num_processes}", f"--gpu_memory_gb={gpu}"]
    plan, facts, notes = plan_of(ROOT / "yamls" / f"{name}.yaml", "--max_length=96", "--max_prompt_length=48", *flags)
    parts = dict(facts["memory_per_gpu_gb"])
    assert parts.pop("total") == pytest.approx(sum(parts.values()))
    assert set(parts) == set(layouts.PARTS)
    assert facts["fits"] and not facts["refused"] and facts["largest_max_tokens_per_forward"]
    assert set(facts["layouts"]) == set(layouts.LAYOUTS)
    text = describe(plan, facts, notes)
    loading, training = (facts["moments_gb"][moment]["total"] for moment in ("loading", "training"))
    assert f"loading {loading:.1f} GB, then training {training:.1f} GB, of {gpu}: fits." in text
    assert "prompts a step" in text and "Per process: " in text
    assert max(loading, training) == facts["memory_per_gpu_gb"]["total"]


def test_a_70b_model_fits_8_gpus_of_24_gb(monkeypatch):
    """In short rows; what loading takes does not depend on them."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(layouts, "LAYOUTS", ())
    flags = ["--parallel=fsdp2", "--num_processes=8", "--max_length=96", "--max_prompt_length=48"]
    text = describe(*plan_of(ROOT / "yamls" / "reward_70b.yaml", *flags, "--gpu=RTX 4090"))
    assert re.search(r"\(fsdp2\): loading 15.0 GB, then training 1\d.\d GB, of 24: fits.", text)
    assert "CPU memory: 42.7 GB a process, 342 GB on a node of 8" in text
    assert "Time (estimate): at most about" in text and "8 x RTX 4090" in text


def test_what_does_not_fit_says_so(monkeypatch, no_tracing):
    monkeypatch.chdir(ROOT)
    recipe = ROOT / "yamls" / "reward_qlora.yaml"
    flags = ["--num_processes=8", "--gpu_memory_gb=1", "--parallel=fsdp2"]
    plan, facts, notes = plan_of(recipe, *flags)
    assert not facts["fits"] and facts["largest_max_tokens_per_forward"] is None
    text = describe(plan, facts, notes)
    assert "(fsdp2): REFUSED" in text and "--optim=adamw_torch" in text and "Time" not in text
    assert facts["layouts"]["fsdp2"] | {"refused": ""} == {
        "loading_gb": None, "training_gb": None, "fits": False, "refused": "",
    }  # fmt: skip
    assert re.search("fsdp2 +refused: optim: paged", text) and not re.search(r"fsdp2 .*\d\.\d", text)
    text = describe(*plan_of(recipe, "--gpu_memory_gb=0.5"))
    assert "of 0.5: DOES NOT FIT: loading and training take more" in text and "Time" not in text
    assert "No layout fits" not in text, "in 4 bits already"
    for name, words in [
        ("lora", "No layout fits; --load_in_4bit=true takes"),
        ("full", "No layout fits; --use_peft=true"),
    ]:
        assert words in describe(*plan_of(ROOT / "yamls" / f"reward_{name}.yaml", "--gpu_memory_gb=0.5"))
    plan, facts, notes = plan_of(recipe, "--gpu_memory_gb=3")
    assert "of 3: DOES NOT FIT: training takes more." in describe(plan, facts, notes)
    text = describe(plan, facts | {"largest_max_tokens_per_forward": 640}, notes)
    assert "training takes more; --max_tokens_per_forward=640 fits." in text


def run_plan(python, recipe, folder, *flags):
    command = [python, "run_reward.py", str(recipe), "--plan", f"--output_dir={folder}", *flags]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )


def test_the_command_writes_a_plan_and_nothing_else(tmp_path, forked_python):
    """A folder with a config and nothing else is a model to plan for."""
    tiny = tmp_path / "model"
    tiny_config().save_pretrained(tiny)
    recipe = tmp_path / "recipe.yaml"
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "a", "responses": ["b", "c"], "scores": [0.0, 1.0]}
    rows.write_text("".join(json.dumps(row | {"prompt": f"a{i}"}) + "\n" for i in range(12)))
    recipe.write_text(
        f"model_name_or_path: {tiny}\ntrain_file: {rows}\nglobal_batch_size: 4\nper_device_train_batch_size: 1\n"
        "use_cpu: true\nmax_length: 64\n"
    )
    out = tmp_path / "out"
    done = run_plan(forked_python, recipe, out, "--num_processes=2")
    assert done.returncode == 0, done.stderr
    assert [file.name for file in out.iterdir()] == ["plan.json"]
    plan = json.loads((out / "plan.json").read_text())
    assert (plan["num_processes"], plan["gradient_accumulation_steps"], plan["global_batch_size"]) == (2, 2, 4)
    assert (plan["num_prompts"], plan["num_tokens"], plan["num_steps"]) == (12, None, 9)  # three epochs, no tokenizer
    assert "no tokenizer" in done.stdout and "2 processes = 4 prompts a step" in done.stdout


def test_a_config_file_is_a_model_to_plan_for(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(layouts, "LAYOUTS", ())
    tiny_config().save_pretrained(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "sizes.json")
    flags = [f"--model_config={tmp_path}/sizes.json", "--model_name_or_path=no/model", "--load_in_4bit=false"]
    _, facts, notes = plan_of(ROOT / "yamls" / "reward_qlora.yaml", *flags, "--max_length=64", "--max_prompt_length=32")
    assert facts["fits"] and facts["moments_gb"]["loading"]["weights"] < 0.01
    assert f"Planned with the sizes in {tmp_path}/sizes.json" in notes and not any("Log-probs" in n for n in notes)
    (tmp_path / "other.json").write_text('{"model_type": "none of theirs"}')
    for file, words in [("none.json", "no such file"), ("other.json", "is no config of a model that")]:
        with pytest.raises(UserError, match=f"model_config: .*{words}"):
            plan_of(ROOT / "yamls" / "reward_qlora.yaml", f"--model_config={tmp_path}/{file}")


@pytest.mark.parametrize("found", [True, False])
def test_a_plan_asks_a_hub_that_is_not_there_for_nothing(monkeypatch, found):
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(planning, "getproxies", dict)
    error = socket.gaierror("Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: [] if found else (_ for _ in ()).throw(error))
    with offline_if_unreachable():
        assert (constants.is_offline_mode(), datasets.config.HF_HUB_OFFLINE) == (not found, not found)
    assert (constants.is_offline_mode(), datasets.config.HF_HUB_OFFLINE) == (False, False)


def test_a_run_keeps_its_plan(tmp_path, capsys, monkeypatch, no_tracing):
    monkeypatch.chdir(ROOT)
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text("seed: 1")
    argv = ["yamls/reward_cpu.yaml", "--plan", "--num_prompts=100", f"--output_dir={tmp_path}"]
    show_plan(parse_configs(argv), pairs=False)
    printed = capsys.readouterr().out
    assert "holds a run" in printed and "No GPU here" not in printed  # the recipe says use_cpu
    assert "offload" not in printed and "Time" not in printed
    assert (tmp_path / "plan.json").read_text() == "{}"


def test_keys_of_a_plan(tmp_path):
    recipe = str(ROOT / "yamls" / "reward_qlora.yaml")
    with pytest.raises(UserError, match="accelerate launch --num_processes=4"):
        parse_configs([recipe, "--num_processes=4"])
    with pytest.raises(UserError, match="^--gpu_memory_gb=0: must be above 0"):
        parse_configs([recipe, "--plan", "--gpu_memory_gb=0"])
    from alignment.output import resolve

    resolved = resolve(parse_configs([recipe, "--gpu_memory_gb=24"]))
    assert not set(PLAN_KEYS) & set(resolved)


def test_a_real_4bit_model_is_as_large_as_planned(tmp_path):
    """Weights, packed bits and scales, against bitsandbytes' own."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from benchmarks.plan import _bytes

    config = tiny_config(hidden_size=128, intermediate_size=256)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    for nested in (False, True):
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=nested)
        real = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.bfloat16)
        weights = weight_sizes(StepSpec(config, torch.bfloat16, LORA, "4bit", nested))
        assert weights.base == pytest.approx(_bytes(real), rel=0.01)
