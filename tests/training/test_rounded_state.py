"""Stochastic rounding is of the optimiser's bfloat16 state as of the weight."""

from __future__ import annotations

import torch
from cases import cpu_only

import tritonmargin as tm


@cpu_only
def test_the_momentum_is_rounded_by_chance_too() -> None:
    weight = torch.nn.Parameter(torch.ones(2000, 1))
    optimizer = tm.optim.RowSGD(
        [weight], lr=0.1, momentum=0.9, state_dtype=torch.bfloat16, stochastic_rounding=True, seed=1
    )
    between = 1.0 + 2.0**-9  # a quarter of the way between two numbers of bfloat16
    weight.grad = torch.full_like(weight, between)
    optimizer.step()
    momentum = optimizer.state[weight]["momentum_buffer"].float()
    assert momentum.unique().tolist() == [1.0, 1.0 + 2.0**-7]
    assert 0.2 < (momentum > 1.0).float().mean().item() < 0.3
