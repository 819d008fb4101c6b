"""The reference where samples or classes are left out, its statistics and dtypes, and a user's own margin."""

from __future__ import annotations

import math
from math import cos, pi

import pytest
import torch
import torch.nn.functional as F
from cases import made
from formulas import CASES, Case, arcface, unnormalised
from reference_cases import IGNORE, W, X, Y, all_cases, by_hand, close, objectives
from torch import Tensor

import tritonmargin
from tritonmargin import reference
from tritonmargin.margins import (
    ArcFace,
    ASoftmax,
    CosFace,
    Margin,
    NormFace,
    Softmax,
    TargetRows,
)

# -- samples and classes left out ----------------------------------------------------------------------------------


@objectives
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_add_nothing(objective: str, reduction: str) -> None:
    for case in (CASES[0], arcface(0.5, "cos-mm"), unnormalised(ASoftmax, 4)):
        for junk in (math.nan, math.inf, 0.0, 1e300):
            x = X.clone()
            x[[1, 3]] = junk
            y = torch.tensor([2, IGNORE, 5, IGNORE, 4])
            kept = [0, 2, 4]

            def loss(x: Tensor, w: Tensor, y: Tensor, case: Case = case) -> Tensor:
                return reference.margin_cross_entropy(x, w, y, case.make(), objective=objective, reduction=reduction)

            x, w = x.requires_grad_(), W.clone().requires_grad_()
            value = loss(x, w, y)
            grad_x, grad_w = torch.autograd.grad(value.sum(), (x, w))
            less, same_w = X[kept].clone().requires_grad_(), W.clone().requires_grad_()
            expected = loss(less, same_w, y[kept])
            expected_x, expected_w = torch.autograd.grad(expected.sum(), (less, same_w))
            assert torch.equal(value[kept] if reduction == "none" else value, expected)
            assert torch.equal(grad_x[kept], expected_x)
            assert torch.equal(grad_w, expected_w)
            assert (grad_x[[1, 3]] == 0).all()
            if reduction == "none":
                assert (value[[1, 3]] == 0).all()


def test_nobody_kept() -> None:
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    for y in (torch.full((5,), IGNORE), torch.empty(0, dtype=torch.int64)):
        rows = x[: len(y)]
        assert reference.margin_cross_entropy(rows, w, y, ArcFace()).isnan()
        assert reference.margin_cross_entropy(rows, w, y, ArcFace(), reduction="sum") == 0
        none = reference.margin_cross_entropy(rows, w, y, ArcFace(), reduction="none")
        assert torch.equal(none, torch.zeros(len(y), dtype=torch.float64))
        for reduction in ("mean", "sum"):
            loss = reference.margin_cross_entropy(rows, w, y, ArcFace(), reduction=reduction)
            assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (x, w)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    w = made(200, 3, seed=2)
    y = torch.tensor([100, 0, 5, 2, 4]).to(dtype)
    # 156 is -100 modulo 256: it must not be taken for the ignore_index.
    if dtype == torch.uint8:
        y[0] = 156
    expected = reference.margin_cross_entropy(X, w, y.long(), ArcFace(), reduction="none")
    assert torch.equal(reference.margin_cross_entropy(X, w, y, ArcFace(), reduction="none"), expected)
    assert (expected > 0).all()


@objectives
def test_class_ids_are_as_if_only_those_classes_existed(objective: str) -> None:
    ids = torch.tensor([0, 2, 4, 5])
    y, position = torch.tensor(Y), torch.searchsorted(ids, torch.tensor(Y))
    w_all = W.clone()
    w_all[[1, 3]] = math.nan  # not walked, so not looked at
    b, a = made(6, seed=3), made(6, seed=4).abs()
    x, w = X.clone().requires_grad_(), w_all.requires_grad_()
    options = {"objective": objective, "label_smoothing": 0.1 if objective == "softmax" else 0.0}
    loss, stats = reference.margin_cross_entropy(
        x, w, y, ArcFace(), class_ids=ids, bias=b, class_weight=a, return_stats=True, **options
    )
    few = W[ids].clone().requires_grad_()
    expected, expected_stats = reference.margin_cross_entropy(
        x, few, position, ArcFace(), bias=b[ids], class_weight=a[ids], return_stats=True, **options
    )
    close(loss.detach(), expected.detach())
    assert torch.equal(stats.hardest_class, ids[expected_stats.hardest_class])
    (grad_x, grad_w), (expected_x, expected_w) = (
        torch.autograd.grad(loss, (x, w)),
        torch.autograd.grad(expected, (x, few)),
    )
    close(grad_x, expected_x)
    close(grad_w[ids], expected_w)
    assert (grad_w[[1, 3]] == 0).all()


