"""`linear_cross_entropy` is torch's, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import (
    ONE_CHUNK,
    assert_rows_close,
    every_backend,
    made,
    precise,
    problem,
)
from torch import Tensor

import tritonmargin as tm


def by_hand(x: Tensor, w: Tensor, y: Tensor, linear_bias: Tensor | None = None, **options: object) -> Tensor:
    return F.cross_entropy(F.linear(x, w, linear_bias), y, **options)


# torch 2.11, the oldest that we support, has no such function.
TORCHS = [by_hand, *([F.linear_cross_entropy] if hasattr(F, "linear_cross_entropy") else [])]


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["nothing", "linear_bias", "weight", "label_smoothing", "ignore_index", "all of them"])
def test_linear_cross_entropy_is_torchs(name: str, reduction: str, backend: str) -> None:
    dtype, size = precise(backend)
    rounded = problem(7, 9, 2 * ONE_CHUNK + 1, bias=True, seed=8).to(dtype)
    weight = made(len(rounded.w), seed=9).abs().to(dtype)
    results = []
    for function in (tm.linear_cross_entropy, *TORCHS):
        given = rounded if function is tm.linear_cross_entropy else rounded.to(torch.float64)
        options = {
            "linear_bias": given.bias.requires_grad_(),
            "weight": weight.to(given.w.dtype),
            "label_smoothing": 0.2,
            "ignore_index": int(given.y[2]),
        }
        options = {key: value for key, value in options.items() if name in (key, "all of them")}
        leaves = [given.x.requires_grad_(), given.w.requires_grad_()]
        leaves += [given.bias] if "linear_bias" in options else []
        with tm.use_backend(backend):
            loss = function(given.x, given.w, given.y, reduction=reduction, **options)
        results.append((loss, *torch.autograd.grad((loss * (1.0 + given.upstream[: loss.numel()])).sum(), leaves)))
    for ours, *theirs in zip(*results, strict=True):
        for expected in theirs:
            assert_rows_close(ours, expected, size * 1e-10, size * 1e-13)


@every_backend
def test_linear_cross_entropy_of_a_single_sample(backend: str) -> None:
    given = problem(1, 9, 131).to(precise(backend)[0])
    for reduction in ("mean", "sum", "none"):
        with tm.use_backend(backend):
            ours = tm.linear_cross_entropy(given.x[0], given.w, given.y[0], reduction=reduction)
        assert ours.shape == ()
        for function in TORCHS:
            torch.testing.assert_close(ours, function(given.x[0], given.w, given.y[0], reduction=reduction))


@every_backend
def test_linear_cross_entropy_without_an_ignore_index(backend: str) -> None:
    given = problem().to(precise(backend)[0])
    with tm.use_backend(backend):
        ours = tm.linear_cross_entropy(given.x, given.w, given.y, ignore_index=None)
        assert torch.equal(ours, tm.linear_cross_entropy(given.x, given.w, given.y))
    expected = tm.reference.linear_cross_entropy(given.x, given.w, given.y, ignore_index=None)
    torch.testing.assert_close(ours, expected)
