"""What an optimiser does to class rows whose gradient is known, and how results are rounded; torch and Triton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the torch backend needs no Triton

    class triton:  # type: ignore[no-redef]
        jit = staticmethod(lambda function: function)


@dataclass
class RowUpdate:
    """One step of an optimiser on the rows of one matrix, done rows by rows, in place.

    numbers, by rule:

        "sgd"    lr, momentum, weight_decay, nesterov (0 or 1)
        "adamw"  lr, beta1, beta2, eps, weight_decay
    """

    rule: str
    weight: Tensor  # [C, D]
    numbers: tuple[float, ...]
    state: tuple[Tensor, ...] = ()  # [C, D] each: sgd: momentum, if there is any; adamw: first and second moment
    steps: Tensor | None = None  # [C] int32, updates that each row has seen; adamw only
    seed: int | None = None  # bfloat16 is rounded up or down at random by it; None: to nearest
    unsampled: str = "frozen"  # or "decay": rows that have no gradient are updated with a gradient of 0
    touched: bool = False  # whether any row is updated already
    generators: dict[torch.device, torch.Generator] = field(default_factory=dict)

    def generator(self, device: torch.device) -> torch.Generator:
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed or 0)
        return self.generators[device]


def update_rows(update: RowUpdate, place: slice | Tensor, gradient: Tensor) -> None:
    """Update the rows `place` (a range, or unique row numbers) given their gradient [K, D], which is overwritten.

    Computes in the gradient's dtype, that of sums, whatever the weight's and the state's.
    """
    update.touched = True
    stored = (update.weight, *update.state)
    parts = [tensor[place] for tensor in stored]
    wide = [part.to(gradient.dtype) for part in parts]
    if update.steps is None:
        RULES[update.rule](gradient, *wide, numbers=update.numbers)
    else:
        steps = count_up(update.steps, place)
        RULES[update.rule](gradient, *wide, numbers=update.numbers, steps=steps)
    for tensor, part, value in zip(stored, parts, wide, strict=True):
        if value is part and isinstance(place, slice):
            continue  # a view of the rows: done in place
        if update.seed is not None and tensor.dtype == torch.bfloat16:
            value = stochastic(value, update.generator(value.device))
        tensor[place] = value.to(tensor.dtype)


def count_up(counts: Tensor, place: slice | Tensor) -> Tensor:  # [C] -> [K]
    """One more for the rows `place`; returns theirs."""
    counted = counts[place] + 1
    counts[place] = counted
    return counted


# -- the rules: a function of tensors, and the same as Triton code ---------------------------------------------------


def sgd(gradient: Tensor, weight: Tensor, *momentum: Tensor, numbers: tuple[float, ...]) -> None:
    """g = dL/dw + decay w; buffer = momentum buffer + g; w -= lr buffer, or lr (g + momentum buffer) if nesterov."""
    lr, factor, decay, nesterov = numbers
    if decay:
        gradient.add_(weight, alpha=decay)
    for buffer in momentum:
        buffer.mul_(factor).add_(gradient)
        gradient = gradient.add_(buffer, alpha=factor) if nesterov else buffer
    weight.add_(gradient, alpha=-lr)


@triton.jit
def sgd_rule(g, w, place, mask, numbers, state, corrections, seed, STOCHASTIC: tl.constexpr):
    lr, factor, decay, nesterov = numbers
    g += decay * w
    if len(state) > 0:
        buffer = factor * tl.load(state[0] + place, mask=mask, other=0.0).to(tl.float32) + g
        store_rounded(state[0] + place, buffer, place, mask, seed + 1, STOCHASTIC)
        g = tl.where(nesterov != 0.0, g + factor * buffer, buffer)
    return w - lr * g


def adamw(
    gradient: Tensor, weight: Tensor, first: Tensor, second: Tensor, *, numbers: tuple[float, ...], steps: Tensor
) -> None:
    """Decoupled weight decay; moments corrected by the number of steps that the row has seen."""
    lr, beta1, beta2, eps, decay = numbers
    weight.mul_(1.0 - lr * decay)
    first.lerp_(gradient, 1.0 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    size, root = corrections(steps, lr, beta1, beta2)
    denominator = torch.sqrt(second, out=gradient).div_(root.to(second.dtype)[:, None]).add_(eps)
    weight.addcmul_(first / denominator, size.to(first.dtype)[:, None], value=-1.0)


@triton.jit
def adamw_rule(g, w, place, mask, numbers, state, corrections, seed, STOCHASTIC: tl.constexpr):
    lr, beta1, beta2, eps, decay = numbers
    size, root = corrections
    w *= 1.0 - lr * decay
    first = tl.load(state[0] + place, mask=mask, other=0.0).to(tl.float32)
    first += (1.0 - beta1) * (g - first)
    second = beta2 * tl.load(state[1] + place, mask=mask, other=0.0).to(tl.float32) + (1.0 - beta2) * g * g
    store_rounded(state[0] + place, first, place, mask, seed + 1, STOCHASTIC)
    store_rounded(state[1] + place, second, place, mask, seed + 2, STOCHASTIC)
    return w - size[:, None] * first / (tl.sqrt(second) / root[:, None] + eps)


def corrections(steps: Tensor, lr: float, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:  # [K] -> [K], [K]
    """lr / (1 - beta1^t) and sqrt(1 - beta2^t), in float64."""
    t = steps.double()
    return lr / (1.0 - beta1**t), torch.sqrt(1.0 - beta2**t)


RULES: dict[str, Callable[..., None]] = {"sgd": sgd, "adamw": adamw}
TRITON_RULES = {"sgd": sgd_rule, "adamw": adamw_rule}


def stochastic(value: Tensor, generator: torch.Generator) -> Tensor:
    """float32 or float64 values that bfloat16 holds exactly: the one above or below, by chance, right on average.

    Rounding to nearest loses every update below 2^-9 of the weight; on average this one loses none.
    """
    bits = value.float().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    # The sum runs over into inf next to the largest number, and inf and nan have no neighbours.
    return torch.where(rounded.isfinite(), rounded, value.float())


@triton.jit
def store_rounded(pointer, value, place, mask, seed, STOCHASTIC: tl.constexpr):
    """Store float32 as the pointer's dtype, bfloat16 by chance if STOCHASTIC."""
    if STOCHASTIC and pointer.dtype.element_ty == tl.bfloat16:
        noise = random_bits(place, seed) & 65535
        rounded = ((value.to(tl.int32, bitcast=True) + noise) & -65536).to(tl.float32, bitcast=True)
        value = tl.where(tl.abs(rounded) < float("inf"), rounded, value)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def random_bits(place, seed):
    """32 bits by a hash of where a number is stored: rounding by chance needs no more, and Philox fills the registers.

    The hash is lowbias32 of C. Wellons' "hash-prospector", whose bias is below 0.2 in a million.
    """
    low, high = place.to(tl.uint32), (place >> 32).to(tl.uint32)
    bits = (low ^ (high * 0x9E3779B9)) + seed.to(tl.uint32) * 0x85EBCA6B
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return (bits ^ (bits >> 16)).to(tl.int32, bitcast=True)


def mixed(*numbers: int) -> int:
    """One seed from several numbers, another one for every combination."""
    seed = 0
    for number in numbers:
        seed = ((seed ^ number) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % (1 << 63)
        seed ^= seed >> 29
    return seed
