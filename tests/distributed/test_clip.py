"""tm.clip_grad_norm_ over backbone and head on ranks: the norm of one process, the same on all, and replicas that stay
replicas."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import cpu_only, made
from ranks import first_ranks, on_ranks
from sharded import D
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import tritonmargin as tm

pytestmark = cpu_only

C = 11
SECONDS = 20.0


def backbone() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(D, 12), nn.Tanh(), nn.Linear(12, D)).double()


def head_of(group: dist.ProcessGroup | None, **options: Any) -> tm.MarginSoftmaxLoss:
    head = tm.MarginSoftmaxLoss(D, C, bias=True, dtype=torch.float64, process_group=group, **options)
    head.load_state_dict({"weight": made(C, D), "bias": made(C, 1)[:, 0]}, strict=False)
    return head


def whole(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.full_tensor() if isinstance(grad, DTensor) else grad.to_dense()


def one_step(kind: str, p: float, sparse: bool) -> tuple[float, float]:
    """The norm here and of one process; gradients are compared here."""
    alone, net = backbone(), backbone()
    net = DistributedDataParallel(net) if kind == "ddp" else fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    one = head_of(None, sparse_grad=sparse)
    head = head_of(dist.group.WORLD, sparse_grad=sparse)
    x, target = made(6, D, seed=3), torch.tensor([1, 2, 9, 3, 4, 7])
    rows = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    one(alone(x), target).backward()
    head(net(x[rows]), target[rows]).backward()
    expected = [whole(each.grad).clone() for each in (*alone.parameters(), *one.parameters())]
    flat = torch.cat([each.flatten() for each in expected])
    right = torch.linalg.vector_norm(flat, p)
    limit = 0.5 * float(right)
    norm = tm.clip_grad_norm_((each for each in (*net.parameters(), *head.parameters())), limit, p)
    for ours, grad in zip((*net.parameters(), *head.parameters()), expected, strict=True):
        clipped = grad * (limit / (right + 1e-6))
        if ours is head.weight or ours is head.bias:
            clipped = clipped[head.shard.start : head.shard.stop]
        torch.testing.assert_close(whole(ours.grad), clipped, rtol=1e-12, atol=1e-14)
    return float(norm), float(right)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize(("kind", "sparse"), [("ddp", False), ("ddp", True), ("fully_shard", False)])
def test_norm_and_gradients_are_those_of_one_process(kind: str, sparse: bool, p: float) -> None:
    found = on_ranks(2, one_step, kind, p, sparse, timeout=SECONDS)
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx(found[0][1], rel=1e-13)


def trains() -> list[list[float]]:
    net = DistributedDataParallel(backbone())
    head = head_of(dist.group.WORLD)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.5, momentum=0.9)
    for step in range(10):
        optimizer.zero_grad()
        x = made(3, D, seed=10 * step + dist.get_rank())
        head(net(x), torch.arange(3) + step % 7).backward()
        tm.clip_grad_norm_([*net.parameters(), *head.parameters()], 0.1)
        optimizer.step()
    return [each.detach().flatten().tolist() for each in net.parameters()]


def test_replicas_stay_alike_to_the_bit() -> None:
    first, second = on_ranks(2, trains, timeout=SECONDS)
    assert first == second


def unusual() -> None:
    rank = dist.get_rank()
    head = head_of(dist.group.WORLD)
    parameters = list(head.parameters())
    assert float(tm.clip_grad_norm_(parameters, 1.0)) == 0.0  # nobody has a gradient
    if rank:
        head.weight.grad = torch.full_like(head.weight, 3.0)
    assert float(tm.clip_grad_norm_(parameters, 100.0)) == pytest.approx(3.0 * math.sqrt(5 * D))
    for bad, p in ((torch.nan, 2.0), (torch.nan, math.inf), (torch.inf, 2.0)):
        head.weight.grad = torch.ones_like(head.weight)
        if rank:
            head.weight.grad[2, 3] = bad
        with pytest.raises(RuntimeError, match=r"norm of the gradients is (nan|inf)"):
            tm.clip_grad_norm_(parameters, 1.0, p, error_if_nonfinite=True)
        assert head.weight.grad[0, 0] == 1.0, "changed before the error"
        norm = tm.clip_grad_norm_(parameters, 1.0, p)
        assert norm.isnan() if math.isnan(bad) else norm.isinf()
    head.zero_grad()
    head.update_in_backward(tm.optim.RowSGD([head.weight], lr=0.1))
    head(made(3, D), torch.arange(3)).backward()
    with pytest.raises(RuntimeError, match="can be neither clipped"):
        tm.clip_grad_norm_(parameters, 1.0)
    small = head_of(first_ranks(1)) if not rank else None  # a head of a smaller group beside one of all
    both = head_of(dist.group.WORLD)
    for each in filter(None, (small, both)):
        each.weight.grad = torch.ones_like(each.weight)
    right = math.sqrt(C * D * (1 if rank else 2))
    found = [parameter for each in (both, small) if each for parameter in each.parameters()]
    assert float(tm.clip_grad_norm_(found, 1.0)) == pytest.approx(right)


def test_missing_gradients_nan_and_heads_of_several_groups() -> None:
    on_ranks(2, unusual, timeout=SECONDS)


def clips_alone() -> str:
    head = head_of(dist.group.WORLD)
    if dist.get_rank():
        time.sleep(4.0)
        return ""
    with pytest.raises(RuntimeError) as error:
        tm.clip_grad_norm_(head.parameters(), 1.0)
    return str(error.value)


def test_a_rank_that_clips_alone_hears_what_it_waited_in() -> None:
    assert "rank 0 waited for other ranks in tm.clip_grad_norm_" in on_ranks(2, clips_alone, timeout=2.0)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_without_ranks_it_is_torchs(p: float, dtype: torch.dtype) -> None:
    net = backbone().to(dtype)
    for each in net.parameters():
        each.grad = torch.randn_like(each)
    other = copy.deepcopy(net)
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        theirs.grad = ours.grad.clone()
    found = tm.clip_grad_norm_(net.parameters(), 0.5, p)
    expected = nn.utils.clip_grad_norm_(other.parameters(), 0.5, p)
    assert torch.equal(found, expected)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert tm.clip_grad_norm_([], 1.0) == 0.0
    assert tm.clip_grad_norm_(nn.Parameter(torch.ones(3)), 1.0) == 0.0
    for wrong in (dict(norm_type=0.0), dict(norm_type=-1.0), dict(max_norm=-1.0), dict(max_norm=math.nan)):
        with pytest.raises(ValueError, match=r"(norm_type|max_norm) must be a number >"):
            tm.clip_grad_norm_(**(dict(parameters=net.parameters(), max_norm=1.0) | wrong))
