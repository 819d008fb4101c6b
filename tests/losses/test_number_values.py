"""Reading and setting a margin's numbers: floats, the same checks however they are set; schedules; what is learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from cases import cpu_only
from torch import Tensor, nn

import tritonmargin as tm
from tritonmargin.margins import MARGINS

# Every number of every margin, with one value that its constructor refuses; LSoftmax's m is a whole number.
OUT_OF_RANGE = {
    ("L2Softmax", "s"): -1.0,
    ("NormFace", "s"): 0.0,
    ("LSoftmax", "m"): -3,
    ("LSoftmax", "lam"): -1.0,
    ("ASoftmax", "m"): 0,
    ("ASoftmax", "lam"): -0.5,
    ("SphereFaceR", "m"): 0.9,
    ("SphereFaceR", "s"): -64.0,
    ("CosFace", "m"): math.inf,
    ("CosFace", "s"): -1.0,
    ("ArcFace", "m"): 9.0,
    ("ArcFace", "s"): -1.0,
    ("CombinedMargin", "m1"): 0.0,
    ("CombinedMargin", "m2"): 4.0,
    ("CombinedMargin", "m3"): -0.1,
    ("CombinedMargin", "s"): -math.inf,
}
every_number = pytest.mark.parametrize(("name", "number"), OUT_OF_RANGE)
CPU = torch.device("cpu")


def test_the_table_has_every_number() -> None:
    found = {(name, number) for name, kind in MARGINS.items() for number in kind().number_names}
    assert found | {("LSoftmax", "m"), ("ASoftmax", "m")} == set(OUT_OF_RANGE)


@every_number
def test_a_number_is_read_as_a_python_number_and_can_be_put_back(name: str, number: str) -> None:
    margin = MARGINS[name]()
    before = repr(margin)
    old = getattr(margin, number)
    assert type(old) in (int, float)
    setattr(margin, number, 2.0)
    assert getattr(margin, number) == 2.0
    setattr(margin, number, old)
    assert getattr(margin, number) == old
    assert repr(margin) == before


@cpu_only
def test_a_logged_warm_up_has_the_values_of_the_steps() -> None:
    margin = tm.ArcFace().with_schedule(m=tm.WarmUp(0.0, 0.4, steps=4), s=tm.WarmUp(8.0, 16.0, steps=4))
    log = []
    for step in range(5):
        margin.schedule(step)
        log += [margin.m, margin.s]
    assert log == pytest.approx([0.0, 8.0, 0.1, 10.0, 0.2, 12.0, 0.3, 14.0, 0.4, 16.0])


WAYS: dict[str, Callable[[Any], Any]] = {
    "the number": lambda value: value,
    "a tensor": lambda value: torch.tensor(value),
    "a tensor of shape [1]": lambda value: torch.tensor([value]),
    "numpy's": lambda value: np.float64(value),
    "a parameter": lambda value: nn.Parameter(torch.tensor(float(value), dtype=torch.float64)),
    "a tensor with a gradient": lambda value: torch.tensor(float(value), requires_grad=True),
}


def refused(margin: tm.Margin, number: str, value: Any) -> str:
    """How, and that nothing has changed."""
    before, old = repr(margin), getattr(margin, number)
    with pytest.raises((TypeError, ValueError)) as error:
        setattr(margin, number, value)
    assert repr(margin) == before
    assert getattr(margin, number) == old
    if number in margin._held:
        assert float(margin.tensor(number, CPU)) == old
    return f"{type(error.value).__name__}: {error.value}"


@every_number
@pytest.mark.parametrize("way", WAYS)
def test_out_of_its_range_it_is_the_constructors_error(name: str, number: str, way: str) -> None:
    for value in (OUT_OF_RANGE[name, number], math.nan):
        with pytest.raises(ValueError, match=rf"{number} (must be|is an angle)") as error:
            MARGINS[name](**{number: value})
        found = refused(MARGINS[name](), number, WAYS[way](value))
        assert found.split(", got")[0] == f"ValueError: {error.value}".split(", got")[0]


@every_number
@pytest.mark.parametrize(
    "value",
    [True, "0.5", None, [0.5], 0.5j, torch.tensor([0.5, 0.4]), torch.tensor(True), torch.tensor(0.5j),
     torch.empty((), device="meta"), np.zeros(2), nn.Parameter(torch.zeros(2))],
    ids=str,
)  # fmt: skip
def test_what_is_no_number_is_refused_by_name(name: str, number: str, value: Any) -> None:
    found = refused(MARGINS[name](), number, value)
    assert f"{number} must be" in found
    if not isinstance(value, Tensor):
        with pytest.raises((TypeError, ValueError), match=f"{number} must be"):
            MARGINS[name](**{number: value})


@pytest.mark.parametrize(
    "value", [1, Fraction(1), np.float32(1.0), np.array(1.0), torch.tensor(1), torch.tensor([1.0]), torch.tensor(1.0)]
)
def test_whatever_holds_one_number_is_one(value: Any) -> None:
    for margin, number in ((tm.ArcFace(), "m"), (tm.ArcFace(), "s"), (tm.LSoftmax(), "m"), (tm.LSoftmax(), "lam")):
        setattr(margin, number, value)
        assert type(getattr(margin, number)) in (int, float)
        assert getattr(margin, number) == 1.0


@cpu_only
def test_a_tensor_that_changes_later_changes_no_margin() -> None:
    given = torch.tensor(0.3, dtype=torch.float64)
    margin = tm.CosFace()
    margin.m = given
    given.fill_(9.0)
    assert margin.m == 0.3
    assert float(margin.tensor("m", CPU)) == 0.3


@cpu_only
def test_an_integer_margin_is_the_one_that_is_computed() -> None:
    x, w, y = torch.randn(6, 8), torch.randn(20, 8), torch.arange(6)
    margin = tm.LSoftmax(4)
    margin.m = torch.tensor(2)
    assert torch.equal(tm.margin_cross_entropy(x, w, y, margin), tm.margin_cross_entropy(x, w, y, tm.LSoftmax(2)))
    with pytest.raises(ValueError, match="LSoftmax: m must be an integer >= 1"):
        margin.m = nn.Parameter(torch.tensor(3.0))  # it could not be learned


# -- choices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MARGINS)
def test_choices_and_flags_of_every_margin_are_checked(name: str) -> None:
    margin = MARGINS[name]()
    with pytest.raises(ValueError, match="gradient must be one of 'exact', 'straight-through', got 'straight_through'"):
        margin.gradient = "straight_through"
    for flag in ("unit_embeddings", "unit_weight"):
        with pytest.raises(TypeError, match=f"{name}: {flag} must be True or False, got 'no'"):
            setattr(margin, flag, "no")
        with pytest.raises(TypeError, match=f"Mine: {flag} must be True or False, got None"):
            type("Mine", (MARGINS[name],), {flag: None})()
    with pytest.raises(ValueError, match="gradient must be one of"):
        type("Mine", (MARGINS[name],), {"gradient": "none"})()


# -- schedules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tm.WarmUp, tm.Annealing])
@pytest.mark.parametrize("value", [math.nan, math.inf, True, "1", None, torch.tensor(1.0)], ids=str)
def test_a_schedule_of_something_else_than_finite_numbers_is_refused_by_name(make: Any, value: Any) -> None:
    fields = {tm.WarmUp: {"start": 0.0, "stop": 0.5, "steps": 10}, tm.Annealing: {"base": 1.0, "gamma": 0.1}}[make]
    kind = ValueError if type(value) is float else TypeError
    for field in (*fields, *(("power", "minimum") if make is tm.Annealing else ())):
        with pytest.raises(kind, match=rf"{make.__name__}: {field} must be a (finite )?number"):
            make(**{**fields, field: value})


def test_what_cannot_be_called_is_no_schedule() -> None:
    margin = tm.ArcFace(m=0.3)
    for wrong in (0.5, "m", None):
        with pytest.raises(TypeError, match="ArcFace: the schedule of s must be callable"):
            margin.with_schedule(m=tm.WarmUp(0.0, 0.5, 10), s=wrong)
    margin.schedule(0)  # none was attached
    assert margin.m == 0.3


@pytest.mark.parametrize("step", ["3", None, True, math.nan, [3]], ids=str)
def test_a_step_is_a_number(step: Any) -> None:
    for margin in (tm.ArcFace(), tm.ArcFace().with_schedule(m=tm.WarmUp(0.0, 0.5, 10))):
        with pytest.raises((TypeError, ValueError), match="step must be a"):
            margin.schedule(step)
        assert margin.m == 0.5


@pytest.mark.parametrize("value", [-1.0, math.nan, "0.3", None, True])
def test_a_step_whose_values_cannot_be_set_sets_none(value: Any) -> None:
    margin = tm.CombinedMargin().with_schedule(m2=tm.WarmUp(0.1, 0.5, 10), m3=lambda step: value)
    with pytest.raises((TypeError, ValueError), match="m3 must be"):
        margin.schedule(0)
    assert (margin.m2, margin.m3) == (0.0, 0.0)


# -- numbers that are learned --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["m", "s"])
def test_a_parameter_stays_a_tensor_until_it_is_deleted(number: str) -> None:
    margin = tm.ArcFace()
    setattr(margin, number, nn.Parameter(torch.tensor(0.4)))
    learned = getattr(margin, number)
    assert learned is margin.tensor(number, CPU) is dict(margin.named_parameters())[number]
    assert f"{number}=learned" in repr(margin)
    with pytest.raises(TypeError, match=f"ArcFace: {number} is a parameter"):
        setattr(margin, number, 0.3)
    margin.with_schedule(**{number: lambda step: 0.3})
    with pytest.raises(TypeError, match=f"ArcFace: {number} is a parameter"):
        margin.schedule(0)
    delattr(margin, number)
    setattr(margin, number, 0.2)
    assert getattr(margin, number) == 0.2
    assert float(margin.tensor(number, CPU)) == 0.2
    assert not list(margin.parameters())


@cpu_only
def test_a_learned_margin_and_scale_of_one_dimension_have_their_gradients() -> None:
    """As fully_shard wants parameters to be."""
    x, w, y = torch.randn(6, 8, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64), torch.arange(6)
    margin = tm.CosFace()
    margin.m, margin.s = (nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (0.2, 4.0))
    loss = tm.margin_cross_entropy(x, w, y, margin)
    found = torch.autograd.grad(loss, (margin.m, margin.s))
    for value, name, slope in ((0.2, "m", found[0]), (4.0, "s", found[1])):
        ends = [
            float(tm.margin_cross_entropy(x, w, y, tm.CosFace(**{"m": 0.2, "s": 4.0, name: value + step})))
            for step in (-1e-5, 1e-5)
        ]
        assert float(slope) == pytest.approx((ends[1] - ends[0]) / 2e-5, rel=1e-6)
