"""What class sampling saves, and what it does to the loss.

Steps: a sampled step beside the full one, and what the sampling itself costs. Every step is forward, backward with the
rows' update inside it (RowSGD with momentum), float32. Rounds are interleaved.

Losses: the mean loss of a batch over samples of the classes beside its loss over all of them, with `logq_correction`
and without: by how much it is off on average (bias), and its standard deviation from sample to sample (spread). Class
centers are random directions; embeddings have a given cosine with their own. The correction makes the sum of exp right
on average. Its logarithm is right where many classes make up the sum, and too low where a few do (large s, small D),
because a sample mostly misses them.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable

import pandas as pd
import torch
import torch.nn.functional as F

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


def losses(say: Say = print, draws: int = 50, tiny: bool = False) -> pd.DataFrame:
    """A line per width, scale, cosine and rate."""
    classes, n = (300, 8) if tiny else (20_000, 64)
    lines = []
    for d, s, cosine in itertools.product((64, 512), (16.0, 64.0), (0.0, 0.7)):
        say(f"losses: D={d}, s={s:g}, cosine {cosine}")
        lines += [loss_at(classes, n, d, s, cosine, rate, draws) for rate in (0.01, 0.1, 0.3)]
    return pd.DataFrame(lines)


def loss_at(classes: int, n: int, d: int, s: float, cosine: float, rate: float, draws: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    weight = F.normalize(torch.randn(classes, d, generator=generator, dtype=torch.float64))
    target = torch.randperm(classes, generator=generator)[:n]
    own = weight[target]
    beside = torch.randn(n, d, generator=generator, dtype=torch.float64)
    beside = F.normalize(beside - (beside * own).sum(dim=1, keepdim=True) * own)
    x, margin = cosine * own + math.sqrt(1.0 - cosine**2) * beside, tm.ArcFace(m=0.5, s=s)
    full = float(tm.margin_cross_entropy(x, weight, target, margin))
    line: dict[str, object] = {
        "C": classes, "D": d, "N": n, "s": s, "cosine": cosine, "rate": rate, "draws": draws, "full": full,
    }  # fmt: skip
    samples = [tm.sample_classes(target, classes, round(rate * classes), generator) for _ in range(draws)]
    for name, corrected in (("", False), ("corrected_", True)):
        found = [
            float(tm.margin_cross_entropy(x, weight, target, margin, class_ids=ids, logq_correction=corrected))
            for ids in samples
        ]
        line |= {f"{name}bias": statistics.fmean(found) - full, f"{name}spread": statistics.stdev(found)}
    return line
