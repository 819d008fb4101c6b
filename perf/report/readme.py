"""The tables of README.md and docs/performance, from the committed results: `python -m perf readme` writes them."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from math import nan
from pathlib import Path
from types import SimpleNamespace as Row
from typing import Any

import pandas as pd

from perf.providers.base import GRAPH, GRAPHS, STEP, WHOLE
from perf.report.statistics import cost, pivot, right
from perf.report.terminal import markdown, megabytes, seconds
from perf.suite.results import Results

MARKS = re.compile(r"(<!-- (?:table: |(?=numbers ))([a-z-]+) -->).*?(<!-- end of (?:numbers|table) -->)", re.DOTALL)
# Columns of the wide tables; docs/performance says what they mean.
HEADS = {
    "ours": "ours", "ours-retain": "ours, retained", "ours-sampled": "ours, a tenth",
    "ours-in-backward": "ours, in backward", "ours-torch": "ours in torch", "ours-compiled": "ours, compiled",
    "plain": "full logits", "plain-compiled": "full, compiled", "plain-sampled": "full, a tenth", "pml": "pml",
    "torch-lce": "lce", "torch-lce-chunked": "lce, chunked", "torch-lce-rows64": "lce, 64 rows", "liger": "Liger",
    "cce": "CCE",
}  # fmt: skip
# Title, provider, mode, loss: the lines of both tables, as far as they were measured.
ROWS = [
    ("**tritonmargin**", "ours", STEP, "arcface"),
    ("all logits retained (`retain_bytes`)", "ours-retain", STEP, "arcface"),
    ("a tenth of the classes", "ours-sampled", STEP, "arcface"),
    ("W updated in backward", "ours-in-backward", WHOLE, "arcface"),
    ("full logits", "plain", STEP, "arcface"), ("full logits, torch.compile", "plain-compiled", STEP, "arcface"),
    ("pytorch-metric-learning", "pml", STEP, "arcface"), ("**no margin: tritonmargin**", "ours", STEP, "softmax"),
    ("no margin: full logits", "plain", STEP, "softmax"),
    ("no margin: full logits, torch.compile", "plain-compiled", STEP, "softmax"),
    ("no margin: F.linear_cross_entropy", "torch-lce", STEP, "softmax"),
    ("no margin: Cut Cross-Entropy", "cce", STEP, "softmax"), ("no margin: Liger-Kernel", "liger", STEP, "softmax"),
]  # fmt: skip
CPU_SIZES = [("float32", 256, 10_000), ("float32", 256, 100_000), ("float32", 256, 131_072),
             ("bfloat16", 256, 131_072), ("bfloat16", 32, 1_000_000)]  # fmt: skip
GPU_SIZES = [("bfloat16", 1024, 1_000_000), ("bfloat16", 1024, 100_000)]
D = 512


def numbers(cpu: Results, gpu: Results) -> str:
    """The two tables of README, each below a line about its machine and sizes."""
    g, c = (list(each.runs.values())[-1] for each in (gpu, cpu))
    about = f"D={D}, forward and backward, medians; memory beyond W and its gradient"
    other = ", another version than above" if c["torch"] != g["torch"] else ""

    def three(step: Any, graph: Any) -> list[str]:
        return [seconds(step.median_s), seconds(graph.median_s), megabytes(step.beyond_mb)]

    names = [f"C={c:,}, {kind}" for *_, c in GPU_SIZES for kind in ("launched", "CUDA graph", "memory")]
    on_gpu = filled(gpu, names, GPU_SIZES, three)
    names = [f"{dtype}, N={n}, C={c:,}" for dtype, n, c in CPU_SIZES]
    on_cpu = filled(cpu, names, CPU_SIZES, lambda step, _: [cost(step.median_s, step.beyond_mb, step.samples)])
    return "\n\n".join([
        f"{g['gpu']}, torch {g['torch']}, {g['date']}; bfloat16, N=1024, {about}:", markdown(on_gpu),
        f"{c['cpu']}, {c['cores']} cores, torch {c['torch']}{other}, {c['date']}; {about}:", markdown(on_cpu),
    ])  # fmt: skip


def filled(results: Results, names: list[str], sizes: Any, said: Callable[[Any, Any], list[str]]) -> pd.DataFrame:
    """A line for each of ROWS that has a number: at every size what is `said` of its step and its CUDA graph."""
    rows: dict[tuple[Any, ...], Any] = defaultdict(lambda: Row(median_s=nan, beyond_mb=nan, samples=0))
    for row in right(results.rows[results.rows["D"] == D]).itertuples():
        rows[row.provider, row.mode, row.loss, row.dtype, row.N, row.C] = row
    lines, graphs = [], {mode: graph for graph, mode in GRAPHS.items()}
    for title, provider, mode, loss in ROWS:
        both = [[rows[(provider, each, loss, *size)] for each in (mode, graphs[mode])] for size in sizes]
        lines.append([title, *(word for step, graph in both for word in said(step, graph))])
    return pd.DataFrame([line for line in lines if any(line[1:])], columns=["", *names])


def sizes(results: Results, modes: list[str], said: Callable[[pd.DataFrame], Iterable[str]]) -> str:
    """A table for each loss: a line for each size at this width, a column for each code that was measured there."""
    torch = list(results.runs.values())[-1]["torch"]
    rows = right(results.rows[results.rows["mode"].isin(modes) & (results.rows["D"] == D)])
    rows = rows[rows["loss"].isin(["arcface", "softmax"])].sort_values(["loss", "dtype", "N", "C"], kind="stable")
    rows = rows.assign(said=[*said(rows)], line=[f"{row.dtype}, N={row.N}, C={row.C:,}" for row in rows.itertuples()])
    rows["head"] = rows["provider"].replace(HEADS) + [", graph" * (mode in GRAPHS) for mode in rows["mode"]]
    tables = {loss: pivot(part, part["head"], part["said"], "line") for loss, part in rows.groupby("loss")}
    return "\n\n".join(f"{loss}, D={D}, torch {torch}:\n\n{markdown(table)}" for loss, table in tables.items())


def chunks(path: Path) -> pd.DataFrame:
    made = pd.read_csv(path)
    return pd.DataFrame({
        "classes in a chunk": [f"{chunk:,}" if chunk else "by default" for chunk in made["chunk"]],
        "launched": (made["milliseconds"] / 1e3).map(seconds),
        "CUDA graph": (made["milliseconds_in_a_graph"] / 1e3).map(seconds), "memory": made["beyond_mb"].map(megabytes),
    })  # fmt: skip


def rewritten(text: str, cpu: Results, gpu: Results, root: Path) -> str:
    """The text with everything between its marks replaced."""
    tables = {
        "numbers": lambda: numbers(cpu, gpu),
        "cpu-sizes": lambda: sizes(cpu, [STEP], lambda rows: rows["median_s"].map(seconds)),
        "cpu-memory": lambda: sizes(cpu, [STEP], lambda rows: rows["beyond_mb"].map(megabytes)),
        "cpu-steps": lambda: sizes(cpu, [WHOLE], lambda rows: map(cost, rows["median_s"], rows["peak_mb"])),
        "gpu-sizes": lambda: sizes(gpu, [STEP, GRAPH], lambda rows: rows["median_s"].map(seconds)),
        "gpu-chunks": lambda: markdown(chunks(root / "reports/gpu-h200/chunks.csv")),
    }
    return MARKS.sub(lambda found: f"{found[1]}\n\n{tables[found[2]]()}\n\n{found[3]}", text)


def write(path: Path, cpu: Results, gpu: Results) -> bool:
    """Whether README or a page of docs/performance changed; ValueError for nothing to write, or nowhere."""
    if not MARKS.search(path.read_text()) or not (cpu.runs and gpu.runs):
        raise ValueError(f"no <!-- numbers --> ... <!-- end of numbers --> in {path}, or no results to write there")
    pages = [path, *path.parent.glob("docs/performance/*.md")]
    texts = {page: rewritten(page.read_text(), cpu, gpu, path.parent) for page in pages}
    changed = [page for page in pages if page.read_text() != texts[page]]
    for page in changed:
        page.write_text(texts[page])
    return bool(changed)
