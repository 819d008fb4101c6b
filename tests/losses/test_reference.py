"""The oracle itself, against `math` on single numbers: values by hand, gradients by differences."""

from __future__ import annotations

import inspect
from math import cos, pi, sin

import pytest
import torch
import torch.nn.functional as F
from cases import made
from formulas import CASES, Case, arcface, combination, sphereface_r, unnormalised
from reference_cases import IGNORE, W, X, Y, all_cases, by_hand, close, objectives
from torch import Tensor

import tritonmargin
from tritonmargin import reference
from tritonmargin.margins import (
    MARGINS,
    ArcFace,
    ASoftmax,
    CombinedMargin,
    CosFace,
    LSoftmax,
    Margin,
    NormFace,
    Softmax,
    SphereFaceR,
    TargetRows,
)


def at_angles(thetas: list[float], norm: float = 1.5, dim: int = 3) -> Tensor:
    """Embeddings at these angles from the first axis."""
    rows = torch.zeros(len(thetas), dim, dtype=torch.float64)
    rows[:, 0] = torch.tensor([norm * cos(theta) for theta in thetas], dtype=torch.float64)
    rows[:, 1] = torch.tensor([norm * sin(theta) for theta in thetas], dtype=torch.float64)
    return rows


def test_every_margin_has_its_own_formula_here() -> None:
    """A new margin must be written a second time, or the oracle would only repeat what it is to judge."""
    assert {*reference.WITHOUT_MARGIN, *reference.TARGET_COSINE} == set(MARGINS.values())
    assert {type(case.make()) for case in CASES} == set(MARGINS.values())


def test_signatures_are_the_public_ones() -> None:
    for name in ("margin_cross_entropy", "linear_cross_entropy"):
        public, here = (inspect.signature(getattr(module, name)) for module in (tritonmargin, reference))
        assert public == here


@all_cases
def test_target_logit_at_angles(case: Case) -> None:
    around = [theta + side for theta in case.switches for side in (-1e-7, 1e-7)]
    thetas = [0.0, 0.1, pi / 3, 1.5, 2.0, 2.5, 2.7, 2.9, 3.1, pi, *around]
    w = torch.tensor([[0.7, 0.0, 0.0], [0.3, 0.4, 0.0]], dtype=torch.float64)
    target = torch.zeros(len(thetas), dtype=torch.int64)
    _, stats = reference.margin_cross_entropy(at_angles(thetas), w, target, case.make(), return_stats=True)
    # eps in the cosine is up to eps/sin(theta) in theta, 3e-15 at 3.1; at 0 and pi the cosine is exact.
    close(stats.target_logit, [case.scale(1.5, 0.7) * case.phi(theta) for theta in thetas], rtol=1e-13)


@objectives
@all_cases
def test_losses_by_hand(case: Case, objective: str) -> None:
    loss = reference.margin_cross_entropy(
        X, W, torch.tensor(Y), case.make(), objective=objective, reduction="none", bias=made(6, seed=3)
    )
    expected = by_hand(case, X, W, Y, objective=objective, reduction="none", bias=made(6, seed=3))
    assert max(expected) > 0.1
    close(loss, expected)


