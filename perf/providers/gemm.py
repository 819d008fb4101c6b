"""The yardstick: one N x D x C product into a buffer that exists."""

from __future__ import annotations

import torch
from torch import Tensor

from perf.problem import Problem, Tensors
from perf.providers.base import Provider

CLASSES = 1 << 17  # at a time: the buffer is larger than any cache and still not N x C


class Gemm(Provider):
    name, title = "gemm", "one N x D x C GEMM"
    modes = ("no-grad",)

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        super().prepare(problem, tensors)
        shape = problem.n, min(problem.classes, CLASSES)
        self.out = torch.zeros(shape, dtype=problem.torch_dtype, device=problem.device)  # written, so it is there

    def forward(self) -> Tensor:
        for rows in self.weight.detach().split(CLASSES):
            torch.mm(self.x, rows.t(), out=self.out[:, : len(rows)])
        return self.out


PROVIDERS = (Gemm,)
