"""The yardstick: one N x D x C product into a buffer that exists."""

from __future__ import annotations

import torch
from torch import Tensor

from perf.problem import Problem, Tensors
from perf.providers.base import Provider


class Gemm(Provider):
    name, title, loss = "gemm", "one N x D x C GEMM", None
    modes = ("no-grad",)
    logits_copies = 1

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        super().prepare(problem, tensors)
        self.out = torch.empty(problem.n, problem.classes, dtype=problem.torch_dtype, device=problem.device)
        self.out.zero_()  # so that the pages are there

    def forward(self) -> Tensor:
        return torch.mm(self.x, self.weight.t(), out=self.out)


PROVIDERS = (Gemm,)
