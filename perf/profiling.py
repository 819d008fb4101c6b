"""Where the time of our rows goes, operation by operation."""

from __future__ import annotations

from pathlib import Path

import torch

from perf.peaks import quiet_stderr
from perf.problem import Problem
from perf.providers import make
from perf.providers.base import STEP

ROWS = 25


def write_profiles(p: Problem, out: Path) -> list[Path]:
    """torch.profiler's table of the operations with most time of their own, for whole steps of ours."""
    written = []
    out.mkdir(parents=True, exist_ok=True)
    for name in ("ours", "ours-retain"):
        path = out / f"profile_{name}_{p.dtype}_N{p.n}_D{p.d}_C{p.classes}.txt"
        path.write_text(f"{name}, {STEP}, {p.title}, {torch.get_num_threads()} threads\n{profile(name, p)}\n")
        written.append(path)
    return written


def profile(name: str, p: Problem) -> str:
    provider = make(name)
    provider.prepare(p, p.tensors())
    for _ in range(2):
        provider.reset(STEP)
        provider.run(STEP)
    provider.reset(STEP)
    activities = [torch.profiler.ProfilerActivity.CPU]
    device = p.device.partition(":")[0]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with quiet_stderr(), torch.profiler.profile(activities=activities) as record:
        provider.run(STEP)
    return record.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=ROWS)
