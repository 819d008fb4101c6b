"""A sample of the classes on a GPU: `sampling.draw_by_torch` in three kernels, three sorts and a running sum.

    candidates_kernel   the classes of the lowest ranks
    ranks_kernel        the labels' ranks: which of them are candidates, and which are missing
    replace_kernel      a missing label replaces the last candidate that is no label

The permutation is that of permutation.py, number for number. Its rounds have no tables here: to compute is cheaper than
to load. No size depends on data, and nothing waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonmargin import permutation
from tritonmargin.backends.triton.launch import blocks, call

GOLDEN, LAST_SHIFT = tl.constexpr(permutation.GOLDEN), tl.constexpr(permutation.LAST_SHIFT)
(SHIFT_1, FACTOR_1), (SHIFT_2, FACTOR_2) = (map(tl.constexpr, pair) for pair in permutation.MIX)
OF_SEED, OF_STEP = tl.constexpr(permutation.OF_SEED), tl.constexpr(permutation.OF_STEP)
OF_FIRST = tl.constexpr(permutation.OF_FIRST)
RANDOM_BITS = tl.constexpr(permutation.RANDOM_BITS)

CANDIDATES, LABELS = 512, 128  # of a program


def draw_by_triton(target: Tensor, state: Tensor, first_class: int, num_classes: int, num_samples: int) -> Tensor:
    ids = target.new_empty(num_samples)
    a, b = permutation.sides(num_classes)
    rounds = permutation.rounds_of(num_classes)
    numbers = (num_samples, first_class, num_classes, a, b)
    if num_samples:
        call(candidates_kernel, blocks(num_samples, CANDIDATES), state, ids, *numbers, ROUNDS=rounds, BLOCK=CANDIDATES)
    if n := len(target):
        programs, label = blocks(n, LABELS), target.sort().values
        hits, missing = torch.empty_like(label), torch.empty_like(label, dtype=torch.int32)
        call(ranks_kernel, programs, state, label, hits, missing, n, *numbers, ROUNDS=rounds, BLOCK=LABELS)
        hits, missing = hits.sort(descending=True).values, missing.cumsum(0, dtype=torch.int32)
        call(replace_kernel, programs, label, hits, missing, ids, n, num_samples, n.bit_length(), BLOCK=LABELS)
    return ids.sort().values


@triton.jit(do_not_specialize=["s", "first_class", "c", "a", "b"])
def candidates_kernel(state, ids, s, first_class, c, a, b, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """ids[i] = the class of rank i."""
    rank = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    point = tl.where(rank < s, rank, 0)
    seed = seed_of(state, first_class)
    beyond = point >= 0  # all
    while tl.max(beyond.to(tl.int32), axis=0) > 0:
        point = tl.where(beyond, forwards(point, seed, a, b, ROUNDS), point)
        beyond = point >= c
    tl.store(ids + rank, point, mask=rank < s)


@triton.jit(do_not_specialize=["n", "s", "first_class", "c", "a", "b"])
def ranks_kernel(
    state, labels, hits, missing, n, s, first_class, c, a, b, ROUNDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """hits: the rank of a label that is a candidate, else -1; missing: 1 for a label that is none.

    labels: sorted; of equal ones the first counts.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + i, mask=i < n, other=-1)
    before = tl.load(labels + i - 1, mask=(i < n) & (i > 0), other=-1)
    first = (label >= 0) & (label < c) & (label != before)
    point = tl.where(first, label, 0)
    seed = seed_of(state, first_class)
    beyond = point >= 0  # all
    while tl.max(beyond.to(tl.int32), axis=0) > 0:
        point = tl.where(beyond, backwards(point, seed, a, b, ROUNDS), point)
        beyond = point >= c
    tl.store(hits + i, tl.where(first & (point < s), point, -1), mask=i < n)
    tl.store(missing + i, (first & (point >= s)).to(tl.int32), mask=i < n)


@triton.jit(do_not_specialize=["n", "s", "steps"])
def replace_kernel(labels, hits, missing, ids, n, s, steps, BLOCK: tl.constexpr):
    """The m-th missing label replaces the m-th candidate from the end that is no hit.

    hits: falling. missing: how many up to here. steps: of a binary search in [0, n].
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(missing + i, mask=i < n, other=0)
    replaces = count > tl.load(missing + i - 1, mask=(i < n) & (i > 0), other=0)
    m = count - 1
    # How many hits are behind the candidate: those with at most m candidates behind them that are no hits.
    low = tl.zeros((BLOCK,), tl.int32)
    high = low + n
    for _ in range(steps):
        middle = (low + high) // 2
        searches = replaces & (low < high)
        hit = tl.load(hits + middle, mask=searches, other=-1)
        is_behind = searches & (hit >= 0) & (s - 1 - hit - middle <= m)
        low, high = tl.where(is_behind, middle + 1, low), tl.where(searches & ~is_behind, middle, high)
    replaced = s - 1 - m.to(tl.int64) - low
    tl.store(ids + replaced, tl.load(labels + i, mask=replaces, other=0), mask=replaces)


# -- the permutation -------------------------------------------------------------------------------------------------


@triton.jit
def forwards(point, seed, a, b, ROUNDS: tl.constexpr):
    left, right = point // b, point % b
    for k in tl.static_range(ROUNDS):
        if k % 2 == 0:
            left -= round_function(right, seed, k, a)
            left = tl.where(left < 0, left + a, left)
        else:
            right -= round_function(left, seed, k, b)
            right = tl.where(right < 0, right + b, right)
    return left * b + right


@triton.jit
def backwards(point, seed, a, b, ROUNDS: tl.constexpr):
    left, right = point // b, point % b
    for k in tl.static_range(ROUNDS - 1, -1, -1):
        if k % 2 == 0:
            left += round_function(right, seed, k, a)
            left = tl.where(left >= a, left - a, left)
        else:
            right += round_function(left, seed, k, b)
            right = tl.where(right >= b, right - b, right)
    return left * b + right


@triton.jit
def round_function(half, seed, k, side):
    """F_k(half) in [0, side)."""
    key = random_number(seed, tl.full((), k, tl.int64))
    return (without_sign(random_number(key, half), 64 - RANDOM_BITS) * side) >> RANDOM_BITS


@triton.jit
def seed_of(state, first_class):
    of_rank = tl.cast(first_class, tl.int64) * OF_FIRST
    return tl.load(state) * OF_SEED + tl.load(state + 1) * OF_STEP + of_rank


@triton.jit
def random_number(seed, index):
    number = (index + 1) * GOLDEN + seed
    number = (number ^ without_sign(number, SHIFT_1)) * FACTOR_1
    number = (number ^ without_sign(number, SHIFT_2)) * FACTOR_2
    return number ^ without_sign(number, LAST_SHIFT)


@triton.jit
def without_sign(number, SHIFT: tl.constexpr):
    return (number.to(tl.uint64, bitcast=True) >> SHIFT).to(tl.int64, bitcast=True)
