"""The table of tiles: candidates compiled, those that spill or do not fit dropped, the rest ranked by the clock alone.

python -m perf tune                      list what could be used; no clock, so nothing is written
python -m perf tune --device cuda        measure on this machine's GPU, and write its lines to the table
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import triton.testing

from perf.kernels import cases
from perf.kernels.audit import TOLERATED
from perf.kernels.cases import BETWEEN, DTYPES, HEAVIEST, TABLE, TILED, D, N, Tiles
from perf.kernels.compile import Compiled, Progress, compiled_on, in_processes
from perf.kernels.gpus import GPUS, Gpu

TARGETS, KINDS = tuple(GPUS), ("bfloat16", "tf32")  # float16 has bfloat16's line of the table
Row = dict[str, Any]


def candidates(gpu: Gpu, dtype: str) -> Iterator[Tiles]:
    """Tiles worth compiling: those whose sums fit the registers or the tensor memory. Programs: of a processor."""
    item, family = DTYPES[dtype].itemsize, cases.family(gpu.target)
    hopper = family in ("sm_90", "sm_100")
    blocks_c = (64, 128) if item == 4 else (64, 128, 256)
    for block_n, block_c, block_d, warps, stages in itertools.product(
        (64, 128), blocks_c, (16, 32) if item == 4 else (32, 64), (4, 8), (2, 3, 4)
    ):
        if block_n * block_c // (warps * 32) > 128:
            continue  # registers of the sums alone
        size = (block_n + block_c) * block_d * item * stages
        if size > gpu.shared or (hopper and stages == 2) or (gpu.target.startswith("gfx") and stages > 2):
            continue
        free = Tiles(block_n, block_c, block_d, warps, stages, hopper, 2 * hopper, 0)
        yield free
        if hopper:  # plain loads too, whose addresses only the clock can judge
            yield free._replace(descriptors=False, programs=0)


def launches_with(
    tile: Tiles, gpu: Gpu, dtype: str, names: Iterable[str] = TILED, d: int = D, **how: Any
) -> cases.Launches:
    """Launches of cases.py with this tile, by their names there."""
    names = list(names)
    with cases.with_tile(tile, gpu), cases.on(gpu):
        found = cases.launches({name.partition(", ")[2]: None for name in names}, dtype, d=d, **how)
    return {name: found[name] for name in names}


def compile_with(tile: Tiles, gpu: Gpu, dtype: str, names: Iterable[str] = TILED, d: int = D) -> list[Compiled]:
    return list(compiled_on(gpu, launches_with(tile, gpu, dtype, names, d)).values())


def usable(targets: Iterable[str], dtypes: Iterable[str], progress: Progress) -> pd.DataFrame:
    """Every candidate, those first that could be used: both passes fit without a spill."""
    pairs = itertools.product(targets, dtypes)
    asked = [(target, dtype, tile) for target, dtype in pairs for tile in candidates(gpu_of(target), dtype)]
    frame = pd.DataFrame(in_processes(compiled_row, asked, progress))
    return frame.sort_values("usable", ascending=False, kind="stable", ignore_index=True)


def compiled_row(asked: tuple[str, str, Tiles]) -> Row:
    target, dtype, tile = asked
    row = {"target": target, "dtype": dtype, **tile._asdict(), "usable": False}
    try:
        found = compile_with(tile, gpu_of(target), dtype)
    except Exception as error:  # what does not compile is no candidate; the table says so
        return row | {"failed": type(error).__name__}
    spills, blocks = sum(each.spills for each in found), min(each.blocks for each in found)
    registers = max(each.registers for each in found)
    return row | {"registers_used": registers, "spills": spills, "blocks": blocks, "usable": not spills and blocks > 0}


def gpu_of(target: str) -> Gpu:
    """Its family's numbers, where nothing is published here of the target."""
    return GPUS.get(target) or GPUS[cases.family(target)]._replace(target=target)


