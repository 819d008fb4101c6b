"""Every launch of our kernels that is compiled, counted or tuned here, by name.

The only file of perf/ that calls the kernels: what they are given, how they choose tiles and chunks. Nothing runs
before a launch is called, and inside `compile.compiling_for` it compiles and does not run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perf.kernels.gpus import Gpu
from tritonmargin.kernels import draw, products, tiles, torch_ops, triton_ops, updates

Launches = dict[str, Callable[..., object]]
Tiles = tiles.Tiles
TABLE = Path(tiles.__file__).with_name("tiles.json")

# Of x and W. "tf32" is float32 whose products torch was told to round to it; float16 is multiplied as TF32.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
MULTIPLIED = ("bfloat16", "tf32")  # what the tile kernel's own products are made in
N, D, C = 1024, 512, 1_000_000
K = 4096  # classes of a chunk, where only the code matters

TILED = ("reduce_chunk", "weigh_chunk")  # the tile kernel's two launches of a step
BOTH = ("sum of exp", "gradient of exp")  # the same two as epilogues
SGD, ADAMW = "finish_rows, sgd", "finish_rows, adamw"  # finish_rows that updates the rows
KEEPING, READY = "keeping logits", "kept logits"  # for backward; and backward that starts from them
ONLINE = f"online, bias, statistics, {KEEPING}"
HEAVIEST = f"hinge, online, bias, statistics, {KEEPING}"
HINGE_GRADIENT = "gradient of hinge and bias"
FORWARD = (
    "sum of exp", "sum of exp, statistics", f"sum of exp, {KEEPING}", "sum of exp, offset", "hardest", "online",
    "online, bias", "online, statistics", f"online, {KEEPING}", ONLINE, "hinge", "hinge, bias", f"hinge, {KEEPING}",
    HEAVIEST,
)  # fmt: skip
BETWEEN = "sum of exp, statistics", "online, statistics", "gradient of softmax", "gradient of softmax and bias"
BACKWARD = (
    "gradient of exp", "gradient of exp, offset", "gradient of softmax", "gradient of softmax and bias",
    f"gradient of softmax and bias, {READY}", f"gradient of softmax, {READY}", "gradient of hinge", HINGE_GRADIENT,
    f"{HINGE_GRADIENT}, {READY}",
)  # fmt: skip

family = tiles.family  # the target whose lines of the table another one uses: sm_103 those of sm_100
this_gpu = tiles.gpu  # of a number: its target and processors


def operand(dtype: str) -> torch.dtype:
    return products.operands(DTYPES[dtype])


def device_of(gpu: Gpu) -> tiles.Device:
    return tiles.Device(gpu.target, gpu.processors, gpu.capacity)


def chunk_of(gpu: Gpu, dtype: str, n: int, d: int, c: int = C) -> int:
    """How many classes the library takes at a time on this GPU."""
    return max(1, min(c, tiles.default_chunk(device_of(gpu), operand(dtype), n, d, c)))


def tile_counts(n: int, d: int, k: int, dtype: str) -> tuple[int, int]:
    """Tiles across the classes, and across the samples, on the GPU of `on` or of this machine."""
    tile = triton_ops.tiles_for(torch.empty(n, d, dtype=operand(dtype)), k)
    return math.ceil(k / tile.block_c), math.ceil(n / tile.block_n)


def by_library(dtype: str) -> bool:
    """Whether torch makes the products, and the tile kernel only reads them."""
    return tiles.by_library(operand(dtype), "ieee" if dtype == "float32" else "tf32")


@contextlib.contextmanager
def _replaced(name: str, answer: object) -> Iterator[None]:
    """What the kernels ask for by this name is answered so."""
    before = getattr(triton_ops, name)
    setattr(triton_ops, name, lambda *_: answer)
    try:
        yield
    finally:
        setattr(triton_ops, name, before)


def on(gpu: Gpu) -> contextlib.AbstractContextManager[None]:
    """The kernels are launched as on this GPU."""
    return _replaced("device_of", device_of(gpu))


def with_tile(tile: Tiles, gpu: Gpu) -> contextlib.AbstractContextManager[None]:
    """The kernels take this tile instead of the table's; its programs are those of a processor, as in the table."""
    return _replaced("pick_tiles", tile._replace(programs=tile.programs * gpu.processors))


def step(dtype: str, n: int, d: int, k: int) -> Launches:
    """The kernels of a step over one chunk, in their order; the three of finish_rows are alternatives."""
    kind, target = operand(dtype), torch.arange(n) % k
    x, rows, w = (torch.zeros(size, d, dtype=of) for size, of in ((n, kind), (k, kind), (k, DTYPES[dtype])))
    tile, run = triton_ops.new_tile(x, k, kind), torch_ops.Running(total=torch.zeros(triton_ops.slots(x, k), n))
    prepared, shares = (
        torch_ops.Rows(rows, None, torch.zeros(k), w, None),
        [torch_ops.Shares(target, torch.zeros(n, d))],
    )
    finish = partial(triton_ops.finish_rows, rows, rows, prepared, 0, shares, None, None, torch.ones(()))
    reduce, weigh = TILED
    return {
        "prepare_rows": partial(triton_ops.prepare_rows, w, None, 0, k, True, rows, None),
        reduce: partial(triton_ops.reduce_chunk, rows, x, None, target, 0, True, tile, tile, False, run),
        weigh: partial(triton_ops.weigh_chunk, rows, x, None, target, 0, "exp", run.total[0], tile, tile, None, None),
        "finish_rows": partial(finish, torch.empty_like(w), None),
        SGD: partial(finish, w, slice(0, k), update_of("sgd", w)),
        ADAMW: partial(finish, w, slice(0, k), update_of("adamw", w)),
    }


