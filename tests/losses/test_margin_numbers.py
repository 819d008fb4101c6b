"""A margin's numbers: how they are scheduled, kept, copied and shown, and which are refused."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import re
from math import cos

import numpy as np
import pytest
import torch
from cosines import GRID, NORMFACE, all_cases, close, target_cosine
from formulas import CASES, Case, annealed

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
    WarmUp,
)

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
    assert margin.m == 0.5  # attached, not applied
    tensor = margin.tensor("m", torch.device("cpu"))
    unit = NORMFACE
    for step, m in ((0, 0.0), (4, 0.2), (10, 0.5), (11, 0.5), (4, 0.2)):  # a function of the step: back works too
        margin.schedule(step)
        assert margin.tensor("m", torch.device("cpu")) is tensor
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
    assert (both.m1, both.m2, both.m3) == (1.0, pytest.approx(0.1), pytest.approx(0.1))


def test_schedule_errors() -> None:
    with pytest.raises(ValueError, match="ArcFace has no number 'margin' to schedule; it has: m"):
        ArcFace().with_schedule(margin=WarmUp(0, 1, 2))
    with pytest.raises(ValueError, match="it has: m1, m2, m3, s"):
        CombinedMargin().with_schedule(m4=WarmUp(0, 1, 2))
    with pytest.raises(ValueError, match="Softmax has no number 's' to schedule; it has: none"):
        Softmax().with_schedule(s=WarmUp(0, 1, 2))
    with pytest.raises(ValueError, match="it has: lam"):
        LSoftmax(4).with_schedule(m=WarmUp(1, 4, 2))
    margin = ArcFace().with_schedule(m=lambda step: -1.0)
    with pytest.raises(ValueError, match=r"0 <= m <= pi, got -1\.0"):
        margin.schedule(0)
    assert margin.m == 0.5


def test_a_margin_without_schedules_ignores_the_step() -> None:
    margin = CosFace(0.2)
    margin.schedule(1000)
    assert margin.m == 0.2


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_numbers_survive_deferred_initialisation(where: str) -> None:
    """`to_empty` gives every tensor of a model new memory with any content; a margin's numbers are not parameters."""
    with torch.device(where):
        margin = CombinedMargin(m1=1.0, m2=0.35, m3=0.1)
    margin.m3 = 0.2
    assert "m2=0.35, m3=0.2" in repr(margin)
    margin.to_empty(device="cpu")
    assert [margin.m1, margin.m2, margin.m3] == [1.0, 0.35, 0.2]
    assert margin.tensor("m2", torch.device("cpu")).dtype == torch.float64


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
    assert margin.m == 0.2
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
        for right in (value, 0.7):
            setattr(margin, name, right)
            number = margin.tensor(name, torch.device("cpu"))
            assert number.dtype == torch.float64
            assert float(number) == getattr(margin, name) == right


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
        assert twin.m == pytest.approx(0.2)
        assert margin.m == 0.5


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
    learnable.s = torch.nn.Parameter(torch.tensor(3.0))
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
    assert margin.m == 0.5


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
    assert margin.m == 0.5


def test_a_scale_below_one_and_a_floor_of_zero_are_numbers_like_others() -> None:
    assert ArcFace(s=0.5).s == 0.5
    with pytest.raises(ValueError, match="0"):
        ArcFace(s=0.0)
    with pytest.raises(ValueError, match="minimum"):
        Annealing(minimum=-0.5)
