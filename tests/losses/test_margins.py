"""The margins: values, slopes and switch points against `math`."""

from __future__ import annotations

import itertools
import math
from math import cos, pi, sin

import numpy as np
import pytest
import torch
from cosines import GRID, NORMFACE, W_NORM, all_cases, close, slopes, target_cosine
from formulas import CASES, Case, combination, combined, psi
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonmargin.margins import (
    MARGINS,
    ArcFace,
    ASoftmax,
    CombinedMargin,
    CosFace,
    LSoftmax,
    SphereFaceR,
    TargetRows,
)
from tritonmargin.margins.angular import BEYOND_PI

with_switches = pytest.mark.parametrize("case", [c for c in CASES if c.switches], ids=lambda case: case.name)


# -- values --------------------------------------------------------------------------------------------------------


def test_every_margin_has_a_case() -> None:
    assert {type(case.make()).__name__ for case in CASES} == set(MARGINS)


@all_cases
def test_values(case: Case) -> None:
    close(target_cosine(case.make(), case, GRID), [case.phi(math.acos(c)) for c in GRID], atol=1e-13)


@all_cases
def test_values_in_float32(case: Case) -> None:
    exact = [float(np.float32(c)) for c in GRID]
    away = [c for c in exact if all(abs(math.acos(c) - theta) > 1e-5 for theta in case.switches)]
    assert len(away) >= len(GRID) - 2
    # theta in [0, pi] has an absolute error of 2.4e-7 at most, which phi multiplies by m <= 4.
    close(target_cosine(case.make(), case, away, torch.float32), [case.phi(math.acos(c)) for c in away], atol=3e-6)


@with_switches
def test_values_around_switches(case: Case) -> None:
    near = [theta + side for theta in case.switches for side in (-1e-9, 1e-9)]
    close(
        target_cosine(case.make(), case, [cos(theta) for theta in near]),
        [case.phi(theta) for theta in near],
        atol=1e-13,
    )
    at = target_cosine(case.make(), case, [cos(theta) for theta in case.switches]).tolist()
    for value, theta in zip(at, case.switches, strict=True):  # rounding decides which piece, nothing else is possible
        assert min(abs(value - case.phi(theta + side)) for side in (-1e-9, 1e-9)) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_switch_point_itself(dtype: torch.dtype) -> None:
    """arccos(0) + pi/2 is pi in floating point too: the strict theta + m > pi does not hold. Nor does cos > 0."""
    for kind, numbers in ((ArcFace, {"m": pi / 2}), (CombinedMargin, {"m1": 2.0}), (CombinedMargin, {"m2": pi / 2})):
        for beyond_pi, phi in (("cos-mm", -1.0), ("continuous", -1.0), ("clip", -1.0), ("raw", -1.0), ("easy", 0.0)):
            margin = kind(**numbers, beyond_pi=beyond_pi)
            close(target_cosine(margin, NORMFACE, [0.0], dtype), [phi], atol=1e-7 if dtype == torch.float32 else 1e-15)
    for kind in (LSoftmax, SphereFaceR):  # theta = pi is the end of the last piece, not the start of another one
        close(target_cosine(kind(4), NORMFACE, [0.0, -1.0], dtype), [-3.0, -7.0], atol=1e-6)


@all_cases
def test_values_where_rounding_leaves_the_interval(case: Case) -> None:
    eps = torch.finfo(torch.float64).eps
    beyond = target_cosine(case.make(), case, [1 + eps, -1 - eps, 1 + 8 * eps])
    close(beyond, [case.phi(0.0), case.phi(pi), case.phi(0.0)], atol=1e-13)
    assert slopes(case.make(), case, [1 + eps, -1 - eps, 1 + 8 * eps]).isfinite().all()


@pytest.mark.parametrize("beyond_pi", BEYOND_PI)
def test_every_combination(beyond_pi: str) -> None:
    for m1, m2, m3 in itertools.product((0.5, 0.9, 1.0, 1.1, 1.35, 3.0), (0.0, 0.3, 1.2, pi), (0.0, 0.2)):
        case = combination(m1, m2, m3, beyond_pi)
        # m2 = pi has its switch at theta = 0, m1 = 0.5 at theta0 = 2 pi - 2 m2, m1 = m2 = .. at pi: keep off it.
        grid = [c for c in GRID if abs(m1 * math.acos(c) + m2 - pi) > 1e-9]
        close(target_cosine(case.make(), case, grid), [case.phi(math.acos(c)) for c in grid], atol=1e-13)
        assert slopes(case.make(), case, GRID).isfinite().all()


def test_arcface_and_cosface_are_combinations() -> None:
    case = NORMFACE
    for beyond_pi in BEYOND_PI:
        for m in (0.0, 0.5, 2.0):
            arc, same = ArcFace(m, beyond_pi=beyond_pi), CombinedMargin(1.0, m, 0.0, beyond_pi=beyond_pi)
            assert torch.equal(target_cosine(arc, case, GRID), target_cosine(same, case, GRID))
    one = target_cosine(CosFace(0.3), case, GRID)
    close(target_cosine(CombinedMargin(m3=0.3), case, GRID), one.tolist(), atol=1e-14)


