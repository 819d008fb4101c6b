"""What a backend is: forward and backward of a class pass, and what a compiler has to know of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from tritonmargin.margins import Margin
from tritonmargin.optim.update_rules import RowUpdate
from tritonmargin.spec import InputGrads, LossInputs, LossOptions, PassGrads, PassInputs, PassOutput, PassSpec

if TYPE_CHECKING:
    from tritonmargin.optim.row_optimizer import RowOptimizer


class Backend(Protocol):
    """Computes class passes. Stateless: what backward needs is what forward returned.

    A kernel that cannot be compiled or launched raises `registry.KernelError`. Without a choice of the user the loss
    then falls back to the torch backend.
    """

    name: str
    normalises: bool  # takes embeddings and class numbers as they are, see PassInputs, and gives |x| itself

    def forward(self, inputs: PassInputs, spec: PassSpec) -> tuple[PassOutput, tuple[Tensor, ...]]:
        """The output, and at most `class_pass.op.SAVED` tensors that backward needs beside the inputs.

        Each output is a tensor of its own, also an empty one. What is saved may be one of the outputs.
        """
        ...

    def backward(
        self,
        inputs: PassInputs,
        saved: tuple[Tensor, ...],
        grads: PassGrads,
        needs: tuple[bool, bool, bool],
        spec: PassSpec,
        update: RowUpdate | None = None,
    ) -> InputGrads:
        """Gradients of x, weight and bias, those that `needs` names.

        `saved` may have empty tensors behind those that forward returned. With `update` the weight has no gradient:
        its rows are updated as soon as theirs is finished.
        """
        ...

    def fake(self, inputs: PassInputs, spec: PassSpec) -> tuple[PassOutput, tuple[Tensor, ...]]:
        """What forward returns, as empty tensors: shapes, dtypes and strides for a compiler."""
        ...

    def fused(
        self,
        inputs: LossInputs,
        margin: Margin,
        options: LossOptions,
        compute: torch.dtype,
        updater: RowOptimizer | None = None,
    ) -> Tensor | None:
        """The whole loss, reduction included, or None where this backend does not fuse what is asked for.

        Asked for objective "softmax" without statistics, on one rank. The labels have been looked at, if they are at
        all; `inputs.class_ids` are the active classes, drawn or given.
        """
        ...
