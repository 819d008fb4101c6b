"""The margins' formulas inside kernels, against the same margins in PyTorch; conftest.py says where they run."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE, MACHINE, not_ttsem
from formulas import CASES, Case, arcface, combination, sphereface_r, unnormalised
from torch import Tensor, nn

import tritonmargin as tm
from tritonmargin.margins import MARGINS, Margin, TargetRows, base, formulas
from tritonmargin.margins.angular import BEYOND_PI

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

launches = pytest.mark.skipif(MACHINE == "cpu", reason="kernels run on a GPU, under ttsem or in the interpreter")

STRAIGHT = dict(gradient="straight-through")
EPS = 2.0**-23
CPU = torch.device("cpu")
SETTINGS = {
    case.name: case
    for case in (
        *CASES,
        *(arcface(m, beyond) for beyond in BEYOND_PI for m in (0.5, math.pi / 2, math.pi)),
        *(combination(m1, m2, 0.1, beyond) for beyond in BEYOND_PI for m1, m2 in ((1.0, 0.5), (1.35, 0.2), (3.0, 1.0))),
        combination(0.1, 3.0, 0.0, "cos-mm"),
        unnormalised(tm.ASoftmax, 7, lam=0.5),
        sphereface_r(6.5),
    )
}
for kind in (tm.ArcFace, tm.CombinedMargin, tm.SphereFaceR):
    SETTINGS[f"{kind.__name__}, straight-through"] = Case(kind.__name__, partial(kind, **STRAIGHT), math.cos)


@triton.jit
def evaluate_kernel(
    cosines, values, slopes, numbers, FORMULA: tl.constexpr, OPTIONS: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value, slope = FORMULA(tl.load(cosines + i), numbers, OPTIONS)
    tl.store(values + i, value)
    tl.store(slopes + i, slope)


def by_kernel(margin: Margin, cosines: Tensor) -> tuple[Tensor, Tensor]:
    formula, n = margin.formula(torch.empty(0, device=DEVICE).device), len(cosines)
    assert formula is not None
    if formula.function is None:
        return cosines, torch.ones_like(cosines)
    padded = F.pad(cosines, (0, -n % 1024)).to(DEVICE)
    values, slopes = torch.full_like(padded, torch.nan), torch.full_like(padded, torch.nan)
    evaluate_kernel[(len(padded) // 1024,)](
        padded, values, slopes, formula.numbers, FORMULA=formula.function, OPTIONS=formula.options, BLOCK=1024
    )
    return values[:n].cpu(), slopes[:n].cpu()


def by_torch(margin: Margin, cosines: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The values, and the slopes where the kernel takes them: not nearer to +-1 than float32's eps."""
    found = []
    for given in (cosines, cosines.clamp(-1 + EPS, 1 - EPS)):
        c = given.to("cpu", dtype, copy=True).requires_grad_()
        one = torch.ones_like(c)
        t = margin.to("cpu").target_logit(TargetRows(c, one, one, 1.0, torch.zeros_like(c, dtype=torch.int64)))
        found.append((t.detach(), *torch.autograd.grad(t.sum(), c)))
    return found[0][0].double(), found[1][1].double()


def grid(case: Case) -> Tensor:
    """[-1, 1] in float32, sorted: the ends number by number, and dense around the switches."""
    steps = np.arange(-40, 41)
    ends = 1.0 - np.concatenate([np.arange(30) * EPS / 2, 2.0 ** -np.linspace(1, 22, 200)])
    around = [
        math.cos(theta) + np.concatenate([steps * EPS / 4, steps * 1e-5]) for theta in (*case.switches, math.pi / 2)
    ]
    every = np.concatenate([np.linspace(-1, 1, 2001), ends, -ends, *around]).astype(np.float32)
    return torch.from_numpy(np.unique(every.clip(-1, 1)))


def nearby(error: Tensor, reach: int = 40) -> Tensor:
    """The largest of a number's neighbours: a single number of PyTorch's can be right by luck."""
    return F.max_pool1d(error[None], 2 * reach + 1, stride=1, padding=reach)[0]


