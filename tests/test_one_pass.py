"""Gates and rotations in one pass against transformers' own, compiled or not, and the modules that are left alone."""

import copy
import math
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import gradcheck
from torch.utils._pytree import tree_map
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaMLP, apply_rotary_pos_emb

from tests.tiny import SHAPES, SIZES, rows_of, tiny_config
from trl_nca import kernels, one_pass
from trl_nca.collate import GroupCollator
from trl_nca.logps import prepare, response_logps

CONFIGS = {"llama": tiny_config(), "mistral": MistralConfig(**SIZES), "qwen3": Qwen3Config(**SIZES)}
CONFIGS["gemma3"] = Gemma3TextConfig(**SIZES)
ACTIVATIONS = [one_pass._SILU, one_pass._GELU_TANH]


@pytest.fixture
def on_gpu(monkeypatch):
    """As on a GPU, where nothing is compiled; how often each function ran."""
    calls = {"Gate": 0, "Rotation": 0}
    monkeypatch.setattr(kernels, "on_gpu", lambda x: True)
    monkeypatch.setattr(kernels, "_LARGE", math.inf)
    for name in calls:
        function = getattr(one_pass, name)

        def counted(*args, name=name, apply=function.apply):
            calls[name] += 1
            return apply(*args)

        monkeypatch.setattr(function, "apply", counted)
    return calls


@pytest.fixture
def compiling(on_gpu, monkeypatch):
    """As on a GPU, where all is compiled."""
    monkeypatch.setattr(kernels, "_failed", set())
    monkeypatch.setattr(kernels, "_checked", set())
    monkeypatch.setattr(kernels, "_LARGE", 0)


def tiny_model(config, lora=True):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    if lora:
        kind = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(model, kind)
    return model


