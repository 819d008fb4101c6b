"""How fast this machine does each kind of work, measured at the shapes of one chunk."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from perf.clock import seconds
from perf.problem import Problem
from tritonmargin.walk import chunk_classes

LARGE = 1 << 28  # bytes of a buffer that no cache holds


def measure(p: Problem, budget_s: float = 0.3, large: int = LARGE) -> dict[str, float]:
    """Units per second of every key of `counts.RATES`."""
    chunk = chunk_classes(p.n, p.d, p.classes, 0)
    make: dict[str, Any] = dict(dtype=p.torch_dtype, device=p.device)
    x, rows = torch.randn(p.n, p.d, **make), torch.randn(chunk, p.d, **make)
    tile, source = torch.zeros(chunk, p.n, **make), torch.randn(chunk, p.n, **make)
    wide, other = (torch.randn(chunk, p.d, device=p.device) for _ in range(2))
    grad_x, product = torch.zeros_like(x), torch.empty_like(rows)
    norms = torch.rand(chunk, 1, device=p.device)
    narrow = torch.empty(chunk, p.d, dtype=torch.bfloat16 if p.itemsize == 4 else p.torch_dtype, device=p.device)
    flops = 2 * p.n * p.d * chunk

    classes = max(min(p.classes, large // (4 * p.n)), 1)
    weight = torch.randn(classes, p.d, **make)
    out = torch.empty(p.n, classes, **make)
    memory = torch.ones(large // 4, device=p.device)

    work: dict[str, tuple[float, Callable[[], object]]] = {
        "logits product": (flops, lambda: torch.mm(rows, x.t(), out=tile)),
        "dX product": (flops, lambda: grad_x.addmm_(source.t(), rows)),
        "dW product": (flops, lambda: torch.mm(source, x, out=product)),
        "full product": (2 * p.n * p.d * classes, lambda: torch.mm(x, weight.t(), out=out)),
        "exp": (chunk * p.n, lambda: torch.exp2(source, out=tile)),
        "sum": (chunk * p.n, lambda: source.sum(dim=0, dtype=torch.float32)),
        "row pass": (chunk * p.d, lambda: torch.mul(wide, norms, out=other)),
        "row cast": (chunk * p.d, lambda: narrow.copy_(wide)),
        "read": (memory.nbytes, memory.sum),
        "write fresh": (memory.nbytes, lambda: torch.empty_like(memory).fill_(1.0)),
    }
    return {name: amount / typical(call, p.device, budget_s) for name, (amount, call) in work.items()}


def typical(call: Callable[[], object], device: str, budget_s: float) -> float:
    """Median seconds of a call repeated for about `budget_s`, at least five times."""
    call()
    taken: list[float] = []
    while len(taken) < 5 or (sum(taken) < budget_s and len(taken) < 1000):
        taken.append(seconds(call, device)[0])
    return statistics.median(taken)
