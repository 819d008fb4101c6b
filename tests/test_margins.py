"""The margins: values, slopes and switch points against `math`, and how their numbers are kept and changed."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import pickle
import re
from math import cos, pi, sin

import numpy as np
import pytest
import torch
from formulas import CASES, Case, annealed, combination, combined, psi
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritonmargin.margins import (
    MARGINS,
    Annealing,
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
    WarmUp,
)
from tritonmargin.margins.angular import BEYOND_PI

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
with_switches = pytest.mark.parametrize("case", [c for c in CASES if c.switches], ids=lambda case: case.name)
NORMFACE = CASES[2]  # the rows of every margin with unit rows on both sides
GRID = [-1.0, *np.linspace(-0.9995, 0.9995, 101).tolist(), 1.0]
X_NORM, W_NORM = 1.7, 2.3  # of the embedding and the class row; they enter where a loss does not divide them out


def rows(cosines: Tensor, case: Case) -> TargetRows:
    scale = case.scale(X_NORM, W_NORM)
    return TargetRows(
        product=scale * cosines,
        embedding_norm=torch.full_like(cosines, X_NORM),
        weight_norm=torch.full_like(cosines, W_NORM),
        scale=scale if case.unit_embeddings and case.unit_weight else torch.full_like(cosines, scale),
        target=torch.zeros(len(cosines), dtype=torch.int64),
    )


def target_cosine(margin: Margin, case: Case, cosines: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    """phi = t/scale."""
    return margin.target_logit(rows(torch.tensor(cosines, dtype=dtype), case)) / case.scale(X_NORM, W_NORM)


def slopes(margin: Margin, case: Case, cosines: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    """d phi/d cos by autograd."""
    c = torch.tensor(cosines, dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(margin.target_logit(rows(c, case)).sum(), c)
    return slope / case.scale(X_NORM, W_NORM)


def close(actual: Tensor, expected: list[float], rtol: float = 0.0, atol: float = 0.0) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol)


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


# -- numbers that change -------------------------------------------------------------------------------------------


def test_warm_up() -> None:
    warm = WarmUp(0.1, 0.5, steps=4)
    assert [warm(step) for step in (-3, 0, 1, 2, 4, 100)] == pytest.approx([0.1, 0.1, 0.2, 0.3, 0.5, 0.5], rel=1e-15)
    assert WarmUp(0.0, 0.3, steps=0)(0) == 0.3
    assert WarmUp(0.5, 0.1, steps=2)(1) == pytest.approx(0.3)  # downwards too
    with pytest.raises(ValueError, match="steps must be >= 0, got -1"):
        WarmUp(0.0, 0.3, steps=-1)


def test_annealing() -> None:
    sphereface = Annealing()
    assert sphereface(0) == 1000.0
    assert sphereface(-5) == 1000.0
    assert sphereface(10) == pytest.approx(1000 / 2.2, rel=1e-15)
    assert sphereface(10**6) == 5.0
    lsoftmax = Annealing(1000, 2.5e-5, 35, 0)
    assert lsoftmax(40_000) == pytest.approx(1000 / 2**35, rel=1e-12)
    for wrong in ({"base": -1}, {"gamma": -0.1}, {"minimum": -5}):
        with pytest.raises(ValueError, match="must be >= 0"):
            Annealing(**wrong)


def test_schedule_changes_the_value_and_nothing_else() -> None:
    margin = ArcFace(0.5).with_schedule(m=WarmUp(0.0, 0.5, steps=10))
    assert isinstance(margin, ArcFace)
    assert float(margin.m) == 0.5  # attached, not applied
    buffer = margin.m
    unit = NORMFACE
    for step, m in ((0, 0.0), (4, 0.2), (10, 0.5), (11, 0.5), (4, 0.2)):  # a function of the step: back works too
        margin.schedule(step)
        assert margin.m is buffer
        close(target_cosine(margin, unit, [0.2, 0.6]), [cos(math.acos(c) + m) for c in (0.2, 0.6)], atol=1e-15)


def test_schedule_of_lambda_and_of_several_numbers() -> None:
    margin = ASoftmax(4).with_schedule(lam=Annealing())
    asoftmax = next(case for case in CASES if case.name.startswith("ASoftmax"))
    for step in (0, 10, 10**6):
        margin.schedule(step)
        expected = [annealed(math.acos(c), 4, Annealing()(step)) for c in (0.9, -0.3)]
        close(target_cosine(margin, asoftmax, [0.9, -0.3]), expected, atol=1e-14)
    both = CombinedMargin().with_schedule(m2=WarmUp(0, 0.3, 3), m3=WarmUp(0, 0.2, 2))
    both.schedule(1)
    assert (float(both.m1), float(both.m2), float(both.m3)) == (1.0, pytest.approx(0.1), pytest.approx(0.1))


def test_schedule_errors() -> None:
    with pytest.raises(ValueError, match="ArcFace has no number 'margin' to schedule; it has: m"):
        ArcFace().with_schedule(margin=WarmUp(0, 1, 2))
    with pytest.raises(ValueError, match="it has: m1, m2, m3"):
        CombinedMargin().with_schedule(m4=WarmUp(0, 1, 2))
    with pytest.raises(ValueError, match="NormFace has no number 's' to schedule; it has: none"):
        NormFace().with_schedule(s=WarmUp(0, 1, 2))
    with pytest.raises(ValueError, match="it has: lam"):
        LSoftmax(4).with_schedule(m=WarmUp(1, 4, 2))
    margin = ArcFace().with_schedule(m=lambda step: -1.0)
    with pytest.raises(ValueError, match=r"0 <= m <= pi, got -1\.0"):
        margin.schedule(0)
    assert float(margin.m) == 0.5


def test_a_margin_without_schedules_ignores_the_step() -> None:
    margin = CosFace(0.2)
    margin.schedule(1000)
    assert float(margin.m) == 0.2


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_numbers_survive_deferred_initialisation(where: str) -> None:
    """`to_empty` gives every tensor of a model new memory with any content; a margin's numbers are not parameters."""
    with torch.device(where):
        margin = CombinedMargin(m1=1.0, m2=0.35, m3=0.1)
    margin.m3 = 0.2
    assert "m2=0.35, m3=0.2" in repr(margin)
    margin.to_empty(device="cpu")
    assert [float(number) for number in (margin.m1, margin.m2, margin.m3)] == [1.0, 0.35, 0.2]
    assert margin.m2.dtype == torch.float64


