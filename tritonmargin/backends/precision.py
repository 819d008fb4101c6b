"""How a class pass multiplies: the dtype of its operands and, for float32, whether as it is or as TF32.

One answer for a whole pass, in its PassSpec, whatever is set meanwhile: the tile, and with it the layout of partial
results, follow it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from tritonmargin.backends.tiles import device_of
from tritonmargin.compiling import constant_result

LOCK = threading.RLock()  # torch has one setting for float32 products in all threads


def accumulate(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, norms and losses: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operands(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the operands and tiles of the torch backend, for a loss that is computed in `dtype`.

    float16's are float32: exp(64) does not fit float16, and a probability of 1e-6 has three bits there.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def precision_of(dtype: torch.dtype, x: Tensor) -> str:
    """How a class pass on the tensor's device multiplies operands of this dtype, as torch is set."""
    return precision(dtype, device_of(x).target) if dtype == torch.float32 else "ieee"


def precision(dtype: torch.dtype, target: str) -> str:
    """float32 as torch multiplies it (`torch.set_float32_matmul_precision`).

    "highest", torch's default, is IEEE float32; "high" and "medium", or `torch.backends.cuda.matmul.fp32_precision` =
    "tf32", round the operands to TF32 (11 significant bits, about 1e-3), several times faster. 16-bit operands are
    exact either way.
    """
    return as_set() if dtype == torch.float32 and has_tf32(target) else "ieee"


@constant_result
def as_set() -> str:
    """What torch is set to; a compiled step keeps what was set when it was compiled."""
    with LOCK:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@contextlib.contextmanager
def multiplying(precision: str) -> Iterator[None]:
    """torch's float32 products that are launched inside are made as the pass makes its own.

    The lock is for class passes in other threads, which ask how torch is set.
    """
    setting = torch.backends.cuda.matmul
    with LOCK:
        before = setting.fp32_precision
        if (before == "tf32") == (precision == "tf32"):
            yield
            return
        setting.fp32_precision = precision
        try:
            yield
        finally:
            setting.fp32_precision = before


def as_operand(values: Tensor, dtype: torch.dtype, precision: str) -> Tensor:
    """The numbers as a product takes them: rounded to TF32 where matrix units would cut float32's last 13 bits off."""
    values = values.to(dtype)
    if not values.is_cuda or dtype != torch.float32 or precision != "tf32":
        return values
    return ((values.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def has_tf32(target: str) -> bool:
    """Of AMD's targets only gfx942 has it."""
    return not target.startswith("gfx") or target == "gfx942"
