"""On what the numbers were measured."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

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
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.system(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "device": device,
    }
    if device.startswith("cuda"):
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts


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
    return ", ".join(parts) + f"; {facts['date']}, load before the run {facts['load_before']}"
