"""Every epilogue of the tile kernel as machine code: what the audit's step does not launch is compiled all the same.

The step of `perf/kernels.py` is a bounded loss without a bias, statistics or kept logits. The others cost registers,
which decide whether a second block fits beside the first.
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
from tritonmargin.kernels.torch_ops import Running

N, D, K = 1024, 512, 4096
KEEPING = "keeping logits"
HEAVIEST = f"online, bias, statistics, {KEEPING}"
HINGE_GRADIENT = "gradient of hinge and bias"


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

    def weigh(kind: str, with_bias: bool = False, kept: bool = False) -> Callable[[], object]:
        each, factor = (bias, number) if with_bias else (None, None)
        ready = torch.empty_like(tile) if kept else None
        return lambda: triton_ops.weigh_chunk(rows, x, each, target, 0, kind, number, tile, tile, ready, factor)

    def online(hardest: bool = False) -> Running:
        if not hardest:
            return Running(slots(), slots())
        return Running(slots(), slots(), slots(), slots(torch.int64))

    return {
        "sum of exp": reduce(True, Running(slots())),
        "sum of exp, statistics": reduce(True, Running(slots(), None, slots(), slots(torch.int64))),
        f"sum of exp, {KEEPING}": reduce(True, Running(slots()), keep=True),
        "online": reduce(False, online()),
        "online, bias": reduce(False, online(), with_bias=True),
        "online, statistics": reduce(False, online(hardest=True)),
        f"online, {KEEPING}": reduce(False, online(), keep=True),
        HEAVIEST: reduce(False, online(hardest=True), with_bias=True, keep=True),
        "hinge, bias": reduce(False, Running(threshold=number, hinge=slots(), violations=slots()), with_bias=True),
        "gradient of exp": weigh("exp"),
        "gradient of softmax": weigh("softmax"),
        "gradient of softmax and bias": weigh("softmax", with_bias=True),
        "gradient of softmax and bias, kept logits": weigh("softmax", with_bias=True, kept=True),
        HINGE_GRADIENT: weigh("hinge", with_bias=True),
    }


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
            with multiplying(dtype), compiling_for(gpu.target, gpu.processors, int(gpu.capacity)) as found:
                names = list(epilogues(x, rows))
                for launch in epilogues(x, rows).values():
                    launch()
            for name, compiled in zip(names, found, strict=True):
                code = compiled.instructions
                bound = static.tile_bound(compiled, gpu, dtype, 0.0)
                multiplies = not compiled.options["READY"]
                lines.append({
                    "target": target, "dtype": dtype, "epilogue": name, "registers": compiled.registers,
                    "spills": compiled.spills, "spill_instructions": code.written["spill"],
                    "blocks": bound.blocks, "overlapped": bound.overlapped or not multiplies,
                    "bound_by": bound.largest if multiplies else "memory",
                    "tile_cycles": bound.cycles if multiplies else float("nan"),
                })  # fmt: skip
    return pd.DataFrame(lines)
