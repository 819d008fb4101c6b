"""The table of tiles: every candidate compiled for every target, ranked by the static bound, or by the clock on a GPU.

python -m perf tune                      compile, rank, write tritonmargin/kernels/tiles.json
python -m perf tune --device cuda        measure on this machine's GPU instead, for its target only
python -m perf tune --measured FILE      write what was measured elsewhere, as `python -m perf gate` leaves it
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F

from perf import static
from perf.clock import synchronise
from perf.compiled import DTYPES, Compiled, compiling_for, itemsize, multiplying
from perf.gpus import GPUS, Gpu
from perf.rows import UP, Row, measured
from tritonmargin.kernels import tiles, triton_ops
from tritonmargin.kernels.tiles import Tiles
from tritonmargin.kernels.torch_ops import Running

TABLE = Path(tiles.__file__).with_name("tiles.json")
N, D, K = 1024, 512, 4096  # what candidates are compared on
TOLERATED = 32  # bytes of spills in the heaviest epilogues, or where a limit of registers lets a second block in
EXAMPLE = Tiles(128, 128, 64, 8, 3, True, 1, 0, False)
KINDS = ("bfloat16", "tf32")  # of products in the kernel; float16 has the tiles of bfloat16


def candidates(gpu: Gpu, dtype: str) -> Iterator[Tiles]:
    """Tiles worth compiling: those whose sums fit the registers or the tensor memory."""
    wide = itemsize(dtype) == 4
    family = tiles.family(gpu.target)  # sm_103 has what sm_100 has
    hopper = family in ("sm_90", "sm_100")
    blocks_c = (64, 128) if wide else (64, 128, 256)
    for block_n, block_c, block_d, warps, stages in itertools.product(
        (64, 128), blocks_c, (16, 32) if wide else (32, 64), (4, 8), (2, 3, 4)
    ):
        if block_n * block_c // (warps * 32) > 128:
            continue  # registers of the sums alone
        size = (block_n + block_c) * block_d * itemsize(dtype) * stages
        if size > gpu.shared or (hopper and stages == 2) or (gpu.target.startswith("gfx") and stages > 2):
            continue
        free = Tiles(block_n, block_c, block_d, warps, stages, hopper, int(hopper), 0, False)
        yield free
        # Only Blackwell's accumulators, in tensor memory, can be handed from warp to warp.
        if family == "sm_100":
            yield free._replace(specialised=True)


def measurable(gpu: Gpu, dtype: str) -> Iterator[Tiles]:
    """What is compiled and timed: plain loads too, whose addresses only the clock can judge."""
    for tile in candidates(gpu, dtype):
        yield tile._replace(programs=2 if tile.programs else 0)
        if tile.descriptors and not tile.specialised:
            yield tile._replace(descriptors=False, programs=0)


class Small(NamedTuple):
    """A search that only shows that it works: few candidates and numbers, another clock."""

    clock: Callable[[Callable[[], None]], float]  # seconds of a call
    candidates: int = 2
    n: int = 16
    d: int = 32
    k: int = 128


def regrouped(some: list[Row]) -> list[Row]:
    """The same code in other grids: of one program per tile, and of 1 and 3 to a processor."""
    return [row | {"programs": programs} for row in some if row["descriptors"] for programs in (0, 1, 3)]


def both_passes(x: torch.Tensor, rows: torch.Tensor) -> Callable[[], None]:
    """The bounded logsumexp, and its gradient, into buffers that are there: to be timed."""
    n, k = len(x), len(rows)
    target = torch.zeros(n, dtype=torch.int64, device=x.device)
    tile = triton_ops.new_tile(x, k, x.dtype)
    run = Running(total=torch.zeros(triton_ops.slots(x, k), n, device=x.device))

    def launch() -> None:
        triton_ops.reduce_chunk(rows, x, None, target, 0, True, tile, tile, False, run)
        triton_ops.weigh_chunk(rows, x, None, target, 0, "exp", run.total[0], tile, tile, None, None)

    return launch


def launches(x: torch.Tensor, rows: torch.Tensor) -> None:
    both_passes(x, rows)()


def heaviest(x: torch.Tensor, rows: torch.Tensor) -> None:
    """The epilogue that asks for most: online, with a bias, the hardest class, the logits kept."""
    n, k = len(x), len(rows)
    target = torch.zeros(n, dtype=torch.int64, device=x.device)
    tile = triton_ops.new_tile(x, k, x.dtype)
    total = torch.zeros(triton_ops.slots(x, k), n, device=x.device)
    run = Running(total, total.clone(), total.clone(), total.long())
    triton_ops.reduce_chunk(rows, x, total.new_zeros(k), target, 0, False, tile, tile, True, run)


def others(x: torch.Tensor, rows: torch.Tensor) -> None:
    """Epilogues between the lightest and the heaviest: statistics; a softmax with a bias and its gradient."""
    n, k = len(x), len(rows)
    target = torch.zeros(n, dtype=torch.int64, device=x.device)
    tile = triton_ops.new_tile(x, k, x.dtype)
    total = torch.zeros(triton_ops.slots(x, k), n, device=x.device)
    for bounded in (True, False):
        run = Running(total, None if bounded else total.clone(), total.clone(), total.long())
        triton_ops.reduce_chunk(rows, x, None, target, 0, bounded, tile, tile, False, run)
    bias, shift = total.new_zeros(k), total.new_zeros(n)
    for each, factor in ((None, None), (bias, shift)):
        triton_ops.weigh_chunk(rows, x, each, target, 0, "softmax", shift, tile, tile, None, factor)


def compile_with(tile: Tiles, gpu: Gpu, dtype: str, what: Callable[..., None] = launches, d: int = D) -> list[Compiled]:
    x, rows = (torch.empty(size, d, dtype=DTYPES[dtype]) for size in (N, K))
    chosen = tile._replace(programs=2 * gpu.processors if tile.programs else 0)
    with multiplying(dtype), using(chosen), compiling_for(gpu.target, gpu.processors) as found:
        what(x, rows)
    return found


class using:
    """`pick_tiles` answers with this one."""

    def __init__(self, tile: Tiles) -> None:
        self.tile = tile

    def __enter__(self) -> None:
        self.real = triton_ops.pick_tiles
        triton_ops.pick_tiles = lambda *_: self.tile

    def __exit__(self, *_: object) -> None:
        triton_ops.pick_tiles = self.real


def search(gpu: Gpu, dtype: str, say: Callable[[str], Any] = print) -> pd.DataFrame:
    """One line per candidate, the best first: by predicted cycles per logit of both passes."""
    lines = []
    for tile in candidates(gpu, dtype):
        say(f"{gpu.target} {dtype} {tile}")
        line: dict[str, Any] = {"target": gpu.target, "dtype": dtype, **tile._asdict()}
        try:
            found = compile_with(tile, gpu, dtype)
        except Exception as error:  # what does not compile is no candidate; the table says so
            lines.append(line | {"failed": type(error).__name__})
            continue
        lines.append(line | figures(tile, found, gpu, dtype))
    frame = pd.DataFrame(lines)
    if "cycles_per_logit" not in frame:
        return frame
    frame["usable"] = (frame["spills"] == 0) & (frame["blocks"] >= 1)
    frame["overlapped"] = frame["specialised"] | (frame["blocks"] >= 2)
    return settled(ranked(frame), gpu, dtype)


def figures(tile: Tiles, found: list[Compiled], gpu: Gpu, dtype: str) -> dict[str, Any]:
    """What both passes take, from their code."""
    bounds = [static.tile_bound(each, gpu, dtype, 0.0) for each in found]
    terms = ("matrix", "exp", "issue", "shared", "latency")
    return {
        "registers_used": max(each.registers for each in found),
        "spills": sum(each.spills for each in found),
        "blocks": min(bound.blocks for bound in bounds),
        **{name: sum(getattr(bound, name) for bound in bounds) for name in terms},
        "shared_bytes": max(each.shared for each in found),
        "cycles_per_logit": sum(bound.cycles for bound in bounds) / (tile.block_n * tile.block_c),
    }


def settled(frame: pd.DataFrame, gpu: Gpu, dtype: str) -> pd.DataFrame:
    """The best first that spills at no width, nor more than a few registers in its heaviest epilogue.

    With the blocks that a processor holds of it, and its limit of registers.
    """
    for place, line in frame[frame["usable"]].iterrows():
        tile = Tiles(*(type(example)(line[name]) for name, example in EXAMPLE._asdict().items()))
        found = compile_with(tile, gpu, dtype)
        elsewhere = [
            sum(each.spills for each in compile_with(tile, gpu, dtype, what, d))
            for d, what in ((64, launches), (128, launches), (256, launches), (64, heaviest), (D, heaviest))
        ]
        frame.loc[place, "spilled_bytes_elsewhere"] = sum(elsewhere)
        if sum(each.spills for each in found) + sum(elsewhere[:3]) == 0 and max(elsewhere) <= TOLERATED:
            resident = min(static.blocks(each, gpu) for each in found)
            # A block alone may make room for a second one.
            alone = resident == 1 and not tile.specialised
            limit = (
                registers_for(tile, gpu, dtype, 2, TOLERATED) if alone else registers_for(tile, gpu, dtype, resident)
            )
            tile = tile._replace(registers=limit)
            values = {"registers": limit, **figures(tile, compile_with(tile, gpu, dtype), gpu, dtype)}
            frame.loc[place, list(values)] = list(values.values())
            return pd.concat([frame.loc[[place]], frame.drop(index=place)], ignore_index=True)
        frame.loc[place, "usable"] = False
    return frame


def registers_for(tile: Tiles, gpu: Gpu, dtype: str, resident: int, spilled: int = 0) -> int:
    """The limit that lets as many blocks in whatever the epilogue, where none spills more bytes under it; or 0."""
    limit = gpu.registers // (resident * tile.warps * 32) // 8 * 8
    if gpu.target.startswith("gfx") or resident < 2 or limit >= 255:
        return 0
    found = compile_with(tile._replace(registers=limit), gpu, dtype, others)
    return limit if all(each.spills <= spilled for each in found) else 0


def ranked(frame: pd.DataFrame) -> pd.DataFrame:
    """The best first: no spills, the least cycles (to half a percent), the fewest rounds, the fewest instructions."""
    frame = frame.assign(steps=(200 * frame["cycles_per_logit"] / frame["cycles_per_logit"].min()).round())
    return frame.sort_values(
        ["usable", "steps", "overlapped", "block_d", "issue", "shared_bytes"],
        ascending=[False, True, False, False, True, True], ignore_index=True,
    ).drop(columns="steps")  # fmt: skip


def entry(best: pd.Series, how: str) -> dict[str, Any]:
    """A line of tiles.json, with its evidence."""
    names = ("block_n", "block_c", "block_d", "warps", "stages", "registers")
    kept = {name: int(best[name]) for name in names}
    kept |= {name: bool(best[name]) for name in ("descriptors", "specialised")}
    if how == "predicted":
        kept["programs_per_processor"] = int(best["blocks"]) if best["programs"] else 0
        evidence = (
            f"predicted, N={N} D={D}: {int(best['registers_used'])} registers, no spill, {int(best['blocks'])} blocks "
            f"a processor; cycles of both passes: matrix {best['matrix']:.0f}, exp {best['exp']:.0f}, issue "
            f"{best['issue']:.0f}, shared {best['shared']:.0f}; {best['cycles_per_logit']:.3f} cycles per logit"
        )
    else:
        kept["programs_per_processor"] = int(best["programs"])
        evidence = (
            f"measured, N={N} D={D} K={int(best['K'])}: {best['microseconds']:.1f} us for both passes of a chunk in a "
            "CUDA graph; the limit of registers by the model"
        )
    return kept | {"evidence": evidence}


def write(entries: dict[str, dict[str, Any]], path: Path = TABLE) -> None:
    """Merge into the table: other targets keep their lines."""
    table = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(dict(sorted((table | entries).items())), indent=1) + "\n")


def measure(
    dtype: str,
    say: Callable[[str], Any] = print,
    device: str = "cuda",
    repeats: int = 5,
    left: Callable[[], float] = lambda: math.inf,
    found: list[Row] | None = None,
    keep: Callable[[list[Row]], Any] = lambda rows: None,
    small: Small | None = None,
) -> pd.DataFrame:
    """The candidates on this machine's GPU, the fastest first; `left`, `found`, `keep`: see `measured`.

    By the time of both passes in a CUDA graph, where no launch waits for the CPU, over as many classes as give every
    processor sixteen of the most usual tiles.
    """
    import triton.testing

    def in_a_graph(call: Callable[[], None]) -> float:  # seconds
        return 1e-3 * float(triton.testing.do_bench_cudagraph(call, rep=repeats, return_mode="median"))

    here = tiles.gpu(0)
    gpu = like(here.target)
    k, clock = (256 * here.processors, in_a_graph) if small is None else (small.k, small.clock)
    some = itertools.islice(measurable(gpu, dtype), None if small is None else small.candidates)
    asked: list[Row] = [{"target": gpu.target, "dtype": dtype, **tile._asdict()} for tile in some]
    if small is None and left() > 0 and len(found or []) < len(asked):
        ahead(gpu, dtype, k, say)
    x, classes = operands(k, dtype, device) if small is None else operands(k, dtype, device, small.n, small.d)

    def time(line: Row) -> Row:
        tile = Tiles(*(line[name] for name in Tiles._fields))
        say(f"{gpu.target} {dtype} {tile}")
        synchronise(
            device if small is None else "cpu"
        )  # raises where a candidate broke the GPU's context: the next is not blamed for it
        try:
            with multiplying(dtype), using(here_of(tile, here.processors)):
                taken = clock(both_passes(x, classes))
        except Exception as error:  # out of resources, for one
            return {"failed": type(error).__name__}
        return {"microseconds": 1e6 * taken, "K": k, "processors": here.processors}

    rows = measured(asked, found, time, left, keep)
    timed = sorted((row for row in rows if "microseconds" in row), key=lambda row: row["microseconds"])
    if small is None and len(rows) == sum(row.get("failed") != UP for row in rows):
        asked += regrouped([{name: row[name] for name in asked[0]} for row in timed[:8]])
        rows = measured(asked, [*rows, *(found or [])], time, left, keep)
    frame = pd.DataFrame(rows)
    return frame.sort_values("microseconds", ignore_index=True) if "microseconds" in frame else frame


def like(target: str) -> Gpu:
    """The numbers of the GPU whose tiles the target uses."""
    return GPUS.get(tiles.family(target), GPUS["sm_80"])._replace(target=target)


def here_of(tile: Tiles, processors: int) -> Tiles:
    return tile._replace(programs=tile.programs * processors)


def operands(k: int, dtype: str, device: str, n: int = N, d: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    """x [n, d] and rows [k, d] of unit length: logits inside the range of exp."""
    x, rows = (F.normalize(torch.randn(size, d)).to(device, DTYPES[dtype]) for size in (n, k))
    return x, rows


def ahead(gpu: Gpu, dtype: str, k: int, say: Callable[[str], Any]) -> None:
    """Compile every candidate into Triton's cache, on all cores: one after another they take minutes."""
    found = list(measurable(gpu, dtype))
    workers = min(12, os.cpu_count() or 1, len(found))
    say(f"{gpu.target} {dtype}: {len(found)} candidates are compiled by {workers} processes")
    arguments = [(found[place::workers], dtype, k) for place in range(workers)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(compile_here, arguments)


def compile_here(some: list[Tiles], dtype: str, k: int, device: str = "cuda") -> None:
    x, rows = operands(k, dtype, device)
    for tile in some:
        # What fails will fail again where it is measured, and the table says so.
        with suppress(Exception), multiplying(dtype), using(here_of(tile, tiles.gpu(0).processors)):
            both_passes(x, rows)()
            synchronise(device)


def chosen(frame: pd.DataFrame) -> pd.DataFrame:
    """Measured candidates of one target and dtype, the fastest first that passes the checks of the predicted ones."""
    if "microseconds" not in frame:
        return frame
    frame = frame.assign(usable=frame["microseconds"].notna()).sort_values("microseconds", ignore_index=True)
    return settled(frame, like(frame.iloc[0]["target"]), frame.iloc[0]["dtype"])


def tune(targets: list[str], dtypes: list[str], say: Callable[[str], Any] = print) -> pd.DataFrame:
    """Search by prediction, and write the best of each target and dtype to the table."""
    frames = []
    for target, dtype in itertools.product(targets, dtypes):
        frame = search(GPUS[target], dtype, say)
        frames.append(frame)
        if "usable" in frame and frame.iloc[0]["usable"]:
            write({f"{target} {dtype}": entry(frame.iloc[0], "predicted")})
    return pd.concat(frames, ignore_index=True)


def tune_here(dtypes: list[str], say: Callable[[str], Any] = print) -> pd.DataFrame:
    """Search by the clock, for this machine's GPU, and write its lines to the table."""
    return written([measure(dtype, say) for dtype in dtypes])


def tune_from(path: Path) -> pd.DataFrame:
    """What was measured elsewhere (`--out`, or the gate's search.csv), checked here and written to the table."""
    rows = pd.read_csv(path)
    return written([frame for _, frame in rows.groupby("dtype", sort=False)])


def written(frames: list[pd.DataFrame]) -> pd.DataFrame:
    frames = [chosen(frame) for frame in frames]
    for frame in frames:
        best = frame.iloc[0]
        if best.get("usable", False):
            write({f"{tiles.family(best['target'])} {best['dtype']}": entry(best, "measured")})
    return pd.concat(frames, ignore_index=True)
