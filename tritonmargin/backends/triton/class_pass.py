"""One class pass on a GPU: the launches of forward and backward.

forward    rows_kernel     x' in the compute dtype, the target's exact product, labels        a program a sample
           classes_kernel  1/|w_j|, and w'_j where the products cannot take W as it is       (each chunk of copies)
           reduce_kernel   z tile by tile, folded into numbers per sample and slot            (each chunk of copies)
           numbers_kernel, or loss_kernel and sum_kernel: the slots' sums; margin and loss
backward   weigh_kernel    P = dL/dz, and sums over samples                                         each chunk
           addmm           dX' += P^T W, in float32                                                 each chunk
           finish_kernel   dL/dW, or the optimiser's update of the rows                             each chunk
           back_kernel     dX' -> dX                                                         a program a sample
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tritonmargin.backends.precision import multiplying
from tritonmargin.backends.tiles import row_block
from tritonmargin.backends.triton import row_kernels as rows_of
from tritonmargin.backends.triton.finish_kernel import finish_kernel
from tritonmargin.backends.triton.launch import blocks, call
from tritonmargin.backends.triton.logits_kernels import reduce_kernel, weigh_kernel
from tritonmargin.backends.triton.plan import Plan
from tritonmargin.backends.triton.update_rules import TRITON_RULES
from tritonmargin.optim.update_rules import RowUpdate, corrections, mixed
from tritonmargin.spec import InputGrads, PassInputs, PassSpec


class Saved(NamedTuple):
    """What backward needs beside the inputs."""

    xs: Tensor  # [line_n, line_d]  x' as the products take it
    numbers: Tensor  # [NUMBERS, line]
    label: Tensor  # [line]  int32 position in the pass, -1 elsewhere, -2 ignored
    class_numbers: Tensor | None  # [CLASS_NUMBERS, active]
    target_rows: Tensor  # [N, D]
    rows: Tensor | None  # [active, line_d]  copied class rows
    logits: Tensor | None  # [retained, line_n]


class Slots(NamedTuple):
    """Numbers per slot and sample; None: nobody asked."""

    total: Tensor | None
    maximum: Tensor | None
    hardest: Tensor | None
    hardest_row: Tensor | None
    hinge: Tensor | None
    violations: Tensor | None
    mean: Tensor | None


def described(matrix: Tensor, block: tuple[int, int], use: bool) -> Any:
    return TensorDescriptor(matrix, matrix.shape, matrix.stride(), list(block)) if use else matrix


def forward_pass(
    inputs: PassInputs, spec: PassSpec, plan: Plan, class_weight: Tensor | None = None
) -> tuple[Saved, Slots]:
    x, weight, target, ids, bias, mean, threshold, offset = inputs
    make = functools.partial(torch.empty, device=x.device)
    n, d, line = plan.n, plan.d, plan.line
    numbers = make((rows_of.NUMBERS, line), dtype=torch.float32)
    label = make(line, dtype=torch.int32)
    xs = make((plan.line_n, plan.line_d), dtype=spec.dtype)
    target_rows = make((n, d), dtype=weight.dtype)
    per_class = tuple(None if vector is None else (vector, vector.stride(0)) for vector in (bias, class_weight, mean))
    block_d = row_block(max(d, plan.line_d))[1]
    call(
        rows_of.rows_kernel, line, x, weight, target, ids, per_class, xs, target_rows, numbers, label, n, line,
        weight.shape[0], plan.active, spec.first_class, spec.ignore_index, plan.active.bit_length() + 1, spec.scale,
        x.stride(), weight.stride(), plan.line_d,
        UNIT=(spec.unit_embeddings, spec.unit_weight), ROUND=plan.precision == "tf32", D=d, BLOCK_D=block_d,
        num_warps=4,
    )  # fmt: skip
    per_row = spec.unit_weight or bias is not None or offset is not None or mean is not None
    class_numbers = make((rows_of.CLASS_NUMBERS, plan.active), dtype=torch.float32) if per_row else None
    slots = make_slots(spec, plan, make, threshold is not None, mean is not None)
    copies = None
    if plan.copied:
        copies = make((plan.active if plan.whole else plan.forward_chunk, plan.line_d), dtype=spec.dtype)
    if (per_row or copies is not None) and (plan.whole or not plan.copied):
        prepare(inputs, spec, plan, copies, class_numbers, 0, plan.active)
    retained = make((plan.retained, plan.line_n), dtype=torch.float32) if plan.retained else None
    buffer = None
    if plan.library and plan.retained < plan.active:
        buffer = make((plan.forward_chunk, plan.line_n), dtype=torch.float32)
    tile = plan.reduce
    use = tile.descriptors and n > 0  # nothing can be described to the memory accelerator that has no line
    a = described(xs, (tile.shape[0], tile.shape[2]), use)
    run = tuple(slots)
    asked = any(each is not None for each in run)
    for start in range(0, plan.active, plan.forward_chunk):
        stop = min(start + plan.forward_chunk, plan.active)
        rows = chunk_rows(inputs, spec, plan, copies, class_numbers, start, stop)
        if not asked or not n:
            continue
        b, made, stride_z = rows, a, 0
        if plan.library:
            z = retained[start:stop] if retained is not None and stop <= plan.retained else buffer[: stop - start]  # type: ignore[index]
            multiply(rows, xs.t(), z, plan.precision)
            made, b, stride_z = z, cast(Any, None), plan.line_n
        elif use:
            b = described(rows, (tile.shape[1], tile.shape[2]), use)
        call(
            reduce_kernel, tile.programs_for(n, stop - start), made, b, label, class_numbers, threshold, run, n,
            stop - start, plan.line_d, start, plan.active, plan.line_d, rows.stride(0), stride_z,
            KIND=(spec.unit_weight and not plan.copied, bias is not None or offset is not None, start > 0,
                  plan.library),
            HOW=(use, plan.precision), TILE=tile.shape, SPLIT=tile.split, **tile.options(),
        )  # fmt: skip
    kept = copies if plan.whole else None
    return Saved(xs, numbers, label, class_numbers, target_rows, kept, retained), slots


def make_slots(spec: PassSpec, plan: Plan, make: Any, hinge: bool, mean: bool) -> Slots:
    count = blocks(min(plan.forward_chunk, plan.active), plan.reduce.shape[1])

    def per_slot(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return make((count, plan.n), dtype=dtype) if wanted else None

    return Slots(
        total=per_slot(spec.want_rest),
        maximum=per_slot(spec.want_rest and not spec.bounded),
        hardest=per_slot(spec.want_hardest),
        hardest_row=per_slot(spec.want_hardest, torch.int32),
        hinge=per_slot(hinge),
        violations=per_slot(hinge),
        mean=per_slot(mean),
    )


def chunk_rows(
    inputs: PassInputs, spec: PassSpec, plan: Plan, copies: Tensor | None, class_numbers: Tensor | None, start: int,
    stop: int,
) -> Tensor:  # fmt: skip
    """Class rows of a chunk as the products take them."""
    if not plan.copied:
        return inputs.weight if stop - start == plan.active else inputs.weight[start:stop]
    assert copies is not None
    if plan.whole:
        return copies if stop - start == plan.active else copies[start:stop]
    prepare(inputs, spec, plan, copies, class_numbers, start, stop)
    return copies[: stop - start]


def prepare(
    inputs: PassInputs, spec: PassSpec, plan: Plan, copies: Tensor | None, class_numbers: Tensor | None, start: int,
    stop: int,
) -> None:  # fmt: skip
    if stop == start:
        return
    weight, mean = inputs.weight, inputs.mean_weight
    block_k, block_d, warps = row_block(plan.line_d)
    call(
        rows_of.classes_kernel, blocks(stop - start, block_k), weight, inputs.class_ids, inputs.bias, inputs.offset,
        mean, copies, class_numbers, stop - start, plan.active, start, weight.stride(), plan.line_d,
        0 if mean is None else mean.stride(0),
        UNIT=spec.unit_weight, ROUND=plan.precision == "tf32", D=plan.d, BLOCK_K=block_k, BLOCK_D=block_d,
        num_warps=warps,
    )  # fmt: skip


class Exact(NamedTuple):
    """A class row per sample that a gradient goes to outside of the products: the hardest other class's."""

    position: Tensor  # [line] int32
    rows: Tensor  # [N, D] w'_h, float32
    product: Tensor  # [line]
    gradient: Tensor  # [line]


