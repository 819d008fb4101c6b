"""Kernels compiled for a GPU that is not there, and what their machine code says.

Inside `compiling_for(target)` a launch compiles its kernel for that target, with exactly the specialisation that its
arguments ask for, and does not run; the list it yields holds what came out.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from perf.kernels import cases
from perf.kernels.gpus import GPUS, Gpu

Progress = Callable[[float, str], Any]  # told the fraction that is done, and of what


class Compiled(NamedTuple):
    kernel: str
    gpu: Gpu
    options: dict[str, Any]  # the constants and options of the launch
    shared: int  # bytes
    warps: int  # with those that the compiler added to multiply and load for others
    registers: int
    spills: int  # bytes of local memory, or registers on AMD
    instructions: Counter[str]  # of one program by kind, each counted once however often it runs

    @property
    def blocks(self) -> int:
        """How many programs a processor holds at a time."""
        gpu, threads = self.gpu, self.warps * self.gpu.lanes
        registers = -(-self.registers // 8) * 8 * threads
        shared = self.shared + 1024 * (not gpu.target.startswith("gfx"))  # NVIDIA keeps 1 KB of each block
        return min(gpu.shared_total // max(shared, 1), gpu.registers // max(registers, 1), gpu.threads // threads)


def compiled_on(gpu: Gpu, launches: cases.Launches) -> dict[str, Compiled]:
    """Each launch as machine code, by its name."""
    with compiling_for(gpu) as found:
        for launch in launches.values():
            launch()
    return dict(zip(launches, found, strict=True))


def in_processes(work: Callable[[Any], Any], asked: Sequence[Any], progress: Progress) -> list[Any]:
    """`work` of each that is asked for; compiling keeps a core busy, so a process for each core."""
    found: list[Any] = []
    with multiprocessing.get_context("spawn").Pool() as pool:
        for each, result in zip(asked, pool.imap(work, asked), strict=True):
            progress(len(found) / len(asked), ", ".join(map(str, each)))
            found.append(result)
    return found


def elsewhere(target: str) -> SimpleNamespace:
    """As much of a Triton driver as compiling asks for."""
    kind = ("hip", target, 64) if target.startswith("gfx") else ("cuda", int(target.removeprefix("sm_")), 32)
    return SimpleNamespace(
        is_active=lambda: True,
        get_current_target=lambda: GPUTarget(*kind),
        get_current_device=lambda: target,  # what compiled kernels are kept by
        get_current_stream=lambda device: 0,
    )


_RUN = JITFunction.run  # what compiles; others may have put their own in its place since


@contextlib.contextmanager
def compiling_for(gpu: Gpu | str) -> Iterator[list[Compiled]]:
    """Launches of Triton kernels compile for this GPU, or for this target, and do not run."""
    gpu = GPUS[gpu] if isinstance(gpu, str) else gpu
    found: list[Compiled] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = _RUN(self, *args, grid=grid, warmup=True, **options)
        asm, about, kept = compiled.asm, compiled.metadata, {"num_warps": 4, "num_stages": 3} | options
        code = read_amd(asm["amdgcn"]) if gpu.target.startswith("gfx") else read_nvidia(asm["cubin"])
        found.append(Compiled(self.fn.__name__, gpu, kept, about.shared, about.num_warps, *code))
        return compiled

    # Asking for the driver by its public name would look for a GPU.
    driver = mock.patch.object(triton.runtime.driver, "_active", elsewhere(gpu.target))
    with cases.on(gpu), driver, mock.patch.object(JITFunction, "run", compile_only):
        yield found


@functools.lru_cache(maxsize=4096)
def read_nvidia(cubin: bytes) -> tuple[int, int, Counter[str]]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        call = [tool, "-sass", "--dump-resource-usage", file.name]
        text = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)[^;]*;", text)
    return registers, stack + local, kinds(name for name in names if name != "NOP")


def read_amd(text: str) -> tuple[int, int, Counter[str]]:
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
    spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
    return registers, spills, kinds(re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE))


KINDS = {  # of instructions, by how their names begin; other UTC... are barriers and the allocation of tensor memory
    "HGMMA": "HGMMA", "HMMA": "HMMA", r"UTC\w*MMA": "UTCMMA", "v_mfma": "mfma", "UTMALDG": "UTMALDG",
    "LDGSTS": "cp.async", r"MUFU\.EX2|v_exp_f32": "exp2", "LDL|STL|scratch_": "spill",
}  # fmt: skip
MATRIX = ("HGMMA", "HMMA", "UTCMMA", "mfma")
AHEAD = ("UTMALDG", "cp.async")  # loads that others do not wait for


def kinds(names: Iterable[str]) -> Counter[str]:
    return Counter(next((kind for begin, kind in KINDS.items() if re.match(begin, name)), "other") for name in names)
