"""The pictures: time and memory of a step against classes, a line for each code."""

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from perf.providers.base import GRAPHS
from perf.report.statistics import SWEPT, Findings, Main, fits, memory_left
from perf.report.terminal import megabytes, seconds

# Ours in warm colours, others in cold ones, legible on white and on black; markers tell them apart without colour.
LOOK = {
    "ours": ("#e03131", "o"), "ours-retain": ("#f08c00", "s"), "ours-in-backward": ("#c2449b", "D"),
    "ours-sampled": ("#c9a000", "P"),
    "plain": ("#868e96", "o"), "plain-compiled": ("#3b82c4", "s"),
    "plain-sampled": ("#a9a9a9", "P"), "pml": ("#2f9e44", "^"), "insightface": ("#1098ad", "v"),
    "torch-lce": ("#6a8fd8", "<"), "torch-lce-chunked": ("#8e6fd0", ">"), "torch-lce-rows64": ("#3f9fd2", "*"),
    "liger": ("#2a9d6f", "h"), "cce": ("#7a6fe0", "p"), "quack": ("#44aa99", "d"),
}  # fmt: skip
OTHER = ("#999933", "d")  # a user's own head
GLYPHS = dict(zip("osDPx^v<>*hpd", "●■◆✚✕▲▼◀▶★⬢⬟♦", strict=True)) | {"none": "○"}  # for the page's legend
OUT = "ran out of memory"  # what a cross on the limit means; no code has that marker
INK = "#010203"  # of text and axes; the page has its own colour there, light or dark
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "tritonmargin", "legend.fontsize": 8, "axes.titlelocation": "left",
         "axes.spines.top": False, "axes.spines.right": False, "text.color": INK, "axes.labelcolor": INK,
         "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK}  # fmt: skip


class Picture(NamedTuple):
    name: str
    alt: str  # what it shows, for who does not see it
    png: bytes  # with its legend
    svg: str  # without
    legend: list[tuple[str, str, str]]  # colour, glyph, name


def curves(found: Findings, main: Main) -> list[tuple[pd.DataFrame, dict[str, Any]]]:
    """The rows of every code in the main mode, and in a CUDA graph of it, and how their line looks; ours first."""
    rows = found.rows[(found.rows[["loss", "dtype", "N", "D"]] == [main.loss, main.dtype, main.n, main.d]).all(axis=1)]
    rows = rows[(rows["mode"].replace(GRAPHS) == main.mode) & (rows["wrong"] == "")].sort_values("C")
    rows = rows[~rows["provider"].str.contains(SWEPT, regex=False)]
    lines = []
    for (provider, mode), part in rows.groupby(["provider", "mode"], sort=False):
        color, marker = LOOK.get(str(provider), OTHER)
        graph, ours = mode in GRAPHS, provider == "ours"
        lines.append((part, {
            "color": color, "marker": marker, "mfc": "none" if graph else color, "lw": 2.2 if ours else 1.3, "ms": 6,
            "ls": "--" if graph else ":" if part["work"].iloc[0] == "sampled" else "-", "zorder": 3 if ours else 2,
            "label": part["title"].iloc[0] + (", in a CUDA graph" if graph else ""),
        }))  # fmt: skip
    return sorted(lines, key=lambda line: not line[0]["provider"].iloc[0].startswith("ours"))


def draw_time(axis: Axes, found: Findings, main: Main) -> None:
    for part, style in curves(found, main):
        part = part[part["samples"] > 0]
        axis.plot(part["C"], part["median_s"], **style)
    axis.set_title(f"time of a step ({main.mode})")
    axis.yaxis.set_major_formatter(lambda value, _: seconds(value))


def draw_memory(axis: Axes, found: Findings, main: Main) -> None:
    """The limit is what W and its gradient leave of the machine's memory: where a line meets it, it does not fit."""
    lines = [(part, style) for part, style in curves(found, main) if part["mode"].iloc[0] == main.mode]
    everything = pd.concat([part for part, _ in lines])
    far = everything["C"].max()
    for part, style in lines:
        known, end = part[part["beyond_mb"].notna()], fits(part)
        axis.plot(known["C"], known["beyond_mb"], **style)
        if end > known["C"].max():
            x, y = [known["C"].iloc[-1], end], [known["beyond_mb"].iloc[-1], memory_left(known, end)]
            axis.plot(x, y, color=style["color"], lw=0.9, ls=(0, (2, 3)), zorder=1)
            far = max(far, end)
    axis.set_title("memory beyond W and its gradient")
    axis.yaxis.set_major_formatter(lambda value, _: megabytes(value))
    low = axis.get_ylim()[0]
    classes = np.geomspace(everything["C"].min(), far, 300)
    left = memory_left(everything, classes)
    if np.isfinite(left).all():
        axis.plot(classes[left > low], left[left > low], color="gray", lw=1.6)
        axis.set_ylim(low, 3 * left[0])
        said = f"what W and its gradient leave of {everything['limit_gib'].max():.3g} GiB"
        axis.annotate(said, (classes[0], 1.2 * left[0]), fontsize=8.5, color="gray")
        label = OUT  # of the first
        for part, style in lines:
            out = part[part["note"].str.contains("out of memory")]
            left = memory_left(everything, out["C"]).clip(low)
            axis.plot(out["C"], left, "x", color=style["color"], ms=9, mew=2, label=label)
            label = "_" if len(out) else label


def picture(name: str, draw: Callable[[Axes, Findings, Main], None], found: Findings, main: Main) -> Picture | None:
    """None if there is nothing to draw."""
    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.1), layout="constrained")
        axis = figure.subplots()
        axis.set(xscale="log", yscale="log", xlabel=f"classes ({main.loss}, {main.dtype}, N={main.n}, D={main.d})")
        draw(axis, found, main)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M" if value >= 1e6 else f"{value:,.0f}")
        axis.yaxis.set_minor_formatter("")
        axis.grid(alpha=0.25)
        named = [line for line in axis.lines if len(line.get_xdata()) and not line.get_label().startswith("_")]
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        figure.legend(handles=named, loc="outside lower center", ncols=2)
        figure.savefig(png, format="png", dpi=110, facecolor="white", metadata={"Software": None})
    marks = ["none" if line.get_mfc() == "none" else line.get_marker() for line in named]
    legend = [(line.get_color(), GLYPHS[mark], line.get_label()) for line, mark in zip(named, marks, strict=True)]
    alt = f"{axis.get_title(loc='left')} against classes, a line for each of {', '.join(name for *_, name in legend)}"
    text = svg.getvalue().replace(INK, "currentColor")
    return Picture(name, alt, png.getvalue(), text[text.index("<svg") :], legend) if legend else None