class Needs(NamedTuple):
    x: bool
    weight: bool
    bias: bool


def backward_pass(
    inputs: PassInputs,
    saved: Saved,
    grads: Tensor,
    upstream: tuple[Tensor, ...],
    needs: Needs,
    spec: PassSpec,
    plan: Plan,
    *,
    update: RowUpdate | None = None,
    through: bool = True,
    norms: tuple[bool, bool] = (False, False),
    own_bias: bool = False,
    hardest: Exact | None = None,
) -> InputGrads:
    """Gradients from `grads` [GRADS, line] times the numbers `upstream`.

    through: whether anything comes through the logits, else through the exact rows alone. norms: whether |x| and
    whether |w_y| have gradients. own_bias: whether b_y's part of t is in grads, for nobody else will add it.
    """
    x, weight = inputs.x, inputs.weight
    make = functools.partial(torch.empty, device=x.device)
    active, through = plan.active, through and plan.n > 0 and plan.active > 0
    half = half_numbers(saved, grads, spec, plan, inputs.mean_weight is not None) if through else None
    grad_x = make((plan.line_n, plan.line_d), dtype=torch.float32) if needs.x and through else None
    grad_weight, grad_bias = None, None
    if needs.weight and update is None:
        by_ids = inputs.class_ids is not None and not spec.sparse
        shape = (active if spec.sparse else weight.shape[0], plan.d)
        grad_weight = (torch.zeros if by_ids else torch.empty)(shape, dtype=weight.dtype, device=x.device)
    if needs.bias and inputs.bias is not None:
        # A bias may be frozen or trained alone: its rows are finished with those of W.
        grad_bias = (torch.zeros if inputs.class_ids is not None else torch.empty)(
            weight.shape[0], dtype=inputs.bias.dtype, device=x.device
        )
    finishes = needs.weight or grad_bias is not None
    chunk = plan.backward_chunk
    copies = saved.rows
    if plan.copied and copies is None:
        copies = make((chunk, plan.line_d), dtype=spec.dtype)
    dlogits = make((chunk, plan.line_n), dtype=spec.dtype) if through else None
    count = blocks(plan.n, plan.weigh.shape[1])
    along = make(count * chunk, dtype=torch.float32) if through and needs.weight and spec.unit_weight else None
    by_class = make(count * chunk, dtype=torch.float32) if through and grad_bias is not None else None
    product = None
    if through and needs.weight and not plan.finish_inside:
        product = make((chunk, plan.line_d), dtype=torch.float32)
    kind = Finishing(
        grads, upstream, half, along, by_class, grad_bias, product, count, norms, own_bias, hardest, update
    )
    for start in range(0, active, chunk):
        stop = min(start + chunk, active)
        p = None
        if through and dlogits is not None:
            rows = chunk_rows(inputs, spec, plan, copies, saved.class_numbers, start, stop)
            p = dlogits if stop - start == chunk else dlogits[: stop - start]
            weigh(inputs, saved, spec, plan, rows, grads if half is None else half.grads, half, p, (along, by_class),
                  start, stop)  # fmt: skip
            if grad_x is not None:
                add_product(grad_x, p, rows, start == 0, plan.precision)
        if finishes:
            finish(inputs, saved, spec, plan, kind, p, grad_weight, start, stop)
    found_x = None
    if needs.x:
        found_x = make((plan.n, plan.d), dtype=x.dtype)
        if plan.n:
            exact = None if hardest is None else (hardest.rows, hardest.gradient, 1)
            call(
                rows_of.back_kernel, plan.n, grad_x, x, saved.numbers, grads, upstream,
                None if half is None else half.power, None if half is None else half.extremes, saved.target_rows,
                exact, found_x, plan.line, spec.scale, x.stride(), plan.line_d,
                UNIT=(spec.unit_embeddings, spec.unit_weight), NORM=norms[0], D=plan.d,
                BLOCK_D=row_block(plan.d)[1], num_warps=4,
            )  # fmt: skip
    return InputGrads(found_x, grad_weight, grad_bias)


