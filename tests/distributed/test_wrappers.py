"""Heads inside of DistributedDataParallel and `fully_shard` with options that do not go together with them, and on
several ranks with neither: refused by name, agreed on by all ranks, or warned about."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import cpu_only, made
from ranks import on_ranks
from sharded import D
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tritonmargin as tm
from tritonmargin.distributed import around

pytestmark = cpu_only

C = 10
SECONDS = 10.0  # of the group: nobody should wait so long


class Whole(nn.Module):
    """Backbone and head in one."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(D, D), tm.MarginSoftmaxLoss(D, C, **options)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss = self.head(self.backbone(x), target)
        assert isinstance(loss, Tensor)
        return loss


def given(seed: int = 0) -> tuple[Tensor, Tensor]:
    return made(3, D, seed=seed).float(), torch.tensor([1, 2, 9])


# -- nan on one rank -----------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "static_graph": {"static_graph": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
}


def nan_on_one(way: str, compiled: bool, on_nonfinite: str, reduction: str) -> list[float]:
    model: Any = Whole(margin=tm.NormFace(s=8.0), on_nonfinite=on_nonfinite, reduction=reduction)
    model = DistributedDataParallel(model, **WAYS[way])
    call = torch.compile(model, backend="eager") if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        x, target = given(seed=10 * step + dist.get_rank())
        if step % 2 and dist.get_rank():
            x[1, 3] = torch.nan
        before = [each.detach().clone() for each in model.parameters()]
        optimizer.zero_grad()
        if step % 2 and on_nonfinite == "raise":
            words = "the loss is nan" if dist.get_rank() else "the loss of another rank is nan or inf"
            with pytest.raises(FloatingPointError, match=words):
                call(x, target)
            continue
        call(x, target).sum().backward()
        optimizer.step()
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert moved == (step % 2 == 0), step
        assert all(each.isfinite().all() for each in model.parameters())
    return [float(each.detach().double().sum()) for each in model.parameters()]


def skip_and_raise(ways: tuple[str, ...], compiled: bool) -> list[list[float]]:
    kinds = (("skip", "mean"), ("raise", "mean"), ("skip", "none"))
    return [nan_on_one(way, compiled, *kind) for way in ways for kind in kinds]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ranks_inside_ddp_skip_or_raise_together(compiled: bool) -> None:
    ways = ("default",) if compiled else tuple(WAYS)
    first, second = on_ranks(2, skip_and_raise, ways, compiled, timeout=SECONDS)
    assert first == second, "the replicas differ"


def with_uneven_inputs() -> None:
    model = DistributedDataParallel(Whole(on_nonfinite="skip"))
    with model.join(), pytest.raises(RuntimeError, match=r"inside DistributedDataParallel.join\(\), .*on_nonfinite"):
        model(*given())
    model = DistributedDataParallel(Whole(on_nonfinite="skip"), broadcast_buffers=False)
    if dist.get_rank():
        with torch.no_grad():
            assert model(*given()).isfinite()  # a rank may evaluate alone: nothing goes back, so nobody is asked


def test_on_nonfinite_inside_ddp_refuses_join_and_asks_nobody_without_gradients() -> None:
    on_ranks(2, with_uneven_inputs, timeout=SECONDS)


# -- what is refused -----------------------------------------------------------------------------------------------


