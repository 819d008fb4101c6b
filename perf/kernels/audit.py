"""`python -m perf audit`: the kernels as machine code, and whether anything spills or leaves too little room.

Every kernel of a step is compiled for every target, dtype and width as the library launches it, and those of every
other loss at one width; nothing runs. A line of the table says what a program takes (registers, spills, shared memory,
so how many blocks a processor holds) and its instructions by kind. No time is predicted here, see model.py.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import triton

from perf.kernels import cases
from perf.kernels.cases import ADAMW, DTYPES, HEAVIEST, SGD
from perf.kernels.compile import AHEAD, MATRIX, Compiled, Progress, compiled_on, in_processes
from perf.kernels.gpus import GPUS

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
WIDTHS = (64, 128, 256, 512, 1024)
Names, Part = tuple[str, ...], tuple[str, str, int, str]

FIRST, FEW = ("sm_90", "bfloat16"), (64, 512)  # compiled at every width, and widths of the other dtypes
DRAWS = "draw"  # beside the names of cases.py
HALVES, OWN_CODE = ("bfloat16", "float16"), ("float16", "tf32")

ADAMW_SPILLS = 96
NO_SPILL, FEW_SPILLS = "no register spills", f"at most {ADAMW_SPILLS} bytes of spills where AdamW updates the rows"
OVERLAPPED = "two blocks a processor"
MATRIX_UNITS = "matrix units in every product of 16 bits and TF32"
TOLERATED = 32  # bytes of spills in the heaviest epilogues, where a limit of registers lets a second block in


class Declared(NamedTuple):
    """Lines that may break a budget, and why; any other line that does fails the audit."""

    target: str
    budget: str
    cases: Names
    dtypes: Names = tuple(DTYPES)
    why: str = ""
    spills: int = TOLERATED  # bytes at most


MORE = "wants more than the registers that let a second block in."
POWERS = "float16's powers of two beside an update in backward leave one block a processor, or spill."
DECLARED = (
    Declared("sm_90", NO_SPILL, ("weigh, label smoothing",), ("float16",), f"sm_90: smoothing {MORE}"),
    Declared("sm_90", NO_SPILL, ("finish, 16 samples", "finish, 64 samples"), ("tf32",), f"sm_90: a row {MORE}"),
    Declared("sm_80", NO_SPILL, ("reduce, statistics", HEAVIEST), why=f"sm_80: the hardest class {MORE}"),
    Declared("sm_100", NO_SPILL, ("weigh, bias", "weigh, everything", HEAVIEST), why=f"sm_100: a bias {MORE}"),
    Declared("sm_100", NO_SPILL, (SGD,), ("float16",), f"sm_100: {POWERS}", spills=144),
    Declared("sm_100", OVERLAPPED, (ADAMW,), ("float16",), f"sm_100: {POWERS}", spills=ADAMW_SPILLS),
)


def audit(
    progress: Progress, targets: Names = TARGETS, dtypes: Names = tuple(DTYPES), widths: tuple[int, ...] = WIDTHS
) -> pd.DataFrame:
    """A line for each launch of cases.py, target, dtype and width that is compiled."""
    others = [*(name for name in cases.CASES if name not in cases.IN_A_STEP), DRAWS]
    asked: list[Part] = []
    for target, dtype in itertools.product(targets, dtypes):
        whole, first = dtype == FIRST[1], target == FIRST[0]
        # Other losses in one dtype, and on one target in those that have code of their own.
        if whole or (first and dtype in OWN_CODE):
            asked += [(target, dtype, cases.D, name) for name in others if name != DRAWS or (whole and first)]
        for d in widths:
            if whole or d in FEW:
                names = cases.IN_A_STEP if d == cases.D or (whole and first) else ("",)
                asked += [(target, dtype, d, name) for name in names]
    asked.sort(key=lambda part: not part[3].endswith(("sgd", "adamw")))  # the longest come first
    return pd.DataFrame(list(itertools.chain.from_iterable(in_processes(lines, asked, progress))))


def lines(part: Part) -> list[dict[str, Any]]:
    """Of a target, a dtype, a width and a case of cases.py: its kernels."""
    target, dtype, d, name = part
    with cases.on(GPUS[target]):
        launches = cases.draws() if name == DRAWS else cases.launches([name], dtype, d=d)
    size = {"target": target, "dtype": dtype, "D": d, "N": cases.N}
    return [size | line(case, compiled) for case, compiled in compiled_on(GPUS[target], launches).items()]


def line(case: str, compiled: Compiled) -> dict[str, Any]:
    of, code = compiled.options, compiled.instructions
    block = of.get("TILE") or [of[name] for name in ("BLOCK", "BLOCK_K", "BLOCK_N", "BLOCK_S", "BLOCK_D") if name in of]
    return {
        "case": case, "kernel": compiled.kernel, "block": "x".join(map(str, block)),
        "warps": compiled.warps, "stages": of["num_stages"], "registers": compiled.registers,
        "spills": compiled.spills, "shared_memory": compiled.shared, "blocks": compiled.blocks,
        "parts": of.get("SPLIT", 1), "instructions": sum(code.values()),
        "matrix_instructions": sum(code[kind] for kind in MATRIX),
        "matrix_kind": next((kind for kind in MATRIX if code[kind]), ""),
        "loads_ahead": next((kind for kind in AHEAD if code[kind]), ""),
        "exp2": code["exp2"], "spill_instructions": code["spill"],
    }  # fmt: skip


def budgets(frame: pd.DataFrame) -> pd.DataFrame:
    """What must hold of the compiled kernels, one line each: met, or where not. "NO" fails the audit."""
    adamw = frame["case"].str.startswith("finish") & frame["case"].str.endswith("adamw")
    # float32's products are the library's, and of TF32 that of dL/dW.
    kernel, dtype = frame["kernel"].str.removesuffix("_kernel"), frame["dtype"]
    multiplies = (kernel == "finish") & dtype.isin(HALVES) & (frame["case"] != "finish, max-hinge")  # which has no P
    products = frame[kernel.isin(cases.TILED) & (dtype != "float32") | multiplies]
    rules = {
        NO_SPILL: frame[~adamw & ((frame["spills"] > 0) | (frame["spill_instructions"] > 0))],
        FEW_SPILLS: frame[adamw & (frame["spills"] > ADAMW_SPILLS)],
        OVERLAPPED: products[products["blocks"] < 2],
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
    known = [each for each in DECLARED if (each.target, each.budget) == (line.target, budget)]
    known = [each for each in known if line.case in each.cases and line.dtype in each.dtypes]
    return next((each.why for each in known if line.spills <= each.spills), None)


def write(frame: pd.DataFrame, out: Path) -> Path:
    """kernels.csv and kernels.md."""
    out.mkdir(parents=True, exist_ok=True)
    frame = frame.sort_values(["target", "dtype", "D"], kind="stable")
    frame.to_csv(out / "kernels.csv", index=False)
    shown = frame[(frame["dtype"] == "bfloat16") & (frame["D"] == cases.D)]
    shown = shown.drop(columns=["dtype", "D", "N", "kernel"])
    (page := out / "kernels.md").write_text(f"""# The kernels as machine code

Written by `python -m perf audit` on {time.strftime("%Y-%m-%d")} with triton {triton.__version__}. Every kernel was
compiled by Triton as the library launches it, for GPUs that were not there, and its machine code read. **Nothing ran,
and no time was measured or predicted.** What an H200 measured is in [gpu-h200](gpu-h200/README.md).

## Budgets

{budgets(frame).to_markdown(index=False)}

## bfloat16, D={cases.D}, N={cases.N:,}

The kernels of a step of ArcFace; after a comma, what differs in a loss that asks for other or more code of the same
kernel; and those that draw a sample. `block`: rows x columns x part of the sum of a tile, or rows x D, or what a
program of a draw looks at. `spills`: bytes of local memory, or registers on AMD. `blocks`: how many a processor holds.
`parts`: of a tile that the rest of the kernel takes one after another. `instructions`: of one program, in its code.

{shown.to_markdown(index=False)}

All {len(frame)} lines are in [kernels.csv](kernels.csv).
""")
    return page
