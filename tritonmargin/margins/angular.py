"""Additive margins on the cosine or the angle: CosFace, ArcFace and their combination."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from tritonmargin.margins.base import GRADIENT, Margin, RowFormula, TargetRows

BEYOND_PI = ("cos-mm", "continuous", "raw", "easy", "clip")


class CosFace(Margin):
    """Additive cosine margin: t = s (cos theta - m), the others s cos theta.

    Wang et al.: CosFace (2018); Wang et al.: AM-Softmax (2018). The slope is s everywhere.

    Args:
        m: margin on the cosine, default 0.35 (insightface's recipes use 0.4, speaker recipes 0.2).
        s: scale, default 64.
    """

    m: float

    def __init__(self, m: float | Tensor = 0.35, s: float | Tensor = 64.0) -> None:
        super().__init__(s)
        self.number("m", m)

    def target_logit(self, rows: TargetRows) -> Tensor:
        return rows.product - rows.scale * self.tensor("m", rows.product.device)

    def row_formula(self, device: torch.device) -> RowFormula:
        from tritonmargin.margins import formulas  # and Triton with it

        return RowFormula(formulas.cosface_formula, (self.tensor("m", device),))


class CombinedMargin(Margin):
    """t = s (cos(m1 theta + m2) - m3), for every combination of the three.

    Deng et al.: ArcFace (2019), section 3.1, with theta = arccos(cos) in radians. SphereFace-like margins have
    m1 > 1, ArcFace is (1, m, 0), CosFace is (1, 0, m). arcface_torch of insightface trains plain CosFace for
    (1, 0.3, 0.2); this class does not drop m1 and m2.

    Past alpha = m1 theta + m2 > pi the cosine rises again; `beyond_pi` names what happens there instead. With
    theta0 = (pi - m2)/m1, where alpha reaches pi, and a = pi - theta0 (= m2 for m1 = 1):

        cos-mm       cos theta - a sin a - m3; jumps at theta0. insightface 2022-01 to 2022-12, TFace,
                     CurricularFace, pytorch-metric-learning, speechbrain, mmpretrain.
        continuous   cos theta - (1 + cos theta0) - m3; no jump. wespeaker, 3D-Speaker.
        raw          cos(alpha) - m3: rises, with a slope of the wrong sign. insightface since 2022-12, Paddle.
        easy         cos > 0 ? cos(alpha) - m3 : cos - m3, for every theta. The `easy_margin=True` of insightface.
        clip         -1 - m3, with slope 0. AdaFace's and opensphere's clipping, without their epsilon.

    `gradient="exact"` differentiates the formula. `"straight-through"` passes d t / d cos = s, what insightface's
    arcface_torch trains with since 2022-12 (its arccos and cos run under no_grad); values are the same.

    Args:
        m1, m2, m3: m1 > 0, m2 in radians with 0 <= m2 <= pi, m3 >= 0. Defaults 1, 0, 0 (that is NormFace).
        s: scale, default 64.
        beyond_pi: "cos-mm" (default), "continuous", "raw", "easy", "clip".
        gradient: "exact" (default) or "straight-through".

    Raises:
        ValueError: a number out of its range or an unknown name.
    """

    options: ClassVar = {"beyond_pi": BEYOND_PI, "gradient": GRADIENT}
    m1: float
    m2: float
    m3: float

    def __init__(
        self,
        m1: float | Tensor = 1.0,
        m2: float | Tensor = 0.0,
        m3: float | Tensor = 0.0,
        s: float | Tensor = 64.0,
        beyond_pi: str = "cos-mm",
        gradient: str = "exact",
    ) -> None:
        super().__init__(s)
        self.beyond_pi = beyond_pi
        self.gradient = gradient
        for name, value in (("m1", m1), ("m2", m2), ("m3", m3)):
            self.number(name, value)

    def check_number(self, name: str, value: float) -> None:
        super().check_number(name, value)
        if name == "m1" and value <= 0:
            raise ValueError(f"m1 must be > 0, got {value}")
        if name == "m2" and not 0 <= value <= math.pi:
            raise ValueError(f"m2 is an angle in radians, 0 <= m2 <= pi, got {value}; degrees are not converted")
        if name == "m3" and value < 0:
            raise ValueError(f"m3 must be >= 0, got {value}")

    def target_cosine(self, cos: Tensor) -> Tensor:
        m1, m2, m3 = self.tensors(cos.device)
        return combined(cos, m1, m2, self.beyond_pi) - m3

    def bounded_cosine(self, cos: Tensor) -> Tensor:
        m1, m2, m3 = self.tensors(cos.device)
        if not written_out(self, CombinedMargin, cos, m1, m2):
            return super().bounded_cosine(cos)
        found: Tensor = AngularCosine.apply(cos, m1, m2, self.beyond_pi)
        return found - m3

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        return self.tensor("m1", device), self.tensor("m2", device), self.tensor("m3", device)

    def row_formula(self, device: torch.device) -> RowFormula:
        from tritonmargin.margins import formulas  # and Triton with it

        return RowFormula(formulas.combined_formula, self.tensors(device), (self.gradient, self.beyond_pi))


class ArcFace(Margin):
    """Additive angular margin: t = s cos(theta + m), the others s cos theta.

    Deng et al.: ArcFace (2019). theta + m > pi and the gradient: see `CombinedMargin`, of which this is (1, m, 0).
    pytorch-metric-learning's `margin=28.6` is in degrees; here m is in radians.

    Args:
        m: margin in radians, 0 <= m <= pi, default 0.5.
        s: scale, default 64.
        beyond_pi: "cos-mm" (default), "continuous", "raw", "easy", "clip".
        gradient: "exact" (default) or "straight-through".

    Raises:
        ValueError: a number out of its range or an unknown name.
    """

    options: ClassVar = {"beyond_pi": BEYOND_PI, "gradient": GRADIENT}
    m: float

    def __init__(
        self, m: float | Tensor = 0.5, s: float | Tensor = 64.0, beyond_pi: str = "cos-mm", gradient: str = "exact"
    ) -> None:
        super().__init__(s)
        self.beyond_pi = beyond_pi
        self.gradient = gradient
        self.number("m", m)

    def check_number(self, name: str, value: float) -> None:
        super().check_number(name, value)
        if name == "m" and not 0 <= value <= math.pi:
            raise ValueError(f"m is an angle in radians, 0 <= m <= pi, got {value}; degrees are not converted")

    def target_cosine(self, cos: Tensor) -> Tensor:
        return combined(cos, None, self.tensor("m", cos.device), self.beyond_pi)

    def bounded_cosine(self, cos: Tensor) -> Tensor:
        m = self.tensor("m", cos.device)
        if not written_out(self, ArcFace, cos, m):
            return super().bounded_cosine(cos)
        found: Tensor = AngularCosine.apply(cos, None, m, self.beyond_pi)
        return found

    def row_formula(self, device: torch.device) -> RowFormula:
        from tritonmargin.margins import formulas  # and Triton with it

        return RowFormula(formulas.arcface_formula, (self.tensor("m", device),), (self.gradient, self.beyond_pi))


def written_out(margin: Margin, kind: type[Margin], cos: Tensor, *numbers: Tensor) -> bool:
    """Whether `AngularCosine` does: nobody overrode the formula, and all that can be asked for is a backward to cos.

    Not where torch.func or forward mode differentiates. torch.compile makes few kernels of the other way by itself.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if getattr(margin.target_cosine, "__func__", None) is not kind.target_cosine:
        return False
    values = (cos, *numbers)
    tangents = any(torch.autograd.forward_ad.unpack_dual(value).tangent is not None for value in values)
    return not tangents and not any(number.requires_grad for number in numbers)


class AngularCosine(torch.autograd.Function):
    """`inside(combined)` with the slope written out: a third of the operations that autograd makes of it.

    They are of N numbers, but each costs the CPU the launch of a kernel on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, cos: Tensor, m1: Tensor | None, m2: Tensor, beyond_pi: str) -> Tensor:
        # No setup_context: torch.func does not come here, and torch binds the arguments anew for it in every call.
        ctx.save_for_backward(cos, m1, m2)
        ctx.beyond_pi = beyond_pi
        return combined(cos.clamp(-1.0, 1.0), m1, m2, beyond_pi)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, m1, m2 = ctx.saved_tensors
        edge = 1.0 - torch.finfo(cos.dtype).eps
        return grad * combined_slope(cos.clamp(-edge, edge), m1, m2, ctx.beyond_pi), None, None, None


def combined(cos: Tensor, m1: Tensor | None, m2: Tensor, beyond_pi: str) -> Tensor:  # [N], [], [] -> [N]
    """cos(m1 theta + m2), and beyond alpha = pi what `beyond_pi` says; m1 None is 1."""
    alpha = angle(cos, m1, m2)
    inner = torch.cos(alpha)
    if beyond_pi == "raw":
        return inner
    if beyond_pi == "easy":
        return torch.where(cos > 0, inner, cos)
    if beyond_pi == "clip":
        return torch.where(alpha > math.pi, -1.0, inner)
    excess = m2 if m1 is None else math.pi - (math.pi - m2) / m1  # pi - theta0
    # cos(theta0) = -cos(excess)
    outer = cos - (1.0 - torch.cos(excess) if beyond_pi == "continuous" else excess * torch.sin(excess))
    return torch.where(alpha > math.pi, outer, inner)


def combined_slope(cos: Tensor, m1: Tensor | None, m2: Tensor, beyond_pi: str) -> Tensor:
    """d combined / d cos, for -1 < cos < 1."""
    alpha = angle(cos, m1, m2)
    inner = torch.sin(alpha) * (1.0 - cos * cos).rsqrt()
    inner = inner if m1 is None else m1 * inner
    if beyond_pi == "raw":
        return inner
    if beyond_pi == "easy":
        return torch.where(cos > 0, inner, 1.0)
    return torch.where(alpha > math.pi, 0.0 if beyond_pi == "clip" else 1.0, inner)


def angle(cos: Tensor, m1: Tensor | None, m2: Tensor) -> Tensor:
    theta = torch.acos(cos)
    return (theta if m1 is None else m1 * theta) + m2
