"""How long a tile takes at best, from machine code and published rates: a prediction, never a measurement.

A tile keeps these parts of a processor busy, each for a number of cycles that can be counted:

    matrix   2 BLOCK_N BLOCK_C D flops on the matrix units
    exp      the exp2 (and other special) instructions of the epilogue
    issue    every instruction of the usual path, once per thread
    shared   bytes that the product reads from shared memory, and that are loaded into it
    memory   bytes from and to main memory
    latency  rounds of the sum, each waiting for loads that `stages` - 1 rounds and the other blocks hide

With two or more blocks on a processor, or with specialised warps, the epilogue of one tile runs beside the product of
another, and the largest of them is the bound. A block alone does one after the other. The matrix units are taken to
sustain `SUSTAINED` of their peak, an assumption: power limits and the edges of a loop cost the best libraries as much.
"""

from __future__ import annotations

from typing import NamedTuple

from perf.compiled import Compiled, itemsize
from perf.gpus import Gpu

SUSTAINED = 0.8
LATENCY = 600  # cycles from the shared cache, an assumption: published measurements of A100 and H100 are 200 to 700
# Seconds of the CPU, outside of a CUDA graph: of a launch, and of a step beside its chunks, for its small operations.
# By the step's time over its chunks beside an H200 (reports/gpu-h200/second); another host took twice that (first).
LAUNCH, STEP = 50e-6, 7e-3


class Bound(NamedTuple):
    """Cycles of one tile on one processor."""

    matrix: float
    exp: float
    issue: float
    shared: float
    memory: float
    latency: float
    blocks: int  # resident on a processor
    overlapped: bool  # two blocks, or warps that share the work by its kind

    @property
    def terms(self) -> dict[str, float]:
        """The matrix units at the rate that they sustain."""
        return {**self._asdict(), "matrix": self.matrix / SUSTAINED, "blocks": 0, "overlapped": 0}

    @property
    def largest(self) -> str:
        return max(self.terms, key=lambda name: self.terms[name])

    @property
    def cycles(self) -> float:
        if self.overlapped:
            return max(self.terms.values())
        of = self.terms
        return max(of["matrix"], of["shared"], of["memory"], of["latency"]) + max(of["exp"], of["issue"] / 2)


def blocks(compiled: Compiled, gpu: Gpu) -> int:
    """How many programs a processor holds at a time."""
    registers = -(-compiled.registers // 8) * 8 * compiled.all_threads
    return min(
        gpu.shared_total // max(compiled.shared + 1024 * (not gpu.target.startswith("gfx")), 1),
        gpu.registers // max(registers, 1),
        gpu.threads // compiled.all_threads,
    )


def tile_bound(compiled: Compiled, gpu: Gpu, dtype: str, memory_bytes: float) -> Bound:
    """Of a launch of `tile_kernel`; `memory_bytes`: what the tile moves from and to main memory."""
    of = compiled.options
    block_n, block_c, block_d = of["BLOCK_N"], of["BLOCK_C"], of["BLOCK_D"]
    rounds = -(-of["D"] // block_d)
    done, beside = compiled.instructions.per_tile(rounds), compiled.instructions.beside(rounds)
    size = itemsize(dtype)
    resident = blocks(compiled, gpu)
    return Bound(
        matrix=2 * block_n * block_c * block_d * rounds / gpu.matrix_rate(dtype),
        exp=(done["exp2"] + done["special"]) * compiled.threads / gpu.special,
        # Of warps beside the others at most all that were added take each instruction.
        issue=(
            sum(count for kind, count in done.items() if kind != "scalar") * compiled.threads
            + sum(beside.values()) * (compiled.all_threads - compiled.threads)
        )
        / gpu.issue,
        shared=operand_numbers(compiled) * rounds * size / gpu.shared_bandwidth,
        memory=memory_bytes / (gpu.memory / gpu.processors / gpu.clock),
        latency=rounds * LATENCY / max(of["num_stages"] - 1, 1) / max(resident, 1),
        blocks=resident,
        overlapped=resident >= 2 or bool(compiled.instructions.products),
    )


def operand_numbers(compiled: Compiled) -> int:
    """Numbers that go through shared memory in one round: loaded once, read by every group of warps that needs them."""
    of = compiled.options
    n, c, d = of["BLOCK_N"], of["BLOCK_C"], of["BLOCK_D"]
    kinds = compiled.instructions.written
    if kinds["HGMMA"]:  # a warp group of 64 samples reads its own and all classes
        return d * (n + c + n + max(1, n // 64) * c)
    if kinds["UTCMMA"]:  # 128 samples at a time
        return d * (n + c + n + max(1, n // 128) * c)
    across = 2 if of["num_warps"] >= 4 else 1  # warps side by side along the classes
    return d * (n + c + across * n + of["num_warps"] // across * c)
