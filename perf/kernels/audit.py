"""`python -m perf audit`: the kernels as machine code, and whether anything spills or leaves too little room.

Every kernel of a step is compiled for every target, dtype and width as the library launches it, and every other
epilogue at one width; nothing runs. A line of the table says what a program takes (registers, spills, shared memory, so
how many blocks a processor holds) and its instructions by kind. No time is predicted here, see model.py.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import triton

from perf.kernels import cases
from perf.kernels.cases import DTYPES
from perf.kernels.compile import AHEAD, MATRIX, Compiled, Progress, compiled_on, in_processes
from perf.kernels.gpus import GPUS

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
WIDTHS = (64, 128, 256, 512, 1024)
Names = tuple[str, ...]

NO_SPILL = "no register spills"
OVERLAPPED = "two blocks a processor, or warps that multiply for others"
MATRIX_UNITS = "matrix units in every product of 16 bits and TF32"
TOLERATED = 32  # bytes of spills in the heaviest epilogues, or where a limit of registers lets a second block in


class Declared(NamedTuple):
    """Lines that may break a budget, and why; any other line that does fails the audit."""

    target: str
    budget: str
    excuses: Callable[[Any], bool]
    why: str


DECLARED = (
    Declared(
        "sm_90", NO_SPILL, lambda line: line.case in (cases.ONLINE, cases.HEAVIEST) and line.spills <= TOLERATED,
        "sm_90: a bias, statistics and kept logits at once want more than 255 registers: a few bytes.",
    ),
    Declared(
        "sm_100", NO_SPILL, lambda line: line.case == cases.HEAVIEST and line.spills <= TOLERATED,
        "sm_100: all of it at once wants more than the 168 registers that the epilogue's warps have: a few bytes.",
    ),
    Declared(
        "sm_90", NO_SPILL,
        lambda line: line.dtype == "tf32" and line.case.startswith("gradient") and line.spills <= TOLERATED,
        "sm_90: the gradients of TF32 products with a bias spill a few bytes under the 128 registers that let a second "
        "block in.",
    ),
    Declared(
        "sm_90", OVERLAPPED, lambda line: line.case.endswith(cases.KEEPING) or line.case == cases.HINGE_GRADIENT,
        "sm_90: an epilogue that stores logits for backward, or weighs a hinge with a bias, wants more than the 128 "
        "registers that let a second block in, and would spill under that limit.",
    ),
)  # fmt: skip


def audit(
    progress: Progress, targets: Names = TARGETS, dtypes: Names = tuple(DTYPES), widths: tuple[int, ...] = WIDTHS
) -> pd.DataFrame:
    """A line for each launch of cases.py, target, dtype and width."""
    # Beyond a step, float16 is multiplied by TF32's kernels and float32 by the library. The longest come first.
    asked = [*itertools.product(targets, [each for each in dtypes if each in cases.MULTIPLIED], [0])]
    asked += itertools.product(targets, dtypes, widths)
    return pd.DataFrame(list(itertools.chain.from_iterable(in_processes(lines, asked, progress))))


def lines(part: tuple[str, str, int]) -> list[dict[str, Any]]:
    """Of a target, a dtype and a width: the kernels of a step; of width 0: all other launches."""
    target, dtype, d = part
    gpu, k = GPUS[target], cases.chunk_of(GPUS[target], dtype, cases.N, d) if d else cases.K
    with cases.on(gpu):
        launches = cases.step(dtype, cases.N, d, k) if d else cases.beyond_a_step(dtype)
    size = {"target": target, "dtype": dtype, "D": d or cases.D, "N": cases.N, "chunk": k}
    return [size | line(name, compiled) for name, compiled in compiled_on(gpu, dtype, launches).items()]


def line(case: str, compiled: Compiled) -> dict[str, Any]:
    of, code = compiled.options, compiled.instructions
    block = [of[name] for name in ("BLOCK", "BLOCK_K", "BLOCK_N", "BLOCK_C", "BLOCK_D") if name in of]
    return {
        "case": case, "kernel": compiled.kernel, "block": "x".join(map(str, block)),
        "warps": compiled.warps, "stages": of["num_stages"], "registers": compiled.registers,
        "spills": compiled.spills, "shared_memory": compiled.shared, "blocks": compiled.blocks,
        "specialised": compiled.specialised, "instructions": sum(code.values()),
        "matrix_instructions": sum(code[kind] for kind in MATRIX),
        "matrix_kind": next((kind for kind in MATRIX if code[kind]), ""),
        "loads_ahead": next((kind for kind in AHEAD if code[kind]), ""),
        "exp2": code["exp2"], "spill_instructions": code["spill"],
    }  # fmt: skip


def budgets(frame: pd.DataFrame) -> pd.DataFrame:
    """What must hold of the compiled kernels, one line each: met, or where not. "NO" fails the audit."""
    low = frame["dtype"] != "float32"  # whose products are the library's
    ready = frame["case"].str.endswith(cases.READY)  # starts from retained logits
    products = frame[(frame["kernel"] == "tile_kernel") & low & ~ready]
    rules = {
        NO_SPILL: frame[(frame["spills"] > 0) | (frame["spill_instructions"] > 0)],
        OVERLAPPED: products[(products["blocks"] < 2) & ~products["specialised"].astype(bool)],
        MATRIX_UNITS: products[products["matrix_kind"] == ""],
    }
    judged = []
    for budget, broken in rules.items():
        places = [
            f"{target} {case}: {', '.join(sorted({f'{at.dtype} D={at.D}' for at in some.itertuples()}))}"
            for (target, case), some in broken.groupby(["target", "case"])
        ]
        reasons = {declared(at, budget) for at in broken.itertuples()}
        met = "yes" if broken.empty else "NO" if None in reasons else "no, as declared"
        why = " ".join(sorted(filter(None, reasons)))
        judged.append({"budget": budget, "met": met, "where not": "; ".join(places), "why": why})
    return pd.DataFrame(judged)


def declared(line: Any, budget: str) -> str | None:
    """Why a line may break the budget, if it may."""
    known = [each for each in DECLARED if (each.target, each.budget) == (line.target, budget) and each.excuses(line)]
    return known[0].why if known else None


def write(frame: pd.DataFrame, out: Path) -> Path:
    """kernels.csv and kernels.md."""
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "kernels.csv", index=False)
    shown = frame[(frame["dtype"] == "bfloat16") & (frame["D"] == cases.D)]
    shown = shown.drop(columns=["dtype", "D", "N", "chunk", "kernel"])
    page = out / "kernels.md"
    page.write_text(f"""# The kernels as machine code

Written by `python -m perf audit` on {time.strftime("%Y-%m-%d")} with triton {triton.__version__}. Every kernel was
compiled by Triton as the library launches it, for GPUs that were not there, and its machine code read. **Nothing ran,
and no time was measured or predicted.** What an H200 measured is in [gpu-h200](gpu-h200/README.md).

## Budgets

{budgets(frame).to_markdown(index=False)}

## bfloat16, D={cases.D}, N={cases.N:,}

The kernels of a step, other epilogues of the tile kernel, the row-wise kernels with all that may be asked for, and
those that draw a sample. `block`: samples x classes x part of D, or rows x D, or what a program of a draw looks at.
`spills`: bytes of local memory, or registers on AMD. `blocks`: how many a processor holds. `specialised`: some warps
multiply for the others. `instructions`: of one program, in its code.

{shown.to_markdown(index=False)}

All {len(frame)} lines are in [kernels.csv](kernels.csv).
""")
    return page
