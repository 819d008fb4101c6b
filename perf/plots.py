"""The report's pictures, from the CSVs."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from perf.gpus import GPUS
from perf.tables import STEP

COLORS = {
    "ours": "tab:red", "ours-retain": "tab:orange", "ours-linear": "tab:pink", "plain": "tab:gray", "pml": "tab:brown",
    "torch-lce": "tab:blue", "torch-lce-rows64": "tab:cyan", "torch-lce-chunked": "tab:purple",
}  # fmt: skip


def draw(frames: dict[str, pd.DataFrame], out: Path) -> list[Path]:
    """Every picture whose numbers are there."""
    drawn = []
    speed = [frames[name] for name in ("fp32", "bf16", "batch") if name in frames]
    if speed:
        drawn.append(write(bars(pd.concat(speed)), out / "speed.png"))
    if "linear" in frames:
        drawn.append(write(linear(frames["linear"]), out / "linear.png"))
    if "memory" in frames:
        drawn.append(write(memory(frames["memory"]), out / "memory.png"))
    return drawn


def bars(frame: pd.DataFrame) -> Figure:
    """A whole step in units of the GEMM, a panel a size."""
    frame = frame[(frame["mode"] == STEP) & (frame["samples"] > 0)]
    sizes = list(frame.groupby(["dtype", "N", "D", "C"], sort=False))
    figure, axes = plt.subplots(len(sizes), 1, figsize=(9, 0.6 + 2.4 * len(sizes)), layout="constrained", squeeze=False)
    for axis, (size, rows) in zip(axes[:, 0], sizes, strict=True):
        colors = [COLORS.get(name, "tab:olive") for name in rows["provider"]]
        shown = axis.barh(rows["title"], rows["ratio_to_gemm"], color=colors)
        axis.bar_label(shown, fmt="%.1f", padding=3, fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(1.0, 1.6 * max(rows["ratio_to_gemm"].max(), 2.0))
        axis.invert_yaxis()
        axis.set_title("{}, N={}, D={}, C={:,}: forward + backward, in GEMMs".format(*size), fontsize=10)
        axis.tick_params(labelsize=8)
    return figure


def linear(frame: pd.DataFrame) -> Figure:
    figure, (time, per_class) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for (provider, mode), rows in frame[frame["samples"] > 0].groupby(["provider", "mode"], sort=False):
        label = provider if provider == "gemm" else f"{provider}, {mode}"
        look = dict(marker="o", label=label, color=COLORS.get(provider, "black"), ls="-" if mode == STEP else "--")
        time.plot(rows["C"], rows["median_s"] * 1e3, **look)
        per_class.plot(rows["C"], rows["median_s"] / rows["C"] * 1e9, **look)
    time.set(xscale="log", yscale="log", xlabel="C", ylabel="ms", title="time")
    per_class.set(xscale="log", xlabel="C", ylabel="ns", title="time per class", ylim=(0, None))
    for axis in (time, per_class):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def memory(frame: pd.DataFrame) -> Figure:
    """The peak against C, at the width at which most C were measured."""
    frame = frame[(frame["mode"] == STEP) & frame["beyond_profiler_mb"].notna()]
    counts = frame.groupby(["dtype", "N", "D"])["C"].nunique()
    dtype, n, d = counts.idxmax()
    frame = frame[(frame["dtype"] == dtype) & (frame["N"] == n) & (frame["D"] == d)]
    figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for provider, rows in frame.sort_values("C").groupby("provider", sort=False):
        color = COLORS.get(provider, "black")
        axis.plot(rows["C"], rows["beyond_profiler_mb"], marker="o", color=color, label=rows["title"].iloc[0])
    rows = frame.drop_duplicates("C").sort_values("C")
    axis.plot(rows["C"], rows["logits_mb"], color="black", ls=":", label="one copy of the logits")
    axis.set(xscale="log", yscale="log", xlabel="C", ylabel="MB beyond W, its gradient, the inputs")
    axis.set_title(f"peak memory of a step, {dtype}, N={n}, D={d}", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def cycles(frame: pd.DataFrame) -> Figure:
    """Cycles that a tile keeps each part of a processor busy, by width."""
    names = ["matrix", "exp", "issue", "shared", "memory"]
    targets = list(dict.fromkeys(frame["target"]))
    figure, axes = plt.subplots(2, len(targets), figsize=(3.4 * len(targets), 6), sharex=True, squeeze=False)
    for row, kernel in enumerate(("reduce_chunk", "weigh_chunk")):
        for column, target in enumerate(targets):
            part = frame[(frame["kernel"] == kernel) & (frame["target"] == target) & (frame["dtype"] == "bfloat16")]
            axis, below = axes[row][column], 0.0
            for name in names:
                values = part[f"{name}_cycles"].to_numpy()
                axis.bar([str(d) for d in part["D"]], values, bottom=below, label=name)
                below = below + values
            axis.set_title(f"{kernel}, {target}", fontsize=9)
            axis.set_xlabel("D")
    axes[0][0].set_ylabel("cycles of a tile, stacked")
    axes[0][0].legend(fontsize=8)
    figure.suptitle("What a bfloat16 tile keeps busy (static, predicted)")
    figure.tight_layout()
    return figure


def rooflines(frame: pd.DataFrame) -> Figure:
    """Predicted flops per second against flops per byte of main memory, by target."""
    figure, axis = plt.subplots(figsize=(7, 4.5))
    part = frame[frame["dtype"] == "bfloat16"]
    for target, rows in part.groupby("target", sort=False):
        gpu = GPUS[str(target)]
        ridge = gpu.peak("bfloat16") / gpu.memory
        (roof,) = axis.loglog(
            [0.5, ridge, 1e5], [0.5 * gpu.memory, gpu.peak("bfloat16"), gpu.peak("bfloat16")], label=gpu.name
        )
        intensity = rows["launch_flops"] / rows["main_memory_bytes"].clip(lower=rows["launch_flops"] / 5e4)
        axis.loglog(intensity, rows["launch_flops"] / (rows["predicted_us"] * 1e-6), "o", ms=3, color=roof.get_color())
    axis.set_xlabel("flops per byte of main memory")
    axis.set_ylabel("flops per second, predicted")
    axis.legend(fontsize=8)
    axis.set_title("Kernels under the published rooflines, bfloat16 (predicted)")
    figure.tight_layout()
    return figure


def write(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return path
