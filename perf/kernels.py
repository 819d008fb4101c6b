"""`python -m perf audit`: the kernels as machine code, what bounds them, and the predicted time of a step.

Every kernel is compiled for every target, dtype and width as the stream would launch it; nothing runs. The tables say
what was compiled, what a tile keeps busy for how long (perf/static.py), and what a step should take, beside other
schedules with the same model. Whatever is called predicted was not measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import triton

from perf import epilogues, static, tune
from perf.compiled import DTYPES, MATRIX, Compiled, compiling_for, itemsize, multiplying
from perf.gpus import GPUS, Gpu
from tritonmargin.kernels import tiles, triton_ops
from tritonmargin.kernels.torch_ops import Running, Shares
from tritonmargin.kernels.updates import RowUpdate

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
WIDTHS = (64, 128, 256, 512, 1024)
N, C, D = 1024, 1_000_000, 512  # of the predicted step
TILED = ("reduce_chunk", "weigh_chunk")
AHEAD = ("UTMALDG", "cp.async")  # loads that others do not wait for
SGD, ADAMW = "finish_rows, sgd", "finish_rows, adamw"  # finish_rows that updates the rows
STATES = {SGD: 1, ADAMW: 2}


class Size(NamedTuple):
    """What a chunk is."""

    n: int
    d: int
    k: int
    dtype: str

    @property
    def itemsize(self) -> int:
        return itemsize(self.dtype)


def elsewhere(dtype: str) -> bool:
    """Whether the library makes the products, and the tile kernels only read them."""
    return tiles.by_library(DTYPES[dtype], "tf32" if dtype == "tf32" else "ieee")


def chunk_of(gpu: Gpu, dtype: str, n: int, d: int, c: int = C) -> int:
    device = tiles.Device(gpu.target, gpu.processors, int(gpu.capacity))
    return max(1, min(c, tiles.default_chunk(device, DTYPES[dtype], n, d, c)))


def launches(kind: torch.dtype, n: int, d: int, k: int) -> list[tuple[str, Callable[[], object]]]:
    """The kernels of a normalised loss over one chunk, by name, in the order of a step; logits bounded."""
    made = torch.Generator().manual_seed(0)
    x, w = (torch.randn(size, d, generator=made).to(kind) for size in (n, k))
    rows, dw = torch.empty_like(w), torch.empty_like(w)
    target = torch.randint(k, (n,), generator=made)
    tile = triton_ops.new_tile(x, k, kind)
    run = Running(total=torch.zeros(triton_ops.slots(x, k), n))
    shares = [Shares(target, torch.randn(n, d, generator=made))]
    prepared: list[Any] = []

    def prepare() -> None:
        prepared[:] = [triton_ops.prepare_rows(w, None, 0, k, True, rows, None)]

    def finish(update: RowUpdate | None) -> None:
        place, out = (None, dw) if update is None else (slice(0, k), w)
        triton_ops.finish_rows(rows, rows, prepared[0], 0, shares, None, None, torch.ones(()), out, place, update)

    return [
        ("prepare_rows", prepare),
        ("reduce_chunk", lambda: triton_ops.reduce_chunk(rows, x, None, target, 0, True, tile, tile, False, run)),
        ("weigh_chunk", lambda: triton_ops.weigh_chunk(
            rows, x, None, target, 0, "exp", run.total[0], tile, tile, None, None)),
        ("finish_rows", lambda: finish(None)),
        *((name, lambda update=update: finish(update)) for name, update in updates(w).items()),
    ]  # fmt: skip


def compile_step(gpu: Gpu, dtype: str, d: int, n: int = N, c: int = C) -> dict[str, Compiled]:
    """Every kernel of a step as machine code; nothing is executed."""
    k = chunk_of(gpu, dtype, n, d, c)
    found: dict[str, Compiled] = {}
    with multiplying(dtype), compiling_for(gpu.target, gpu.processors, int(gpu.capacity)) as compiled:
        for name, launch in launches(DTYPES[dtype], n, d, k):
            launch()
            found[name] = compiled[-1]
    return found


def updates(w: torch.Tensor) -> dict[str, RowUpdate]:
    """What the rows' update in backward is compiled with, by kernel: bfloat16 rounded by chance, state included."""
    low = w.dtype == torch.bfloat16
    first, second = (torch.empty_like(w, dtype=w.dtype if low else torch.float32) for _ in range(2))
    steps, seed = torch.zeros(len(w), dtype=torch.int32), 1 if low else None
    return {
        SGD: RowUpdate("sgd", w, (0.1, 0.9, 5e-4, 0.0), (first,), seed=seed),
        ADAMW: RowUpdate("adamw", w, (1e-3, 0.9, 0.999, 1e-8, 0.1), (first, second), steps, seed),
    }


