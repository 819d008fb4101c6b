"""What class sampling saves: a sampled step beside the full one, and what the sampling itself costs.

Every step is forward, backward with the rows' update inside it (RowSGD with momentum), float32. Rounds are interleaved.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pandas as pd
import torch

import tritonmargin as tm
from perf.terminal import Say

RATE = 0.1


def table(say: Say = print, rounds: int = 5, tiny: bool = False) -> pd.DataFrame:
    """A line per size: medians of seconds, and the two ratios."""
    sizes = [(2000, 16, 0.9), (20_000, 16, 0.0)] if tiny else [(1_000_000, 512, 0.9), (10_000_000, 128, 0.0)]
    return pd.DataFrame([measure(c, d, momentum, rounds, say) for c, d, momentum in sizes])


def measure(classes: int, d: int, momentum: float, rounds: int, say: Say, n: int = 256) -> dict[str, object]:
    head = tm.MarginSoftmaxLoss(d, classes)
    optimizer = tm.optim.RowSGD(head.parameters(), lr=0.1, momentum=momentum)
    head.update_in_backward(optimizer)
    x, target = torch.randn(n, d), torch.randint(classes, (n,))
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        return tm.sample_classes(target, classes, round(RATE * classes), generator)

    def step(sampled: bool) -> None:
        ids = draw() if sampled else None
        head(x.clone().requires_grad_(), target, class_ids=ids).backward()
        optimizer.step()

    ways: dict[str, Callable[[], object]] = {
        "full": lambda: step(False), "sampled": lambda: step(True), "sampling": draw,
    }  # fmt: skip
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        say(f"C={classes:,}: round {number} of {rounds}")
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if number:  # the first touches new memory
                taken[name].append(time.perf_counter() - begin)
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    return {
        "C": classes, "D": d, "N": n, "rate": RATE, "momentum": momentum, "rounds": rounds,
        **{f"{name}_s": value for name, value in seconds.items()},
        "sampled_over_full": seconds["sampled"] / seconds["full"],
        "sampling_over_step": seconds["sampling"] / seconds["sampled"],
    }  # fmt: skip
