"""No step may take the machine down: what memory is left, and a limit that the kernel enforces."""

from __future__ import annotations

import contextlib
from pathlib import Path

from perf.machine import memory_bytes

try:
    import resource
except ImportError:  # no such limits on this system
    resource = None  # type: ignore[assignment]

RESERVE = 1 << 30  # bytes that are never given away: this process, the system, the page cache of the moment
CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Memory that can still be had, in this machine or container."""
    free = field(Path("/proc/meminfo"), "MemAvailable") or memory_bytes() // 2
    with contextlib.suppress(OSError, ValueError):
        most = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        given_back = field(CGROUP / "memory.stat", "inactive_file", unit=1) or 0
        free = min(free, most - used + given_back)
    return free


def limit_memory() -> int:
    """Let this process allocate what is there now and no more; beyond it, allocations fail. The bytes it may have."""
    left = max(available_bytes() - RESERVE, RESERVE // 4)
    held = field(Path("/proc/self/status"), "VmData")
    if resource is not None and held is not None:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        soft = held + left if hard == resource.RLIM_INFINITY else min(held + left, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    return left


def field(path: Path, name: str, unit: int = 1024) -> int | None:
    """Bytes that a file of `name: number` lines says, or None."""
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            words = line.replace(":", " ").split()
            if len(words) > 1 and words[0] == name:
                return int(words[1]) * unit
    return None
