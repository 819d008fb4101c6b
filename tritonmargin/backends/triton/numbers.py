"""The class pass as numbers per sample, for margins and objectives in PyTorch; see `backends.types.Backend`."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonmargin.backends.triton import row_kernels as rows_of
from tritonmargin.backends.triton.backward import Backward, Exact, Wanted
from tritonmargin.backends.triton.class_pass import Saved, Slots, forward_pass
from tritonmargin.backends.triton.launch import blocks, call
from tritonmargin.backends.triton.plan import LINE, Plan, kept_copies, plan_for
from tritonmargin.optim.update_rules import RowUpdate
from tritonmargin.spec import InputGrads, PassGrads, PassInputs, PassOutput, PassSpec

COUNT = len(Saved._fields)


def forward(inputs: PassInputs, spec: PassSpec) -> tuple[PassOutput, tuple[Tensor, ...]]:
    plan = plan_for(inputs.x, inputs.weight, inputs.class_ids, spec)
    saved, slots = forward_pass(inputs, spec, plan)
    n, x = plan.n, inputs.x
    empty = x.new_empty(0, dtype=torch.float32)
    bias = None if inputs.bias is None else torch.empty(n, dtype=torch.float32, device=x.device)
    asked = (spec.want_rest, True, True, True, inputs.mean_weight is not None)
    out = [torch.empty(n, dtype=torch.float32, device=x.device) if each else empty for each in asked]
    if n:
        call(
            rows_of.numbers_kernel, blocks(plan.line, 8), slots.total, slots.maximum, slots.mean, saved.numbers,
            (*out, bias), n, plan.line, blocks(min(plan.forward_chunk, plan.active), plan.reduce.shape[1]),
            BLOCK_N=8, BLOCK_S=256, num_warps=8,
        )  # fmt: skip
    rest, product, norm_w, norm_x, mean = out
    if inputs.threshold is not None and n:
        saved.numbers[rows_of.REST.value, :n] = inputs.threshold * rows_of.LOG2E.value
    hinge, violations = empty, empty
    if slots.hinge is not None and slots.violations is not None:
        hinge, violations = slots.hinge.sum(dim=0), slots.violations.sum(dim=0)
    hardest_product, hardest_row, exact = empty, empty.to(torch.int64), None
    if slots.hardest is not None and slots.hardest_row is not None:
        hardest_product, hardest_row, exact = hardest_of(inputs, spec, plan, saved, slots)
    output = PassOutput(
        rest=rest,
        target_product=product,
        target_norm=norm_w,
        target_bias=empty if bias is None else bias,
        embedding_norm=norm_x,
        mean_logit=mean,
        hinge=hinge,
        violations=violations,
        hardest_product=hardest_product,
        hardest_row=hardest_row,
    )
    kept = [*saved, *(exact or ())]
    return output, tuple(empty if each is None else each for each in kept)


def hardest_of(
    inputs: PassInputs, spec: PassSpec, plan: Plan, saved: Saved, slots: Slots
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The exact product with the hardest class's row, its position; and position, row and product for backward."""
    assert slots.hardest is not None
    assert slots.hardest_row is not None
    highest, row = hardest_slot(slots.hardest, slots.hardest_row)
    found = row.clamp(min=0).long()
    place = found if inputs.class_ids is None or not plan.active else inputs.class_ids.index_select(0, found)
    rows = inputs.x.new_zeros((plan.n, plan.d), dtype=torch.float32)
    if plan.active:
        rows = torch.where(row[:, None] >= 0, inputs.weight.index_select(0, place).float(), 0.0)
    if spec.unit_weight:
        norm = torch.linalg.vector_norm(rows, dim=1)
        rows = rows * torch.where(norm < rows_of.SMALLEST.value, 0.0, 1.0 / norm)[:, None]
    factor = torch.full_like(highest, spec.scale)
    if spec.unit_embeddings:
        factor = factor * saved.numbers[rows_of.INVERSE_X.value, : plan.n]
    valid = saved.label[: plan.n] != rows_of.IGNORED.value
    x = torch.where(valid[:, None], inputs.x.float(), 0.0)
    product = (x * rows).sum(dim=1) * factor
    logit = product if inputs.bias is None or not plan.active else product + inputs.bias.index_select(0, place)
    exact = torch.where((row < 0) | highest.isnan(), highest, logit)
    position = torch.full((plan.line,), -2, dtype=torch.int32, device=row.device)
    position[: plan.n] = torch.where(valid, row, -2)  # backward must not read an ignored embedding: it may be nan
    products = torch.zeros(plan.line, dtype=torch.float32, device=row.device)
    products[: plan.n] = product
    return exact, row.long(), (position, rows, products)


