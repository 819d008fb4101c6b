"""Row optimisers beside those of torch, and gradients for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import made
from torch import Tensor

from tritonmargin.optim import RowAdamW, RowSGD

C, D = 40, 6

OPTIMISERS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "sgd": (RowSGD, torch.optim.SGD, {"lr": 0.5}),
    "momentum": (RowSGD, torch.optim.SGD, {"lr": 0.5, "momentum": 0.75}),
    "decay": (RowSGD, torch.optim.SGD, {"lr": 0.5, "momentum": 0.75, "weight_decay": 0.125}),
    "nesterov": (RowSGD, torch.optim.SGD, {"lr": 0.5, "momentum": 0.75, "weight_decay": 0.125, "nesterov": True}),
    "adamw": (RowAdamW, torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
}
every_optimiser = pytest.mark.parametrize("kind", OPTIMISERS)


def sparse(ids: Tensor, values: Tensor, size: int = C) -> Tensor:
    return torch.sparse_coo_tensor(ids[None], values, (size, *values.shape[1:]), is_coalesced=True)


def gradients(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return made(C, D, seed=100 + step).to(dtype)
