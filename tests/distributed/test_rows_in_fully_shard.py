"""Row optimizers on a head inside of `fully_shard`, which splits its rows in its own way: the steps of one process."""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable
from pathlib import Path
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
from torch.distributed.tensor import Shard

import tritonmargin as tm
from tritonmargin.optim import row_optimizer

pytestmark = cpu_only

C = 11  # six rows and five
SECONDS = 20.0

MAKE: dict[str, Callable[[Any], tm.optim.RowSGD | tm.optim.RowAdamW]] = {
    "sgd": lambda parameters: tm.optim.RowSGD(parameters, lr=0.1),
    "momentum": lambda parameters: tm.optim.RowSGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda parameters: tm.optim.RowAdamW(parameters, lr=0.1),
}
ROUNDED: dict[str, Callable[[Any], tm.optim.RowSGD | tm.optim.RowAdamW]] = {
    "momentum": lambda parameters: tm.optim.RowSGD(
        parameters, lr=0.1, momentum=0.9, stochastic_rounding=True, state_dtype=torch.bfloat16
    ),
    "adamw": lambda parameters: tm.optim.RowAdamW(parameters, lr=0.1, stochastic_rounding=True),
}


def fresh(dtype: torch.dtype = torch.float64, c: int = C) -> tm.MarginSoftmaxLoss:
    torch.manual_seed(0)
    return tm.MarginSoftmaxLoss(D, c, bias=True, dtype=dtype)


def in_fully_shard(dtype: torch.dtype = torch.float64, c: int = C) -> tm.MarginSoftmaxLoss:
    head = fresh(dtype, c)
    fully_shard(head, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return head


def step(head: tm.MarginSoftmaxLoss, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    head(made(3, D, seed=seed), torch.arange(3) + seed % 4).backward()
    optimizer.step()


def same_steps(chunk_bytes: int) -> None:
    for name, make in MAKE.items():
        with unittest.mock.patch.object(row_optimizer, "CHUNK_BYTES", chunk_bytes):
            heads = (in_fully_shard(), fresh())
            optimizers = [make(each.parameters()) for each in heads]
            for seed in range(4):
                for head, optimizer in zip(heads, optimizers, strict=True):
                    step(head, optimizer, seed)
        for ours, alone in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
            torch.testing.assert_close(ours.full_tensor(), alone, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("chunk_bytes", [row_optimizer.CHUNK_BYTES, 64])
def test_steps_are_those_of_one_process_with_all_rows_at_once_and_few(chunk_bytes: int) -> None:
    on_ranks(2, same_steps, chunk_bytes, timeout=SECONDS)


def rounded() -> None:
    for name, make in ROUNDED.items():
        found = []
        for _ in range(2):
            head = in_fully_shard(torch.bfloat16, 2 * 400)
            with torch.no_grad():
                head.weight.to_local().fill_(1.0)
            optimizer = make([head.weight])
            head.weight.grad = torch.full_like(head.weight, 2e-2)  # 2e-3 a step of sgd: a quarter of a unit
            optimizer.step()
            rows = head.weight.full_tensor()
            assert len(rows.unique()) == 2, (name, "to nearest, or not at all")
            assert not torch.equal(rows[:400], rows[400:]), (name, "both ranks round alike")
            found.append(rows)
        assert torch.equal(*found), (name, "not by its seed")


def test_stochastic_rounding_is_of_each_ranks_own() -> None:
    on_ranks(2, rounded, timeout=SECONDS)


def resumes(folder: str, name: str, number: int) -> list[Tensor]:
    head = in_fully_shard()
    optimizer = MAKE[name](head.parameters())
    state = {"head": head.state_dict(), "optimizer": optimizer.state_dict()}
    if number:
        tm.checkpoint.load(folder, state)
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
    step(head, optimizer, number)
    tm.checkpoint.save(folder, {"head": head.state_dict(), "optimizer": optimizer.state_dict()}, number)
    return [each.detach().full_tensor().tolist() for each in head.parameters()]


@pytest.mark.parametrize("name", MAKE)
def test_state_resumes_on_other_ranks(tmp_path: Path, name: str) -> None:
    for number, world in enumerate((2, 3, 1)):
        found = on_ranks(world, resumes, str(tmp_path), name, number, timeout=SECONDS)[0]
    alone = fresh()
    optimizer = MAKE[name](alone.parameters())
    for number in range(3):
        step(alone, optimizer, number)
    for ours, right in zip(found, alone.parameters(), strict=True):
        torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), right.detach(), rtol=1e-12, atol=1e-14)


def from_other_state(folder: str) -> None:
    """A whole tensor from one process, and the part that another rank saved."""
    alone, head = fresh(), in_fully_shard()
    optimizers = [MAKE["adamw"](each.parameters()) for each in (alone, head)]
    step(alone, optimizers[0], 0)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for name in ("exp_avg", "row_steps"):
        ours, whole = (each.state[of.weight][name] for each, of in zip(optimizers, (alone, head), strict=True))
        assert torch.equal(whole.full_tensor(), ours)
    if not dist.get_rank():
        torch.save(optimizers[1].state_dict(), f"{folder}/one.pt")
    dist.barrier()
    state = torch.load(f"{folder}/one.pt")
    if dist.get_rank():
        with pytest.raises(ValueError, match=r"is the rows 0 to 6 of 11 here, .*tm.checkpoint"):
            optimizers[1].load_state_dict(state)
    else:
        optimizers[1].load_state_dict(state)


def test_state_of_one_process_is_split_and_that_of_another_rank_refused(tmp_path: Path) -> None:
    on_ranks(2, from_other_state, str(tmp_path), timeout=SECONDS)


def by_columns() -> None:
    head = tm.MarginSoftmaxLoss(8, 10)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(head, mesh=mesh, shard_placement_fn=lambda parameter: Shard(1))
    optimizer = tm.optim.RowAdamW(head.parameters())
    head(made(3, 8).float(), torch.arange(3)).backward()
    with pytest.raises(TypeError, match=r"whole rows on a rank, got a DTensor split as \(Shard\(dim=1\),\)"):
        optimizer.step()


def test_rows_that_are_split_by_columns_are_refused() -> None:
    on_ranks(2, by_columns, timeout=SECONDS)
