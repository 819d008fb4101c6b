"""Ranks that disagree, and heads in wrong places: an error that names the matter on all ranks."""

from __future__ import annotations

import contextlib
import math
import os
import time
import unittest.mock
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import cpu_only, made
from ranks import on_ranks
from sharded import D
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tritonmargin as tm
from tritonmargin import checks
from tritonmargin.distributed import agreement

pytestmark = cpu_only


def test_14_ranks_that_disagree_all_hear_what_about() -> None:
    on_ranks(2, disagreements)


def disagreements() -> None:
    rank = dist.get_rank()
    for name, options in {
        "num_classes": dict(num_classes=10 + rank),
        "embedding_dim": dict(embedding_dim=D + rank),
        "margin": dict(margin=tm.ArcFace(m=0.1 * (1 + rank))),
        "dtype": dict(dtype=(torch.float32, torch.bfloat16)[rank]),
        "sample_rate": dict(sample_rate=0.5 + 0.1 * rank),
        "reduction": dict(reduction=("mean", "sum")[rank]),
        "margin is .*half.*": dict(margin=Halved(0.5 + rank)),
        "margin is .*scheduled.*": dict(margin=scheduled(bool(rank))),
    }.items():
        name = name if "margin is" in name else f"{name} is"
        arguments: dict[str, Any] = dict(embedding_dim=D, num_classes=10) | options
        with pytest.raises(ValueError, match=f"{name}.* on rank 1, .* on rank 0"):
            tm.MarginSoftmaxLoss(process_group=dist.group.WORLD, **arguments)
    tm.MarginSoftmaxLoss(D, 10, scheduled(True), process_group=dist.group.WORLD)  # alike, at other addresses
    for options in (dict(dtype=torch.int64), dict(seed="one"), dict(device="nowhere")):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=None if rank else "rank 1 has an error: "):
            tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD, **(options if rank else {}))
    head = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD)
    x, target = made(3, D).float(), torch.tensor([1, 2, 3 if rank else 11])
    with pytest.raises((ValueError, RuntimeError), match="rank 0 .* had an error" if rank else "class number 11"):
        head(x, target)
    with pytest.raises((ValueError, RuntimeError), match="rank 1 .* had an error" if not rank else "same width"):
        head(x[:, : D - rank], torch.tensor([1, 2, 3]))
    with pytest.raises(RuntimeError, match="ask for statistics or none: rank 1 does and rank 0 does not"):
        head(x, torch.tensor([1, 2, 3]), return_stats=bool(rank))
    with pytest.raises(RuntimeError, match="ask for gradients or none"), torch.set_grad_enabled(bool(rank)):
        head(x, torch.tensor([1, 2, 3]))
    ids = torch.tensor([1, 2, 3]) if rank else torch.tensor([3, 2, 1])
    with pytest.raises((ValueError, RuntimeError), match="rank 0 .* had an error" if rank else "sorted and unique"):
        head(x, torch.tensor([1, 2, 3]), class_ids=ids)
    with pytest.raises(RuntimeError, match="ask for class_ids or none: rank 1 does not and rank 0 does"):
        head(x, torch.tensor([1, 2, 3]), class_ids=None if rank else torch.arange(5))
    sampled = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD, sample_rate=0.5).train(bool(rank))
    with pytest.raises(RuntimeError, match="ask for a sample of the classes or none: rank 1 does and rank 0 does not"):
        sampled(x, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="rank 1 has an error: label_smoothing" if not rank else "between 0 and 1"):
        tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD, label_smoothing=2.0 if rank else 0.0)
    with pytest.raises(ValueError, match="has 5 classes, this head 10"):
        head.load_state_dict(tm.MarginSoftmaxLoss(D, 5).state_dict())
    other = tm.MarginSoftmaxLoss(D, 9, process_group=dist.group.WORLD)  # rank 0 has five rows of both
    with pytest.raises(ValueError, match="has 10 classes, this head 9"):
        other.load_state_dict(head.state_dict())
    states = [tm.optim.RowSGD(each.parameters(), lr=0.1, momentum=0.9) for each in (head, other)]
    with pytest.raises(ValueError, match=r"momentum_buffer has shape \(10, 7\), expected \(9, 7\)"):
        states[1].load_state_dict(states[0].state_dict())
    with (
        tm.use_backend("reference" if rank else "torch"),
        pytest.raises((ValueError, RuntimeError), match="neither process groups" if rank else "rank 1 .* had an err"),
    ):
        head(x, torch.tensor([1, 2, 3]))
    with pytest.raises(RuntimeError, match="ask for float64 numbers or none"):
        head(x.double() if rank else x, torch.tensor([1, 2, 3]))
    assert head(x, torch.tensor([1, 2, 3])).isfinite(), "usable after an error"


class Halved(tm.Margin):
    """What a user writes, with a number that repr does not show."""

    def __init__(self, half: float) -> None:
        super().__init__()
        self.half = half

    def target_cosine(self, cos: Tensor) -> Tensor:
        return self.half * cos


def scheduled(really: bool) -> tm.Margin:
    margin = tm.ArcFace(m=0.1)
    return margin.with_schedule(m=lambda step: 0.1 * step) if really else margin


@pytest.mark.parametrize("of_a_group", [True, False])
def test_14_ranks_of_other_groups_all_hear_of_it_within_the_timeout(of_a_group: bool) -> None:
    alone, waiting = on_ranks(2, other_groups, of_a_group, timeout=3.0)
    assert "this rank's group is of the ranks [0, 1], and not all of them made a head with a group" in waiting
    own = "the ranks [0]" if of_a_group else "none"
    assert alone.endswith(
        f"rank 1 waited for [0, 1] to make a head of one group with it; this rank's head is of {own}"
    ), alone