@launches
@pytest.mark.parametrize("name", SETTINGS)
def test_values_and_slopes_are_as_exact_as_those_of_torch(name: str) -> None:
    case, c = SETTINGS[name], grid(SETTINGS[name])
    margin = case.make()
    switches = torch.tensor([math.cos(theta) for theta in case.switches] or [9.0], dtype=torch.float64)
    distance = (c.double()[:, None] - switches).abs().amin(dim=1)
    exact, coarse = by_torch(margin, c, torch.float64), by_torch(margin, c, torch.float32)
    for what, found, right, torchs in zip(("phi", "slope"), by_kernel(margin, c), exact, coarse, strict=True):
        assert found.dtype == torch.float32
        assert not found.isnan().any(), what
        # PyTorch's float32 jumps a few numbers too early or too late, which excuses no error here.
        torchs = torch.where(distance < 1e-5, 0.0, (torchs - right).abs())
        allowed = 2.0 * nearby(torchs) + 4 * EPS * (1.0 + right.abs())
        wrong = (found.double() - right).abs() > allowed
        if "easy" not in name:  # which switches at 0; the others do at an angle, and float32 has no number for it
            wrong &= distance > EPS / 4
        assert not wrong.any(), (what, c[wrong][:5], found[wrong][:5], right[wrong][:5], allowed[wrong][:5])


@launches
@pytest.mark.parametrize("name", SETTINGS)
def test_beyond_the_ends_and_nan(name: str) -> None:
    margin = SETTINGS[name].make()
    beyond = torch.tensor([1 + EPS, 1 + 8 * EPS, -1 - EPS, -1 - 8 * EPS, torch.nan])
    value, slope = by_kernel(margin, beyond)
    exact, steep = by_torch(margin, beyond, torch.float64)
    torch.testing.assert_close(value[:4].double(), exact[:4], rtol=0, atol=1e-6)
    torch.testing.assert_close(slope[:4].double(), steep[:4], rtol=1e-5, atol=1e-5)
    assert value[4].isnan()


