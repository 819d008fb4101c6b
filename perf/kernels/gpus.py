"""Published numbers of the GPUs that the kernels are compiled for: how much a processor holds. Not measured by us.

Sources: NVIDIA A100 (2020), H100 (2022, SXM5) and Ada (2022) whitepapers; H200 and B200 datasheets (2024); CUDA C++
programming guide, table of compute capabilities; AMD CDNA 3 whitepaper and MI300X datasheet (2023). What was measured
is in model.py.
"""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    name: str
    target: str  # as the kernels' table of tiles names it
    processors: int  # SMs or CUs
    shared: int  # bytes of shared memory that a block may have
    shared_total: int  # bytes that all blocks of a processor share
    registers: int  # 32-bit registers of a processor
    threads: int  # resident threads of a processor
    capacity: int  # bytes of memory
    lanes: int = 32  # threads of a warp


GPUS = {
    gpu.target: gpu
    for gpu in (
        Gpu("A100 SXM 80 GB", "sm_80", 108, 166_912, 167_936, 65_536, 2048, 80_000_000_000),
        Gpu("H100 SXM", "sm_90", 132, 232_448, 233_472, 65_536, 2048, 80_000_000_000),
        Gpu("B200", "sm_100", 148, 232_448, 233_472, 65_536, 2048, 180_000_000_000),
        Gpu("RTX 4090", "sm_89", 128, 101_376, 102_400, 65_536, 1536, 24_000_000_000),
        Gpu("MI300X", "gfx942", 304, 65_536, 65_536, 131_072, 2048, 192_000_000_000, 64),
    )
}

H200 = GPUS["sm_90"]._replace(name="H200 SXM", capacity=141_000_000_000)  # the same processors, more memory
