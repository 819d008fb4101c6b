"""Which classes a step walks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritonmargin.checks import check_integers
from tritonmargin.kernels.updates import mixed


def sample_classes(
    target: Tensor, num_classes: int, num_samples: int, generator: torch.Generator | None = None
) -> Tensor:
    """A sorted, unique int64 tensor of class numbers: every class in `target`, filled up with random others.

    Partial FC (An et al., 2021): the positives always, negatives uniformly without replacement, so that a step costs
    `num_samples` classes instead of C. Labels outside [0, num_classes), such as an ignore_index, are left out.
    The result has max(num_samples, number of distinct positives) classes. On a CPU time and memory follow the sample's
    size, not C. On a GPU it takes some 16 bytes per class for a moment, more for samples of a sixth of them and up, and
    does not wait for the device, unless there are more labels than `num_samples`: then the size of the result is data.

    Args:
        target: [N] integer class numbers.
        num_classes: C.
        num_samples: how many classes to walk, 0 <= num_samples <= num_classes.
        generator: on the device of `target`, for reproducible draws.

    Raises:
        ValueError: num_samples or num_classes out of range, target not one-dimensional.
        TypeError: labels that are not integers.
    """
    check_integers("target", target)
    if target.ndim != 1:
        raise ValueError(f"target must have shape [N], got {tuple(target.shape)}")
    for name, number, lowest in (("num_classes", num_classes, 1), ("num_samples", num_samples, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < lowest:
            raise ValueError(f"{name} must be an integer >= {lowest}, got {number!r}")
    if num_samples > num_classes:
        raise ValueError(f"num_samples must be <= num_classes = {num_classes}, got {num_samples}")
    if fits(target, num_samples):
        keys = torch.empty(num_classes + 1, dtype=torch.int64, device=target.device)
        return by_keys(keys.random_(0, 1 << 62, generator=generator), target, num_samples)
    positives = target[(target >= 0) & (target < num_classes)].long().unique()
    missing = num_samples - len(positives)
    if missing <= 0:
        return positives
    if 2 * num_samples <= num_classes:
        return merged(random_others(positives, num_classes, missing, generator), positives)
    # Most classes: cheaper to draw those that are left out.
    out = random_others(positives, num_classes, num_classes - num_samples, generator)
    return all_but(out, num_classes).nonzero().squeeze(1)


def random_others(positives: Tensor, num_classes: int, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` distinct classes in order, none of them positive, every such set with the same probability.

    Draws with replacement until enough distinct ones are there, then leaves random ones out: nothing in this tells one
    class from another, and it takes memory for the sample alone.
    """
    free = num_classes - len(positives)
    # How many draws show `count` of `free` classes: on average, and some standard deviations more.
    share = min(count / free, 1.0 - 0.1 / free) if free else 0.0
    draws = -num_classes * math.log1p(-share)
    draws += 4.0 * math.sqrt(draws) + 16.0
    surplus = -1
    while surplus < 0:
        # Drawn again if it is not enough, rather than added to: they are in order already.
        found = torch.unique_consecutive(ordered_draws(num_classes, int(draws), generator, positives.device))
        place = place_of(positives, found)
        surplus = len(found) - len(place) - count
        draws *= 1.2
    if surplus and len(found) < 4096:
        shuffled = torch.randperm(len(found), generator=generator, device=found.device)
        others = shuffled[all_but(place, len(found))[shuffled]]
        place = torch.cat([place, others[:surplus]])
    elif surplus:
        # A permutation of all would cost more than the draws did.
        place = torch.cat([place, random_others(place, len(found), surplus, generator)])
    return found.masked_select(all_but(place, len(found)))


