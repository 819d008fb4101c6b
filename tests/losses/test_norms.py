"""Rows that are very short or very long: as in float64, or beyond float32's squares as rows of zeros, never nan."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, combinations, every_backend, labels, made
from torch import Tensor

import tritonmargin as tm
from tritonmargin.reference import margin_cross_entropy as with_full_logits

N, C, D = 6, 40, 16
MARGINS = {"ArcFace": tm.ArcFace(m=0.3, s=16.0), "NormFace": tm.NormFace(s=8.0)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
every_place = pytest.mark.parametrize("place", ["embedding", "class"])


def given(place: str, size: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, rows and labels; one embedding, or the rows of its class and of another one, are of this size."""
    x, w, y = made(N, D, seed=1), made(C, D, seed=2), labels(C, N)
    if place == "embedding":
        x[0] *= size
    else:
        w[[int(y[0]), (int(y[0]) + 1) % C]] *= size
    return x.to(dtype), w.to(dtype), y


def results(loss: object, x: Tensor, w: Tensor, y: Tensor, margin: tm.Margin) -> list[Tensor]:
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    found = loss(x, w, y, margin, reduction="none")  # type: ignore[operator]
    return [found.detach(), *torch.autograd.grad(found.sum(), (x, w))]


@every_backend
@every_place
@combinations(("name", "size", "dtype"), MARGINS, ("1e-12", "1e-16", "1e-18", "1e10"), DTYPES)
def test_short_and_long_rows_as_in_float64(name: str, size: str, dtype: str, place: str, backend: str) -> None:
    margin = MARGINS[name].to(DEVICE)
    x, w, y = given(place, float(size), DTYPES[dtype])
    with tm.use_backend(backend):
        found = results(tm.margin_cross_entropy, x, w, y, margin)
    right = results(with_full_logits, x.double(), w.double(), y, margin)
    allowed = 2e-5 if dtype == "float32" else 0.1
    for ours, expected in zip(found, right, strict=True):
        rows = expected.reshape(len(expected), -1).norm(dim=1)  # row by row: their gradients differ as much as they do
        error = (ours.double() - expected).reshape(len(expected), -1).norm(dim=1)
        assert (error <= allowed * rows + 1e-30).all()


@every_backend
@every_place
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e20, 1e37, 1e-30])
def test_rows_beyond_float32s_squares_count_as_zeros(size: float, dtype: str, place: str, backend: str) -> None:
    margin = MARGINS["ArcFace"].to(DEVICE)
    x, w, y = given(place, size, DTYPES[dtype])
    zeros = given(place, 0.0, DTYPES[dtype])
    with tm.use_backend(backend):
        found = results(tm.margin_cross_entropy, x, w, y, margin)
        expected = results(tm.margin_cross_entropy, *zeros, margin)
    for ours, same in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, same)


@pytest.mark.parametrize("size", [1e20, 1e100, 1e-30, 1e-100])
def test_float64_has_a_wider_range(size: float) -> None:
    x, w, y = given("class", size, torch.float64)
    with tm.use_backend("torch"):
        found = results(tm.margin_cross_entropy, x, w, y, MARGINS["ArcFace"].to(DEVICE))
    right = results(with_full_logits, *given("class", 1.0, torch.float64), MARGINS["ArcFace"].to(DEVICE))
    torch.testing.assert_close(found[0], right[0])
