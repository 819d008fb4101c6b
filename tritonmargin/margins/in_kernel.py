"""The margins' formulas inside kernels: what `Margin.formula` gives, and the functions that they have in common.

A formula is a Triton function beside the margin's own PyTorch code,

    <name>_formula(cos, numbers, OPTIONS) -> (phi, slope)

of cosines [BLOCK] in float32. numbers: pointers to the margin's 0-dim tensors. They are loaded in the kernel, so a
schedule changes them without a compilation. slope is d phi / d cos as autograd finds it: that of cos clamped to
+-(1 - eps), and 1 for "straight-through". A cosine that is nan gives nan.

No function of libdevice, whose cosine of a large angle is coarse or slow: angles are few, one a sample, and computed
in float64 by the polynomials below. They are off by less than 1e-11.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

try:
    import triton
    import triton.language as tl

    TRITON = True
except ImportError:  # the torch backend needs no Triton
    TRITON, tl = False, None

    class triton:  # type: ignore[no-redef]
        jit = staticmethod(lambda function: function)


class RowFormula(NamedTuple):
    """A margin for a kernel. Whoever launches it has to look whether the numbers are on the kernel's device."""

    function: Any = None  # the Triton function; None: phi is cos
    numbers: tuple[Tensor, ...] = ()  # 0-dim, what they hold may change from launch to launch
    options: tuple[Any, ...] = ()  # constants of the compilation


@triton.jit
def clamped(cos: tl.tensor) -> Any:
    """cos for the value, within +-1, and for the slope, within +-(1 - eps). tl.minimum would lose a nan."""
    cos = tl.where(cos > 1.0, 1.0, tl.where(cos < -1.0, -1.0, cos))
    near = tl.where(cos > 0.99999988, 0.99999988, tl.where(cos < -0.99999988, -0.99999988, cos))
    return cos, near


@triton.jit
def finished(phi: tl.tensor, slope: tl.tensor, GRADIENT: tl.constexpr) -> Any:
    """Both in float32, the slope as `gradient` asks for it."""
    slope = slope.to(tl.float32)
    if GRADIENT == "straight-through":
        slope = tl.full(slope.shape, 1.0, tl.float32)
    return phi.to(tl.float32), slope


@triton.jit
def sine(angle: tl.tensor) -> Any:
    """Of any angle in float64: the series on [-pi/2, pi/2]."""
    turns = tl.floor(angle * 0.3183098861837907 + 0.5)
    r = angle - turns * 3.141592653589793
    z = r * r
    p = z * (-1.0 / 1307674368000.0) + 1.0 / 6227020800.0
    p = p * z - 1.0 / 39916800.0
    p = p * z + 1.0 / 362880.0
    p = p * z - 1.0 / 5040.0
    p = p * z + 1.0 / 120.0
    p = p * z - 1.0 / 6.0
    r += r * z * p
    return tl.where(odd(turns), -r, r)


@triton.jit
def cosine(angle: tl.tensor) -> Any:
    return sine(angle + 1.5707963267948966)


@triton.jit
def arccos(cos: tl.tensor) -> Any:
    """Of cos in float64, -1 <= cos <= 1. Near +-1 it is the arcsine of a small number, exact to its last digits."""
    size = tl.abs(cos)
    small = size < 0.5
    z = tl.where(small, size * size, (1.0 - size) * 0.5)
    x = tl.where(small, size, tl.sqrt(z))
    # (arcsin(x) / x - 1) / x^2 for z = x^2 <= 1/4, interpolated at Chebyshev's nodes
    p = z * 0.028346476635715254 + 0.0010677734267045842
    p = p * z + 0.016863982052525924
    p = p * z + 0.0169027068244097
    p = p * z + 0.022412415011707657
    p = p * z + 0.030379945387116528
    p = p * z + 0.044642906468736067
    p = p * z + 0.074999999534377054
    p = p * z + 0.16666666666738608
    x += x * z * p
    angle = tl.where(small, 1.5707963267948966 - x, 2.0 * x)
    return tl.where(cos < 0.0, 3.141592653589793 - angle, angle)


@triton.jit
def odd(whole: tl.tensor) -> Any:
    """Whether floating-point whole numbers are odd."""
    return whole != 2.0 * tl.floor(whole * 0.5)