def state_bytes(kernel: str, size: Size) -> int:
    """The optimiser's state of the chunk's rows, once."""
    item = 2 if size.dtype == "bfloat16" else 4
    return STATES.get(kernel, 0) * size.k * size.d * item


def launch_bytes(kernel: str, size: Size, slots: int) -> int:
    """What one launch has to read and write, every tensor once, wherever it lies."""
    n, d, k, _ = size
    item = size.itemsize
    x, rows, tile, numbers = n * d * item, k * d * item, n * k * item, 4 * n
    operands = tile if elsewhere(size.dtype) else x + rows
    finish = 3 * rows + 4 * k + n * (8 + 4 * d) + 2 * state_bytes(kernel, size)
    return {
        "prepare_rows": rows + rows + 4 * k,  # W, unit rows, 1/|w|
        "reduce_chunk": operands + 8 * n + 2 * numbers * slots,  # targets, sums read and written
        "weigh_chunk": operands + 8 * n + numbers + tile,
        "finish_rows": finish,  # A, W, dW, 1/|w|, the targets' shares
        SGD: finish + rows,  # W is read too, and written in place of dW
        ADAMW: finish + rows + 8 * k,  # and two corrections a row
    }[kernel]


def main_memory_bytes(kernel: str, size: Size, gpu: Gpu) -> int:
    """What of it goes to main memory: W and dW, and what a chunk that is larger than the cache leaves for the next.

    Those are the prepared rows, dL/dz, which both products read, and A.
    """
    n, d, k, _ = size
    item = size.itemsize
    fits = (n + 2 * d) * k * item <= gpu.cache
    rows = k * d * item
    left, tile = (0, 0) if fits else (rows, n * k * item)
    product = 2 * tile if elsewhere(size.dtype) else 0  # written and read
    return {
        "prepare_rows": rows + left, "reduce_chunk": left + product, "weigh_chunk": left + product + tile,
        "products": 2 * tile + 2 * left,
    }.get(kernel, 2 * rows + left + 2 * state_bytes(kernel, size))  # fmt: skip


def launch_flops(kernel: str, size: Size) -> int:
    n, d, k, dtype = size
    product = 0 if elsewhere(dtype) else 2 * n * d * k
    return {
        "prepare_rows": 3 * k * d, "reduce_chunk": product + 2 * n * k, "weigh_chunk": product + n * k,
        "finish_rows": 7 * k * d + n * d, SGD: 13 * k * d + n * d, ADAMW: 23 * k * d + n * d,
    }[kernel]  # fmt: skip


def audit(
    say: Callable[[str], Any] = print,
    targets: tuple[str, ...] = TARGETS,
    dtypes: tuple[str, ...] = tuple(DTYPES),
    widths: tuple[int, ...] = WIDTHS,
) -> pd.DataFrame:
    """One line per kernel, target, dtype and width."""
    lines = []
    for target in targets:
        gpu = GPUS[target]
        for dtype in dtypes:
            for d in widths:
                say(f"audit: {target} {dtype} D={d}")
                for kernel, compiled in compile_step(gpu, dtype, d).items():
                    lines.append(line(kernel, compiled, gpu, Size(N, d, chunk_of(gpu, dtype, N, d), dtype)))
    return pd.DataFrame(lines)


