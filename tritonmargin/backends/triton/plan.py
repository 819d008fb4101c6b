"""What one class pass on a GPU needs to know and what does not change between its chunks: sizes, tiles, memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmargin.backends.tiles import Device, device_of, next_power, pick_tiles
from tritonmargin.backends.triton.launch import blocks
from tritonmargin.spec import PassSpec

SLOTS = 64 << 20  # bytes that partial sums per sample may take
LINE = 128  # numbers per sample come in so many: whole tiles of any GPU, so that a fake pass needs no tile


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its product, and how it is launched."""

    shape: tuple[int, int, int]  # rows, columns, of the sum at a time
    split: int  # parts of the columns that the epilogue takes at a time
    warps: int
    stages: int
    registers: int  # that a thread may use; 0: as many as it wants
    programs: int  # at most; 0: one a tile
    descriptors: bool

    def programs_for(self, m: int, n: int) -> int:
        count = blocks(m, self.shape[0]) * blocks(n, self.shape[1])
        return min(count, self.programs) if self.programs else count

    def finer(self, needed: bool) -> int:
        """The split of an epilogue that holds more beside the tile than others, if it does."""
        return min(2 * self.split, self.shape[1] // 16) if needed and self.split > 1 else self.split

    def options(self) -> dict[str, int]:
        """What Triton is told at a launch."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options | {"maxnreg": self.registers} if self.registers else options


class Plan(NamedTuple):
    """Sizes are in samples, classes or numbers; `line` in numbers of a line of a buffer."""

    n: int
    d: int
    active: int  # classes of the pass
    line: int  # of numbers per sample: whole tiles
    line_n: int  # of dL/dz: a multiple of 16
    line_d: int  # of x' and of copied class rows: a multiple of 16
    precision: str  # tl.dot's input_precision
    library: bool  # whether torch makes the products of logits, and of dL/dW
    copied: bool  # whether class rows are copied for the products
    whole: bool  # whether all copies are made at once and kept for backward
    forward_chunk: int
    backward_chunk: int
    retained: int  # classes whose logits are kept for backward
    reduce: Tile
    weigh: Tile
    finish: Tile
    finish_inside: bool  # whether finish_kernel multiplies itself


def plan_for(x: Tensor, weight: Tensor, class_ids: Tensor | None, spec: PassSpec) -> Plan:
    active = weight.shape[0] if class_ids is None else class_ids.shape[0]
    (n, d), device, copied = x.shape, device_of(x), copies(weight, class_ids, spec)
    precision = spec.precision if spec.dtype == torch.float32 else "ieee"
    budget = budget_of(device, spec)
    return make_plan(n, d, active, device, spec.dtype, precision, copied, budget, spec.chunk_bytes, spec.retain_bytes)


def copies(weight: Tensor, class_ids: Tensor | None, spec: PassSpec) -> bool:
    """Whether the products cannot take W as it is. float16's P holds no 1/|w|: there unit rows are copied too."""
    if class_ids is not None or spec.dtype != weight.dtype or not fits(weight):
        return True
    return spec.unit_weight if spec.dtype == torch.float16 else spec.dtype == torch.float32 and spec.precision == "tf32"


def kept_copies(x: Tensor, weight: Tensor, class_ids: Tensor | None, spec: PassSpec) -> bool:
    """Whether forward copies all class rows at once and keeps them for backward."""
    active = weight.shape[0] if class_ids is None else class_ids.shape[0]
    if spec.chunk_bytes or not copies(weight, class_ids, spec):
        return False
    return active * (blocks(weight.shape[1], 16) * 16) * spec.dtype.itemsize <= budget_of(device_of(x), spec) // 2


def budget_of(device: Device, spec: PassSpec) -> int:
    return device.memory // 64 if spec.memory_budget < 0 else spec.memory_budget


def fits(weight: Tensor) -> bool:
    """Whether the products can take W as it is stored: lines and addresses are multiples of 16 bytes, and of 16."""
    return (
        weight.stride(1) == 1
        and weight.stride(0) % 16 == 0
        and weight.shape[1] % 16 == 0
        and not (weight.data_ptr() % 16)
    )


@functools.lru_cache(maxsize=1024)
def make_plan(
    n: int, d: int, active: int, device: Device, dtype: torch.dtype, precision: str, copied: bool, budget: int,
    chunk_bytes: int, retain_bytes: int,
) -> Plan:  # fmt: skip
    tiles = pick_tiles(device.target, dtype, n, d, active, device.processors, precision)
    library = dtype == torch.float32 and precision == "ieee" and device.target != "interpreter"
    inside = dtype != torch.float32
    line_n, line_d = blocks(n, 16) * 16, blocks(d, 16) * 16
    if library:
        reduce = Tile((64, 64, 16), 1, 4, 1, 0, 0, False)
        weigh = Tile((32, 64, 16), 1, 4, 1, 0, 0, False)
    else:
        how = (tiles.warps, tiles.stages, tiles.registers, tiles.programs, tiles.descriptors)
        reduce = Tile((tiles.block_n, tiles.block_c, tiles.block_d), parts(tiles.block_c), *how)
        weigh = Tile((tiles.block_c, tiles.block_n, tiles.block_d), parts(tiles.block_n), *how)
    line = blocks(n, LINE) * LINE
    if inside:
        block_d = min(128, max(16, next_power(d)))
        block_l = 64 if device.target != "interpreter" else 16
        finish = Tile(
            (min(tiles.block_c, 16 * tiles.warps), block_d, block_l), parts(block_d), tiles.warps, tiles.stages,
            tiles.registers, tiles.programs, tiles.descriptors,
        )  # fmt: skip
    else:
        finish = Tile((16, min(128, max(16, next_power(d))), 16), 1, 4, 1, 0, 0, False)
    size = dtype.itemsize
    unit = reduce.shape[1]
    per_copy = line_d * size
    whole = copied and not chunk_bytes and active * per_copy <= budget // 2
    left = budget - (active * per_copy if whole else 0)
    fixed = 0 if whole or not copied else per_copy
    forward = active
    if (copied and not whole) or library:
        forward = chunk_of(chunk_bytes or left, fixed + (line_n * 4 if library else 0), unit, active)
    forward = min(forward, max(1, SLOTS // (4 * max(n, 1) * unit)) * unit)
    per_class = line_n * size + fixed + (0 if inside else line_d * 4) + blocks(n, weigh.shape[1]) * 4
    backward = chunk_of(chunk_bytes or left, per_class, 128, active)
    retained = 0
    if library and retain_bytes > 0:
        fitting = retain_bytes // max(1, line_n * 4)
        forward = forward if fitting >= active else min(forward, max(unit, fitting // unit * unit))
        retained = active if fitting >= active else fitting // forward * forward
    return Plan(
        n, d, active, line, line_n, line_d, precision, library, copied, whole, max(forward, 1), max(backward, 1),
        retained, reduce, weigh, finish, inside,
    )  # fmt: skip


def chunk_of(limit: int, per_class: int, unit: int, active: int) -> int:
    """Whole tiles of classes, at least one, in equal shares."""
    most = max(unit, limit // max(per_class, 1) // unit * unit)
    if most >= active:
        return active
    return blocks(blocks(active, blocks(active, most)), unit) * unit


def parts(columns: int) -> int:
    return min(4, max(1, columns // 32))
