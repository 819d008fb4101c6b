"""The stream: logsumexp over C classes and its gradient by walking W in chunks, so that N x C never exists.

One op, `tritonmargin::stream`. The caller hands it rows x [N, D] that already carry the scale, and gets numbers per
sample back, each differentiable in x and W:

    rest               log sum_{j != y} exp(z_ij),  z_ij = x_i . w'_j + b_j,  w'_j = w_j/|w_j| or w_j
    target_product     x_i . w'_y, without the bias, from one gathered row, never through a tile
    target_norm        |w_y|
    mean_product       x_i . sum_j c_j w'_j for given class weights c
    hinge, violations  sum_{j != y} relu(z_ij - threshold_i), and how many terms are positive
    hardest_product    x_i . w'_h, without the bias, h = argmax_{j != y} z_ij

Forward walks the chunks once, backward once more (with retained tiles: not even that for them):

    forward   prepare_rows, reduce_chunk                                               1 GEMM
    backward  prepare_rows, weigh_chunk P, dX += P^T rows, A = P X, finish_rows        3 GEMMs

**The exponential.** With f_i = dL/drest_i exp(-rest_i), P_ij = f_i exp(z_ij), and f commutes out of both products:
dX_i = f_i (sum_j exp(z_ij) w'_j), A_j = sum_i exp(z_ij) (f_i x_i). So where a bound on |z| keeps exp(z) and its sum
inside the range of the dtype (`walk.is_bounded`), the tile is exp(z) and nothing else: no running max, no subtraction.
At s = 64 f itself leaves float32's range, so A carries a common power 2^K on its sample side, undone per class row.
Everywhere else the max runs along and P = exp(z - rest) <= 1.

`row` numbers are positions in the walk: class numbers, or indices into `class_ids`. A target of -1 is no class.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonmargin.kernels import falling_back, load_backend
from tritonmargin.kernels.products import as_operand, operands, products
from tritonmargin.kernels.torch_ops import Running, Shares, inverse_norm
from tritonmargin.kernels.updates import RowUpdate
from tritonmargin.walk import Walk, chunk_of, fitting_classes, retained_classes


class Streamed(NamedTuple):
    """What the op returns. Empty tensors: not asked for."""

    rest: Tensor  # [N]
    target_product: Tensor  # [N]
    target_norm: Tensor  # [N]
    mean_product: Tensor  # [N]
    hinge: Tensor  # [N]
    violations: Tensor  # [N]  not differentiable
    hardest_product: Tensor  # [N]  -inf where there is no other class
    hardest_row: Tensor  # [N]  int64, -1 where there is no other class
    total: Tensor  # [N]  exp(rest), on the bounded path; saved for backward
    mean_row: Tensor  # [D]  sum_j c_j w'_j; saved for backward
    target_rows: Tensor  # [N, D]  w'_y, 0 where there is no target; saved for backward
    retained: Tensor  # [R, N]  tiles of the first R classes; saved for backward


@torch.library.custom_op("tritonmargin::stream", mutates_args=())
@falling_back
def stream_op(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    class_ids: Tensor | None,
    bias: Tensor | None,
    class_weight: Tensor | None,
    threshold: Tensor | None,
    offset: Tensor | None,
    unit: bool,
    bounded: bool,
    want_rest: bool,
    want_hardest: bool,
    sparse: bool,
    dtype: torch.dtype,
    chunk_bytes: int,
    retain_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False), products(dtype, x, load_backend(backend).FUSED):
        dtype = operands(dtype)
        walk = Walk(x, weight, class_ids, unit, bounded, dtype, chunk_bytes, backend, exact=class_weight is not None)
        target, class_ids = target.contiguous(), walk.class_ids
        run = Running(threshold=None if threshold is None else threshold.contiguous())
        if want_rest:
            run.total = walk.per_slot(0.0, x.dtype)
            run.maximum = None if bounded else walk.per_slot(-torch.inf, x.dtype)
        if want_hardest:
            run.hardest = walk.per_slot(-torch.inf, x.dtype)
            run.hardest_row = walk.per_slot(-1, torch.int64)
        if threshold is not None:
            run.hinge, run.violations = walk.per_slot(0.0, x.dtype), walk.per_slot(0.0, x.dtype)
        kept = retained_classes(walk.n, walk.classes, walk.chunk, dtype.itemsize, retain_bytes)
        retained = walk.ops.new_tile(walk.x, kept, dtype)
        # Where a tile is read again after a difference, the difference needs a place of its own.
        scratch = walk.scratch(separate=want_rest and threshold is not None)
        mean_row = x.new_zeros(0 if class_weight is None else walk.d)
        offset = walk.scaled(offset)

        for start, stop in walk.chunks():
            prepared = walk.rows(start, stop)
            weights = walk.select(class_weight, start, stop)
            if weights is not None and prepared.exact is not None:
                mean_row += weights @ prepared.exact[:, : walk.d].to(walk.acc)
            if want_rest or want_hardest or threshold is not None:
                tile = retained[start:stop] if stop <= kept else walk.tile_buffer[: stop - start]
                chunk_bias = walk.bias(bias, offset, start, stop)
                place, keep = scratch[: stop - start], stop <= kept
                walk.ops.reduce_chunk(prepared.rows, walk.x, chunk_bias, target, start, bounded, tile, place, keep, run)

        rest, hinge, violations, hardest_product, mean_product = (x.new_empty(0) for _ in range(5))
        hardest_row = target.new_empty(0)
        total = x.new_empty(0)
        if run.total is not None:
            total, maximum = add_slots(run.total, run.maximum)
            rest = total.log()
            rest = rest if maximum is None else rest + maximum
        if run.hinge is not None and run.violations is not None:
            hinge, violations = run.hinge.sum(dim=0), run.violations.sum(dim=0)
        if run.hardest is not None and run.hardest_row is not None:
            hardest, hardest_row = hardest_slot(run.hardest, run.hardest_row)
            product = (x * walk.gather(hardest_row)[0]).sum(dim=1)
            hardest_product = torch.where((hardest_row < 0) | hardest.isnan(), hardest, product)
        if class_weight is not None:
            mean_product = x @ mean_row
        target_rows, target_norm = walk.gather(target)
        return Streamed(
            rest=rest,
            target_product=(x * target_rows).sum(dim=1),
            target_norm=target_norm,
            mean_product=mean_product,
            hinge=hinge,
            violations=violations,
            hardest_product=hardest_product,
            hardest_row=hardest_row,
            total=total if bounded else x.new_empty(0),
            mean_row=mean_row,
            target_rows=target_rows,
            retained=retained,
        )


@stream_op.register_fake
def _(  # type: ignore[no-untyped-def]
    x, weight, target, class_ids, bias, class_weight, threshold, offset, unit, bounded, want_rest, want_hardest,
    sparse, dtype, chunk_bytes, retain_bytes, backend,
):  # fmt: skip
    n, d = x.shape
    classes = weight.shape[0] if class_ids is None else class_ids.shape[0]
    ops, dtype = load_backend(backend), operands(dtype)
    # Nothing or everything is kept whatever a chunk is. Tracing its model for nothing would tie the graph to N.
    kept_part = 0 < fitting_classes(n, dtype.itemsize, retain_bytes) < classes
    chunk = chunk_of(ops, x, dtype, classes, chunk_bytes) if kept_part else 1
    kept = retained_classes(n, classes, chunk, dtype.itemsize, retain_bytes)
    return Streamed(
        rest=x.new_empty(n if want_rest else 0),
        target_product=x.new_empty(n),
        target_norm=x.new_empty(n),
        mean_product=x.new_empty(0 if class_weight is None else n),
        hinge=x.new_empty(0 if threshold is None else n),
        violations=x.new_empty(0 if threshold is None else n),
        hardest_product=x.new_empty(n if want_hardest else 0),
        hardest_row=target.new_empty(n if want_hardest else 0),
        total=x.new_empty(n if bounded and want_rest else 0),
        mean_row=x.new_empty(0 if class_weight is None else d),
        target_rows=x.new_empty(n, d),
        retained=ops.new_tile(x, kept, dtype),
    )


@falling_back
def walk_back(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    class_ids: Tensor | None,
    bias: Tensor | None,
    class_weight: Tensor | None,
    offset: Tensor | None,
    shift: Tensor | None,
    hardest_row: Tensor,
    mean_row: Tensor,
    target_rows: Tensor,
    retained: Tensor,
    g_walk: Tensor | None,
    g_target: Tensor | None,
    g_norm: Tensor | None,
    g_mean: Tensor | None,
    g_hardest: Tensor | None,
    kind: str,
    unit: bool,
    sparse: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    dtype: torch.dtype,
    chunk_bytes: int,
    backend: str,
    update: RowUpdate | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dx, dL/dW and dL/db from the gradients of what the forward pass returned.

    With `update` there is no dL/dW: the rows of W are updated as soon as a chunk's gradient is finished.
    """
    with torch.autocast(x.device.type, enabled=False), products(dtype, x, load_backend(backend).FUSED):
        dtype = operands(dtype)
        walk = Walk(x, weight, class_ids, unit, kind == "exp", dtype, chunk_bytes, backend)
        target, class_ids = target.contiguous(), walk.class_ids
        offset = walk.scaled(offset)
        g_walk = None if g_walk is None else g_walk.contiguous()
        shift = None if shift is None else shift.contiguous()
        make = torch.zeros if class_ids is not None and not sparse else torch.empty
        shape = walk.gradient_shape(sparse)
        width = walk.x.shape[1]  # of the products: lines as kernels like them, zeros beyond D
        grad_x = x.new_zeros((walk.n, width) if need_x else 0)
        writes = need_weight and update is None
        grad_weight = make(shape if writes else 0, dtype=weight.dtype, device=weight.device)
        grad_bias = x.new_zeros(weight.shape[0] if need_bias else 0)
        kept = retained.shape[0]
        if walk.ops.FUSED and kept:
            retained = walk.ops.as_tile(retained)  # hooks on what autograd saves may have moved it

        shares = []
        if need_weight and g_target is not None:
            shares.append(Shares(target, x * g_target[:, None]))
        if need_weight and g_hardest is not None:
            shares.append(Shares(hardest_row, x * g_hardest[:, None]))
        norm_shares = None
        if need_weight and g_norm is not None:
            norm = torch.linalg.vector_norm(target_rows, dim=1)
            unit_rows = target_rows if unit else target_rows * inverse_norm(norm)[:, None]
            norm_shares = Shares(target, unit_rows * g_norm[:, None])
        mean_share = None if g_mean is None else g_mean @ x
        # Before an update changes them.
        hardest_rows = walk.gather(hardest_row)[0] if need_x and g_hardest is not None else None

        # The sample side of both products: dX_i = g_i outer_i (P^T rows)_i and A = P (inner x).
        outer = factor = None
        left = x
        if not walk.n:
            g_walk = None
        if g_walk is not None and shift is not None:
            shift = finite(shift) if kind == "softmax" else shift
            beside = [share.along for share in shares] + ([] if mean_share is None else [mean_share])
            outer, inner, factor = split_factor(g_walk, shift, beside) if kind == "exp" else (None, g_walk, None)
            left = as_operand(x * inner[:, None], dtype)
            left = F.pad(left, (0, width - walk.d)) if width > walk.d else left

        # A has a buffer, and one more in the precision of sums, unless it can be made in the gradient's rows: in that
        # precision, or where it is the gradient of all rows but the few that samples point at.
        rows_of_walk = class_ids is None or sparse
        final = not walk.ops.FUSED and not unit and mean_share is None and factor is None
        direct = grad_weight.dtype == dtype and (dtype == walk.acc or final)
        direct = direct and rows_of_walk and writes and width == walk.d
        product = walk.x.new_empty(walk.chunk if need_weight and not direct else 0, width)
        wide = product if walk.ops.FUSED or dtype == walk.acc else product.to(walk.acc)
        scratch = walk.tile_buffer if kind == "exp" else walk.scratch(separate=False)

        for start, stop in walk.chunks():
            prepared = walk.rows(start, stop)
            rows = prepared.rows
            size = stop - start
            share = None
            if g_walk is not None and shift is not None:
                ready = retained[start:stop] if stop <= kept else None
                chunk_bias = walk.bias(bias, offset, start, stop)
                tile, place = walk.tile_buffer[:size], scratch[:size]
                share, by_class = walk.ops.weigh_chunk(
                    rows, walk.x, chunk_bias, target, start, kind, shift, tile, place, ready,
                    g_walk if need_bias else None,
                )  # fmt: skip
                if need_x:
                    add_product(grad_x, share.t(), rows)
                if by_class is not None:
                    grad_bias[slice(start, stop) if class_ids is None else class_ids[start:stop]] = by_class
            if not need_weight:
                continue
            out = weight if update is not None else grad_weight[start:stop] if rows_of_walk else grad_weight
            gradient, gradient_wide = (out, out) if direct else (product[:size], wide[:size])
            if share is not None:
                torch.mm(share, left, out=gradient)
            weights = walk.select(class_weight, start, stop)
            mean = None if weights is None or mean_share is None else (weights, mean_share)
            # Where the chunk's rows are in `out`; None: they are all of it.
            place_in: slice | Tensor | None = None
            if update is not None or not rows_of_walk:
                place_in = slice(start, stop) if class_ids is None else class_ids[start:stop]
            walk.ops.finish_rows(
                None if share is None else gradient, gradient_wide, prepared, start, shares, norm_shares, mean, factor,
                out, place_in, update,
            )  # fmt: skip

        if need_x:
            grad_x = grad_x[:, : walk.d].contiguous()
            if outer is not None:
                grad_x *= outer[:, None]
            if g_walk is not None:
                grad_x *= g_walk[:, None]
            if g_target is not None:
                grad_x.addcmul_(target_rows, g_target[:, None])
            if hardest_rows is not None and g_hardest is not None:
                grad_x.addcmul_(hardest_rows, g_hardest[:, None])
            if g_mean is not None:
                grad_x.addr_(g_mean, mean_row)
        return grad_x, grad_weight, grad_bias.to(bias.dtype) if bias is not None else grad_bias


