"""Exponentials without a running maximum: when they stay in range, and how backward keeps its factors there."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_bounded(bound: float, classes: int, dtype: torch.dtype) -> bool:
    """Whether exp(z) with |z| <= bound, and the sum of `classes` of them, stay inside the range of `dtype`."""
    headroom = math.log(torch.finfo(dtype).max) - 3.7 - bound
    # Not log(classes): torch.compile would compile again for every number of classes.
    return classes < math.exp(headroom)


def split_factor(g: Tensor, total: Tensor, added: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """f = g exp(-rest) = g / total so that neither product leaves the dtype's range, rows of any ease side by side.

    dX_i = g_i (1/total_i (sum_j exp(z_ij) w'_j)) stays in range from inside out. A = sum_i exp(z_ij) f_i x_i mixes the
    samples: A carries 2^K, exact, the largest power that leaves headroom above max |f|, above max |g| times the number
    of samples, and above what is `added` to the sum, and whose inverse is a normal number.

    Returns 1/total [N], 2^K f [N], 2^-K [].
    """
    # A sample with no other class has total 0, and no gradient.
    inverse = total.masked_fill(total == 0, torch.inf).reciprocal()
    headroom, size = math.log2(torch.finfo(g.dtype).max), g.abs()
    power = torch.minimum(headroom - 30.0 - size.amax().log2(), headroom - 10.0 - (size.log2() + inverse.log2()).amax())
    for each in added:
        power = torch.minimum(power, headroom - 27.0 - torch.linalg.vector_norm(each, torch.inf).log2())
    power = power.floor().clamp(max=headroom - 27.0).nan_to_num(nan=0.0, neginf=0.0)
    scale = torch.pow(2.0, power)
    return inverse, (g * scale) * inverse, scale.reciprocal()


def finite(shift: Tensor) -> Tensor:
    """0 where there was no class but the target and shift is -inf: -inf - -inf would be nan."""
    return shift.masked_fill(shift == -torch.inf, 0.0)
