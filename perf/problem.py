"""One size to measure at, and its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tritonmargin as tm

SCALE = 64.0
SAMPLE_RATE = 0.1
MOMENTUM = 0.9

# What is computed. Providers of one loss agree in its value and its gradients.
LOSSES = ("arcface", "cosface", "arcface-straight-through", "softmax")


def margin_of(loss: str) -> tm.Margin:
    """The margin of a loss, with the numbers of the face recipes."""
    if loss == "arcface":
        return tm.ArcFace(m=0.5, s=SCALE)
    if loss == "arcface-straight-through":  # what insightface's current code trains
        return tm.ArcFace(m=0.5, s=SCALE, beyond_pi="raw", gradient="straight-through")
    if loss == "cosface":
        return tm.CosFace(m=0.4, s=SCALE)
    if loss == "softmax":
        return tm.Softmax()
    raise ValueError(f"loss is one of {', '.join(LOSSES)}, got {loss!r}")


class Tensors(NamedTuple):
    x: Tensor  # [N, D]
    weight: Tensor  # [C, D]
    target: Tensor  # [N]
    momentum: Tensor | None = None  # [C, D] of the weight's dtype, for a step with an optimiser; any content
    files: tuple[str, ...] = ()  # of weight and momentum, for the processes of a provider that has several


@dataclass(frozen=True)
class Problem:
    """N samples against C classes of width D."""

    n: int
    d: int
    classes: int
    dtype: str = "float32"
    device: str = "cpu"
    loss: str = "arcface"

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"unknown dtype {self.dtype!r}, e.g. float32 or bfloat16")
        return dtype

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    @property
    def flops(self) -> int:
        """Of one N x D x C GEMM."""
        return 2 * self.n * self.d * self.classes

    @property
    def weight_bytes(self) -> int:
        return self.classes * self.d * self.itemsize

    @property
    def title(self) -> str:
        return f"{self.loss}, {self.dtype}, N={self.n}, D={self.d}, C={self.classes:,}"

    def tensors(self, seed: int = 0, weight: Tensor | None = None, momentum: Tensor | None = None) -> Tensors:
        """Random leaves, the weight as a head starts it: N(0, 0.01); or the one given, as it is."""
        random = torch.Generator(self.device).manual_seed(seed)
        made: dict[str, Any] = dict(generator=random, dtype=self.torch_dtype, device=self.device)
        x = torch.randn(self.n, self.d, **made)
        target = torch.randint(self.classes, (self.n,), generator=random, device=self.device)
        if weight is None:
            # In place from the start: a temporary copy of W would show up as memory in use.
            weight = torch.empty(self.classes, self.d, dtype=self.torch_dtype, device=self.device)
            fill(weight, seed, self.device)
        return Tensors(x.requires_grad_(), weight.requires_grad_(), target, momentum)


def fill(weight: Tensor, seed: int = 0, device: str = "cpu") -> None:
    """N(0, 0.01), whatever the content was."""
    weight.normal_(std=0.01, generator=torch.Generator(device).manual_seed(seed + 1))


def cosine_of_margin(loss: str) -> tuple[float, float, float]:
    """cos m, sin m and m, for code that writes its formula out; nan where the loss has no such number."""
    if loss == "softmax":
        return math.nan, math.nan, math.nan
    margin = margin_of(loss)
    if isinstance(margin, tm.ArcFace):
        m = float(margin.m)
        return math.cos(m), math.sin(m), m
    return math.nan, math.nan, float(margin.m)  # type: ignore[attr-defined]
