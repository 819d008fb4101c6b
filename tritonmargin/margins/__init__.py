"""Margins: one formula a class, in plain PyTorch on N-vectors."""

from tritonmargin.margins.angular import ArcFace, CombinedMargin, CosFace
from tritonmargin.margins.base import Margin, TargetRows
from tritonmargin.margins.multiplicative import ASoftmax, LSoftmax, SphereFaceR
from tritonmargin.margins.plain import L2Softmax, NormFace, Softmax
from tritonmargin.margins.schedules import Annealing, WarmUp

# Every margin by its name: tests and the perf suite walk this, so a new margin is tested at once.
MARGINS: dict[str, type[Margin]] = {
    margin.__name__: margin
    for margin in (
        Softmax,
        L2Softmax,
        NormFace,
        LSoftmax,
        ASoftmax,
        SphereFaceR,
        CosFace,
        ArcFace,
        CombinedMargin,
    )
}

__all__ = [*MARGINS, "MARGINS", "Annealing", "Margin", "TargetRows", "WarmUp"]
