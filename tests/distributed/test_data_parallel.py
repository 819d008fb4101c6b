"""A head without a process group inside of DistributedDataParallel and `fully_shard`, as any other module: the losses
and gradients of two ranks are those of one process with all samples, or, where ranks differ, their average.

A head that shards its classes stays outside of both: test_parallel.py, test_refusals.py.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from cases import cpu_only
from networks import Network, batch, step
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

pytestmark = cpu_only

RANKS = 2
BIASED = "smoothed, with a bias and retained logits"
KINDS = ("bounded", BIASED, "hinge")


class Unused(Network):
    """With a layer that takes no part."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.unused = nn.Linear(3, 3)


def whole_batch(number: int) -> tuple[Tensor, Tensor]:
    """One that means of halves average to: no label is ignored, no class has another weight."""
    x, y = batch(torch.float64, n=8, seed=number)
    y[1] = 7
    return x, y


def mine(each: Tensor) -> Tensor:
    """This rank's half."""
    return each.chunk(RANKS)[dist.get_rank()]


def network(kind: str, make: type[Network] = Network, **options: Any) -> Network:
    found = make(kind, **options).double()
    found.head.class_weight = None
    found.head.reduction = "mean"
    return found


def full(tensor: Tensor) -> Tensor:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.to_dense()


def compare(wrapped: nn.Module, alone: nn.Module, way: object, steps: int = 3) -> None:
    """Steps of SGD with each rank's half of the batch, and with all of it on one process."""
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05) for each in (wrapped, alone)]
    for number in range(steps):
        x, y = whole_batch(number)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss, expected = wrapped(mine(x), mine(y)), alone(x, y)
        loss.backward()
        expected.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total / RANKS, expected.detach())
        check_gradients(wrapped, {name: each.grad for name, each in alone.named_parameters()}, (way, number))
        for optimizer in optimizers:
            optimizer.step()


def check_gradients(wrapped: nn.Module, expected: dict[str, Tensor | None], what: object) -> None:
    found = {name.removeprefix("module."): each.grad for name, each in wrapped.named_parameters()}
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        grad = found[name]
        if right is None:
            assert grad is None or not full(grad).any(), (what, name)
            continue
        assert grad is not None, (what, name)
        size = float(right.to_dense().abs().max())
        torch.testing.assert_close(
            full(grad), right.to_dense(), rtol=1e-9, atol=1e-11 * size, msg=lambda why, of=name: f"{what} {of}: {why}"
        )


def average_of_ranks(module: Network, *given: Tensor) -> dict[str, Tensor | None]:
    """Gradients of this rank's samples, averaged by hand."""
    grads = step(module, module, *given)
    del grads["loss"]
    for grad in grads.values():
        dist.all_reduce(grad)
        grad /= RANKS
    return dict(grads)


# -- DistributedDataParallel -----------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "static_graph": {"static_graph": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "static_graph and gradient_as_bucket_view": {"static_graph": True, "gradient_as_bucket_view": True},
}


def test_a_head_in_ddp_trains_as_one_process_with_all_samples() -> None:
    on_ranks(RANKS, in_ddp)


def in_ddp() -> None:
    for way, options in WAYS.items():
        for kind in KINDS if way == "default" else KINDS[:1]:
            make = Unused if way == "find_unused_parameters" else Network
            compare(DistributedDataParallel(network(kind, make), **options), network(kind, make), (way, kind))


def test_a_head_in_ddp_adds_gradients_up_in_no_sync_and_in_a_checkpoint() -> None:
    on_ranks(RANKS, accumulated)


def accumulated() -> None:
    wrapped, alone = DistributedDataParallel(network("bounded")), network("bounded")
    batches = [whole_batch(number) for number in range(3)]
    with wrapped.no_sync():
        for x, y in batches[:2]:
            wrapped(mine(x), mine(y)).backward()
    wrapped(*map(mine, batches[2])).backward()
    sum(alone(x, y) for x, y in batches).backward()
    expected = {name: each.grad for name, each in alone.named_parameters()}
    check_gradients(wrapped, expected, "no_sync")
    wrapped.zero_grad()
    for x, y in batches:
        again = checkpoint(wrapped, mine(x), mine(y), use_reentrant=False)
        again.backward()
    check_gradients(wrapped, expected, "checkpoint")


def test_a_sampled_head_in_ddp_averages_what_each_rank_drew() -> None:
    """Ranks draw by one seed, and their labels differ; the number of draws is the first rank's."""
    on_ranks(RANKS, sampled_in_ddp)


def sampled_in_ddp() -> None:
    wrapped = DistributedDataParallel(network("bounded", sample_rate=0.3))
    alone = network("bounded", sample_rate=0.3)
    for number in range(3):
        given = tuple(map(mine, whole_batch(number)))
        expected = average_of_ranks(alone, *given)
        wrapped.zero_grad()
        wrapped(*given).backward()
        check_gradients(wrapped, expected, number)
        assert torch.equal(wrapped.module.head.sampler, alone.head.sampler)


# -- fully_shard -----------------------------------------------------------------------------------------------------


def test_a_head_in_fully_shard_trains_as_one_process_with_all_samples() -> None:
    """As a part of the root, and as a unit of its own; the rows of its weight are dealt out by torch."""
    on_ranks(RANKS, in_fully_shard)


def in_fully_shard() -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    for kind in KINDS:
        root, units = network(kind), network(kind)
        fully_shard(root, mesh=mesh)
        fully_shard(units.head, mesh=mesh, reshard_after_forward=False)
        fully_shard(units, mesh=mesh)
        for way, wrapped in (("root", root), ("unit", units)):
            compare(wrapped, network(kind), (way, kind))
            assert isinstance(wrapped.head.weight, DTensor)
    wrapped = fully_shard(network("bounded", sample_rate=0.3), mesh=mesh)
    given = tuple(map(mine, whole_batch(0)))
    expected = average_of_ranks(network("bounded", sample_rate=0.3), *given)
    wrapped(*given).backward()
    check_gradients(wrapped, expected, "sampled")


def test_a_head_in_fully_shard_with_mixed_precision_computes_as_one_in_bfloat16() -> None:
    """The loss is float32, the gradients are averaged and kept in it."""
    on_ranks(RANKS, in_mixed_precision)


def in_mixed_precision() -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for kind in ("bounded", BIASED):
        wrapped = network(kind).float()
        low = copy.deepcopy(wrapped).bfloat16()
        fully_shard(wrapped.head, mesh=mesh, mp_policy=policy)
        fully_shard(wrapped, mesh=mesh, mp_policy=policy)
        x, y = map(mine, whole_batch(0))
        loss, expected = wrapped(x.float(), y), low(x.bfloat16(), y)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, expected)
        loss.backward()
        expected.backward()
        grads = {name: each.grad.float() for name, each in low.named_parameters()}
        for grad in grads.values():
            dist.all_reduce(grad)
            grad /= RANKS
        check_gradients(wrapped, dict(grads), kind)
        assert all(each.grad.dtype == torch.float32 for each in wrapped.parameters())
