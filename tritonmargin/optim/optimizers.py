"""`RowSGD` and `RowAdamW`: their numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tritonmargin.arguments import check_flag, check_number
from tritonmargin.optim.row_optimizer import RowOptimizer

AT_LEAST_ZERO = "a finite number >= 0"


class RowSGD(RowOptimizer):
    """`torch.optim.SGD` for gradients of some rows.

        g = dL/dw + weight_decay w;  buffer = momentum buffer + g;  w -= lr buffer

    and w -= lr (g + momentum buffer) with nesterov. State: one matrix like the weight, if momentum is not 0.

    Args:
        params: matrices [C, D] (vectors count as rows of one number).
        lr: learning rate.
        momentum, weight_decay, nesterov: as in `torch.optim.SGD`.
        unsampled: what becomes of rows that a sparse gradient does not name. "frozen": nothing, momentum and weight
            decay wait until the row is sampled again. "decay": what dense training does with a gradient of 0, at the
            cost of a pass over all rows.
        state_dtype: of the momentum; default: float32 (float64 for float64 weights).
        stochastic_rounding: bfloat16 weights and state are rounded up or down by chance, right on average, so that
            small updates are not lost.
        seed: of that chance.

    Raises:
        ValueError, TypeError: a number out of range, an unknown name, parameters that are none.
    """

    state_names = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        unsampled: str = "frozen",
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, unsampled=unsampled,
                state_dtype=state_dtype, stochastic_rounding=stochastic_rounding, seed=seed,
            ),
        )  # fmt: skip

    def check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            check_number(name, group[name], AT_LEAST_ZERO, 0.0)
        check_flag("nesterov", group["nesterov"])
        if group["nesterov"] and not group["momentum"]:
            raise ValueError("nesterov needs a momentum > 0")

    def rule(self, group: dict[str, Any]) -> tuple[str, tuple[float, ...], int]:
        numbers = (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"])
        return "sgd", tuple(map(float, numbers)), int(group["momentum"] != 0)


class RowAdamW(RowOptimizer):
    """`torch.optim.AdamW` for gradients of some rows, each row with its own step count for the bias correction.

    State: two matrices like the weight and an int32 per row.

    Args:
        params: matrices [C, D] (vectors count as rows of one number).
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        unsampled, state_dtype, stochastic_rounding, seed: as in `RowSGD`.

    Raises:
        ValueError, TypeError: a number out of range, an unknown name, parameters that are none.
    """

    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        unsampled: str = "frozen",
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, unsampled=unsampled,
                state_dtype=state_dtype, stochastic_rounding=stochastic_rounding, seed=seed,
            ),
        )  # fmt: skip

    def check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_number(name, group[name], AT_LEAST_ZERO, 0.0)
        betas = group["betas"]
        if not isinstance(betas, tuple | list):
            raise TypeError(f"betas must be two numbers in [0, 1), got {betas!r}")
        for beta in betas:
            check_number("betas", beta, "two numbers in [0, 1)", 0.0, 1.0)
        if len(betas) != 2 or 1.0 in betas:
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")

    def rule(self, group: dict[str, Any]) -> tuple[str, tuple[float, ...], int]:
        numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        return "adamw", tuple(map(float, numbers)), 2
