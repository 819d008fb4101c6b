"""The class pass in Triton kernels, for CUDA and ROCm. `BACKEND` is what the rest of the library sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonmargin.backends.precision import precision_of
from tritonmargin.backends.registry import on_device
from tritonmargin.backends.triton import numbers
from tritonmargin.backends.triton.fused import Loss, fused_loss
from tritonmargin.backends.types import Backend
from tritonmargin.class_pass.exp_range import is_bounded
from tritonmargin.margins import Margin
from tritonmargin.optim.update_rules import RowUpdate
from tritonmargin.spec import InputGrads, LossInputs, LossOptions, PassGrads, PassInputs, PassOutput, PassSpec

if TYPE_CHECKING:
    from tritonmargin.optim.row_optimizer import RowOptimizer


class TritonBackend:
    """See `backends.types.Backend`."""

    name = "triton"
    normalises = True

    def forward(self, inputs: PassInputs, spec: PassSpec) -> tuple[PassOutput, tuple[Tensor, ...]]:
        with on_device(inputs.x):
            return numbers.forward(contiguous(inputs), spec)

    def backward(
        self,
        inputs: PassInputs,
        saved: tuple[Tensor, ...],
        grads: PassGrads,
        needs: tuple[bool, bool, bool],
        spec: PassSpec,
        update: RowUpdate | None = None,
    ) -> InputGrads:
        with on_device(inputs.x):
            return numbers.backward(contiguous(inputs), saved, grads, needs, spec, update)

    def fake(self, inputs: PassInputs, spec: PassSpec) -> tuple[PassOutput, tuple[Tensor, ...]]:
        return numbers.fake(inputs, spec)

    def fused(
        self,
        inputs: LossInputs,
        margin: Margin,
        options: LossOptions,
        compute: torch.dtype,
        updater: RowOptimizer | None = None,
    ) -> Tensor | None:
        formula = margin.formula(inputs.weight.device)
        if formula is None or options.logq_correction:
            return None
        embeddings, weight, target, bias, class_ids, class_weight = inputs
        active = weight.shape[0] if class_ids is None else class_ids.shape[0]
        needs_grad = torch.is_grad_enabled() and (
            embeddings.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        )
        mean, total = (
            smoothing_weights(class_weight, class_ids, weight, active) if options.label_smoothing else (None,) * 2
        )
        spec = PassSpec(
            unit_weight=margin.unit_weight,
            unit_embeddings=margin.unit_embeddings,
            scale=margin.s if margin.unit_embeddings else 1.0,
            ignore_index=options.ignore_index,
            bounded=bias is None and is_bounded(margin.logit_bound, active, torch.float32),
            want_rest=True,
            want_hardest=False,
            sparse=options.sparse_grad,
            dtype=compute,
            precision=precision_of(compute, embeddings),
            chunk_bytes=options.chunk_bytes or 0,
            retain_bytes=options.retain_bytes if needs_grad else 0,
            memory_budget=-1 if options.memory_budget is None else options.memory_budget,
            backend=self.name,
        )
        given = contiguous(PassInputs(embeddings, weight, target, class_ids, bias, mean))
        with on_device(embeddings):
            return fused_loss(
                Loss(given, spec, formula, class_weight, total, options.label_smoothing, options.reduction, updater)
            )


def contiguous(inputs: PassInputs) -> PassInputs:
    """Vectors whose numbers lie side by side: the kernels step over lines of x, W and the smoothing weights alone."""
    if inputs.target.is_contiguous() and all(
        each is None or each.is_contiguous()
        for each in (inputs.class_ids, inputs.bias, inputs.threshold, inputs.offset)
    ):
        return inputs
    return inputs._replace(
        target=inputs.target.contiguous(),
        class_ids=together(inputs.class_ids),
        bias=together(inputs.bias),
        threshold=together(inputs.threshold),
        offset=together(inputs.offset),
    )


def together(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def smoothing_weights(
    class_weight: Tensor | None, class_ids: Tensor | None, weight: Tensor, active: int
) -> tuple[Tensor, Tensor | None]:
    """a_c = class weight / active classes, [C]; and their sum over the active ones, None for 1."""
    if class_weight is None:
        return weight.new_full((), 1.0 / max(active, 1), dtype=torch.float32).expand(weight.shape[0]), None
    a = class_weight.detach().float() / max(active, 1)
    return a, (a if class_ids is None else a[class_ids]).sum()


BACKEND: Backend = TritonBackend()
