"""The class pass in plain PyTorch, on any device: the reference of what other backends compute."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tritonmargin.backends.types import Backend
from tritonmargin.class_pass.backward import run_backward
from tritonmargin.class_pass.forward import fake_forward, run_forward
from tritonmargin.optim.update_rules import RowUpdate
from tritonmargin.spec import InputGrads, PassGrads, PassInputs, PassOutput, PassSpec


class TorchBackend:
    """See `backends.types.Backend`."""

    name = "torch"
    normalises = False

    def forward(self, inputs: PassInputs, spec: PassSpec) -> tuple[PassOutput, tuple[Tensor, ...]]:
        return run_forward(inputs, spec)

    def backward(
        self,
        inputs: PassInputs,
        saved: tuple[Tensor, ...],
        grads: PassGrads,
        needs: tuple[bool, bool, bool],
        spec: PassSpec,
        update: RowUpdate | None = None,
    ) -> InputGrads:
        return run_backward(inputs, saved, grads, needs, spec, update)

    def fake(self, inputs: PassInputs, spec: PassSpec) -> tuple[PassOutput, tuple[Tensor, ...]]:
        return fake_forward(inputs, spec)

    def fused(self, *_: Any, **__: Any) -> None:
        return None


BACKEND: Backend = TorchBackend()
