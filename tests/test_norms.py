"""Norms of Gemma's kind in one pass against transformers' own: values, gradients, and the models that have them."""

import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import gradcheck
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from trl_nca import kernels, norms
from trl_nca.layers import fuse_layers


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    """As on a GPU, where nothing is compiled."""
    monkeypatch.setattr(kernels, "on_gpu", lambda x: True)
    monkeypatch.setattr(kernels, "_LARGE", math.inf)


def case(dtype, shape=(2, 5, 3, 8)):
    """A norm with a weight, its input and its output's gradient."""
    torch.manual_seed(0)
    norm = Gemma3RMSNorm(shape[-1]).to(dtype)
    nn.init.normal_(norm.weight)
    return norm, 3 * torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def results(norm, x, gradient):
    """The output, and the gradients of input and weight."""
    x = x.clone().requires_grad_()
    out = norm(x)
    return [out.detach(), *torch.autograd.grad(out, (x, norm.weight), gradient)]


def test_gradient():
    norm, x, _ = case(torch.float64)
    inputs = x.requires_grad_(), norm.weight
    assert gradcheck(lambda x, weight: norms.CenteredNorm.apply(x, weight, 1e-6), inputs)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_numbers_are_transformers(dtype, bound):
    norm, x, gradient = case(dtype)
    theirs = results(norm, x, gradient)
    fuse_layers(norm)
    ours = results(norm, x, gradient)
    assert "forward" in vars(norm)
    exact = results(case(torch.float32)[0], x.float(), gradient.float())
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype == dtype
        assert (a - b).norm() <= bound * b.norm()
        assert (a - c).norm() <= 1.1 * (b - c).norm() + 1e-6 * c.norm(), "no further from float32 than theirs"


def test_a_frozen_norm_has_no_gradient():
    norm, x, gradient = case(torch.float32)
    norm.requires_grad_(False)
    fuse_layers(norm)
    x.requires_grad_()
    norm(x).backward(gradient)
    assert x.grad is not None and norm.weight.grad is None


def test_compiled_once_for_any_number_of_rows(monkeypatch):
    counter = CompileCounter()
    compiled = {f: torch.compile(f, backend=counter) for f in (norms._norm, norms._norm_gradient)}
    for name, played in {"_failed": set(), "_LARGE": 0, "_checked": set(), "_compiled": compiled.get}.items():
        monkeypatch.setattr(kernels, name, played)
    for rows in (5, 2, 8, 40):
        norm, *inputs = case(torch.bfloat16, (1, rows, 8))
        theirs = results(norm, *inputs)
        fuse_layers(norm)
        for a, b in zip(results(norm, *inputs), theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    assert counter.frame_count == 2 and not kernels._failed


def test_an_input_that_is_not_finite_is_no_fault_of_the_compiler(monkeypatch):
    for name, played in {"_failed": set(), "_LARGE": 0, "_checked": set(), "_compiled": lambda f: f}.items():
        monkeypatch.setattr(kernels, name, played)
    norm, x, _ = case(torch.float32)
    fuse_layers(norm)
    norm(x.fill_(torch.nan))
    assert not kernels._failed
    monkeypatch.setattr(kernels, "_checked", set())
    monkeypatch.setattr(kernels, "_compiled", lambda f: lambda *args: f(*args) * torch.nan)
    with pytest.warns(UserWarning, match="gives other numbers"):
        assert norm(torch.ones_like(x)).isfinite().all()


@pytest.mark.parametrize("kind", [GemmaRMSNorm, Gemma2RMSNorm, Gemma3RMSNorm, Qwen3NextRMSNorm])
def test_families_that_have_it(kind):
    assert norms.is_centered_norm(kind)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, nn.LayerNorm, nn.RMSNorm, nn.Linear])
def test_other_norms_are_left_alone(kind):
    assert not norms.is_centered_norm(kind)


def test_a_cpu_runs_transformers_own(monkeypatch):
    monkeypatch.setattr(kernels, "on_gpu", lambda x: x.is_cuda)
    norm, x, _ = case(torch.float32)
    expected = norm(x)
    monkeypatch.setattr(norms.CenteredNorm, "apply", None)
    fuse_layers(norm)
    assert torch.equal(norm(x), expected)