def test_a_margins_own_buffers_are_its_own_business() -> None:
    """What `number` did not register is neither shown nor kept: it may have any shape, and no value on meta."""

    class Counting(CosFace):
        def __init__(self) -> None:
            super().__init__(m=0.2)
            self.register_buffer("seen", torch.zeros(3), persistent=False)

    with torch.device("meta"):
        margin = Counting()
    assert "seen" not in repr(margin)
    margin.to_empty(device="cpu")
    assert margin.seen.shape == (3,)
    assert float(margin.m) == 0.2
    assert Counting().half().seen.dtype == torch.float16


@pytest.mark.parametrize("change", ["half", "bfloat16", "float"])
def test_numbers_keep_their_precision(change: str) -> None:
    """A model in half precision must not round m = 0.35 to 0.3501."""
    for margin, name, value in (
        (CosFace(0.35), "m", 0.35),
        (CombinedMargin(m2=0.3), "m2", 0.3),
        (ASoftmax(lam=0.1), "lam", 0.1),
    ):
        getattr(torch.nn.Sequential(margin), change)()
        number = getattr(margin, name)
        assert number.dtype == torch.float64
        assert float(number) == value
        setattr(margin, name, 0.7)
        assert float(getattr(margin, name)) == 0.7


@all_cases
def test_checkpoints_hold_no_numbers(case: Case) -> None:
    margin = case.make()
    assert margin.state_dict() == {}
    assert list(margin.parameters()) == []
    margin.load_state_dict({}, strict=True)


@all_cases
def test_copies(case: Case) -> None:
    margin = case.make()
    for twin in (copy.deepcopy(margin), pickle.loads(pickle.dumps(margin))):
        assert repr(twin) == repr(margin)
        assert torch.equal(target_cosine(twin, case, GRID), target_cosine(margin, case, GRID))


def test_copies_keep_schedules_and_are_independent() -> None:
    margin = ArcFace(0.5).with_schedule(m=WarmUp(0.0, 0.5, steps=10))
    for twin in (copy.deepcopy(margin), pickle.loads(pickle.dumps(margin))):
        twin.schedule(4)
        assert float(twin.m) == pytest.approx(0.2)
        assert float(margin.m) == 0.5


