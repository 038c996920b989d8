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
    loss, gradient, _ = cross_entropy(logits, targets, True)
    assert gradient.dtype == dtype and loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6, check_dtype=False)
    half_a_digit = torch.finfo(dtype).eps / 2 + 1e-5  # float32's exp of numbers around 10
    smallest = torch.finfo(dtype).smallest_normal  # float16 has fewer digits below it
    torch.testing.assert_close(gradient, slope, rtol=half_a_digit, atol=smallest * half_a_digit, check_dtype=False)
    torch.testing.assert_close(cross_entropy(logits, targets, False)[0], loss, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_is_all_but_certain_has_a_gradient(dtype):
    _, gradient, _ = cross_entropy(torch.tensor([[0.0, 8.0]], dtype=dtype), torch.tensor([1]), True)
    p = 1 / (1 + math.exp(8))  # the other's; p_t is 1 in bfloat16
    torch.testing.assert_close(gradient.double(), torch.tensor([[p, -p]], dtype=torch.float64), rtol=4e-3, atol=0)


def test_statistics_by_hand():
    """Of a distribution without and with a doubt, and of 1/2, 1/4, 1/4; the target is the first token."""
    halves = [2 * math.log(2), math.log(2), math.log(2), -math.inf]
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 90.0, 0.0, 0.0], halves], dtype=torch.float64)
    _, _, statistics = cross_entropy(logits, torch.zeros(3, dtype=torch.long), False, True)
    entropies, is_top = [math.log(4), 0.0, 1.5 * math.log(2)], [1.0, 0.0, 1.0]
    expected = torch.tensor([entropies, is_top], dtype=torch.float64).T
    torch.testing.assert_close(statistics, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_statistics_beside_a_gradient_that_they_leave_as_it_is(dtype, rows, monkeypatch):
    """A few rows at a time too."""
    logits, targets = case(dtype, n=8, vocabulary=997)
    targets[::2] = logits[::2].argmax(-1)
    monkeypatch.setattr("trl_nca.cross_entropy._CACHED", rows * 997 + 1)
    expected = torch.distributions.Categorical(logits=logits.double()).entropy()
    for needs_gradient in (True, False):
        plain = fused_cross_entropy(logits, targets, needs_gradient)
        *ours, statistics = fused_cross_entropy(logits, targets, needs_gradient, True)
        torch.testing.assert_close(ours, [*plain[:2]], rtol=0, atol=0)
        torch.testing.assert_close(statistics[:, 0].double(), expected, rtol=1e-5, atol=0)
        assert statistics[:, 1].tolist() == 4 * [1.0, 0.0]
        assert plain[2].shape == (0, 2)


@pytest.mark.parametrize("size", [1.0, 1e4, 3e38])
def test_statistics_of_extremes_are_finite(size):
    logits, targets = size * torch.tensor([[1.0, -1.0, 0.5], [0.0, 0.0, -1.0]]), torch.tensor([0, 2])
    _, _, statistics = cross_entropy(logits, targets, False, True)
    assert statistics.isfinite().all() and (statistics[:, 0] >= 0).all()
    assert statistics[:, 1].tolist() == [1.0, 0.0]


def test_a_token_as_likely_as_the_likeliest_counts():
    _, _, statistics = cross_entropy(torch.tensor([[3.0, 1.0, 3.0]]).expand(3, 3), torch.arange(3), False, True)
    assert statistics[:, 1].tolist() == [1.0, 0.0, 1.0]


def test_the_function_hands_the_gradient_on(compiler):
    logits, targets = case(torch.float64)
    logits.requires_grad_()
    weights = torch.randn(5, dtype=torch.float64)
    plain = weights @ functional.cross_entropy(logits, targets, reduction="none")
    losses, statistics = CrossEntropy.apply(logits, targets, True)
    ours = weights @ losses
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(plain, logits))
    assert not statistics.requires_grad


@pytest.mark.parametrize("dtype", TYPES[1:3])
def test_one_graph_for_any_number_of_tokens(dtype, compiler):
    for n, *needs in ((8, True, True), (5, True, True), (3, True, True), (8, False, False), (7, False, False)):
        logits, targets = case(dtype, n)
        results = fused_cross_entropy(logits, targets, *needs)
        torch.testing.assert_close(results, cross_entropy(logits, targets, *needs))
    assert compiler.frame_count == 2, "the policy's, and the reference's"
    fused_cross_entropy(*case(dtype, 5, vocabulary=500), True)
    fused_cross_entropy(*case(dtype, 7, vocabulary=400), True)
    assert compiler.frame_count == 4, "the vocabulary is known to the compiler"


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("needs_statistics", [True, False])
def test_a_plan_sees_what_is_held(needs_gradient, needs_statistics, compiler):
    (logits, targets), needs = case(), (needs_gradient, needs_statistics)
    torch.library.opcheck(fused_cross_entropy, (logits, targets, *needs), test_utils=("test_faketensor",))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        loss, gradient, statistics = fused_cross_entropy(fake.from_tensor(logits), fake.from_tensor(targets), *needs)
    assert loss.shape == (5,) and loss.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16 and gradient.numel() == needs_gradient * logits.numel()
    assert statistics.dtype == torch.float32 and statistics.shape == (5 * needs_statistics, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles for a GPU: needs one")
def test_on_a_gpu_nothing_of_the_logits_size_is_made_but_their_gradient():
    logits, targets = (t.cuda() for t in case(n=64, vocabulary=152_000))
    fused_cross_entropy(logits, targets, True, True)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = fused_cross_entropy(logits, targets, True, True)
    assert torch.cuda.max_memory_allocated() - held < 1.1 * logits.nbytes
    assert not kernels._failed, "nothing failed"
    torch.testing.assert_close(results, cross_entropy(logits, targets, True, True))
