"""How exact a step is, as a share of what plain PyTorch loses in the same precision; conftest.py says where it runs.

The yardstick is full logits in the compute dtype with autograd through them, as users write it without this library.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE, MACHINE
from torch import Tensor

if MACHINE in ("cpu", "interpreter"):
    pytest.skip("is about matrix units, which neither has", allow_module_level=True)

from kernel_cases import NUMBERS, random

import tritonmargin as tm
from tritonmargin.backends.triton import BACKEND
from tritonmargin.backends.triton import numbers as numbers_module
from tritonmargin.optim.update_rules import RowUpdate
from tritonmargin.spec import LossInputs, LossOptions, PassGrads, PassInputs, PassSpec

N, D, C = 32, 128, 520
MARGINS = {"ArcFace": lambda: tm.ArcFace(m=0.5, s=32.0), "Softmax": lambda: tm.Softmax()}
margins = pytest.mark.parametrize("margin", MARGINS)


def leaves(margin: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, rows and labels; half of the samples are near to their class, as in a training under way."""
    x, w, target = random(N, D, seed=1), random(C, D, seed=2), torch.arange(N, device=DEVICE) * 15
    x[::2] += w[target[::2]]
    size = 1.0 if margin == "ArcFace" else 1.0 / math.sqrt(D)
    return x.to(dtype), (w * size).to(dtype), target


