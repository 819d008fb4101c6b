"""Users' steps around a head that it cannot take part in: skipped, refused, or said what to call."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cpu_only, made
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import tritonmargin as tm

pytestmark = cpu_only

D, C = 5, 20


def numbers(parameters: Any) -> list[torch.Tensor]:
    return [each.detach().clone() for each in parameters]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_scaler_goes_on_after_a_loss_that_is_not_finite(bad: float, reduction: str, sparse: bool) -> None:
    torch.manual_seed(0)
    backbone = nn.Linear(D, D)
    head = tm.MarginSoftmaxLoss(D, C, on_nonfinite="skip", reduction=reduction, sparse_grad=sparse)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (backbone, head)]
    scaler = torch.amp.GradScaler("cpu")
    moved = []
    for number in range(3):
        x = made(4, D, seed=number).float()
        if number == 1:
            x[0, 0] = bad
        before, scale = numbers([*backbone.parameters(), *head.parameters()]), scaler.get_scale()
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(head(backbone(x), torch.arange(4)).mean()).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        after = numbers([*backbone.parameters(), *head.parameters()])
        moved.append([not torch.equal(one, other) for one, other in zip(before, after, strict=True)])
        assert scaler.get_scale() == (scale / 2 if number == 1 else scale)
    assert moved == [[True] * 3, [False] * 3, [True] * 3]


@pytest.mark.parametrize("factor", [1.0, 0.5, 3000.0])
def test_without_a_scaler_a_skipped_loss_leaves_gradients_as_they_are(factor: float) -> None:
    head = tm.MarginSoftmaxLoss(D, C, on_nonfinite="skip")
    x = made(4, D).float().fill_(torch.nan).requires_grad_()
    (head(x, torch.arange(4)) * factor).backward()
    assert head.weight.grad is None
    assert x.grad is None


MAKE: dict[str, Callable[[Any], tm.optim.RowSGD | tm.optim.RowAdamW]] = {
    "RowSGD": lambda parameters: tm.optim.RowSGD(parameters, lr=0.1, momentum=0.9),
    "RowAdamW": lambda parameters: tm.optim.RowAdamW(parameters, lr=0.1),
}
every_optimizer = pytest.mark.parametrize("name", MAKE)


@every_optimizer
def test_a_tied_weight_is_refused_before_a_row_moves(name: str) -> None:
    head = tm.MarginSoftmaxLoss(D, C)
    embedding = nn.Embedding(C, D)
    embedding.weight = head.weight
    network = nn.Sequential(embedding, nn.Linear(D, D), nn.Tanh())
    optimizer = MAKE[name](head.parameters())
    head.update_in_backward(optimizer)
    before = numbers([head.weight])[0]
    with torch.no_grad():  # says nothing: there is no gradient
        head(network(torch.arange(4)), torch.arange(4))
    for _ in range(2):
        with pytest.raises(ValueError, match="made from the head's weight \\(tied weights\\)"):
            head(network(torch.arange(4)), torch.arange(4))
    assert torch.equal(head.weight, before)
    embedding.weight = nn.Parameter(before.clone())
    head(network(torch.arange(4)), torch.arange(4)).backward()
    optimizer.step()
    assert not torch.equal(head.weight, before)


@every_optimizer
def test_a_head_that_is_dropped_between_backward_and_step_is_freed(name: str) -> None:
    head = tm.MarginSoftmaxLoss(D, C)
    optimizer = MAKE[name](head.parameters())
    head.update_in_backward(optimizer)
    head(made(4, D).float(), torch.arange(4)).backward()
    weight, kept = weakref.ref(head.weight), weakref.ref(optimizer)
    del head, optimizer
    gc.collect()
    assert weight() is None
    assert kept() is None


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda parameters: torch.optim.SGD(parameters, 0.1, 0.9)])
def test_a_checkpoint_into_a_fresh_optimizer_says_what_makes_its_state(make: Any, tmp_path: Path) -> None:
    head = tm.MarginSoftmaxLoss(D, C)
    optimizer = make(head.parameters())
    head(made(4, D).float(), torch.arange(4)).backward()
    optimizer.step()
    tm.checkpoint.save(tmp_path, {"head": head.state_dict(), "optimizer": optimizer.state_dict()}, step=1)
    other = tm.MarginSoftmaxLoss(D, C)
    fresh = make(other.parameters())
    with pytest.raises(
        tm.checkpoint.CheckpointError, match=r"call torch\S+get_optimizer_state_dict\(model, optimizer\)"
    ):
        tm.checkpoint.load(tmp_path, {"head": other.state_dict(), "optimizer": fresh.state_dict()})
    get_optimizer_state_dict(other, fresh)
    state = {"head": other.state_dict(), "optimizer": fresh.state_dict()}
    assert tm.checkpoint.load(tmp_path, state) == 1
    fresh.load_state_dict(state["optimizer"])
    for name, value in optimizer.state[head.weight].items():
        assert torch.equal(fresh.state[other.weight][name], value)
