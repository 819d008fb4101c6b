"""On what the numbers were measured."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
CPU = Path("/sys/devices/system/cpu")


def describe(device: str = "cpu") -> dict[str, Any]:
    """Facts about the machine and its software; nothing that names it."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "caches": caches(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "huge_pages": first_line(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "torch": torch.__version__,
        "versions": versions(),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.system(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "device": device,
    }
    if device.startswith("cuda"):
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts


def versions() -> dict[str, str]:
    """Of everything that is compared."""
    found = {}
    for name in (
        "tritonmargin",
        "triton",
        "pytorch-metric-learning",
        "liger-kernel",
        "cut-cross-entropy",
        "quack-kernels",
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str | None:
    """Of this repository, with a + if files differ from it; None outside of one."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "tritonmargin", "perf", "examples")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_model() -> str:
    """The first model name of /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def caches() -> dict[str, str]:
    """Size of every cache that core 0 sees, e.g. {"L1 Data": "32K", "L3 Unified": "32768K"}."""
    found = {}
    for index in sorted((CPU / "cpu0/cache").glob("index*")):
        level, kind, size = (first_line(index / name) for name in ("level", "type", "size"))
        if level and size:
            found[f"L{level} {kind}"] = size
    return found


def memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


def first_line(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def one_line(facts: dict[str, Any]) -> str:
    """The machine in a sentence, for a page."""
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores, {facts['instruction_set']}"
    last = [f"{name} {size}" for name, size in facts["caches"].items() if name.startswith("L3")]
    parts = [where, *last, f"{facts['memory_gib']} GiB", f"torch {facts['torch']}", f"{facts['threads']} threads"]
    at = f", commit {facts['commit']}" if facts.get("commit") else ""
    return ", ".join(parts) + f"; {facts['date']}{at}, load before the run {facts['load_before']}"
