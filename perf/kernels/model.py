"""`python -m perf model`: what a step should take on an H200, beside what the kernels before these took.

Predicted: bytes and flops of every kernel of a forward and backward of ArcFace, divided by rates that were measured of
single kernels at one size. In a CUDA graph a step takes the sum of its kernels; launched one by one, the CPU's time for
its operations where that is longer. A measured time far above the prediction is time that no kernel explains.
Measured: reports/gpu-h200. Whoever changes the kernels changes the list of `step` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from perf.kernels import cases
from perf.kernels.gpus import H200
from perf.providers.base import GRAPH, STEP

REPORT = Path(__file__).resolve().parents[2] / "reports" / "gpu-h200"
SAMPLED = "a step over sampled rows, without the draw"


@dataclass(frozen=True)
class Rates:
    """Of an H200 on 2026-11-28: profile.csv and rates.csv of reports/gpu-h200."""

    logits: float  # flops per second, in bfloat16 of a tile kernel with its epilogue, in float32 of the library
    dx: float
    dw: float
    memory: float = 4.2e12  # bytes per second: what a kernel that goes over W moves
    small: float = 2e-6  # seconds of a launch on the GPU at least
    host: float = 50e-6  # seconds of the CPU for an operation of any size; hosts differ, 30 to 60


RATES = {"bfloat16": Rates(564e12, 800e12, 710e12), "float32": Rates(48.5e12, 51.5e12, 50.1e12)}
OPERATIONS, IN_CHUNK = 10, 3  # launches and operations of torch in a step of one chunk, and in another one: step_ops
CPU = "the CPU, until all is launched"


class Size(NamedTuple):
    """What a pass is, and the bytes of its matrices."""

    n: int
    d: int
    c: int
    item: int  # bytes of a number of x, W and P
    slots: int  # of numbers per sample that forward leaves
    blocks: int  # of samples, each with sums per class
    columns: int = 1  # tiles across D in finish
    x = property(lambda self: self.n * self.d * self.item)
    rows = property(lambda self: self.c * self.d * self.item)
    tile = property(lambda self: self.n * self.c * self.item)
    per_slot = property(lambda self: 4 * self.n * self.slots)
    per_block = property(lambda self: 4 * self.c * self.blocks)


class Kernel(NamedTuple):
    name: str  # of cases.py, where it is ours
    bytes: Callable[[Size], int]  # what has to be read and written, every matrix once
    rate: str = ""  # of Rates, of its product; "": it makes none
    after: Callable[[Size], int] = lambda s: 0  # bytes of these that are moved after a tile's product, not beside it
    times: int = 1

    def flops(self, size: Size) -> int:
        return 2 * size.n * size.d * size.c if self.rate else 0

    def seconds(self, size: Size, rates: Rates) -> float:
        if not self.rate:
            return max(self.times * self.bytes(size) / rates.memory, rates.small)
        after = self.after(size)
        product = max((self.bytes(size) - after) / rates.memory, self.flops(size) / getattr(rates, self.rate))
        return self.times * (product + after / rates.memory)


def step(dtype: str, other_rows: bool = False) -> list[Kernel]:
    """The kernels of a forward and backward; other_rows: class rows are copied first, as a sample's are."""
    library, apart = dtype == "float32", cases.DTYPES[dtype].itemsize == 4
    operands = (lambda s: s.tile) if library else lambda s: s.x + s.rows
    logits = [Kernel("logits", lambda s: s.tile + s.rows + s.x, "logits", times=2)] if library else []
    rate = "" if library else "logits"
    # Gradient rows that the library multiplies are written, and read by finish.
    dw = [Kernel("dW", lambda s: s.tile + s.rows + s.x, "dw")] if apart else []
    taken = (lambda s: s.rows) if apart else lambda s: s.tile + s.x
    return [
        Kernel("rows", lambda s: 2 * (s.x + s.n * s.d * s.item) + 28 * s.n),
        Kernel("classes", lambda s: s.rows * (1 + other_rows) + 4 * s.c),
        *logits,
        Kernel("reduce", lambda s: operands(s) + 2 * s.per_slot + (not other_rows) * s.per_block, rate),
        Kernel("loss", lambda s: s.per_slot + 32 * s.n),
        Kernel("sum", lambda s: 8 * s.n),
        Kernel("weigh", lambda s: operands(s) + s.tile + 3 * s.per_slot + (2 - other_rows) * s.per_block, rate),
        Kernel("dX", lambda s: s.tile + s.rows + 4 * s.n * s.d, "dx"),
        *dw,
        # W and its gradient; each sample's x; sums per class once for every part of D.
        Kernel("finish", lambda s: taken(s) + 2 * s.rows + s.x + (s.per_block + 4 * s.c) * s.columns,
               "" if apart else "dw", after=lambda s: s.rows),
        Kernel("back", lambda s: 3 * s.x + 4 * s.n * s.d + 12 * s.n),
    ]  # fmt: skip


def size_of(n: int, d: int, c: int, dtype: str, gpu: cases.Gpu = H200, other_rows: bool = False) -> Size:
    plan = cases.plan_of(gpu, dtype, n, d, c, other_rows)
    slots = math.ceil(c / plan.reduce.shape[1])
    blocks, columns = math.ceil(n / plan.weigh.shape[1]), math.ceil(d / plan.finish.shape[1])
    return Size(n, d, c, cases.DTYPES[dtype].itemsize, slots, blocks, columns)


def predict(n: int, d: int, c: int, dtype: str, other_rows: bool = False) -> dict[str, float]:
    """Milliseconds of a step: of each kernel, of the CPU, and of the whole step in both modes."""
    if dtype not in RATES:
        raise ValueError(f"no rate of {dtype} products has been measured on an H200, only {', '.join(RATES)}")
    rates, plan, size = RATES[dtype], cases.plan_of(H200, dtype, n, d, c, other_rows), size_of(n, d, c, dtype)
    parts = {kernel.name: 1e3 * kernel.seconds(size, rates) for kernel in step(dtype, other_rows)}
    graph = sum(parts.values())
    host = 1e3 * rates.host * (OPERATIONS + IN_CHUNK * (math.ceil(c / plan.backward_chunk) - 1))
    return parts | {CPU: host, GRAPH: graph, STEP: max(graph, host)}


def table(report: Path = REPORT) -> pd.DataFrame:
    """Milliseconds: the kernels of a large step, then whole steps of D = 512, predicted; and measured before them."""
    results = pd.read_csv(report / "results.csv").query("provider == 'ours' and loss == 'arcface' and D == 512")
    before = {(row.mode, row.N, row.C, row.dtype): 1e3 * row.median_s for row in results.itertuples()}
    lines = []
    for n, c, dtype in ((1024, 1_000_000, "bfloat16"), (1024, 100_000, "bfloat16"), (256, 1_000_000, "bfloat16"),
                        (1024, 1_000_000, "float32"), (1024, 100_000, "float32")):  # fmt: skip
        found = predict(n, 512, c, dtype)
        for name in found if not lines else (GRAPH, STEP):
            lines.append((name, n, c, dtype, found[name], before.get((name, n, c, dtype))))
    sampled = predict(1024, 512, 100_000, "bfloat16", other_rows=True)[GRAPH]
    lines.append((SAMPLED, 1024, 100_000, "bfloat16", sampled, None))
    return pd.DataFrame(lines, columns=["figure", "N", "C", "dtype", "predicted_ms", "measured_before_ms"])
