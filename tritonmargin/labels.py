"""A label's readings: which class, whether it counts, which row of this rank, which position in the class pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tritonmargin import checks

if TYPE_CHECKING:
    from tritonmargin.distributed.shard import Batch, Shard
    from tritonmargin.distributed.single import Single, SingleBatch


def once(make: Callable[[Any], Tensor]) -> Any:
    """A property that is made when it is first asked for. functools' takes a lock, which torch.compile cannot trace."""
    name = f"_{make.__name__}"

    def get(owner: Any) -> Tensor:
        found = getattr(owner, name, None)
        if found is None:
            found = make(owner)
            setattr(owner, name, found)
        return found

    return property(get, doc=make.__doc__)


class Labels:
    """The labels of a loss. Each reading is made once, when it is first asked for.

    Labels are looked at on the CPU always, elsewhere with TRITONMARGIN_DEBUG=1, and then before any work.

    Args:
        target: [N] class numbers in [0, num_classes), or ignore_index.
        ranks: says which of the classes are this rank's.
        number: the first reading, where it is known.

    Raises:
        ValueError: a label that is looked at is no class.
    """

    def __init__(
        self,
        target: Tensor,
        num_classes: int,
        ignore_index: int,
        ranks: Shard | Single,
        number: Tensor | None = None,
    ) -> None:
        self.target, self.num_classes, self.ignore_index, self.ranks = target, num_classes, ignore_index, ranks
        self._number = number
        if number is None and checks.looks_at_values(target.device):
            _ = self.number

    def gathered(self, batch: Batch | SingleBatch) -> Labels:
        """Those of all ranks."""
        if self.ranks.is_single:
            return self
        number = batch.gather(self.number)
        return Labels(number, self.num_classes, -1, self.ranks, number)

    @once
    def number(self) -> Tensor:
        """[N] int64 class number, -1 where it is ignored."""
        return checks.positions(self.target, None, self.num_classes, self.ignore_index)

    @property
    def unread(self) -> bool:
        """Whether nobody has looked at the labels, and ignored ones are no classes: most readings are short then."""
        plain = self.ranks.is_single and self.ignore_index < 0 and self.target.dtype in (torch.int64, torch.int32)
        return plain and self._number is None

    @once
    def valid(self) -> Tensor:
        """[N] bool, whether the sample counts."""
        return self.target != self.ignore_index if self.unread else self.number >= 0

    @once
    def class_number(self) -> Tensor:
        """[N] int64, 0 where it is ignored."""
        return self.target.clamp(min=0).long() if self.unread else self.number.clamp(min=0)

    @property
    def to_draw(self) -> Tensor:
        """[N] int64 for a sampler: rows of this rank, and numbers that are none of them."""
        return self.target.long() if self.unread else self.own

    @once
    def own(self) -> Tensor:
        """[N] int64, the class's row on this rank; -1: another rank's, or ignored."""
        return self.ranks.own_labels(self.number)


class ActiveClasses:
    """The classes of one class pass, and where the labels are among them.

    Args:
        labels: of all ranks.
        rows: how many classes this rank has.
        ids: [S] the active ones, sorted; None: all.
        drawn: by a sampler, from these labels: then there is nothing to look at.

    Raises:
        ValueError: a label that is looked at is not active, or ids are not sorted; on all ranks, if on one.
    """

    def __init__(self, labels: Labels, rows: int, ids: Tensor | None, drawn: bool) -> None:
        self.labels, self.rows, self.ids, self.drawn = labels, rows, ids, drawn
        if ids is not None and not drawn and (checks.looks_at_values(ids.device) or not labels.ranks.is_single):
            _ = self.position

    @property
    def count(self) -> int:
        return self.rows if self.ids is None else self.ids.shape[0]

    @once
    def position(self) -> Tensor:
        """[N] int64, each label's index among the active classes, -1: not there."""
        own, ids = self.labels.own, self.ids
        if ids is None:
            return own
        if self.drawn:
            return torch.searchsorted(ids, own).masked_fill_(own < 0, -1)
        if self.labels.ranks.is_single:
            return checks.positions(own, ids, self.rows, -1)
        row, error = own, None
        try:
            row = checks.positions(own, ids, self.rows, -1)
        except ValueError as raised:
            error = raised
        self.labels.ranks.agree(error, own.device)
        return row


def sampling_offset(active: ActiveClasses, dtype: torch.dtype) -> tuple[Tensor, float]:
    """log((C - P)/(S - P)) for each active class that is nobody's target, 0 for the P others; and its bound."""
    position, count, classes = active.position, active.count, active.rows
    positive = torch.zeros(count + 1, dtype=torch.bool, device=position.device)
    positive[position] = True  # -1, no class, is the last one
    positive = positive[:count]
    positives = positive.sum()
    negatives = (count - positives).clamp(min=1).to(dtype)
    offset = torch.log((classes - positives).to(dtype) / negatives)
    highest = math.log(max(classes, 1) / max(count - len(position), 1))
    return torch.where(positive, 0.0, offset), highest
