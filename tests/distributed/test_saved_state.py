"""State of a sharded head that is saved by other means than tm.checkpoint: each rank gets its own rows back, or an
error that says what to call. torch's optimizers of a sharded head, whose state dicts are of all classes too."""

from __future__ import annotations

import warnings
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
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import tritonmargin as tm

pytestmark = cpu_only

C = 10  # on two ranks five each: nothing but the numbers tells one's rows from the other's
SECONDS = 20.0

Make = Callable[[Any], torch.optim.Optimizer]
MAKE: dict[str, Make] = {
    "RowSGD": lambda parameters: tm.optim.RowSGD(parameters, lr=0.1, momentum=0.9),
    "RowAdamW": lambda parameters: tm.optim.RowAdamW(parameters, lr=0.1),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
}
TORCHS = ("SGD", "AdamW", "Adagrad")
every_optimizer = pytest.mark.parametrize("name", MAKE)


def head_and(name: str, group: Any = None) -> tuple[tm.MarginSoftmaxLoss, torch.optim.Optimizer]:
    group = dist.group.WORLD if group is None else group
    head = tm.MarginSoftmaxLoss(D, C, process_group=group, bias=True, sample_rate=0.5, dtype=torch.float64)
    head.sample_rate = 1.0
    return head, MAKE[name](head.parameters())


def step(head: tm.MarginSoftmaxLoss, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """The same samples on any number of ranks: the first one has them."""
    x, target = made(6, D, seed=seed), torch.arange(6) + seed % 4
    own = slice(0, 0 if dist.get_rank() else 6)
    optimizer.zero_grad()
    head(x[own], target[own]).backward()
    optimizer.step()


def trained(name: str) -> tuple[tm.MarginSoftmaxLoss, torch.optim.Optimizer]:
    head, optimizer = head_and(name)
    for seed in range(3):
        step(head, optimizer, seed)
    return head, optimizer


def all_rows(head: tm.MarginSoftmaxLoss) -> Tensor:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, head.weight.detach())
    return torch.cat(parts)


# -- torch.save on one rank ------------------------------------------------------------------------------------------


def saved_by_one(folder: str, name: str) -> None:
    head, optimizer = trained(name)
    if not dist.get_rank():
        with warnings.catch_warnings(record=True) as caught:
            torch.save({"head": head.state_dict(), "optimizer": optimizer.state_dict()}, f"{folder}/one.pt")
        (word,) = [str(each.message) for each in caught if "tritonmargin" in str(each.message)]
        assert "this rank has only rows 0 to 5 of 10" in word
    dist.barrier()
    state = torch.load(f"{folder}/one.pt")
    other, fresh = head_and(name)
    step(other, stepped := MAKE[name](other.parameters()), 0)
    before = {key: value.to_local().clone() for key, value in other.state_dict().items()}
    if not dist.get_rank():
        other.load_state_dict(state["head"])
        assert torch.equal(other.weight, head.weight)
        return
    with pytest.raises(ValueError, match=r"weight is the rows 0 to 5 of 10 here.*tm.checkpoint.*full_state_dict=True"):
        other.load_state_dict(state["head"])
    assert all(torch.equal(value.to_local(), before[key]) for key, value in other.state_dict().items())
    with pytest.raises(ValueError, match=r"is the rows 0 to 5 of 10 here.*tm.checkpoint.*get_optimizer_state_dict"):
        stepped.load_state_dict(state["optimizer"])
    with pytest.raises(ValueError, match=r"is the rows 0 to 5 of 10 here.*tm.checkpoint.*get_optimizer_state_dict"):
        resume(fresh, state["optimizer"])
    assert torch.equal(other.weight, before["weight"])