def other_groups(of_a_group: bool) -> str:
    alone = dist.new_group([0])
    group = dist.group.WORLD if dist.get_rank() else alone if of_a_group else None
    try:
        head = tm.MarginSoftmaxLoss(D, 10, process_group=group)
        for _ in range(60):  # steps; a rank that is gone would be noticed at once
            head(torch.randn(2, D), torch.tensor([1, 2]))
            time.sleep(0.1)
    except RuntimeError as error:
        if not dist.get_rank():
            head(torch.randn(2, D), torch.tensor([1, 2]))  # once is enough
        return str(error)
    return ""


def test_14_what_a_rank_waited_for_itself_is_no_news_and_a_lost_store_holds_nobody_up() -> None:
    on_ranks(2, nothing_to_hear)


def nothing_to_hear() -> None:
    """Both gave up on a group and go on with a head of their own."""
    agreement.leave_word([0, 1])
    dist.barrier()
    head = tm.MarginSoftmaxLoss(D, 10)
    head(torch.randn(2, D), torch.tensor([1, 2]))
    assert head.lookout.next < math.inf
    dist.barrier()
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not dist.get_rank():
        os.remove(store.path)
    dist.barrier()
    head.lookout.next = -math.inf
    begin = time.monotonic()
    head(torch.randn(2, D), torch.tensor([1, 2]))
    assert time.monotonic() < begin + 5.0, "the store was waited for"
    assert head.lookout.next == math.inf


def test_14_a_label_that_is_no_class_is_an_error_on_all_ranks_where_nobody_looks() -> None:
    on_ranks(2, labels_of_a_gpu)


def labels_of_a_gpu() -> None:
    """Labels are not looked at on a GPU; what ranks tell each other is waited for there anyway."""
    with unittest.mock.patch.object(checks, "looks_at_values", return_value=False):
        head = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD)
        x = made(2, D).float()
        for wrong in (10, -1, 4000):
            target = torch.tensor([1, wrong if dist.get_rank() else -100])
            with pytest.raises(RuntimeError, match=r"rank 1 .* has a target that is none of the 10 classes"):
                head(x, target)
        assert head(x, torch.tensor([1, -100])).isfinite()


def test_14_a_head_inside_of_ddp_is_refused() -> None:
    on_ranks(2, head_in_ddp)


class Whole(torch.nn.Module):
    """Backbone and head in one."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.backbone, self.head = torch.nn.Linear(D, D), tm.MarginSoftmaxLoss(D, 10, **options)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss = self.head(self.backbone(x), target)
        assert isinstance(loss, Tensor)
        return loss


def head_in_ddp() -> None:
    x, target = torch.randn(2, D), torch.tensor([1, 2])
    sharded = Whole(process_group=dist.group.WORLD)
    updated = Whole()
    updated.head.update_in_backward(tm.optim.RowSGD([updated.head.weight], lr=0.1))
    for model in (sharded, updated):
        with pytest.raises(RuntimeError, match="the head is inside DistributedDataParallel"):
            DistributedDataParallel(model)(x, target)
    DistributedDataParallel(Whole())(x, target).backward()  # a head that is a module like any other may be
    for options, ignored, other in (
        ({}, ["head.weight"], ""),
        ({"bias": True}, ["head.weight"], "head.bias"),
        ({"bias": True}, ["head.weight", "head.bias"], ""),
        ({"class_weight": torch.ones(10)}, ["head.weight"], "head.class_weight"),
        ({"class_weight": torch.ones(10)}, ["head.weight", "head.class_weight"], ""),
    ):
        apart = Whole(process_group=dist.group.WORLD, **options)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(apart, ignored)
        expected = pytest.raises(RuntimeError, match=f"the first one's {other}") if other else contextlib.nullcontext()
        with expected:
            DistributedDataParallel(apart)(x, target).backward()


def test_14_a_head_inside_of_fully_shard_is_refused() -> None:
    on_ranks(2, head_in_fsdp)


def head_in_fsdp() -> None:
    x, target = torch.randn(2, D), torch.tensor([1, 2])
    mesh = init_device_mesh("cpu", (2,))
    inside = fully_shard(Whole(process_group=dist.group.WORLD), mesh=mesh)
    with pytest.raises(RuntimeError, match="fully_shard takes each rank's rows for parts of one tensor"):
        inside(x, target)
    whole = Whole(process_group=dist.group.WORLD)
    fully_shard(whole.backbone, mesh=mesh)
    whole(x, target).backward()
    fully_shard(Whole(), mesh=mesh)(x, target).backward()  # a head that is a module like any other may be


def test_14_a_scaled_loss_on_one_rank_is_refused_on_all() -> None:
    on_ranks(2, scaled_on_one)


def scaled_on_one() -> None:
    """Each rank has its own samples' losses, and a factor of its own."""
    head = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD, reduction="none")
    head.update_in_backward(tm.optim.RowSGD([head.weight], lr=0.1))
    before = head.weight.detach().clone()
    loss = head(torch.randn(2, D, requires_grad=True), torch.tensor([1, 7]))
    with pytest.raises(RuntimeError, match="as by a GradScaler"):
        (loss * (1.0 if dist.get_rank() else 65536.0)).sum().backward()
    assert torch.equal(head.weight, before)


def test_14_a_tensor_on_another_device_is_an_error_on_all_ranks() -> None:
    """What ranks tell each other goes over the device of the weights: NCCL knows no other."""
    on_ranks(2, elsewhere)


def elsewhere() -> None:
    head = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD)
    x, target = torch.randn(2, D), torch.tensor([1, 2])
    rank = dist.get_rank()
    with pytest.raises((ValueError, RuntimeError), match="use one device" if rank else "rank 1 .* had an error"):
        head(x.to("meta") if rank else x, target.to("meta") if rank else target)
