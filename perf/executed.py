"""Bytes and flops of every kernel's launch counted a second way, while it executes, beside kernels.py's formulas."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import torch

from perf import kernels
from perf.compiled import multiplying
from perf.counted import counting
from perf.kernels import DTYPES, TILED, Size
from perf.played import played
from tritonmargin.kernels import triton_ops

SIZE = 128, 64, 384  # N, D, classes: whole tiles, and several of them


def table(dtypes: tuple[str, ...] = ("bfloat16", "tf32", "float32")) -> pd.DataFrame:
    """A line per kernel and dtype; under ttsem, as code for compute capability 9.0."""
    with played():
        return pd.DataFrame([line for dtype in dtypes for line in executed(dtype)])


def executed(dtype: str) -> list[dict[str, Any]]:
    n, d, k = SIZE
    size = Size(n, d, k, dtype)
    lines = []
    for name, launch in kernels.launches(DTYPES[dtype], n, d, k):
        with multiplying(dtype), counting() as count:
            launch()
            columns, rows = tile_counts(name, size)
        lines.append({
            "kernel": name, "dtype": dtype, "N": n, "D": d, "chunk": k,
            "formula_bytes": kernels.launch_bytes(name, size, columns if name in TILED else 0),
            "tile_bytes": tile_bytes(name, size, columns, rows), "executed_bytes": count.loaded + count.stored,
            "formula_product_flops": 2 * n * d * k if name in TILED and not kernels.elsewhere(dtype) else 0,
            "executed_product_flops": count.flops,
        })  # fmt: skip
    return lines


def tile_counts(kernel: str, size: Size) -> tuple[int, int]:
    """Tiles across the classes, and across the samples."""
    if kernel not in TILED:
        return 1, 1
    tiles = triton_ops.tiles_for(torch.empty(size.n, size.d, dtype=DTYPES[size.dtype]), size.k)
    return math.ceil(size.k / tiles.block_c), math.ceil(size.n / tiles.block_n)


def tile_bytes(kernel: str, size: Size, columns: int, rows: int) -> int:
    """The formula, with what a tile kernel reads again: x for every column of tiles, class rows for every row."""
    whole = kernels.launch_bytes(kernel, size, columns if kernel in TILED else 0)
    if kernels.elsewhere(size.dtype):
        columns = rows = 1
    again = (columns - 1) * size.n * size.d * size.itemsize + (rows - 1) * size.k * size.d * size.itemsize
    return whole + again