def resume(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """torch's own have no say before their first step."""
    optimizer.load_state_dict(state)
    optimizer.step()


@every_optimizer
def test_what_one_rank_saved_is_refused_by_the_others(tmp_path: Path, name: str) -> None:
    on_ranks(2, saved_by_one, str(tmp_path), name, timeout=SECONDS)
    on_ranks(1, read_by_others, str(tmp_path), timeout=SECONDS)
    on_ranks(2, read_by_whole_heads, str(tmp_path), timeout=SECONDS)


def read_by_others(folder: str) -> None:
    """By one rank, sharded and not, and without any group."""
    state = torch.load(f"{folder}/one.pt")["head"]
    heads = [head_and("SGD")[0], tm.MarginSoftmaxLoss(D, C, bias=True, dtype=torch.float64)]
    dist.destroy_process_group()
    for head in heads:
        with pytest.raises(ValueError, match="weight is the rows 0 to 5 of 10 here"):
            head.load_state_dict(state)


def read_by_whole_heads(folder: str) -> None:
    """No rank waits for another one that refuses."""
    head = tm.MarginSoftmaxLoss(D, C, bias=True, dtype=torch.float64)
    with pytest.raises(ValueError, match="weight is the rows 0 to 5 of 10 here"):
        head.load_state_dict(torch.load(f"{folder}/one.pt")["head"])


def saved_by_each(folder: str, name: str) -> None:
    head, optimizer = trained(name)
    path = f"{folder}/{dist.get_rank()}.pt"
    torch.save({"head": head.state_dict(), "optimizer": optimizer.state_dict()}, path)
    state = torch.load(path)
    other, resumed = head_and(name)
    other.load_state_dict(state["head"])
    resumed.load_state_dict(state["optimizer"])
    for each in ((head, optimizer), (other, resumed)):
        step(*each, 7)
    assert torch.equal(other.weight, head.weight)
    gathered = tm.MarginSoftmaxLoss(D, C, bias=True, dtype=torch.float64)
    gathered.load_state_dict(head.state_dict())  # in one process group it is put together
    assert torch.equal(gathered.weight, all_rows(head))


@every_optimizer
def test_what_each_rank_saved_is_its_own(tmp_path: Path, name: str) -> None:
    on_ranks(2, saved_by_each, str(tmp_path), name, timeout=SECONDS)


def saved_whole(folder: str, name: str) -> None:
    """What the error says to do."""
    head, optimizer = trained(name)
    options = StateDictOptions(full_state_dict=True)
    full = {
        "head": get_model_state_dict(head, options=options),
        "optimizer": get_optimizer_state_dict(head, optimizer, options=options),
    }
    if not dist.get_rank():
        torch.save(full, f"{folder}/full.pt")
    dist.barrier()
    state = torch.load(f"{folder}/full.pt")
    assert state["head"]["weight"].shape == (C, D)
    assert not hasattr(state["head"]["weight"], "full_tensor")
    other, resumed = head_and(name)
    other.load_state_dict(state["head"])
    if name in TORCHS:
        set_optimizer_state_dict(other, resumed, state["optimizer"], options=options)
    else:
        resumed.load_state_dict(state["optimizer"])
    for each in ((head, optimizer), (other, resumed)):
        step(*each, 7)
    assert torch.equal(other.weight, head.weight)


@every_optimizer
def test_what_the_error_says_to_call_works(tmp_path: Path, name: str) -> None:
    on_ranks(2, saved_whole, str(tmp_path), name, timeout=SECONDS)


# -- torch's optimizers through tm.checkpoint ------------------------------------------------------------------------


def resumes(folder: str, name: str, number: int) -> list[list[float]]:
    head, optimizer = head_and(name)
    if number:
        step(head, optimizer, 0)  # torch's optimizers have nothing to load into before
    else:
        head.load_state_dict({"weight": made(C, D), "bias": torch.zeros(C)}, strict=False)
    state = {"head": head.state_dict(), "optimizer": optimizer.state_dict()}
    if number:
        tm.checkpoint.load(folder, state)
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
    step(head, optimizer, number)
    state = {"head": head.state_dict(), "optimizer": optimizer.state_dict()}
    tm.checkpoint.save(folder, state, number)
    rows: list[list[float]] = all_rows(head).tolist()
    return rows


@pytest.mark.parametrize("name", TORCHS)
def test_a_torch_optimizer_of_a_sharded_head_resumes_on_other_ranks(tmp_path: Path, name: str) -> None:
    """Two ranks with equal shards, three, one: as one process."""
    for number, world in enumerate((2, 3, 1)):
        sharded = on_ranks(world, resumes, f"{tmp_path}/sharded", name, number, timeout=SECONDS)[0]
        alone = on_ranks(1, resumes, f"{tmp_path}/alone", name, number, timeout=SECONDS)[0]
        torch.testing.assert_close(torch.tensor(sharded), torch.tensor(alone), rtol=1e-6, atol=1e-7)


def redundant() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # with warnings of its own

    head, _ = head_and("SGD")
    optimizer = ZeroRedundancyOptimizer(head.parameters(), torch.optim.SGD, lr=0.1)
    head(made(3, D), torch.arange(3)).backward()
    before = head.weight.detach().clone()
    with pytest.raises(RuntimeError, match="ZeroRedundancyOptimizer gives all ranks the first one's rows"):
        optimizer.step()
    assert torch.equal(head.weight, before)


def test_an_optimizer_that_copies_the_first_ranks_rows_is_refused() -> None:
    on_ranks(2, redundant, timeout=SECONDS)
