"""The engine in two processes: gradients exchanged once, and sharded weights."""

import contextlib
import functools
import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.engine import make_model, step
from tests.tiny import rows_of
from trl_nca.chunks import NumForwards, count_forwards, split_batch
from trl_nca.collate import GroupCollator
from trl_nca.losses import LOSSES
from trl_nca.pieces import WHOLE, Cutting

# Two that are sums over responses, and two that couple them.
LOSS_TYPES = ("NCA", "OAPL", "InfoNCA", "GVPO")
#: Of gradients, absolute: squared errors of log-ratios that are far from their targets have larger ones.
TOLERANCES = {"NCA": 1e-9, "InfoNCA": 1e-9, "OAPL": 1e-8, "GVPO": 1e-8}
# The second process has more to do: its groups are longer and need more chunks.
SHAPES = [[(7, (3, 5, 1))], [(12, (6, 2, 9, 8)), (3, (4, 9))]]


def gradient_of_both(loss_type):
    model = make_model()
    for shapes in SHAPES:
        step(model, GroupCollator()(rows_of(shapes)), loss_type, None)
    return {name: p.grad / 2 for name, p in model.named_parameters() if p.requires_grad}


def largest(number):
    number = torch.tensor([number])
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)


#: Most tokens of a forward, what is run in pieces, and how many chunks each process then has.
BOUNDS = [*((loss_type, 20, WHOLE, [1, 4]) for loss_type in LOSS_TYPES)]
BOUNDS += [(loss_type, 7, Cutting(100), [3, 6]) for loss_type in ("NCA", "InfoNCA")]


def with_ddp(rank):
    for loss_type, most, cutting, num_chunks in BOUNDS:
        model = DistributedDataParallel(make_model())
        exchanges = []

        def count(state, bucket):
            state.append(bucket.index())
            return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])

        model.register_comm_hook(exchanges, count)
        batch = GroupCollator()(rows_of(SHAPES[rank]))
        assert len(split_batch(batch, most)) == num_chunks[rank]
        step(model, batch, loss_type, most, no_sync=model.no_sync, cutting=cutting)
        assert exchanges == sorted(set(exchanges)), "each bucket once"
        for name, expected in gradient_of_both(loss_type).items():
            torch.testing.assert_close(
                model.module.get_parameter(name).grad, expected, rtol=1e-6, atol=TOLERANCES[loss_type]
            )


def with_sharded_weights(rank):
    mesh = dist.init_device_mesh("cpu", (2,))
    for loss_type in LOSS_TYPES:
        model = make_model()
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        whole = make_model().get_base_model().lm_head.weight.numel()
        assert model.get_base_model().lm_head.weight.to_local().numel() == whole / 2, "nothing was sharded"
        batch = GroupCollator()(rows_of(SHAPES[rank]))
        # Each forward and backward takes weights from both: without idle ones one would wait for the other.
        forwards = count_forwards(batch, 20, shared_prompt=True, separable=LOSSES[loss_type].separable)
        assert forwards == [NumForwards(1, 0), NumForwards(4, 0 if LOSSES[loss_type].separable else 3)][rank]
        at_least = NumForwards(largest(forwards.chunks), largest(forwards.before))
        step(model, batch, loss_type, 20, at_least, functools.partial(no_exchange, model))
        for name, expected in gradient_of_both(loss_type).items():
            torch.testing.assert_close(
                model.get_parameter(name).grad.full_tensor(), expected, rtol=1e-6, atol=TOLERANCES[loss_type], msg=name
            )


@contextlib.contextmanager
def no_exchange(model):
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def worker(rank, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    with_ddp(rank)
    with_sharded_weights(rank)
    dist.destroy_process_group()


def test_two_processes():
    """Both in the same two: starting them takes longer than what they do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(worker, (port,), nprocs=2, start_method="forkserver")
