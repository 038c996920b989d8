"""The choice of FlashAttention's version: by the GPU, by what is installed, and by a trial."""

import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaForCausalLM

from tests.tiny import SIZES, tiny_config
from trl_nca import flash, shared_prompt
from trl_nca.layout import GroupLayout
from trl_nca.logps import prepare
from trl_nca.shared_prompt import _attend_by_flash, _attend_by_parts


@pytest.fixture
def machine(monkeypatch):
    """A Hopper GPU with FlashAttention 3, as far as a CPU can be one: what is installed, and what was called how."""

    class Machine:
        installed, active, error, noise = {"flash_attn_interface"}, None, 0.0, 0.0
        capability, calls = 9, []

        def activate(self, name):
            if self.error:
                raise self.error
            self.active = name

        def attend(self, query, key, value, scaling, window, layout):
            self.calls.append((self.active, query.shape[1], key.shape[1], query.shape[3], window))
            out = _attend_by_parts(*(x.float() for x in (query, key, value)), 0.0, scaling, window, layout)
            return (out * (1 + self.noise * bool(self.active))).to(query.dtype)

    machine = Machine()
    machine.calls = []
    monkeypatch.setattr(flash, "_capability", lambda device: machine.capability)
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: name if name in machine.installed else None)
    monkeypatch.setattr(flash, "_attend_by_flash", machine.attend)
    monkeypatch.setattr(flash.switch, "activate_flash_attention_impl", machine.activate)
    monkeypatch.setattr(flash.switch, "current_flash_attention_impl", lambda: machine.active)
    monkeypatch.setattr(flash.switch, "restore_flash_attention_impl", lambda: machine.activate(None))
    return machine


def llama(**changes):
    return LlamaForCausalLM(tiny_config(**changes))


def test_flash_attention_3_is_used_where_it_is_installed(machine, caplog):
    assert prepare([llama()], "false") is False
    assert not machine.calls, "padded rows need none"
    assert prepare([llama()], "true")
    assert machine.active == "FA3"
    assert caplog.messages == ["Attention runs by FA3."]
    assert machine.calls == [(None, 4, 2, 8, None), ("FA3", 4, 2, 8, None)]
    flash.use_newer_flash([llama()])
    assert len(machine.calls) == 2, "what is active stays"


def test_it_is_tried_with_all_shapes_of_the_models(machine):
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES | {"head_dim": 16}, sliding_window=32))
    flash.use_newer_flash([llama(), llama(), gemma])
    shapes = {call[1:] for call in machine.calls}
    assert machine.active == "FA3"
    assert shapes == {(4, 2, 8, None), (4, 2, 16, None), (4, 2, 16, 16)}
    assert len(machine.calls) == 2 * len(shapes)


@pytest.mark.parametrize(
    ("capability", "installed", "used"),
    [(9, {"flash_attn"}, None), (10, {"flash_attn"}, "FA4"), (10, {"flash_attn_interface"}, None), (9, set(), None),
     (8, {"flash_attn", "flash_attn_interface"}, None), (12, {"flash_attn", "flash_attn_interface"}, None)],
)  # fmt: skip
def test_by_the_gpu_and_what_is_installed(machine, caplog, capability, installed, used):
    machine.capability, machine.installed = capability, installed
    flash.use_newer_flash([llama()])
    assert machine.active == used
    assert bool(caplog.messages) == bool(used)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [({"error": RuntimeError("does not expose FA3 kernels\nat all")}, "does not expose FA3 kernels"),
     ({"noise": 0.1}, "its results are not those of torch's own"), ({"noise": float("nan")}, "its results are not")],
)  # fmt: skip
def test_what_fails_a_trial_is_not_used(machine, caplog, fault, reason):
    vars(machine).update(fault)
    with caplog.at_level(logging.WARNING):
        flash.use_newer_flash([llama()])
    assert machine.active is None
    (message,) = caplog.messages
    assert message.startswith(f"FA3 is installed and not used: {reason}") and "\n" not in message


def test_flash_attention_2_is_not_4(machine, caplog):
    machine.capability, machine.installed = 10, {"flash_attn"}
    machine.error = ModuleNotFoundError("No module named 'flash_attn.cute'")
    flash.use_newer_flash([llama()])
    assert machine.active is None and not caplog.messages


def test_kernels_that_have_no_dropout_are_not_used_with_it(machine):
    flash.use_newer_flash([llama(attention_dropout=0.1)])
    assert machine.active is None and not machine.calls


def test_no_gradient_is_written_twice(monkeypatch):
    """Around the kernel there are views, and the keys' copies: a slice's gradient would be one more tensor of zeros."""
    monkeypatch.setattr(shared_prompt, "varlen_attn", lambda q, k, v, *args, **kwargs: q * (k.mean() + v.mean()))
    inputs = [torch.randn(1, heads, 12, 8, requires_grad=True) for heads in (4, 2, 2)]
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    out = _attend_by_flash(*inputs, None, None, GroupLayout([5], [[4, 3]]))
    with Names():
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert "select_backward" not in names and names.count("index_put") == 2


def test_an_older_torch_has_no_switch(machine, monkeypatch):
    monkeypatch.delattr(flash.switch, "restore_flash_attention_impl")
    flash.use_newer_flash([llama()])
    assert machine.active is None


def test_on_a_cpu_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(flash, "_is_there", lambda name, package: name)
    flash.use_newer_flash([llama()])