def gradients(loss: Tensor, x: Tensor, w: Tensor, loss_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(loss * loss_scale, (x, w))


@contextlib.contextmanager
def multiplied(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def ours(margin: str, numbers: str, loss_scale: float = 1.0) -> tuple[Tensor, ...]:
    dtype, precision, _ = NUMBERS[numbers]
    x, w, target = leaves(margin, dtype)
    x.requires_grad_(), w.requires_grad_()
    with multiplied(precision):
        loss = BACKEND.fused(LossInputs(x, w, target), MARGINS[margin]().to(DEVICE), LossOptions(), dtype)
    return gradients(loss, x, w, loss_scale)


class Tf32Product(torch.autograd.Function):
    """x w^T as matrix units make it: operands of ten bits, sums in float32. A GPU does so by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return rounded(x) @ rounded(w).T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return rounded(g) @ rounded(w), rounded(g).T @ rounded(x)


def rounded(value: Tensor) -> Tensor:
    return ((value.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def plain(margin: str, numbers: str) -> tuple[Tensor, Tensor]:
    """The same loss by full logits."""
    dtype, precision, _ = NUMBERS[numbers]
    x, w, target = (each.cpu() for each in leaves(margin, dtype))
    return full_logits(margin, x.requires_grad_(), w.requires_grad_(), target, precision)


def full_logits(margin: str, x: Tensor, w: Tensor, target: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    unit = margin == "ArcFace"
    a, b = (F.normalize(x), F.normalize(w)) if unit else (x, w)
    z = Tf32Product.apply(a, b) if precision == "tf32" else a @ b.T
    if unit:
        cos = z.gather(1, target[:, None]).clamp(-1, 1)
        moved = torch.where(cos > -math.cos(0.5), (cos.acos() + 0.5).cos(), cos - 0.5 * math.sin(0.5))
        z = 32.0 * z.scatter(1, target[:, None], moved)
    return gradients(F.cross_entropy(z, target), x, w)


def exact(margin: str, numbers: str) -> tuple[Tensor, Tensor]:
    x, w, target = (each.cpu() for each in leaves(margin, NUMBERS[numbers][0]))
    return full_logits(margin, x.double().requires_grad_(), w.double().requires_grad_(), target, "ieee")


def errors(found: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> list[float]:
    return [float((f.cpu().double() - r).norm() / r.norm()) for f, r in zip(found, right, strict=True)]


@margins
@pytest.mark.parametrize("numbers", ["bfloat16", "tf32", "float32"])
def test_no_less_exact_than_full_logits(margin: str, numbers: str) -> None:
    """bfloat16 within twice plain torch's error, in truth below it; TF32 and IEEE float32 below it."""
    right = exact(margin, numbers)
    allowed = 2.0 if numbers == "bfloat16" else 1.0
    for found, most in zip(errors(ours(margin, numbers), right), errors(plain(margin, numbers), right), strict=True):
        assert found <= allowed * most


@margins
def test_float16_is_as_exact_as_tf32(margin: str) -> None:
    """The gradient as it is stored: against TF32's, of the same numbers, rounded to float16 too."""
    right = exact(margin, "float16")
    x, w, target = (each.float() if each.is_floating_point() else each for each in leaves(margin, torch.float16))
    with multiplied("tf32"):
        leaf = x.requires_grad_(), w.requires_grad_()
        loss = BACKEND.fused(LossInputs(*leaf, target), MARGINS[margin]().to(DEVICE), LossOptions(), torch.float32)
    fine = tuple(each.half() for each in gradients(loss, *leaf, 1024.0))
    found = ours(margin, "float16", loss_scale=1024.0)
    right = tuple(1024.0 * each for each in right)
    for error, most in zip(errors(found, right), errors(fine, right), strict=True):
        assert error <= 1.2 * most


@margins
def test_float16_under_a_loss_scale(margin: str) -> None:
    """65,536 is GradScaler's first one. Only what float16 cannot hold in the end may overflow: here nothing."""
    right = exact(margin, "float16")
    found = ours(margin, "float16", loss_scale=65536.0)
    expected = [65536.0 * each for each in right]
    for each, wanted in zip(found, expected, strict=True):
        assert wanted.abs().max() < 60000.0
        assert each.isfinite().all()
    assert max(errors(found, tuple(expected))) < 1e-3


ROWS = {
    # How exact the operands are that stand for unit rows decides; |dW . w| / (|dW| |w|) of the worst row.
    "as they are": 1e-6,  # W itself, 1/|w| afterwards
    "exact copies": 1e-6,  # of numbers +-1/8, whose norm is 1
    "rounded copies": {torch.bfloat16: 2e-3, torch.float16: 2e-4, torch.float32: 2e-4},
}


@pytest.mark.parametrize(
    ("numbers", "rows"),
    [
        ("bfloat16", "as they are"), ("float32", "as they are"), ("bfloat16", "exact copies"),
        ("tf32", "exact copies"), ("float16", "exact copies"), ("bfloat16", "rounded copies"),
        ("tf32", "rounded copies"), ("float16", "rounded copies"),
    ],
)  # fmt: skip
def test_gradients_of_unit_rows_are_orthogonal_to_them(numbers: str, rows: str) -> None:
    """Or rows grow by rounding alone. As precise as the operands are: the sum along a row is one of what is stored."""
    check_direction(numbers, rows, numbers_module)


def check_direction(numbers: str, rows: str, ops: Any) -> None:
    """The gradient in float32 whatever W is: the momentum of a first step that moves nothing."""
    dtype, precision, _ = NUMBERS[numbers]
    n, d, c = 70, 64, 129
    x, w = random(n, d, seed=1, dtype=dtype), random(c, d, seed=2)
    w = w.sign() / 8.0 if rows == "exact copies" else w
    w = w.to(dtype if rows == "as they are" or precision == "tf32" else torch.float32)
    spec = PassSpec(
        unit_weight=True, unit_embeddings=True, scale=16.0, ignore_index=-100, bounded=True, want_rest=True,
        want_hardest=False, sparse=False, dtype=dtype, precision=precision, chunk_bytes=0, retain_bytes=0,
        backend="triton",
    )  # fmt: skip
    inputs = PassInputs(x, w, torch.arange(n, device=DEVICE))
    _, saved = ops.forward(inputs, spec)
    update = RowUpdate("sgd", w.clone(), (0.0, 0.9, 0.0, 0.0), (torch.zeros(c, d, device=DEVICE),))
    g = random(n, seed=3).abs()
    ops.backward(inputs, saved, PassGrads(rest=g, target_product=-g), (False, True, False), spec, update)
    gradient, w = update.state[0].double(), w.double()
    along = (gradient * w).sum(dim=1).abs() / (gradient.norm(dim=1) * w.norm(dim=1))
    limit = ROWS[rows]
    assert float(along.max()) <= (limit[dtype] if isinstance(limit, dict) else limit)
