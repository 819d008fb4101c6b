"""Sizes of the Triton kernels' blocks and chunks: pure functions of what is computed and where.

The tiles are data, `tiles.json`, each with its evidence, measured or predicted. `python -m perf tune --device
cuda` writes them, by the clock, from what compiles without spills.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tiles(NamedTuple):
    """One tile of logits, how it is computed, and how many programs share the tiles."""

    block_n: int  # samples
    block_c: int  # classes
    block_d: int  # of the sum over D, at a time
    warps: int
    stages: int  # how many blocks of the sum are loaded ahead
    descriptors: bool  # whether the tensor memory accelerator loads them
    programs: int  # of a persistent grid; 0: one program per tile
    registers: int  # that the compiler may use per thread, so that another block fits; 0: as many as it wants


class Device(NamedTuple):
    target: str  # "sm_80", "gfx942", ..., "interpreter"
    processors: int  # SMs or CUs
    memory: int  # bytes


def pick_tiles(
    target: str, dtype: torch.dtype, n: int, d: int, k: int, processors: int = 132, precision: str = "ieee"
) -> Tiles:
    """The tile for x [N, D] times k rows.

    The same for any number of rows. From the table, where float32 that is multiplied as TF32 has lines of its own;
    fewer samples take a lower tile, in three steps, so that few kernels are compiled, and a narrow D takes a narrower
    block of the sum. Without the product (float32 as it is) a tile is what a few warps read at once.
    """
    lowest = 16 if n <= 16 else 64 if n <= 64 else 128
    if by_library(dtype, precision) and target != "interpreter":
        return Tiles(min(64, lowest), 64, 16, 4, 1, False, 0, 0)
    line = table()[f"{family(target)} {'tf32' if dtype == torch.float32 else 'bfloat16'}"]
    block_n, block_d = min(line["block_n"], lowest), min(line["block_d"], max(16, next_power(d)))
    rounds = (d + block_d - 1) // block_d
    # A tensor memory tile has at least 64 samples, a warp group's product too.
    return Tiles(
        block_n=block_n,
        block_c=line["block_c"],
        block_d=block_d,
        warps=line["warps"] if block_n >= 64 else 4,
        stages=min(line["stages"], rounds + 1),  # of this tile and the next one: more leave no room for another block
        descriptors=line["descriptors"],
        programs=line["programs_per_processor"] * processors,
        registers=line["registers"] if block_n >= 64 else 0,  # that limit is for so many warps
    )


def by_library(dtype: torch.dtype, precision: str) -> bool:
    """Whether torch makes the product (on a GPU by cuBLAS or hipBLASLt), and the kernel what follows from it.

    No matrix unit multiplies float32 as it is, and kernels of Triton are slow at it without one: on an H200 a step with
    products of ours took 21.7 ms where full logits with cuBLAS's took 11.7 (reports/gpu-h200/README.md, C = 100,000).
    """
    return dtype == torch.float32 and precision == "ieee"


@functools.cache
def row_block(d: int) -> tuple[int, int, int]:
    """Rows, columns and warps of the row-wise kernels: whole rows, about 2048 numbers at a time.

    The audit compiles them with every share asked for, and an update (reports/kernels.csv).
    """
    block_d = max(16, next_power(d))
    return max(1, 2048 // block_d), block_d, min(32, max(4, block_d // 512))


def next_power(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def family(target: str) -> str:
    """The target whose tiles are used: consumer cards have less shared memory than the server card before them."""
    if target.startswith("gfx"):
        return "gfx942"
    if not target.startswith("sm_"):
        return "interpreter"
    number = int(target[3:])
    if number in (80, 87):
        return "sm_80"
    if 90 <= number < 100:
        return "sm_90"
    if 100 <= number < 120:
        return "sm_100"
    return "sm_89"


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    found = json.loads(Path(__file__).with_name("tiles.json").read_text())
    # A program of the interpreter costs the same at any size.
    whole = dict(block_n=16, block_c=64, block_d=64, warps=4, stages=2, descriptors=False)
    whole |= dict(programs_per_processor=0, registers=0)
    return found | {f"interpreter {kind}": whole for kind in ("tf32", "bfloat16")}


def device_of(tensor: Tensor) -> Device:
    return gpu(tensor.device.index or 0) if tensor.is_cuda else Device("interpreter", 1, 4 << 30)


@functools.cache
def gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    hip = torch.version.hip
    target = properties.gcnArchName.split(":")[0] if hip else f"sm_{properties.major}{properties.minor}"
    return Device(target, properties.multi_processor_count, properties.total_memory)
