"""The margins' formulas inside kernels: what `Margin.formula` gives, and the functions that they have in common.

A formula is a Triton function that computes what its margin's methods compute,

    <name>_formula(cos, numbers, OPTIONS) -> (phi, slope)

of cosines [BLOCK] in float32. numbers: pointers to the margin's 0-dim tensors. They are loaded in the kernel, so a
schedule changes them without a compilation. slope is d phi / d cos as autograd finds it: that of cos clamped to
+-(1 - eps), and 1 for "straight-through". A cosine that is nan gives nan.

No function of libdevice, whose cosine of a large angle is coarse or slow: angles are few, one a sample, and computed
in float64 by the polynomials below. They are off by less than 1e-11.

Imported by whoever launches kernels, and not by `import tritonmargin`: Triton takes half as long to import as torch.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# -- margins -----------------------------------------------------------------------------------------------------------


@triton.jit
def cosface_formula(cos: tl.tensor, numbers: tl.tuple, OPTIONS: tl.constexpr) -> Any:
    """numbers: m; no OPTIONS. cos is not clamped, as above."""
    phi = cos - tl.load(numbers[0]).to(tl.float32)
    return phi, tl.full(phi.shape, 1.0, tl.float32)


@triton.jit
def arcface_formula(cos: tl.tensor, numbers: tl.tuple, OPTIONS: tl.constexpr) -> Any:
    """numbers: m; OPTIONS: gradient, beyond_pi. No angle: cos(theta + m) by the addition theorem."""
    m = tl.load(numbers[0]).to(tl.float64)
    a, b = cosine(m).to(tl.float32), sine(m).to(tl.float32)
    cos, near = clamped(cos)
    inner = cos * a - tl.sqrt_rn((1.0 - cos) * (1.0 + cos)) * b
    slope = a + near * b / tl.sqrt_rn((1.0 - near) * (1.0 + near))
    phi, slope = with_beyond(cos, near, inner, slope, cos < -a, near < -a, m, OPTIONS[1])
    return finished(phi, slope, OPTIONS[0])


@triton.jit
def combined_formula(cos: tl.tensor, numbers: tl.tuple, OPTIONS: tl.constexpr) -> Any:
    """numbers: m1, m2, m3; OPTIONS: gradient, beyond_pi."""
    m1, m2, m3 = numbers
    m1, m2, m3 = tl.load(m1).to(tl.float64), tl.load(m2).to(tl.float64), tl.load(m3).to(tl.float64)
    cos, near = clamped(cos)
    cos, near = cos.to(tl.float64), near.to(tl.float64)
    alpha, beta = m1 * arccos(cos) + m2, m1 * arccos(near) + m2
    slope = m1 * sine(beta) / tl.sqrt((1.0 - near) * (1.0 + near))
    excess = 3.141592653589793 - (3.141592653589793 - m2) / m1
    # A number is rounded to float32 where it is compared, and is not where it is subtracted.
    beyond, slope_beyond = alpha - 3.141592653589793 > 0.0, beta - 3.141592653589793 > 0.0
    phi, slope = with_beyond(cos, near, cosine(alpha), slope, beyond, slope_beyond, excess, OPTIONS[1])
    return finished(phi - m3, slope, OPTIONS[0])


@triton.jit
def with_beyond(
    cos: tl.tensor,
    near: tl.tensor,
    inner: tl.tensor,
    slope: tl.tensor,
    beyond: tl.tensor,
    slope_beyond: tl.tensor,
    excess: tl.tensor,
    BEYOND_PI: tl.constexpr,
) -> Any:
    """`inner` and its slope, or where alpha > pi the ones that `beyond_pi` names; excess: pi - theta0."""
    outer, outer_slope = cos, 1.0
    if BEYOND_PI == "easy":
        beyond, slope_beyond = cos <= 0.0, near <= 0.0
    elif BEYOND_PI == "clip":
        outer, outer_slope = -1.0, 0.0
    elif BEYOND_PI == "cos-mm":
        outer = cos - (excess * sine(excess)).to(cos.dtype)
    elif BEYOND_PI == "continuous":
        outer = cos - (1.0 - cosine(excess)).to(cos.dtype)
    if BEYOND_PI != "raw":
        inner, slope = tl.where(beyond, outer, inner), tl.where(slope_beyond, outer_slope, slope)
    return inner, slope


@triton.jit
def annealed_formula(cos: tl.tensor, numbers: tl.tuple, OPTIONS: tl.constexpr) -> Any:
    """LSoftmax and ASoftmax; numbers: lam, OPTIONS: gradient, m."""
    lam = tl.load(numbers[0]).to(tl.float64)
    cos, near = clamped(cos)
    psi, slope = psi_and_slope(cos, near, OPTIONS[1])
    phi = (lam * cos.to(tl.float64) + psi) / (1.0 + lam)
    return finished(phi, (lam + slope) / (1.0 + lam), OPTIONS[0])


@triton.jit
def sphereface_r_formula(cos: tl.tensor, numbers: tl.tuple, OPTIONS: tl.constexpr) -> Any:
    """numbers: m, OPTIONS: gradient."""
    cos, near = clamped(cos)
    psi, slope = psi_and_slope(cos, near, tl.load(numbers[0]).to(tl.float64))
    return finished(psi, slope, OPTIONS[0])


@triton.jit
def psi_and_slope(cos: tl.tensor, near: tl.tensor, m: tl.tensor) -> Any:
    """psi of cos, and d psi / d cos at `near`, (-1)^k m sin(m theta) / sin(theta); m whole or not, float64."""
    alpha = m * arccos(cos.to(tl.float64))
    k = tl.floor(alpha * 0.3183098861837907)
    value = cosine(alpha)
    value = tl.where(odd(k), -value, value) - 2.0 * k
    near = near.to(tl.float64)
    alpha = m * arccos(near)
    slope = m * sine(alpha) / tl.sqrt((1.0 - near) * (1.0 + near))
    return value, tl.where(odd(tl.floor(alpha * 0.3183098861837907)), -slope, slope)


# -- what they have in common ------------------------------------------------------------------------------------------


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
