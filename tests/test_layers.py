"""Fused LoRA layers and norms against PEFT's and transformers' own, and adapters that small steps move."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import rms_norm
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaForCausalLM, Olmo2Config, Qwen3Config
from trl import DPOConfig, DPOTrainer

from benchmarks.systems import mistral_config, random_mistral_4bit
from nca_trainer import NCAConfig, NCATrainer
from tests.tiny import SIZES, rows_of, tiny_config, tiny_tokenizer
from trl_nca import kernels, layers
from trl_nca.collate import GroupCollator
from trl_nca.layers import fuse_layers
from trl_nca.logps import prepare, response_logps

LORA = LoraConfig(r=4, lora_alpha=10, target_modules="all-linear", task_type="CAUSAL_LM")
IDS = torch.arange(40).reshape(2, 20)


def lora_model(config=LORA, base=None, spread=0.3):
    torch.manual_seed(0)
    model = get_peft_model(base or LlamaForCausalLM(tiny_config()), copy.deepcopy(config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=spread)
    return model


def outcome(model, autocast=False):
    """Logits and the gradient of all that is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=IDS).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    gradients = torch.autograd.grad(logits.pow(2).sum(), trained)
    assert [g.dtype for g in gradients] == [p.dtype for p in trained]
    return logits.detach(), torch.cat([g.flatten().to(logits.dtype) for g in gradients])


def distances(exact, other):
    return [((a - b).norm() / a.norm()).item() for a, b in zip(exact, other, strict=True)]


@pytest.fixture
def fused_calls(monkeypatch):
    """How often LoRA's product was added in place."""
    calls, add = [], layers._AddLowRank.apply

    class Counted:
        apply = staticmethod(lambda *args: calls.append(args[4]) or add(*args))

    monkeypatch.setattr(layers, "_AddLowRank", Counted)
    return calls


def test_the_numbers_are_pefts(fused_calls):
    model = lora_model().double()
    exact = outcome(model)
    fuse_layers(model)
    assert max(distances(exact, outcome(model))) < 1e-12
    assert fused_calls == [2.5] * 14, "each of seven linear layers, two times over"
    fuse_layers(model)
    assert max(distances(exact, outcome(model))) < 1e-12, "a second time changes nothing"


def test_in_bfloat16_they_are_as_near_to_float32_as_pefts(fused_calls):
    for weights in (torch.float32, torch.bfloat16):
        model = lora_model(base=LlamaForCausalLM(tiny_config()).to(weights))
        exact = outcome(copy.deepcopy(model).float())
        peft = distances(exact, outcome(model, autocast=True))
        fuse_layers(model)
        ours = distances(exact, outcome(model, autocast=True))
        assert all(0 < mine < 1.2 * theirs for mine, theirs in zip(ours, peft, strict=True)), (ours, peft)
    assert len(fused_calls) == 28


def test_over_4_bit_layers_that_are_given_float32(fused_calls):
    """They compute in bfloat16 and give float32 back, as where the other weights are float32."""
    base = random_mistral_4bit(mistral_config(tiny=True), "cpu")
    for part in (base.model.embed_tokens, base.lm_head, *(m for m in base.modules() if "Norm" in type(m).__name__)):
        part.float()
    model = lora_model(base=base, spread=0.02)
    assert model.get_base_model().model.layers[0].mlp.up_proj.base_layer(torch.randn(1, 3, 128)).dtype == torch.float32
    peft = outcome(model, autocast=True)
    fuse_layers(model)
    assert max(distances(peft, outcome(model, autocast=True))) < 0.02
    assert len(fused_calls) == 14


@pytest.mark.parametrize("autocast", [True, False])
def test_over_4_bit_weights(fused_calls, autocast):
    model = lora_model(base=random_mistral_4bit(mistral_config(tiny=True), "cpu"), spread=0.02)
    peft = outcome(model, autocast)
    fuse_layers(model)
    assert max(distances(peft, outcome(model, autocast))) < (0.02 if autocast else 1e-6)
    # Without autocast PEFT computes in the adapter's float32, and so does it here.
    assert len(fused_calls) == (14 if autocast else 0)


