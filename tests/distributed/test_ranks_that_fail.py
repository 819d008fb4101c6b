"""nan, overflow, death, no samples or no gradient on one rank: all ranks go on alike, or stop in time."""

from __future__ import annotations

import copy
import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import cpu_only, made
from ranks import on_ranks
from sharded import D
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tritonmargin as tm
from tritonmargin.distributed.shard import Shard

pytestmark = cpu_only


def test_14_a_skipped_step_with_fsdp_and_accumulation_is_the_same_as_on_one_process() -> None:
    on_ranks(2, skipped_with_fsdp)


def skipped_with_fsdp() -> None:
    """FSDP's parameters stay gathered where backward does not come: `reshard()` after a loss that is skipped."""

    def net() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(D, 8), torch.nn.ReLU(), torch.nn.Linear(8, D))

    options: dict[str, Any] = dict(margin=tm.NormFace(s=4.0), on_nonfinite="skip")
    backbone, alone = fully_shard(net(), mesh=init_device_mesh("cpu", (2,))), net()
    head = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD, **options)
    full = tm.MarginSoftmaxLoss(D, 10, **options)
    full.load_state_dict({"weight": head.state_dict()["weight"].full_tensor()})
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (backbone, alone)]
    for step in range(6):
        xs = [made(2, D, seed=10 * step + rank).float() for rank in range(2)]
        if step % 2:
            xs[1][0, 0] = torch.nan
        else:
            for optimizer in optimizers:
                optimizer.zero_grad()
        target = torch.tensor([1, 9])
        loss = head(backbone(xs[dist.get_rank()]), target)
        loss.backward()
        if not loss.isfinite():
            backbone.reshard()
        full(alone(torch.cat(xs)), target.repeat(2)).backward()
        if step % 2:
            for optimizer in optimizers:
                optimizer.step()
    for ours, other in zip(backbone.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.full_tensor(), other, rtol=1e-5, atol=1e-6)


def test_statistics_are_of_a_sample_on_every_rank_if_on_one() -> None:
    assert on_ranks(2, sampled_statistics) == [True, True]


def sampled_statistics() -> bool:
    # Two classes on rank 0, one of them walked, and one on rank 1, which has nothing to choose from.
    head = tm.MarginSoftmaxLoss(D, 3, process_group=dist.group.WORLD, sample_rate=0.5)
    _, stats = head(made(1, D).float(), torch.tensor([2]), return_stats=True)
    return bool(stats.sampled.all())


def test_a_rank_without_samples_or_gradient_takes_part() -> None:
    on_ranks(2, bystander)


def bystander() -> None:
    head = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD)
    leaf = made(3, D).float().requires_grad_()
    if dist.get_rank():
        head(torch.empty(0, D), torch.empty(0, dtype=torch.int64)).backward()
    else:
        head(leaf, torch.tensor([1, 2, 3])).backward()
        assert leaf.grad.abs().sum() > 0
    fresh = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD, device="meta")
    assert fresh.state_dict()["weight"].to_local().is_meta
    fresh.to_empty(device="cpu")
    fresh.reset_parameters()
    for each in (head, fresh, copy.deepcopy(head)):
        state = tm.optim.RowSGD(each.parameters(), lr=0.1, momentum=0.9).state_dict()["state"][0]
        assert state["momentum_buffer"].shape == (10, D), "not a tensor of all classes"
        assert not each.state_dict()["weight"].to_local().is_meta


def test_14_nan_on_one_rank_is_seen_by_all() -> None:
    on_ranks(3, nan_on_one)


def nan_on_one() -> None:
    for reduction in ("mean", "sum", "none"):
        for way in ("raise", "skip"):
            head = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD, on_nonfinite=way, reduction=reduction)
            x = made(2, D, seed=dist.get_rank()).float()
            if dist.get_rank() == 1:
                x[1, 3] = torch.nan
            x.requires_grad_()
            target = torch.tensor([1, 9])
            if way == "raise":
                with pytest.raises(FloatingPointError, match="on all ranks"):
                    head(x, target)
            else:
                before = head.weight.detach().clone()
                optimiser = tm.optim.RowSGD(head.parameters(), lr=0.1, momentum=0.9)
                head(x, target).sum().backward()
                optimiser.step()
                assert x.grad is None
                assert torch.equal(head.weight, before)
            head(made(2, D).float(), target).sum().backward()
            assert head.weight.grad.isfinite().all()