def test_repr() -> None:
    assert repr(Softmax()) == "Softmax()"
    assert repr(L2Softmax(s=8)) == "L2Softmax(s=8)"
    assert repr(NormFace()) == "NormFace(s=64)"
    assert repr(CosFace(0.4, s=32)) == "CosFace(m=0.4, s=32)"
    assert repr(ArcFace()) == "ArcFace(m=0.5, s=64, beyond_pi='cos-mm', gradient='exact')"
    assert repr(CombinedMargin(1.1, 0.3, 0.2, beyond_pi="raw", gradient="straight-through")) == (
        "CombinedMargin(m1=1.1, m2=0.3, m3=0.2, s=64, beyond_pi='raw', gradient='straight-through')"
    )
    assert repr(LSoftmax(3, lam=5)) == "LSoftmax(m=3, lam=5)"
    assert repr(ASoftmax()) == "ASoftmax(m=4, lam=0)"
    assert repr(SphereFaceR()) == "SphereFaceR(m=1.7, s=64, gradient='exact')"
    margin = CosFace(0.4)
    margin.m = 0.25
    assert repr(margin) == "CosFace(m=0.25, s=64)"


def test_logit_bound() -> None:
    """s where both sides are unit rows, inf where nothing bounds the logits."""
    for case in CASES:
        margin = case.make()
        assert (margin.unit_embeddings, margin.unit_weight) == (case.unit_embeddings, case.unit_weight)
        assert margin.logit_bound == (margin.s if case.unit_embeddings and case.unit_weight else math.inf)
    margin = NormFace(20)
    margin.s = 32
    assert (margin.s, margin.logit_bound) == (32.0, 32.0)
    learnable = NormFace()
    learnable.s = torch.tensor(3.0)
    assert learnable.logit_bound == math.inf


# -- bad numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0, -64.0, math.nan, math.inf, "64", None, True])
@pytest.mark.parametrize("name", ["L2Softmax", "NormFace", "CosFace", "ArcFace", "CombinedMargin", "SphereFaceR"])
def test_bad_scale(name: str, s: object) -> None:
    with pytest.raises(ValueError, match="s must be a finite number > 0, got"):
        MARGINS[name](s=s)
    margin = MARGINS[name]()
    with pytest.raises(ValueError, match="s must be a finite number > 0, got"):
        margin.s = s
    assert margin.s == 64.0


