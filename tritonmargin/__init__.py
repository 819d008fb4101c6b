"""tritonmargin: softmax cross-entropy with margins over millions of classes, without the N x C logits."""

import importlib
from typing import TYPE_CHECKING

from tritonmargin import optim, reference
from tritonmargin.backends.registry import use_backend
from tritonmargin.distributed.clip import clip_grad_norm_
from tritonmargin.functional import linear_cross_entropy, margin_cross_entropy
from tritonmargin.margins import (
    Annealing,
    ArcFace,
    ASoftmax,
    CombinedMargin,
    CosFace,
    L2Softmax,
    LSoftmax,
    Margin,
    NormFace,
    Softmax,
    SphereFaceR,
    TargetRows,
    WarmUp,
)
from tritonmargin.modules import MarginSoftmaxLoss
from tritonmargin.sampling import sample_classes
from tritonmargin.spec import Stats

if TYPE_CHECKING:
    from tritonmargin import checkpoint

__version__ = "0.1.0"

__all__ = [
    "ASoftmax",
    "Annealing",
    "ArcFace",
    "CombinedMargin",
    "CosFace",
    "L2Softmax",
    "LSoftmax",
    "Margin",
    "MarginSoftmaxLoss",
    "NormFace",
    "Softmax",
    "SphereFaceR",
    "Stats",
    "TargetRows",
    "WarmUp",
    "checkpoint",
    "clip_grad_norm_",
    "linear_cross_entropy",
    "margin_cross_entropy",
    "optim",
    "reference",
    "sample_classes",
    "use_backend",
]


if not TYPE_CHECKING:  # a checker would take every name for known

    def __getattr__(name):
        """`tm.checkpoint` when it is first used: torch.distributed.checkpoint takes longer to import than the rest."""
        if name == "checkpoint":
            return importlib.import_module("tritonmargin.checkpoint")
        raise AttributeError(f"module 'tritonmargin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