def test_14_a_skipped_step_leaves_the_backbone_alone() -> None:
    """0 times the nan of a backbone's activations is nan: backward must not go there at all."""
    first, second = on_ranks(2, nan_in_a_backbone)
    assert first == second, "the replicas differ"


def nan_in_a_backbone() -> list[float]:
    torch.manual_seed(0)
    backbone = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)))
    head = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD, on_nonfinite="skip")
    head.update_in_backward(rows := tm.optim.RowSGD(head.parameters(), lr=0.1))
    optimiser = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
    target = torch.tensor([1, 9])
    for step in range(4):
        before = [each.detach().clone() for each in (*backbone.parameters(), head.weight)]
        x = made(2, D, seed=10 * step + dist.get_rank()).float()
        if step % 2 and dist.get_rank():
            x[0, 0] = torch.nan
        optimiser.zero_grad()
        loss = head(backbone(x), target)
        loss.backward()
        if step % 2 == 0:
            optimiser.step()
        else:
            assert all(each.grad is None for each in (*backbone.parameters(), head.weight))
        rows.step()
        after = (*backbone.parameters(), head.weight)
        assert all(torch.equal(a, b) == bool(step % 2) for a, b in zip(before, after, strict=True)), step
        assert all(each.isfinite().all() for each in after)
    return [float(each.detach().double().sum()) for each in backbone.parameters()]


def test_14_an_overflow_on_one_rank_is_skipped_by_all_with_torchs_sharded_scaler() -> None:
    (steps, sums), other = on_ranks(2, overflow_on_one)
    assert (steps, sums) == other, "the replicas differ"
    assert steps == [(8.0, True), (4.0, False), (4.0, True)]


def overflow_on_one() -> tuple[list[tuple[float, bool]], list[float]]:
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    torch.manual_seed(0)
    backbone = nn.parallel.DistributedDataParallel(nn.Linear(D, D))
    head = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD)
    everything = [*backbone.parameters(), *head.parameters()]
    optimiser = torch.optim.SGD(everything, lr=0.1)
    scaler = ShardedGradScaler(device="cpu", init_scale=8.0, process_group=dist.group.WORLD)
    steps = []
    for step in range(3):
        optimiser.zero_grad()
        x = made(2, D, seed=10 * step + dist.get_rank()).float()
        scaler.scale(head(backbone(x), torch.tensor([1, 9]))).backward()
        if step == 1 and dist.get_rank() == 1:
            head.weight.grad[0, 0] = torch.inf
        before = [each.detach().clone() for each in everything]
        scaler.step(optimiser)
        scaler.update()
        moved = [not torch.equal(a, b) for a, b in zip(before, everything, strict=True)]
        assert len(set(moved)) == 1
        steps.append((scaler.get_scale(), moved[0]))
    return steps, [float(each.detach().double().sum()) for each in backbone.parameters()]


@pytest.mark.parametrize("moment", ["before the step", "between forward and backward"])
def test_14_a_dead_rank_ends_the_others_within_the_timeout(moment: str) -> None:
    begin = time.monotonic()
    errors = on_ranks(3, one_dies, moment, timeout=5.0)
    assert errors[1] is None
    assert all("error" in str(error).lower() or "closed" in str(error).lower() for error in (errors[0], errors[2]))
    assert time.monotonic() - begin < 40


def one_dies(moment: str) -> str:
    head = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD)
    x = made(2, D, seed=dist.get_rank()).float().requires_grad_()
    if dist.get_rank() == 1 and moment == "before the step":
        os._exit(1)
    try:
        loss = head(x, torch.tensor([1, 9]))
        if dist.get_rank() == 1:
            os._exit(1)
        loss.backward()
    except RuntimeError as error:
        return f"error: {error}"
    return "nothing happened"


def one_of_two_sums() -> None:
    a, b = (torch.ones(3, requires_grad=True) for _ in range(2))
    first, second = Shard(4).all_sums(a, b)
    assert first.tolist() == second.tolist() == [2.0, 2.0, 2.0]
    first.sum().backward()
    assert a.grad is not None
    assert a.grad.tolist() == [1.0, 1.0, 1.0]
    assert b.grad is None


def test_a_sum_that_nobody_differentiates_has_no_gradient() -> None:
    """The class pass would gather rows for the gradient of |w_y|, were it zeros."""
    on_ranks(2, one_of_two_sums)