def test_numbers_known_by_heart() -> None:
    third, right = cos(pi / 3), 0.0
    unit = NORMFACE
    close(target_cosine(ArcFace(pi / 6), unit, [third, right]), [0.0, -0.5], atol=1e-15)
    close(target_cosine(ArcFace(pi / 2, beyond_pi="continuous"), unit, [-0.5]), [-1.5], atol=1e-15)
    close(target_cosine(ArcFace(pi / 2, beyond_pi="cos-mm"), unit, [-0.5]), [-0.5 - pi / 2], atol=1e-15)
    close(target_cosine(ArcFace(pi / 2, beyond_pi="raw"), unit, [-1.0]), [0.0], atol=1e-15)
    close(target_cosine(ArcFace(pi / 2, beyond_pi="clip"), unit, [-0.5]), [-1.0], atol=1e-15)
    close(target_cosine(ArcFace(pi / 3, beyond_pi="easy"), unit, [third, -third]), [-0.5, -0.5], atol=1e-15)
    close(target_cosine(CombinedMargin(2.0, 0.0, 0.25), unit, [third]), [-0.75], atol=1e-15)
    close(target_cosine(SphereFaceR(2.0), unit, [third, right, -1.0]), [-0.5, -1.0, -3.0], atol=1e-15)
    close(target_cosine(SphereFaceR(4.0), unit, [1.0, third, right, -1.0]), [1.0, -1.5, -3.0, -7.0], atol=3e-15)


# -- slopes --------------------------------------------------------------------------------------------------------


@all_cases
def test_slopes(case: Case) -> None:
    """Against central differences of the `math` formula, in cos. Their error is h^2 phi'''/6, and eps/h."""
    h = 1e-6
    kinks = [cos(theta) for theta in case.switches]
    away = [c for c in np.linspace(-0.98, 0.98, 99).tolist() if all(abs(c - kink) > 1e-4 for kink in kinks)]
    expected = [(case.phi(math.acos(c + h)) - case.phi(math.acos(c - h))) / (2 * h) for c in away]
    close(slopes(case.make(), case, away), expected, rtol=1e-7, atol=3e-9)


@with_switches
def test_slopes_on_both_sides_of_switches(case: Case) -> None:
    """One-sided differences, second order, so that nothing is read from the other piece."""
    h, margin = 1e-6, case.make()
    for theta in case.switches:
        for side in (-1.0, 1.0):
            c = cos(theta) - side * 1e-8  # cos falls: side +1 is behind the switch
            step = -side * h
            at, one, two = (case.phi(math.acos(c + k * step)) for k in (0, 1, 2))
            expected = (4 * one - 3 * at - two) / (2 * step)
            close(slopes(margin, case, [c]), [expected], rtol=1e-6, atol=1e-8)


