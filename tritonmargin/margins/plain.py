"""Losses without a margin: what is normalised is all that tells them apart."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonmargin.margins.base import Margin, RowFormula, TargetRows


class Softmax(Margin):
    """Softmax cross-entropy on raw products: z_ij = x_i . w_j + b_j, t = z_iy.

    The same loss as `torch.nn.functional.cross_entropy(linear(x, W, b), y)`. No scale, no margin.
    """

    unit_embeddings = False
    unit_weight = False

    def __init__(self) -> None:
        super().__init__()

    def target_logit(self, rows: TargetRows) -> Tensor:
        return rows.product

    def row_formula(self, device: torch.device) -> RowFormula:
        return RowFormula()


class L2Softmax(Margin):
    """L2-constrained softmax: z_ij = s (x_i/|x_i|) . w_j + b_j, t = z_iy; class rows are not normalised.

    Ranjan, Castillo, Chellappa: L2-constrained Softmax Loss for Discriminative Face Verification (2017). Often
    confused with CosFace, which also normalises the class rows and has a margin.

    Args:
        s: length of the embeddings (the paper's alpha), default 64.
    """

    unit_weight = False

    def target_logit(self, rows: TargetRows) -> Tensor:
        return rows.product

    def row_formula(self, device: torch.device) -> RowFormula:
        return RowFormula()


class NormFace(Margin):
    """Cosine softmax: z_ij = s cos theta_ij, t = z_iy.

    Wang, Xiang, Cheng, Yuille: NormFace (2017). `NormalizedSoftmaxLoss(temperature=T)` of pytorch-metric-learning is
    s = 1/T.

    Args:
        s: scale, default 64.
    """

    def target_logit(self, rows: TargetRows) -> Tensor:
        return rows.product

    def row_formula(self, device: torch.device) -> RowFormula:
        return RowFormula()
