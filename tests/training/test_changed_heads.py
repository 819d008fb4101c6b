"""What a user changes on a head between steps: rows of another number are refused, a sample rate is followed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import cpu_only, made
from ranks import on_ranks
from torch import Tensor, nn

import tritonmargin as tm

pytestmark = cpu_only

D, C = 5, 40
REFUSED = r"weight has shape \(41, 5\), and this head of 40 classes needs \(40, 5\)"

MAKE: dict[str, Callable[[Any], tm.optim.RowSGD | tm.optim.RowAdamW]] = {
    "RowSGD": lambda parameters: tm.optim.RowSGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "RowAdamW": lambda parameters: tm.optim.RowAdamW(parameters, lr=0.1),
}
every_optimizer = pytest.mark.parametrize("name", MAKE)


def replaced(**options: Any) -> tm.MarginSoftmaxLoss:
    """A head whose user has appended a row."""
    head = tm.MarginSoftmaxLoss(D, C, **options)
    head.weight = nn.Parameter(torch.cat([head.weight.detach(), torch.zeros(1, D)]))
    return head


def test_a_weight_of_another_size_is_refused_before_any_work(tmp_path: Path) -> None:
    x, y = made(3, D).float(), torch.tensor([0, 1, C])
    for head in (replaced(), replaced(sample_rate=0.5), replaced().eval()):
        for use in (
            lambda head=head: head(x, y),
            head.state_dict,
            nn.Sequential(head).state_dict,
            lambda head=head: tm.checkpoint.save(tmp_path, {"head": head.state_dict()}, step=1),
        ):
            with pytest.raises(ValueError, match=REFUSED):
                use()
        with pytest.raises(tm.checkpoint.CheckpointError, match=REFUSED):
            tm.checkpoint.export_centers(head, tmp_path / "centers.safetensors")
    assert list(tmp_path.iterdir()) == []
    head = replaced(sample_rate=0.5)
    with pytest.raises(ValueError, match=REFUSED):
        head(x, y)
    assert head.sampler is not None
    assert head.sampler.tolist() == [0, 0]


def test_other_sizes_are_refused_too() -> None:
    x, y = made(3, D).float(), torch.arange(3)
    head = tm.MarginSoftmaxLoss(D, C, bias=True)
    head.bias = nn.Parameter(torch.zeros(C + 1))
    with pytest.raises(ValueError, match=r"bias has shape \(41,\), and this head of 40 classes needs \(40,\)"):
        head(x, y)
    fewer = tm.MarginSoftmaxLoss(D, C)
    fewer.weight = nn.Parameter(torch.zeros(C - 1, D))
    with pytest.raises(ValueError, match=r"weight has shape \(39, 5\)"):
        fewer(x, y)
    wider = tm.MarginSoftmaxLoss(D, C)
    wider.weight = nn.Parameter(torch.zeros(C, D + 1))
    with pytest.raises(ValueError, match=r"weight has shape \(40, 6\)"):
        wider(made(3, D + 1).float(), y)
    same = tm.MarginSoftmaxLoss(D, C)
    same.weight = nn.Parameter(same.weight.detach().double())
    assert same(x, y).isfinite()


def one_rank_replaces() -> str:
    head = tm.MarginSoftmaxLoss(D, C, process_group=dist.group.WORLD)
    if dist.get_rank():
        head.weight.data = head.weight.detach()[1:].clone()
    try:
        head(made(3, D).float(), torch.arange(3))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def test_no_rank_waits_for_one_whose_rows_are_refused() -> None:
    first, second = on_ranks(2, one_rank_replaces)
    assert "rank 1 of the process group had an error before the loss" in first
    assert "weight has shape (19, 5), and this head of 40 classes needs (20, 5)" in second


RATES = (1.0, 0.5, 1.0, 0.2, 0.5, 1.0)


def steps(name: str, in_backward: bool, group: Any = None) -> tuple[Tensor, list[float]]:
    """A head made without a sample, whose rate moves; its rows, and the losses."""
    torch.manual_seed(0)
    head = tm.MarginSoftmaxLoss(D, C, sparse_grad=True, process_group=group, dtype=torch.float64)
    with torch.no_grad():
        first = 0 if group is None else head.shard.start
        head.weight.copy_(made(C, D, seed=9)[first : first + len(head.weight)])
    optimizer = MAKE[name](head.parameters())
    if in_backward:
        head.update_in_backward(optimizer)
    losses = []
    for number, rate in enumerate(RATES):
        head.sample_rate = rate
        optimizer.zero_grad()
        loss = head(made(4, D, seed=number), torch.arange(4) * 7 + number)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return head.weight.detach(), losses


def check_steps(name: str, group: Any = None) -> list[float]:
    rows, losses = steps(name, False, group)
    others, same = steps(name, True, group)
    torch.testing.assert_close(others, rows, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(same, losses)
    return losses


@every_optimizer
def test_a_rate_that_moves_with_a_row_optimizer(name: str) -> None:
    losses = check_steps(name)
    # A step that visits all classes is one of a head that never samples.
    never = tm.MarginSoftmaxLoss(D, C, dtype=torch.float64)
    with torch.no_grad():
        never.weight.copy_(made(C, D, seed=9))
    assert never(made(4, D, seed=0), torch.arange(4) * 7).item() == pytest.approx(losses[0])


def sharded_steps(name: str) -> list[float]:
    return check_steps(name, dist.group.WORLD)


@every_optimizer
def test_a_rate_that_moves_with_sharded_classes(name: str) -> None:
    first, second = on_ranks(2, sharded_steps, name)
    assert first == second  # the loss of all ranks' samples
