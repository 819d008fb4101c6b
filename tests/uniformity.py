"""How far many samples of classes are from uniform ones, in standard deviations.

A sum of squares over what the samples counted: its mean and variance are known for independent samples, each uniform
among the sets of S of C classes. v is a sample's vector (one number a class, or a pair of classes) less its mean; |v|^2
is the same for every sample, so the sum of K of them has E |sum v|^2 = K |v|^2 and variance 2 K (K - 1) tr(Cov(v)^2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def indicators(samples: list[Tensor], classes: int) -> Tensor:  # K of [S] -> [K, C]
    """1 where a class is in a sample."""
    found = torch.zeros(len(samples), classes)
    return found.scatter_(1, torch.stack(samples), 1.0)


def of_classes(inside: Tensor) -> float:
    """Of the counts of single classes."""
    k, c = inside.shape
    s = int(inside[0].sum())
    p = s / c
    count = inside.double().sum(dim=0) - k * p
    return standard(float(count.square().sum()), k, s * (1 - p), trace_of_classes(c, p))


def of_pairs(inside: Tensor) -> float:
    """Of the counts of pairs of classes."""
    k, c = inside.shape
    s = int(inside[0].sum())
    two, three, four = (math.prod((s - i) / (c - i) for i in range(size)) for size in (2, 3, 4))
    pairs = c * (c - 1) // 2
    count = (inside.T @ inside).double().fill_diagonal_(0.0)
    total = float((count - k * two).fill_diagonal_(0.0).square().sum()) / 2
    # Of a pair with itself, with those that share a class, with those that share none.
    trace = pairs * (
        (two - two**2) ** 2 + 2 * (c - 2) * (three - two**2) ** 2 + (c - 2) * (c - 3) / 2 * (four - two**2) ** 2
    )
    return standard(total, k, pairs * two * (1 - two), trace)


def of_neighbours(inside: Tensor, after: Tensor) -> float:
    """Of the counts of a class in one sample and a class in the one that belongs to it."""
    k, c = inside.shape
    p, q = float(inside[0].mean()), float(after[0].mean())
    count = ((inside - p).T @ (after - q)).double()
    total, square = float(count.square().sum()), c**2 * p * (1 - p) * q * (1 - q)
    return standard(total, k, square, trace_of_classes(c, p) * trace_of_classes(c, q))


def trace_of_classes(c: int, p: float) -> float:
    return (p * (1 - p) * c) ** 2 / (c - 1)


def standard(total: float, k: int, square: float, trace: float) -> float:
    return (total - k * square) / math.sqrt(2 * k * (k - 1) * trace)
