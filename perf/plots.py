"""The pictures of a run, from the results alone. Each is a function of them that returns a figure, or None."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from perf import correct
from perf.findings import Findings, nearest
from perf.noise import SWEPT
from perf.providers.base import STEP, WHOLE

# Ours in warm colours, others in cold ones; markers tell them apart without colour.
LOOK = {
    "ours": ("#d62728", "o"), "ours-retain": ("#ff7f0e", "s"), "ours-in-backward": ("#b5338a", "D"),
    "ours-sampled": ("#e8b500", "P"), "ours-sharded": ("#8c564b", "X"), "plain": ("#7f7f7f", "o"),
    "plain-compiled": ("#4d4d4d", "s"), "plain-sampled": ("#a9a9a9", "P"), "pml": ("#2ca02c", "^"),
    "insightface": ("#17becf", "v"), "torch-lce": ("#1f77b4", "<"), "torch-lce-chunked": ("#6a51a3", ">"),
    "ours-torch": ("#e377c2", "X"),
    "torch-lce-rows64": ("#3f8fd2", "*"), "liger": ("#117733", "h"), "cce": ("#332288", "p"), "quack": ("#44aa99", "d"),
}  # fmt: skip
DARK = {
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "text.color": "#e6e6e6",
    "axes.labelcolor": "#e6e6e6", "axes.edgecolor": "#888888", "xtick.color": "#cccccc", "ytick.color": "#cccccc",
    "legend.facecolor": "#222222", "legend.edgecolor": "#555555", "grid.color": "#666666",
}  # fmt: skip
LIGHT = {"figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none"}
COMMON = {"svg.fonttype": "none", "svg.hashsalt": "tritonmargin", "font.size": 10, "axes.titlesize": 10,
          "legend.fontsize": 8}  # fmt: skip


class Picture(NamedTuple):
    name: str
    title: str
    alt: str  # what it shows, for who does not see it
    draw: Callable[[Findings], Figure | None]


def look(provider: str) -> dict[str, str]:
    color, marker = LOOK.get(provider.partition(SWEPT)[0], ("#999933", "."))
    return {"color": color, "marker": marker}


def measured(found: Findings, mode: str = STEP, loss: str = "arcface") -> pd.DataFrame:
    rows = found.rows
    keep = (rows["samples"] > 0) & (rows["wrong"] == "") & (rows["mode"] == mode) & (rows["loss"] == loss)
    return rows[keep & ~rows["provider"].str.contains(SWEPT, regex=False)]


def panels(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """One per dtype: the batch closest to 256, at the width with the most C."""
    found = []
    for dtype, part in frame.groupby("dtype", sort=False):
        part = part[part["N"] == nearest(part, 256)]
        most = part.groupby("D")["C"].nunique()
        d = int(most[most == most.max()].index.max())
        part = part[part["D"] == d]
        if part["C"].nunique() > 1:
            found.append((f"{dtype}, N={part['N'].iloc[0]}, D={d}", part))
    return found


def against_classes(frame: pd.DataFrame, column: str, unit: float, label: str) -> Figure | None:
    """Lines over C, a panel per dtype."""
    parts = panels(frame[frame[column].notna() & (frame[column] > 0)])
    if not parts:
        return None
    figure, axes = plt.subplots(1, len(parts), figsize=(5.2 * len(parts), 4.2), layout="constrained", squeeze=False)
    for axis, (heading, part) in zip(axes[0], parts, strict=True):
        for provider, rows in part.groupby("provider", sort=False):
            rows = rows.sort_values("C")
            dash = "--" if rows["work"].iloc[0] == "sampled" else "-"
            axis.plot(
                rows["C"], rows[column] * unit, dash, label=rows["title"].iloc[0], lw=1.5, ms=5, **look(str(provider))
            )
        axis.set(xscale="log", yscale="log", xlabel="classes C", title=heading)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(label)
    named = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=2)
    return figure


def time_against_classes(found: Findings) -> Figure | None:
    return against_classes(measured(found), "median_s", 1e3, "ms, forward + backward")


def softmax_against_classes(found: Findings) -> Figure | None:
    return against_classes(measured(found, loss="softmax"), "median_s", 1e3, "ms, forward + backward")


def memory_against_classes(found: Findings) -> Figure | None:
    figure = against_classes(measured(found), "beyond_mb", 1.0, "MB beyond W, its gradient, the inputs")
    if figure is not None and len(found.rows["memory_mb"].dropna()):
        limit = float(found.rows["memory_mb"].dropna().iloc[-1])
        for axis in figure.axes:
            axis.axhline(limit, ls=":", color="gray")
            axis.annotate("this machine's memory", (axis.get_xlim()[0], limit), xytext=(4, 3), fontsize=8,
                          textcoords="offset points")  # fmt: skip
    return figure


def speed_up(found: Findings) -> Figure | None:
    """How many times longer the usual code takes, N x C."""
    frame = measured(found)
    frame = frame[(frame["provider"] == "plain")]
    parts = [(key, part) for key, part in frame.groupby(["dtype", "D"]) if len(part) > 3]
    if not parts:
        return None
    figure, axes = plt.subplots(1, len(parts), figsize=(3.6 * len(parts), 3.2), layout="constrained", squeeze=False)
    for axis, ((dtype, d), part) in zip(axes[0], parts, strict=True):
        table = part.pivot_table(index="N", columns="C", values="times_ours")
        single = part.pivot_table(index="N", columns="C", values="samples")
        axis.imshow(np.log2(table.to_numpy()), cmap="RdYlGn", vmin=-3, vmax=3, aspect="auto", origin="lower")
        for i, j in np.ndindex(table.shape):
            value = table.iat[i, j]
            if value == value:
                once = single.iat[i, j] == 1
                axis.text(
                    j, i, f"{value:.1f}x" + ("*" if once else ""), ha="center", va="center", color="black", fontsize=9
                )
        axis.set_xticks(range(table.shape[1]), [f"{c / 1000:,.0f}k" for c in table.columns], fontsize=8)
        axis.set_yticks(range(table.shape[0]), [str(n) for n in table.index])
        axis.set(title=f"{dtype}, D={d}", xlabel="C")
    axes[0][0].set_ylabel("N")
    return figure


def fraction_of_limit(found: Findings) -> Figure | None:
    """The least time that the work needs on this machine, over the time taken."""
    parts = [frame for mode in ("forward", STEP, WHOLE) if len(frame := measured(found, mode))]
    if not parts:
        return None
    rows = pd.concat(parts)
    rows = rows[rows["fraction"].notna() & (rows["work"] == "all classes")]
    rows = rows[rows["N"] == nearest(rows, 256)]
    rows = rows[rows["D"] == rows["D"].max()]
    # Where most was measured: at the largest sizes most codes are past the budget.
    counts = rows.groupby("C").size()
    rows = rows[rows["C"] == counts.index[counts == counts.max()].max()]
    dtypes = list(dict.fromkeys(rows["dtype"]))
    heights = [max(rows[rows["dtype"] == dtype].groupby("mode").size().sum(), 1) for dtype in dtypes]
    figure, axes = plt.subplots(len(dtypes), 1, figsize=(9, 0.8 + 0.27 * sum(heights)), layout="constrained",
                                squeeze=False, height_ratios=heights)  # fmt: skip
    for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
        part = rows[rows["dtype"] == dtype].sort_values(["mode", "fraction"])
        names = part["title"] + ", " + part["mode"]
        bars = axis.barh(names, 100 * part["fraction"], color=[look(name)["color"] for name in part["provider"]])
        axis.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
        axis.set(title=f"{dtype}, N={part['N'].iloc[0]}, D={part['D'].iloc[0]}, C={part['C'].iloc[0]:,}")
        axis.tick_params(labelsize=8)
    axes[-1][0].set_xlabel("% of the machine's limit")
    return figure


def errors(found: Findings) -> Figure | None:
    """Relative distance from float64, of everything that was checked."""
    names = {"error_loss": "loss", "error_dx": "dX", "error_dw": "dW"}
    rows = found.rows[found.rows["error_dx"].notna()]
    rows = rows[~rows["provider"].str.contains(SWEPT, regex=False)].drop_duplicates(["provider", "loss", "dtype", "D"])
    if rows.empty:
        return None
    dtypes = list(dict.fromkeys(rows["dtype"]))
    providers = list(dict.fromkeys(rows["provider"]))[::-1]
    height = 1.2 + 0.25 * len(providers)
    figure, axes = plt.subplots(1, len(dtypes), figsize=(4.6 * len(dtypes), height), layout="constrained",
                                squeeze=False, sharey=True)  # fmt: skip
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        part = rows[rows["dtype"] == dtype]
        places = part["provider"].map(providers.index)
        for shift, (column, name) in enumerate(names.items()):
            axis.plot(part[column], places + 0.22 * (shift - 1), "osv"[shift], ms=4, alpha=0.8, label=name)
        axis.axvline(correct.ERROR[dtype], ls=":", color="gray")
        axis.set(xscale="log", title=f"{dtype}: error against float64")
        axis.grid(alpha=0.3, axis="x")
    titles = rows.drop_duplicates("provider").set_index("provider")["title"]
    axes[0][0].set_yticks(range(len(providers)), [titles[name] for name in providers], fontsize=8)
    axes[0][-1].legend()
    return figure


SWEEPS = {
    "chunk_bytes": ("bytes of a chunk", "ours", True), "retain": ("part of the logits retained", "ours", False),
    "rate": ("part of the classes sampled", "ours-sampled", True), "ranks": ("gloo processes", "ours-sharded", False),
}  # fmt: skip
DEFAULTS = {"retain": ("ours", 0.0), "rate": ("ours-sampled", 0.1), "ranks": ("ours-sharded", 2)}


def sweeps(found: Findings) -> Figure | None:
    """The effect of one setting at a time, relative to ours as it comes."""
    rows = found.rows[(found.rows["samples"] > 0) & (found.rows["mode"] == WHOLE)]
    swept = rows[rows["provider"].str.contains(SWEPT, regex=False)].copy()
    if swept.empty:
        return None
    size = ["loss", "dtype", "N", "D", "C"]
    swept = swept[(swept[size] == swept[size].iloc[-1]).all(axis=1)]
    here = rows[(rows[size] == swept[size].iloc[-1]).all(axis=1)]
    base = here[here["provider"] == "ours"]
    if base.empty:
        return None
    figure, axes = plt.subplots(1, len(SWEEPS), figsize=(12.5, 3.2), layout="constrained")
    for axis, (option, (label, provider, log)) in zip(axes, SWEEPS.items(), strict=True):
        own = swept[swept["provider"].str.startswith(f"{provider}{SWEPT}{option}=")]
        points = {
            float(name.partition("=")[2]): time for name, time in zip(own["provider"], own["median_s"], strict=True)
        }
        known = here[here["provider"] == DEFAULTS.get(option, ("", 0))[0]]
        if len(known):
            points[float(DEFAULTS[option][1])] = known["median_s"].iloc[0]
        if len(points) < 2:
            axis.set_axis_off()
            continue
        order = sorted(points)
        axis.plot(order, [points[x] / base["median_s"].iloc[0] for x in order], **look(provider))
        axis.axhline(1.0, ls=":", color="gray")
        axis.set(xlabel=label, ylim=(0, None))
        if log:
            axis.set_xscale("log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("time of a whole step / that of the default")
    line = base.iloc[0]
    figure.suptitle(f"{line['dtype']}, N={line['N']}, D={line['D']}, C={line['C']:,}", fontsize=10)
    return figure


def fits(found: Findings) -> Figure | None:
    """Time against the work, and the line that fits it."""
    frame = measured(found)
    frame = frame[frame["provider"].isin(["ours", "plain", "pml"])]
    dtypes = list(dict.fromkeys(frame["dtype"]))
    if frame.empty:
        return None
    figure, axes = plt.subplots(1, len(dtypes), figsize=(5 * len(dtypes), 3.8), layout="constrained", squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for provider, part in frame[frame["dtype"] == dtype].groupby("provider", sort=False):
            work = part["N"] * part["C"] * part["D"]
            style = look(str(provider))
            axis.plot(work, part["median_s"], style["marker"], color=style["color"], ms=4, label=part["title"].iloc[0])
            line = found.growth[(found.growth["provider"] == provider) & (found.growth["dtype"] == dtype)]
            if len(line):
                x = np.geomspace(work.min(), work.max(), 50)
                y = line["a_ms"].iloc[0] / 1e3 + line["b_ps"].iloc[0] * 1e-12 * x
                axis.plot(x[y > 0], y[y > 0], color=style["color"], lw=1)
        axis.set(xscale="log", yscale="log", xlabel="N C D", title=dtype)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("seconds, forward + backward")
    axes[0][0].legend()
    return figure


PICTURES = (
    Picture("time", "Time against classes", "Time of forward and backward over the number of classes, a line per code; "
            "all grow in proportion.", time_against_classes),
    Picture("time_softmax", "Time against classes, without a margin", "The same of plain softmax cross-entropy, with "
            "torch's own fused losses.", softmax_against_classes),
    Picture("memory", "Memory against classes", "Peak memory beyond W, its gradient and the inputs over the number of "
            "classes: ours stays flat, code with full logits grows in proportion.", memory_against_classes),
    Picture("speed_up", "How many times longer the usual code takes", "Heat maps over batch size and classes of the "
            "time of plain code with full logits divided by ours; * of a single step.", speed_up),
    Picture("limit", "Part of the machine's limit", "Bars: the least time that the work needs on this machine, as a "
            "percentage of the time taken, by code and mode.", fraction_of_limit),
    Picture("errors", "Errors against float64", "Dots: relative distance from float64 of loss, dX and dW, by code and "
            "dtype; a dotted line at what counts as wrong.", errors),
    Picture("sweeps", "The effect of a setting", "Time of a whole step relative to the default, over chunk size, "
            "retained logits, sampling rate and number of processes.", sweeps),
    Picture("growth", "How the cost grows", "Time over N C D with the fitted lines a + b N C D.", fits),
)  # fmt: skip


class Images(NamedTuple):
    png: bytes  # for where SVG does not show
    light: str  # SVG as a data URI
    dark: str


def images(picture: Picture, found: Findings) -> Images | None:
    """The picture in its three forms; None if there is nothing to draw."""
    with plt.rc_context({**COMMON, **LIGHT}):
        figure = picture.draw(found)
        if figure is None:
            return None
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, facecolor="white", metadata={"Software": None})
        light = svg(figure)
        plt.close(figure)
    with plt.rc_context({**COMMON, **DARK}):
        figure = picture.draw(found)
        assert figure is not None
        dark = svg(figure)
        plt.close(figure)
    return Images(buffer.getvalue(), light, dark)


def svg(figure: Figure) -> str:
    """As a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