class Half(NamedTuple):
    """float16's gradients with their powers of two aside, see `half_kernel`."""

    grads: Tensor
    extremes: Tensor
    power: Tensor
    ys: Tensor


def half_numbers(saved: Saved, grads: Tensor, spec: PassSpec, plan: Plan, mean: bool) -> Half | None:
    if spec.dtype != torch.float16:
        return None
    half = Half(torch.empty_like(grads), grads.new_empty(2), grads.new_empty(plan.line), torch.empty_like(saved.xs))
    call(
        rows_of.extremes_kernel, 1, grads, saved.numbers, half.extremes, plan.n, plan.line, spec.scale,
        UNIT_X=spec.unit_embeddings, MEAN=mean, BLOCK=1024,
    )  # fmt: skip
    call(
        rows_of.half_kernel, plan.line, grads, half.extremes, saved.xs, half.grads, half.ys, half.power, plan.n,
        plan.line, plan.line_d, MEAN=mean, BLOCK_D=row_block(plan.line_d)[1],
    )  # fmt: skip
    return half


def weigh(
    inputs: PassInputs, saved: Saved, spec: PassSpec, plan: Plan, rows: Tensor, grads: Tensor, half: Half | None,
    p: Tensor, sums: tuple[Tensor | None, Tensor | None], start: int, stop: int,
) -> None:  # fmt: skip
    tile, use = plan.weigh, plan.weigh.descriptors
    a: Any = rows
    b: Any = saved.xs
    stride_z = 0
    if plan.library:
        if saved.logits is not None and stop <= plan.retained:
            a = saved.logits[start:stop]
        else:
            multiply(rows, saved.xs.t(), p, plan.precision)
            a = p
        b, stride_z = None, plan.line_n
    elif use:
        a = described(rows, (tile.shape[0], tile.shape[2]), use)
        b = described(saved.xs, (tile.shape[1], tile.shape[2]), use)
    more = (
        inputs.bias is not None or inputs.offset is not None,
        inputs.threshold is not None,
        inputs.mean_weight is not None,
    )
    call(
        weigh_kernel, tile.programs_for(stop - start, plan.n), a, b, saved.label, saved.numbers, grads,
        None if half is None else half.power, saved.class_numbers, p, sums, plan.n, stop - start, plan.line_d, start,
        plan.line, plan.active, rows.stride(0), plan.line_d, stride_z, plan.line_n,
        KIND=(spec.unit_weight and not plan.copied, *more, plan.library), HOW=(use, plan.precision), TILE=tile.shape,
        SPLIT=tile.finer(any(more)), **tile.options(),
    )  # fmt: skip


