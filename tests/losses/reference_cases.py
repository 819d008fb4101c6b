"""What the tests of the reference share: a small problem, and how close two results have to be."""

from __future__ import annotations

import math

import pytest
import torch
from cases import made
from formulas import CASES, Case
from torch import Tensor

OBJECTIVES = ("softmax", "lse-hinge", "max-hinge", "hinge")
IGNORE = -100
all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
objectives = pytest.mark.parametrize("objective", OBJECTIVES)


def close(actual: Tensor, expected: Tensor | list[float] | float, rtol: float = 1e-12) -> None:
    """Equal up to rtol of the largest entry: an entry that is a cancelled sum has no relative precision of its own."""
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    largest = wanted[wanted.isfinite()].abs().max().item() if wanted.isfinite().any() else 0.0
    torch.testing.assert_close(actual.double(), wanted, rtol=0.0, atol=rtol * largest, equal_nan=True)


def by_hand(
    case: Case,
    x: Tensor,
    w: Tensor,
    y: list[int],
    *,
    objective: str = "softmax",
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    class_ids: Tensor | None = None,
    ignore_index: int = IGNORE,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> list[float] | float:
    """The loss with Python's floats, a sample and a class at a time."""
    ids = range(len(w)) if class_ids is None else class_ids.tolist()
    b = [0.0] * len(w) if bias is None else bias.tolist()
    a = [1.0] * len(w) if class_weight is None else class_weight.tolist()
    total, losses = [], []
    for row, label in zip(x.tolist(), y, strict=True):
        if label == ignore_index:
            losses.append(0.0)
            continue
        z = {}
        for j in ids:
            class_row = w[j].tolist()
            x_norm, w_norm = math.hypot(*row), math.hypot(*class_row)
            c = math.fsum(p * q for p, q in zip(row, class_row, strict=True)) / (x_norm * w_norm)
            phi = case.phi(math.acos(max(-1.0, min(1.0, c)))) if j == label else c
            z[j] = case.scale(x_norm, w_norm) * phi + b[j]
        t, others = z[label], [z[j] for j in ids if j != label]
        log_sum = math.log(math.fsum(math.exp(value - t) for value in z.values())) + t
        loss = {
            "softmax": lambda t=t, log_sum=log_sum: log_sum - t,
            "lse-hinge": lambda t=t, others=others: max(0.0, math.log(math.fsum(map(math.exp, others))) - t),
            "max-hinge": lambda t=t, others=others: max(0.0, max(others) - t),
            "hinge": lambda t=t, others=others: math.fsum(max(0.0, value - t) for value in others),
        }[objective]()
        spread = math.fsum(a[j] * (log_sum - z[j]) for j in ids) / len(ids)
        losses.append((1 - label_smoothing) * a[label] * loss + label_smoothing * spread)
        total.append(a[label])
    if reduction == "none":
        return losses
    return math.fsum(losses) if reduction == "sum" else math.fsum(losses) / math.fsum(total)


X, W = made(5, 3, seed=1), made(6, 3, seed=2)
Y = [2, 0, 5, 2, 4]
