"""What the audit's step does not launch, as machine code all the same: other epilogues, and rows with everything.

The step of `perf/kernels.py` is a bounded loss without a bias, statistics or kept logits. Others cost registers, which
decide whether a second block fits beside the first. Each thing that an epilogue may do is in one of these lines alone,
and all of them are in the heaviest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch

from perf import static
from perf.compiled import DTYPES, compiling_for, multiplying
from perf.gpus import GPUS
from tritonmargin.kernels import triton_ops
from tritonmargin.kernels.torch_ops import Rows, Running, Shares
from tritonmargin.kernels.updates import RowUpdate

N, D, K = 1024, 512, 4096
LOWER = 16, 64  # samples up to which tiles are lower
KEEPING = "keeping logits"
ONLINE = f"online, bias, statistics, {KEEPING}"
HEAVIEST = f"hinge, online, bias, statistics, {KEEPING}"
HINGE_GRADIENT = "gradient of hinge and bias"
ROWS = "rows: "  # how the lines start that are not about a tile


def epilogues(x: torch.Tensor, rows: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Launches by what they are for, forward and backward."""
    n, k = len(x), len(rows)
    target, number, bias = torch.zeros(n, dtype=torch.int64), torch.zeros(n), torch.zeros(k)
    tile = triton_ops.new_tile(x, k, x.dtype)

    def slots(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(triton_ops.slots(x, k), n, dtype=dtype)

    def reduce(bounded: bool, run: Running, with_bias: bool = False, keep: bool = False) -> Callable[[], object]:
        each = bias if with_bias else None
        return lambda: triton_ops.reduce_chunk(rows, x, each, target, 0, bounded, tile, tile, keep, run)

    def weigh(kind: str, with_bias: bool = False, kept: bool = False, offset: bool = False) -> Callable[[], object]:
        each, factor = (bias if with_bias or offset else None), (number if with_bias else None)
        ready = torch.empty_like(tile) if kept else None
        return lambda: triton_ops.weigh_chunk(rows, x, each, target, 0, kind, number, tile, tile, ready, factor)

    def online(hardest: bool = False) -> Running:
        if not hardest:
            return Running(slots(), slots())
        return Running(slots(), slots(), slots(), slots(torch.int64))

    def hinge(run: Running) -> Running:
        run.threshold, run.hinge, run.violations = number, slots(), slots()
        return run

    return {
        "sum of exp": reduce(True, Running(slots())),
        "sum of exp, statistics": reduce(True, Running(slots(), None, slots(), slots(torch.int64))),
        f"sum of exp, {KEEPING}": reduce(True, Running(slots()), keep=True),
        "online": reduce(False, online()),
        "online, bias": reduce(False, online(), with_bias=True),
        "online, statistics": reduce(False, online(hardest=True)),
        f"online, {KEEPING}": reduce(False, online(), keep=True),
        ONLINE: reduce(False, online(hardest=True), with_bias=True, keep=True),
        "sum of exp, offset": reduce(True, Running(slots()), with_bias=True),
        "hardest": reduce(False, Running(hardest=slots(), hardest_row=slots(torch.int64))),
        "hinge": reduce(False, hinge(Running())),
        "hinge, bias": reduce(False, hinge(Running()), with_bias=True),
        f"hinge, {KEEPING}": reduce(False, hinge(Running()), keep=True),
        HEAVIEST: reduce(False, hinge(online(hardest=True)), with_bias=True, keep=True),
        "gradient of exp": weigh("exp"),
        "gradient of exp, offset": weigh("exp", offset=True),
        "gradient of softmax": weigh("softmax"),
        "gradient of softmax and bias": weigh("softmax", with_bias=True),
        "gradient of softmax and bias, kept logits": weigh("softmax", with_bias=True, kept=True),
        "gradient of softmax, kept logits": weigh("softmax", kept=True),
        "gradient of hinge": weigh("hinge"),
        HINGE_GRADIENT: weigh("hinge", with_bias=True),
        "gradient of hinge and bias, kept logits": weigh("hinge", with_bias=True, kept=True),
    }


def of_rows(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The row-wise kernels with all that they may be asked for, and with weights in float32 as under autocast."""
    w, target, d = torch.empty(K, D), torch.zeros(N, dtype=torch.int64), torch.empty(D)
    ids = torch.arange(0, K, 2)
    shares = [Shares(target, torch.empty(N, D)) for _ in range(3)]
    mean = (torch.empty(len(ids)), d)
    found: dict[str, Callable[[], object]] = {}
    for name, weight in {"": w.to(dtype), ", W in float32": w}.items():
        rows = torch.empty(len(ids), D, dtype=dtype)
        wide = torch.empty(len(ids), D)

        def prepare(weight: torch.Tensor = weight, rows: torch.Tensor = rows, wide: torch.Tensor = wide) -> Rows:
            return triton_ops.prepare_rows(weight, ids, 0, len(ids), True, rows, wide)

        def finish(update: RowUpdate | None, weight: torch.Tensor = weight, rows: torch.Tensor = rows) -> None:
            prepared = Rows(rows, None, torch.empty(len(ids)), weight, ids)
            out = torch.empty_like(weight) if update is None else weight
            triton_ops.finish_rows(
                rows, rows, prepared, 0, shares[:2], shares[2], mean, torch.ones(()), out, ids, update
            )

        low = weight.dtype == torch.bfloat16
        state = tuple(torch.empty_like(weight) for _ in range(2))
        adamw = RowUpdate(
            "adamw", weight, (1e-3, 0.9, 0.999, 1e-8, 0.1), state, torch.zeros(K, dtype=torch.int32), 1 if low else None
        )
        found |= {
            f"{ROWS}prepare, ids{name}": prepare,
            f"{ROWS}finish, everything{name}": lambda finish=finish: finish(None),
            f"{ROWS}finish, everything, adamw{name}": lambda finish=finish, adamw=adamw: finish(adamw),
        }
    return found


def table(
    targets: tuple[str, ...], dtypes: tuple[str, ...] = ("bfloat16",), say: Callable[[str], Any] = print
) -> pd.DataFrame:
    """A line per epilogue and target."""
    lines = []
    for target in targets:
        gpu = GPUS[target]
        for dtype in dtypes:
            say(f"epilogues: {target} {dtype}")
            x, rows = (torch.empty(size, D, dtype=DTYPES[dtype]) for size in (N, K))
            launches = epilogues(x, rows) | of_rows(DTYPES[dtype])
            for n in LOWER:  # the other two heights of a tile
                lower = epilogues(x[:n], rows)
                launches |= {f"{name}, {n} samples": lower[name] for name in ("sum of exp", "gradient of exp")}
            with multiplying(dtype), compiling_for(gpu.target, gpu.processors, int(gpu.capacity)) as found:
                for launch in launches.values():
                    launch()
            for name, compiled in zip(launches, found, strict=True):
                code = compiled.instructions
                line = {
                    "target": target, "dtype": dtype, "epilogue": name, "registers": compiled.registers,
                    "spills": compiled.spills, "spill_instructions": code.written["spill"],
                    "blocks": static.blocks(compiled, gpu),
                }  # fmt: skip
                if name.startswith(ROWS):
                    lines.append(line | {"overlapped": True, "bound_by": "memory", "tile_cycles": float("nan")})
                    continue
                bound = static.tile_bound(compiled, gpu, dtype, 0.0)
                multiplies = not compiled.options["READY"]
                lines.append(line | {
                    "overlapped": bound.overlapped or not multiplies,
                    "bound_by": bound.largest if multiplies else "memory",
                    "tile_cycles": bound.cycles if multiplies else float("nan"),
                })  # fmt: skip
    return pd.DataFrame(lines)
