"""One size to measure at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The margin that every ArcFace row computes.
MARGIN, SCALE = 0.5, 64.0


@dataclass(frozen=True)
class Tensors:
    x: Tensor  # [N, D]
    weight: Tensor  # [C, D]
    target: Tensor  # [N]


@dataclass(frozen=True)
class Problem:
    """N samples against C classes of width D."""

    n: int
    d: int
    classes: int
    dtype: str = "float32"
    device: str = "cpu"

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
        return f"{self.dtype}, N={self.n}, D={self.d}, C={self.classes:,}"

    def tensors(self, seed: int = 0) -> Tensors:
        """Random leaves, the weight as a head starts it: N(0, 0.01)."""
        random = torch.Generator(self.device).manual_seed(seed)
        made: dict[str, Any] = dict(generator=random, dtype=self.torch_dtype, device=self.device)
        # In place from the start: a temporary copy of W would show up as memory in use.
        weight = torch.empty(self.classes, self.d, dtype=self.torch_dtype, device=self.device)
        weight.normal_(std=0.01, generator=random)
        x = torch.randn(self.n, self.d, **made)
        target = torch.randint(self.classes, (self.n,), generator=random, device=self.device)
        return Tensors(x.requires_grad_(), weight.requires_grad_(), target)
