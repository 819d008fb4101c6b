"""A class row that is nan on one rank: all ranks hear the same."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from cases import cpu_only, made
from ranks import on_ranks
from sharded import D

import tritonmargin as tm

C = 12


def hardest(rank_of_nan: int) -> list[float]:
    torch.manual_seed(0)
    head = tm.MarginSoftmaxLoss(D, C, process_group=dist.group.WORLD, dtype=torch.float64, objective="max-hinge")
    with torch.no_grad():
        if dist.get_rank() == rank_of_nan:
            head.weight[3] = torch.nan
        loss, stats = head(made(2, D, seed=1), torch.tensor([0, 7]), return_stats=True)
    return [loss.item(), *stats.hardest_logit.tolist()]


@cpu_only
def test_the_hardest_logit_is_nan_on_all_ranks() -> None:
    for rank in (0, 1):
        for found in on_ranks(2, hardest, rank):
            assert all(map(math.isnan, found)), found
