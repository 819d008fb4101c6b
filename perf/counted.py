"""Bytes and flops counted while the kernels execute (ttsem runs them on the CPU): ours beside Liger-Kernel's.

    python -m perf counted

Both compute the loss and the gradients of plain softmax on the same tensors. Counted are the bytes of every load and
store that a kernel executes (one that a cache would serve counts like any other), the matrix products inside of
kernels, and those that are left to torch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import torch
import triton
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import tritonmargin as tm
from perf.played import played

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")


@dataclass
class Count:
    launches: dict[str, int] = field(default_factory=dict)  # by kernel
    loaded: int = 0  # bytes
    stored: int = 0
    flops: int = 0  # of matrix products in kernels


@contextlib.contextmanager
def counting() -> Iterator[Count]:
    """Inside a ttsem session: what its launches do."""
    from ttsem import harness, ops
    from ttsem.memory import Memory

    count = Count()
    load, store, dot, execute = Memory.load, Memory.store, ops.OPS["tt.dot"], harness.execute

    def counted_load(self: Any, addrs: Any, mask: Any, other: Any, dtype: Any) -> Any:
        count.loaded += touched(addrs, mask) * np.dtype(dtype).itemsize
        return load(self, addrs, mask, other, dtype)

    def counted_store(self: Any, addrs: Any, values: Any, mask: Any) -> Any:
        count.stored += touched(addrs, mask) * np.asarray(values).dtype.itemsize
        return store(self, addrs, values, mask)

    def counted_dot(interp: Any, op: Any, args: list[Any]) -> Any:
        (m, k), n = np.shape(args[0]), np.shape(args[1])[1]
        count.flops += 2 * m * n * k
        return dot(interp, op, args)

    def counted_execute(record: Any, *args: Any, **options: Any) -> Any:
        count.launches[record.fn_name] = count.launches.get(record.fn_name, 0) + 1
        return execute(record, *args, **options)

    Memory.load, Memory.store, ops.OPS["tt.dot"] = counted_load, counted_store, counted_dot
    harness.execute = counted_execute
    try:
        yield count
    finally:
        Memory.load, Memory.store, ops.OPS["tt.dot"], harness.execute = load, store, dot, execute


def touched(addrs: Any, mask: Any) -> int:
    shape = np.shape(addrs)
    return int(np.prod(shape)) if mask is None else int(np.count_nonzero(np.broadcast_to(mask, shape)))


def measured(step: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """What a step returns, and what it did."""
    with counting() as count, profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        result = step()
    flops = moved = 0
    for event in profiler.events():
        if event.name in PRODUCTS:
            first = 0 if event.name == "aten::mm" else 1  # what is added to comes before the factors
            (m, k), (_, n) = event.input_shapes[first : first + 2]
            flops += 2 * m * n * k
            moved += m * k + k * n + m * n
    return result, {
        "launches": sum(count.launches.values()), "bytes loaded by kernels": count.loaded,
        "bytes stored by kernels": count.stored, "flops of products in kernels": count.flops,
        "flops of products in torch": flops, "numbers that torch's products touch": moved,
    }  # fmt: skip


def compare(
    n: int = 128, d: int = 128, c: int = 1537, dtype: torch.dtype = torch.float32, chunk_bytes: int = 0
) -> pd.DataFrame:
    """Both losses on the same tensors: one line of counts each, and how far their results are from float64's."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

    make = torch.Generator().manual_seed(0)
    x, w = (torch.randn(size, d, generator=make) / d**0.25 for size in (n, c))
    target = torch.randint(c, (n,), generator=make)
    cast: Callable[[Tensor], Tensor] = lambda value: value.to(dtype).requires_grad_()  # noqa: E731

    def ours() -> tuple[Tensor, ...]:
        a, b = cast(x), cast(w)
        with tm.use_backend("triton"):
            loss = tm.margin_cross_entropy(a, b, target, tm.Softmax(), chunk_bytes=chunk_bytes or None)
            return loss.detach(), *torch.autograd.grad(loss, (a, b))

    def liger() -> tuple[Tensor, ...]:
        a, b = cast(x), cast(w)
        found = Liger.apply(a, b, target)
        loss = found[0] if isinstance(found, tuple) else found
        return loss.detach(), *torch.autograd.grad(loss, (a, b))

    exact = x.to(dtype).double().requires_grad_(), w.to(dtype).double().requires_grad_()
    value = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, target)
    expected = value.detach(), *torch.autograd.grad(value, exact)
    lines = []
    for name, step in (("tritonmargin", ours), ("Liger-Kernel 0.8.5", liger)):
        result, did = measured(step)
        errors = {
            f"error of {what}": float((got.double() - want).norm() / want.norm())
            for what, got, want in zip(("loss", "dx", "dw"), result, expected, strict=True)
        }
        lines.append(
            {"loss": name, "dtype": str(dtype).removeprefix("torch."), "N": n, "D": d, "C": c, **did, **errors}
        )
    return pd.DataFrame(lines)


def table() -> pd.DataFrame:
    """The comparison in two dtypes; under ttsem, targets of compute capability 9.0."""
    with played():
        found = pd.concat([compare(dtype=dtype) for dtype in (torch.float32, torch.bfloat16)], ignore_index=True)
    versions = {"triton": triton.__version__, "torch": torch.__version__, "ttsem": version("ttsem")}
    return found.assign(date=time.strftime("%Y-%m-%d"), **versions)