@objectives
def test_a_single_class(objective: str) -> None:
    """Nobody to be told from: the loss is 0 for every objective, and so are the gradients."""
    for w, ids in ((W[:1], None), (W, torch.tensor([4]))):
        y = torch.full((5,), 0 if ids is None else 4)
        y[1] = IGNORE
        x = X.clone()
        x[2] = 0.0
        x, w = x.requires_grad_(), w.clone().requires_grad_()
        for margin, smoothing in ((ArcFace(), 0.0), (Softmax(), 0.1 if objective == "softmax" else 0.0)):
            loss, stats = reference.margin_cross_entropy(
                x, w, y, margin, class_ids=ids, objective=objective, label_smoothing=smoothing, return_stats=True
            )
            assert loss == 0
            assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (x, w)))
            assert stats.rest_logsumexp.tolist()[0] == -math.inf
            assert stats.hardest_logit.tolist()[0] == -math.inf
            assert stats.hardest_class.tolist() == [-1] * 5
            assert stats.correct.tolist() == [True, False, True, True, True]


def test_two_classes() -> None:
    """The other one is all the rest."""
    y = torch.tensor([0, 1, 1, 0, 1])
    z = F.linear(X, W[:2])
    loss, stats = reference.margin_cross_entropy(X, W[:2], y, Softmax(), return_stats=True, reduction="none")
    other = z.gather(1, 1 - y[:, None])[:, 0]
    close(loss, F.cross_entropy(z, y, reduction="none"))
    close(stats.rest_logsumexp, other)
    close(stats.hardest_logit, other)
    assert torch.equal(stats.hardest_class, 1 - y)


@all_cases
def test_zero_rows(case: Case) -> None:
    """A zero row has cosine 0 with everything, where rows are normalised, and no gradient through the division."""
    x, w = X.clone(), W.clone()
    x[0], w[3], w[5] = 0.0, 0.0, 0.0  # a sample, somebody else's class and a target class
    x, w = x.requires_grad_(), w.requires_grad_()
    loss, stats = reference.margin_cross_entropy(x, w, torch.tensor(Y), case.make(), return_stats=True, reduction="sum")
    grad_x, grad_w = torch.autograd.grad(loss, (x, w))
    assert loss.isfinite()
    assert grad_x.isfinite().all()
    assert grad_w.isfinite().all()
    if case.unit_embeddings:
        assert (grad_x[0] == 0).all()
    if case.unit_weight:
        assert (grad_w[[3, 5]] == 0).all()
    scale = case.scale(0.0, float(W[2].detach().norm()))  # sample 0 is of class 2
    assert float(stats.target_logit[0]) == pytest.approx(scale * case.phi(pi / 2), abs=1e-13)


# -- statistics ----------------------------------------------------------------------------------------------------


def test_stats_by_hand() -> None:
    w = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    x = torch.tensor([[2.0, 0.0], [math.nan, 0.0], [0.0, 5.0], [1.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    y = torch.tensor([0, IGNORE, 3, 0])
    _, stats = reference.margin_cross_entropy(x, w, y, CosFace(0.25, s=4.0), bias=b, return_stats=True)
    root = 4 * math.sqrt(0.5)
    close(stats.target_logit, [4 * 0.75 + 0.5, math.nan, 3.0, root - 1.0 + 0.5])
    sums = [
        math.log(2 + math.exp(-4)),
        math.nan,
        math.log(math.exp(0.5) + math.exp(4) + 1),
        math.log(2 * math.exp(root) + math.exp(-root)),
    ]
    close(stats.rest_logsumexp, sums)
    assert stats.hardest_class.tolist() == [1, -1, 1, 1]  # classes 1 and 3 are the same direction: the lower number
    close(stats.hardest_logit, [0.0, math.nan, 4.0, root])
    # Without the margin, with the bias: 4.5 > 0; a tie of 4 and 4 is not above; root + 0.5 > root, although t is not.
    assert stats.correct.tolist() == [True, False, False, True]
    assert stats.hardest_class.dtype == torch.int64
    assert stats.correct.dtype == torch.bool
    assert type(stats) is tritonmargin.Stats


def test_stats_are_detached_and_do_not_change_the_loss() -> None:
    x = X.clone().requires_grad_()
    loss, stats = reference.margin_cross_entropy(x, W, torch.tensor(Y), ArcFace(), return_stats=True)
    assert torch.equal(loss, reference.margin_cross_entropy(x, W, torch.tensor(Y), ArcFace()))
    assert not any(part.requires_grad for part in stats)


# -- dtypes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x_dtype", "w_dtype", "loss_dtype"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float16, torch.float64),
    ],
    ids=str,
)
def test_low_precision_inputs_are_upcast_first(
    x_dtype: torch.dtype, w_dtype: torch.dtype, loss_dtype: torch.dtype
) -> None:
    x, w = X.to(x_dtype).requires_grad_(), W.to(w_dtype).requires_grad_()
    y = torch.tensor(Y)
    loss, stats = reference.margin_cross_entropy(x, w, y, ArcFace(), return_stats=True)
    assert (loss.dtype, stats.target_logit.dtype, stats.rest_logsumexp.dtype) == (loss_dtype,) * 3
    wide = [tensor.detach().to(loss_dtype).requires_grad_() for tensor in (x, w)]
    expected = reference.margin_cross_entropy(*wide, y, ArcFace())
    assert torch.equal(loss, expected)
    for one, two in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, wide), strict=True):
        assert torch.equal(one, two.to(one.dtype))


