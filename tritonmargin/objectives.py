"""Objectives: from a sample's own logit t and what the other classes came to, to its loss. Functions on N-vectors.

The question is by how much the others exceed the own logit. `max_{j != y} z_j - t` through relu is the max-hinge; a
soft maximum (logsumexp) in place of the max gives the LSE hinge; a soft relu (softplus) in place of that gives softmax
cross-entropy:  -log(e^t / (e^t + sum_{j != y} e^{z_j})) = softplus(rest - t).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """loss(t, others) per sample; `others` names the class pass's output that it looks at."""

    others: str  # "rest" = logsumexp_{j != y} z_j, "hardest" = max_{j != y} z_j, "hinge" = sum_{j != y} relu(z_j - t)
    loss: Callable[[Tensor, Tensor], Tensor]  # [N], [N] -> [N]


def softmax(t: Tensor, rest: Tensor) -> Tensor:
    """softplus(rest - t): keeps its relative precision for p_y -> 1, where logsumexp - t cancels, and for p_y -> 0.

    From the threshold on softplus(v) is v, to the last bit. A higher one would cost the range of the upstream gradient,
    which torch multiplies by exp(v) before it divides.
    """
    return F.softplus(rest - t, threshold=1.0 - math.log(torch.finfo(t.dtype).eps))


def excess(t: Tensor, others: Tensor) -> Tensor:
    """relu(others - t)."""
    return torch.relu(others - t)


def hinges(t: Tensor, total: Tensor) -> Tensor:
    """sum_{j != y} relu(z_j - t), which the class pass has summed already."""
    return total


class WithSlope(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, t: Tensor, slope: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grad, grad * slope, None


def with_slope(value: Tensor, t: Tensor, slope: Tensor) -> Tensor:
    """`value`, whose derivative in t is `slope` [N] too. Not value + slope (t - t.detach()): t may be infinite."""
    found: Tensor = WithSlope.apply(value, t, slope)
    return found


OBJECTIVES = {
    "softmax": Objective("rest", softmax),
    "lse-hinge": Objective("rest", excess),
    "max-hinge": Objective("hardest", excess),
    "hinge": Objective("hinge", hinges),
}


def smoothed(
    loss: Tensor, t: Tensor, rest: Tensor, mean_logit: Tensor, mean_weight: Tensor | float, smoothing: float
) -> Tensor:
    """(1 - eps) loss + eps/C sum_c a_c (-log p_c), a the class weights, as `torch.nn.functional.cross_entropy`.

    `mean_logit` is sum_c a_c z_c / C with z_y = t, `mean_weight` is sum_c a_c / C. `loss` carries a_y already.
    """
    return (1.0 - smoothing) * loss + smoothing * (mean_weight * torch.logaddexp(rest, t) - mean_logit)
