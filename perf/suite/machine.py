"""On what the numbers were measured."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
COMPARED = ("tritonmargin", "triton", "pytorch-metric-learning", "liger-kernel", "cut-cross-entropy", "quack-kernels")


def describe(device: str = "cpu") -> dict[str, Any]:
    """Facts about the machine and its software; nothing that names it."""
    versions = {}
    for name in COMPARED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "caches": caches(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "versions": versions,
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
        "device": device,
    }
    if device.startswith("cuda"):
        gpu = torch.cuda.get_device_properties(device)
        facts |= {"gpu": gpu.name, "gpu_memory_gib": round(gpu.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return facts


def commit() -> str | None:
    """Of this repository, with a + if files differ from it; None outside of one."""
    about = "status", "--porcelain=v2", "--branch", "--untracked-files=no", "--", "tritonmargin", "perf", "examples"
    try:
        done = subprocess.run(["git", *about], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.splitlines()  # "# branch.oid 0123...", and others of the branch; then one for each file
    head = next((line.split()[2] for line in lines if line.startswith("# branch.oid")), "")
    return head[:10] + "+" * any(not line.startswith("#") for line in lines)


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def caches() -> dict[str, str]:
    """Size of every cache that core 0 sees, e.g. {"L1 Data": "32K", "L3 Unified": "32768K"}."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with contextlib.suppress(OSError):
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            found[f"L{level} {kind}"] = size
    return found


def memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def one_line(facts: dict[str, Any]) -> str:
    """The machine in a sentence, of the facts that are known."""
    on_gpu = ("gpu", "{}"), ("gpu_memory_gib", "{} GiB")
    on_cpu = ("cpu", "{}"), ("cores", "{} cores"), ("instruction_set", "{}"), ("L3", "L3 {}"), ("memory_gib", "{} GiB")
    shown = *(on_gpu if "gpu" in facts else on_cpu), ("torch", "torch {}"), ("threads", "{} threads")
    when = ("date", "{}"), ("commit", "commit {}"), ("load_before", "load before the run {}")
    facts = {"L3": facts.get("caches", {}).get("L3 Unified"), **facts}
    known = {name for name, fact in facts.items() if fact is not None}
    both = ([words.format(facts[name]) for name, words in part if name in known] for part in (shown, when))
    return "; ".join(map(", ".join, both))
