"""Published numbers of the GPUs that the kernels are compiled for. Nothing here was measured by us.

Sources: NVIDIA A100 whitepaper (2020) and CUDA C++ programming guide, tables of throughput per multiprocessor and of
compute capabilities; NVIDIA H100 whitepaper (2022), SXM5 column; NVIDIA Blackwell B200 datasheet and architecture
brief (2024/2025); NVIDIA Ada whitepaper (2022), RTX 4090; AMD CDNA 3 whitepaper and MI300X datasheet (2023). Rates are
dense (no sparsity), per clock and processor, at the boost clock for which the vendor quotes its peak.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    name: str
    target: str  # as tritonmargin.kernels.tiles names it
    processors: int  # SMs or CUs
    clock: float  # Hz, boost
    bfloat16: int  # flops per clock and processor on the matrix units, float16 alike
    tf32: int
    float32: int  # flops of the vector lanes
    special: int  # exp2 per clock and processor
    issue: int  # instructions per clock and processor, counted once for each of their threads
    shared: int  # bytes of shared memory that a block may have
    shared_total: int  # bytes that all blocks of a processor share
    shared_bandwidth: int  # bytes per clock and processor
    registers: int  # 32-bit registers of a processor
    threads: int  # resident threads of a processor
    cache: int  # bytes of the cache that all processors share
    memory: float  # bytes per second
    capacity: float  # bytes of memory

    def matrix_rate(self, dtype: str) -> int:
        """Flops per clock and processor of `tl.dot`; "tf32": of float32 that is rounded to it."""
        return {"float32": self.float32, "tf32": self.tf32}.get(dtype, self.bfloat16)

    def peak(self, dtype: str) -> float:
        """Flops per second."""
        return self.matrix_rate(dtype) * self.processors * self.clock


GPUS = {
    gpu.target: gpu
    for gpu in (
        Gpu("A100 SXM 80 GB", "sm_80", 108, 1.41e9, 2048, 1024, 128, 16, 128, 166_912, 167_936, 128, 65_536, 2048,
            40 << 20, 2.039e12, 80e9),
        Gpu("H100 SXM", "sm_90", 132, 1.83e9, 4096, 2048, 256, 16, 128, 232_448, 233_472, 128, 65_536, 2048,
            50 << 20, 3.35e12, 80e9),
        Gpu("B200", "sm_100", 148, 1.85e9, 8192, 4096, 256, 16, 128, 232_448, 233_472, 128, 65_536, 2048,
            126 << 20, 8.0e12, 180e9),
        Gpu("RTX 4090", "sm_89", 128, 2.52e9, 512, 256, 256, 16, 128, 101_376, 102_400, 128, 65_536, 1536,
            72 << 20, 1.008e12, 24e9),
        Gpu("MI300X", "gfx942", 304, 2.1e9, 2048, 1024, 256, 16, 64, 65_536, 65_536, 128, 131_072, 2048,
            256 << 20, 5.3e12, 192e9),
    )
}  # fmt: skip

# The same processors with other memory (NVIDIA H200 datasheet, 2024).
H200 = GPUS["sm_90"]._replace(name="H200 SXM", memory=4.8e12, capacity=141e9)


def card(target: str, name: str) -> Gpu | None:
    """The numbers of a GPU by what it is compiled for and what its driver calls it."""
    return H200 if re.search(r"\bH200\b", name) else GPUS.get(target)


class Node(NamedTuple):
    """A GPU among others: its way to them, in bytes per second in one direction."""

    gpu: Gpu
    link: float  # to the other GPUs of its machine
    network: float  # to other machines, its own adapter
    together: int = 8  # GPUs of a machine

    def rate(self, ranks: int) -> float:
        """What a rank sends in a ring: over its link, or, where rings leave the machine, over all its adapters.

        A ring crosses from machine to machine once, and as many rings run side by side as there are adapters, so that
        their adapters carry together what each rank sends.
        """
        return self.link if ranks <= self.together else min(self.link, self.together * self.network)


# By the names of the command line. NVLink: half of what the whitepapers quote for both directions (600, 900 and 1800
# GB/s); MI300X: half of the 896 GB/s of its platform brief (2023). Memory and network: NVIDIA DGX A100 datasheet (8 x
# 80 GB, 8 ConnectX-6 of 200 Gb/s, 2021), DGX H100 datasheet (8 x 80 GB, 8 ConnectX-7 of 400 Gb/s, 2023), DGX B200
# datasheet (8 x 180 GB, 8 x 400 Gb/s, 2024); AMD quotes no network, Azure's ND MI300X v5 has 8 x 400 Gb/s (2024).
NODES = {
    "a100": Node(GPUS["sm_80"], 300e9, 25e9),
    "h100": Node(GPUS["sm_90"], 450e9, 50e9),
    "h200": Node(H200, 450e9, 50e9),
    "b200": Node(GPUS["sm_100"], 900e9, 50e9),
    "mi300x": Node(GPUS["gfx942"], 448e9, 50e9),
}