def without(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one that has no such parameter: what an op's schema cannot express."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        return function(*args)

    signature = inspect.signature(function)
    kept = [parameter for parameter in signature.parameters.values() if parameter.name != name]
    run.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return run


stream_backward_op = torch.library.custom_op(
    "tritonmargin::stream_backward", without("update", walk_back), mutates_args=()
)


@stream_backward_op.register_fake
def _(  # type: ignore[no-untyped-def]
    x, weight, target, class_ids, bias, class_weight, offset, shift, hardest_row, mean_row, target_rows, retained,
    g_walk, g_target, g_norm, g_mean, g_hardest, kind, unit, sparse, need_x, need_weight, need_bias, dtype, chunk_bytes,
    backend,
):  # fmt: skip
    rows = class_ids.shape[0] if class_ids is not None and sparse else weight.shape[0]
    return (
        x.new_empty((x.shape[0], x.shape[1]) if need_x else 0),
        weight.new_empty((rows, weight.shape[1]) if need_weight else 0),
        x.new_empty(weight.shape[0] if need_bias else 0, dtype=x.dtype if bias is None else bias.dtype),
    )


def setup_stream(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, target, class_ids, bias, class_weight, threshold, offset = inputs[:8]
    (ctx.unit, bounded, want_rest, _, ctx.sparse, ctx.dtype, ctx.chunk_bytes, _, ctx.backend) = inputs[8:]
    out = Streamed(*output)
    ctx.kind = "hinge" if threshold is not None else "exp" if bounded else "softmax"
    shift = threshold if threshold is not None else (out.total if bounded else out.rest) if want_rest else None
    ctx.save_for_backward(
        x, weight, target, class_ids, bias, class_weight, offset, shift, out.hardest_row, out.mean_row,
        out.target_rows, out.retained,
    )  # fmt: skip
    ctx.set_materialize_grads(False)
    constants = [out.violations, out.hardest_row, out.total, out.mean_row, out.target_rows, out.retained]
    ctx.mark_non_differentiable(*constants, *([out.rest] if ctx.kind == "hinge" else []))


def differentiate_stream(ctx, *grads):  # type: ignore[no-untyped-def]
    arguments = backward_arguments(ctx, ctx.saved_tensors, grads, ctx.needs_input_grad)
    weight, class_ids = arguments[1], arguments[3]
    need_x, need_weight, _, _, need_bias = ctx.needs_input_grad[:5]
    grad_x, grad_weight, grad_bias = stream_backward_op(*arguments)
    if need_weight and ctx.sparse:
        ids = torch.arange(weight.shape[0], device=weight.device) if class_ids is None else class_ids
        grad_weight = torch.sparse_coo_tensor(
            ids[None], grad_weight, weight.shape, is_coalesced=True, check_invariants=False
        )
    found = (grad_x if need_x else None, grad_weight if need_weight else None, None, None)
    return (*found, grad_bias if need_bias else None, *[None] * 12)


def backward_arguments(ctx, saved, grads, wanted):  # type: ignore[no-untyped-def]
    """What `walk_back` is called with: what forward saved, and the gradients of its outputs."""
    g_rest, g_target, g_norm, g_mean, g_hinge, _, g_hardest = grads[:7]
    class_weight, shift, hardest_row = saved[5], saved[7], saved[8]
    need_x, need_weight, _, _, need_bias = wanted[:5]
    # Outputs that nobody asked for are empty, and so would be their gradients.
    g_walk = g_hinge if ctx.kind == "hinge" else g_rest if shift is not None else None
    g_mean = g_mean if class_weight is not None else None
    g_hardest = g_hardest if hardest_row.shape[0] == saved[0].shape[0] else None
    return (
        *saved, g_walk, g_target, g_norm, g_mean, g_hardest, ctx.kind, ctx.unit, ctx.sparse,
        need_x, need_weight, need_bias, ctx.dtype, ctx.chunk_bytes, ctx.backend,
    )  # fmt: skip


class Updater(Protocol):
    """An optimiser that can update rows while backward walks them: `tritonmargin.optim.RowOptimizer`."""

    def begin_in_backward(self, weight: Tensor) -> RowUpdate: ...

    def finish_in_backward(self, weight: Tensor, update: RowUpdate, ids: Tensor | None) -> None: ...


class UpdatingStream(torch.autograd.Function):
    """The op, with an optimiser that updates W's rows inside backward: W gets no gradient."""

    @staticmethod
    def forward(ctx: Any, updater: Updater, *inputs: Any) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = stream_op(*inputs)
        ctx.updater, ctx.weight, ctx.done = updater, inputs[1], False
        setup_stream(ctx, inputs, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if ctx.done:
            raise RuntimeError(
                "tritonmargin: a second backward through a loss whose weight was updated in its first one "
                "(update_in_backward): the weight is no longer the one of the forward pass"
            )
        wanted = ctx.needs_input_grad[1:]
        update = ctx.updater.begin_in_backward(ctx.weight) if wanted[1] and is_trained(ctx.weight) else None
        ctx.done = update is not None
        saved = ctx.saved_tensors
        arguments = backward_arguments(ctx, saved, grads, (wanted[0], update is not None, *wanted[2:]))
        grad_x, _, grad_bias = walk_back(*arguments[:-1], backend=arguments[-1], update=update)
        if update is not None:
            ctx.updater.finish_in_backward(ctx.weight, update, saved[3])
        bias = grad_bias if wanted[4] else None
        return (None, grad_x if wanted[0] else None, None, None, None, bias, *[None] * 12)


def is_trained(weight: Tensor) -> bool:
    """Whether this backward is about the weight: `torch.autograd.grad(loss, x)` must not update it."""
    return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(weight).node)


def no_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(
        "tritonmargin: the loss can be differentiated once; its gradient has no gradient (double backward). "
        'Use tm.use_backend("reference") for second derivatives on small problems.'
    )


stream_op.register_autograd(differentiate_stream, setup_context=setup_stream)
stream_backward_op.register_autograd(no_double_backward)


def stream(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    class_ids: Tensor | None = None,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    threshold: Tensor | None = None,
    offset: Tensor | None = None,
    unit: bool,
    bounded: bool,
    want_rest: bool,
    want_hardest: bool,
    sparse: bool,
    dtype: torch.dtype,
    chunk_bytes: int,
    retain_bytes: int,
    backend: str,
    updater: Updater | None = None,
) -> Streamed:
    """The op with its outputs named; see the module's docstring.

    With `updater` W gets no gradient: its rows are updated while backward walks them.
    """
    inputs = (
        x, weight, target, class_ids, bias, class_weight, threshold, offset, unit, bounded, want_rest, want_hardest,
        sparse, dtype, chunk_bytes, retain_bytes, backend,
    )  # fmt: skip
    if updater is not None and weight.requires_grad and torch.is_grad_enabled():
        return Streamed(*UpdatingStream.apply(updater, *inputs))
    return Streamed(*stream_op(*inputs))


def split_factor(g: Tensor, total: Tensor, beside: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """f = g exp(-rest) = g / total so that neither product leaves the dtype's range, rows of any ease side by side.

    dX_i = g_i (1/total_i (sum_j exp(z_ij) w'_j)) stays in range from inside out. A = sum_i exp(z_ij) f_i x_i mixes the
    samples: A carries 2^K, exact, the largest power that leaves room above max |f|, above max |g| times the number of
    samples, and above what is added `beside` the sum, and whose inverse is a normal number.

    Returns 1/total [N], 2^K f [N], 2^-K [].
    """
    # A sample with no other class has total 0, and no gradient.
    inverse = total.masked_fill(total == 0, torch.inf).reciprocal()
    room, size = math.log2(torch.finfo(g.dtype).max), g.abs()
    power = torch.minimum(room - 30.0 - size.amax().log2(), room - 10.0 - (size.log2() + inverse.log2()).amax())
    for share in beside:
        power = torch.minimum(power, room - 27.0 - torch.linalg.vector_norm(share, torch.inf).log2())
    power = power.floor().clamp(max=room - 27.0).nan_to_num(nan=0.0, neginf=0.0)
    scale = torch.pow(2.0, power)
    return inverse, (g * scale) * inverse, scale.reciprocal()


def add_slots(total: Tensor, maximum: Tensor | None) -> tuple[Tensor, Tensor | None]:  # [slots, N] -> [N]
    """The sum of exp(z - maximum) over all classes, and the maximum, from the sums that the slots hold."""
    if maximum is None:
        return total.sum(dim=0), None
    if total.shape[0] == 1:
        return total[0], finite(maximum[0])
    highest = finite(maximum.amax(dim=0))
    return (total * torch.exp(maximum - highest)).sum(dim=0), highest


def hardest_slot(hardest: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:  # [slots, N] -> [N]
    """The hardest logit of all slots and its row, the lowest of equal ones."""
    if row.shape[0] == 1:
        return hardest[0], row[0]
    highest = hardest.amax(dim=0)
    absent = torch.iinfo(row.dtype).max
    lowest = torch.where((hardest == highest) & (row >= 0), row, absent).amin(dim=0)
    # A logit that is nan equals nothing: its sample keeps the row that some slot has.
    return highest, torch.where(lowest == absent, row.amax(dim=0), lowest)


def finite(shift: Tensor) -> Tensor:
    """0 where no class but the target was walked and shift is -inf: -inf - -inf would be nan."""
    return shift.masked_fill(shift == -torch.inf, 0.0)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, out in the precision of sums; the product is rounded to its dtype, as that of all classes is."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    else:
        out += torch.mm(a, b)
