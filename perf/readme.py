"""The numbers of README.md, from the committed results: `python -m perf readme` writes them between two marks."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from perf import grid, machine
from perf.findings import find, megabytes, seconds, sentence, step_words
from perf.grid import YARDSTICK
from perf.providers.base import STEP, WHOLE
from perf.report import markdown
from perf.results import Results, done
from perf.run import key
from perf.terminal import digits

BEGIN, END = "<!-- numbers: python -m perf readme -->", "<!-- end of numbers -->"
SIZES = [("float32", 256), ("float32", 32), ("bfloat16", 256), ("bfloat16", 32)]
ROWS = [
    ("tritonmargin", "ours", STEP, "arcface"), ("tritonmargin, all logits retained", "ours-retain", STEP, "arcface"),
    ("tritonmargin, W frozen", "ours", "frozen W", "arcface"), ("tritonmargin, no-grad", "ours", "no-grad", "arcface"),
    ("full logits, plain code", "plain", STEP, "arcface"),
    ("pytorch-metric-learning `ArcFaceLoss`", "pml", STEP, "arcface"),
    ("no margin: tritonmargin", "ours", STEP, "softmax"),
    ("no margin: `F.linear_cross_entropy`", "torch-lce", STEP, "softmax"),
    ("no margin: `F.linear_cross_entropy`, chunks of 64 rows", "torch-lce-rows64", STEP, "softmax"),
]  # fmt: skip
D, C = 512, 131_072


def numbers(results: Results) -> str:
    """Everything between the marks."""
    rows = results.rows[results.rows["device"] == "cpu"]
    found = find(results)
    parts = [
        f"{sentence(found)} ArcFace, D={D}, C={C:,}, forward and backward; in bold units of one N x D x C GEMM into a "
        "buffer that exists, in the same dtype and round (the least possible without retained logits is 4):",
        markdown(speed(rows, results.samples)),
        "Peak memory beyond W, its gradient and the inputs (D=128, N=256, float32, forward and backward):",
        markdown(memory(rows)),
        "A whole step, SGD with momentum included (N=256, float32), and its peak memory beyond W, the momentum and the "
        "inputs:",
        markdown(whole(rows)),
        promises(found.promised),
        complete(results),
        *measured_on(results),
    ]
    return "\n\n".join(part for part in parts if part)


def cell(rows: pd.DataFrame, **wanted: object) -> pd.Series | None:
    """The one measured row with these values."""
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    rows = rows[(rows["samples"] > 0) & (rows["wrong"] == "")]
    return None if rows.empty else rows.iloc[0]


def speed(rows: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    here = [(dtype, n) for dtype, n in SIZES if cell(rows, dtype=dtype, N=n, D=D, C=C, provider="ours") is not None]
    yard = samples[(samples["provider"] == YARDSTICK) & (samples["D"] == D) & (samples["C"] == C)]
    lines = [{"": "one GEMM", **{
        heading(dtype, n): seconds(yard[(yard["dtype"] == dtype) & (yard["N"] == n)]["seconds"].median())
        for dtype, n in here
    }}]  # fmt: skip
    for title, provider, mode, loss in ROWS:
        line = {"": title}
        for dtype, n in here:
            row = cell(rows, dtype=dtype, N=n, D=D, C=C, provider=provider, mode=mode, loss=loss)
            line[heading(dtype, n)] = "" if row is None else f"{step_words(row)}, **{digits(row['x_gemm'])}**"
        if any(value for name, value in line.items() if name):
            lines.append(line)
    return pd.DataFrame(lines)


def heading(dtype: str, n: int) -> str:
    return f"{dtype}, N={n}"


def memory(rows: pd.DataFrame) -> pd.DataFrame:
    lines = []
    for title, provider in (("tritonmargin", "ours"), ("full logits, plain code", "plain")):
        line = {"": title}
        for c in (10_000, 100_000, 1_000_000):
            row = cell(rows, dtype="float32", N=256, D=128, C=c, provider=provider, mode=STEP, loss="arcface")
            line[f"C={c:,}"] = "" if row is None else megabytes(row["beyond_mb"])
        lines.append(line)
    return pd.DataFrame(lines)


def whole(rows: pd.DataFrame) -> pd.DataFrame:
    lines = []
    for title, provider in (
        ("tritonmargin", "ours"), ("tritonmargin, W updated in backward", "ours-in-backward"),
        ("tritonmargin, a tenth of the classes", "ours-sampled"), ("full logits, plain code", "plain"),
        ("full logits of a tenth of the classes, plain code", "plain-sampled"),
    ):  # fmt: skip
        line = {"": title}
        for d, c in ((512, 100_000), (128, 1_000_000), (512, 1_000_000)):
            row = cell(rows, dtype="float32", N=256, D=d, C=c, provider=provider, mode=WHOLE, loss="arcface")
            said = "" if row is None else ", ".join(filter(None, [step_words(row), megabytes(row["peak_mb"])]))
            line[f"D={d}, C={c:,}"] = said
        lines.append(line)
    return pd.DataFrame(lines)


def promises(promised: pd.DataFrame) -> str:
    """Which of the bounds (`perf/bounds.py`) hold."""
    if promised.empty:
        return ""
    missed = [
        f"{row.title} in {row.dtype}, N={row.N}, C={row.C:,}, {row.mode}: {row.promised}, found {digits(row.found)}"
        for row in promised[~promised["met"].astype(bool)].itertuples()
    ]
    said = f"{int(promised['met'].sum())} of {len(promised)} promises of `perf/bounds.py` hold in this run"
    return f"{said}." if not missed else f"{said}. Missed: {'; '.join(missed)}."


def complete(results: Results) -> str:
    """How much of `--full` is there."""
    blocks, known = grid.PLANS["full"].blocks(), done(results.rows)
    whole = sum(all(key(case) in known for case in cases) for cases in blocks.values())
    cases = [case for block in blocks.values() for case in block]
    held = sum(key(case) in known for case in cases)
    return (
        f"The committed table holds {held:,} of the {len(cases):,} cases of `--full`, and {whole} of its {len(blocks)} "
        "sizes whole; `python -m perf run --full` goes on with the rest."
    )


def measured_on(results: Results) -> list[str]:
    """Every run that rows are from."""
    used = results.rows["run"].astype(str).value_counts()
    return ["Measured on:", "\n".join(
        f"- {machine.one_line(facts)}: {used[number]} rows" for number, facts in results.runs.items() if number in used
    )]  # fmt: skip


def rewritten(text: str, results: Results) -> str:
    """README with the numbers between the marks replaced; ValueError without marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} ... {END} in the text")
    return f"{before}{BEGIN}\n\n{numbers(results)}\n\n{END}{after}"


def write(path: Path, results: Results) -> bool:
    """Whether the file changed."""
    before = path.read_text()
    after = rewritten(before, results)
    path.write_text(after)
    return before != after
