"""A bias of -inf takes a class out, as in plain torch: the loss is what full logits give, inf where that is inf."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE, every_backend, labels, made
from torch import Tensor

import tritonmargin as tm

N, C, D = 6, 9, 8
OWN = 0  # a class that is some samples' own
WHERE = {"own": [OWN], "another": [7], "both": [OWN, 7], "all others": list(range(1, C)), "all": list(range(C))}
every_place = pytest.mark.parametrize("where", WHERE)


def given(where: str) -> dict[str, Tensor]:
    bias = made(C, seed=3)
    bias[WHERE[where]] = -torch.inf
    y = labels(6, N)
    y[:2], y[2:] = OWN, y[2:].clamp(min=1)
    tensors = {"x": made(N, D, seed=1), "w": made(C, D, seed=2), "bias": bias}
    return {name: each.float() for name, each in tensors.items()} | {"y": y}


def loss(of: dict[str, Tensor], margin: tm.Margin | None = None, **options: Any) -> Tensor:
    found = tm.margin_cross_entropy(
        of["x"], of["w"], of["y"], margin or tm.Softmax(), bias=of["bias"], reduction="none", **options
    )
    return found[0] if isinstance(found, tuple) else found


@every_backend
@every_place
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_the_loss_is_that_of_plain_torch(weighted: bool, smoothing: float, where: str, backend: str) -> None:
    of = given(where)
    weight = made(C, seed=4).abs().float() if weighted else None
    plain = F.cross_entropy(
        F.linear(of["x"], of["w"], of["bias"]), of["y"], weight=weight, label_smoothing=smoothing, reduction="none"
    )
    with tm.use_backend(backend):
        fused = loss(of, class_weight=weight, label_smoothing=smoothing)
        numbers = loss(of, class_weight=weight, label_smoothing=smoothing, return_stats=True)
    torch.testing.assert_close(fused, plain, equal_nan=True)
    torch.testing.assert_close(numbers, plain, equal_nan=True)


@every_backend
@pytest.mark.parametrize("margin", [tm.ArcFace(m=0.3, s=8.0), tm.LSoftmax(m=2, lam=1.0)], ids=["ArcFace", "LSoftmax"])
def test_smoothing_with_a_margin_on_a_class_that_is_out(margin: tm.Margin, backend: str) -> None:
    of = given("own")
    with tm.use_backend(backend):
        found = loss(of, margin.to(DEVICE), label_smoothing=0.1)
    assert found.tolist() == [torch.inf] * N  # log p of the class is -inf for every sample


@every_backend
def test_the_sum_of_hinges_under_a_class_above_all(backend: str) -> None:
    of = given("own")
    of["bias"][OWN] = torch.inf
    of["bias"].requires_grad_()
    with tm.use_backend(backend):
        found = loss(of, objective="hinge")
        (grad,) = torch.autograd.grad(found.sum(), of["bias"])
    assert found.tolist() == [0.0] * 2 + [torch.inf] * (N - 2)
    assert grad[OWN] == N - 2


@every_backend
def test_the_correction_of_a_sample_without_a_class_that_is_out(backend: str) -> None:
    of = given("another")
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 7], device=DEVICE)
    with tm.use_backend(backend):
        found = loss(of, class_ids=ids, logq_correction=True)
        expected = tm.reference.margin_cross_entropy(
            of["x"], of["w"], of["y"], tm.Softmax(), bias=of["bias"], class_ids=ids, logq_correction=True,
            reduction="none",
        )  # fmt: skip
    torch.testing.assert_close(found, expected)