def hardest_slot(hardest: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:  # [slots, N] -> [N]
    """The hardest logit of all slots and its position, the lowest of equal ones."""
    if row.shape[0] == 0:
        return hardest.new_full(hardest.shape[1:], -torch.inf), row.new_full(row.shape[1:], -1)
    highest = hardest.amax(dim=0)
    absent = torch.iinfo(row.dtype).max
    lowest = torch.where((hardest == highest) & (row >= 0), row, absent).amin(dim=0)
    # A logit that is nan equals nothing: its sample keeps the row that some slot has.
    return highest, torch.where(lowest == absent, row.amax(dim=0), lowest)


def saved_from(saved: tuple[Tensor, ...]) -> Saved:
    """Empty tensors stand for what was not made, for an operator gives tensors alone."""
    xs, numbers, label, class_numbers, target_rows, rows, logits = saved[:COUNT]
    made = [each if each.numel() else None for each in (class_numbers, rows, logits)]
    return Saved(xs, numbers, label, made[0], target_rows, made[1], made[2])


def backward(
    inputs: PassInputs,
    saved: tuple[Tensor, ...],
    grads: PassGrads,
    needs: tuple[bool, bool, bool],
    spec: PassSpec,
    update: RowUpdate | None = None,
) -> InputGrads:
    plan = plan_for(inputs.x, inputs.weight, inputs.class_ids, spec)
    kept = saved_from(saved)
    made = torch.empty((rows_of.GRADS, plan.line), dtype=torch.float32, device=inputs.x.device)
    pass_grad = grads.hinge if inputs.threshold is not None else grads.rest
    if not plan.n:
        pass_grad = None
    given = (
        pass_grad,
        grads.target_product,
        grads.embedding_norm,
        grads.target_norm,
        grads.mean_logit,
        grads.target_bias,
    )
    strided = tuple(None if each is None else (each, each.stride(0)) for each in given)
    if plan.line:
        call(rows_of.gradients_kernel, blocks(plan.line, 128), saved[1], strided, made, plan.n, plan.line,
             IS_REST=pass_grad is not None and inputs.threshold is None, BLOCK=128)  # fmt: skip
    hardest = None
    if grads.hardest_product is not None:
        gradient = torch.zeros(plan.line, dtype=torch.float32, device=inputs.x.device)
        gradient[: plan.n] = grads.hardest_product
        position, rows, product = saved[COUNT : COUNT + 3]
        hardest = Exact(position, rows, product, gradient)
    wanted = Wanted(
        *needs,
        through=pass_grad is not None or grads.mean_logit is not None,
        norm=grads.embedding_norm is not None,
        weight_norm=grads.target_norm is not None,
    )
    return Backward(inputs, kept, spec, plan, made, (), wanted, update, hardest).run()


def fake(inputs: PassInputs, spec: PassSpec) -> tuple[PassOutput, tuple[Tensor, ...]]:
    """Empty tensors like those of `forward`, for any N."""
    x, weight = inputs.x, inputs.weight
    n, d = x.shape
    active = weight.shape[0] if inputs.class_ids is None else inputs.class_ids.shape[0]
    line, line_n, line_d = (n + LINE - 1) // LINE * LINE, (n + 15) // 16 * 16, (d + 15) // 16 * 16

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    empty = made(0)
    hinging, hardest = inputs.threshold is not None, n if spec.want_hardest else 0
    per_row = spec.unit_weight or any(each is not None for each in (inputs.bias, inputs.offset, inputs.mean_weight))
    retained = plan_for(x, weight, inputs.class_ids, spec).retained if spec.retain_bytes > 0 else 0
    output = PassOutput(
        rest=made(n) if spec.want_rest else empty,
        target_product=made(n),
        target_norm=made(n),
        target_bias=empty if inputs.bias is None else made(n),
        embedding_norm=made(n),
        mean_logit=empty if inputs.mean_weight is None else made(n),
        hinge=made(n) if hinging else empty,
        violations=made(n) if hinging else empty,
        hardest_product=made(hardest),
        hardest_row=made(hardest, dtype=torch.int64),
    )
    saved = Saved(
        xs=made(line_n, line_d, dtype=spec.dtype),
        numbers=made(rows_of.NUMBERS, line),
        label=made(line, dtype=torch.int32),
        class_numbers=made(rows_of.CLASS_NUMBERS, active) if per_row else empty,
        target_rows=made(n, d, dtype=weight.dtype),
        rows=made(active, line_d, dtype=spec.dtype) if kept_copies(x, weight, inputs.class_ids, spec) else empty,
        logits=made(retained, line_n) if retained else empty,
    )
    exact = (made(line, dtype=torch.int32), made(n, d), made(line)) if spec.want_hardest else ()
    return output, (*saved, *exact)