def line(kernel: str, compiled: Compiled, gpu: Gpu, size: Size) -> dict[str, Any]:
    of, code = compiled.options, compiled.instructions
    tiled, multiplies = kernel in TILED, kernel in TILED and not elsewhere(size.dtype)
    count = math.ceil(size.n / of["BLOCK_N"]) * math.ceil(size.k / of["BLOCK_C"]) if tiled else compiled.grid[0]
    slots = math.ceil(size.k / of["BLOCK_C"]) if tiled else 0
    moved = main_memory_bytes(kernel, size, gpu)
    found: dict[str, Any] = {
        "target": gpu.target, "dtype": size.dtype, "D": size.d, "N": size.n, "chunk": size.k, "kernel": kernel,
        "block": "x".join(str(of[name]) for name in ("BLOCK_N", "BLOCK_C", "BLOCK_D")[: 3 if multiplies else 2])
        if tiled else f"{of['BLOCK_K']}x{of['BLOCK_D']}",
        "warps": of["num_warps"], "stages": of["num_stages"] if multiplies else 1, "registers": compiled.registers,
        "spills": compiled.spills, "shared_memory": compiled.shared, "blocks": static.blocks(compiled, gpu),
        "matrix_instructions": sum(code.looped[kind] for kind in MATRIX),
        "matrix_kind": next((kind for kind in MATRIX if code.written[kind]), ""),
        "loads_ahead": next((kind for kind in AHEAD if code.written[kind]), ""),
        "load_instructions": sum(code.looped[kind] for kind in AHEAD),
        "exp2": code.written["exp2"], "spill_instructions": code.written["spill"],
        "launch_bytes": launch_bytes(kernel, size, slots), "main_memory_bytes": moved,
        "launch_flops": launch_flops(kernel, size), "tiles": count,
    }  # fmt: skip
    if not multiplies:
        return found | {"bound_by": "memory", "predicted_us": 1e6 * row_seconds(kernel, size, gpu)}
    bound = static.tile_bound(compiled, gpu, size.dtype, moved / count)
    cycles = {f"{name}_cycles": getattr(bound, name) for name in bound._fields[:6]}
    return found | cycles | {
        "tile_cycles": bound.cycles, "bound_by": bound.largest, "overlapped": bound.overlapped,
        "predicted_us": 1e6 * tile_seconds(bound, count, gpu),
    }  # fmt: skip


def dlogits_bytes(gpu: Gpu, size: Size) -> float:
    """Of dL/dz through main memory for a logit: written once, read by both products."""
    left = size.k * size.d * size.itemsize
    moved = main_memory_bytes("weigh_chunk", size, gpu) + main_memory_bytes("products", size, gpu)
    fits = main_memory_bytes("products", size, gpu) == 0
    return 0.0 if fits else (moved - 3 * left) / (size.n * size.k)


def products_wait(gpu: Gpu, size: Size) -> bool:
    """Whether dX and A of a chunk take longer to move than to multiply."""
    flops = 2 * 2.0 * size.n * size.d * size.k
    moving = main_memory_bytes("products", size, gpu) / gpu.memory
    return moving > flops / (static.SUSTAINED * gpu.peak(size.dtype))


def tile_seconds(bound: static.Bound, count: int, gpu: Gpu) -> float:
    """Whole waves: the busiest processor has the most tiles."""
    return math.ceil(count / gpu.processors) * bound.cycles / gpu.clock


def row_seconds(kernel: str, size: Size, gpu: Gpu) -> float:
    """A row-wise kernel moves bytes: to main memory at its rate, inside the cache at about three times that."""
    moved = main_memory_bytes(kernel, size, gpu)
    cached = launch_bytes(kernel, size, 0) - moved
    return moved / gpu.memory + cached / (3 * gpu.memory)


MATRIX_LARGEST = "matrix units the largest term of a tile at D >= 256"
OVERLAP = "exp beside the product: two blocks a processor, or specialised warps"
SUSTAINED_ONLY = f"""\
The matrix units are the largest term at the rate that they are taken to sustain: their published cycles are divided by
{static.SUSTAINED}, those of shared memory are taken as published. By published cycles alone, shared memory takes 1.125
(sm_80, gfx942) to 1.25 times (sm_90, so that the two are equal here) as long as the matrix units in 16 bits."""
IN_CACHE = "dL/dz at most 2 bytes per logit through main memory"
NO_WAIT = "no product with dL/dz waits for main memory at D >= 256"
COUNTED = "formulas of bytes and products are what kernels do while they execute"
NO_SPILL, OVERLAPPED = "no register spills in any epilogue", "two blocks a processor with any epilogue"


class Limit(NamedTuple):
    """What no tile of the search meets, and why."""

    target: str
    budget: str
    excuses: Callable[[Any], bool]  # a line that breaks the budget: any other breach is one
    why: str


LEFT = {"bfloat16": 6.0, "float16": 6.0, "tf32": 12.0, "float32": 20.0}  # bytes of dL/dz a logit, see below


def per_logit(line: Any) -> float:
    return dlogits_bytes(GPUS[line.target], Size(line.N, line.D, line.chunk, line.dtype))


def narrow(line: Any) -> bool:
    """Whether main memory takes no more than a fifth longer than the matrix units, at the narrowest D that counts."""
    return bool(line.D == 256 and line.memory_cycles <= 1.2 * line.matrix_cycles / static.SUSTAINED)


