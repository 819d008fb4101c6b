"""dL/dx of each sample, once all chunks of classes have added to dL/dx'."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonmargin.backends.triton.row_kernels import (
    G_NORM_X,
    G_PRODUCT,
    INVERSE_X,
    NORM_W,
    half_factor,
    inverse_norm,
)


@triton.jit(do_not_specialize=["line"])
def back_kernel(
    product, x, numbers, grads, upstream, power, extremes, target_rows, hardest, out, line, scale, strides_x,
    stride_product, UNIT: tl.constexpr, NORM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dL/dx of dL/dx' = product + the exact rows' part: s (g - x^ (x^ . g))/|x|; and what comes through |x|.

    upstream: factors of the whole gradient, as in `finish_kernel`. hardest: rows w'_h, their gradients; or None.
    """
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = d < D
    g = tl.zeros((BLOCK_D,), tl.float32)
    if product is not None:
        g += tl.load(product + i * stride_product + d, mask=mask, other=0.0)
        if power is not None:
            g *= tl.load(power + i) * half_factor(extremes)
    of = tl.load(grads + G_PRODUCT * line + i)
    if UNIT[1]:
        of *= inverse_norm(tl.load(numbers + NORM_W * line + i))
    g += of * tl.load(target_rows + i * D + d, mask=mask, other=0.0).to(tl.float32)
    if hardest is not None:
        rows, gradient, stride = hardest
        of = tl.load(gradient + i * stride)
        g += of * tl.load(rows + i * D + d, mask=mask, other=0.0)
    inverse = tl.load(numbers + INVERSE_X * line + i)
    read = tl.where(inverse > 0.0, D, 0)  # nan in an ignored embedding must not be
    v = tl.load(x + i * strides_x[0] + d.to(tl.int64) * strides_x[1], mask=d < read, other=0.0).to(tl.float32)
    v *= inverse
    if UNIT[0]:
        g = (g - v * tl.sum(v * g, axis=0)) * inverse
    g *= scale
    if NORM:
        g += v * tl.load(grads + G_NORM_X * line + i)
    for k in tl.static_range(len(upstream)):
        g *= tl.load(upstream[k]).to(tl.float32)
    tl.store(out + i * D + d, g.to(out.dtype.element_ty), mask=mask)
