"""Elementwise functions inside the tile, each with its derivative next to it: for tensors, and as Triton code."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the torch backend needs no Triton

    class triton:  # type: ignore[no-redef]
        jit = staticmethod(lambda function: function)


def hinge(tile: Tensor, threshold: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:  # [K, N], [N] -> [N], [N]
    """sum_j relu(z_ij - threshold_i), the multi-class SVM's, and how many of its terms are positive."""
    excess = torch.sub(tile, threshold, out=out).clamp_(min=0.0)
    return excess.sum(dim=0), (excess != 0).sum(dim=0).to(excess.dtype)


@triton.jit
def hinge_term(z, threshold):
    """relu(z - threshold); nan stays nan."""
    return tl.maximum(z - threshold, 0.0, propagate_nan=tl.PropagateNan.ALL)


def hinge_slope(tile: Tensor, threshold: Tensor, out: Tensor) -> Tensor:  # [K, N], [N] -> [K, N]
    """d hinge / d z_ij: 1 where z_ij > threshold_i; 0 where equal, as `torch.relu`."""
    return torch.sub(tile, threshold, out=out).clamp_(min=0.0).sign_()


@triton.jit
def hinge_slope_term(z, threshold):
    return tl.where(z > threshold, 1.0, tl.where(z == z, 0.0, z))


@triton.jit
def softmax_term(z, rest):
    """exp(z - rest): d rest / d z."""
    return tl.exp(z - rest)


@triton.jit
def exp_term(z, total):
    """exp(z) for z in units of log 2: d rest / d z up to a factor of the sample (see class_pass/backward.py)."""
    return tl.exp2(z)
