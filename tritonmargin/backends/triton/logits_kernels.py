"""The tiles of logits: products of samples and class rows, and what is made of them before they leave the registers.

    reduce_kernel   z = x' . w'_j, folded into numbers per sample                                       forward
    weigh_kernel    z again, and P = dL/dz of it, with the sums over samples that the Jacobian needs     backward

A logit is in units of log 2: exp(z) is exp2 of it, one instruction. Where class rows are taken as they are stored,
1/|w| multiplies the product afterwards, and P carries it into dX and dW.

Nothing is shared between programs: a tile folds its classes into a slot of its own. So there are no atomics and no
locks, and the result is the same on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonmargin.backends.triton.row_kernels import (
    ADDED,
    G_MEAN,
    G_REST,
    G_TARGET,
    INVERSE_W,
    LN2,
    LOG2E,
    MEAN,
    REST,
    to_tf32,
)


@triton.jit
def tile_product(
    a, b, first_m, first_n, m, n, length, stride_a, stride_b, LINES: tl.constexpr, HOW: tl.constexpr, TILE: tl.constexpr
):
    """a[first_m : + BLOCK_M] b[first_n : + BLOCK_N]^T summed in float32, 0 beyond the edges; with LINES b is [L, N].

    HOW: whether a and b are tensor descriptors, and tl.dot's input_precision.
    """
    BLOCK_M: tl.constexpr = TILE[0]
    BLOCK_N: tl.constexpr = TILE[1]
    BLOCK_L: tl.constexpr = TILE[2]
    row = first_m + tl.arange(0, BLOCK_M)
    column = first_n + tl.arange(0, BLOCK_N)
    z = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, length, BLOCK_L):
        if HOW[0]:
            left = a.load([first_m, first])
            right = b.load([first, first_n]) if LINES else b.load([first_n, first])
        else:
            at = first + tl.arange(0, BLOCK_L)
            left = tl.load(
                a + row[:, None].to(tl.int64) * stride_a + at[None, :],
                mask=(row < m)[:, None] & (at < length)[None, :],
                other=0.0,
            )
            if LINES:
                right = tl.load(
                    b + at[:, None].to(tl.int64) * stride_b + column[None, :],
                    mask=(at < length)[:, None] & (column < n)[None, :],
                    other=0.0,
                )
            else:
                right = tl.load(
                    b + column[:, None].to(tl.int64) * stride_b + at[None, :],
                    mask=(column < n)[:, None] & (at < length)[None, :],
                    other=0.0,
                )
        if LINES:
            z = tl.dot(left, right, z, input_precision=HOW[1])
        else:
            z = tl.dot(left, right.T, z, input_precision=HOW[1])
    return z


@triton.jit
def halves_of(z, M: tl.constexpr, N: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(z, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def parts_of(z, M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr):
    """The tile's columns in 1, 2, 4 or 8 parts: what is kept beside all of it would not fit the registers."""
    if PARTS == 1:
        return (z,)
    else:
        a, b = halves_of(z, M, N)
        if PARTS == 2:
            return a, b
        else:
            a0, a1 = halves_of(a, M, N // 2)
            b0, b1 = halves_of(b, M, N // 2)
            if PARTS == 4:
                return a0, a1, b0, b1
            else:
                a00, a01 = halves_of(a0, M, N // 4)
                a10, a11 = halves_of(a1, M, N // 4)
                b00, b01 = halves_of(b0, M, N // 4)
                b10, b11 = halves_of(b1, M, N // 4)
                return a00, a01, a10, a11, b00, b01, b10, b11


@triton.jit
def given_product(z, row, column, rows, columns, stride):
    """A tile of a product that is in memory, one of [1, N] and [M, 1] its rows and the other its columns."""
    return tl.load(z + row.to(tl.int64) * stride + column, mask=(row < rows) & (column < columns), other=0.0)


@triton.jit(do_not_specialize=["n", "k", "start", "line_c", "stride_z"])
def reduce_kernel(
    xs, rows, label, class_numbers, threshold, run, n, k, length, start, line_c, stride_xs, stride_rows, stride_z,
    KIND: tl.constexpr, HOW: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Fold classes start..start + k into the numbers that each slot keeps per sample.

    run: sums of exp2(z - maximum), maximum, hardest logit, its position, hinge, violations, sums of a z; None: not
    asked for. KIND: (1/|w| to multiply with, something to add, slots that hold numbers already, the product is made).
    The product, if it is made: xs [k, n] in memory, lines of classes.
    """
    total, maximum, hardest, hardest_row, hinge, violations, mean = run
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_C: tl.constexpr = TILE[1]
    PART: tl.constexpr = BLOCK_C // SPLIT
    tiles_n = tl.cdiv(n, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles_n * tl.cdiv(k, BLOCK_C), tl.num_programs(0)):
        # Tiles of the same classes follow each other: their rows are read once.
        first_n, slot = (index % tiles_n) * BLOCK_N, index // tiles_n
        first_c = slot * BLOCK_C
        sample = first_n + tl.arange(0, BLOCK_N)
        inside = sample < n
        if KIND[3]:
            dot = given_product(xs, (first_c + tl.arange(0, BLOCK_C))[None, :], sample[:, None], k, n, stride_z)
        else:
            dot = tile_product(xs, rows, first_n, first_c, n, k, length, stride_xs, stride_rows, False, HOW, TILE)
        own = slot.to(tl.int64) * n + sample
        target = tl.load(label + sample, mask=inside, other=-1) - start
        # What the slot knows so far.
        zero = tl.zeros((BLOCK_N,), tl.float32)
        high, found, hinged, violated, averaged = zero - float("inf"), zero, zero, zero, zero
        top, top_row, invalid = zero - float("inf"), tl.zeros((BLOCK_N,), tl.int32) - 1, zero > 0.0
        if hinge is not None:
            limit = tl.load(threshold + sample, mask=inside, other=0.0) * LOG2E
        parts = parts_of(dot, BLOCK_N, BLOCK_C, SPLIT)
        for part in tl.static_range(SPLIT):
            first = first_c + part * PART
            column = first + tl.arange(0, PART)
            known = column < k
            z = parts[part]
            if KIND[0]:
                inverse = tl.load(class_numbers + INVERSE_W * line_c + start + column, mask=known, other=0.0)
                z *= (inverse * LOG2E)[None, :]
            else:
                z *= LOG2E
            if KIND[1]:
                z += tl.load(class_numbers + ADDED * line_c + start + column, mask=known, other=0.0)[None, :]
            if mean is not None:
                a = tl.load(class_numbers + MEAN * line_c + start + column, mask=known, other=0.0)
                averaged += tl.sum(z * a[None, :], axis=1)
            # Few tiles hold a target or an edge: the others are spared a comparison per element.
            if tl.max(((target >= first) & (target < first + PART)).to(tl.int32), axis=0) > 0:
                z = tl.where(target[:, None] == column[None, :], -float("inf"), z)
            if first + PART > k:
                z = tl.where(known[None, :], z, -float("inf"))
            if hardest is not None:
                top, top_row, invalid = harder(z, column + start, top, top_row, invalid)
            if hinge is not None:
                excess = tl.maximum(z - limit[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
                hinged += tl.sum(excess, axis=1)
                violated += tl.sum((excess != 0.0).to(tl.float32), axis=1)
            if total is not None and maximum is None:
                found += tl.sum(tl.exp2(z), axis=1)
            if maximum is not None:
                new = tl.maximum(high, tl.max(z, axis=1))
                # Where every logit so far is masked the maximum is -inf, and -inf - -inf would be nan.
                shift = tl.where(new == -float("inf"), 0.0, new)
                found = found * tl.exp2(high - shift) + tl.sum(tl.exp2(z - shift[:, None]), axis=1)
                high = new
        if mean is not None:
            fold(mean, own, averaged * LN2, inside, KIND[2])
        if hardest is not None:
            fold_hardest(hardest, hardest_row, own, top, top_row, invalid, inside, KIND[2])
        if hinge is not None:
            fold(hinge, own, hinged * LN2, inside, KIND[2])
            fold(violations, own, violated, inside, KIND[2])
        if total is not None and maximum is None:
            fold(total, own, found, inside, KIND[2])
        if maximum is not None:
            fold_scaled(total, maximum, own, found, high, inside, KIND[2])


@triton.jit
def fold(sums, own, value, inside, MORE: tl.constexpr):
    if MORE:
        value += tl.load(sums + own, mask=inside, other=0.0)
    tl.store(sums + own, value, mask=inside)


@triton.jit
def fold_scaled(total, maximum, own, found, high, inside, MORE: tl.constexpr):
    """`fold` of sums of exp2(z - high), each with its maximum."""
    if MORE:
        earlier = tl.load(maximum + own, mask=inside, other=-float("inf"))
        before = tl.load(total + own, mask=inside, other=0.0)
        new = tl.maximum(earlier, high)
        shift = tl.where(new == -float("inf"), 0.0, new)
        found = found * tl.exp2(high - shift) + before * tl.exp2(earlier - shift)
        high = new
    tl.store(total + own, found, mask=inside)
    tl.store(maximum + own, high, mask=inside)


@triton.jit
def harder(z, position, top, top_row, invalid):
    """The hardest logit so far and its position; of equal ones the lowest, which come first."""
    value = tl.max(z, axis=1)
    row = tl.min(tl.where(z == value[:, None], position[None, :], 2147483647), axis=1)
    better = (value > top) & (row < 2147483647)
    invalid |= tl.max((z != z).to(tl.int32), axis=1) > 0
    return tl.where(better, value, top), tl.where(better, row, top_row), invalid


@triton.jit
def fold_hardest(hardest, hardest_row, own, value, row, invalid, inside, MORE: tl.constexpr):
    """A logit that is nan is the hardest, as in torch."""
    if MORE:
        before = tl.load(hardest + own, mask=inside, other=0.0)
        better = value > before
        row = tl.where(better, row, tl.load(hardest_row + own, mask=inside, other=-1))
        invalid |= before != before
        value = tl.where(better, value, before)
    tl.store(hardest + own, tl.where(invalid, float("nan"), value), mask=inside)
    tl.store(hardest_row + own, row, mask=inside)


@triton.jit(do_not_specialize=["n", "k", "start", "line", "line_c", "stride_z"])
def weigh_kernel(
    rows, xs, label, numbers, grads, power, class_numbers, dlogits, sums, n, k, length, start, line, line_c,
    stride_rows, stride_xs, stride_z, stride_out, KIND: tl.constexpr, HOW: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """P [k, n] = dL/dz of classes start..start + k, times 1/|w| where rows are as stored; 0 at the targets.

    sums: of P z over a block of samples, for the Jacobian of w/|w|, from the numbers that are stored; and of dL/dz
    itself, the gradient of a bias. KIND: (1/|w| to multiply with, something to add, hinge, a mean over classes, the
    product is made). The product, if it is made: rows [k, n].
    """
    along, by_class = sums
    BLOCK_C: tl.constexpr = TILE[0]
    BLOCK_N: tl.constexpr = TILE[1]
    PART: tl.constexpr = BLOCK_N // SPLIT
    tiles_n = tl.cdiv(n, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles_n * tl.cdiv(k, BLOCK_C), tl.num_programs(0)):
        slot, first_c = index % tiles_n, (index // tiles_n) * BLOCK_C
        first_n = slot * BLOCK_N
        row = first_c + tl.arange(0, BLOCK_C)
        known = row < k
        if KIND[4]:
            z = given_product(rows, row[:, None], (first_n + tl.arange(0, BLOCK_N))[None, :], k, n, stride_z)
        else:
            z = tile_product(rows, xs, first_c, first_n, k, n, length, stride_rows, stride_xs, False, HOW, TILE)
        scale = tl.full((BLOCK_C,), 1.0, tl.float32)
        if KIND[0]:
            scale = tl.load(class_numbers + INVERSE_W * line_c + start + row, mask=known, other=0.0)
        if KIND[1]:
            added = tl.load(class_numbers + ADDED * line_c + start + row, mask=known, other=0.0)
        if KIND[3]:
            a = tl.load(class_numbers + MEAN * line_c + start + row, mask=known, other=0.0)
        sum_pz = tl.zeros((BLOCK_C,), tl.float32)
        sum_p = tl.zeros((BLOCK_C,), tl.float32)
        parts = parts_of(z, BLOCK_C, BLOCK_N, SPLIT)
        for part in tl.static_range(SPLIT):
            dot = parts[part]
            sample = first_n + part * PART + tl.arange(0, PART)
            # Lines of numbers, grads and label are whole tiles: no masks.
            zz = dot * (scale * LOG2E)[:, None]
            if KIND[1]:
                zz += added[:, None]
            own = tl.load(label + sample) - start
            targets = tl.max(((own >= first_c) & (own < first_c + BLOCK_C)).to(tl.int32), axis=0) > 0
            if targets:
                zz = tl.where(own[None, :] == row[:, None], -float("inf"), zz)
            rest = tl.load(numbers + REST * line + sample)[None, :]
            if KIND[2]:
                p = tl.where(zz > rest, 1.0, tl.where(zz == zz, 0.0, zz))
            else:
                p = tl.exp2(zz - rest)
            p *= tl.load(grads + G_REST * line + sample)[None, :]
            if KIND[3]:
                p += a[:, None] * tl.load(grads + G_MEAN * line + sample)[None, :]
            if by_class is not None:
                sum_p += sum_of_bias(p, row, own, targets, grads + G_TARGET * line, power, sample)
            if KIND[0]:
                p *= scale[:, None]
            if HOW[1] == "tf32":
                p = to_tf32(p)
            stored = p.to(dlogits.dtype.element_ty)
            if along is not None:
                pz = stored.to(tl.float32) * dot
                if power is not None:
                    pz *= tl.load(power + sample)[None, :]
                sum_pz += tl.sum(pz, axis=1)
            out = row[:, None].to(tl.int64) * stride_out + sample[None, :]
            tl.store(dlogits + out, stored, mask=known[:, None] & (sample < stride_out)[None, :])
        place = slot.to(tl.int64) * k + row
        if along is not None:
            tl.store(along + place, sum_pz, mask=known)
        if by_class is not None:
            tl.store(by_class + place, sum_p, mask=known)


@triton.jit
def sum_of_bias(p, row, own, targets, of_target, power, sample):
    """dL/db of a part's classes; `targets`: whether one of them is a sample's own."""
    p = p if power is None else p * tl.load(power + sample)[None, :]
    if targets:
        # What the target's own samples take away, before it is rounded: over many of them nearly all.
        of_own = tl.load(of_target + sample)
        if power is not None:
            of_own *= tl.load(power + sample)
        found = tl.sum(p + tl.where(own[None, :] == row[:, None], of_own[None, :], 0.0), axis=1)
    else:
        found = tl.sum(p, axis=1)
    return found
