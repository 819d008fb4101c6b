"""An upstream gradient near the end of float32's range: finite and right wherever the gradient itself is finite."""

from __future__ import annotations

import pytest
import torch
from cases import HALVES, combinations, every_backend, labels, made
from torch import Tensor

import tritonmargin as tm
from tritonmargin.reference import margin_cross_entropy as with_full_logits

N, C, D = 6, 9, 8
MARGINS = {"raw": tm.Softmax(), "bounded": tm.ArcFace(m=0.3, s=8.0), "past the bound": tm.CosFace(m=0.3, s=200.0)}
ABOVE = ("12", "16.5", "30", "49.9", "51")  # by how much rest exceeds t


def problem(above: float, margin: tm.Margin, dtype: torch.dtype, **options: object) -> tuple[list[Tensor], Tensor]:
    """Samples of one class whose bias is so low that rest - t of the first one is `above`."""
    x, w, y, bias = made(N, D, seed=1), made(C, D, seed=2), labels(C, N), made(C, seed=3)
    _, stats = with_full_logits(x, w, y, margin, bias=bias, return_stats=True)
    bias[y[0]] -= above - (stats.rest_logsumexp - stats.target_logit)[0]
    return [each.to(dtype) for each in (x, w, bias)], y


def gradients(
    loss: object, leaves: list[Tensor], y: Tensor, margin: tm.Margin, upstream: float, **options: object
) -> tuple[Tensor, ...]:
    x, w, bias = (each.detach().requires_grad_() for each in leaves)
    found = loss(x, w, y, margin, bias=bias, reduction="none", **options)  # type: ignore[operator]
    return torch.autograd.grad((found * upstream).sum(), (x, w, bias))


def check(leaves: list[Tensor], y: Tensor, margin: tm.Margin, upstream: float, backend: str, **options: object) -> None:
    exact = gradients(with_full_logits, [each.double() for each in leaves], y, margin, upstream, **options)
    with tm.use_backend(backend):
        found = gradients(tm.margin_cross_entropy, leaves, y, margin, upstream, **options)
    for ours, right in zip(found, exact, strict=True):
        assert ours.isfinite().all()
        ours_once, once = ours.double() / upstream, right / upstream
        error = (ours_once - once).norm() / once.norm()
        assert error < 100 * torch.finfo(ours.dtype).eps


@every_backend
@combinations(("above", "name", "stats"), ABOVE, MARGINS, ("", "stats"))
def test_softmax_however_far_the_others_are_above(above: str, name: str, stats: str, backend: str) -> None:
    leaves, y = problem(float(above), MARGINS[name], torch.float32)

    def loss(*args: Tensor, **options: object) -> object:
        found = tm.margin_cross_entropy(*args, **options, return_stats=bool(stats))  # type: ignore[arg-type]
        return found[0] if stats else found

    for upstream in (1e17, 1e30):
        exact = gradients(with_full_logits, [each.double() for each in leaves], y, MARGINS[name], upstream)
        with tm.use_backend(backend):
            found = gradients(loss, leaves, y, MARGINS[name], upstream)
        for ours, right in zip(found, exact, strict=True):
            assert (ours.double() - right).norm() / right.norm() < 1e-4  # nan and inf are not


@every_backend
@pytest.mark.parametrize("objective", ["lse-hinge", "max-hinge", "hinge"])
def test_hinges(objective: str, backend: str) -> None:
    leaves, y = problem(49.9, tm.Softmax(), torch.float32)
    check(leaves, y, tm.Softmax(), 1e30, backend, objective=objective)


@every_backend
def test_smoothing(backend: str) -> None:
    leaves, y = problem(49.9, tm.Softmax(), torch.float32)
    check(leaves, y, tm.Softmax(), 1e30, backend, label_smoothing=0.1)


@every_backend
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision(dtype: torch.dtype, backend: str) -> None:
    leaves, y = problem(30.0, tm.Softmax(), dtype)
    check(leaves, y, tm.Softmax(), 1e3 if dtype == torch.float16 else 1e30, backend)


def test_float64() -> None:
    leaves, y = problem(49.9, tm.Softmax(), torch.float64)
    check(leaves, y, tm.Softmax(), 1e290, "torch")


def test_no_precision_is_lost_at_the_threshold_of_softplus() -> None:
    from tritonmargin.objectives import softmax

    for dtype in (torch.float32, torch.float64):
        above = torch.linspace(-60.0, 60.0, 4001, dtype=dtype, device="cpu", requires_grad=True)
        loss = softmax(torch.zeros_like(above), above)
        (slope,) = torch.autograd.grad(loss.sum(), above)
        exact = above.detach().double()
        right = torch.where(exact > 0, exact, 0.0) + torch.log1p(torch.exp(-exact.abs()))
        eps = torch.finfo(dtype).eps
        assert ((loss.double() - right) / right).abs().max() <= 2 * eps
        assert ((slope.double() - exact.sigmoid()) / exact.sigmoid()).abs().max() <= 4 * eps
