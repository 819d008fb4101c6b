"""How a class pass multiplies: the dtype of its operands and, for float32, whether as it is or as TF32.

One answer for a whole pass, whatever is set meanwhile: the tile, and with it the layout of partial results, follow it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from tritonmargin.kernels.tiles import device_of


class Current(threading.local):
    """What the class pass of this thread decided; None: there is none."""

    precision: str | None = None
    halves = False  # whether it is of float16


class Allowed:
    """Class passes under way, in any thread, for which torch multiplies float32 as TF32 though nobody set it so."""

    passes = 0
    before = ""
    lock = threading.Lock()


_current = Current()


def accumulate(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, norms and losses: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operands(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the operands and tiles of a loss that is computed in `dtype`.

    float16's are float32: exp(64) does not fit float16, and a probability of 1e-6 has three bits there.
    """
    return torch.float32 if dtype == torch.float16 else dtype


@contextlib.contextmanager
def products(dtype: torch.dtype, x: Tensor, fused: bool) -> Iterator[None]:
    """The time of one class pass, computed in `dtype`; by the kernels, if `fused`.

    float32 is multiplied as torch multiplies it, see `precision`. The kernels' float16 is multiplied as TF32 where the
    GPU has it: that keeps all of float16's 11 significant bits, in float32's range, at the speed of matrix units.
    torch's own products are told by its setting, which has one value for all threads: float32 products that another
    thread launches in the meantime are TF32 too.
    """
    before = _current.precision, _current.halves
    halves = dtype == torch.float16 and fused and x.is_cuda and has_tf32(device_of(x).target)
    _current.precision, _current.halves = "tf32" if halves else as_set(), halves
    try:
        with tf32_allowed() if halves else contextlib.nullcontext():
            yield
    finally:
        _current.precision, _current.halves = before


@contextlib.contextmanager
def tf32_allowed() -> Iterator[None]:
    setting = torch.backends.cuda.matmul
    with Allowed.lock:
        if not Allowed.passes:
            Allowed.before = setting.fp32_precision
            setting.fp32_precision = "tf32"
        Allowed.passes += 1
    try:
        yield
    finally:
        with Allowed.lock:
            Allowed.passes -= 1
            if not Allowed.passes:
                setting.fp32_precision = Allowed.before


def precision(dtype: torch.dtype, target: str) -> str:
    """How operands of this dtype are multiplied in the class pass, or, outside of one, as torch is set.

    float32 as torch multiplies it (`torch.set_float32_matmul_precision`): "highest", torch's default, is IEEE float32;
    "high" and "medium", or `torch.backends.cuda.matmul.fp32_precision` = "tf32", round the operands to TF32 (11
    significant bits, about 1e-3), several times faster. bfloat16 operands are exact either way.
    """
    if dtype != torch.float32 or not has_tf32(target):
        return "ieee"
    return "tf32" if (_current.precision or as_set()) == "tf32" else "ieee"


def precision_of(dtype: torch.dtype, x: Tensor) -> str:
    """`precision` on the tensor's device."""
    return precision(dtype, device_of(x).target) if dtype == torch.float32 else "ieee"


def halves() -> bool:
    """Whether all operands of this pass are rounded as float16's are, those too that could be taken as they are."""
    return _current.halves


def as_operand(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers as a product takes them: rounded to TF32 where matrix units would cut float32's last 13 bits off."""
    values = values.to(dtype)
    if not values.is_cuda or precision(dtype, device_of(values).target) != "tf32":
        return values
    return ((values.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def as_set() -> str:
    """torch's setting, as whoever set it left it."""
    with Allowed.lock:
        return Allowed.before if Allowed.passes else torch.backends.cuda.matmul.fp32_precision


def has_tf32(target: str) -> bool:
    """Of AMD's targets only gfx942 has it."""
    return not target.startswith("gfx") or target == "gfx942"
