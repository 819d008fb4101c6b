"""The oracle itself: against `math` on single numbers, PyTorch's own losses and pytorch-metric-learning."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from math import cos, pi, sin

import pytest
import torch
import torch.nn.functional as F
from cases import made
from formulas import CASES, Case, arcface, combination, sphereface_r, unnormalised
from pytorch_metric_learning import losses as pml
from torch import Tensor

import tritonmargin
from tritonmargin import reference
from tritonmargin.margins import (
    MARGINS,
    ArcFace,
    ASoftmax,
    CombinedMargin,
    CosFace,
    L2Softmax,
    LSoftmax,
    Margin,
    NormFace,
    Softmax,
    SphereFaceR,
    TargetRows,
)

OBJECTIVES = ("softmax", "lse-hinge", "max-hinge", "hinge")
IGNORE = -100
all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
objectives = pytest.mark.parametrize("objective", OBJECTIVES)


def close(actual: Tensor, expected: Tensor | list[float] | float, rtol: float = 1e-12) -> None:
    """Equal up to rtol of the largest entry: an entry that is a cancelled sum has no relative precision of its own."""
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    largest = wanted[wanted.isfinite()].abs().max().item() if wanted.isfinite().any() else 0.0
    torch.testing.assert_close(actual.double(), wanted, rtol=0.0, atol=rtol * largest, equal_nan=True)


def at_angles(thetas: list[float], norm: float = 1.5, dim: int = 3) -> Tensor:
    """Embeddings at these angles from the first axis."""
    rows = torch.zeros(len(thetas), dim, dtype=torch.float64)
    rows[:, 0] = torch.tensor([norm * cos(theta) for theta in thetas], dtype=torch.float64)
    rows[:, 1] = torch.tensor([norm * sin(theta) for theta in thetas], dtype=torch.float64)
    return rows


# -- by hand -------------------------------------------------------------------------------------------------------


def by_hand(
    case: Case,
    x: Tensor,
    w: Tensor,
    y: list[int],
    *,
    objective: str = "softmax",
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    class_ids: Tensor | None = None,
    ignore_index: int = IGNORE,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> list[float] | float:
    """The loss with Python's floats, a sample and a class at a time."""
    ids = range(len(w)) if class_ids is None else class_ids.tolist()
    b = [0.0] * len(w) if bias is None else bias.tolist()
    a = [1.0] * len(w) if class_weight is None else class_weight.tolist()
    total, losses = [], []
    for row, label in zip(x.tolist(), y, strict=True):
        if label == ignore_index:
            losses.append(0.0)
            continue
        z = {}
        for j in ids:
            class_row = w[j].tolist()
            x_norm, w_norm = math.hypot(*row), math.hypot(*class_row)
            c = math.fsum(p * q for p, q in zip(row, class_row, strict=True)) / (x_norm * w_norm)
            phi = case.phi(math.acos(max(-1.0, min(1.0, c)))) if j == label else c
            z[j] = case.scale(x_norm, w_norm) * phi + b[j]
        t, others = z[label], [z[j] for j in ids if j != label]
        log_sum = math.log(math.fsum(math.exp(value - t) for value in z.values())) + t
        loss = {
            "softmax": lambda t=t, log_sum=log_sum: log_sum - t,
            "lse-hinge": lambda t=t, others=others: max(0.0, math.log(math.fsum(map(math.exp, others))) - t),
            "max-hinge": lambda t=t, others=others: max(0.0, max(others) - t),
            "hinge": lambda t=t, others=others: math.fsum(max(0.0, value - t) for value in others),
        }[objective]()
        spread = math.fsum(a[j] * (log_sum - z[j]) for j in ids) / len(ids)
        losses.append((1 - label_smoothing) * a[label] * loss + label_smoothing * spread)
        total.append(a[label])
    if reduction == "none":
        return losses
    return math.fsum(losses) if reduction == "sum" else math.fsum(losses) / math.fsum(total)


X, W = made(5, 3, seed=1), made(6, 3, seed=2)
Y = [2, 0, 5, 2, 4]


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
