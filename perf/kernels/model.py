"""`python -m perf model`: what a step should take on an H200, beside what it took.

Predicted: bytes and flops of every kernel of a forward and backward of ArcFace, divided by rates that were measured of
single kernels at one size. A ratio far from 1 is time that no kernel explains. In a CUDA graph a step takes the sum of
its kernels and small operations; launched one by one, the CPU's time for them where that is longer.
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


@dataclass(frozen=True)
class Rates:
    """Of an H200 on 2026-11-28: profile.csv and rates.csv of reports/gpu-h200."""

    logits: float  # flops per second, in bfloat16 of the tile kernel with its epilogue, in float32 of the library
    dx: float
    dw: float
    memory: float = 4.2e12  # bytes per second: what prepare_kernel moves
    small: float = 2e-6  # seconds of a small operation on the GPU
    host: float = 50e-6  # seconds of the CPU for an operation of any size; hosts differ, 30 to 60


RATES = {"bfloat16": Rates(564e12, 800e12, 710e12), "float32": Rates(48.5e12, 51.5e12, 50.1e12)}
SMALL = 150  # operations of a step outside of its chunks, counted in profile.csv
IN_CHUNK = 8  # of a chunk, kernels among them
OTHER, CPU = "small operations", "the CPU, until all is launched"  # beside the kernels


class Size(NamedTuple):
    """What a chunk is, and the bytes of its matrices."""

    n: int
    d: int
    k: int
    dtype: str
    columns: int  # tiles across the classes
    item = property(lambda self: cases.operand(self.dtype).itemsize)
    x = property(lambda self: self.n * self.d * self.item)
    rows = property(lambda self: self.k * self.d * self.item)
    tile = property(lambda self: self.n * self.k * self.item)


class Kernel(NamedTuple):
    name: str  # of cases.step, where it is ours
    seen: str  # what a profile calls it, a regular expression
    bytes: Callable[[Size], int]  # what a launch has to read and write, every matrix once
    rate: str = ""  # of Rates, of its product; "": it makes none
    times: int = 1  # launches in a chunk

    def flops(self, size: Size) -> int:
        return 2 * size.n * size.d * size.k if self.rate else 0

    def seconds(self, size: Size, rates: Rates) -> float:
        multiplying = self.flops(size) / getattr(rates, self.rate) if self.rate else 0.0
        return self.times * max(self.bytes(size) / rates.memory, multiplying)


def step(dtype: str) -> list[Kernel]:
    """The kernels of a forward and backward over one chunk."""
    library = cases.by_library(dtype)
    operands = (lambda s: s.tile) if library else lambda s: s.x + s.rows
    tile_rate = "" if library else "logits"
    product = lambda s: s.tile + s.rows + s.x  # noqa: E731
    return [
        Kernel("prepare_rows", "prepare_kernel", lambda s: 2 * s.rows + 4 * s.k, times=2),
        *([Kernel("logits", "gemm|nvjet", product, "logits", times=2)] if library else []),
        Kernel("reduce_chunk", "tile_kernel", lambda s: operands(s) + 16 * s.n * s.columns, tile_rate),
        Kernel("weigh_chunk", "tile_kernel", lambda s: operands(s) + 8 * s.n * s.columns + s.tile, tile_rate),
        Kernel("dX", "gemm|nvjet", product, "dx"),
        Kernel("dW", "gemm|nvjet", product, "dw"),
        # A, W and dW; 1/|w|; each sample's share of its target row.
        Kernel("finish_rows", "finish_kernel", lambda s: 3 * s.rows + 4 * s.k + s.n * (8 + 4 * s.d)),
    ]


def predict(n: int, d: int, c: int, dtype: str) -> dict[str, float]:
    """Milliseconds of a step: of each kernel in all chunks, of the rest, and of the whole step in both modes."""
    if dtype not in RATES:
        raise ValueError(f"no rate of {dtype} products has been measured on an H200, only {', '.join(RATES)}")
    rates, k = RATES[dtype], cases.chunk_of(H200, dtype, n, d, c)
    with cases.on(H200):
        size, chunks = Size(n, d, k, dtype, cases.tile_counts(n, d, k, dtype)[0]), math.ceil(c / k)
    parts = {kernel.name: 1e3 * c / k * kernel.seconds(size, rates) for kernel in step(dtype)}
    parts[OTHER] = 1e3 * SMALL * rates.small
    host = 1e3 * (SMALL + IN_CHUNK * chunks) * rates.host
    graph = sum(parts.values())
    return parts | {CPU: host, GRAPH: graph, STEP: max(graph, host)}


def table(report: Path = REPORT) -> pd.DataFrame:
    """Predicted and measured milliseconds: parts of the profiled step, then whole steps of N >= 256 and D = 512."""
    profile, results = (pd.read_csv(report / name) for name in ("profile.csv", "results.csv"))
    size = next(profile.itertuples())
    parts, kernels, lines = predict(size.N, size.D, size.C, size.dtype), step(size.dtype), []
    left = profile[profile["what"] != "the step"]
    for seen in (*dict.fromkeys(kernel.seen for kernel in kernels), CPU, "."):  # the rest are small operations
        names = [kernel.name for kernel in kernels if kernel.seen == seen] or [CPU if seen == CPU else OTHER]
        rows = left["what"].str.contains(seen)
        predicted, measured = sum(parts[name] for name in names), left[rows]["microseconds"].sum() / 1e3
        lines.append((" and ".join(names), size, predicted, measured))
        left = left[~rows]
    ours = results.query("provider == 'ours' and loss == 'arcface' and N >= 256 and D == 512")
    for row in ours[ours["mode"].isin([STEP, GRAPH]) & ours["dtype"].isin(list(RATES))].itertuples():
        lines.append((row.mode, row, predict(row.N, row.D, row.C, row.dtype)[row.mode], 1e3 * row.median_s))
    return pd.DataFrame(
        {"figure": f"{name}, ms, {at.dtype} N={at.N} D={at.D} C={at.C:,}", "predicted": predicted,
         "measured": measured, "ratio": measured / predicted}
        for name, at, predicted, measured in lines
    ).dropna(ignore_index=True)  # fmt: skip
