"""Sizes of the Triton kernels' blocks and chunks: pure functions of what is computed and where.

The tiles themselves are data, `tiles.json`, each with its evidence. `python -m perf tune` writes it, from a search over
compiled variants ranked by a static model; on a GPU, by the clock.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

CACHE_SHARE = 0.7  # of the GPU's last-level cache, for a chunk's tile, rows and gradient rows


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
    specialised: bool  # whether warps share the work by its kind, so that a block alone overlaps product and epilogue


class Device(NamedTuple):
    target: str  # "sm_80", "gfx942", ..., "interpreter"
    processors: int  # SMs or CUs
    cache: int  # bytes of the last-level cache


def pick_tiles(
    target: str, dtype: torch.dtype, n: int, d: int, k: int, processors: int = 132, precision: str = "ieee"
) -> Tiles:
    """The tile for x [N, D] times k rows.

    From the table, where float32 that is multiplied as TF32 has lines of its own; fewer samples take a lower tile, in
    three steps, so that few kernels are compiled, and a narrow D takes a narrower block of the sum.
    """
    kind = "bfloat16" if dtype != torch.float32 else "tf32" if precision == "tf32" else "float32"
    line = table()[f"{family(target)} {kind}"]
    block_n = min(line["block_n"], 16 if n <= 16 else 64 if n <= 64 else 128)
    # A tensor memory tile has at least 64 samples, a warp group's product too.
    return Tiles(
        block_n=block_n,
        block_c=line["block_c"],
        block_d=min(line["block_d"], max(16, next_power(d))),
        warps=line["warps"] if block_n >= 64 else 4,
        stages=line["stages"],
        descriptors=line["descriptors"],
        programs=line["programs_per_processor"] * processors,
        registers=line["registers"],
        specialised=line["specialised"],
    )


def default_chunk(device: Device, dtype: torch.dtype, n: int, d: int) -> int:
    """How many classes to walk at a time.

    As many as keep the logits' tile, the prepared rows and the gradient rows, (N + 2 D) numbers a class, inside
    `CACHE_SHARE` of the cache, so that dL/dz never goes to main memory; rounded down to whole waves of tiles (every
    processor has the same number of them), and never below one wave. float32's waves are of its own tile, also where it
    is multiplied as TF32: backward may see another setting than forward.

    A chunk costs about five launches, each some tens of microseconds of the CPU: on a fast GPU small chunks that are
    launched one by one wait for it. A CUDA graph of the step has no such limit, and a larger `chunk_bytes` fewer
    launches.
    """
    tile = pick_tiles(device.target, dtype, n, d, 1 << 20, device.processors)
    across = max(1, (n + tile.block_n - 1) // tile.block_n)
    programs = tile.programs or 2 * device.processors
    wave = max(1, programs // across) * tile.block_c
    fitting = int(CACHE_SHARE * device.cache) // ((n + 2 * d) * dtype.itemsize)
    return max(1, fitting // wave) * wave


def row_block(d: int) -> tuple[int, int, int]:
    """Rows, columns and warps of the row-wise kernels: whole rows, about 2048 numbers at a time.

    Twice as many spill where every share is asked for (python -m perf audit).
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
    whole |= dict(programs_per_processor=0, registers=0, specialised=False)
    return found | {f"interpreter {kind}": whole for kind in ("float32", "tf32", "bfloat16")}


def device_of(tensor: Tensor) -> Device:
    return gpu(tensor.device.index or 0) if tensor.is_cuda else Device("interpreter", 1, 32 << 20)


@functools.cache
def gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        # Its L2 belongs to one of eight dies; what all of them share is the Infinity Cache of 256 MB.
        target = properties.gcnArchName.split(":")[0]
        return Device(target, properties.multi_processor_count, 256 << 20)
    cache = getattr(properties, "L2_cache_size", 0) or 32 << 20
    return Device(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count, cache)
