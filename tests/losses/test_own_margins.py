"""Margins of a user's own: a formula, learnable numbers, layers; what torch.func asks of them."""

from __future__ import annotations

import copy
import functools
from math import cos, sin

import pytest
import torch
from cosines import NORMFACE, close, rows, slopes, target_cosine
from torch import Tensor

from tritonmargin.margins import (
    ArcFace,
    CombinedMargin,
    Margin,
)


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
    learned, name = copy.deepcopy(margin), "m" if isinstance(margin, ArcFace) else "m2"
    setattr(learned, name, torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64)))
    at = torch.tensor([0.3, -0.9, 0.8], dtype=torch.float64)
    numbers = torch.tensor([0.2, 0.5], dtype=torch.float64)

    class Sum(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.margin = learned

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
    assert margin.m == 0.35
    assert margin.tensor("m", torch.device("cpu")).dtype == torch.float64