def measure(dtype: str, progress: Progress, device: str = "cuda") -> pd.DataFrame:
    """The usable candidates by both passes' time in a CUDA graph; the fastest eight with other programs too."""
    here = cases.this_gpu(0)  # as many classes as give every processor sixteen of the most usual tiles
    gpu, k = gpu_of(here.target)._replace(processors=here.processors), 256 * here.processors
    frame = usable([gpu.target], [dtype], progress)

    def timed(tile: Tiles) -> Row:
        row = {"target": gpu.target, "dtype": dtype, **tile._asdict(), "K": k, "microseconds": math.nan}
        try:
            passes = list(launches_with(tile, gpu, dtype, k=k, device=device, runs=device == "cuda").values())

            def both() -> None:
                for launch in passes:
                    launch()

            row["microseconds"] = 1e3 * triton.testing.do_bench_cudagraph(both, rep=5, return_mode="median")
        except Exception as error:  # out of resources, for one
            row["failed"] = type(error).__name__
        if device == "cuda":
            torch.cuda.synchronize()  # raises where this candidate broke the GPU's context: no other is blamed
        return row

    found = [timed(tile_of(row)) for _, row in frame[frame["usable"]].iterrows()]
    fastest = sorted((row for row in found if "failed" not in row), key=lambda row: row["microseconds"])[:8]
    again = [tile_of(row)._replace(programs=programs) for row in fastest for programs in (0, 1, 3)]
    return pd.DataFrame([*found, *(timed(tile) for tile in again if tile.descriptors)])


def tile_of(row: Any) -> Tiles:
    return Tiles(**{name: (bool if name == "descriptors" else int)(row[name]) for name in Tiles._fields})


def chosen(frame: pd.DataFrame) -> tuple[pd.DataFrame, Row]:
    """One target's and dtype's candidates, the fastest first, and the table's line: the first that hardly spills."""
    frame = frame.dropna(subset=["microseconds"]).sort_values("microseconds", ignore_index=True)
    for place, row in frame.iterrows():
        gpu, dtype, tile = gpu_of(row["target"]), row["dtype"], tile_of(row)
        plain = [each for d in (64, 128, 256, D) for each in compile_with(tile, gpu, dtype, TILED, d)]
        heaviest = [each for d in (64, D) for each in compile_with(tile, gpu, dtype, (HEAVIEST,), d)]
        passes = not any(each.spills for each in plain) and max(each.spills for each in heaviest) <= TOLERATED
        frame.loc[place, "passes"] = passes
        if passes:
            values = tile._replace(registers=registers_for(tile, gpu, dtype))._asdict()
            values["programs_per_processor"] = values.pop("programs")
            values["evidence"] = (
                f"measured, N={N} D={D} K={int(row['K'])}: {row['microseconds']:.1f} us for both passes of a chunk in "
                "a CUDA graph; the limit of registers as compiled"
            )
            return frame, {f"{cases.family(gpu.target)} {dtype}": values}
    return frame, {}


def registers_for(tile: Tiles, gpu: Gpu, dtype: str) -> int:
    """The limit that lets as many blocks in whatever the epilogue, or a second one at a few bytes of spills; or 0."""
    resident = min(each.blocks for each in compile_with(tile, gpu, dtype))
    resident, allowed = (2, TOLERATED) if resident == 1 else (resident, 0)
    limit = gpu.registers // (resident * tile.warps * 32) // 8 * 8
    if gpu.target.startswith("gfx") or resident < 2 or limit >= 255:
        return 0
    found = compile_with(tile._replace(registers=limit), gpu, dtype, BETWEEN)
    return limit if all(each.spills <= allowed for each in found) else 0


def tune(dtypes: Iterable[str], progress: Progress, device: str = "cuda", path: Path = TABLE) -> pd.DataFrame:
    """Search by the clock, for this machine's GPU, and write its lines to the table: other targets keep theirs."""
    judged = [chosen(measure(dtype, progress, device)) for dtype in dtypes]
    table = json.loads(path.read_text()) | {name: line for _, lines in judged for name, line in lines.items()}
    path.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
    return pd.concat([frame for frame, _ in judged], ignore_index=True)