def test_over_layers_that_give_a_view_of_their_own_tensor(fused_calls):
    """As bitsandbytes' 8-bit ones do on a GPU."""

    class Viewed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(weight)
            return (x.flatten(0, 1) @ weight.t()).view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx, gradient):
            return gradient @ ctx.saved_tensors[0], None

    model = lora_model().double()
    exact = outcome(model)
    for module in model.modules():
        if hasattr(module, "base_layer"):
            base = module.base_layer
            base.forward = lambda x, base=base: Viewed.apply(x, base.weight)
    fuse_layers(model)
    assert max(distances(exact, outcome(model))) < 1e-12
    assert len(fused_calls) == 14


def test_evaluating_leaves_4_bit_weights_trainable():
    model = lora_model(base=random_mistral_4bit(mistral_config(tiny=True), "cpu"), spread=0.02)
    claim_bfloat16(model)
    fuse_layers(model)
    before = outcome(model, autocast=True)
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    assert distances(before, outcome(model.train(), autocast=True)) == [0, 0]


def claim_bfloat16(model):
    """As on a CPU that has it: bitsandbytes repacks 4-bit weights there."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_what_is_not_plain_lora_is_left_to_peft(fused_calls):
    plain = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    with_dropout, dora, with_bias = (copy.deepcopy(plain) for _ in range(3))
    with_dropout.lora_dropout, dora.use_dora, with_bias.lora_bias = 0.5, True, True
    for config in (with_dropout, dora, with_bias):
        model = lora_model(config).train()
        torch.manual_seed(1)
        exact = outcome(model)
        fuse_layers(model)
        torch.manual_seed(1)
        assert distances(exact, outcome(model))[0] == 0
    model = lora_model(plain)
    model.add_adapter("other", copy.deepcopy(plain))
    model.base_model.set_adapter(["default", "other"])
    exact = outcome(model)
    fuse_layers(model)
    assert distances(exact, outcome(model)) == [0, 0]
    assert not fused_calls
    model.set_adapter("other")
    model(input_ids=IDS)
    assert len(fused_calls) == 4, "one at a time is plain again"
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, model.get_base_model()(input_ids=IDS).logits)
    model.merge_adapter()
    model(input_ids=IDS)
    assert len(fused_calls) == 4


def test_no_pass_over_the_activations_is_left_but_products():
    """Of all that a LoRA layer writes both ways, only products are as large as its input or output."""
    torch.manual_seed(0)
    model = lora_model()
    fuse_layers(model)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    large, written = 100 * 32, []

    class Writes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= large and not func.is_view:
                written.append(func.overloadpacket.__name__)
            return out

    x = torch.randn(1, 100, 32, dtype=torch.bfloat16, requires_grad=True)
    layer.base_layer.bfloat16()
    with torch.autocast("cpu", torch.bfloat16), Writes():
        y = layer(x)
    assert sorted(set(written) - {"_unsafe_view"}) == ["addmm_", "mm"], written
    written.clear()
    gradient = torch.randn_like(y)
    with Writes():
        torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], gradient)
    assert set(written) <= {"mm", "_unsafe_view", "add"}, written  # the sum of the two ways to the input


def test_norms_of_llamas_kind_are_torchs_own(monkeypatch):
    monkeypatch.setattr(layers, "_has_fused_norm", lambda x, weight: x.dtype == weight.dtype)  # as on a GPU
    torch.manual_seed(0)
    kinds = [(tiny_config(), True), (Qwen3Config(**SIZES), True), (Gemma2Config(**SIZES), False)]
    kinds.append((Olmo2Config(**SIZES), False))  # Llama's operations in another order
    for config, is_fused in kinds:
        model = AutoModelForCausalLM.from_config(config)
        norms = [module for name, module in model.named_modules() if name.endswith("norm")]
        for norm in norms:
            torch.nn.init.normal_(norm.weight)
        exact = outcome(model)
        fuse_layers(model)
        forwards = [getattr(vars(norm).get("forward"), "__func__", None) for norm in norms]
        assert all((forward is layers._norm_forward) == is_fused for forward in forwards)
        assert max(distances(exact, outcome(model))) < 1e-6
    norm = LlamaForCausalLM(tiny_config()).model.norm
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(50, 32)
    exact, theirs = norm(x), copy.deepcopy(norm).bfloat16()(x.bfloat16())
    mixed = norm(x.bfloat16())
    fuse_layers(norm)
    assert torch.equal(norm(x.bfloat16()), mixed), "weights of another type than the input: as before"
    norm.bfloat16()
    casts = []
    monkeypatch.setattr(
        layers, "rms_norm", lambda *args: casts.append(torch.is_autocast_enabled("cpu")) or rms_norm(*args)
    )
    with torch.autocast("cpu", torch.bfloat16):
        ours = norm(x.bfloat16())
    assert casts == [False], "on a GPU autocast makes it float32"
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() < (theirs - exact).norm(), "rounded once, not twice"


def test_a_small_learning_rate_moves_a_quantized_models_adapter(tmp_path):
    """trl makes such an adapter bfloat16, where AdamW's step of 5e-6 is rounded away."""

    def moved(trainer_class, rows, config_class=NCAConfig, **settings):
        base = random_mistral_4bit(mistral_config(tiny=True), "cpu")
        claim_bfloat16(base.eval())  # as it is when it is loaded
        args = config_class(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=1, learning_rate=5e-6, bf16=False,
            use_cpu=True, report_to="none", save_strategy="no", lr_scheduler_type="constant", optim="adamw_torch",
            **settings,
        )  # fmt: skip
        trainer = trainer_class(
            base, args=args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer(), peft_config=LORA
        )
        weights = [p for name, p in trainer.model.named_parameters() if "lora_A" in name]
        before = torch.cat([w.detach().flatten().clone() for w in weights])
        if trainer_class is NCATrainer:  # as a run does, which samples before it trains
            with torch.no_grad():
                trainer.model.eval()(input_ids=IDS)
        trainer.train()
        return (torch.cat([w.detach().flatten() for w in weights]) != before).float().mean().item()

    pairs = [{"prompt": "to", "chosen": " begin", "rejected": " with"}] * 3
    rows = rows_of([(3, (4, 5))] * 3)
    ours, theirs = moved(NCATrainer, rows), moved(DPOTrainer, pairs, DPOConfig)
    print(f"share of the adapter's A that moved in three steps: {ours:.3f}, upstream {theirs:.3f}")
    assert ours > 0.95 and theirs < 0.2
    cached = moved(NCATrainer, rows, precompute_ref_log_probs=True, ref_logps_dir=str(tmp_path / "ref"))
    assert cached > 0.95, "the reference is run before the trainer is there"


def test_a_compiled_model_is_not_compiled_again_for_every_layout(monkeypatch):
    monkeypatch.setattr(kernels, "on_gpu", lambda x: True)
    monkeypatch.setattr(kernels, "_LARGE", math.inf)  # what is not in the compiled model is left as it is
    compiled = CompileCounter()
    model = lora_model(base=LlamaForCausalLM(tiny_config(num_hidden_layers=1)))
    plain, shared = copy.deepcopy(model), prepare([model])
    prepare([plain])
    model.compile(backend=compiled)
    counts = []
    layouts = [[(7, (3, 5, 1))], [(9, (4, 9)), (3, (2, 2))], [(30, (21, 2)), (4, (5, 1, 1))]]
    for shapes in layouts:
        batch = GroupCollator()(rows_of(shapes))
        torch.testing.assert_close(response_logps(model, batch, shared), response_logps(plain, batch, shared))
        with torch.no_grad():
            response_logps(model, batch, shared)
        counts.append(compiled.frame_count)
    assert counts[0] > 0
    assert counts[1] == counts[2], counts
