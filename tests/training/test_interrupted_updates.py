"""An update that stops in the middle is noticed by the next one; one that never began has changed nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import cpu_only, labels, made

import tritonmargin as tm
from tritonmargin.optim import RowAdamW, RowSGD

N, D, CLASSES = 6, 8, 200
MAKE: dict[str, Callable[..., Any]] = {
    "sgd": lambda parameters: RowSGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: RowAdamW(parameters, lr=0.1),
}
every_optimizer = pytest.mark.parametrize("name", MAKE)
pytestmark = cpu_only


def head_and_optimizer(name: str) -> tuple[tm.MarginSoftmaxLoss, Any]:
    torch.manual_seed(0)
    head = tm.MarginSoftmaxLoss(D, CLASSES, tm.ArcFace(), chunk_bytes=1)
    optimizer = MAKE[name](head.parameters())
    head.update_in_backward(optimizer)
    return head, optimizer


def step(head: tm.MarginSoftmaxLoss, optimizer: Any, seed: int) -> None:
    head(made(N, D, seed=seed).float(), labels(CLASSES, N, seed)).backward()
    optimizer.step()


def copied(head: tm.MarginSoftmaxLoss, optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    state = {key: each.clone() if torch.is_tensor(each) else each for key, each in optimizer.state[head.weight].items()}
    return {"weight": head.weight.detach().clone()}, state


def stopping(monkeypatch: pytest.MonkeyPatch, after: int, error: type[BaseException]) -> None:
    """Updates of rows stop before the one of this number."""
    from tritonmargin.optim import update_rules

    real, calls = update_rules.update_rows, [0]

    def stop(*args: Any) -> None:
        calls[0] += 1
        if calls[0] > after:
            raise error("stopped")
        real(*args)

    for module in ("tritonmargin.backends.torch_ops", "tritonmargin.optim.row_optimizer"):
        monkeypatch.setattr(f"{module}.update_rows", stop)


@every_optimizer
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_step_after_one_that_stopped_in_the_middle_is_refused(
    name: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    head, optimizer = head_and_optimizer(name)
    step(head, optimizer, 1)
    kept = head.state_dict(), optimizer.state_dict()
    saved = {"head": {k: v.clone() for k, v in kept[0].items()}, "optimizer": torch.utils._pytree.tree_map(
        lambda each: each.clone() if torch.is_tensor(each) else each, kept[1])}  # fmt: skip
    with monkeypatch.context() as patch:
        stopping(patch, 1, error)
        with pytest.raises(error):
            step(head, optimizer, 2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stopped in the middle"):
            step(head, optimizer, 3)
        optimizer.zero_grad()
    # From the checkpoint on it is as if nothing had happened.
    head.load_state_dict(saved["head"])
    optimizer.load_state_dict(saved["optimizer"])
    other, others = head_and_optimizer(name)
    step(other, others, 1)
    for each in ((head, optimizer), (other, others)):
        step(*each, 2)
    assert torch.equal(head.weight, other.weight)


@every_optimizer
def test_a_step_that_stops_before_the_first_row_has_changed_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head, optimizer = head_and_optimizer(name)
    step(head, optimizer, 1)
    weight, state = copied(head, optimizer)
    with monkeypatch.context() as patch:
        stopping(patch, 0, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            step(head, optimizer, 2)
    after = copied(head, optimizer)
    assert torch.equal(after[0]["weight"], weight["weight"])
    assert all(torch.equal(after[1][key], value) for key, value in state.items())
    optimizer.zero_grad()
    step(head, optimizer, 2)
    assert int(optimizer.state[head.weight]["step"]) == 2


@every_optimizer
def test_a_bad_number_in_a_step_advances_no_counter(name: str) -> None:
    head, optimizer = head_and_optimizer(name)
    head.update_in_backward(None)
    step(head, optimizer, 1)
    optimizer.param_groups[0]["betas" if name == "adamw" else "momentum"] = "wrong"
    with pytest.raises((TypeError, ValueError)):
        step(head, optimizer, 2)
    assert int(optimizer.state[head.weight]["step"]) == 1


@pytest.mark.parametrize(("saved", "own"), [(0.0, 0.9), (0.9, 0.0)])
def test_groups_come_from_the_state_dict_as_in_torch(saved: float, own: float) -> None:
    """Momentum that one of them does not have, beside torch.optim.SGD."""
    found = []
    for make in (RowSGD, torch.optim.SGD):
        weights = [torch.nn.Parameter(made(5, 3, seed=1)) for _ in range(2)]
        one, other = (make([w], lr=0.1, momentum=m) for w, m in zip(weights, (saved, own), strict=True))
        for w, optimizer in zip(weights, (one, other), strict=True):
            w.grad = made(5, 3, seed=2)
            optimizer.step()
        other.load_state_dict(one.state_dict())
        assert other.param_groups[0]["momentum"] == saved
        weights[1].grad = made(5, 3, seed=3)
        other.step()
        found.append(weights[1].detach())
    torch.testing.assert_close(*found)
