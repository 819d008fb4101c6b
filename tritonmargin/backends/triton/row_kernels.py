"""Kernels that go over samples or class rows, one after the other: all that is not a product.

Numbers per sample stand in lines of one buffer, `line` numbers apart (N rounded up to whole tiles, so that a tile reads
them without masks): lines of `numbers` are made by forward, lines of `grads` are gradients of the loss.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Lines of `numbers`.
INVERSE_X = tl.constexpr(0)  # 1/|x|, 0 for a zero row and for an ignored sample
PRODUCT = tl.constexpr(1)  # x' . w'_y
NORM_W = tl.constexpr(2)  # |w_y|
REST = tl.constexpr(
    3
)  # log2 sum_{j != y} exp(z_j), inf where there is no other class; or the hinge's threshold / log 2
NORM_X = tl.constexpr(4)  # |x|
BIAS_Y = tl.constexpr(5)
WEIGHT_Y = tl.constexpr(6)  # class weight
MEAN_Y = tl.constexpr(7)  # a_y of label smoothing
EXACT = tl.constexpr(8)  # what undoes the rounding of REST in exp2(z - rest)
NUMBERS = 9

# Lines of `grads`.
G_REST = tl.constexpr(0)  # dL/drest, or dL/dhinge
G_PRODUCT = tl.constexpr(1)
G_NORM_X = tl.constexpr(2)
G_NORM_W = tl.constexpr(3)
G_MEAN = tl.constexpr(4)
G_TARGET = tl.constexpr(5)  # dL/dt
GRADS = 6

# Lines of what is kept per class of the pass.
INVERSE_W = tl.constexpr(0)  # 1/|w|
ADDED = tl.constexpr(1)  # bias and sampling offset, / log 2
MEAN = tl.constexpr(2)  # a_j of label smoothing
CLASS_NUMBERS = 3

IGNORED = tl.constexpr(-2)  # label of a sample that counts for nothing; -1: its class is not in this pass
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
SMALLEST = tl.constexpr(4.7019774e-38)  # four times the smallest normal float32: the norm of a zero row


@triton.jit
def inverse_norm(norm):
    """1/norm, and 0 for a row whose norm is 0 (or so small that 1/norm overflows)."""
    return tl.where(norm < SMALLEST, 0.0, 1.0 / norm)


@triton.jit
def to_tf32(value):
    """The numbers as a product takes them: matrix units cut float32's last 13 bits off, here they are rounded."""
    return ((value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def position_of(local, ids, active, steps):
    """Where a sorted list of classes has this one; -1: nowhere."""
    low = tl.zeros((), tl.int64)
    high = low + active
    for _ in range(steps):
        middle = (low + high) // 2
        below = (low < high) & (tl.load(ids + middle, mask=low < high, other=0) < local)
        low, high = tl.where(below, middle + 1, low), tl.where(below, high, middle)
    found = (low < active) & (tl.load(ids + low, mask=low < active, other=-1) == local)
    return tl.where(found, low, -1)


@triton.jit(do_not_specialize=["n", "line", "classes", "active", "first_class", "ignore_index", "steps"])
def rows_kernel(
    x, weight, target, ids, per_class, xs, target_rows, numbers, label, n, line, classes, active, first_class,
    ignore_index, steps, scale, strides_x, strides_w, stride_xs,
    UNIT: tl.constexpr, ROUND: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A sample: x' as the products take it, its class's row as it is now, their exact product, its label's position.

    UNIT: whether embeddings and class rows are normalised. per_class: bias, class weight, a; each may be None.
    The program past the last sample fills up the line, which is less than 128 longer: labels to ignore, an x' of 0.
    """
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    if i == n:
        more = i + tl.arange(0, 128)
        tl.store(label + more, IGNORED, mask=more < line)
        if xs is not None:
            for row in range(n, (n + 15) // 16 * 16):
                tl.store(xs + tl.cast(row, tl.int64) * stride_xs + d, 0.0, mask=d < stride_xs)
        return
    y = tl.load(target + i).to(tl.int64)
    valid = y != ignore_index
    y -= first_class
    here = valid & (y >= 0) & (y < classes)
    y = tl.where(here, y, 0)
    v = tl.load(x + i * strides_x[0] + d.to(tl.int64) * strides_x[1], mask=(d < D) & valid, other=0.0).to(tl.float32)
    w = tl.load(weight + y * strides_w[0] + d.to(tl.int64) * strides_w[1], mask=(d < D) & here, other=0.0)
    tl.store(target_rows + i * D + d, w, mask=d < D)  # an update in backward may change it before it is read
    w = w.to(tl.float32)
    norm_x = tl.sqrt(tl.sum(v * v, axis=0))
    norm_w = tl.sqrt(tl.sum(w * w, axis=0))
    inverse = inverse_norm(norm_x)
    if UNIT[0]:
        v *= inverse
    v *= scale
    product = tl.sum(v * w, axis=0)
    if UNIT[1]:
        product *= inverse_norm(norm_w)
    position = y if ids is None else position_of(y, ids, active, steps)
    position = tl.where(here, position, tl.where(valid, -1, IGNORED))
    tl.store(label + i, position.to(tl.int32))
    tl.store(numbers + INVERSE_X * line + i, inverse)
    tl.store(numbers + PRODUCT * line + i, product)
    tl.store(numbers + NORM_W * line + i, norm_w)
    tl.store(numbers + NORM_X * line + i, norm_x)
    for k in tl.static_range(3):
        if per_class[k] is not None:
            vector, stride = per_class[k]
            number = tl.load(vector + y * stride, mask=here, other=0.0).to(tl.float32)
            tl.store(numbers + (BIAS_Y + k) * line + i, number)
    if xs is not None:
        if ROUND:
            v = to_tf32(v)
        tl.store(xs + i * stride_xs + d, v.to(xs.dtype.element_ty), mask=d < stride_xs)


@triton.jit(do_not_specialize=["k", "line", "start"])
def classes_kernel(
    weight, ids, bias, offset, mean, rows, class_numbers, k, line, start, strides_w, stride_rows, stride_mean,
    UNIT: tl.constexpr, ROUND: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Classes start..start + k of the pass: 1/|w|, what is added to their logits; with `rows` w' for the products.

    rows, where the products cannot take W as it is: another dtype, a list of classes, odd lines; normalised if UNIT.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    inside = row < k
    position = row + start
    source = position if ids is None else tl.load(ids + position, mask=inside, other=0)
    if UNIT or rows is not None:
        mask = inside[:, None] & (d < D)[None, :]
        place = source[:, None] * strides_w[0] + d[None, :].to(tl.int64) * strides_w[1]
        w = tl.load(weight + place, mask=mask, other=0.0).to(tl.float32)
        if UNIT:
            inverse = inverse_norm(tl.sqrt(tl.sum(w * w, axis=1)))
            tl.store(class_numbers + INVERSE_W * line + position, inverse, mask=inside)
            w *= inverse[:, None]
        if rows is not None:
            if ROUND:
                w = to_tf32(w)
            out = row[:, None] * stride_rows + d[None, :]
            tl.store(rows + out, w.to(rows.dtype.element_ty), mask=inside[:, None] & (d < stride_rows)[None, :])
    if bias is not None or offset is not None:
        added = tl.zeros((BLOCK_K,), tl.float32)
        if bias is not None:
            added += tl.load(bias + source, mask=inside, other=0.0).to(tl.float32)
        if offset is not None:
            added += tl.load(offset + position, mask=inside, other=0.0)
        tl.store(class_numbers + ADDED * line + position, added * LOG2E, mask=inside)
    if mean is not None:
        a = tl.load(mean + source * stride_mean, mask=inside, other=0.0).to(tl.float32)
        tl.store(class_numbers + MEAN * line + position, a, mask=inside)


@triton.jit
def softplus_of(excess):
    """log(1 + exp(excess)), its slope and one minus that, all to a rounding or two; log1p as Kahan writes it."""
    small = tl.exp2(-tl.abs(excess) * LOG2E)
    one = 1.0 + small
    log1p = tl.where(one == 1.0, small, tl.log(one) * (small / tl.where(one == 1.0, 1.0, one - 1.0)))
    loss = tl.maximum(excess, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p
    return loss, tl.where(excess >= 0.0, 1.0, small) / one, tl.where(excess >= 0.0, small, 1.0) / one


@triton.jit
def logaddexp(a, b):
    """log(exp(a) + exp(b)); either may be -inf."""
    high = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    difference = -tl.abs(a - b)
    log1p = softplus_of(difference)[0]  # 0 at most, so that it is log1p of its exponential alone
    return tl.where(high == -float("inf"), high, high + log1p)


@triton.jit
def sums_of(total, maximum, i, n, slots, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """The sum of exp2(z - shift) over all slots, 0 where no class but the target was met; and shift."""
    slot = tl.arange(0, BLOCK_S)
    high = tl.full((BLOCK_S, BLOCK_N), -float("inf"), tl.float32)
    found = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
    for first in range(0, slots, BLOCK_S):
        s = first + slot
        mask = (s < slots)[:, None] & (i < n)[None, :]
        place = s[:, None].to(tl.int64) * n + i[None, :]
        more = tl.load(total + place, mask=mask, other=0.0)
        if maximum is None:
            found += more
        else:
            top = tl.load(maximum + place, mask=mask, other=-float("inf"))
            new = tl.maximum(high, top)
            shift = tl.where(new == -float("inf"), 0.0, new)
            found = found * tl.exp2(high - shift) + more * tl.exp2(top - shift)
            high = new
    if maximum is None:
        shift = tl.zeros((BLOCK_N,), tl.float32)
        sums = tl.sum(found, axis=0)
    else:
        highest = tl.max(high, axis=0)
        shift = tl.where(highest == -float("inf"), 0.0, highest)
        sums = tl.sum(found * tl.exp2(high - shift[None, :]), axis=0)
    return sums, shift


@triton.jit
def rest_of(sums, shift):
    """log2 of the sum of exp2(z), and what undoes its rounding, 1e-5 where logits are some hundreds: exp2(it)/sum."""
    rest = tl.log2(sums) + shift
    return rest, tl.where(sums > 0.0, tl.exp2(rest - shift) / sums, 1.0)


@triton.jit
def mean_of(mean, i, n, slots, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    slot = tl.arange(0, BLOCK_S)
    found = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
    for first in range(0, slots, BLOCK_S):
        s = first + slot
        mask = (s < slots)[:, None] & (i < n)[None, :]
        found += tl.load(mean + s[:, None].to(tl.int64) * n + i[None, :], mask=mask, other=0.0)
    return tl.sum(found, axis=0)


@triton.jit(do_not_specialize=["n", "line", "slots"])
def numbers_kernel(
    total, maximum, mean, numbers, out, n, line, slots, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """The slots' sums, and what forward knows of a sample for PyTorch: rest, product, |w_y|, |x|, mean, b_y."""
    rest_out, product, norm_w, norm_x, mean_out, bias = out
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = i < n
    if total is not None:
        sums, shift = sums_of(total, maximum, i, n, slots, BLOCK_N, BLOCK_S)
        rest, exact = rest_of(sums, shift)
        tl.store(numbers + EXACT * line + i, exact, mask=i < line)
        tl.store(rest_out + i, rest * LN2, mask=inside)
        tl.store(numbers + REST * line + i, tl.where(rest == -float("inf"), float("inf"), rest), mask=i < line)
    tl.store(product + i, tl.load(numbers + PRODUCT * line + i, mask=inside), mask=inside)
    tl.store(norm_w + i, tl.load(numbers + NORM_W * line + i, mask=inside), mask=inside)
    tl.store(norm_x + i, tl.load(numbers + NORM_X * line + i, mask=inside), mask=inside)
    if mean is not None:
        tl.store(mean_out + i, mean_of(mean, i, n, slots, BLOCK_N, BLOCK_S), mask=inside)
    if bias is not None:
        tl.store(bias + i, tl.load(numbers + BIAS_Y * line + i, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["n", "line", "slots"])
def loss_kernel(
    total, maximum, mean, numbers, label, grads, losses, margin_numbers, mean_total, n, line, slots, scale, smoothing,
    FORMULA: tl.constexpr, MARGIN: tl.constexpr, UNIT: tl.constexpr, BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The slots' sums, the margin, softmax cross-entropy: losses[0], their weights losses[1], and their gradients."""
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = i < n
    beyond = i < line
    sums, shift = sums_of(total, maximum, i, n, slots, BLOCK_N, BLOCK_S)
    rest, exact = rest_of(sums, shift)
    valid = tl.load(label + i, mask=inside, other=IGNORED) != IGNORED
    product = tl.load(numbers + PRODUCT * line + i, mask=inside, other=0.0)
    norm_x = tl.load(numbers + NORM_X * line + i, mask=inside, other=0.0)
    norm_w = tl.load(numbers + NORM_W * line + i, mask=inside, other=0.0)
    t = product
    moved = tl.zeros((BLOCK_N,), tl.float32)  # what the margin adds
    slope = tl.full((BLOCK_N,), 1.0, tl.float32)
    of_scale = tl.zeros((BLOCK_N,), tl.float32)  # dt/dscale
    if FORMULA is not None:
        full = tl.full((BLOCK_N,), scale, tl.float32) if UNIT[0] else norm_x
        if not UNIT[1]:
            full = full * norm_w
        cos = product / tl.where(full > 0.0, full, 1.0)
        phi, slope = FORMULA(cos, margin_numbers, MARGIN)
        t = full * phi
        moved = t - product
        of_scale = phi - cos * slope
        slope = tl.where(full > 0.0, slope, 0.0)
    if BIAS:
        t += tl.load(numbers + BIAS_Y * line + i, mask=inside, other=0.0)
    loss, u, p = softplus_of(tl.log(sums) + (shift * LN2 - t))  # p: the target's probability
    of_rest, of_t = u, -u
    class_weight = tl.where(valid, 1.0, 0.0)
    if WEIGHTED:
        class_weight = tl.where(valid, tl.load(numbers + WEIGHT_Y * line + i, mask=inside, other=0.0), 0.0)
        loss *= class_weight
        of_rest *= class_weight
        of_t *= class_weight
    of_plain = tl.zeros((BLOCK_N,), tl.float32)
    if mean is not None:
        a = tl.load(numbers + MEAN_Y * line + i, mask=inside, other=0.0)
        all_a = 1.0 if mean_total is None else tl.load(mean_total).to(tl.float32)
        average = mean_of(mean, i, n, slots, BLOCK_N, BLOCK_S) + moved * a
        loss = (1.0 - smoothing) * loss + smoothing * (all_a * logaddexp(rest * LN2, t) - average)
        of_rest = (1.0 - smoothing) * of_rest + smoothing * all_a * u
        of_t = (1.0 - smoothing) * of_t + smoothing * (all_a * p - a)
        of_plain = smoothing * a
        tl.store(grads + G_MEAN * line + i, tl.where(valid, -smoothing, 0.0), mask=beyond)
    tl.store(losses + i, tl.where(valid, loss, 0.0), mask=inside)
    tl.store(losses + n + i, class_weight, mask=inside)
    tl.store(numbers + REST * line + i, tl.where(rest == -float("inf"), float("inf"), rest), mask=beyond)
    tl.store(grads + G_REST * line + i, tl.where(valid, of_rest * exact, 0.0), mask=beyond)
    tl.store(grads + G_TARGET * line + i, tl.where(valid, of_t + of_plain, 0.0), mask=beyond)
    tl.store(grads + G_PRODUCT * line + i, tl.where(valid, of_t * slope + of_plain, 0.0), mask=beyond)
    if not UNIT[0]:
        of_norm = of_t * of_scale
        tl.store(grads + G_NORM_X * line + i, tl.where(valid, of_norm * (1.0 if UNIT[1] else norm_w), 0.0), mask=beyond)
        if not UNIT[1]:
            tl.store(grads + G_NORM_W * line + i, tl.where(valid, of_norm * norm_x, 0.0), mask=beyond)


@triton.jit(do_not_specialize=["n"])
def sum_kernel(losses, loss, factor, n, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """The losses' sum, or with MEAN their weighted mean; factor: what a sample's gradient is multiplied by for it."""
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(losses + i, mask=i < n, other=0.0)
        count += tl.load(losses + n + i, mask=i < n, other=0.0)
    if MEAN:
        tl.store(loss, tl.sum(total, axis=0) / tl.sum(count, axis=0))
        tl.store(factor, 1.0 / tl.sum(count, axis=0))
    else:
        tl.store(loss, tl.sum(total, axis=0))
        tl.store(factor, 1.0)


@triton.jit(do_not_specialize=["n", "line"])
def upstream_kernel(grads, upstream, out, n, line, stride, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients of losses whose upstream gradients differ from sample to sample."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(upstream + i * stride, mask=i < n, other=0.0).to(tl.float32)
    for k in tl.static_range(LINES):
        tl.store(out + k * line + i, g * tl.load(grads + k * line + i, mask=i < n, other=0.0), mask=i < line)


@triton.jit(do_not_specialize=["n", "line"])
def gradients_kernel(numbers, given, out, n, line, IS_REST: tl.constexpr, BLOCK: tl.constexpr):
    """`grads` from the gradients of rest, product, |x|, |w_y|, the mean and b_y, with their strides; None: 0.

    IS_REST: the first one is that of rest, and not of the hinge.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for k in tl.static_range(6):
        g = tl.zeros((BLOCK,), tl.float32)
        if given[k] is not None:
            vector, stride = given[k]
            g += tl.load(vector + i * stride, mask=i < n, other=0.0)
            if IS_REST and k == 0:
                g *= tl.load(numbers + EXACT * line + i, mask=i < n, other=0.0)
        tl.store(out + k * line + i, g, mask=i < line)


@triton.jit(do_not_specialize=["n", "line"])
def extremes_kernel(
    grads, numbers, extremes, n, line, scale, UNIT_X: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """float16: the largest gradient of a sample, and a bound of the largest number in x'."""
    top = tl.zeros((BLOCK,), tl.float32)
    most = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.abs(tl.load(grads + G_REST * line + i, mask=i < n, other=0.0)))
        if MEAN:
            top = tl.maximum(top, tl.abs(tl.load(grads + G_MEAN * line + i, mask=i < n, other=0.0)))
        if not UNIT_X:
            most = tl.maximum(most, tl.load(numbers + NORM_X * line + i, mask=i < n, other=0.0))
    tl.store(extremes, tl.max(top, axis=0))
    tl.store(extremes + 1, scale if UNIT_X else tl.max(most, axis=0))


@triton.jit(do_not_specialize=["n", "line"])
def half_kernel(
    grads, extremes, xs, g_half, ys, power, n, line, stride, MEAN: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """float16: dL/drest = m 2^e. P carries 2^14 m, x' on the other side of its product carries 2^(e - top + headroom).

    So P lies in [-2^14, 2^14] and loses no bit, whatever the samples' gradients are. top is the e of the largest
    gradient; the headroom is what the largest x' leaves.
    """
    i = tl.program_id(0).to(tl.int64)
    g = tl.load(grads + G_REST * line + i)
    largest = tl.abs(g)
    if MEAN:
        g_mean = tl.load(grads + G_MEAN * line + i)
        largest = tl.maximum(largest, tl.abs(g_mean))
    exponent = exponent_of(largest)
    shift = exponent - exponent_of(tl.load(extremes)) + 15 - exponent_of(tl.load(extremes + 1))
    factor = tl.where(largest == 0.0, 0.0, power_of_two(tl.minimum(tl.maximum(shift, -60), 60)))
    tl.store(power + i, factor)
    # 2^(14 - e) may be no float32, its halves are.
    once, again = power_of_two(7 - exponent // 2), power_of_two(7 - (exponent - exponent // 2))
    tl.store(g_half + G_REST * line + i, g * once * again)
    if MEAN:
        tl.store(g_half + G_MEAN * line + i, g_mean * once * again)
    tl.store(g_half + G_TARGET * line + i, tl.load(grads + G_TARGET * line + i) * once * again)
    d = tl.arange(0, BLOCK_D)
    mask = (d < stride) & (i < (n + 15) // 16 * 16)
    v = tl.load(xs + i * stride + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(ys + i * stride + d, (v * factor).to(ys.dtype.element_ty), mask=mask)


@triton.jit
def exponent_of(value):
    """e with |value| = m 2^e, m in [1/2, 1); of 0 and what is no normal number: as of the smallest normal one."""
    bits = (value.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255
    return tl.minimum(tl.maximum(bits, 1), 254) - 126


@triton.jit
def power_of_two(exponent):
    """2^exponent for -126 <= exponent <= 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def half_factor(extremes):
    """What undoes the powers of `half_kernel` in both products."""
    return power_of_two(exponent_of(tl.load(extremes)) + exponent_of(tl.load(extremes + 1)) - 29)
