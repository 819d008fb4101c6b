"""The target's logit over the angle, every margin and every branch, and its slope: what pulls a sample in."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

import tritonmargin as tm
from tritonmargin.margins.angular import BEYOND_PI

PANELS: dict[str, dict[str, tm.Margin]] = {
    "additive": {
        "no margin": tm.NormFace(),
        "CosFace m=0.35": tm.CosFace(m=0.35),
        "ArcFace m=0.5": tm.ArcFace(m=0.5),
        "combined (1, 0.3, 0.2)": tm.CombinedMargin(1.0, 0.3, 0.2),
        "combined (1.35, 0, 0)": tm.CombinedMargin(1.35, 0.0, 0.0),
    },
    "ArcFace m=0.8 beyond theta + m = pi": {name: tm.ArcFace(m=0.8, beyond_pi=name) for name in BEYOND_PI},
    "multiplicative": {
        "no margin": tm.NormFace(),
        **{f"psi, m={m} (L-Softmax, A-Softmax)": tm.ASoftmax(m=m) for m in (2, 3, 4)},
        "m=4, lam=5": tm.ASoftmax(m=4, lam=5.0),
        "SphereFace-R m=1.7": tm.SphereFaceR(m=1.7),
    },
    "the gradient's two meanings": {
        "ArcFace exact": tm.ArcFace(m=0.5),
        "ArcFace straight-through": tm.ArcFace(m=0.5, gradient="straight-through"),
        "SphereFace-R exact": tm.SphereFaceR(m=1.7),
        "SphereFace-R straight-through": tm.SphereFaceR(m=1.7, gradient="straight-through"),
    },
}


def curve(margin: tm.Margin, theta: Tensor) -> tuple[Tensor, Tensor]:
    """t / scale over theta, and its derivative by cos theta, as training sees them."""
    cos = theta.cos().requires_grad_()
    one = torch.ones_like(cos)
    # Unit rows and a scale of one: what is left of every margin is its function of the cosine.
    rows = tm.TargetRows(cos, one, one, one, torch.zeros(len(cos), dtype=torch.int64))
    value = margin.target_logit(rows)
    (slope,) = torch.autograd.grad(value.sum(), cos)
    return value.detach(), slope


def draw(points: int = 2001) -> Figure:
    theta = torch.linspace(0.0, math.pi, points, dtype=torch.float64)
    figure, axes = plt.subplots(2, len(PANELS), figsize=(4.2 * len(PANELS), 7), layout="constrained", sharex=True)
    for (title, margins), above, below in zip(PANELS.items(), axes[0], axes[1], strict=True):
        for place, (name, margin) in enumerate(margins.items()):
            value, slope = curve(margin, theta)
            style = {"lw": 1.4, "ls": ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))[place % 6]}
            above.plot(theta, value, label=name, **style)
            below.plot(theta, slope, label=name, **style)
        above.set_title(title)
        above.legend(fontsize=8)
        below.set(xlabel="theta", ylim=(-6, 18) if title == "multiplicative" else (-1.5, 4))
        below.set_xticks([0, math.pi / 4, math.pi / 2, 3 * math.pi / 4, math.pi], ["0", "π/4", "π/2", "3π/4", "π"])
        for axis in (above, below):
            axis.grid(alpha=0.3)
            axis.axhline(0.0, color="gray", lw=0.6)
    axes[0][0].set_ylabel("target's logit / scale")
    axes[1][0].set_ylabel("its slope by cos theta")
    return figure
