"""From the sum of hinges to softmax, one step at a time, and what each step does to the gradient as classes are added.

sum of hinges   sum_j relu(z_j - t)     every class that is too close pushes
max hinge       relu(max_j z_j - t)     the closest pushes
LSE hinge       relu(rest - t)          max made smooth: rest = logsumexp of the others
softmax         softplus(rest - t)      relu made smooth
"""

from __future__ import annotations

from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import tritonmargin as tm
from examples.figures.training import Pictures, train
from tritonmargin.objectives import OBJECTIVES

NAMES = {"hinge": "sum of hinges", "max-hinge": "max hinge", "lse-hinge": "LSE hinge", "softmax": "softmax"}
COLORS = {"hinge": "tab:red", "max-hinge": "tab:orange", "lse-hinge": "tab:blue", "softmax": "tab:green"}


class Growth(NamedTuple):
    """Of one objective over C."""

    classes: list[int]
    loss: list[float]
    dx: list[float]  # |dL/dx_i|, mean over the samples
    dw: list[float]  # |dL/dW|


def growth(objective: str, classes: tuple[int, ...], n: int = 64, d: int = 64, s: float = 16.0) -> Growth:
    """Loss and gradients of an untrained head: random embeddings against random classes."""
    found = Growth(list(classes), [], [], [])
    for c in classes:
        random = torch.Generator().manual_seed(0)
        x = torch.randn(n, d, generator=random).requires_grad_()
        w = torch.randn(c, d, generator=random).requires_grad_()
        target = torch.randint(c, (n,), generator=random)
        loss = tm.margin_cross_entropy(x, w, target, tm.NormFace(s=s), objective=objective, reduction="sum")
        assert isinstance(loss, torch.Tensor)
        dx, dw = torch.autograd.grad(loss, (x, w))
        found.loss.append(float(loss.detach()) / n)
        found.dx.append(float(dx.norm(dim=1).mean()))
        found.dw.append(float(dw.norm()) / n)
    return found


def steps_of_a_derivation() -> list[tuple[str, dict[str, tuple[np.ndarray, np.ndarray]]]]:
    """Curves: what the others come to over one of them, and the loss over what they exceed the own logit by."""
    z = torch.linspace(-4, 4, 401)
    fixed = torch.tensor([-1.0, 0.0, 1.0])
    everyone = torch.cat([z[:, None], fixed.expand(len(z), 3)], dim=1)
    others = {
        "sum of relu(z_j)": everyone.relu().sum(dim=1),
        "max z_j": everyone.amax(dim=1),
        "logsumexp z_j": everyone.logsumexp(dim=1),
    }
    loss = {"relu(rest - t)": z.relu(), "softplus(rest - t)": F.softplus(z)}
    number = z.numpy()
    return [
        ("four others, t = 0: one of them moves", {name: (number, y.numpy()) for name, y in others.items()}),
        ("from what they exceed t by to the loss", {name: (number, y.numpy()) for name, y in loss.items()}),
    ]


def draw(largest: int = 100_000) -> tuple[Figure, dict[str, Growth]]:
    classes = tuple(int(c) for c in np.unique(np.geomspace(10, largest, 9).round()))
    figure, axes = plt.subplots(1, 4, figsize=(17, 3.9), layout="constrained")
    for axis, (title, curves) in zip(axes, steps_of_a_derivation(), strict=False):
        for name, (x, y) in curves.items():
            axis.plot(x, y, label=name)
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)
    found = {objective: growth(objective, classes) for objective in OBJECTIVES}
    for objective, line in found.items():
        style = {"label": NAMES[objective], "color": COLORS[objective], "marker": "o", "ms": 3}
        axes[2].loglog(line.classes, line.loss, **style)
        axes[3].loglog(line.classes, line.dx, **style)
    axes[2].set_title("loss per sample, untrained, s = 16", fontsize=10)
    axes[3].set_title("|dL/dx| per sample: the sum of hinges explodes", fontsize=10)
    for axis in axes:
        axis.grid(alpha=0.3)
    for axis in axes[2:]:
        axis.set_xlabel("classes C")
        axis.legend(fontsize=8)
    return figure, found


def convergence(pictures: Pictures, steps: int) -> tuple[Figure, dict[str, float]]:
    """The same network, data and learning rate with each objective; the CosFace margin belongs to all of them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9), layout="constrained")
    last = {}
    for objective in OBJECTIVES:
        trained = train(pictures, tm.CosFace(m=0.2, s=16.0), steps, width=32, objective=objective)
        style = {"label": NAMES[objective], "color": COLORS[objective], "lw": 1.2}
        left.plot(smooth(trained.accuracies), **style)
        right.semilogy(smooth(trained.gradients), **style)
        last[objective] = float(np.mean(trained.accuracies[-max(steps // 10, 1) :]))
    left.set(xlabel="step", title=f"accuracy of the batches, {pictures.classes} glyphs, CosFace m = 0.2")
    right.set(xlabel="step", title="gradient norm of the network, before clipping at 5")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure, last


def smooth(values: list[float]) -> np.ndarray:
    """Means over a twentieth of the steps."""
    width = max(len(values) // 20, 1)
    return np.convolve(values, np.ones(width) / width, mode="valid")
