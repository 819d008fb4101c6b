"""Which classes are active in a step."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonmargin.arguments import check_integer
from tritonmargin.backends.registry import current_backend, falling_back, why_not_triton
from tritonmargin.checks import check_integers
from tritonmargin.class_pass.op import seen_as_ops
from tritonmargin.permutation import Permutation


def sample_classes(
    target: Tensor, num_classes: int, num_samples: int, generator: torch.Generator | None = None
) -> Tensor:
    """A sorted, unique int64 tensor of class numbers: every class in `target`, filled up with random others.

    Partial FC (An et al., 2021): the positives always, negatives uniformly without replacement, so that a step costs
    `num_samples` classes instead of C. Labels outside [0, num_classes), such as an ignore_index, are left out.
    The result has max(num_samples, number of distinct positives) classes. Time and memory follow the sample's size, not
    C, and on a GPU nothing waits for the device, unless there are more labels than `num_samples`: then the size of the
    result is data.

    Args:
        target: [N] integer class numbers.
        num_classes: C.
        num_samples: how many classes are active, 0 <= num_samples <= num_classes.
        generator: on the device of `target`, for reproducible draws. It gives two numbers, and all else follows from
            them.

    Raises:
        ValueError: num_samples or num_classes out of range, target not one-dimensional, generator elsewhere.
        TypeError: labels, or sizes, that are not integers; a generator that is none.
    """
    check_integers("target", target)
    if target.ndim != 1:
        raise ValueError(f"target must have shape [N], got {tuple(target.shape)}")
    check_integer("num_classes", num_classes, 1)
    check_integer("num_samples", num_samples, 0)
    if num_samples > num_classes:
        raise ValueError(f"num_samples must be <= num_classes = {num_classes}, got {num_samples}")
    check_generator(generator, target.device)
    state = torch.empty(2, dtype=torch.int64, device=target.device).random_(generator=generator)
    return draw(target.long(), state, 0, num_classes, num_samples)


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    if generator.device.type != device.type:
        raise ValueError(f"generator is on {generator.device}, target on {device}: use one device")


class Sampler:
    """Draws the classes of one step after the other: after a restart as without one, on a GPU as on a CPU, on every
    shard others.

    Its state is two numbers, the seed and how many steps it has drawn, in `state` [2] int64, so that a checkpoint
    holds them and any number of ranks can go on from them.

    Args:
        rate: fraction of the classes that are active, 0 <= rate <= 1. The positives are, whatever it is.
        state: tensor with the seed and the number of steps; `advance` counts it up in place.
        first_class: first class of this shard.
    """

    def __init__(self, rate: float, state: Tensor, first_class: int = 0) -> None:
        self.rate, self.state, self.first_class = rate, state, first_class

    def draw(self, target: Tensor, num_classes: int) -> Tensor:
        """`sample_classes` for this step; targets outside [0, num_classes) are other shards' or ignored."""
        state, count = self.state.to(target.device), round(self.rate * num_classes)
        return draw(target, state, self.first_class, num_classes, count)

    def advance(self) -> None:
        """The next draw is the next step's."""
        self.state[1:].add_(1)


def draw(target: Tensor, state: Tensor, first_class: int, num_classes: int, num_samples: int) -> Tensor:
    """The classes in `target` and as many others as `num_samples` has room for, in order.

    state: [2] int64, which with the first class decides what is drawn.
    """
    if num_samples == num_classes:
        return torch.arange(num_classes, device=target.device)
    if len(target) > num_samples:
        target = target[(target >= 0) & (target < num_classes)].unique()  # its size is data
        if len(target) >= num_samples:
            return target
    run = draw_op if seen_as_ops((target, state)) else drawn
    return run(target, state, first_class, num_classes, num_samples, backend_of(target.device))


def backend_of(device: torch.device) -> str:
    """The kernels where a loss would use them; else torch, which draws the same."""
    chosen = "torch" if why_not_triton(device, torch.int64) else current_backend(device, torch.int64)
    return chosen if chosen in ("auto", "triton") else "torch"


@falling_back
def drawn(
    target: Tensor,  # [N] int64, N <= num_samples
    state: Tensor,
    first_class: int,
    num_classes: int,
    num_samples: int,  # < num_classes
    backend: str,
) -> Tensor:
    if backend == "torch":
        return draw_by_torch(target, state, first_class, num_classes, num_samples)
    from tritonmargin.backends.triton.draw_kernels import draw_by_triton  # Triton is imported when it is first used

    return draw_by_triton(target, state, first_class, num_classes, num_samples)


# An op for compilers: to Inductor a product of an arange is an index, and those may have 32 bits.
draw_op = torch.library.custom_op("tritonmargin::draw", drawn, mutates_args=())


@draw_op.register_fake
def _(target, state, first_class, num_classes, num_samples, backend):  # type: ignore[no-untyped-def]
    return target.new_empty(num_samples)


def draw_by_torch(target: Tensor, state: Tensor, first_class: int, num_classes: int, num_samples: int) -> Tensor:
    """The candidates are the classes of the lowest ranks in a random order. A label that is none of them replaces the
    last one that is no label.

    So the other classes are the first of those that are no labels: each set of them is as likely. No size is data.
    """
    order = Permutation(state, first_class, num_classes)
    ids = order.at(torch.arange(num_samples + 1, device=target.device))  # one more, for what is not to be written
    if not len(target):
        return ids[:num_samples].sort().values
    label = torch.where((target >= 0) & (target < num_classes), target, num_classes).sort().values
    first = label < num_classes
    first[1:] &= label[1:] != label[:-1]  # equal ones count once
    rank = order.rank(label.clamp(max=num_classes - 1))
    missing = first & (rank >= num_samples)
    hits = torch.where(first & (rank < num_samples), rank, -1).sort(descending=True).values
    # How many candidates behind each hit are no labels. The m-th of these from the end has m of them behind it.
    behind = num_samples - 1 - hits - torch.arange(len(hits), device=hits.device)
    behind = torch.where(hits >= 0, behind, num_samples)
    m = missing.cumsum(0) - 1
    replaced = num_samples - 1 - m - torch.searchsorted(behind, m, right=True)
    ids.scatter_(0, torch.where(missing, replaced, num_samples), label)
    return ids[:num_samples].sort().values
