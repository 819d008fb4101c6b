"""What a competitor has to say for itself."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import nullcontext

import torch
from torch import Tensor

from perf.problem import Problem, Tensors

# What is timed. "forward" records for a backward that does not come; "frozen" is forward and backward without dW.
MODES = ("forward", "no-grad", "forward+backward", "frozen W")


class Provider(ABC):
    """One implementation. `prepare` once, then `run` any mode any number of times, `reset` after each."""

    name: str  # in CSVs and on the command line
    title: str  # in tables
    loss: str | None = "arcface"  # rows of the same loss must agree in its value; None: no loss
    peer: str = "ours"  # the row of ours that it is compared with
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    modes: tuple[str, ...] = MODES
    logits_copies: int = 0  # N x C float32 arrays that it holds at its peak, to skip what would not fit

    def supports(self, problem: Problem) -> str | None:
        """Why not, or None if it can run."""
        if problem.dtype not in self.dtypes:
            return f"no {problem.dtype}"
        needed = self.logits_copies * problem.n * problem.classes * 4 + 3 * problem.weight_bytes
        free = available_bytes(problem.device)
        if needed > free:
            return f"needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
        return None

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        """Make what does not belong to a step."""
        self.problem = problem
        self.x, self.weight, self.target = tensors.x, tensors.weight, tensors.target

    @abstractmethod
    def forward(self) -> Tensor:
        """The loss."""

    def forward_backward(self) -> Tensor:
        loss = self.forward()
        loss.backward()
        return loss.detach()

    def run(self, mode: str) -> Tensor:
        """One step as `mode` says; the loss."""
        with torch.no_grad() if mode == "no-grad" else nullcontext():
            return self.forward_backward() if mode in ("forward+backward", "frozen W") else self.forward()

    def reset(self, mode: str) -> None:
        """Before a step and not part of it: no gradients, and the weight frozen or not."""
        self.x.grad = self.weight.grad = None
        self.weight.requires_grad_(mode != "frozen W")


def available_bytes(device: str) -> int:
    """Memory that can still be had."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    except (OSError, StopIteration):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        except (OSError, ValueError, AttributeError):
            return 8 << 30
