"""Optimisers for class weights of which a step sees a sample of the rows."""

from tritonmargin.optim.optimizers import RowAdamW, RowSGD
from tritonmargin.optim.row_optimizer import NoGradient

__all__ = ["NoGradient", "RowAdamW", "RowSGD"]
