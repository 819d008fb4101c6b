"""The class pass backward, in PyTorch: dL/dx, dL/dW and dL/db, one more visit to every chunk of classes.

With P = dL/dz of a chunk (dlogits) and A = dL/dw' of its rows:

    rows, logits, P, dX += P^T rows, A = P X, dL/dw from A     3 products a chunk, 2 where the logits were retained

**The exponential.** With f_i = dL/drest_i exp(-rest_i), P_ij = f_i exp(z_ij), and f commutes out of both products:
dX_i = f_i (sum_j exp(z_ij) w'_j), A_j = sum_i exp(z_ij) (f_i x_i). So where a bound on |z| keeps exp(z) and its sum
inside the range of the dtype (`exp_range.is_bounded`), the tile is exp(z) and nothing else: no running max, no
subtraction. At s = 64 f itself leaves float32's range, so A carries a common power 2^K on its sample side, undone per
class row. Everywhere else the max runs along, P = exp(z - max) <= 1 and f_i = dL/drest_i / sum_j exp(z_ij - max_i).

Numbers that look at one row a sample (the target's, the hardest class's) have exact gradients beside the products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmargin.backends.torch_ops import (
    Places,
    RowGrads,
    Rows,
    SampleGrad,
    exp_,
    finish_gradient,
    inverse_norm,
    widened,
)
from tritonmargin.backends.variants import hinge_slope
from tritonmargin.class_pass.chunks import Chunks
from tritonmargin.class_pass.exp_range import split_factor
from tritonmargin.class_pass.forward import Saved
from tritonmargin.optim.update_rules import RowUpdate
from tritonmargin.spec import InputGrads, PassGrads, PassInputs, PassSpec


class Needs(NamedTuple):
    x: bool
    weight: bool
    bias: bool


def run_backward(
    inputs: PassInputs,
    saved: tuple[Tensor, ...],
    grads: PassGrads,
    needs: tuple[bool, bool, bool],
    spec: PassSpec,
    update: RowUpdate | None = None,
) -> InputGrads:
    """See `backends.types.Backend.backward`."""
    x, stored, wanted = inputs.x, Saved(*saved[: len(Saved._fields)]), Needs(*needs)
    with torch.autocast(x.device.type, enabled=False):
        chunks = Chunks(inputs, spec)
        rows = row_grads(inputs, stored, grads, spec, chunks) if wanted.weight else RowGrads([])
        # Before an update changes the rows.
        hardest = grads.hardest_product is not None and wanted.x
        hardest_rows = chunks.gather(stored.hardest_row)[0] if hardest else None
        dense = dense_part(inputs, stored, grads, spec, rows, chunks)
        if dense is not None:
            rows = rows._replace(undo=dense.undo)
        grad_x = x.new_zeros((chunks.n, chunks.d)) if wanted.x else None
        bias = x.new_zeros(len(inputs.weight), dtype=torch.float64) if wanted.bias else None
        weight = WeightGradient(inputs, spec, chunks, rows, dense, update) if wanted.weight else None
        for start, stop in chunks.ranges():
            prepared, p = chunks.rows(start, stop, stored.inverse), None
            if dense is not None:
                p, by_class = dlogits(chunks, dense, stored.retained, prepared, start, stop, wanted.bias)
                if grad_x is not None:
                    add_product(grad_x, p.t(), prepared.operand)
                if by_class is not None and bias is not None:
                    bias[chunks.where(start, stop)] = by_class
            if weight is not None:
                weight.add(p, prepared, start, stop)
        if grad_x is not None:
            finish_x(grad_x, stored, grads, dense, hardest_rows)
        grad_bias = None if bias is None else finish_bias(bias, inputs, stored, grads, chunks)
        return InputGrads(grad_x, None if weight is None or update is not None else weight.out, grad_bias)


# -- what goes through all logits: rest, or the hinge ----------------------------------------------------------------


class Dense(NamedTuple):
    """P without the factors that only depend on the sample: dX_i = g_i outer_i (P^T rows)_i and A = P (inner x)."""

    g: Tensor  # [N]
    fill: Callable[[Tensor, Tensor], Tensor]  # logits z and `scratch` -> P, in one of them
    left: Tensor  # [N, D]  inner x, in the dtype of the products
    scratch: Tensor | None  # a tile in the precision of sums; None: logits and P are made in the tile itself
    outer: Tensor | None = None  # [N]
    undo: Tensor | None = None  # []  undoes a power of two that `inner` carries
    retained_is_p: bool = False  # what forward retained is P itself, rather than logits


def dense_part(
    inputs: PassInputs, saved: Saved, grads: PassGrads, spec: PassSpec, rows: RowGrads, chunks: Chunks
) -> Dense | None:
    """How P is made for what was asked for; None: nothing that has a gradient looks at all logits."""
    if not chunks.n:
        return None
    if inputs.threshold is not None:
        return None if grads.hinge is None else hinge_part(grads.hinge.contiguous(), inputs.threshold, chunks, inputs.x)
    if grads.rest is None:
        return None
    g = grads.rest.contiguous()
    if spec.bounded:
        return exp_part(g, saved.total, chunks, inputs.x, rows)
    return softmax_part(g, saved, chunks, inputs.x)


def exp_part(g: Tensor, total: Tensor, chunks: Chunks, x: Tensor, rows: RowGrads) -> Dense:
    """P_ij = exp(z_ij), for logits that have a bound; in units of log 2."""
    added = [each.grad for each in rows.unit] + ([] if rows.mean is None else [rows.mean])
    outer, inner, undo = split_factor(g, total, added)
    left = chunks.operand(x * inner[:, None])
    scratch = chunks.scratch(separate=False) if chunks.adds_wide else None
    return Dense(g, lambda z, _: z.exp2_(), left, scratch, outer, undo, retained_is_p=True)


def softmax_part(g: Tensor, saved: Saved, chunks: Chunks, x: Tensor) -> Dense:
    """P_ij = exp(z_ij - shift_i). Not exp(z_ij - rest_i): rest is rounded, by 1e-5 where logits are some hundreds."""

    def fill(z: Tensor, scratch: Tensor) -> Tensor:
        return exp_(torch.sub(widened(z, scratch), saved.shift, out=scratch))

    g = g / saved.total.masked_fill(saved.total == 0, torch.inf)
    left = chunks.operand(x * g[:, None])
    if chunks.retains_p(len(saved.retained)):
        return Dense(g, fill, left, None, retained_is_p=True)
    return Dense(g, fill, left, chunks.scratch(separate=False))


def hinge_part(g: Tensor, threshold: Tensor, chunks: Chunks, x: Tensor) -> Dense:
    """P_ij = 1 where z_ij > threshold_i."""
    threshold = threshold.contiguous()

    def fill(z: Tensor, scratch: Tensor) -> Tensor:
        return hinge_slope(widened(z, scratch), threshold, scratch)

    return Dense(g, fill, chunks.operand(x * g[:, None]), chunks.scratch(separate=False))


def dlogits(
    chunks: Chunks, dense: Dense, retained: Tensor, rows: Rows, start: int, stop: int, by_class: bool
) -> tuple[Tensor, Tensor | None]:
    """P of a chunk in the dtype of the products, 0 at the targets; and sum_i g_i P_ij before it is rounded, if asked.

    What forward retained is not written to.
    """
    size = stop - start
    ready = retained[start:stop] if stop <= len(retained) else None
    if ready is not None and dense.retained_is_p:
        return ready, exact_sums(ready, dense.g) if by_class and ready.dtype == chunks.acc else None
    tile = chunks.tile_buffer[:size]
    scratch = tile if dense.scratch is None else dense.scratch[:size]
    z = chunks.product(rows, tile) if ready is None else ready
    if ready is None or chunks.adds_wide:
        z = chunks.logits(z, start, stop, scratch)
    p = dense.fill(z, scratch)
    sums = exact_sums(p, dense.g) if by_class else None
    return (p if p.dtype == tile.dtype else tile.copy_(p)), sums


# -- exact parts: what looks at one row a sample, and the mean ---------------------------------------------------------


def row_grads(inputs: PassInputs, saved: Saved, grads: PassGrads, spec: PassSpec, chunks: Chunks) -> RowGrads:
    """Gradients of class rows from the target's product and norm, the hardest class's product and the mean."""
    x, target = inputs.x, chunks.places
    unit, norm_grad = [], None
    if grads.target_product is not None:
        unit.append(SampleGrad(target, x * grads.target_product[:, None]))
    if grads.hardest_product is not None:
        unit.append(SampleGrad(Places(saved.hardest_row), x * grads.hardest_product[:, None]))
    if grads.target_norm is not None:
        norm = torch.linalg.vector_norm(saved.target_rows, dim=1)
        rows = saved.target_rows if spec.unit_weight else saved.target_rows * inverse_norm(norm)[:, None]
        norm_grad = SampleGrad(target, rows * grads.target_norm[:, None])
    return RowGrads(unit, norm_grad, None if grads.mean_logit is None else grads.mean_logit @ x)


def finish_x(grad_x: Tensor, saved: Saved, grads: PassGrads, dense: Dense | None, hardest_rows: Tensor | None) -> None:
    """The factors of the sample, and the exact parts."""
    if dense is not None:
        if dense.outer is not None:
            grad_x *= dense.outer[:, None]
        grad_x *= dense.g[:, None]
    if grads.target_product is not None:
        grad_x.addcmul_(saved.target_rows, grads.target_product[:, None])
    if hardest_rows is not None and grads.hardest_product is not None:
        grad_x.addcmul_(hardest_rows, grads.hardest_product[:, None])
    if grads.mean_logit is not None:
        grad_x.addr_(grads.mean_logit, saved.mean_row)


def exact_sums(p: Tensor, g: Tensor) -> Tensor:  # [K, N], [N] -> [K]
    """p @ g in float64, a part at a time: it has twice the bytes of p's at least."""
    found = p.new_zeros(len(p), dtype=torch.float64)
    size = max(64, len(g) // 16)
    for part, of in zip(p.split(size, dim=1), g.split(size), strict=True):
        found += part.double() @ of.double()
    return found


def finish_bias(sums: Tensor, inputs: PassInputs, saved: Saved, grads: PassGrads, chunks: Chunks) -> Tensor:
    """dL/db from its part through all logits; what each sample does to its own class, and to the hardest one; the mean.

    The sum over a class's own samples is nearly what is taken away from it, so all of it is summed in float64 and
    rounded once.
    """
    for row, g in ((chunks.target, grads.target_bias), (saved.hardest_row, grads.hardest_product)):
        if g is not None and len(sums):
            sums.index_put_((chunks.class_at(row),), torch.where(row >= 0, g, 0.0).double(), accumulate=True)
    if grads.mean_logit is not None and inputs.mean_weight is not None:
        g = grads.mean_logit.sum(dtype=torch.float64)
        if inputs.class_ids is None:
            sums.addcmul_(inputs.mean_weight, g)
        else:
            sums.index_add_(0, inputs.class_ids, inputs.mean_weight.index_select(0, inputs.class_ids).double() * g)
    assert inputs.bias is not None
    return sums.to(inputs.bias.dtype)


class WeightGradient:
    """dL/dW, chunk by chunk, in `out`; with an update the rows of the weight instead.

    A has a buffer, and one more in the precision of sums, unless it can be made in the gradient's rows: in that
    precision, or where it is the gradient of all rows but the few that samples point at.
    """

    def __init__(
        self,
        inputs: PassInputs,
        spec: PassSpec,
        chunks: Chunks,
        rows: RowGrads,
        dense: Dense | None,
        update: RowUpdate | None,
    ) -> None:
        weight = inputs.weight
        self.inputs, self.chunks, self.rows, self.dense, self.update = inputs, chunks, rows, dense, update
        self.packed = chunks.class_ids is None or spec.sparse  # `out` has the active rows, in order
        make = torch.empty if self.packed else torch.zeros
        shape = (chunks.classes if spec.sparse else len(weight), chunks.d)
        self.out = weight if update is not None else make(shape, dtype=weight.dtype, device=weight.device)
        final = not spec.unit_weight and rows.mean is None and rows.undo is None
        direct = weight.dtype == chunks.dtype and (chunks.dtype == chunks.acc or final)
        self.direct = direct and self.packed and update is None
        self.product = chunks.x.new_empty(0 if self.direct else chunks.size, chunks.d)
        same = chunks.dtype == chunks.acc
        self.wide = self.product if same else torch.empty_like(self.product, dtype=chunks.acc)

    def add(self, p: Tensor | None, prepared: Rows, start: int, stop: int) -> None:
        """The chunk whose dlogits are P; None: 0."""
        in_place = self.packed and self.update is None
        out = self.out[start:stop] if in_place else self.out
        gradient, wide = (out, out) if self.direct else (self.product[: stop - start], self.wide[: stop - start])
        if p is not None and self.dense is not None:
            torch.mm(p, self.dense.left, out=gradient)
        a = self.chunks.select(self.inputs.mean_weight, start, stop)
        finish_gradient(
            gradient if p is not None else None, wide, prepared, start, self.rows, a, out,
            None if in_place else self.chunks.where(start, stop), self.update,
        )  # fmt: skip


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, out in the precision of sums; the product is rounded to its dtype, as that of all classes is."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    else:
        out += torch.mm(a, b)
