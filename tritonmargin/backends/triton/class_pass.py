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

from tritonmargin.backends.tiles import row_block
from tritonmargin.backends.triton import products
from tritonmargin.backends.triton import row_kernels as rows_of
from tritonmargin.backends.triton.launch import blocks, call
from tritonmargin.backends.triton.logits_kernels import reduce_kernel
from tritonmargin.backends.triton.plan import Plan
from tritonmargin.backends.triton.products import described
from tritonmargin.spec import PassInputs, PassSpec


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
        rows_of.rows_kernel, n + (n < line), x, weight, target, ids, per_class, xs, target_rows, numbers, label, n,
        line, weight.shape[0], plan.active, spec.first_class, spec.ignore_index, plan.active.bit_length() + 1,
        spec.scale, x.stride(), weight.stride(), plan.line_d,
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
    a = described(xs, tile.shape[0], tile.shape[2]) if use else xs
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
            products.multiply(rows, xs.t(), z, plan.precision)
            made, b, stride_z = z, cast(Any, None), plan.line_n
        elif use:
            b = described(rows, tile.shape[1], tile.shape[2])
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
