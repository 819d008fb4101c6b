"""The margins' formulas once more, with `math` on single numbers, and the settings at which the tests look at them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import cos, pi, sin

from tritonmargin.margins import (
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
)

Phi = Callable[[float], float]


@dataclass(frozen=True)
class Case:
    """A margin and its target cosine as a function of theta."""

    name: str
    make: Callable[[], Margin]
    phi: Phi
    switches: tuple[float, ...] = ()  # angles where the formula changes from one piece to the next
    falls: bool = True  # phi never rises with theta
    unit_embeddings: bool = True
    unit_weight: bool = True

    def scale(self, x_norm: float, w_norm: float) -> float:
        """What phi is multiplied with: s, or the norms that are not divided out."""
        return (self.make().s if self.unit_embeddings else x_norm) * (1.0 if self.unit_weight else w_norm)


def combined(theta: float, m1: float, m2: float, m3: float, beyond_pi: str) -> float:
    alpha, theta0 = m1 * theta + m2, (pi - m2) / m1
    if beyond_pi == "easy":
        return (cos(alpha) if theta < pi / 2 else cos(theta)) - m3
    if alpha <= pi or beyond_pi == "raw":
        return cos(alpha) - m3
    if beyond_pi == "cos-mm":
        return cos(theta) - (pi - theta0) * sin(pi - theta0) - m3
    if beyond_pi == "continuous":
        return cos(theta) - cos(theta0) - 1.0 - m3
    assert beyond_pi == "clip"
    return -1.0 - m3


def psi(theta: float, m: float) -> float:
    """cos(m theta) mirrored and shifted, piece by piece, so that it goes on falling: 1 ... -1, -1 ... -3, -3 ... -5."""
    piece = min(int(m * theta / pi), math.ceil(m) - 1)
    return cos(m * theta) - 2 * piece if piece % 2 == 0 else -cos(m * theta) - 2 * piece


def annealed(theta: float, m: float, lam: float) -> float:
    return (lam * cos(theta) + psi(theta, m)) / (1 + lam)


def pieces(m: float) -> tuple[float, ...]:
    return tuple(i * pi / m for i in range(1, math.ceil(m)))


def arcface(m: float, beyond_pi: str, s: float = 64.0) -> Case:
    return Case(
        f"ArcFace({m}, {beyond_pi})",
        partial(ArcFace, m=m, s=s, beyond_pi=beyond_pi),
        partial(combined, m1=1.0, m2=m, m3=0.0, beyond_pi=beyond_pi),
        switches={"raw": (), "easy": (pi / 2,)}.get(beyond_pi, (pi - m,) if m > 0 else ()),
        falls=beyond_pi not in ("raw", "easy"),
    )


def combination(m1: float, m2: float, m3: float, beyond_pi: str, s: float = 64.0) -> Case:
    theta0 = (pi - m2) / m1
    return Case(
        f"CombinedMargin({m1}, {m2}, {m3}, {beyond_pi})",
        partial(CombinedMargin, m1=m1, m2=m2, m3=m3, s=s, beyond_pi=beyond_pi),
        partial(combined, m1=m1, m2=m2, m3=m3, beyond_pi=beyond_pi),
        switches={"raw": (), "easy": (pi / 2,)}.get(beyond_pi, (theta0,) if theta0 < pi else ()),
        falls=beyond_pi not in ("raw", "easy"),
    )


def unnormalised(kind: type[LSoftmax], m: int, lam: float = 0.0) -> Case:
    return Case(
        f"{kind.__name__}({m}, lam={lam})",
        partial(kind, m=m, lam=lam),
        partial(annealed, m=m, lam=lam),
        switches=pieces(m),
        unit_embeddings=False,
        unit_weight=kind is ASoftmax,
    )


def sphereface_r(m: float, s: float = 64.0) -> Case:
    return Case(f"SphereFaceR({m})", partial(SphereFaceR, m=m, s=s), partial(psi, m=m), switches=pieces(m))


CASES = [
    Case("Softmax", Softmax, cos, unit_embeddings=False, unit_weight=False),
    Case("L2Softmax", partial(L2Softmax, s=8.0), cos, unit_weight=False),
    Case("NormFace", partial(NormFace, s=16.0), cos),
    Case("CosFace(0.35)", CosFace, lambda theta: cos(theta) - 0.35),
    arcface(0.5, "cos-mm"),
    arcface(0.5, "continuous"),
    arcface(0.5, "raw"),
    arcface(0.5, "easy"),
    arcface(0.5, "clip"),
    arcface(0.0, "cos-mm"),  # no margin: the switch is at theta = pi itself and must not fire
    arcface(1.9, "cos-mm", s=10.0),  # more than a right angle
    combination(1.0, 0.0, 0.0, "cos-mm"),
    combination(1.0, 0.3, 0.2, "cos-mm"),  # insightface's recipe, which arcface_torch trains as CosFace
    combination(0.9, 0.4, 0.15, "cos-mm"),  # m1 < 1 and a switch just before pi
    combination(0.9, 0.2, 0.0, "cos-mm"),  # m1 pi + m2 < pi: no switch at all
    combination(1.35, 0.0, 0.0, "continuous"),
    combination(2.5, 0.5, 0.1, "clip"),  # alpha passes 2 pi
    unnormalised(LSoftmax, 1),
    unnormalised(LSoftmax, 2),
    unnormalised(LSoftmax, 3),
    unnormalised(LSoftmax, 4, lam=5.0),
    unnormalised(ASoftmax, 4),
    sphereface_r(1.0),
    sphereface_r(1.7),
    sphereface_r(3.0),  # a whole number: the last piece ends at pi
]