NARROW = (
    "at D = 256 dL/dz of a chunk larger than the cache takes {} % longer through main memory than on the matrix units. "
    "Chunks inside the cache do not wait, and were slower on the H200 (reports/gpu-h200, D = 512), by their launches "
    "and by their smaller products."
)
LIMITS = (
    *(
        Limit(
            target, IN_CACHE, lambda line: per_logit(line) <= LEFT[line.dtype],
            "all targets: dL/dz of a chunk larger than the cache is written once and read by both products, 6 bytes a "
            "logit in 16 bits, 12 in TF32, 20 in float32, whose product is written and read too. Chunks inside the "
            "cache keep the budget and were slower on the H200, one by one and in a CUDA graph (reports/gpu-h200).",
        )
        for target in TARGETS
    ),
    Limit("sm_90", NO_WAIT, narrow, f"sm_90: {NARROW.format(15)} With the memory of an H200 it does not."),
    Limit("sm_100", NO_WAIT, narrow, f"sm_100: {NARROW.format(10)}"),
    Limit(
        "sm_90", MATRIX_LARGEST, lambda line: line.bound_by == "memory" and narrow(line),
        "sm_90: weigh_chunk at D = 256 writes dL/dz to main memory, see below.",
    ),
    Limit(
        "sm_100", MATRIX_LARGEST,
        lambda line: line.bound_by == "shared" and line.shared_cycles <= 2.0 * line.matrix_cycles,
        "sm_100: a block's tcgen05 product reads both operands from shared memory, and they are loaded into it, at 128 "
        "bytes a cycle; 128 x 128 x 16 is 64 cycles of product and 128 of shared memory. Pairs of blocks (2-CTA "
        "products) of 256 x 256 would take 128 of product and 128 of shared memory, but Triton 3.8 does not make them: "
        "with num_ctas=2 its tl.dot becomes one product a block, or does not compile where an operand is transposed.",
    ),
    Limit(
        "sm_90", NO_SPILL,
        lambda line: line.epilogue in (epilogues.ONLINE, epilogues.HEAVIEST) and line.spills <= tune.TOLERATED,
        "sm_90: a bias, statistics and kept logits at once want more than 255 registers: a few bytes.",
    ),
    Limit(
        "sm_100", NO_SPILL,
        lambda line: line.epilogue == epilogues.HEAVIEST
        and line.spills <= (80 if line.dtype == "float16" else tune.TOLERATED),
        "sm_100: a hinge with a bias, statistics and kept logits at once wants more than the 168 registers that the "
        "epilogue's warps have: a few bytes, 80 in float16, which the library does not multiply as such.",
    ),
    Limit(
        "sm_90", NO_SPILL,
        lambda line: line.dtype == "tf32" and line.epilogue.startswith("gradient") and line.spills <= tune.TOLERATED,
        "sm_90: the gradients of TF32 products with a bias spill a few bytes under the 128 registers that let a second "
        "block in.",
    ),
    Limit(
        "sm_90", OVERLAPPED,
        lambda line: line.epilogue.endswith(epilogues.KEEPING) or line.epilogue == epilogues.HINGE_GRADIENT,
        "sm_90: an epilogue that stores logits for backward wants more than the 128 registers that let a second block "
        "in, and would spill under that limit, and so does the hinge's gradient with a bias. It follows the product "
        "instead of running beside another one.",
    ),
)  # fmt: skip


def limit(line: Any, budget: str) -> str | None:
    """Why a line may break the budget, if it may."""
    known = (each for each in LIMITS if (each.target, each.budget) == (line.target, budget))
    return next((each.why for each in known if each.excuses(line)), None)


# -- budgets -----------------------------------------------------------------------------------------------------


def miscounted(ran: pd.DataFrame) -> pd.DataFrame:
    """The launches whose formula is not what they do while they execute; edges of tiles move a little more."""
    off = ~(ran["executed_bytes"] / ran["tile_bytes"]).between(0.999, 1.03)
    return ran[off | (ran["executed_product_flops"] != ran["formula_product_flops"])]