class Finishing(NamedTuple):
    """What all calls of `finish` in one backward share."""

    grads: Tensor
    upstream: tuple[Tensor, ...]
    half: Half | None
    along: Tensor | None
    by_class: Tensor | None
    grad_bias: Tensor | None
    product: Tensor | None
    sample_blocks: int
    norms: tuple[bool, bool]
    own_bias: bool
    hardest: Exact | None
    update: RowUpdate | None


def finish(
    inputs: PassInputs, saved: Saved, spec: PassSpec, plan: Plan, kind: Finishing, p: Tensor | None,
    grad_weight: Tensor | None, start: int, stop: int,
) -> None:  # fmt: skip
    x, weight, half, update = inputs.x, inputs.weight, kind.half, kind.update
    tile, k, made = plan.finish, stop - start, 0
    a: Any = p
    b: Any = saved.xs if half is None else half.ys
    if p is None or (kind.along is None and grad_weight is None and update is None):
        a, b, made = None, None, 2
    elif not plan.finish_inside:
        assert kind.product is not None
        a = kind.product[:k]
        multiply(p, b, a, plan.precision)
        b, made = None, 1
    use = made == 0 and tile.descriptors
    stride_p = 0 if a is None else a.stride(0)
    if use:
        a = described(a, (tile.shape[0], tile.shape[2]), use)
        b = described(b, (tile.shape[2], tile.shape[1]), use)
    out, by_ids = grad_weight, inputs.class_ids is not None and not spec.sparse
    changes, rule, seed, counted = None, None, 0, None
    if update is not None:
        out, rule, by_ids = weight, TRITON_RULES[update.rule], inputs.class_ids is not None
        where = slice(start, stop) if inputs.class_ids is None else inputs.class_ids[start:stop]
        steps = None
        if update.steps is not None:
            counted = update.steps[where] + 1
            steps = tuple(each.float() for each in corrections(counted, *update.numbers[:3]))
        changes = (update.numbers, update.state, steps)
        seed = 0 if update.seed is None else mixed(update.seed, start) % (1 << 30)
    hardest = None
    if kind.hardest is not None:
        hardest = (kind.hardest.position, kind.hardest.product, kind.hardest.gradient, (1, 1))
    grad_bias = None if kind.grad_bias is None else (kind.grad_bias, True if kind.own_bias else None)
    # Each of these would spill beside as much of the tile as plain gradients leave in the registers.
    more = weight.dtype == torch.float32 or any(each is not None for each in (half, rule, grad_bias))
    call(
        finish_kernel, tile.programs_for(k, plan.d), a, b, saved.label, saved.numbers, kind.grads, saved.class_numbers,
        (kind.along, kind.by_class, grad_bias, kind.sample_blocks), (x, hardest),
        (kind.upstream, None if half is None else half.extremes), weight, inputs.class_ids, out, changes, k,
        plan.line_n, start, (plan.line, plan.active),
        (stride_p, plan.line_d, weight.stride(), 0 if out is None else out.stride(0), x.stride()), spec.scale, seed,
        KIND=(plan.d, spec.unit_weight, spec.unit_embeddings, made, spec.unit_weight and plan.copied, by_ids,
              kind.norms[1], update is not None and update.seed is not None, (use, plan.precision)),
        RULE=rule, TILE=tile.shape, SPLIT=tile.finer(more), **tile.options(),
    )  # fmt: skip
    if update is not None:
        update.touched = True
        if counted is not None and update.steps is not None:
            update.steps[where] = counted  # not before the launch: a kernel that fails leaves them as they are


# -- products that torch makes ---------------------------------------------------------------------------------------


def multiply(a: Tensor, b: Tensor, out: Tensor, precision: str) -> None:
    """out = a b for float32, as TF32 or as it is."""
    with multiplying(precision):
        torch.mm(a, b, out=out)


def add_product(out: Tensor, p: Tensor, rows: Tensor, first: bool, precision: str) -> None:
    """out (+)= p^T rows, summed in float32."""
    a = p.t()
    if p.dtype == torch.float32:
        with multiplying(precision):
            torch.addmm(out, a, rows, beta=0 if first else 1, out=out)
    elif wide_products(p.device):
        torch.addmm(out, a, rows, beta=0 if first else 1, out_dtype=torch.float32, out=out)
    else:
        torch.addmm(out, a.float(), rows.float(), beta=0 if first else 1, out=out)


@functools.cache
def wide_products(device: torch.device) -> bool:
    """Whether torch multiplies 16 bits into float32 there without copies of the operands."""
    try:
        a, out = torch.ones(16, 16, dtype=torch.bfloat16, device=device), torch.empty(16, 16, device=device)
        torch.addmm(out, a, a, beta=0, out_dtype=torch.float32, out=out)
        return True
    except (RuntimeError, TypeError):
        return False
