"""Bytes and flops counted while kernels execute under ttsem, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Count:
    loaded: int = 0  # bytes of every load that a kernel executes, one that a cache would serve like any other
    stored: int = 0
    flops: int = 0  # of matrix products in kernels


@contextmanager
def counting() -> Iterator[Count]:
    """Inside a session of ttsem: what the launches do."""
    from ttsem import ops
    from ttsem.memory import Memory

    count = Count()
    load, store, dot = Memory.load, Memory.store, ops.OPS["tt.dot"]

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

    Memory.load, Memory.store, ops.OPS["tt.dot"] = counted_load, counted_store, counted_dot
    try:
        yield count
    finally:
        Memory.load, Memory.store, ops.OPS["tt.dot"] = load, store, dot


def touched(addrs: Any, mask: Any) -> int:
    shape = np.shape(addrs)
    return int(np.prod(shape)) if mask is None else int(np.count_nonzero(np.broadcast_to(mask, shape)))
