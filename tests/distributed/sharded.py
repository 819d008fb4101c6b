"""A problem, the head of one process and that of this rank, and how close their results have to be."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from cases import labels, made
from torch import Tensor

import tritonmargin as tm

D = 7


def mine(sizes: list[int]) -> slice:
    start = sum(sizes[: dist.get_rank()])
    return slice(start, start + sizes[dist.get_rank()])


def problem(c: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return made(n, D, seed=seed + 1).to(dtype), made(c, D, seed=seed + 2).to(dtype), labels(c, n, seed)


def heads(c: int, w: Tensor, **options: Any) -> tuple[tm.MarginSoftmaxLoss, tm.MarginSoftmaxLoss]:
    """The head of one process and that of this rank, with the same weights."""
    one = tm.MarginSoftmaxLoss(D, c, dtype=w.dtype, **options)
    with torch.no_grad():
        one.weight.copy_(w)
        if one.bias is not None:
            one.bias.copy_(torch.linspace(-1.0, 1.0, c))
    sharded = tm.MarginSoftmaxLoss(D, c, dtype=w.dtype, process_group=dist.group.WORLD, **options)
    sharded.load_state_dict(one.state_dict())
    return one, sharded


def close(found: Tensor, expected: Tensor, rtol: float, what: object) -> None:
    assert found.shape == expected.shape, what
    size = float(expected.abs().nan_to_num(posinf=0.0).max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        found, expected, rtol=rtol, atol=rtol * size, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )
