"""What is added to logits, or taken from their gradient, costs no more precision than in plain torch.

A bias, the offsets of a sample and label smoothing: twice the error of full logits in the same dtypes at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE, MACHINE, every_backend, labels, made, sampled
from torch import Tensor

import tritonmargin as tm
from tritonmargin.reference import margin_cross_entropy as with_full_logits

N, C, D = (64, 1000, 64) if MACHINE in ("cpu", "cuda") else (32, 200, 32)
SEEDS = 3
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
Leaves = dict[str, Tensor]


def plain(of: Leaves, margin: tm.Margin, class_ids: Tensor | None, smoothing: float, corrected: bool) -> Tensor:
    """Full logits as a user writes them, in the dtypes as given."""
    x, w, y, bias = of["x"], of["w"], of["y"], of.get("bias")
    if margin.unit_embeddings:
        x, w = F.normalize(x), F.normalize(w)
    if class_ids is not None:
        w, y = w[class_ids], torch.searchsorted(class_ids, y)
    z = x @ w.T
    if margin.unit_embeddings:
        z = z * margin.s
    if bias is not None:
        z = z + bias
    if corrected:
        others = torch.ones(len(w), dtype=torch.bool, device=w.device).index_fill(0, y, False)
        ratio = (C - len(w) + others.sum()) / others.sum()
        z = z + torch.where(others, ratio.float().log(), 0.0)
    return F.cross_entropy(z, y, label_smoothing=smoothing, reduction="none")


def results(loss: Callable[[Leaves], Tensor], of: Leaves) -> list[Tensor]:
    """Losses per sample, and the gradients of their mean."""
    leaves = {name: each.detach().requires_grad_(each.is_floating_point()) for name, each in of.items()}
    found = loss(leaves)
    wanted = [each for each in leaves.values() if each.requires_grad]
    return [found.detach(), *torch.autograd.grad(found.mean(), wanted)]


def check(
    margin: tm.Margin, dtype: torch.dtype, backend: str, size: float = 0.1, bias: float = 0.0, smoothing: float = 0.0,
    sample: int = 0, bias_dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Over several problems, each result's error beside plain torch's."""
    ours_all: list[list[float]] = []
    plain_all: list[list[float]] = []
    options: dict[str, Any] = {"label_smoothing": smoothing, "logq_correction": bool(sample)}
    for seed in range(SEEDS):
        of = {"x": made(N, D, seed=3 * seed).to(dtype), "w": (made(C, D, seed=3 * seed + 1) * size).to(dtype)}
        of["y"] = labels(C, N, seed)
        if bias:
            of["bias"] = (made(C, seed=3 * seed + 2) * bias).to(bias_dtype or dtype)
        ids = sampled(of["y"], C, sample, torch.Generator("cpu").manual_seed(seed)) if sample else None

        def loss(of: Leaves, function: Any, ids: Tensor | None = ids) -> Tensor:
            found: Tensor = function(
                of["x"], of["w"], of["y"], margin, bias=of.get("bias"), class_ids=ids, reduction="none", **options
            )
            return found

        exact = {name: each.double() if each.is_floating_point() else each for name, each in of.items()}
        right = results(lambda of: loss(of, with_full_logits), exact)
        with tm.use_backend(backend):
            found = results(lambda of: loss(of, tm.margin_cross_entropy), of)
        beside = results(lambda of, ids=ids: plain(of, margin, ids, smoothing, bool(sample)), of)
        ours_all.append(errors(found, right))
        plain_all.append(errors(beside, right))
    # The kernels' logits are in units of log 2: a bias is rounded once more, in float32.
    more = 0.0 if backend == "torch" else bias * torch.finfo(torch.float32).eps / 2
    rounding = [torch.finfo(each.dtype).eps / 2 + more for each in found]
    ours_mean, plain_mean = (
        [math.hypot(*each) / SEEDS for each in zip(*every, strict=True)] for every in (ours_all, plain_all)
    )
    for number, (error, allowed, once) in enumerate(zip(ours_mean, plain_mean, rounding, strict=True)):
        assert error <= 2.0 * max(allowed, once), (number, error, allowed)


def errors(found: list[Tensor], right: list[Tensor]) -> list[float]:
    return [float((each.double() - r).norm() / r.norm()) for each, r in zip(found, right, strict=True)]


@every_backend
@every_dtype
@pytest.mark.parametrize("smoothing", [0.5, 1.0])
@pytest.mark.parametrize(
    "margin", [tm.Softmax(), tm.NormFace(s=16.0), tm.NormFace(s=0.1)], ids=["raw", "s=16", "nearly uniform"]
)
def test_label_smoothing(margin: tm.Margin, smoothing: float, dtype: torch.dtype, backend: str) -> None:
    check(margin.to(DEVICE), dtype, backend, smoothing=smoothing)


@every_backend
@every_dtype
@pytest.mark.parametrize("s", [1e-3, 16.0])
def test_offsets_of_a_sample(s: float, dtype: torch.dtype, backend: str) -> None:
    check(tm.NormFace(s=s).to(DEVICE), dtype, backend, sample=C // 3)


@every_backend
@every_dtype
@pytest.mark.parametrize("wide", [False, True], ids=["", "in float32"])
@pytest.mark.parametrize("margin", [tm.Softmax(), tm.NormFace(s=1e-3)], ids=["raw", "beside small products"])
def test_a_bias(margin: tm.Margin, wide: bool, dtype: torch.dtype, backend: str) -> None:
    check(margin.to(DEVICE), dtype, backend, bias=30.0, bias_dtype=torch.float32 if wide else None)


@every_backend
@every_dtype
def test_logits_of_some_hundreds(dtype: torch.dtype, backend: str) -> None:
    check(tm.Softmax(), dtype, backend, size=20.0)


@every_backend
@pytest.mark.parametrize("objective", ["lse-hinge", "max-hinge", "hinge"])
def test_a_bias_in_float32_under_hinges(objective: str, backend: str) -> None:
    """Beside bfloat16 products it is not rounded to bfloat16."""
    x, w, y = made(N, D, seed=1).bfloat16(), made(C, D, seed=2).bfloat16() * 0.01, labels(C, N)
    bias = made(C, seed=3).float() * 30.0
    with tm.use_backend(backend):
        found = tm.margin_cross_entropy(x, w, y, tm.Softmax(), bias=bias, objective=objective, reduction="none")
    right = with_full_logits(
        x.double(), w.double(), y, tm.Softmax(), bias=bias.double(), objective=objective, reduction="none"
    )
    assert (found.double() - right).norm() / right.norm() < 1e-4  # bfloat16 would be off by 1e-3