@triton.jit
def angles_kernel(given, found, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(found + i, FUNCTION(tl.load(given + i, mask=i < n, other=0.0)), mask=i < n)


@launches
@pytest.mark.parametrize("function", ["sine", "cosine", "arccos"])
def test_the_polynomials_in_float64(function: str) -> None:
    right = {"sine": torch.sin, "cosine": torch.cos, "arccos": torch.acos}[function]
    reach = 1.0 if function == "arccos" else 30.0
    given = torch.linspace(-reach, reach, 4001, dtype=torch.float64)
    found = torch.full_like(given, torch.nan).to(DEVICE)
    angles_kernel[(4,)](given.to(DEVICE), found, len(given), FUNCTION=getattr(formulas, function), BLOCK=1024)
    torch.testing.assert_close(found.cpu(), right(given), rtol=0, atol=1e-11)


@launches
def test_a_formula_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first test sees an error of a few float32 roundings, in a value and in a slope."""
    name = "ArcFace(0.5, cos-mm)"
    exact = by_kernel

    def off(margin: Margin, c: Tensor) -> tuple[Tensor, ...]:
        return tuple(found + (1.5e-6 if place == which else 0.0) for place, found in enumerate(exact(margin, c)))

    monkeypatch.setitem(globals(), "by_kernel", off)
    for which in (0, 1):
        with pytest.raises(AssertionError, match=("phi", "slope")[which]):
            test_values_and_slopes_are_as_exact_as_those_of_torch(name)


@launches
@pytest.mark.parametrize(
    ("margin", "changes"),
    [
        (tm.CosFace(), {"m": 0.1}),
        (tm.ArcFace(), {"m": 0.2}),
        (tm.CombinedMargin(), {"m1": 1.2, "m2": 0.3, "m3": 0.1}),
        (tm.LSoftmax(), {"lam": 3.0}),
        (tm.SphereFaceR(), {"m": 2.3}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Margin) else "",
)
def test_a_number_changes_and_nothing_is_compiled(
    margin: Margin, changes: dict[str, float], pytestconfig: pytest.Config
) -> None:
    def compiled() -> int:
        if MACHINE == "interpreter":
            return 0
        if MACHINE.startswith("ttsem"):
            return pytestconfig.ttsem_modules()
        return sum(len(cache[0]) for cache in evaluate_kernel.device_caches.values())

    c = torch.linspace(-0.8, 0.8, 50)
    before, _ = by_kernel(margin, c)
    count = compiled()
    for name, value in changes.items():
        setattr(margin, name, value)
        after, _ = by_kernel(margin, c)
        assert not torch.allclose(after, before, rtol=0, atol=1e-3)
        torch.testing.assert_close(after.double(), by_torch(margin, c, torch.float64)[0], rtol=0, atol=1e-6)
        before = after
    assert compiled() == count


# -- where there is no formula for a kernel ----------------------------------------------------------------------


def test_every_margin_has_a_formula_and_is_tested() -> None:
    assert {type(case.make()) for case in SETTINGS.values()} == set(MARGINS.values())
    for kind in MARGINS.values():
        assert kind().formula(CPU) is not None
    for kind in (tm.Softmax, tm.L2Softmax, tm.NormFace):
        assert kind().formula(CPU) == (None, (), ())


class Renamed(tm.ArcFace):
    """The formula is its parent's."""


class Mixin(Margin):
    def target_logit(self, rows: TargetRows) -> Tensor:
        return super().target_logit(rows) - 1.0


class Late(tm.ArcFace, Mixin):
    """target_logit is that of the mixin, which comes after ArcFace."""


def subclass(kind: type[Margin], method: str) -> type[Margin]:
    return type("Mine", (kind,), {method: lambda self, given: getattr(super(kind, self), method)(given)})


REFUSED: dict[str, Callable[[], Margin]] = {
    "no formula of its own": lambda: type("Mine", (Margin,), {"target_cosine": lambda self, cos: cos})(),
    "a mixin": Late,
    **{f"{method} overridden": partial(subclass(tm.ArcFace, method)) for method in base.METHODS},
    "target_logit of NormFace": subclass(tm.NormFace, "target_logit"),
    "target_cosine of ASoftmax": subclass(tm.ASoftmax, "target_cosine"),
    **{f"{method} set": lambda method=method: with_attribute(tm.ArcFace(), method, abs) for method in base.METHODS},
    "s is a tensor": lambda: with_attribute(tm.ArcFace(), "s", torch.tensor(8.0, requires_grad=True)),
    "s is a parameter": lambda: with_attribute(tm.ArcFace(), "s", nn.Parameter(torch.tensor(8.0))),
    "a number is learned": lambda: with_attribute(tm.ArcFace(), "m", torch.tensor(0.5, requires_grad=True)),
    "a number is a parameter": lambda: with_attribute(tm.CosFace(), "m", nn.Parameter(torch.tensor(0.5))),
    "a number of one dimension": lambda: with_attribute(tm.ArcFace(), "m", nn.Parameter(torch.tensor([0.5]), False)),
}


def with_attribute(margin: Margin, name: str, value: Any) -> Margin:
    setattr(margin, name, value)
    return margin


@pytest.mark.parametrize("why", REFUSED)
def test_no_formula(why: str) -> None:
    assert REFUSED[why]().formula(CPU) is None


def test_a_subclass_that_changes_something_else_has_one() -> None:
    assert Renamed(m=0.3).formula(CPU).function is formulas.arcface_formula


def test_no_formula_where_torch_func_or_forward_mode_differentiates() -> None:
    margin, seen = tm.ArcFace(), []

    def looked(c: Tensor) -> Tensor:
        seen.append(margin.formula(CPU))
        return c.sum()

    c = torch.zeros(3, device="cpu")
    torch.func.grad(looked)(c)
    torch.func.vmap(looked)(c[None])
    torch.func.jvp(looked, (c,), (c,))
    with torch.autograd.forward_ad.dual_level():
        looked(c)
    assert seen == [None] * 4
    assert margin.formula(CPU) is not None


@not_ttsem
def test_no_formula_while_torch_compile_traces() -> None:
    margin = tm.ArcFace()

    @torch.compile(backend="eager", fullgraph=True)
    def looked(c: Tensor) -> Tensor:
        return c + (1.0 if margin.formula(CPU) is None else 2.0)

    assert looked(torch.zeros(1, device="cpu")) == 1.0
