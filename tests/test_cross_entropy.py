"""Cross-entropy and its gradient, plain and compiled, against float64."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from trl_nca import kernels
from trl_nca.cross_entropy import CrossEntropy, cross_entropy, fused_cross_entropy

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def compiler(monkeypatch):
    """Counts the graphs that are compiled, and runs them as they are: a C compiler takes a minute."""
    counter = CompileCounter()
    compiled = torch.compile(cross_entropy, backend=counter)
    torch._dynamo.reset()
    for name, played in {"on_gpu": lambda x: True, "_failed": set(), "_LARGE": 0, "_checked": set()}.items():
        monkeypatch.setattr(kernels, name, played)
    monkeypatch.setattr(kernels, "_compiled", lambda function: compiled)
    yield counter
    assert not kernels._failed, "nothing failed"


def case(dtype=torch.bfloat16, n=5, vocabulary=1000):
    torch.manual_seed(0)
    return 4 * torch.randn(n, vocabulary).to(dtype), torch.randint(0, vocabulary, (n,))


@pytest.mark.parametrize("dtype", TYPES)
def test_all_is_rounded_once(dtype):
    logits, targets = case(dtype)
    exact = logits.double().clone().requires_grad_()
    expected = functional.cross_entropy(exact, targets, reduction="none")
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    loss, gradient = cross_entropy(logits, targets, True)
    assert gradient.dtype == dtype and loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6, check_dtype=False)
    half_a_digit = torch.finfo(dtype).eps / 2 + 1e-5  # float32's exp of numbers around 10
    smallest = torch.finfo(dtype).smallest_normal  # float16 has fewer digits below it
    torch.testing.assert_close(gradient, slope, rtol=half_a_digit, atol=smallest * half_a_digit, check_dtype=False)
    torch.testing.assert_close(cross_entropy(logits, targets, False)[0], loss, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_is_all_but_certain_has_a_gradient(dtype):
    _, gradient = cross_entropy(torch.tensor([[0.0, 8.0]], dtype=dtype), torch.tensor([1]), True)
    p = 1 / (1 + math.exp(8))  # the other's; p_t is 1 in bfloat16
    torch.testing.assert_close(gradient.double(), torch.tensor([[p, -p]], dtype=torch.float64), rtol=4e-3, atol=0)


@pytest.mark.parametrize("loss", [cross_entropy, fused_cross_entropy])
def test_the_function_hands_the_gradient_on(loss, compiler):
    logits, targets = case(torch.float64)
    logits.requires_grad_()
    weights = torch.randn(5, dtype=torch.float64)
    plain = weights @ functional.cross_entropy(logits, targets, reduction="none")
    ours = weights @ CrossEntropy.apply(logits, targets, loss)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(plain, logits))


@pytest.mark.parametrize("dtype", TYPES[1:3])
def test_one_graph_for_any_number_of_tokens(dtype, compiler):
    for n, needs_gradient in ((8, True), (5, True), (3, True), (8, False), (7, False)):
        logits, targets = case(dtype, n)
        results = fused_cross_entropy(logits, targets, needs_gradient)
        torch.testing.assert_close(results, cross_entropy(logits, targets, needs_gradient))
    assert compiler.frame_count == 2, "with a gradient and without"
    fused_cross_entropy(*case(dtype, 5, vocabulary=500), True)
    fused_cross_entropy(*case(dtype, 7, vocabulary=400), True)
    assert compiler.frame_count == 4, "the vocabulary is known to the compiler"


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_a_plan_sees_what_is_held(needs_gradient, compiler):
    logits, targets = case()
    torch.library.opcheck(fused_cross_entropy, (logits, targets, needs_gradient), test_utils=("test_faketensor",))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        loss, gradient = fused_cross_entropy(fake.from_tensor(logits), fake.from_tensor(targets), needs_gradient)
    assert loss.shape == (5,) and loss.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16 and gradient.numel() == needs_gradient * logits.numel()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles for a GPU: needs one")
def test_on_a_gpu_nothing_of_the_logits_size_is_made_but_their_gradient():
    logits, targets = (t.cuda() for t in case(n=64, vocabulary=152_000))
    fused_cross_entropy(logits, targets, True)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = fused_cross_entropy(logits, targets, True)
    assert torch.cuda.max_memory_allocated() - held < 1.1 * logits.nbytes
    assert not kernels._failed, "nothing failed"
    torch.testing.assert_close(results, cross_entropy(logits, targets, True))
