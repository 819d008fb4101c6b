"""Where the time of our rows goes, operation by operation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from perf.memory import fresh, quiet_stderr, run
from perf.providers import discover
from perf.tables import STEP, Row

ROWS = 25


def write_profiles(rows: Iterable[Row], out: Path) -> list[Path]:
    """torch.profiler's table of the operations with most time of their own, for every whole step of ours."""
    written = []
    for row in rows:
        if row.mode != STEP or row.provider not in ("ours", "ours-retain"):
            continue
        p = row.problem
        path = out / f"profile_{row.provider}_{p.dtype}_N{p.n}_D{p.d}_C{p.classes}.txt"
        path.write_text(f"{row.provider}, {row.mode}, {p.title}, {torch.get_num_threads()} threads\n{profile(row)}\n")
        written.append(path)
    return written


def profile(row: Row) -> str:
    provider = fresh(discover().providers[row.provider], row.problem)
    run(provider, row.mode)
    provider.reset(row.mode)
    activities = [torch.profiler.ProfilerActivity.CPU]
    device = row.problem.device.partition(":")[0]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with quiet_stderr(), torch.profiler.profile(activities=activities) as record:
        run(provider, row.mode)
    return record.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=ROWS)
