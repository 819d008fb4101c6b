"""Which classes a step walks."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonmargin.checks import check_integers


def sample_classes(
    target: Tensor, num_classes: int, num_samples: int, generator: torch.Generator | None = None
) -> Tensor:
    """A sorted, unique int64 tensor of class numbers: every class in `target`, filled up with random others.

    Partial FC (An et al., 2021): the positives always, negatives uniformly without replacement, so that a step costs
    `num_samples` classes instead of C. Labels outside [0, num_classes), such as an ignore_index, are left out.
    The result has max(num_samples, number of distinct positives) classes. O(num_classes) memory.

    Args:
        target: [N] integer class numbers.
        num_classes: C.
        num_samples: how many classes to walk, 0 <= num_samples <= num_classes.
        generator: on the device of `target`, for reproducible draws.

    Raises:
        ValueError: num_samples or num_classes out of range, target not one-dimensional.
        TypeError: labels that are not integers.
    """
    check_integers("target", target)
    if target.ndim != 1:
        raise ValueError(f"target must have shape [N], got {tuple(target.shape)}")
    for name, number, lowest in (("num_classes", num_classes, 1), ("num_samples", num_samples, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < lowest:
            raise ValueError(f"{name} must be an integer >= {lowest}, got {number!r}")
    if num_samples > num_classes:
        raise ValueError(f"num_samples must be <= num_classes = {num_classes}, got {num_samples}")
    positives = target[(target >= 0) & (target < num_classes)].long().unique()
    if len(positives) >= num_samples:
        return positives
    # Positives are given a key above every random one; the largest num_samples keys win.
    key = torch.rand(num_classes, generator=generator, device=target.device)
    key[positives] = 2.0
    return key.topk(num_samples).indices.sort().values
