"""A state of every kind of value, and whether two are the same."""

from __future__ import annotations

import torch
from ranks import matrix
from torch.distributed.tensor import DTensor


def state_of(c, seed, shard=None):
    """What a head and an optimizer put into a checkpoint; all numbers follow from the seed."""

    def rows(full):
        return full if shard is None else shard.as_dtensor(full[shard.start : shard.stop].clone())

    return {
        "head": {"weight": rows(matrix(c, seed)), "bias": rows(matrix(c, seed + 1)[:, 0].clone())},
        "optimizer": {
            "state": {
                0: {
                    "step": torch.tensor(seed),
                    "exp_avg": rows(matrix(c, seed + 2).bfloat16()),
                    "row_steps": rows(torch.arange(c, dtype=torch.int32) + seed),
                }
            },
            "param_groups": [
                {"lr": 0.1 * seed, "betas": (0.9, seed), "params": list(range(seed)), "dtype": torch.int8}
            ],
        },
        "random": torch.Generator().manual_seed(seed).get_state(),
        "schedule": {"names": {7: "seven"}, "last": [seed] * seed},
        "epoch": seed,
    }


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def assert_same(ours, expected):
    assert type(ours) is type(expected)
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == expected.dtype
        assert torch.equal(local(ours), local(expected))
    elif isinstance(ours, dict):
        assert list(ours) == list(expected)
        for key in ours:
            assert_same(ours[key], expected[key])
    else:
        assert ours == expected
