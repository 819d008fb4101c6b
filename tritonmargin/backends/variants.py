"""Elementwise functions inside the tile, each with its derivative next to it: for tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def hinge(tile: Tensor, threshold: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:  # [K, N], [N] -> [N], [N]
    """sum_j relu(z_ij - threshold_i), the multi-class SVM's, and how many of its terms are positive."""
    excess = torch.sub(tile, threshold, out=out).clamp_(min=0.0)
    return excess.sum(dim=0), (excess != 0).sum(dim=0).to(excess.dtype)


def hinge_slope(tile: Tensor, threshold: Tensor, out: Tensor) -> Tensor:  # [K, N], [N] -> [K, N]
    """d hinge / d z_ij: 1 where z_ij > threshold_i; 0 where equal, as `torch.relu`."""
    return torch.sub(tile, threshold, out=out).clamp_(min=0.0).sign_()
