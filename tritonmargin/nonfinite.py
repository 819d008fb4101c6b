"""A loss that is nan or inf, and the step that is skipped for it."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor


def skipped(loss: Tensor, scaled: bool) -> Tensor:
    """The loss such that backward leaves all gradients as they are.

    scaled: the gradients are nan where a GradScaler scales it. It skips a step when it finds nan, and fails when it
        finds no gradient.
    """
    # A leaf of its own: backward reaches nothing, not even the embeddings, because a gradient of 0 times what is nan in
    # a backbone is nan.
    nothing = torch.zeros((), dtype=loss.dtype, device=loss.device, requires_grad=torch.is_grad_enabled())
    if scaled and loss.requires_grad:
        nothing.register_hook(partial(spoil_if_scaled, loss))
    return loss.detach() + nothing


def spoil_if_scaled(loss: Tensor, grad: Tensor) -> None:
    """A scaler's numbers are powers of two, and no weight of a loss is as large."""
    fraction, exponent = math.frexp(float(grad))
    if fraction == 0.5 and exponent > 10:
        torch.autograd.backward(loss, torch.full_like(loss, math.nan))
