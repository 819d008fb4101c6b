"""A training step of ours as a user writes it: what is counted, compiled and planned for elsewhere in perf/."""

import contextlib
from functools import partial
from typing import Any, NamedTuple

import torch

import tritonmargin as tm


class OwnMargin(tm.Margin):
    """As a user writes one: the kernels know no formula of it."""

    def target_cosine(self, cos: torch.Tensor) -> torch.Tensor:
        return cos - 0.2 * (1 + cos)


OPTIMIZERS = {"sgd": tm.optim.RowSGD, "momentum": partial(tm.optim.RowSGD, momentum=0.9), "adamw": tm.optim.RowAdamW}


class Loss(NamedTuple):
    """What a step computes."""

    margin: type[tm.Margin] = tm.ArcFace
    options: dict[str, Any] = {}  # noqa: RUF012  of the head
    optimizer: str = ""  # whose step it ends with
    in_backward: bool = True  # where that updates W
    wide: bool = False  # W in float32, under autocast
    weighted: bool = False  # classes have weights
    statistics: bool = False


class TrainingStep:
    """Forward and backward of a head that has just been made, to be called again and again.

    Where W is bfloat16 the optimizer's state is too, and both are rounded by chance.
    """

    def __init__(
        self, loss: Loss, n: int, d: int, classes: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        class_weight = torch.ones(classes, device=device) if loss.weighted else None
        rows = {"class_weight": class_weight, "device": device, "dtype": torch.float32 if loss.wide else dtype}
        self.loss = loss
        self.head = tm.MarginSoftmaxLoss(d, classes, loss.margin(), **rows, **loss.options)
        self.optimizer: Any = None
        if loss.optimizer:
            low = rows["dtype"] == torch.bfloat16
            how = {"state_dtype": torch.bfloat16, "stochastic_rounding": True} if low else {}
            self.optimizer = OPTIMIZERS[loss.optimizer](self.head.parameters(), lr=0.1, **how)
            self.head.update_in_backward(self.optimizer if loss.in_backward else None)
        self.x = torch.randn(n, d, device=device).to(dtype).requires_grad_()
        self.target = torch.randint(classes, (n,), device=device)
        self.class_ids: torch.Tensor | None = None
        self.autocast = partial(torch.autocast, device, dtype) if loss.wide else contextlib.nullcontext

    def __call__(self) -> None:
        with self.autocast():
            found = self.head(self.x, self.target, self.class_ids, self.loss.statistics)
        loss = found[0] if self.loss.statistics else found
        loss.backward(torch.ones_like(loss) if loss.ndim else None)
        if self.optimizer is not None:
            self.optimizer.step()
        self.x.grad = self.head.weight.grad = None