OPTIONS = {
    "plain": {},
    "bias": {"bias": made(6, seed=3)},
    "class weights": {"class_weight": made(6, seed=4).abs()},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing alone": {"label_smoothing": 1.0},
    "smoothing, class weights": {"label_smoothing": 0.3, "class_weight": made(6, seed=4).abs()},
    "some classes": {"class_ids": torch.tensor([0, 2, 4, 5])},
    "everything": {
        "bias": made(6, seed=3),
        "class_weight": made(6, seed=4).abs(),
        "label_smoothing": 0.2,
        "class_ids": torch.tensor([0, 2, 4, 5]),
    },
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_by_hand(options: dict, reduction: str) -> None:
    for case in (arcface(0.5, "cos-mm", s=8.0), unnormalised(LSoftmax, 3)):
        for y, ignore_index in (([2, IGNORE, 5, 2, 4], IGNORE), ([2, 0, 5, 2, 4], 2), ([2, 255, 5, 2, 255], 255)):
            settings = {**options, "reduction": reduction, "ignore_index": ignore_index}
            loss = reference.margin_cross_entropy(X, W, torch.tensor(y), case.make(), **settings)
            close(loss, by_hand(case, X, W, y, **settings))


@objectives
def test_objectives_with_options_by_hand(objective: str) -> None:
    y, case = [2, IGNORE, 5, 2, 4], arcface(0.4, "cos-mm", s=5.0)
    for reduction in ("mean", "sum", "none"):
        settings = {
            "objective": objective,
            "reduction": reduction,
            "bias": made(6, seed=3),
            "class_weight": made(6, seed=4).abs(),
            "class_ids": torch.tensor([0, 2, 4, 5]),
        }
        loss = reference.margin_cross_entropy(X, W, torch.tensor(y), case.make(), **settings)
        close(loss, by_hand(case, X, W, y, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_switch_point_itself(dtype: torch.dtype) -> None:
    """arccos(0) + pi/2 is pi in floating point too: the strict theta + m > pi does not hold. Nor does cos > 0."""
    w, x = torch.eye(2, dtype=dtype), torch.tensor([[0.0, 1.0]], dtype=dtype)
    for kind, numbers in ((ArcFace, {"m": pi / 2}), (CombinedMargin, {"m1": 2.0}), (CombinedMargin, {"m2": pi / 2})):
        for beyond_pi, phi in (("cos-mm", -1.0), ("continuous", -1.0), ("clip", -1.0), ("raw", -1.0), ("easy", 0.0)):
            margin = kind(**numbers, s=2.0, beyond_pi=beyond_pi)
            _, stats = reference.margin_cross_entropy(x, w, torch.tensor([0]), margin, return_stats=True)
            close(stats.target_logit, [2.0 * phi], rtol=1e-7 if dtype == torch.float32 else 1e-15)


def test_numbers_known_by_heart() -> None:
    """Two classes at a right angle and an embedding on the first: logits s phi(0) and 0."""
    w = torch.eye(2, dtype=torch.float64)
    x, y = torch.tensor([[3.0, 0.0]], dtype=torch.float64), torch.tensor([0])

    def loss(margin: Margin, **options: str) -> float:
        return float(reference.margin_cross_entropy(x, w, y, margin, **options))

    assert loss(NormFace(s=2.0)) == pytest.approx(0.12692801104297263, rel=1e-14)  # log(1 + e^-2)
    assert loss(Softmax()) == pytest.approx(0.04858735157374196, rel=1e-14)  # log(1 + e^-3)
    assert loss(CosFace(m=1.0, s=7.0)) == pytest.approx(0.6931471805599453, rel=1e-14)  # log 2
    assert loss(ArcFace(m=pi / 3, s=4.0)) == pytest.approx(0.12692801104297263, rel=1e-14)  # 4 cos 60 degrees = 2
    assert loss(CosFace(m=1.5, s=2.0), objective="lse-hinge") == pytest.approx(1.0, rel=1e-14)  # 0 - 2 (1 - 1.5)
    assert loss(CosFace(m=1.5, s=2.0), objective="max-hinge") == pytest.approx(1.0, rel=1e-14)
    assert loss(CosFace(m=1.5, s=2.0), objective="hinge") == pytest.approx(1.0, rel=1e-14)
    assert loss(NormFace(s=2.0), objective="hinge") == 0.0
    # Far on either side the loss keeps its digits: e^-100 and 100, where log(p) would be 0 and where p underflows.
    assert loss(NormFace(s=100.0)) == pytest.approx(3.720075976020836e-44, rel=1e-13)
    assert loss(CosFace(m=11.0, s=100.0)) == pytest.approx(1000.0, rel=1e-15)


# -- gradients -----------------------------------------------------------------------------------------------------


@all_cases
def test_gradients_by_differences(case: Case) -> None:
    x, w, b = (tensor.clone().requires_grad_() for tensor in (X, W, made(6, seed=3)))

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        margin = case.make()
        if margin.s > 8:  # so that no sample's gradient vanishes next to the difference's error
            margin.s = 8.0
        return reference.margin_cross_entropy(
            x, w, torch.tensor(Y), margin, bias=b, class_weight=made(6, seed=4).abs(), label_smoothing=0.1
        )

    assert torch.autograd.gradcheck(loss, (x, w, b), atol=1e-7, rtol=1e-6)


@objectives
@pytest.mark.parametrize(
    "case", [arcface(0.5, "cos-mm", s=4.0), unnormalised(ASoftmax, 3), CASES[0]], ids=lambda case: case.name
)
def test_gradients_of_objectives_by_differences(case: Case, objective: str) -> None:
    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return reference.margin_cross_entropy(
            x, w, torch.tensor(Y), case.make(), bias=b, objective=objective, reduction="none"
        )

    inputs = tuple(tensor.clone().requires_grad_() for tensor in (X, W, made(6, seed=3)))
    assert torch.autograd.gradcheck(loss, inputs, atol=1e-7, rtol=1e-6)


def test_straight_through() -> None:
    """Values of the formula; gradient s in the target's cosine, that is the gradient of NormFace with these weights."""
    for make, phi in (
        (lambda g: ArcFace(0.5, s=6.0, gradient=g), arcface(0.5, "cos-mm").phi),
        (lambda g: CombinedMargin(1.2, 0.3, 0.1, s=6.0, gradient=g), combination(1.2, 0.3, 0.1, "cos-mm").phi),
        (lambda g: SphereFaceR(1.7, s=6.0, gradient=g), sphereface_r(1.7).phi),
    ):
        x = X.clone().requires_grad_()
        y = torch.tensor(Y)
        exact, through = (
            reference.margin_cross_entropy(x, W, y, make(g), reduction="sum") for g in ("exact", "straight-through")
        )
        close(through.detach(), exact.detach())
        (gradient,) = torch.autograd.grad(through, x)

        z = 6.0 * F.normalize(x) @ F.normalize(W).T
        theta = (z.detach().gather(1, y[:, None])[:, 0] / 6.0).acos()
        lowered = torch.tensor([[6.0 * phi(angle)] for angle in theta.tolist()], dtype=torch.float64)
        lowered = z.detach().scatter(1, y[:, None], lowered)
        one_hot = F.one_hot(y, len(W))
        (expected,) = torch.autograd.grad((z * (lowered.softmax(dim=1) - one_hot)).sum(), x)
        close(gradient, expected)


@all_cases
def test_slopes_at_the_ends(case: Case) -> None:
    """At cos = +-1 the oracle follows `Margin`: the exact value, the slope one eps inside.

    Written twice, so not the same to the last digit: sin(theta) = sqrt(2 eps) keeps half of the digits.
    """
    if type(case.make()) in reference.WITHOUT_MARGIN:
        return
    for dtype, rtol in ((torch.float64, 1e-6), (torch.float32, 1e-2)):
        margin = case.make()
        eps = torch.finfo(dtype).eps
        c = torch.tensor([1.0, -1.0, 1.0 - eps / 2, 1.0 + eps, 0.3], dtype=dtype, requires_grad=True)
        found = reference.TARGET_COSINE[type(margin)](margin, c)
        (slope,) = torch.autograd.grad(found.sum(), c)
        assert slope.isfinite().all()
        scale = torch.ones_like(c)
        again = margin.target_logit(TargetRows(c, scale, scale, scale, torch.zeros_like(c, dtype=torch.int64)))
        (expected,) = torch.autograd.grad(again.sum(), c)
        torch.testing.assert_close(slope, expected, rtol=rtol, atol=rtol)
        for value in (found, reference.TARGET_COSINE[type(margin)](margin, c.detach())):
            close(value.detach()[[0, 1, 3]], [case.phi(0.0), case.phi(pi), case.phi(0.0)], rtol=32 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@all_cases
def test_rows_on_their_class_and_opposite(case: Case, dtype: torch.dtype) -> None:
    """x = 2 w and x = -2 w: everything finite, and along a unit row nothing is left of the target's gradient."""
    w = W.to(dtype).requires_grad_()
    x = torch.stack([2 * w.detach()[0], -2 * w.detach()[3]]).requires_grad_()
    loss = reference.margin_cross_entropy(x, w, torch.tensor([0, 3]), case.make(), objective="hinge", reduction="sum")
    for gradient in torch.autograd.grad(loss, (x, w)):
        assert gradient.isfinite().all()


def test_learnable_number_and_scale() -> None:
    """A Parameter in the place of m or s gets its gradient."""
    m = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)

    def loss(m: Tensor, s: Tensor) -> Tensor:
        margin = ArcFace()
        margin.m, margin.s = m, s
        return reference.margin_cross_entropy(X, W, torch.tensor(Y), margin)

    assert torch.autograd.gradcheck(loss, (m, s))
