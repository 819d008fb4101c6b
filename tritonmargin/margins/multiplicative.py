"""Multiplicative angular margins: psi(theta) = (-1)^k cos(m theta) - 2k on the k-th piece of [0, pi]."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from tritonmargin.margins.base import GRADIENT, Margin, RowFormula
from tritonmargin.margins.numbers import as_float, is_differentiated


class LSoftmax(Margin):
    """Large-margin softmax: t = |w_y| |x| (lam cos theta + psi(theta)) / (1 + lam), the others x . w_j.

    psi(theta) = (-1)^k cos(m theta) - 2k, k = floor(m theta / pi): cos(m theta) continued downwards, so that it never
    rises. Nothing is normalised. Liu, Wen, Yu, Yang: Large-Margin Softmax Loss (2016). With integer m, cos(m theta) is
    a Chebyshev polynomial of cos theta, so value and slope are exact at theta = 0 and pi too (slope m^2).

    The original trains with lam annealed from 1000 towards 0 (`tm.Annealing(1000, 2.5e-5, 35, 0)`);
    pytorch-metric-learning's `LargeMarginSoftmaxLoss` has no lam (that is lam = 0) and an additional scale.

    Args:
        m: integer >= 1, default 4; m = 1 is plain softmax.
        lam: weight of the unchanged logit, >= 0, default 0.

    Raises:
        ValueError: m not an integer >= 1, or lam < 0.
    """

    unit_embeddings = False
    unit_weight = False
    m: int
    lam: float

    def __init__(self, m: int = 4, lam: float | Tensor = 0.0) -> None:
        super().__init__()
        self.m = m
        self.number("lam", lam)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "m":  # decides which operations there are: no number that may follow a schedule
            whole = None if isinstance(value, Tensor) and is_differentiated(value) else as_float(value)
            if whole is None or not whole.is_integer() or whole < 1:
                raise ValueError(f"{type(self).__name__}: m must be an integer >= 1, got {value!r}")
            value = int(whole)
        super().__setattr__(name, value)

    def check_number(self, name: str, value: float) -> None:
        super().check_number(name, value)
        if name == "lam" and value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")

    def target_cosine(self, cos: Tensor) -> Tensor:
        lam = self.tensor("lam", cos.device)
        return (lam * cos + psi_integer(cos, self.m)) / (1.0 + lam)

    def row_formula(self, device: torch.device) -> RowFormula:
        from tritonmargin.margins import formulas  # and Triton with it

        return RowFormula(formulas.annealed_formula, (self.tensor("lam", device),), (self.gradient, self.m))

    def extra_repr(self) -> str:
        return f"m={self.m}, {super().extra_repr()}"


class ASoftmax(LSoftmax):
    """SphereFace: t = |x| (lam cos theta + psi(theta)) / (1 + lam), the others |x| cos theta_j.

    L-Softmax with unit class rows; the embedding's norm stays as the scale. Liu et al.: SphereFace (2017). psi as in
    `LSoftmax`. The original trains with lam annealed from 1000 down to 5 (`tm.Annealing()`), and its Caffe backward
    ignores the margin for the class rows; here the gradient is that of the formula.
    pytorch-metric-learning's `SphereFaceLoss` has lam = 0 and an additional scale.

    Args:
        m: integer >= 1, default 4.
        lam: weight of the unchanged logit, >= 0, default 0.

    Raises:
        ValueError: m not an integer >= 1, or lam < 0.
    """

    unit_weight = True


class SphereFaceR(Margin):
    """SphereFace revived, multiplicative: t = s psi(theta) with a real m >= 1, the others s cos theta.

    Liu et al.: SphereFace Revived (2021). psi as in `LSoftmax`, k = floor(m theta / pi).
    `gradient="straight-through"` (d t / d cos = s) is the paper's characteristic gradient detachment, which opensphere
    trains with; `"exact"` differentiates the formula.

    Args:
        m: real >= 1, default 1.7.
        s: scale, default 64 (opensphere's code default is 30, its large configurations 64).
        gradient: "exact" (default) or "straight-through".

    Raises:
        ValueError: m < 1 or an unknown name.
    """

    options: ClassVar = {"gradient": GRADIENT}
    m: float

    def __init__(self, m: float | Tensor = 1.7, s: float | Tensor = 64.0, gradient: str = "exact") -> None:
        super().__init__(s)
        self.gradient = gradient
        self.number("m", m)

    def check_number(self, name: str, value: float) -> None:
        super().check_number(name, value)
        if name == "m" and value < 1:
            raise ValueError(f"SphereFaceR: m must be >= 1, got {value}")

    def target_cosine(self, cos: Tensor) -> Tensor:
        theta, m = torch.acos(cos), self.tensor("m", cos.device)
        k = piece(theta, m)
        return (1.0 - 2.0 * (k % 2)) * torch.cos(m * theta) - 2.0 * k

    def row_formula(self, device: torch.device) -> RowFormula:
        from tritonmargin.margins import formulas  # and Triton with it

        return RowFormula(formulas.sphereface_r_formula, (self.tensor("m", device),), (self.gradient,))


def psi_integer(cos: Tensor, m: int) -> Tensor:  # [N] -> [N]
    """psi for an integer m, cos(m theta) by the recurrence T_n = 2 cos T_{n-1} - T_{n-2}."""
    before, chebyshev = torch.ones_like(cos), cos
    for _ in range(m - 1):
        before, chebyshev = chebyshev, 2.0 * cos * chebyshev - before
    k = piece(torch.acos(cos.detach()), m)
    return (1.0 - 2.0 * (k % 2)) * chebyshev - 2.0 * k


def piece(theta: Tensor, m: float | Tensor) -> Tensor:  # [N] -> [N]
    """k = floor(m theta / pi), a constant for autograd. At theta = pi itself both neighbours give the same value."""
    return torch.floor(theta.detach() * m / math.pi)