def outcome(model, autocast=False, shared=None):
    """Log-probs of a batch and the gradient of all that is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    shared = prepare([model], check=False) if shared is None else shared
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logps = response_logps(model, GroupCollator()(rows_of(SHAPES)), shared)
    gradients = torch.autograd.grad(logps.sum() / 50, trained)
    return logps.detach(), torch.cat([g.flatten().to(logps.dtype) for g in gradients])


def plain(monkeypatch, *args, **kwargs):
    with monkeypatch.context() as patch:
        patch.setattr(one_pass, "fuse_passes", lambda module: None)
        patch.setattr("trl_nca.layers.fuse_passes", lambda module: None)
        patch.setattr("trl_nca.layers.is_centered_norm", lambda kind: False)
        return outcome(*args, **kwargs)


def distances(exact, other):
    return [((a - b).norm() / a.norm()).item() for a, b in zip(exact, other, strict=True)]


def rotation_inputs(length=5, dtype=torch.float64, batch=1):
    torch.manual_seed(0)
    query, key = (torch.randn(batch, heads, length, 6, dtype=dtype, requires_grad=True) for heads in (4, 2))
    cos, sin = torch.randn(2, 1, length, 6, dtype=dtype)  # halves that do not agree
    return query, key, cos, sin


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_of_a_gate(activation):
    gate, up = torch.randn(2, 3, 2, 4, dtype=torch.float64).unbind()
    inputs = gate.requires_grad_(), up.requires_grad_()
    assert gradcheck(lambda g, u: one_pass.Gate.apply(g, u, activation), inputs)
    torch.testing.assert_close(one_pass.Gate.apply(*inputs, activation), activation[0](gate) * up)


@pytest.mark.parametrize("batch", [1, 2])
def test_gradient_of_a_rotation(on_gpu, batch):
    query, key, cos, sin = rotation_inputs(batch=batch)
    turned = one_pass.rotate(query, key, cos, sin)
    torch.testing.assert_close(turned, apply_rotary_pos_emb(query, key, cos, sin))
    assert gradcheck(lambda q, k: one_pass.rotate(q, k, cos, sin), (query, key))
    assert on_gpu["Rotation"] > 1


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_numbers_are_transformers(on_gpu, monkeypatch, name, lora):
    model = tiny_model(CONFIGS[name], lora).double()
    exact = plain(monkeypatch, copy.deepcopy(model))
    assert not any(on_gpu.values())
    bound = 1e-6 if name == "gemma3" else 1e-12  # transformers computes its norms in float32
    assert max(distances(exact, outcome(model))) < bound
    assert on_gpu == {"Gate": 2, "Rotation": 2}, "once in each of two layers"
    model.float()
    assert max(distances([x.float() for x in exact], outcome(model))) < 1e-4


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_in_bfloat16(on_gpu, monkeypatch, weights):
    model = tiny_model(CONFIGS["qwen3"]).to(weights)
    exact = plain(monkeypatch, copy.deepcopy(model).float())
    theirs = distances(exact, plain(monkeypatch, copy.deepcopy(model), autocast=True))
    ours = distances(exact, outcome(model, autocast=True))
    assert on_gpu["Rotation"] == 2
    assert ours[0] < 1e-2
    assert all(mine < 1.2 * other for mine, other in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.parametrize("length", [5, 1])
def test_under_autocast_a_rotation_has_its_type(on_gpu, length):
    """Where weights are float32, queries normalized or cos and sin wide; attention would cast them."""
    query, key, cos, sin = (x.detach().float() for x in rotation_inputs(length))
    query.requires_grad_(), key.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        turned = one_pass.rotate(query, key, cos, sin)
    assert {t.dtype for t in turned} == {torch.bfloat16}
    assert {g.dtype for g in torch.autograd.grad(turned[0].sum() + turned[1].sum(), (query, key))} == {torch.float32}
    assert one_pass.rotate(query, key, cos, sin)[0].dtype == torch.float32
    narrow = one_pass.rotate(query.bfloat16(), key.bfloat16(), cos, sin)
    assert narrow[0].dtype == torch.float32, "as transformers has it"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_checkpointing(on_gpu, monkeypatch, use_reentrant):
    model = tiny_model(CONFIGS["llama"]).double().train()
    exact = plain(monkeypatch, copy.deepcopy(model))
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.requires_grad_(True)
    shared = prepare([model], check=False)
    trained = [p for name, p in model.named_parameters() if "lora" in name]
    logps = response_logps(model, GroupCollator()(rows_of(SHAPES)), shared)
    (logps.sum() / 50).backward()
    assert on_gpu == {"Gate": 4, "Rotation": 4}, "and again in the backward pass"
    assert max(distances(exact, (logps.detach(), torch.cat([p.grad.flatten() for p in trained])))) < 1e-10


def test_a_gate_keeps_two_tensors():
    """Kept for the backward pass: the activations of the gate and the product beside them, and not act(gate)."""
    gate, up = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        one_pass.Gate.apply(gate, up, one_pass._SILU)
    assert len(kept) == 2


def test_sampling_is_as_before(on_gpu):
    model = LlamaForCausalLM(tiny_config())
    ids = torch.arange(1, 8)[None]
    exact = model.generate(ids, max_new_tokens=5, do_sample=False)
    for module in model.modules():
        one_pass.fuse_passes(module)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), exact)
    assert on_gpu == {"Gate": 2, "Rotation": 2}, "of the prompt, and not of one token after the other"


def test_on_a_cpu_rotations_are_transformers(monkeypatch):
    monkeypatch.setattr(one_pass.Rotation, "apply", None)
    exact, other = apply_rotary_pos_emb(*rotation_inputs()), one_pass.rotate(*rotation_inputs())
    assert all(torch.equal(a, b) for a, b in zip(exact, other, strict=True))


def test_what_is_not_llamas_is_left_alone(on_gpu):
    for config, gated, rotating in [
        (Phi3Config(**SIZES), False, False),  # one product for gate and up; some of a head's numbers are not turned
        (Olmo2Config(**SIZES), True, False),  # casts what it turned
        (tiny_config(hidden_act="relu"), False, True),
    ]:
        layer = AutoModelForCausalLM.from_config(config).model.layers[0]
        assert (one_pass.is_gated(layer.mlp), one_pass.rotates(type(layer.self_attn))) == (gated, rotating)

    class Other(LlamaMLP):
        def forward(self, x):
            return super().forward(x) + 1

    other, hooked = Other(tiny_config()), LlamaMLP(tiny_config())
    hooked.forward = lambda x: x
    for module in (other, hooked):
        before = vars(module).get("forward")
        one_pass.fuse_passes(module)
        assert vars(module).get("forward") is before
    query, key, cos, sin = rotation_inputs()
    one_pass.rotate(query.transpose(1, 2), key.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    one_pass.rotate(query, key, cos.clone().requires_grad_(), sin)
    assert on_gpu["Rotation"] == 0


def test_gate_and_up_of_two_types(on_gpu):
    """As from one layer that was left in float32."""
    module = LlamaMLP(tiny_config())
    module.up_proj = nn.Sequential(module.up_proj, nn.Identity())
    one_pass.fuse_passes(module)
    x = torch.randn(1, 3, 32)
    module.up_proj[1].register_forward_hook(lambda module, args, out: out.double())
    module.down_proj.double()
    assert module(x).dtype == torch.float64
    assert on_gpu["Gate"] == 0


def step(length, activation=one_pass._SILU, dtype=torch.float32, device="cpu"):
    """Outputs and gradients of both functions on as many tokens, by transformers in float32 and by ours."""
    drawn = (*rotation_inputs(length), *(torch.randn(1, length, 8, requires_grad=True) for _ in range(2)))
    query, key, cos, sin, gate, up = (x.detach().to(device, dtype).requires_grad_(x.requires_grad) for x in drawn)
    outputs = [one_pass.Gate.apply(gate, up, activation), *one_pass.rotate(query, key, cos, sin)]
    inputs = (gate, up, query, key)
    gradients = torch.autograd.grad(sum(out.float().pow(2).sum() for out in outputs), inputs)
    wide = [x.float() for x in (query, key, cos, sin)]
    expected = [activation[0](gate.float()) * up.float(), *apply_rotary_pos_emb(*wide)]
    exact = torch.autograd.grad(sum(out.pow(2).sum() for out in expected), inputs)
    return [*expected, *exact], [*outputs, *gradients]


def test_compiled_once_for_all_lengths(compiling, monkeypatch):
    counter = CompileCounter()
    compiled = {f: torch.compile(f, backend=counter) for f in
                (one_pass._gate, one_pass._gate_gradients, one_pass._rotate, one_pass._rotate_back)}  # fmt: skip
    monkeypatch.setattr(kernels, "_compiled", compiled.__getitem__)
    for length in (5, 2, 8, 6, 40, 33):  # among them the other sizes
        for exact, ours in zip(*step(length), strict=True):
            torch.testing.assert_close(ours, exact)
    with torch.no_grad():
        one_pass.Gate.apply(*torch.randn(2, 1, 6, 8), one_pass._SILU)
        one_pass.rotate(*(x.float().detach() for x in rotation_inputs(6)))
    assert counter.frame_count == 4
    step(7, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        step(9, dtype=torch.bfloat16)
    assert counter.frame_count == 8, "and once more for another type"
    assert not kernels._failed and {function for function, *_ in kernels._checked} == compiled.keys()


def test_a_compiled_model_makes_its_own_kernels(on_gpu, monkeypatch):
    model = LlamaForCausalLM(tiny_config()).eval()
    ids = torch.arange(1, 8)[None]
    exact = model(ids).logits
    for module in model.modules():
        one_pass.fuse_passes(module)
    model.compile(backend="eager", fullgraph=True)
    monkeypatch.setattr(one_pass, "Gate", None)
    monkeypatch.setattr(one_pass, "Rotation", None)
    for _ in range(2):
        torch.testing.assert_close(model(ids).logits, exact)


@pytest.mark.slow  # compiling C++ takes half a minute
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_compiled_is_the_same(compiling, activation):
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for length in (5, 40):
            exact, ours = step(length, activation, dtype)
            assert max(distances([x.float() for x in exact], [x.float() for x in ours])) < bound
    assert not kernels._failed, "nothing failed"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's kernels need a GPU")
def test_kernels_of_a_gpu(compiling):
    for length in (5, 40):
        exact, ours = step(length, dtype=torch.bfloat16, device="cuda")
        assert max(distances(*([x.float() for x in side] for side in (exact, ours)))) < 1e-2
    assert not kernels._failed, "nothing failed"


def fail(*args):
    raise RuntimeError("Failed to find C compiler.\nSet CC")


@pytest.mark.parametrize(
    ("compiled", "reason"),
    [
        (lambda function: fail, "Failed to find C compiler."),
        (lambda function: lambda *args: tree_map(lambda x: 1.1 * x, function(*args)), "gives other numbers"),
    ],
)
def test_where_nothing_can_be_compiled_it_says_so_once(compiling, monkeypatch, compiled, reason):
    monkeypatch.setattr(kernels, "_compiled", compiled)
    with pytest.warns(UserWarning, match=f"not compiled.*{reason}$"):
        exact, ours = step(5)
    torch.testing.assert_close(ours, exact)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(5)


def test_too_little_memory_is_not_a_reason(compiling, monkeypatch):
    def fill(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(kernels, "_compiled", lambda function: fill)
    with pytest.raises(torch.OutOfMemoryError):
        step(5)


def test_small_tensors_are_not_worth_a_kernel(compiling, monkeypatch):
    monkeypatch.setattr(kernels, "_compiled", lambda function: fail)
    monkeypatch.setattr(kernels, "_LARGE", 1000)
    step(5)
    assert not kernels._failed
