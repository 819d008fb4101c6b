"""The whole loss in kernels: softmax cross-entropy of one rank's classes under a margin that has a formula."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tritonmargin.backends.registry import KernelError, backend_after, on_device
from tritonmargin.backends.triton import row_kernels as rows_of
from tritonmargin.backends.triton.backward import Backward, Wanted
from tritonmargin.backends.triton.class_pass import Saved, forward_pass
from tritonmargin.backends.triton.launch import blocks, call
from tritonmargin.backends.triton.plan import plan_for
from tritonmargin.class_pass.op import INPUTS, as_sparse, begin_update, once
from tritonmargin.optim.update_rules import RowUpdate
from tritonmargin.spec import InputGrads, PassInputs, PassSpec

if TYPE_CHECKING:
    from tritonmargin.margins.base import RowFormula


class Loss(NamedTuple):
    """What the loss is, beside the tensors that have gradients."""

    inputs: PassInputs
    spec: PassSpec
    formula: RowFormula
    class_weight: Tensor | None  # [C]
    mean_total: Tensor | None  # [] sum of a; None: 1
    smoothing: float
    reduction: str
    updater: Any  # RowOptimizer | None


def fused_loss(loss: Loss) -> Tensor:
    inputs = loss.inputs
    found: Tensor = FusedLoss.apply(inputs.x, inputs.weight, inputs.bias, loss)
    return found


class FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, loss: Loss) -> Tensor:
        inputs, spec, formula = loss.inputs, loss.spec, loss.formula
        plan = plan_for(x, weight, inputs.class_ids, spec)
        saved, slots = forward_pass(inputs, spec, plan, loss.class_weight)
        n, line = plan.n, plan.line
        grads = torch.empty((rows_of.GRADS, line), dtype=torch.float32, device=x.device)
        losses = torch.empty((2, n), dtype=torch.float32, device=x.device)
        assert slots.total is not None
        call(
            rows_of.loss_kernel, blocks(line, 8), slots.total, slots.maximum, slots.mean, saved.numbers, saved.label,
            grads, losses, formula.numbers, loss.mean_total, n, line, slots.total.shape[0], spec.scale, loss.smoothing,
            FORMULA=formula.function, MARGIN=formula.options, UNIT=(spec.unit_embeddings, spec.unit_weight),
            BIAS=bias is not None, WEIGHTED=loss.class_weight is not None, BLOCK_N=8, BLOCK_S=256, num_warps=8,
        )  # fmt: skip
        factor = None
        if loss.reduction == "none":
            found = losses[0]
        else:
            found, factor = grads.new_empty(()), grads.new_empty(())
            call(rows_of.sum_kernel, 1, losses, found, factor, n, MEAN=loss.reduction == "mean", BLOCK=1024)
        ctx.save_for_backward(*inputs, grads, factor, *saved)
        ctx.plan, ctx.updater, ctx.done = plan, loss.updater, False
        ctx.weight = None if loss.updater is None else weight  # what is saved may be moved by hooks
        ctx.spec, ctx.scaled = spec, formula.function is not None and not spec.unit_embeddings
        return found

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        tensors, spec = ctx.saved_tensors, ctx.spec
        inputs = PassInputs(*tensors[:INPUTS])
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        update = None
        if ctx.updater is not None:
            update = begin_update(ctx, need_weight)
            need_weight = update is not None
        wanted = Wanted(
            need_x, need_weight, need_bias,
            norm=ctx.scaled, weight_norm=ctx.scaled and not spec.unit_weight,
        )  # fmt: skip
        with on_device(inputs.x):
            found = once(
                partial(gradients, ctx, upstream, wanted, update), inputs.x, inputs.weight, inputs.bias, upstream
            )
        grad_weight = found.weight
        if update is not None:
            ctx.updater.finish_in_backward(ctx.weight, update, inputs.class_ids)
        elif grad_weight is not None and spec.sparse:
            grad_weight = as_sparse(grad_weight, inputs.weight, inputs.class_ids)
        return found.x, grad_weight, found.bias, None


def gradients(ctx: Any, upstream: Tensor, wanted: Wanted, update: RowUpdate | None) -> InputGrads:
    plan, spec, tensors = ctx.plan, ctx.spec, ctx.saved_tensors
    inputs, (grads, factor) = PassInputs(*tensors[:INPUTS]), tensors[INPUTS : INPUTS + 2]
    try:
        factors: tuple[Tensor, ...] = (upstream, factor)
        if factor is None:
            each = torch.empty_like(grads)
            call(rows_of.upstream_kernel, blocks(plan.line, 128), grads, upstream, each, plan.n, plan.line,
                 upstream.stride(0), LINES=rows_of.GRADS, BLOCK=128)  # fmt: skip
            grads, factors = each, ()
        saved = Saved(*tensors[INPUTS + 2 :])
        return Backward(inputs, saved, spec, plan, grads, factors, wanted, update).run()
    except KernelError as error:
        backend_after(error, spec.backend, update)
        raise KernelError(
            f"tritonmargin: a kernel failed in backward ({error}). The next step does without the kernels."
        ) from error