@pytest.mark.parametrize("beyond", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "number"),
    [("CosFace", "m"), ("ArcFace", "m"), ("CombinedMargin", "m1"), ("CombinedMargin", "m2"), ("CombinedMargin", "m3"),
     ("LSoftmax", "lam"), ("ASoftmax", "lam"), ("SphereFaceR", "m")],
)  # fmt: skip
def test_numbers_must_be_finite(name: str, number: str, beyond: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: {number} must be a finite number, got"):
        MARGINS[name](**{number: beyond})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ArcFace(28.6), "m is an angle in radians, 0 <= m <= pi, got 28.6; degrees are not converted"),
        (lambda: ArcFace(-0.1), "0 <= m <= pi, got -0.1"),
        (lambda: CombinedMargin(m1=0.0), "m1 must be > 0, got 0.0"),
        (lambda: CombinedMargin(m1=-1.0), "m1 must be > 0, got -1.0"),
        (lambda: CombinedMargin(m2=30), "m2 is an angle in radians, 0 <= m2 <= pi, got 30"),
        (lambda: CombinedMargin(m2=-0.5), "0 <= m2 <= pi, got -0.5"),
        (lambda: CombinedMargin(m3=-0.2), "m3 must be >= 0, got -0.2"),
        (lambda: LSoftmax(0), "LSoftmax: m must be an integer >= 1, got 0"),
        (lambda: LSoftmax(2.5), "LSoftmax: m must be an integer >= 1, got 2.5"),
        (lambda: LSoftmax(True), "LSoftmax: m must be an integer >= 1, got True"),
        (lambda: ASoftmax(-1), "ASoftmax: m must be an integer >= 1, got -1"),
        (lambda: ASoftmax(4, lam=-1), "lam must be >= 0, got -1"),
        (lambda: SphereFaceR(0.9), "SphereFaceR: m must be >= 1, got 0.9"),
    ],
)
def test_bad_numbers(make, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_a_bad_assignment_leaves_the_number() -> None:
    margin = ArcFace(0.5)
    with pytest.raises(ValueError, match="0 <= m <= pi"):
        margin.m = 4.0
    assert float(margin.m) == 0.5


@pytest.mark.parametrize("make", [ArcFace, CombinedMargin])
def test_unknown_beyond_pi(make: type[Margin]) -> None:
    message = "beyond_pi must be one of 'cos-mm', 'continuous', 'raw', 'easy', 'clip', got 'cosmm'"
    with pytest.raises(ValueError, match=message):
        make(beyond_pi="cosmm")


@pytest.mark.parametrize("make", [ArcFace, CombinedMargin, SphereFaceR])
def test_unknown_gradient(make: type[Margin]) -> None:
    message = "gradient must be one of 'exact', 'straight-through', got 'straight_through'"
    with pytest.raises(ValueError, match=message):
        make(gradient="straight_through")


# -- a user's own --------------------------------------------------------------------------------------------------


class Halved(Margin):
    """The example of `Margin`'s docstring."""

    def target_cosine(self, cos: Tensor) -> Tensor:
        return cos - 0.2 * (1 + cos)


def test_own_margin() -> None:
    unit = NORMFACE
    margin = Halved(s=10)
    close(target_cosine(margin, unit, [1.0, 0.0, -1.0]), [0.6, -0.2, -1.0], atol=1e-15)
    close(slopes(margin, unit, [1.0, 0.0, -1.0]), [0.8] * 3, rtol=1e-15)
    margin.gradient = "straight-through"
    close(slopes(margin, unit, [0.3]), [1.0])


def test_own_margin_needs_a_formula() -> None:
    class Nothing(Margin):
        pass

    with pytest.raises(NotImplementedError, match="Nothing must override target_cosine or target_logit"):
        target_cosine(Nothing(), NORMFACE, [0.5])


def test_an_override_of_an_angular_margin_is_kept_inside_too() -> None:
    class Mine(ArcFace):
        def target_cosine(self, cos: Tensor) -> Tensor:
            return super().target_cosine(cos) - 0.1 * torch.acos(cos)

    unit, at = NORMFACE, [1.0, -1.0, 0.5]
    expected = target_cosine(ArcFace(0.5), unit, at) - 0.1 * torch.acos(torch.tensor(at, dtype=torch.float64))
    close(target_cosine(Mine(0.5), unit, at), expected.tolist(), atol=1e-15)
    assert torch.isfinite(slopes(Mine(0.5), unit, at)).all()


@pytest.mark.parametrize("margin", [ArcFace(0.5, s=1.0), CombinedMargin(1.1, 0.4, 0.1, s=1.0)], ids=repr)
def test_what_torch_func_and_forward_mode_ask_of_a_slope_that_is_written_out(margin: Margin) -> None:
    """The number's gradient under vmap, a derivative forward, an override that looks like what it overrides."""
    name = "m" if isinstance(margin, ArcFace) else "m2"
    at = torch.tensor([0.3, -0.9, 0.8], dtype=torch.float64)
    numbers = torch.tensor([0.2, 0.5], dtype=torch.float64)

    class Sum(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.margin = margin

        def forward(self, c: Tensor) -> Tensor:
            return self.margin.target_logit(rows(c, NORMFACE)).sum()

    def of_number(number: Tensor) -> Tensor:
        return torch.func.functional_call(Sum(), {f"margin.{name}": number}, (at,))

    def all_numbers(numbers: Tensor) -> Tensor:
        return torch.func.vmap(of_number)(numbers).sum()

    one_by_one = torch.func.vmap(torch.func.grad(of_number))(numbers)
    torch.testing.assert_close(torch.func.grad(all_numbers)(numbers), one_by_one)
    assert (torch.func.grad(all_numbers)(numbers) < 0.0).all()
    _, forward = torch.func.jvp(lambda c: margin.target_logit(rows(c, NORMFACE)), (at,), (torch.ones_like(at),))
    c = at.clone().requires_grad_()
    (backward,) = torch.autograd.grad(margin.target_logit(rows(c, NORMFACE)).sum(), c)
    torch.testing.assert_close(forward, backward)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(at, torch.ones_like(at))
        t = margin.target_logit(rows(dual, NORMFACE))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(t).tangent, forward)

    class Alike(type(margin)):
        @functools.wraps(type(margin).target_cosine)
        def target_cosine(self, cos: Tensor) -> Tensor:
            return torch.cos(torch.acos(cos) + 0.5)

    assert torch.isfinite(slopes(Alike(s=1.0), NORMFACE, [1.0, -1.0])).all()


def test_learnable_margin() -> None:
    """A Parameter in the place of a number gets a gradient: d/dm cos(theta + m) = -sin(theta + m)."""
    margin = ArcFace(0.5, s=10.0)
    margin.m = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    angles = [1.1, 2.0]
    t = target_cosine(margin, NORMFACE, [cos(theta) for theta in angles])
    (slope,) = torch.autograd.grad(t.sum(), margin.m)
    assert float(slope) == pytest.approx(-sum(sin(theta + 0.5) for theta in angles), rel=1e-14)
    # At cos = 1 it is taken where the slope in cos is, one eps inside: theta = sqrt(2 eps) = 2.1e-8 instead of 0.
    (slope,) = torch.autograd.grad(target_cosine(margin, NORMFACE, [1.0]).sum(), margin.m)
    assert float(slope) == pytest.approx(-sin(0.5), rel=1e-7)


def test_margins_at_the_edge_of_their_range_are_accepted():
    assert float(ArcFace(m=math.pi).m) == math.pi
    assert float(ArcFace(m=0.0).m) == 0.0
    assert float(CombinedMargin(m2=math.pi, m3=0.0).m2) == math.pi
    assert Annealing(base=0.0, gamma=0.0, minimum=0.0)(3) == 0.0
    assert WarmUp(0.0, 1.0, steps=0)(0) == 1.0


@pytest.mark.parametrize("schedule", [WarmUp(0.0, 1.0, steps=3), Annealing()])
def test_schedules_cannot_change_under_way(schedule):
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.power = 2.0


def test_choices_are_checked_when_they_change():
    margin = ArcFace()
    with pytest.raises(ValueError, match="beyond_pi must be one of 'cos-mm'"):
        margin.beyond_pi = "nonsense"
    with pytest.raises(ValueError, match="gradient must be one of 'exact', 'straight-through', got 'straight_through'"):
        margin.gradient = "straight_through"
    margin.beyond_pi = "clip"
    assert margin.beyond_pi == "clip"


@pytest.mark.parametrize("wrong", ["0.5", True, None])
def test_a_margin_that_is_no_number_is_refused(wrong):
    for make in (ArcFace, CosFace, SphereFaceR, LSoftmax):
        with pytest.raises((TypeError, ValueError), match=r"m must be"):
            make(m=wrong)


def test_numpy_numbers_are_numbers():
    assert ArcFace(m=np.float32(0.25), s=np.float32(32.0)).s == 32.0
    with pytest.raises(ValueError, match="m must be an integer"):
        LSoftmax(m=math.inf)


def test_a_schedule_with_an_unknown_name_attaches_nothing():
    margin = ArcFace(m=0.5)
    with pytest.raises(ValueError, match="no number 'zz'"):
        margin.with_schedule(m=WarmUp(0.0, 0.5, 10), zz=WarmUp(0.0, 0.5, 10))
    margin.schedule(0)
    assert float(margin.m) == 0.5


def test_a_scale_below_one_and_a_floor_of_zero_are_numbers_like_others() -> None:
    assert ArcFace(s=0.5).s == 0.5
    with pytest.raises(ValueError, match="0"):
        ArcFace(s=0.0)
    with pytest.raises(ValueError, match="minimum"):
        Annealing(minimum=-0.5)


def test_modules_inside_a_margin_move_with_it() -> None:
    """Its numbers keep their precision, its layers do not."""

    class Learned(Margin):
        def __init__(self) -> None:
            super().__init__(s=8.0)
            self.layer = torch.nn.Linear(1, 1)
            self.number("m", 0.35)

        def target_cosine(self, cos: Tensor) -> Tensor:
            return cos - self.m * self.layer(cos[:, None])[:, 0]

    margin = Learned().bfloat16()
    assert margin.layer.weight.dtype == torch.bfloat16
    assert margin.m.dtype == torch.float64
    assert float(margin.m) == 0.35
