"""What an optimiser does to class rows whose gradient is known, and how results are rounded, in PyTorch.

backends/triton/update_rules.py has the rules as Triton functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


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


# -- the rules -------------------------------------------------------------------------------------------------------


def sgd(gradient: Tensor, weight: Tensor, *momentum: Tensor, numbers: tuple[float, ...]) -> None:
    """g = dL/dw + decay w; buffer = momentum buffer + g; w -= lr buffer, or lr (g + momentum buffer) if nesterov."""
    lr, factor, decay, nesterov = numbers
    if decay:
        gradient.add_(weight, alpha=decay)
    for buffer in momentum:
        buffer.mul_(factor).add_(gradient)
        gradient = gradient.add_(buffer, alpha=factor) if nesterov else buffer
    weight.add_(gradient, alpha=-lr)


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


def corrections(steps: Tensor, lr: float, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:  # [K] -> [K], [K]
    """lr / (1 - beta1^t) and sqrt(1 - beta2^t), in float64."""
    t = steps.double()
    return lr / (1.0 - beta1**t), torch.sqrt(1.0 - beta2**t)


RULES: dict[str, Callable[..., None]] = {"sgd": sgd, "adamw": adamw}


def stochastic(value: Tensor, generator: torch.Generator) -> Tensor:
    """float32 or float64 values that bfloat16 holds exactly: the one above or below, by chance, right on average.

    Rounding to nearest loses every update below 2^-9 of the weight; on average this one loses none.
    """
    bits = value.float().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    # The sum runs over into inf next to the largest number, and inf and nan have no neighbours.
    return torch.where(rounded.isfinite(), rounded, value.float())


def mixed(*numbers: int) -> int:
    """One seed from several numbers, another one for every combination."""
    seed = 0
    for number in numbers:
        seed = ((seed ^ number) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % (1 << 63)
        seed ^= seed >> 29
    return seed