def refused() -> None:
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(RuntimeError, match=r"inside DistributedDataParallel, .*: sparse_grad=True does not go with it"):
        DistributedDataParallel(Whole(sparse_grad=True))(*given())
    sparse = fully_shard(Whole(sparse_grad=True), mesh=mesh)
    with pytest.raises(RuntimeError, match=r"inside fully_shard, .*: sparse_grad=True does not go with it"):
        sparse(*given())
    with torch.no_grad():
        assert sparse(*given()).isfinite()  # nothing has a gradient
    for way in ("skip", "raise"):
        with pytest.raises(RuntimeError, match=f"inside fully_shard, .*: on_nonfinite='{way}' does not go with it"):
            fully_shard(Whole(on_nonfinite=way), mesh=mesh)(*given())
    updated = Whole()
    updated.head.update_in_backward(tm.optim.RowSGD([updated.head.weight], lr=0.1))
    with pytest.raises(RuntimeError, match=r"inside fully_shard, .*: update_in_backward does not go with it"):
        fully_shard(updated, mesh=mesh)(*given())
    late = fully_shard(Whole(), mesh=mesh)
    optimizer = tm.optim.RowSGD([late.head.weight], lr=0.1)
    with pytest.raises(TypeError, match="update_in_backward inside fully_shard"):
        late.head.update_in_backward(optimizer)
    late(*given()).backward()


def test_options_that_wrappers_cannot_serve_are_refused_by_name_in_the_first_forward() -> None:
    on_ranks(2, refused, timeout=SECONDS)


def as_arguments() -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = fully_shard(Whole(bias=True), mesh=mesh)
    x, target = given()
    w, b = model.head.weight, model.head.bias
    for call in (
        lambda: tm.margin_cross_entropy(x, w, target, tm.ArcFace()),
        lambda: tm.margin_cross_entropy(x, w.full_tensor(), target, tm.ArcFace(), bias=b),
        lambda: tm.linear_cross_entropy(x, w, target),
    ):
        with pytest.raises(TypeError, match=r"is a DTensor: .*process_group=.*full_tensor\(\)"):
            call()
    assert tm.margin_cross_entropy(x, w.full_tensor(), target, tm.ArcFace()).isfinite()


def test_a_dtensor_as_an_argument_of_a_loss_is_refused_and_told_what_to_do() -> None:
    on_ranks(2, as_arguments, timeout=SECONDS)


# -- a head that nobody keeps alike ----------------------------------------------------------------------------------


def warned(model: nn.Module, **step: Any) -> list[str]:
    """What the model's step warns of, in a process that has not warned yet."""
    around.WARNED.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with torch.set_grad_enabled(step.get("gradients", True)):
                loss = model(*given())
            if loss.requires_grad:
                loss.backward()
    return [str(each.message) for each in caught if "tritonmargin" in str(each.message)]


def alone_or_not() -> None:
    mesh = init_device_mesh("cpu", (2,))
    (words,) = warned(Whole())
    assert words.startswith("tritonmargin: this head is inside neither DistributedDataParallel nor fully_shard")
    assert "\n" not in words
    updated = Whole()
    updated.head.update_in_backward(tm.optim.RowSGD([updated.head.weight], lr=0.0))
    with warnings.catch_warnings(record=True) as caught:
        around.WARNED.clear()
        warnings.simplefilter("always")
        updated(*given())
    assert len(caught) == 1
    apart = Whole()
    assert len(warned(fully_shard(apart, mesh=mesh, ignored_params={apart.head.weight}))) == 1
    beside = Whole()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(beside, ["head.weight"])
    assert len(warned(DistributedDataParallel(beside))) == 1
    hooked, frozen = Whole(), Whole()
    hooked.head.weight.register_post_accumulate_grad_hook(lambda weight: dist.all_reduce(weight.grad))
    frozen.head.weight.requires_grad_(False)
    fine = (DistributedDataParallel(Whole()), fully_shard(Whole(), mesh=mesh), hooked, frozen)
    assert [warned(model) for model in fine] == [[]] * len(fine)
    assert warned(Whole(process_group=dist.group.WORLD)) == []
    assert warned(Whole(), gradients=False) == []


def test_a_head_that_drifts_apart_is_warned_of_once_and_others_are_not() -> None:
    on_ranks(2, alone_or_not, timeout=SECONDS)
    on_ranks(1, one_rank, timeout=SECONDS)


def one_rank() -> None:
    assert warned(Whole()) == []
