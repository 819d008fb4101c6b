"""One class pass in chunks: how many classes at a time, and the buffers that all chunks share."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from tritonmargin.backends.precision import as_operand, operands
from tritonmargin.backends.torch_ops import Places, Rows, inverse_norm, new_tile, prepare_rows
from tritonmargin.spec import PassInputs, PassSpec


def chunk_classes(n: int, d: int, classes: int, chunk_bytes: int) -> int:
    """How many classes to visit at a time: prepared rows, gradient rows and tile fill `chunk_bytes`.

    Counted in float32, whatever the inputs: low precision has buffers in the precision of sums too.
    """
    per_class = (n + 2 * d) * 4
    chunk = (chunk_bytes or cache_bytes()) // max(per_class, 1)
    return max(1, min(classes, max(64, chunk // 64 * 64)))


@functools.cache
def cache_bytes() -> int:
    """The default byte budget of a chunk on a CPU: a third of the last-level cache, 8 MB where that is unknown."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(size.removesuffix("K")) * 1024 // 3
    except (OSError, ValueError):
        return 8 << 20


def budget_bytes(spec: PassSpec) -> int:
    """What chunks and retained logits may take together, where neither has a number of its own."""
    return cache_bytes() if spec.memory_budget < 0 else spec.memory_budget


def logits_bytes(n: int, classes: int, spec: PassSpec) -> int:
    """How many bytes of logits to keep for backward.

    By default all of them or none, and no more than half of the budget: chunks of a few classes cost more than the
    product that is saved. None where the caller gave the chunk a size: then the memory is the caller's to count.
    """
    if spec.retain_bytes >= 0:
        return spec.retain_bytes
    half = 0 if spec.chunk_bytes else budget_bytes(spec) // 2
    return half if n * classes * operands(spec.dtype).itemsize <= half else 0


def chunk_bytes(n: int, classes: int, spec: PassSpec) -> int:
    """The bytes of a chunk: those asked for, or what retained logits leave of the budget."""
    if spec.chunk_bytes:
        return spec.chunk_bytes
    kept = 0
    if spec.retain_bytes < 0 and logits_bytes(n, classes, spec):
        kept = n * classes * operands(spec.dtype).itemsize
    return max(1, budget_bytes(spec) - kept)


def retained_of(n: int, d: int, classes: int, spec: PassSpec) -> int:
    """How many classes' logits forward keeps.

    Nothing or everything is retained whatever a chunk is. A compiler that traced its size for nothing would tie the
    graph to N.
    """
    itemsize, kept = operands(spec.dtype).itemsize, logits_bytes(n, classes, spec)
    some = 0 < fitting_classes(n, itemsize, kept) < classes
    chunk = chunk_classes(n, d, classes, chunk_bytes(n, classes, spec)) if some else 1
    return retained_classes(n, classes, chunk, itemsize, kept)


def fitting_classes(n: int, itemsize: int, retain_bytes: int) -> int:
    return retain_bytes // max(n * itemsize, 1)


def retained_classes(n: int, classes: int, chunk: int, itemsize: int, retain_bytes: int) -> int:
    """How many classes' tiles fit in `retain_bytes`: whole chunks from the first on."""
    fitting = fitting_classes(n, itemsize, retain_bytes)
    return classes if fitting >= classes else fitting // chunk * chunk


