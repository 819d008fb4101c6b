"""Margins as functions of the target's cosine: values and slopes, and how close they have to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from formulas import CASES, Case
from torch import Tensor

from tritonmargin.margins import (
    Margin,
    TargetRows,
)

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


NORMFACE = CASES[2]  # the rows of every margin with unit rows on both sides
GRID = [-1.0, *np.linspace(-0.9995, 0.9995, 101).tolist(), 1.0]
X_NORM, W_NORM = 1.7, 2.3  # of the embedding and the class row; they enter where a loss does not divide them out


def rows(cosines: Tensor, case: Case) -> TargetRows:
    scale = case.scale(X_NORM, W_NORM)
    return TargetRows(
        product=scale * cosines,
        embedding_norm=torch.full_like(cosines, X_NORM),
        weight_norm=torch.full_like(cosines, W_NORM),
        scale=scale if case.unit_embeddings and case.unit_weight else torch.full_like(cosines, scale),
        target=torch.zeros(len(cosines), dtype=torch.int64),
    )


def target_cosine(margin: Margin, case: Case, cosines: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    """phi = t/scale."""
    return margin.target_logit(rows(torch.tensor(cosines, dtype=dtype), case)) / case.scale(X_NORM, W_NORM)


def slopes(margin: Margin, case: Case, cosines: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    """d phi/d cos by autograd."""
    c = torch.tensor(cosines, dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(margin.target_logit(rows(c, case)).sum(), c)
    return slope / case.scale(X_NORM, W_NORM)


def close(actual: Tensor, expected: list[float], rtol: float = 0.0, atol: float = 0.0) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol)
