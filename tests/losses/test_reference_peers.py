"""The reference against PyTorch's own losses and pytorch-metric-learning."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from math import pi

import pytest
import torch
import torch.nn.functional as F
from cases import made
from pytorch_metric_learning import losses as pml
from reference_cases import IGNORE, close
from torch import Tensor

from tritonmargin import reference
from tritonmargin.margins import (
    ArcFace,
    ASoftmax,
    CosFace,
    L2Softmax,
    LSoftmax,
    NormFace,
    Softmax,
)

# -- PyTorch's own losses ------------------------------------------------------------------------------------------


def both(loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The loss, and its gradients for an upstream gradient that differs from sample to sample."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = loss(*leaves)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


@pytest.mark.parametrize(
    ("reduction", "smoothing", "weighted", "ignore_index"),
    [*itertools.product(("mean", "sum", "none"), (0.0, 0.1, 1.0), (False, True), (IGNORE, 3))],
)
def test_softmax_is_cross_entropy(reduction: str, smoothing: float, weighted: bool, ignore_index: int) -> None:
    x, w, b = 3.0 * made(9, 7, seed=5), made(11, 7, seed=6), made(11, seed=7)
    y = torch.tensor([0, 3, 10, 3, ignore_index, 7, 1, 0, 9])
    a = made(11, seed=8).abs() if weighted else None
    options = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": smoothing}
    expected = both(lambda x, w, b: F.cross_entropy(F.linear(x, w, b), y, weight=a, **options), x, w, b)
    for found in (
        both(
            lambda x, w, b: reference.margin_cross_entropy(x, w, y, Softmax(), bias=b, class_weight=a, **options),
            x,
            w,
            b,
        ),
        both(lambda x, w, b: reference.linear_cross_entropy(x, w, y, linear_bias=b, weight=a, **options), x, w, b),
    ):
        for one, two in zip(found, expected, strict=True):
            close(one, two)


def test_l2softmax_and_normface_are_cross_entropy_of_scaled_rows() -> None:
    x, w, y = made(9, 7, seed=5), made(11, 7, seed=6), torch.arange(9)
    pairs = (
        (L2Softmax(s=5.0), lambda x, w: F.linear(5.0 * F.normalize(x), w)),
        (NormFace(s=12.0), lambda x, w: F.linear(12.0 * F.normalize(x), F.normalize(w))),
        (LSoftmax(m=1), F.linear),
        (ASoftmax(m=1), lambda x, w: F.linear(x, F.normalize(w))),
    )
    for margin, logits in pairs:
        found = both(lambda x, w, m=margin: reference.margin_cross_entropy(x, w, y, m), x, w)
        for one, two in zip(found, both(lambda x, w, z=logits: F.cross_entropy(z(x, w), y), x, w), strict=True):
            close(one, two)


def test_a_single_sample() -> None:
    x, w = made(7, seed=5), made(11, 7, seed=6)
    for reduction in ("mean", "none"):
        found = reference.linear_cross_entropy(x, w, torch.tensor(4), reduction=reduction)
        assert found.shape == ()
        close(found, F.cross_entropy(F.linear(x, w), torch.tensor(4)))


@pytest.mark.parametrize("m", [0.0, 0.35])
def test_hinge_is_multi_margin_loss(m: float) -> None:
    """MultiMarginLoss(p=1) is sum_{j != y} relu(margin - z_y + z_j)/C: on z = s cos, CosFace's m is margin/s."""
    x, w, y, s = made(9, 7, seed=5), made(11, 7, seed=6), torch.arange(9), 10.0
    a = made(11, seed=8).abs()
    for reduction in ("sum", "none"):  # its mean divides by N, not by the weights of the samples
        theirs = torch.nn.MultiMarginLoss(p=1, margin=s * m, weight=a, reduction=reduction)
        expected = both(lambda x, w, f=theirs: 11 * f(s * F.normalize(x) @ F.normalize(w).T, y), x, w)
        found = both(
            lambda x, w, r=reduction: reference.margin_cross_entropy(
                x, w, y, CosFace(m, s=s), class_weight=a, objective="hinge", reduction=r
            ),
            x,
            w,
        )
        for one, two in zip(found, expected, strict=True):
            close(one, two)


# -- pytorch-metric-learning ---------------------------------------------------------------------------------------

PEERS = {
    # Their margin is in degrees. They use cos(arccos(c)) for c past the switch; the same up to rounding.
    "ArcFace": (lambda: ArcFace(0.5, s=30.0), lambda c, d: pml.ArcFaceLoss(c, d, margin=math.degrees(0.5), scale=30)),
    "ArcFace past the switch": (
        lambda: ArcFace(1.5, s=10.0),
        lambda c, d: pml.ArcFaceLoss(c, d, margin=math.degrees(1.5), scale=10),
    ),
    "CosFace": (lambda: CosFace(0.35, s=30.0), lambda c, d: pml.CosFaceLoss(c, d, margin=0.35, scale=30)),
    "NormFace": (lambda: NormFace(s=16.0), lambda c, d: pml.NormalizedSoftmaxLoss(c, d, temperature=1 / 16)),
    **{
        f"LSoftmax({m})": (
            lambda m=m: LSoftmax(m),
            lambda c, d, m=m: pml.LargeMarginSoftmaxLoss(c, d, margin=m, scale=1),
        )
        for m in (1, 2, 3, 4, 5)
    },
    **{
        f"ASoftmax({m})": (lambda m=m: ASoftmax(m), lambda c, d, m=m: pml.SphereFaceLoss(c, d, margin=m, scale=1))
        for m in (2, 3, 4)
    },
}


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # theirs, from NumPy 2
@pytest.mark.parametrize("name", PEERS)
def test_pytorch_metric_learning(name: str) -> None:
    make, theirs = PEERS[name]
    w = made(11, 5, seed=9)
    y = torch.arange(40) % 11
    # Angles from near 0 to near pi with the own class, so that every piece is met; not +-1 itself, where arccos has
    # an infinite slope there.
    x = w[y] * torch.linspace(-1.5, 1.5, 40, dtype=torch.float64)[:, None] + 0.4 * made(40, 5, seed=10)
    found = both(lambda x, w: reference.margin_cross_entropy(x, w, y, make()), x, w)

    peer = theirs(11, 5).double()
    peer.W.data = w.T.clone()  # theirs is [D, C]
    leaf = x.clone().requires_grad_()
    loss = peer(leaf, y)
    grad_x, grad_w = torch.autograd.grad(loss, (leaf, peer.W), torch.tensor(0.5, dtype=torch.float64))
    for one, two in zip(found, (loss.detach(), grad_x, grad_w.T), strict=True):
        close(one, two, rtol=1e-11)
    angles = F.cosine_similarity(x, w[y]).acos()
    assert angles.min() < 0.2
    assert angles.max() > pi - 0.2
