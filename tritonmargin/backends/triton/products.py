"""Products that torch makes, and how a kernel is given the operands of its own."""

from __future__ import annotations

import functools
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tritonmargin.backends.precision import multiplying

DEFAULTS = {field.name: field.default for field in fields(TensorDescriptor) if field.default is not MISSING}


def described(matrix: Tensor, rows: int, columns: int) -> Any:
    """A descriptor of blocks of the matrix for the tensor memory accelerator.

    Without the checks of the class, which take the CPU as long as an operation of torch: `plan.fits` and the buffers'
    sizes are made so that they hold.
    """
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(
        DEFAULTS, base=matrix, shape=matrix.shape, strides=matrix.stride(), block_shape=[rows, columns]
    )
    return made


def multiply(a: Tensor, b: Tensor, out: Tensor, precision: str) -> None:
    """out = a b for float32, as TF32 or as it is."""
    with multiplying(precision):
        torch.mm(a, b, out=out)


def add_product(out: Tensor, p: Tensor, rows: Tensor, first: bool, precision: str) -> None:
    """out (+)= p^T rows, summed in float32."""
    a = p.t()
    if p.dtype == torch.float32:
        with multiplying(precision):
            torch.addmm(out, a, rows, beta=0 if first else 1, out=out)
    elif wide_products(p.device):
        torch.addmm(out, a, rows, beta=0 if first else 1, out_dtype=torch.float32, out=out)
    else:
        torch.addmm(out, a.float(), rows.float(), beta=0 if first else 1, out=out)


@functools.cache
def wide_products(device: torch.device) -> bool:
    """Whether torch multiplies 16 bits into float32 there without copies of the operands."""
    try:
        a, out = torch.ones(16, 16, dtype=torch.bfloat16, device=device), torch.empty(16, 16, device=device)
        torch.addmm(out, a, a, beta=0, out_dtype=torch.float32, out=out)
        return True
    except (RuntimeError, TypeError):
        return False