def budgets(frame: pd.DataFrame, others: pd.DataFrame, ran: pd.DataFrame | None = None) -> pd.DataFrame:
    """What must hold of the compiled kernels and epilogues, one line each: met, or where not."""
    tiled = frame[frame["kernel"].isin(TILED)]
    low = tiled[tiled["dtype"] != "float32"]
    wide = low[low["D"] >= 256]
    all_weighing = frame[frame["kernel"] == "weigh_chunk"]
    weighing = wide[wide["kernel"] == "weigh_chunk"]
    waits = [products_wait(GPUS[at.target], Size(at.N, at.D, at.chunk, at.dtype)) for at in weighing.itertuples()]
    rules = [
        ("no register spills anywhere", frame[(frame["spills"] > 0) | (frame["spill_instructions"] > 0)]),
        ("matrix units in every tile kernel of 16-bit operands and TF32", low[low["matrix_kind"] == ""]),
        (MATRIX_LARGEST, wide[wide["bound_by"] != "matrix"]),
        (OVERLAP, low[~low["overlapped"].astype(bool)]),
        (IN_CACHE, all_weighing[[per_logit(each) > 2.0 for each in all_weighing.itertuples()]]),
        (NO_WAIT, weighing[waits]),
        (NO_SPILL, others[others["spills"] > 0]),
        (OVERLAPPED, others[~others["overlapped"].astype(bool)]),
    ]
    if ran is not None:
        rules.append((COUNTED, miscounted(ran).assign(target="sm_90")))
    lines = []
    for name, broken in rules:
        what, where = ("epilogue", "dtype") if "epilogue" in broken else ("kernel", "D")
        places = []
        for (target, kernel), rows in broken.groupby(["target", what]):
            dtypes, widths = (", ".join(map(str, sorted(set(rows[column])))) for column in ("dtype", where))
            places.append(f"{target} {kernel}: {dtypes}" + (f", D = {widths}" if where == "D" else ""))
        limits = {limit(at, name) for at in broken.itertuples()}
        met = "yes" if broken.empty else "NO" if None in limits else "no, a known limit"
        lines.append({"budget": name, "met": met, "where not": "; ".join(places),
                      "why": " ".join(why for why in limits if why)})  # fmt: skip
    return pd.DataFrame(lines)


# -- a step, predicted -------------------------------------------------------------------------------------------


def step_parts(gpu: Gpu, dtype: str, n: int, d: int, c: int) -> dict[str, float]:
    """Seconds of a forward and backward by kernel, prepare_rows in both of them; beside them the CPU's launches.

    "products" are dX and dW; the three kinds of finish_rows are alternatives.
    """
    k = chunk_of(gpu, dtype, n, d, c)
    size, chunks = Size(n, d, k, dtype), c / k
    product = 2.0 * n * d * c / (static.SUSTAINED * gpu.peak(dtype))
    parts = {}
    for kernel, each in compile_step(gpu, dtype, d, n, c).items():
        if kernel in TILED and not elsewhere(dtype):
            count = math.ceil(n / each.options["BLOCK_N"]) * math.ceil(k / each.options["BLOCK_C"])
            bound = static.tile_bound(each, gpu, dtype, main_memory_bytes(kernel, size, gpu) / count)
            parts[kernel] = chunks * tile_seconds(bound, count, gpu)
        else:
            parts[kernel] = chunks * row_seconds(kernel, size, gpu)
            parts[kernel] += product if kernel in TILED else 0.0
    parts["prepare_rows"] *= 2
    compute = 2 * product
    parts["products"] = max(compute, chunks * main_memory_bytes("products", size, gpu) / gpu.memory)
    return parts | {"launches": 8 * math.ceil(chunks) * static.LAUNCH}


