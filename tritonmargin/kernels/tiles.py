"""Sizes of the Triton kernels' blocks: pure functions of what is computed and where."""

from __future__ import annotations

import functools
from typing import NamedTuple

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


def pick_tiles(target: str, dtype: torch.dtype, n: int, d: int, k: int, processors: int = 132) -> Tiles:
    """The tile for x [N, D] times k rows on `target` ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter")."""
    block_n = 16 if n <= 16 else 64 if n <= 64 else 128
    hopper = target.startswith("sm_") and int(target[3:]) >= 90
    wide = dtype == torch.float32
    block_d = min(32 if wide else 64, max(16, next_power(d)))
    return Tiles(
        block_n=block_n,
        block_c=64 if wide else 128,
        block_d=block_d,
        warps=4 if block_n < 128 else 8,
        stages=3,
        descriptors=hopper,
        programs=2 * processors if hopper else 0,
    )


def row_block(d: int) -> tuple[int, int, int]:
    """Rows, columns and warps of the row-wise kernels: whole rows, about 4096 numbers at a time."""
    block_d = max(16, next_power(d))
    return max(1, 4096 // block_d), block_d, 4 if block_d <= 4096 else 8


def next_power(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def target_of(tensor: Tensor) -> tuple[str, int]:
    """The kind of device a tensor is on, and how many processors it has."""
    return device_target(tensor.device.index or 0 if tensor.is_cuda else -1)


@functools.cache
def device_target(index: int) -> tuple[str, int]:
    if index < 0:
        return "interpreter", 1
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count
