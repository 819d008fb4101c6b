"""dL/dW of a chunk of classes, and the optimiser's update of its rows, before the gradient leaves the registers."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonmargin.backends.triton.logits_kernels import given_product, parts_of, tile_product
from tritonmargin.backends.triton.row_kernels import (
    G_NORM_W,
    G_PRODUCT,
    G_TARGET,
    INVERSE_W,
    INVERSE_X,
    NORM_W,
    PRODUCT,
    half_factor,
    inverse_norm,
)
from tritonmargin.backends.triton.update_rules import store_rounded


@triton.jit(do_not_specialize=["k", "start", "line_c", "seed"])
def finish_kernel(
    dlogits, xs, label, numbers, grads, class_numbers, sums, exact, factors, weight, ids, out, update,
    k, start, lines, line_c, strides, scale, seed, KIND: tl.constexpr, RULE: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """dL/dw_j = (P x')_j - w_j (sum_i P_ij z_ij)/|w_j|^2 + the exact part of the samples that point at the row.

    sums: those of `weigh_kernel`, where gradients of a bias go, and how many blocks of samples there are. exact: x
    and, with a hardest class per sample, its positions, products and gradients. factors: those of the whole gradient,
    and the extremes of `half_kernel`. out: the gradient, or with a RULE the weight; None for a bias alone. lines: how
    long those of dL/dz and of numbers per sample are, multiples of 16; line_c: those of numbers per class.
    KIND: (D, rows are unit, embeddings are unit, P x' is: 0 made here, 1 given in dlogits, 2 nothing; P lacks 1/|w|;
    out's rows are class numbers; |w_y| has a gradient; stochastic rounding; tile_product's HOW).
    """
    D: tl.constexpr = KIND[0]
    BLOCK_C: tl.constexpr = TILE[0]
    BLOCK_D: tl.constexpr = TILE[1]
    PART: tl.constexpr = BLOCK_D // SPLIT
    along, by_class, grad_bias, blocks = sums
    stride_p, stride_xs, strides_w, stride_out, strides_x = strides
    upstream, half = factors
    length, line = lines
    tiles_d = tl.cdiv(D, BLOCK_D)
    for index in tl.range(tl.program_id(0), tiles_d * tl.cdiv(k, BLOCK_C), tl.num_programs(0)):
        first_d, first_c = (index % tiles_d) * BLOCK_D, (index // tiles_d) * BLOCK_C
        row = first_c + tl.arange(0, BLOCK_C)
        known = row < k
        position = (row + start).to(tl.int64)
        source = position if ids is None else tl.load(ids + position, mask=known, other=0)
        if KIND[3] == 0:
            z = tile_product(dlogits, xs, first_c, first_d, k, D, length, stride_p, stride_xs, True, KIND[8], TILE)
        elif KIND[3] == 1:
            z = given_product(dlogits, row[:, None], (first_d + tl.arange(0, BLOCK_D))[None, :], k, D, stride_p)
        else:
            z = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
        inverse = tl.full((BLOCK_C,), 1.0, tl.float32)
        dot = tl.zeros((BLOCK_C,), tl.float32)
        if KIND[1]:
            inverse = tl.load(class_numbers + INVERSE_W * line_c + position, mask=known, other=0.0)
            if KIND[3] != 2:
                dot = add_blocks(dot, along, blocks, row, k) * (inverse * inverse)
        if half is not None:
            undo = half_factor(half)
            z *= undo
            dot *= undo
        if grad_bias is not None and first_d == 0:
            bias_rows(by_class, grad_bias, label, grads, exact[1], upstream, half, row, source, known, k, start, blocks,
                      line, BLOCK_C)  # fmt: skip
        parts = parts_of(z, BLOCK_C, BLOCK_D, SPLIT)
        for part in tl.static_range(0 if out is None else SPLIT):
            a = parts[part]
            column = first_d + part * PART + tl.arange(0, PART)
            mask = known[:, None] & (column < D)[None, :]
            at = source[:, None] * strides_w[0] + column[None, :].to(tl.int64) * strides_w[1]
            w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
            if KIND[1]:
                if KIND[4]:
                    a *= inverse[:, None]
                a -= w * dot[:, None]
            a = add_exact_part(a, w, inverse, row, column, first_c, start, label, numbers, grads, exact, line,
                               strides_x, scale, (KIND[1], KIND[2], KIND[6], D, BLOCK_C))  # fmt: skip
            for factor in tl.static_range(len(upstream)):
                a *= tl.load(upstream[factor]).to(tl.float32)
            to = (source if KIND[5] else position)[:, None] * stride_out + column[None, :]
            if RULE is None:
                tl.store(out + to, a.to(out.dtype.element_ty), mask=mask)
            else:
                values, state, steps = update
                corrections = None
                if steps is not None:
                    corrections = (
                        tl.load(steps[0] + row, mask=known, other=1.0),
                        tl.load(steps[1] + row, mask=known, other=1.0),
                    )
                new = RULE(a, w, to, mask, values, state, corrections, seed, KIND[7])
                store_rounded(out + to, new, to, mask, seed, KIND[7])


@triton.jit
def add_blocks(found, sums, blocks, row, k):
    """The sums [blocks, k] of `weigh_kernel` that belong to rows, one block after the other."""
    for block in range(blocks):
        found += tl.load(sums + tl.cast(block, tl.int64) * k + row, mask=row < k, other=0.0)
    return found


@triton.jit
def add_exact_part(
    a, w, inverse, row, column, first_c, start, label, numbers, grads, exact, line, strides_x, scale,
    KIND: tl.constexpr,
):  # fmt: skip
    """What samples give to the row of their target, and to the row of their hardest class. KIND: of `add_samples`."""
    a = add_samples(a, w, inverse, row, column, first_c, start, label, numbers + PRODUCT * line, 1,
                    grads + G_PRODUCT * line, 1, grads, numbers, line, exact[0], strides_x, scale, KIND)  # fmt: skip
    if exact[1] is not None:
        positions, products, of_hardest, strides_h = exact[1]
        a = add_samples(a, w, inverse, row, column, first_c, start, positions, products, strides_h[0],
                        of_hardest, strides_h[1], grads, numbers, line, exact[0], strides_x, scale,
                        (KIND[0], KIND[1], False, KIND[3], KIND[4]))  # fmt: skip
    return a


@triton.jit
def add_samples(
    a, w, inverse, row, column, first_c, start, label, product, stride_product, gradient, stride_gradient, grads,
    numbers, line, x, strides_x, scale, KIND: tl.constexpr,
):  # fmt: skip
    """The exact part: of each sample whose row is here, in the order of the batch, g (x' - w' (x' . w'))/|w|.

    KIND: (rows are unit, embeddings are unit, |w_y| has a gradient, D, BLOCK_C).
    """
    for first in range(0, line, 1024):
        j = first + tl.arange(0, 1024)
        own = tl.load(label + j, mask=j < line, other=-1) - start
        hit = (own >= first_c) & (own < first_c + KIND[4])
        i = tl.min(tl.where(hit, j, 2147483647), axis=0)
        while i < 2147483647:
            g = tl.load(gradient + i * stride_gradient)
            v = tl.load(
                x + i.to(tl.int64) * strides_x[0] + column.to(tl.int64) * strides_x[1], mask=column < KIND[3], other=0.0
            ).to(tl.float32)  # fmt: skip
            v *= scale * g
            if KIND[1]:
                v *= tl.load(numbers + INVERSE_X * line + i)
            of = tl.where(row == tl.load(label + i) - start, 1.0, 0.0)
            of_w = tl.zeros_like(of)
            if KIND[0]:
                of_w -= of * inverse * inverse * (g * tl.load(product + i * stride_product))
            if KIND[2]:
                norm = tl.load(numbers + NORM_W * line + i)
                of_w += of * tl.load(grads + G_NORM_W * line + i) * inverse_norm(norm)
            if KIND[0]:
                of *= inverse
            a += of[:, None] * v[None, :] + of_w[:, None] * w
            i = tl.min(tl.where(hit & (j > i), j, 2147483647), axis=0)
    return a


@triton.jit
def bias_rows(
    by_class, grad_bias, label, grads, hardest, upstream, half, row, source, known, k, start, blocks, line,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dL/db of rows: the sums over samples, or where there are none the targets' own part; and the hardest classes'.

    hardest: those of finish_kernel's exact.
    """
    found = tl.zeros((BLOCK_C,), tl.float64)
    if by_class is not None:
        found = add_blocks(found, by_class, blocks, row, k)
        if half is not None:
            found *= half_factor(half)
    else:
        found += own_sums(label, grads + G_TARGET * line, 1, row, start, line, BLOCK_C)
    if hardest is not None:
        found += own_sums(hardest[0], hardest[2], hardest[3][1], row, start, line, BLOCK_C)
    for factor in tl.static_range(len(upstream)):
        found *= tl.load(upstream[factor]).to(tl.float32)
    tl.store(grad_bias + source, found.to(grad_bias.dtype.element_ty), mask=known)


@triton.jit
def own_sums(label, gradient, stride, row, start, line, BLOCK_C: tl.constexpr):
    """The sum over the samples that point at each row, a block of samples at a time."""
    found = tl.zeros((BLOCK_C,), tl.float64)
    for first in range(0, line, 16):
        j = first + tl.arange(0, 16)
        own = tl.load(label + j, mask=j < line, other=-1) - start
        g = tl.load(gradient + j * stride, mask=j < line, other=0.0).to(tl.float64)
        found += tl.sum(tl.where(own[None, :] == row[:, None], g[None, :], 0.0), axis=1)
    return found
