"""A keyed permutation of [0, C), one number at a time: who draws from it computes the numbers it asks for alone.

A Feistel network. A number is a pair (left, right) of Z_a x Z_b with a b >= C, and each round moves one half by a
random function of the other. The other half is still there, so a round can be taken back: whatever the functions are,
the network is one to one, and as cheap backwards. With enough rounds no test tells it from a random permutation (Luby
and Rackoff, 1988; Black and Rogaway, 2002, for sizes that are no power of two).

    forwards    left -= F_0(right) mod a,  right -= F_1(left) mod b,  left -= F_2(right) mod a, ...
    backwards   the same rounds from the last to the first, with a sum

A point that comes out beyond C goes through the network again until it is inside ("cycle walking"), which is one to one
on [0, C). The sides a and b are such that hardly any point is beyond.

All of it is integer arithmetic of 64 bits on a few integers, the same on every device; backends/triton/draw_kernels.py
is its Triton.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

# Steele et al., SplitMix (2014), with Stafford's 13th mix: shifts and factors. Odd numbers, negative as int64 has them.
GOLDEN, LAST_SHIFT = -0x61C8864680B583EB, 31
MIX = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))
OF_SEED, OF_STEP, OF_FIRST = 0x45D6C867337A7221, 0x719F3E675CD60581, 0x2127599BF4325C37
RANDOM_BITS = 40  # of a number, to be multiplied by a side: together below 2^63


@functools.lru_cache(maxsize=1000)
def sides(size: int) -> tuple[int, int]:
    """(a, b) with a b >= size, both near its root, and the fewest points beyond it that are to be had."""
    root = math.isqrt(max(size - 1, 1)) + 1
    # Not a side of 1, which nothing would move, and no long one: a round's table has as many numbers.
    lowest = max(root - 1024, (3 * root + 3) // 4)
    pairs = [(a, -(-size // a)) for a in range(lowest, root + 1)]
    return min(pairs, key=lambda pair: (pair[0] * pair[1] - size, max(pair)))


def rounds_of(size: int) -> int:
    """How many rounds: enough for chi-square of single numbers and of pairs, which small sizes need more for."""
    return 12 if size < 4096 else 6


def random_number(seed: Tensor, index: Tensor) -> Tensor:
    """The number at `index` of the sequence SplitMix64 that starts at `seed`; they broadcast."""
    number = (index + 1) * GOLDEN + seed
    for shift, factor in MIX:
        number ^= without_sign(number, shift)
        number *= factor
    return number.bitwise_xor_(without_sign(number, LAST_SHIFT))


def without_sign(number: Tensor, shift: int) -> Tensor:
    """number >> shift, of the 64 bits as if they had no sign."""
    return (number >> shift).bitwise_and_((1 << 64 - shift) - 1)


def as_int64(number: int) -> int:
    """Python's integer in 64 bits, as a tensor's product would be."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


class Permutation:
    """A permutation of [0, size), another one for every seed, step and first class. It holds O(sqrt(size)) numbers.

    Args:
        state: [2] int64, seed and step.
        first_class: of this rank's classes.
    """

    def __init__(self, state: Tensor, first_class: int, size: int) -> None:
        self.size, (self.a, self.b) = size, sides(size)
        device = state.device
        seed = state[0] * OF_SEED + state[1] * OF_STEP + as_int64(first_class * OF_FIRST)
        keys = random_number(seed, torch.arange(rounds_of(size), device=device))
        # F_k of every half is the table's row k: computed once, however many numbers are asked for.
        numbers = random_number(keys[:, None], torch.arange(max(self.a, self.b), device=device))
        numbers = without_sign(numbers, 64 - RANDOM_BITS)
        numbers[0::2].mul_(self.a)
        numbers[1::2].mul_(self.b)
        self.tables = (numbers >> RANDOM_BITS).int().unbind()  # halves have 32 bits, whatever C is

    def at(self, rank: Tensor) -> Tensor:
        """The number that has this rank; [K] int64."""
        return self.inside(self.forwards, rank)

    def rank(self, number: Tensor) -> Tensor:
        """The rank that this number has; [K] int64."""
        return self.inside(self.backwards, number)

    def inside(self, network: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
        """Cycle walking without a loop of unknown length: a table says where the points beyond `size` come out."""
        beyond = self.a * self.b - self.size
        if not beyond:
            return network(point)
        both = network(torch.cat([point, torch.arange(self.size, self.a * self.b, device=point.device)]))
        result, exits = both[: len(point)], both[len(point) :]
        for _ in range(beyond.bit_length()):  # twice as far each time
            exits = self.onwards(exits, exits)
        return self.onwards(result, exits)

    def onwards(self, point: Tensor, exits: Tensor) -> Tensor:
        """Where the points that are beyond come out, the others as they are."""
        return torch.where(point < self.size, point, exits.index_select(0, (point - self.size).clamp_(min=0)))

    def forwards(self, point: Tensor) -> Tensor:
        left, right = self.halves(point)
        for k, table in enumerate(self.tables):
            if k % 2 == 0:
                left = not_negative(left.sub_(table.index_select(0, right)), self.a)
            else:
                right = not_negative(right.sub_(table.index_select(0, left)), self.b)
        return left.long().mul_(self.b).add_(right)

    def backwards(self, point: Tensor) -> Tensor:
        left, right = self.halves(point)
        for k, table in reversed([*enumerate(self.tables)]):
            if k % 2 == 0:
                left = not_negative(left.add_(table.index_select(0, right)).sub_(self.a), self.a)
            else:
                right = not_negative(right.add_(table.index_select(0, left)).sub_(self.b), self.b)
        return left.long().mul_(self.b).add_(right)

    def halves(self, point: Tensor) -> tuple[Tensor, Tensor]:  # [K] -> [K], [K], int32
        left = point // self.b
        return left.int(), (point - left * self.b).int()


def not_negative(half: Tensor, side: int) -> Tensor:
    """half mod side, in place, of int32 in [-side, side)."""
    return half.add_((half >> 31).bitwise_and_(side))