def ordered_draws(num_classes: int, draws: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """`draws` independent uniform class numbers, smallest first: sums of exponential gaps, which saves the sort.

    The gaps are whole numbers, for sums of floats may differ from run to run on a GPU.
    """
    gaps = torch.empty(draws + 1, dtype=torch.float64, device=device).exponential_(generator=generator)
    place = gaps.mul_(2.0**32).long().cumsum(dim=0)
    share = place[:-1].double() / place[-1:].clamp(min=1)
    return share.mul_(num_classes).long().clamp_(max=num_classes - 1)


def place_of(values: Tensor, ordered: Tensor) -> Tensor:
    """Where in `ordered` the values are, those that are there."""
    if not len(ordered):
        return values[:0]
    place = torch.searchsorted(ordered, values).clamp(max=len(ordered) - 1)
    return place[ordered[place] == values]


def all_but(place: Tensor, size: int) -> Tensor:
    return torch.ones(size, dtype=torch.bool, device=place.device).index_fill_(0, place, False)


def merged(many: Tensor, few: Tensor) -> Tensor:
    """Two ordered lists as one."""
    place = torch.searchsorted(many, few) + torch.arange(len(few), device=few.device)
    out = many.new_empty(len(many) + len(few))
    out.masked_scatter_(all_but(place, len(out)), many)
    return out.index_copy_(0, place, few)


# -- on a GPU ----------------------------------------------------------------------------------------------------


def fits(target: Tensor, num_samples: int) -> bool:
    """Whether to draw by keys: on a GPU, where the sample has room for every label and its size is known."""
    return target.device.type == "cuda" and len(target) <= num_samples


def by_keys(keys: Tensor, target: Tensor, num_samples: int) -> Tensor:
    """The classes in `target`, and those with the largest random numbers: `num_samples` in all, in order.

    keys: [C + 1] int64, below 2^62, one a class and one for what is no class; overwritten. No size is data.
    """
    place = target.long().clamp(min=-1, max=len(keys) - 1)  # no class: the last
    keys.index_fill_(0, place, torch.iinfo(torch.int64).max)
    return keys[:-1].topk(num_samples, sorted=False).indices.sort().values


# Steele et al., SplitMix (2014), with Stafford's 13th mix: shifts and factors. Odd numbers, negative as int64 has them.
GOLDEN, MIX = -0x61C8864680B583EB, ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))
OF_SEED, OF_STEP = 0x45D6C867337A7221, 0x719F3E675CD60581


def random_keys(state: Tensor, first_class: int, size: int) -> Tensor:
    """[size] numbers in [-2^62, 2^62), of the seed and the step in `state` and the class: the same on every device.

    A generator would have to be told the seed, and reading it from a GPU waits. These are new in every replay of a
    CUDA graph, too.
    """
    key = torch.arange(first_class, first_class + size, device=state.device)
    # Added first: a product with an arange is an index to Inductor, and those have 32 bits.
    key += state[0] * OF_SEED + state[1] * OF_STEP
    key *= GOLDEN
    for shift, factor in MIX:
        high = key >> shift
        high &= (1 << 64 - shift) - 1  # the sign was shifted in
        key ^= high
        del high  # before there is another
        key *= factor
    key >>= 1
    return key


class Sampler:
    """Draws the classes of one step after the other: the same ones after a restart, others on every shard.

    Its state is two numbers, the seed and how many steps it has drawn, in `state` [2] int64, so that a checkpoint
    holds them and any number of ranks can go on from them. A CPU and a GPU draw different ones.

    Args:
        rate: fraction of the classes to walk, 0 <= rate <= 1. The positives are walked whatever it is.
        state: tensor with the seed and the number of steps; counted up in place.
        first_class: first class of this shard.
    """

    def __init__(self, rate: float, state: Tensor, first_class: int = 0) -> None:
        self.rate, self.state, self.first_class = rate, state, first_class

    def draw(self, target: Tensor, num_classes: int) -> Tensor:
        """`sample_classes` for this step; targets outside [0, num_classes) are other shards' or ignored."""
        count = round(self.rate * num_classes)
        if fits(target, count):
            keys = random_keys(self.state.to(target.device), self.first_class, num_classes + 1)
            self.state[1] += 1
            return by_keys(keys, target, count)
        seed, step = self.state.tolist()
        self.state[1] += 1
        if not num_classes:  # more ranks than classes
            return torch.empty(0, dtype=torch.int64, device=target.device)
        generator = torch.Generator(target.device).manual_seed(mixed(seed, step, self.first_class))
        return sample_classes(target, num_classes, count, generator)
