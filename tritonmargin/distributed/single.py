"""One rank: what a `Shard` and its `Batch` do, where there is nobody to exchange anything with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tritonmargin.distributed.settings import Settings

GRADIENT_FOR = ("ddp", "sum")  # see `MarginSoftmaxLoss`


class Single:
    """See `distributed.shard.Shard`."""

    is_single = True
    start = 0

    def classes(self, weight: Tensor) -> int:
        return weight.shape[0]

    def batch(self, x: Tensor, outside: Tensor | None, settings: Settings, **alike: bool) -> SingleBatch:
        return BATCH

    def announce_error(self, weight: Tensor, alike: int) -> None:
        pass

    def agree(self, error: Exception | None, device: torch.device) -> None:
        if error is not None:
            raise error

    def own_labels(self, label: Tensor) -> Tensor:
        return label

    def all_sum(self, numbers: Tensor) -> Tensor:
        return numbers

    def all_sums(self, *numbers: Tensor | None) -> Any:
        return numbers

    def all_max(self, numbers: Tensor) -> Tensor:
        return numbers

    def somewhere(self, flag: Tensor) -> Tensor:
        return flag

    def shared(self, number: Tensor) -> Tensor:
        return number

    def logsumexp(self, rest: Tensor) -> Tensor:
        return rest

    def hardest(self, logit: Tensor, own_class: Tensor) -> tuple[Tensor, Tensor]:
        return logit, own_class


class SingleBatch:
    """See `distributed.shard.Batch`."""

    own = slice(None)

    def gather_rows(self, x: Tensor) -> Tensor:
        return x

    def gather(self, own: Tensor) -> Tensor:
        return own

    def own_part(self, numbers: Tensor) -> Tensor:
        return numbers

    def keep_own(self, numbers: Tensor) -> Tensor:
        return numbers


SINGLE = Single()
BATCH = SingleBatch()
