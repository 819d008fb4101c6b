"""The numbers of README.md, from the committed results: `python -m perf readme` writes them between two marks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd

from perf import grid, machine
from perf.findings import find, megabytes, seconds, sentence, step_words
from perf.gate_speed import BESIDE
from perf.grid import YARDSTICK
from perf.providers.base import STEP, WHOLE
from perf.report import markdown
from perf.results import NOT_BEGUN, Results, done, load
from perf.run import key
from perf.terminal import digits

BEGIN, END = "<!-- numbers: python -m perf readme -->", "<!-- end of numbers -->"
GPU_BEGIN, GPU_END = "<!-- gpu numbers: python -m perf readme -->", "<!-- end of gpu numbers -->"
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


def numbers(results: Results, others: dict[str, Results] | None = None) -> str:
    """Everything between the marks; `others`: other machines' results, by their folder."""
    rows = results.rows[results.rows["device"] == "cpu"]
    found = find(results)
    parts = [
        f"{sentence(found)} ArcFace, D={D}, C={C:,}, forward and backward; in bold units of one N x D x C GEMM into a "
        "buffer that exists, in the same dtype and round. Without retained logits a step makes four products, of tiles "
        "that stay in the cache, where that one GEMM writes all N x C to main memory:",
        markdown(speed(rows, results.samples)),
        compiled(rows),
        "Peak memory beyond W, its gradient and the inputs (D=128, N=256, float32, forward and backward):",
        markdown(memory(rows)),
        "A whole step, SGD with momentum included (N=256, float32), and its peak memory beyond W, the momentum and the "
        "inputs:",
        markdown(whole(rows)),
        promises(found.promised),
        complete(results),
        "Measured on:",
        measured_on(results),
        "On other machines:" if others else "",
        "\n".join(on_another(folder, each) for folder, each in (others or {}).items()),
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


def compiled(rows: pd.DataFrame) -> str:
    """How full logits under torch.compile stand beside ours, and ours with all logits retained."""
    names = {"arcface": "ArcFace", "softmax": "no margin"}
    rows = rows[(rows["mode"] == STEP) & (rows["wrong"] == "") & rows["loss"].isin(names)]
    size = ["loss", "dtype", "N", "D", "C"]
    wide = rows[rows["times_ours"].notna()].pivot_table(index=size, columns="provider", values="times_ours")
    wide = wide.reindex(columns=["plain-compiled", "ours-retain"]).dropna(subset="plain-compiled")
    said = []
    for (loss, dtype), each in wide.groupby(level=["loss", "dtype"]):
        kept = (each["plain-compiled"] / each["ours-retain"]).dropna()
        retained = f", over ours with all logits retained {middle(kept)}" if len(kept) else ""
        said.append(f"{names[loss]} in {dtype} {middle(each['plain-compiled'])}{retained}")
    return (
        f"Time of full logits under torch.compile over ours, median over all sizes: {'; '.join(said)}." if said else ""
    )


def middle(values: pd.Series) -> str:
    """The median and what it is of."""
    return f"{digits(values.median())} ({digits(values.min())} to {digits(values.max())}, {len(values)} sizes)"


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
    rest = "" if whole == len(blocks) else "; `python -m perf run --full` goes on with the rest"
    return (
        f"The committed table has an answer (a time, or why there is none) for {held:,} of the {len(cases):,} cases of "
        f"`--full`, and {whole} of its {len(blocks)} sizes whole{rest}."
    )


def measured_on(results: Results) -> str:
    """Every run that rows are from."""
    used = results.rows["run"].astype(str).value_counts()
    lines = [f"- {machine.one_line(facts)}: {used[run]} rows" for run, facts in results.runs.items() if run in used]
    return "\n".join(lines)


def elsewhere(out: Path, root: Path) -> dict[str, Results]:
    """Other machines' results in the folders beside `out` (see `results.beside`), by their path from `root`."""
    folders = sorted(folder for folder in out.parent.glob(f"{out.name}-*") if folder.is_dir())
    found = {Path(os.path.relpath(folder, root)).as_posix(): load(folder) for folder in folders}
    return {folder: results for folder, results in found.items() if len(results.rows)}


def on_another(folder: str, results: Results) -> str:
    """What another machine says."""
    rows = results.rows
    used = [facts for number, facts in results.runs.items() if number in set(rows["run"].astype(str))]
    open_ones = rows["note"].str.startswith(NOT_BEGUN).sum()
    asked = f"{len(rows)} cases" + (f", {open_ones} of them not begun in its time" if open_ones else "")
    found = find(results)
    said = [f"{asked}, {'; '.join(machine.one_line(facts) for facts in used)}.", sentence(found), compiled(rows)]
    return f"- [{folder}]({folder}/index.html): " + " ".join(part for part in said if part)


# -- a GPU's, from what `python -m perf gate` left ----------------------------------------------------------------


def of_a_gpu(gate: dict[str, Any]) -> str:
    """Everything between the marks for GPUs."""
    steps = {name: step.get("result") for name, step in gate["steps"].items()}
    facts = steps["environment"]
    said = [
        f"{facts['gpu']}, torch {facts['torch']}, Triton {facts['triton']}, Python {facts['python']}, {facts['date']}. "
        "Forward and backward (in brackets: with the update of W), median, and memory beyond what the step is given:",
        markdown(gpu_speed(pd.DataFrame(steps["speed"]))),
        f"Milliseconds of forward and backward at D={D}; in a CUDA graph no launch waits for the CPU:",
        markdown(gpu_table(pd.DataFrame(steps["table"]))),
        gpu_ratios(pd.DataFrame(steps["table"])),
        "The step at N=1024, D=512, C=1,000,000 in bfloat16 by the size of its chunks:",
        markdown(gpu_chunks(pd.DataFrame(steps["chunks"]))),
        "Predicted by the model of today and measured:",
        markdown(gpu_verdict(pd.DataFrame(steps["verdict"]))),
    ]
    return "\n\n".join(said)


def gpu_speed(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows[rows["milliseconds"].notna()]
    sizes = rows[["dtype", "N", "D", "C"]].drop_duplicates().itertuples(index=False)
    lines: dict[str, dict[str, str]] = {}
    for size in sizes:
        here = rows[(rows[["dtype", "N", "D", "C"]] == list(size)).all(axis=1)]
        for row in here.sort_values("loss").itertuples():
            title = row.title if row.loss == "arcface" else f"no margin: {row.title}"
            time = f"{digits(row.milliseconds)} ms"
            taken = f"({time})" if row.mode == WHOLE else time
            held = f", {megabytes(row.peak_MB)}" if pd.notna(row.peak_MB) else ""
            column = f"{size.dtype}, N={size.N:,}, D={size.D}, C={size.C:,}"
            lines.setdefault(title, {"": title})[column] = taken + held
    return pd.DataFrame(list(lines.values())).fillna("")


def gpu_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per size that was measured at all, a column per loss and provider of those that the gate asks first."""
    rows = rows[[row.provider in BESIDE.get(row.loss, ()) for row in rows.itertuples()]]
    rows = rows[(rows["D"] == D) & (rows["mode"] == STEP) & rows["milliseconds"].notna() & (rows["wrong"] == "")]
    rows = rows.sort_values(["dtype", "C", "N"], ascending=[True, True, False], kind="stable")
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows.itertuples():
        line = lines.setdefault((row.dtype, row.C, row.N), {"": f"{row.dtype}, N={row.N:,}, C={row.C:,}"})
        line[f"{'ArcFace' if row.loss == 'arcface' else 'no margin'}: {row.title}"] = digits(row.milliseconds)
    return pd.DataFrame(list(lines.values())).fillna("")


def gpu_ratios(rows: pd.DataFrame) -> str:
    """From which to which ratio over all measured sizes, D = 128 too."""
    rows = rows[(rows["mode"] == STEP) & rows["milliseconds"].notna() & (rows["wrong"] == "")]
    wide = rows.pivot_table(index=["loss", "dtype", "C", "D", "N"], columns="provider", values="milliseconds")
    found = (wide["plain"] / wide["ours-graph"]).groupby(level=["loss", "dtype"])
    said = [
        f"{'ArcFace' if loss == 'arcface' else 'no margin'} in {dtype} {each.min():.2f} to {each.max():.2f}"
        for (loss, dtype), each in found
    ]
    return f"Time of full logits over that of ours in a CUDA graph, D=128 and D={D}: {', '.join(said)}."


def gpu_chunks(rows: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame([
        {"classes a chunk": f"{row.chunk:,}" if row.chunk else "as the library chooses",
         "launched one by one": f"{digits(row.milliseconds)} ms",
         "in a CUDA graph": f"{digits(row.milliseconds_in_a_graph)} ms", "memory": megabytes(row.peak_MB)}
        for row in rows.itertuples()
    ])  # fmt: skip


def gpu_verdict(rows: pd.DataFrame) -> pd.DataFrame:
    """Without the step launched one by one, whose prediction has the host's costs from these measurements."""
    rows = rows[rows["measured"].notna() & rows["figure"].str.endswith(", ms, N=1024 D=512 C=1000000")]
    rows = rows[~rows["figure"].str.contains("one by one")]
    return pd.DataFrame([
        {"ms": row.figure.partition(", ms,")[0], "predicted": digits(row.predicted), "measured": digits(row.measured),
         "measured over predicted": digits(row.measured_over_predicted)}
        for row in rows.itertuples()
    ])  # fmt: skip


# -- the file ----------------------------------------------------------------------------------------------------


def rewritten(
    text: str, results: Results, gate: dict[str, Any] | None = None, others: dict[str, Results] | None = None
) -> str:
    """README with the numbers between the marks replaced; ValueError without marks."""
    text = between(text, BEGIN, END, numbers(results, others))
    return text if gate is None else between(text, GPU_BEGIN, GPU_END, of_a_gpu(gate))


def between(text: str, begin: str, end: str, new: str) -> str:
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"no {begin} ... {end} in the text")
    return f"{before}{begin}\n\n{new}\n\n{end}{after}"


def write(
    path: Path, results: Results, gate: dict[str, Any] | None = None, others: dict[str, Results] | None = None
) -> bool:
    """Whether the file changed."""
    before = path.read_text()
    after = rewritten(before, results, gate, others)
    path.write_text(after)
    return before != after