class Chunks:
    """One class pass: the sizes, the chunks and the buffers that all chunks share."""

    def __init__(self, inputs: PassInputs, spec: PassSpec) -> None:
        x = inputs.x
        self.weight, self.unit, self.bounded = inputs.weight, spec.unit_weight, spec.bounded
        self.class_ids = None if inputs.class_ids is None else inputs.class_ids.contiguous()
        self.target = inputs.target.contiguous()
        self.places = Places(self.target)
        self.n, self.d = x.shape
        self.classes = len(self.weight) if self.class_ids is None else len(self.class_ids)
        self.size = chunk_classes(self.n, self.d, self.classes, chunk_bytes(self.n, self.classes, spec))
        self.dtype, self.acc, self.precision = operands(spec.dtype), x.dtype, spec.precision
        self.x = self.operand(x * math.log2(math.e) if self.bounded else x)
        self.bias, self.offset = inputs.bias, self.in_units_of_the_tile(inputs.offset)
        self.rows_buffer = self.x.new_empty(self.size, self.d)
        # Rows in the precision of sums, where the rows of the products are not.
        same = self.dtype == self.acc or not self.unit
        self.wide_buffer = self.rows_buffer if same else x.new_empty(self.size, self.d)

    @functools.cached_property
    def tile_buffer(self) -> Tensor:
        """A tile that every chunk overwrites; not made where all logits are retained."""
        return new_tile(self.x, self.size, self.dtype)

    def operand(self, values: Tensor) -> Tensor:
        """The numbers as the products of this pass take them."""
        return as_operand(values, self.dtype, self.precision)

    def scratch(self, separate: bool) -> Tensor:
        """A tile in the precision of sums: the tile itself where it has it and may be overwritten."""
        if self.dtype == self.acc and not separate:
            return self.tile_buffer
        return new_tile(self.x, self.size, self.acc)

    def retains_p(self, count: int) -> bool:
        """Whether what forward retains of `count` classes is P of `dlogits`, and not logits.

        It is exp(z) where that has a bound. Elsewhere it is exp(z - max), if one chunk has all classes and so knows the
        maximum. A bias's gradient is a sum of P before it is rounded.
        """
        whole = count == self.classes <= self.size and (self.dtype == self.acc or self.bias is None)
        return self.bounded or whole

    def per_sample(self, value: float, dtype: torch.dtype | None = None) -> Tensor:  # [N]
        return self.x.new_full((self.n,), value, dtype=dtype or self.acc)

    def ranges(self) -> list[tuple[int, int]]:
        return [(start, min(start + self.size, self.classes)) for start in range(0, self.classes, self.size)]

    def rows(self, start: int, stop: int, inverse: Tensor | None = None) -> Rows:
        """The chunk's rows; inverse: [C] their 1/|w|, where it is known."""
        known = None if inverse is None or not self.unit else inverse[start:stop]
        buffers = self.rows_buffer, self.wide_buffer
        return prepare_rows(self.weight, self.class_ids, start, stop, self.unit, *buffers, inverse=known)

    @property
    def adds_wide(self) -> bool:
        """Whether something is added to logits that are in low precision: it would be rounded with them."""
        return self.dtype != self.acc and (self.bias is not None or self.offset is not None)

    def product(self, rows: Rows, tile: Tensor) -> Tensor:  # [K, N]
        """The chunk's products with the samples, in `tile`, in units of log 2 on the bounded path."""
        return torch.mm(rows.operand, self.x.t(), out=tile)

    def logits(self, product: Tensor, start: int, stop: int, scratch: Tensor) -> Tensor:  # [K, N]
        """The logits of a product, -inf at the targets: the sum over j != y leaves them out.

        In the product itself, or in `scratch` where something is added in the precision of sums.
        """
        z = scratch.copy_(product) if self.adds_wide else product
        added = self.added(start, stop)
        if added is not None:
            z += added[:, None]
        sample, row = self.places.inside(start, stop)
        if len(sample):
            z[row, sample] = -torch.inf
        return z

    def added(self, start: int, stop: int) -> Tensor | None:
        """What is added to the chunk's logits: the classes' bias, and the offsets of active classes."""
        bias = self.select(self.bias, start, stop)
        if self.offset is None:
            return bias
        offset = self.offset[start:stop]
        return offset if bias is None else bias.to(offset.dtype) + offset

    def in_units_of_the_tile(self, offset: Tensor | None) -> Tensor | None:
        return offset if offset is None or not self.bounded else offset * math.log2(math.e)

    def select(self, vector: Tensor | None, start: int, stop: int) -> Tensor | None:
        """A per-class vector's numbers for the chunk."""
        if vector is None or self.class_ids is None:
            return None if vector is None else vector[start:stop].contiguous()
        return vector.index_select(0, self.class_ids[start:stop])

    def where(self, start: int, stop: int) -> slice | Tensor:
        """The chunk's rows among all of the weight."""
        return slice(start, stop) if self.class_ids is None else self.class_ids[start:stop]

    def class_at(self, row: Tensor) -> Tensor:
        """The classes at these positions in the pass; some class where there is none."""
        index = row.clamp(min=0)
        return self.class_ids.index_select(0, index) if self.class_ids is not None and self.classes else index

    def bias_at(self, row: Tensor) -> Tensor:
        """One b per sample in the precision of sums; 0 where row is -1."""
        if self.bias is None or not len(self.bias):
            return self.per_sample(0.0)
        return torch.where(row >= 0, self.bias.index_select(0, self.class_at(row)).to(self.acc), 0.0)

    def gather(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """One w' and its |w| per sample in the precision of sums; zeros where row is -1."""
        index = self.class_at(row)
        if not len(self.weight):
            return self.x.new_zeros(self.n, self.d, dtype=self.acc), self.per_sample(0.0)
        rows = torch.where(row[:, None] >= 0, self.weight.index_select(0, index).to(self.acc), 0.0)
        norm = torch.linalg.vector_norm(rows, dim=1)
        return (rows * inverse_norm(norm)[:, None] if self.unit else rows), norm
