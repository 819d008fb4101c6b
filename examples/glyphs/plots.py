"""The report's pictures."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from examples.glyphs.data import augment, generator
from examples.glyphs.evaluate import BATCH, FALSE_ACCEPTS, Verification, evaluation_pictures
from examples.glyphs.fonts import SIZE, Glyphs, font_path

COLORS = {"arcface": "tab:red", "cosface": "tab:purple", "softmax": "tab:blue", "untrained": "tab:gray"}
NAMES = {"arcface": "ArcFace", "cosface": "CosFace", "softmax": "Softmax", "untrained": "untrained"}
SMOOTHING = 50  # steps that a point of the curves is the mean of


def smooth(values: list[float]) -> np.ndarray:
    """Mean over the last `SMOOTHING` steps; steps that were not watched are nan and left out."""
    array = np.asarray(values, dtype=float)
    known, filled = np.cumsum(np.isfinite(array)), np.cumsum(np.nan_to_num(array))
    count = known - np.concatenate([np.zeros(min(SMOOTHING, len(array))), known[:-SMOOTHING]])
    total = filled - np.concatenate([np.zeros(min(SMOOTHING, len(array))), filled[:-SMOOTHING]])
    return total / np.maximum(count, 1)


def curves(path: Path, runs: dict[str, dict[str, list[float]]]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    titles = ("loss (each its own scale)", "accuracy on training batches, before the margin", "angle, degrees")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    for loss, recorded in runs.items():
        look = {"color": COLORS[loss], "label": NAMES[loss]}
        axes[0].plot(recorded["step"], smooth(recorded["loss"]), **look)
        axes[1].plot(recorded["step"], smooth(recorded["accuracy"]), **look)
        axes[2].plot(recorded["step"], smooth(recorded["angle"]), color=COLORS[loss], label=f"{NAMES[loss]}, own class")
        axes[2].plot(recorded["step"], smooth(recorded["hardest_angle"]), color=COLORS[loss], linestyle="--",
                     label=f"{NAMES[loss]}, hardest other class")  # fmt: skip
        axes[2].plot(recorded["step"], np.degrees(recorded["margin"]), color=COLORS[loss], linestyle=":", linewidth=1)
    for axis in axes:
        axis.legend(fontsize=8)
    write(figure, path)


def roc(path: Path, verifications: dict[str, Verification]) -> None:
    figure, (curve, histogram) = plt.subplots(1, 2, figsize=(13, 4.2), layout="constrained")
    for loss, verification in verifications.items():
        at = np.geomspace(1e-6, 1.0, 400)
        at = at[at >= 1.0 / len(verification.impostor)]
        curve.plot(at, [verification.at(far) for far in at], color=COLORS[loss], label=NAMES[loss])
    for far in FALSE_ACCEPTS:
        curve.axvline(far, color="black", linestyle=":", linewidth=1)
    curve.set(xscale="log", xlabel="FAR: impostor pairs accepted", ylabel="TAR: genuine pairs accepted", ylim=(0, 1.01))
    curve.set_title("verification of unseen characters across font weights")
    curve.legend(loc="lower right")
    curve.grid(alpha=0.3)
    trained = [loss for loss in verifications if loss != "untrained"]
    for loss in trained:
        spread(histogram, verifications[loss], loss)
    histogram.set(title="cosine of genuine (filled) and impostor pairs (line)", xlabel="cosine", yticks=[])
    histogram.legend()
    write(figure, path)


def spread(axis: Axes, verification: Verification, loss: str) -> None:
    bins = np.linspace(-1, 1, 161)
    axis.hist(verification.genuine, bins, density=True, color=COLORS[loss], alpha=0.35, label=NAMES[loss])
    axis.hist(verification.impostor, bins, density=True, color=COLORS[loss], histtype="step")


def neighbours(path: Path, glyphs: Glyphs, rows: np.ndarray, found: dict[str, Tensor], gallery: int, seed: int) -> None:
    """Distorted pictures of unseen characters, and what each network takes for the most similar gallery glyphs.

    `found` holds [V, P, k] numbers of characters for each network. A green frame is the right character.
    """
    shown = np.random.default_rng(seed).choice(len(rows), min(12, len(rows)), replace=False)
    probes = np.resize([view for view in range(len(glyphs.weights)) if view != gallery], len(shown))
    cell, count = 2 * SIZE + 8, next(iter(found.values())).shape[-1]
    sheet = Image.new("RGB", (cell * (1 + len(found) * count) + 24 * len(found), cell * len(shown) + 24), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(str(font_path(glyphs.weights[gallery])), 16)

    def place(picture: np.ndarray, x: int, y: int, frame: str | None = None) -> None:  # 0 .. 255, ink is high
        side = 2 * SIZE
        sheet.paste(Image.fromarray(255 - picture).resize((side, side)), (x, y))
        if frame is not None:
            draw.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline=frame, width=3)

    draw.text((4, 0), "probe", "black", font)
    for line, (character, view) in enumerate(zip(shown.tolist(), probes.tolist(), strict=True)):
        y = 28 + line * cell
        place(distorted(glyphs, rows, character, view), 4, y)
        for block, (loss, neighbour) in enumerate(found.items()):
            left = 4 + cell + 24 + block * (count * cell + 24)
            draw.text((left, 0), NAMES[loss], "black", font)
            for rank, other in enumerate(neighbour[view, character].tolist()):
                frame = "limegreen" if other == character else "tomato"
                place(glyphs.images[rows[other], gallery], left + rank * cell, y, frame)
    sheet.quantize(32).save(path, optimize=True)


def distorted(glyphs: Glyphs, rows: np.ndarray, character: int, view: int) -> np.ndarray:  # [SIZE, SIZE] uint8
    """The picture that the evaluation used."""
    first = character - character % BATCH
    return ink(evaluation_pictures(glyphs, rows, view, first)[character - first, 0])


def ink(picture: Tensor) -> np.ndarray:
    return (255 * picture.clamp(0.0, 1.0)).byte().numpy()


def augmented(path: Path, glyphs: Glyphs, rows: np.ndarray) -> None:
    """A few characters in every weight, as a training step sees them."""
    lines = []
    for view in range(len(glyphs.weights)):
        pictures = augment(torch.from_numpy(glyphs.images[rows[:16], view]), generator(0, view))
        lines.append(torch.cat(list(pictures[:, 0]), dim=1))
    sheet = Image.fromarray(255 - ink(torch.cat(lines)))
    sheet.resize((2 * sheet.width, 2 * sheet.height)).quantize(16).save(path, optimize=True)


def write(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=90)
    plt.close(figure)