def update_of(rule: str, w: Tensor) -> updates.RowUpdate:
    """The rows' update in backward: bfloat16 is rounded by chance, state included."""
    low = w.dtype == torch.bfloat16
    first, second = (torch.zeros_like(w, dtype=w.dtype if low else torch.float32) for _ in range(2))
    seed = 1 if low else None
    if rule == "sgd":
        return updates.RowUpdate(rule, w, (0.1, 0.9, 5e-4, 0.0), (first,), seed=seed)
    steps = torch.zeros(len(w), dtype=torch.int32)
    return updates.RowUpdate(rule, w, (1e-3, 0.9, 0.999, 1e-8, 0.1), (first, second), steps, seed)


def epilogues(x: Tensor, rows: Tensor) -> Launches:
    """What the tile kernel does with the logits of x [N, D] and rows [K, D]: the names say what is asked for.

    Each thing costs registers, which decide whether a second block fits. All of them at once are in the heaviest.
    """
    n, k, made = len(x), len(rows), dict(device=x.device)
    target, number, bias = torch.zeros(n, dtype=torch.int64, **made), torch.zeros(n, **made), torch.zeros(k, **made)
    tile = triton_ops.new_tile(x, k, x.dtype)

    def slots(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.zeros(triton_ops.slots(x, k), n, dtype=dtype, **made) if wanted else None

    def forward(name: str) -> Callable[[], object]:
        bounded, online, hinge = "sum of exp" in name, "online" in name, "hinge" in name
        statistics = "statistics" in name or "hardest" in name
        run = torch_ops.Running(
            slots(bounded or online), slots(online), slots(statistics), slots(statistics, torch.int64),
            number if hinge else None, slots(hinge), slots(hinge),
        )  # fmt: skip
        each = bias if "bias" in name or "offset" in name else None
        return partial(triton_ops.reduce_chunk, rows, x, each, target, 0, bounded, tile, tile, KEEPING in name, run)

    def backward(name: str) -> Callable[[], object]:
        kind = name.removeprefix("gradient of ").split()[0].rstrip(",")
        each, factor = bias if "bias" in name or "offset" in name else None, number if "bias" in name else None
        ready = torch.empty_like(tile) if READY in name else None
        return partial(triton_ops.weigh_chunk, rows, x, each, target, 0, kind, number, tile, tile, ready, factor)

    return {name: (backward if name.startswith("gradient") else forward)(name) for name in (*FORWARD, *BACKWARD)}


def row_kernels(dtype: str) -> Launches:
    """The row-wise kernels with all that they may be asked for, and with weights in float32 as under autocast."""
    kind, ids = operand(dtype), torch.arange(0, K, 2)
    shares = [torch_ops.Shares(torch.zeros(N, dtype=torch.int64), torch.empty(N, D)) for _ in range(3)]
    mean, found = (torch.empty(len(ids)), torch.empty(D)), Launches()
    for name, weight in {"": torch.empty(K, D, dtype=DTYPES[dtype]), ", W in float32": torch.empty(K, D)}.items():
        rows, wide = torch.empty(len(ids), D, dtype=kind), torch.empty(len(ids), D)
        prepared = torch_ops.Rows(rows, None, torch.empty(len(ids)), weight, ids)
        finish = partial(triton_ops.finish_rows, rows, rows, prepared, 0, shares[:2], shares[2], mean, torch.ones(()))
        found |= {
            f"rows: prepare, ids{name}": partial(triton_ops.prepare_rows, weight, ids, 0, len(ids), True, rows, wide),
            f"rows: finish, everything{name}": partial(finish, torch.empty_like(weight), ids),
            f"rows: finish, everything, adamw{name}": partial(finish, weight, ids, update_of("adamw", weight)),
        }
    return found


def draws() -> Launches:
    """The three kernels that draw a tenth of the classes, launched as the library does: ids and state are int64."""
    found, before = Launches(), draw.call

    def keep(kernel: Any, *args: Any, **options: Any) -> None:
        found[f"draw: {kernel.fn.__name__}"] = partial(before, kernel, *args, **options)

    draw.call = keep
    try:
        draw.draw_by_triton(torch.arange(N), torch.tensor([1, 0]), 0, C, C // 10)
    finally:
        draw.call = before
    return found


def beyond_a_step(dtype: str) -> Launches:
    """Every epilogue, two of them with the other two heights of a tile, the row-wise kernels, and once the draw's."""
    x, rows = (torch.empty(size, D, dtype=operand(dtype)) for size in (N, K))
    found = epilogues(x, rows)
    for n in (16, 64):  # up to which tiles are lower
        lower = epilogues(x[:n], rows)
        found |= {f"{name}, {n} samples": lower[name] for name in BOTH}
    found |= row_kernels(dtype)
    return found | draws() if dtype == "bfloat16" else found  # a draw has no dtype
