"""The fused head against log-softmax over the whole logits."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)

from tests.tiny import SIZES, tiny_config
from trl_nca.head import fuse_head, target_logps, tokens_at_once

MODELS = {
    "llama": lambda: LlamaForCausalLM(tiny_config()),
    "capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=0.5)),
    "multiplied": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
}


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation's result has."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def case(trained, vocabulary=50):
    torch.manual_seed(0)
    head = nn.Linear(8, vocabulary).double().requires_grad_(trained)
    hidden = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    return head, hidden, torch.randint(0, vocabulary, (23,)), torch.randn(23, dtype=torch.float64)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 23, 100])
def test_values_and_gradients(trained, rows):
    head, hidden, targets, weights = case(trained)
    wanted = [hidden, *(head.parameters() if trained else ())]
    expected = head(hidden).log_softmax(-1)[torch.arange(23), targets]
    logps, _ = target_logps(head, hidden, targets, rows, trained)
    torch.testing.assert_close(logps, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(weights @ logps, wanted),
        torch.autograd.grad(weights @ expected, wanted),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 23])
def test_statistics_are_of_each_token_and_without_gradient(trained, rows):
    head, hidden, targets, weights = case(trained)
    logits = head(hidden)
    targets[::3] = logits[::3].argmax(-1)
    plain, _ = target_logps(head, hidden, targets, rows, trained)
    logps, statistics = target_logps(head, hidden, targets, rows, trained, True)
    expected = [torch.distributions.Categorical(logits=logits).entropy(), (logits.argmax(-1) == targets).double()]
    torch.testing.assert_close(statistics, torch.stack(expected, dim=1).detach())
    assert not statistics.requires_grad
    torch.testing.assert_close(logps, plain, rtol=0, atol=0)
    gradients = [torch.autograd.grad(weights @ x, hidden)[0] for x in (logps, plain)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("trained", [True, False])
def test_gradcheck(trained):
    head, hidden, targets, _ = case(trained, vocabulary=7)
    assert torch.autograd.gradcheck(lambda h: target_logps(head, h, targets, 4, trained)[0], hidden)


@pytest.mark.parametrize("trained", [True, False])
def test_logits_of_all_tokens_are_never_there(trained):
    head, hidden, targets, weights = case(trained, vocabulary=500)
    with LargestTensor() as largest:
        (weights @ target_logps(head, hidden, targets, 4, trained, True)[0]).backward()
    assert largest.numel <= max(4 * 500, head.weight.numel())
    with LargestTensor() as largest:
        head(hidden).log_softmax(-1)
    assert largest.numel == 23 * 500, "the probe sees what it should"


def test_no_gradient_no_memory():
    head, hidden, targets, _ = case(trained=False)
    with torch.no_grad():
        assert target_logps(head, hidden, targets, 5, False)[0].grad_fn is None
    for trained in (True, False):
        logps, statistics = target_logps(head, hidden[:0], targets[:0], 5, trained, True)
        assert logps.shape == (0,) and statistics.shape == (0, 2)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("run_device", ["cpu", "cuda"])
def test_gradients_in_bfloat16(name, trained, run_device):
    torch.manual_seed(0)
    model = MODELS[name]().bfloat16()
    model.lm_head.requires_grad_(trained)
    if name == "llama":
        model.lm_head.bias = nn.Parameter(torch.randn(320).bfloat16(), requires_grad=trained)
    ids, positions, targets = torch.randint(3, 320, (2, 9)), torch.tensor([0, 5, 9, 17]), torch.tensor([4, 9, 14, 19])
    wanted = [p for p in model.parameters() if p.requires_grad]
    plain = model(ids).logits.float().log_softmax(-1).flatten(0, 1)[positions, targets]
    fuse_head(model)
    logps = model(ids, positions=positions, targets=targets, run_device=run_device)
    torch.testing.assert_close(logps, plain, rtol=1e-2, atol=0)
    weights = torch.tensor([0.3, -1.0, 0.7, 2.0])
    ours, theirs = (torch.autograd.grad(weights @ x, wanted) for x in (logps, plain))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm()


@pytest.mark.parametrize(("device", "fewer"), [("cpu", 130), ("cuda", 512)])
def test_tokens_at_once(device, fewer):
    """On a GPU enough that its products take longer than reading the weight: 800 TFLOP/s, 3.0 TB/s."""
    assert tokens_at_once(device, 128256) == fewer
    for vocabulary in (32000, 128256, 151936, 262208):
        n = tokens_at_once("cuda", vocabulary)
        for hidden in (1024, 4096):
            read = 2 * (vocabulary * hidden + n * hidden + n * vocabulary) / 3.0e12
            assert 2 * n * vocabulary * hidden / 800e12 > 0.95 * read
        assert n * vocabulary * 4 < 0.6e9, "bytes of logits and their gradient"


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_the_model(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    ids = torch.randint(3, 320, (2, 9))
    expected = model(ids).logits.log_softmax(-1)  # (2, 9, V)
    fuse_head(model)
    fuse_head(model)  # a second time does nothing
    positions, targets = torch.tensor([0, 5, 9, 17]), torch.tensor([4, 9, 14, 19])
    logps = model(ids, positions=positions, targets=targets)
    torch.testing.assert_close(logps, expected.flatten(0, 1)[positions, targets])
    torch.testing.assert_close(model(ids).logits.log_softmax(-1), expected, rtol=0, atol=0)