def predict(gpu: Gpu, dtype: str = "bfloat16", n: int = N, d: int = D, c: int = C) -> pd.DataFrame:
    """Seconds of a forward and backward by schedule: ours, the floor, three others by their published algorithms."""
    k = chunk_of(gpu, dtype, n, d, c)
    sustained = static.SUSTAINED * gpu.peak(dtype)
    gemm, item = 2.0 * n * d * c, Size(n, d, k, dtype).itemsize
    parts = step_parts(gpu, dtype, n, d, c)
    ours = sum(parts[name] for name in ("prepare_rows", "reduce_chunk", "weigh_chunk", "products", "finish_rows"))
    logits, rows = float(n) * c, float(c) * d * item
    full = 3 * gemm / sustained + (logits * (item * 4 + 4 * 9) + rows * 16) / gpu.memory
    # Liger: chunks of samples, as few as D / C of them; each passes over all of W, and over its gradient twice.
    liger_chunk = 1 << max(0, math.ceil(n / math.ceil(c / d)) - 1).bit_length()
    liger_chunks = math.ceil(n / liger_chunk)
    liger = max(3 * gemm / sustained, liger_chunks * 4 * rows / gpu.memory) + logits * item * 4 / gpu.memory
    liger += 6 * rows / gpu.memory
    # Cut Cross-Entropy: four products, the gradients added to main memory under a lock by blocks of 128 x 128.
    cut = 4 * gemm / sustained + (logits / 128 * d * 4 * 2 * 2) / (3 * gpu.memory) + 6 * rows / gpu.memory
    lines = [
        ("tritonmargin, in a CUDA graph", ours, 4 * gemm),
        ("tritonmargin, launched one by one", max(ours, static.STEP + parts["launches"]), 4 * gemm),
        ("floor: three products at the sustained rate", 3 * gemm / sustained, 3 * gemm),
        ("full logits, the usual code", full, 3 * gemm),
        ("Cut Cross-Entropy's schedule, W normalised before", cut, 4 * gemm),
        ("Liger's schedule, W normalised before", liger, 3 * gemm),
    ]
    return pd.DataFrame([
        {"target": gpu.target, "gpu": gpu.name, "dtype": dtype, "N": n, "D": d, "C": c, "chunk": k, "schedule": name,
         "predicted_ms": 1e3 * seconds, "predicted_fraction_of_peak": flops / seconds / gpu.peak(dtype),
         "times_the_floor": seconds / (3 * gemm / sustained)}
        for name, seconds, flops in lines
    ])  # fmt: skip


# -- the page ----------------------------------------------------------------------------------------------------


def write(frame: pd.DataFrame, others: pd.DataFrame, predicted: pd.DataFrame, ran: pd.DataFrame, out: Path) -> Path:
    """kernels.csv, kernels_epilogues.csv, kernels_predicted.csv, kernels_executed.csv, kernels.md and two plots."""
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "kernels.csv", index=False)
    others.to_csv(out / "kernels_epilogues.csv", index=False)
    predicted.to_csv(out / "kernels_predicted.csv", index=False)
    ran.to_csv(out / "kernels_executed.csv", index=False)
    from perf import kernel_plots

    kernel_plots.write(kernel_plots.cycles(frame), out / "kernels_cycles.png")
    kernel_plots.write(kernel_plots.rooflines(frame), out / "kernels_roofline.png")
    rules = budgets(frame, others, ran)
    shown = frame[(frame["dtype"] == "bfloat16") & (frame["D"] == D)]
    columns = ["target", "kernel", "block", "warps", "stages", "registers", "spills", "shared_memory", "blocks",
               "matrix_kind", "loads_ahead", "exp2", "matrix_cycles", "exp_cycles", "issue_cycles", "shared_cycles",
               "bound_by", "predicted_us"]  # fmt: skip
    text = f"""# The kernels, compiled and costed without a GPU

Written by `python -m perf audit` on {time.strftime("%Y-%m-%d")} with triton {triton.__version__}.
Every kernel was compiled by Triton for each target as the stream launches it (float16, which the stream multiplies as
TF32, as it would be), and read back as machine code. **Nothing
here was measured on a GPU**: times are predicted by the model of `perf/static.py` from the published rates of
`perf/gpus.py`, matrix units taken at {static.SUSTAINED:.0%} of their peak. What an H200 made of its predictions is in
[gpu-h200](gpu-h200/verdict.csv).

## Budgets

{rules.to_markdown(index=False)}

{SUSTAINED_ONLY}

## A forward and backward, predicted: N={N:,}, D={D}, C={C:,}, bfloat16

{predicted.drop(columns=["dtype", "N", "D", "C"]).to_markdown(index=False, floatfmt=".3g")}

The fraction of peak counts the products that a schedule makes: four here and in Cut Cross-Entropy, three elsewhere.

## Formula and execution

The kernels run on the CPU (ttsem, as code for sm_90); every load, store and product is counted. A tile kernel
reads x once a column of tiles and the class rows once a row of tiles; `tile_bytes` has that in it.

{ran.to_markdown(index=False, floatfmt=".4g")}

## The kernels at D={D}, bfloat16, N={N:,}, a chunk of classes as the model chooses it

{shown[columns].to_markdown(index=False, floatfmt=".4g")}

All {len(frame)} lines, with bytes and flops of a launch, are in [kernels.csv](kernels.csv).

## Other epilogues of the tile kernel, and rows with all that may be asked for, at N={epilogues.N:,}, D={epilogues.D}

{others.to_markdown(index=False, floatfmt=".4g")}

![cycles of a tile](kernels_cycles.png)

![roofline](kernels_roofline.png)
"""
    page = out / "kernels.md"
    page.write_text(text)
    return page