def test_autocast_does_not_lower_the_precision() -> None:
    x, w, y = X.float(), W.float(), torch.tensor(Y)
    expected = by_hand(arcface(0.5, "cos-mm"), x, w, Y)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            close(reference.margin_cross_entropy(x, w, y, ArcFace()), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_vectors_do_not_change_the_precision(dtype: torch.dtype) -> None:
    """Embeddings and weight decide it, not a bias, class weights or a margin of another dtype."""
    x, w, y = X.float(), W.float(), torch.tensor(Y)
    b, a = made(6, seed=3).to(dtype).requires_grad_(), made(6, seed=4).abs().to(dtype).requires_grad_()
    margin = FromRows(dtype)
    loss, stats = reference.margin_cross_entropy(x, w, y, margin, bias=b, class_weight=a, return_stats=True)
    assert (loss.dtype, stats.target_logit.dtype, stats.rest_logsumexp.dtype) == (torch.float32,) * 3
    loss.backward()
    assert b.grad is not None
    assert b.grad.dtype == dtype
    assert a.grad is None  # class weights are constants, as in PyTorch's losses


def test_options_that_change_nothing() -> None:
    w = W.clone().requires_grad_()
    plain = reference.margin_cross_entropy(X, w, torch.tensor(Y), ArcFace())
    same = reference.margin_cross_entropy(
        X, w, torch.tensor(Y), ArcFace(), sparse_grad=True, retain_bytes=1 << 20, chunk_bytes=64
    )
    assert torch.equal(plain, same)
    (gradient,) = torch.autograd.grad(same, w)
    assert gradient.layout == torch.strided
    with pytest.raises(ValueError, match="sub_centers is 1 in this version, got 3"):
        reference.margin_cross_entropy(X, w, torch.tensor(Y), ArcFace(), sub_centers=3)


def test_without_gradients() -> None:
    x = X.clone().requires_grad_()
    expected = reference.margin_cross_entropy(x, W, torch.tensor(Y), ArcFace())
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            loss = reference.margin_cross_entropy(x, W, torch.tensor(Y), ArcFace())
            assert not loss.requires_grad
            assert torch.equal(loss, expected.detach())


# -- a user's own margin -------------------------------------------------------------------------------------------


class Halved(Margin):
    def target_cosine(self, cos: Tensor) -> Tensor:
        return cos - 0.2 * (1 + cos)


class Steeper(ArcFace):
    """A subclass is not its parent: its own formula counts."""

    def target_cosine(self, cos: Tensor) -> Tensor:
        return 2.0 * cos - 1.0


class FromRows(Margin):
    """Looks at everything that a margin may look at."""

    unit_embeddings = False
    seen: TargetRows

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.dtype = dtype

    def target_logit(self, rows: TargetRows) -> Tensor:
        self.seen = rows
        return (rows.product - 0.1 * rows.embedding_norm * rows.weight_norm - 0.01 * rows.target).to(self.dtype)


def test_own_margins() -> None:
    y = torch.tensor(Y)
    for margin, phi in ((Halved(s=10.0), lambda c: c - 0.2 * (1 + c)), (Steeper(s=10.0), lambda c: 2 * c - 1)):
        case = Case("own", lambda: NormFace(s=10.0), lambda theta, phi=phi: phi(cos(theta)))
        close(reference.margin_cross_entropy(X, W, y, margin), by_hand(case, X, W, Y))
        inputs = [tensor.clone().requires_grad_() for tensor in (X, W)]
        assert torch.autograd.gradcheck(lambda x, w, m=margin: reference.margin_cross_entropy(x, w, y, m), inputs)


def test_own_margin_sees_all_samples() -> None:
    x = X.clone()
    x[1] = math.nan
    y = torch.tensor([2, IGNORE, 5, 2, 4], dtype=torch.int32)
    margin = FromRows()
    _, stats = reference.margin_cross_entropy(x, W, y, margin, bias=made(6, seed=3), return_stats=True)
    x_norm, w_norm = X.norm(dim=1), W.norm(dim=1)[Y]
    product = (X * F.normalize(W)[Y]).sum(dim=1)
    kept = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)  # ignored samples hold zeros
    close(margin.seen.embedding_norm, x_norm * kept)
    close(margin.seen.scale, x_norm * kept)
    close(margin.seen.weight_norm, w_norm * kept)
    close(margin.seen.product, product * kept)
    assert margin.seen.target.tolist() == [2, 0, 5, 2, 4]
    assert margin.seen.target.dtype == torch.int64
    expected = product - 0.1 * x_norm * w_norm - 0.01 * torch.tensor(Y) + made(6, seed=3)[Y]
    expected[1] = math.nan
    close(stats.target_logit, expected)
