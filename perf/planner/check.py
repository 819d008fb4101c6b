"""The formula of `planner/memory.py` versus measured peaks: one training step of a head, in processes with gloo.

A rank's peak: the bytes of what lies between steps (weight, state, embeddings, labels), and the peak of what
torch.profiler saw allocated and freed during a step: forward, backward, the optimiser's step and zero_grad.
"""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist

from perf.planner.memory import Head, memory_on
from perf.suite import machine
from perf.suite.memory import allocations, peak_without
from perf.suite.steps import Loss, TrainingStep

WITHIN, SECONDS = 0.01, 300.0


def grid() -> list[Head]:
    """Every gradient form and optimiser on both numbers of ranks and rates, each at two opposite sizes of eight."""
    found = []
    forms = itertools.product((1, 2), (1.0, 0.1), ("dense", "sparse", "backward"), ("momentum", "adamw"))
    sizes = list(itertools.product((20_000, 200_000), (64, 256), (32, 256)))
    for index, form in enumerate(forms):
        small = (index // 2 + index % 2) % 4  # so that no option always meets the same size
        found += [Head(*sizes[size], *form) for size in (small, 7 - small)]
    return found


def rank_peak(rank: int, head: Head, meeting: str) -> int:
    """Bytes at the peak of a rank, in its own process."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=head.ranks)
    found = step_peak(head, dist.group.WORLD if head.ranks > 1 else None)
    dist.destroy_process_group()
    return found


def step_peak(head: Head, group: dist.ProcessGroup | None = None) -> int:
    options = {"sample_rate": head.rate, "sparse_grad": head.gradient == "sparse", "process_group": group}
    loss = Loss(options=options, optimizer=head.optimizer, in_backward=head.gradient == "backward")
    step = TrainingStep(loss, head.batch, head.dim, head.classes)
    step()  # makes the state
    most = min(peak_without(allocations(step), 0) for _ in range(2))  # gloo's thread may let go of a buffer late
    weight = step.head.weight
    state = [value for value in step.optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    return most + sum(each.nbytes for each in (weight, step.x, step.target, *state))


def table(heads: list[Head], progress: Callable[[float, str], object] = print) -> pd.DataFrame:
    """Heads in the order of their number of ranks, a line each: MB (10^6) of the fullest rank, formula and measured."""
    lines: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    for ranks, some in itertools.groupby(heads, key=lambda head: head.ranks):
        with tempfile.TemporaryDirectory() as folder, context.Pool(ranks) as pool:
            for head in some:
                work = [(rank, head, f"file://{folder}/{len(lines)}") for rank in range(ranks)]
                found, made = max(pool.starmap_async(rank_peak, work, chunksize=1).get(SECONDS)), memory_on(head, None)
                lines.append({**head._asdict(), "phase": made.phase, "formula_mb": made.peak / 1e6,
                              "measured_mb": found / 1e6, "formula_over_measured": made.peak / found})  # fmt: skip
                progress(len(lines) / len(heads), f"{head.title}: {made.peak / found:.4f}")
    return pd.DataFrame(lines)


def worst(frame: pd.DataFrame) -> float:
    """How far the formula is off, as a part of the measured peak; at most WITHIN is right."""
    return float((frame["formula_over_measured"] - 1.0).abs().max())


def write(frame: pd.DataFrame, out: Path) -> Path:
    path = out / "plan_check.csv"
    out.mkdir(parents=True, exist_ok=True)
    frame.assign(machine=machine.one_line(machine.describe("cpu"))).to_csv(path, index=False, float_format="%.5g")
    return path