def test_slopes_in_closed_form() -> None:
    unit, m = NORMFACE, 0.5
    thetas = [0.2, 1.0, 2.0, 2.6]
    cosines = [cos(theta) for theta in thetas]
    close(slopes(ArcFace(m), unit, cosines), [sin(theta + m) / sin(theta) for theta in thetas], rtol=1e-13)
    close(slopes(CosFace(), unit, cosines), [1.0] * 4)
    past = [-0.9, -0.95]  # beyond pi - 0.5
    for beyond_pi, expected in (("cos-mm", 1.0), ("continuous", 1.0), ("easy", 1.0), ("clip", 0.0)):
        close(slopes(ArcFace(m, beyond_pi=beyond_pi), unit, past), [expected] * 2)
    assert (slopes(ArcFace(m, beyond_pi="raw"), unit, past) < 0).all()  # the wrong sign, as documented


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@all_cases
def test_slopes_at_the_ends(case: Case, dtype: torch.dtype) -> None:
    """Finite at cos = +-1, where an arccos has an infinite slope, and the same as eps inside."""
    eps = torch.finfo(dtype).eps
    ends = slopes(case.make(), case, [1.0, -1.0], dtype)
    assert ends.isfinite().all()
    # A margin without an arccos has its own slope at the end; over one eps it changes by less than 1e-5.
    inside = slopes(case.make(), case, [1.0 - eps, -1.0 + eps], dtype)
    torch.testing.assert_close(ends, inside, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_multiplicative_slope_at_the_ends_is_m_squared(m: int, dtype: torch.dtype) -> None:
    lsoftmax = next(case for case in CASES if case.name == "LSoftmax(1, lam=0.0)")
    rtol = 64 * torch.finfo(dtype).eps
    close(slopes(LSoftmax(m), lsoftmax, [1.0, -1.0], dtype), [m * m] * 2, rtol=rtol)
    close(slopes(LSoftmax(m, lam=3.0), lsoftmax, [1.0, -1.0], dtype), [(3 + m * m) / 4] * 2, rtol=rtol)
    # Through the arccos, one eps inside: at theta = pi, m theta has an absolute error of eps m pi against
    # sin(theta) = sqrt(2 eps), so half of the digits are good.
    close(slopes(SphereFaceR(float(m)), NORMFACE, [1.0, -1.0], dtype), [m * m] * 2, rtol=8 * math.sqrt(rtol))


@pytest.mark.parametrize(
    "make",
    [
        lambda gradient: ArcFace(0.5, gradient=gradient),
        lambda gradient: ArcFace(0.5, beyond_pi="clip", gradient=gradient),
        lambda gradient: CombinedMargin(1.1, 0.3, 0.2, beyond_pi="raw", gradient=gradient),
        lambda gradient: SphereFaceR(1.7, gradient=gradient),
    ],
    ids=["ArcFace", "ArcFace clip", "CombinedMargin", "SphereFaceR"],
)
def test_straight_through(make) -> None:
    """The same values, and slope 1 in phi (s in t) everywhere, at the ends too."""
    exact, through = make("exact"), make("straight-through")
    close(target_cosine(through, NORMFACE, GRID), target_cosine(exact, NORMFACE, GRID).tolist(), atol=1e-15)
    close(slopes(through, NORMFACE, GRID), [1.0] * len(GRID))
    assert not torch.allclose(slopes(exact, NORMFACE, GRID), torch.ones(len(GRID), dtype=torch.float64))


def test_gradient_reaches_the_norms_that_are_not_divided_out() -> None:
    """t = |x||w| psi for L-Softmax: the scale is part of the formula, so dt/d|x| at a fixed angle is |w| psi."""
    c = torch.tensor([0.3, -0.8], dtype=torch.float64)
    x_norm = torch.tensor([1.7, 0.4], dtype=torch.float64, requires_grad=True)
    scale = x_norm * W_NORM
    found = LSoftmax(3).target_logit(TargetRows(scale * c, x_norm, c, scale, c.long()))
    (slope,) = torch.autograd.grad(found.sum(), x_norm)
    close(slope, [W_NORM * psi(math.acos(value), 3) for value in c.tolist()], rtol=1e-13)


def test_zero_rows_have_cosine_zero() -> None:
    """A row of norm 0 has scale 0 and product 0: nothing divides by it, forward or backward."""
    product = torch.tensor([0.0, 1.5], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.0, 3.0], dtype=torch.float64, requires_grad=True)
    rows = TargetRows(product, scale, torch.ones_like(scale), scale, torch.zeros(2, dtype=torch.int64))
    close(rows.cos, [0.0, 0.5])
    for margin in (LSoftmax(4), ASoftmax(3)):
        t = margin.target_logit(rows)
        assert t[0] == 0
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(t.sum(), (product, scale)))


# -- shape ---------------------------------------------------------------------------------------------------------


@all_cases
def test_falls_with_theta(case: Case) -> None:
    """A harder sample never gets a higher target logit, except in the two variants that are documented to do so."""
    cosines = torch.cos(torch.linspace(0.0, pi, 4001, dtype=torch.float64)).tolist()
    falls = bool((target_cosine(case.make(), case, cosines).diff() <= 1e-14).all())
    assert falls == case.falls


@all_cases
def test_never_above_the_true_cosine(case: Case) -> None:
    """A margin makes the own class harder, never easier; m1 < 1 alone is allowed to raise it."""
    if case.name.startswith("CombinedMargin(0.9"):
        return
    # From pi - m/2 on, the raw cos(theta + m) is above cos theta.
    grid = [c for c in GRID if case.name != "ArcFace(0.5, raw)" or math.acos(c) < pi - 0.25]
    cosines = torch.tensor(grid, dtype=torch.float64)
    assert (target_cosine(case.make(), case, grid) <= cosines + 1e-14).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    m1=st.floats(0.2, 4.0),
    m2=st.floats(0.0, pi),
    m3=st.floats(0.0, 1.0),
    theta=st.floats(0.0, pi),
    beyond_pi=st.sampled_from(BEYOND_PI),
)
def test_any_combination(m1: float, m2: float, m3: float, theta: float, beyond_pi: str) -> None:
    case, c = combination(m1, m2, m3, beyond_pi), cos(theta)
    theta = math.acos(c)
    margin = case.make()
    assert slopes(margin, case, [c]).isfinite().all()
    if all(abs(theta - switch) > 1e-9 for switch in case.switches):
        close(target_cosine(margin, case, [c]), [combined(theta, m1, m2, m3, beyond_pi)], atol=1e-13)
    if beyond_pi in ("continuous", "clip"):
        cosines = torch.cos(torch.linspace(0.0, pi, 301, dtype=torch.float64)).tolist()
        assert (target_cosine(margin, case, cosines).diff() <= 1e-13).all()
