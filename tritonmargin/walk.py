"""One walk over the classes: how much is walked at a time, and the buffers that all chunks share."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonmargin.kernels import load_backend
from tritonmargin.kernels.products import as_operand
from tritonmargin.kernels.torch_ops import Rows, inverse_norm


def is_bounded(bound: float, classes: int, dtype: torch.dtype) -> bool:
    """Whether exp(z) with |z| <= bound, and the sum of `classes` of them, stay inside the range of `dtype`."""
    room = math.log(torch.finfo(dtype).max) - 3.7 - bound
    # Not log(classes): torch.compile would compile again for every number of classes.
    return classes < math.exp(room)


def chunk_classes(n: int, d: int, classes: int, chunk_bytes: int) -> int:
    """How many classes to walk at a time: prepared rows, gradient rows and tile fill `chunk_bytes`.

    Counted in float32, whatever the inputs: low precision has buffers in the precision of sums too.
    """
    per_class = (n + 2 * d) * 4
    chunk = (chunk_bytes or cache_bytes()) // max(per_class, 1)
    return max(1, min(classes, max(64, chunk // 64 * 64)))


def chunk_of(ops: ModuleType, x: Tensor, dtype: torch.dtype, classes: int, chunk_bytes: int) -> int:
    """How many classes a backend walks at a time: by the budget, if there is one, or by its own model."""
    n, d = x.shape
    if chunk_bytes or not ops.FUSED:
        return chunk_classes(n, d, classes, chunk_bytes)
    return max(1, min(classes, ops.chunk_for(x, dtype, classes)))


@functools.cache
def cache_bytes() -> int:
    """The default byte budget of a chunk on a CPU: a third of the last-level cache, 8 MB where that is unknown."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(size.removesuffix("K")) * 1024 // 3
    except (OSError, ValueError):
        return 8 << 20


def fitting_classes(n: int, itemsize: int, retain_bytes: int) -> int:
    return retain_bytes // max(n * itemsize, 1)


def retained_classes(n: int, classes: int, chunk: int, itemsize: int, retain_bytes: int) -> int:
    """How many classes' tiles fit in `retain_bytes`: whole chunks from the first on."""
    fitting = fitting_classes(n, itemsize, retain_bytes)
    return classes if fitting >= classes else fitting // chunk * chunk


class Walk:
    """One walk over the classes: the sizes, the chunks and the buffers that all chunks share."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        class_ids: Tensor | None,
        unit: bool,
        bounded: bool,
        dtype: torch.dtype,
        chunk_bytes: int,
        backend: str,
        exact: bool = False,
    ) -> None:
        self.ops = load_backend(backend)
        self.weight, self.unit, self.bounded = weight, unit, bounded
        self.class_ids = None if class_ids is None else class_ids.contiguous()
        self.n, self.d = x.shape
        self.classes = len(weight) if class_ids is None else len(class_ids)
        self.chunk = chunk_of(self.ops, x, dtype, self.classes, chunk_bytes)
        self.x = as_operand(x * math.log2(math.e) if bounded else x, dtype)
        if self.ops.FUSED:
            # Lines as kernels like them, zeros beyond D.
            beyond = self.ops.line(self.d) - self.d
            self.x = F.pad(self.x, (0, beyond)) if beyond else self.x.contiguous()
        self.acc = x.dtype
        make = self.x.new_empty if self.x.shape[1] == self.d else self.x.new_zeros
        self.rows_buffer = make(self.chunk, self.x.shape[1])
        # Rows in the precision of sums, where the rows of the products are not and somebody reads them.
        same = dtype == self.acc or not unit
        self.wide_buffer = self.rows_buffer if same else None
        if not same and (exact or not self.ops.FUSED):
            self.wide_buffer = self.rows_buffer.to(self.acc)
        self.tile_buffer = self.ops.new_tile(self.x, self.chunk, dtype)

    def scratch(self, separate: bool) -> Tensor:
        """A tile in the precision of sums: the tile itself where it has it and may be overwritten."""
        if self.ops.FUSED or (self.tile_buffer.dtype == self.acc and not separate):
            return self.tile_buffer
        return self.ops.new_tile(self.x, self.chunk, self.acc)

    def per_slot(self, value: float, dtype: torch.dtype) -> Tensor:  # [slots, N]
        """Room for what the forward pass keeps per sample."""
        return self.x.new_full((self.ops.slots(self.x, self.chunk), self.n), value, dtype=dtype)

    def chunks(self) -> list[tuple[int, int]]:
        return [(start, min(start + self.chunk, self.classes)) for start in range(0, self.classes, self.chunk)]

    def rows(self, start: int, stop: int) -> Rows:
        return self.ops.prepare_rows(
            self.weight, self.class_ids, start, stop, self.unit, self.rows_buffer, self.wide_buffer
        )

    def gradient_shape(self, sparse: bool) -> tuple[int, int]:
        return (self.classes if sparse else len(self.weight)), self.d

    def select(self, vector: Tensor | None, start: int, stop: int) -> Tensor | None:
        """A per-class vector's numbers for the chunk."""
        if vector is None or self.class_ids is None:
            return None if vector is None else vector[start:stop].contiguous()
        return vector.index_select(0, self.class_ids[start:stop])

    def scaled(self, offset: Tensor | None) -> Tensor | None:
        """Numbers that are added to logits, in the units of the tile."""
        return offset if offset is None or not self.bounded else offset * math.log2(math.e)

    def bias(self, bias: Tensor | None, offset: Tensor | None, start: int, stop: int) -> Tensor | None:
        """What is added to the chunk's logits: the classes' bias, and the offsets of walked rows."""
        own = self.select(bias, start, stop)
        if offset is None:
            return own
        return offset[start:stop] if own is None else own.to(offset.dtype) + offset[start:stop]

    def gather(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """One w' and its |w| per sample in the precision of sums; zeros where row is -1."""
        place = row.clamp(min=0)
        if self.class_ids is not None and self.classes:
            place = self.class_ids.index_select(0, place)
        if not len(self.weight):
            return self.x.new_zeros(self.n, self.d, dtype=self.acc), self.x.new_zeros(self.n, dtype=self.acc)
        rows = torch.where(row[:, None] >= 0, self.weight.index_select(0, place).to(self.acc), 0.0)
        norm = torch.linalg.vector_norm(rows, dim=1)
        return (rows * inverse_norm(norm)[:, None] if self.unit else rows), norm
