"""Pictures of the kernels' audit."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from perf.gpus import GPUS


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
