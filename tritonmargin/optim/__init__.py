"""Optimisers for class weights of which a step sees a sample of the rows."""

from tritonmargin.optim.row_optimizer import NoGradient, RowAdamW, RowSGD

__all__ = ["NoGradient", "RowAdamW", "RowSGD"]
