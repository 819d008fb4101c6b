"""The memory formula of `perf/scale.py` beside measured peaks: one training step of a head, in fresh processes.

The peak of a rank is the exact bytes of what lies between steps (weight, optimiser state, embeddings and labels), plus
the peak of the running sum of what torch.profiler saw allocated and freed during one step: forward, backward, the
optimiser's step and zero_grad. It is the second step, so that the state is there. Ranks are processes with gloo.
"""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
from collections.abc import Iterable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.distributed as dist

import tritonmargin as tm
from perf import machine
from perf.peaks import allocations, peak_without, resident_growth
from perf.scale import Head, chunk_on_cpu, memory
from perf.terminal import Say

WITHIN = 0.05
SECONDS = 300.0


class Measured(NamedTuple):
    """Bytes of one rank."""

    lasting: int  # weight, state, embeddings and labels
    step: int  # the most that a step had allocated beyond them
    resident: int  # how far the resident set grew during a step

    @property
    def peak(self) -> int:
        return self.lasting + self.step


def grid() -> list[Head]:
    """Every gradient form and optimiser on both numbers of ranks and rates, each at two opposite sizes of eight."""
    found = []
    forms = itertools.product((1, 2), (1.0, 0.1), ("dense", "sparse", "backward"), ("momentum", "adamw"))
    sizes = list(itertools.product((20_000, 200_000), (64, 256), (32, 256)))
    for place, (ranks, rate, gradient, optimizer) in enumerate(forms):
        small = (place // 2 + place % 2) % 4  # so that no option always meets the same size
        for classes, dim, batch in (sizes[small], sizes[7 - small]):
            found.append(Head(classes, dim, batch, ranks, rate, gradient, optimizer))
    return found


def measure(head: Head) -> list[Measured]:
    """Each rank's peak, on processes of their own."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(head.ranks) as pool:
        work = [(rank, head, f"file://{folder}/meet") for rank in range(head.ranks)]
        return pool.starmap_async(rank_peak, work, chunksize=1).get(SECONDS)


def rank_peak(rank: int, head: Head, meeting: str) -> Measured:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    group = None
    if head.ranks > 1:
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=head.ranks)
        group = dist.group.WORLD
    try:
        return step_peak(head, group)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def step_peak(head: Head, group: dist.ProcessGroup | None) -> Measured:
    module = tm.MarginSoftmaxLoss(
        head.dim, head.classes, sample_rate=head.rate, sparse_grad=head.gradient == "sparse", process_group=group,
        retain_bytes=head.retain,
    )  # fmt: skip
    optimizer = optimizer_of(head, module)
    if head.gradient == "backward":
        module.update_in_backward(optimizer)
    x = torch.randn(head.batch, head.dim, requires_grad=True)
    target = torch.randint(head.classes, (head.batch,))

    def step() -> None:
        loss = module(x, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    grown = resident_growth(step)
    state = [value for value in optimizer.state[module.weight].values() if isinstance(value, torch.Tensor)]
    lasting = sum(each.numel() * each.itemsize for each in (module.weight, x, target, *state))
    return Measured(lasting, peak_without(allocations(step), 0), grown)


def optimizer_of(head: Head, module: torch.nn.Module) -> tm.optim.RowSGD | tm.optim.RowAdamW:
    if head.optimizer == "adamw":
        return tm.optim.RowAdamW(module.parameters(), lr=1e-3)
    return tm.optim.RowSGD(module.parameters(), lr=0.1, momentum=0.9 if head.optimizer == "momentum" else 0.0)


def table(heads: Iterable[Head], say: Say = print) -> pd.DataFrame:
    """One line per head: predicted and measured MB (10^6) of the rank with the larger peak."""
    lines = []
    heads = list(heads)
    with ThreadPool(2) as pool:  # most of a measurement is the start of processes
        measured = pool.imap(measure, heads)
        for head in heads:
            say(f"scale-check: {head.title}")
            got = max(next(measured), key=lambda each: each.peak)
            lines.append(line(head, got))
    return pd.DataFrame(lines)


def line(head: Head, got: Measured) -> dict[str, Any]:
    made = memory(head, chunk_on_cpu(head))
    return {
        **head._asdict(), "phase": made.largest.name, "predicted_mb": made.peak / 1e6, "measured_mb": got.peak / 1e6,
        "predicted_over_measured": made.peak / got.peak, "lasting_mb": got.lasting / 1e6, "step_mb": got.step / 1e6,
        "first_step_rss_mb": got.resident / 1e6,
    }  # fmt: skip


def holds(frame: pd.DataFrame) -> bool:
    return bool(((frame["predicted_over_measured"] - 1.0).abs() <= WITHIN).all())


def write(frame: pd.DataFrame, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    frame = frame.assign(machine=machine.one_line(machine.describe("cpu")))
    frame.to_csv(out / "plan_check.csv", index=False, float_format="%.5g")
    return out / "plan_check.csv"
