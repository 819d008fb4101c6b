"""Embeddings of two numbers, as seven losses place them: the plane with its decision regions, and the circle."""

from __future__ import annotations

import math
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import tritonmargin as tm
from examples.figures.training import Pictures, Trained, embed, train

# Ten directions on a circle are 0.63 apart: margins of high dimensions would ask for more room than there is.
S = 16.0


def losses(steps: int) -> dict[str, Callable[[], tm.Margin]]:
    """Fresh margins, with their schedules."""
    half = steps // 2

    def lowered(margin: type[tm.LSoftmax]) -> tm.Margin:
        return margin(m=2, lam=100.0).with_schedule(lam=tm.Annealing(100.0, 1.0, half / 50, 0.5))

    return {
        "softmax": tm.Softmax,
        "L2-constrained": lambda: tm.L2Softmax(s=S),
        "NormFace": lambda: tm.NormFace(s=S),
        "L-Softmax, m=2": lambda: lowered(tm.LSoftmax),
        "A-Softmax, m=2": lambda: lowered(tm.ASoftmax),
        "CosFace, m=0.1": lambda: tm.CosFace(m=0.1, s=S),
        "ArcFace, m=0.2": lambda: tm.ArcFace(m=0.0, s=S).with_schedule(m=tm.WarmUp(0.0, 0.2, half)),
    }


def draw(pictures: Pictures, steps: int) -> tuple[Figure, dict[str, dict[str, float]]]:
    """A column a loss: plane above, circle below; and what was measured of each."""
    made = losses(steps)
    figure, axes = plt.subplots(2, len(made), figsize=(3.0 * len(made), 6.4), layout="constrained")
    numbers = {}
    for (name, margin), above, below in zip(made.items(), axes[0], axes[1], strict=True):
        trained = train(pictures, margin(), steps)
        x, labels = embed(trained, pictures)
        numbers[name] = measured(trained, x, labels)
        plane(above, trained, x, labels)
        circle(below, trained, x, labels)
        above.set_title(name)
        below.set_xlabel(
            f"accuracy {numbers[name]['accuracy']:.1%}\nangle to the own class {numbers[name]['own angle']:.1f}°",
            fontsize=9,
        )
    return figure, numbers


def logits(trained: Trained, x: Tensor) -> Tensor:
    """What decides: raw products or cosines, as the loss has them; no margin."""
    w = trained.head.weight.detach()
    margin = trained.head.margin
    x = x / x.norm(dim=1, keepdim=True) if margin.unit_embeddings else x
    return x @ (w / w.norm(dim=1, keepdim=True) if margin.unit_weight else w).t()


def measured(trained: Trained, x: Tensor, labels: Tensor) -> dict[str, float]:
    w = trained.head.weight.detach()
    cos = torch.nn.functional.cosine_similarity(x, w[labels], dim=1).clamp(-1.0, 1.0)
    between = torch.nn.functional.normalize(w) @ torch.nn.functional.normalize(w).t()
    nearest = (between - 2.0 * torch.eye(len(w))).amax(dim=1).clamp(-1.0, 1.0)
    return {
        "accuracy": float((logits(trained, x).argmax(dim=1) == labels).float().mean()),
        "own angle": math.degrees(float(torch.acos(cos).mean())),
        "nearest class": math.degrees(float(torch.acos(nearest).min())),
        "loss": float(np.mean(trained.losses[-20:])),
    }


COLORS = plt.get_cmap("tab10")


def plane(axis: plt.Axes, trained: Trained, x: Tensor, labels: Tensor) -> None:
    """Embeddings where they are, over the regions in which each class wins, with the class rows as lines."""
    reach = float(x.abs().quantile(0.995)) * 1.1
    ticks = torch.linspace(-reach, reach, 300)
    grid = torch.cartesian_prod(ticks, ticks)
    winner = logits(trained, grid).argmax(dim=1).reshape(300, 300).t()
    axis.imshow(winner, extent=(-reach, reach, -reach, reach), origin="lower", cmap="tab10", vmin=0, vmax=9, alpha=0.18)
    axis.contour(ticks, ticks, winner, levels=np.arange(0.5, 9.5), colors="black", linewidths=0.3)
    axis.scatter(*x.t(), c=labels, cmap="tab10", vmin=0, vmax=9, s=3, linewidths=0)
    directions = torch.nn.functional.normalize(trained.head.weight.detach()) * reach
    for label, (a, b) in enumerate(directions):
        axis.plot([0, float(a)], [0, float(b)], color=COLORS(label), lw=1)
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axis.tick_params(labelsize=7)


def circle(axis: plt.Axes, trained: Trained, x: Tensor, labels: Tensor) -> None:
    """Directions alone: embeddings on the circle, class rows as arrows, boundaries where the winner changes."""
    angle = torch.atan2(x[:, 1], x[:, 0])
    # A little inwards at random, so that many on one place show as many.
    radius = 1.0 - 0.12 * torch.rand(len(x), generator=torch.Generator().manual_seed(0))
    axis.scatter(radius * angle.cos(), radius * angle.sin(), c=labels, cmap="tab10", vmin=0, vmax=9, s=3, linewidths=0)
    for label, (a, b) in enumerate(torch.nn.functional.normalize(trained.head.weight.detach())):
        axis.annotate(
            "", (float(a) * 0.82, float(b) * 0.82), (0, 0), arrowprops={"arrowstyle": "->", "color": COLORS(label)}
        )
    around = torch.linspace(-math.pi, math.pi, 7200)
    winner = logits(trained, float(x.norm(dim=1).median()) * torch.stack([around.cos(), around.sin()], dim=1)).argmax(
        dim=1
    )
    for place in (winner[1:] != winner[:-1]).nonzero().squeeze(1):
        a = float(around[place])
        axis.plot(
            [0.86 * math.cos(a), 1.08 * math.cos(a)], [0.86 * math.sin(a), 1.08 * math.sin(a)], color="black", lw=0.8
        )
    axis.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal", xticks=[], yticks=[])
