"""How long a step of a sharded head should take on GPUs that are not here: predicted, never measured.

A rank's kernels are predicted as `python -m perf audit` does it, of N samples of all ranks against the S classes that
the rank walks. Beside them: bytes of W and the optimiser's state beyond what the kernels' model counts, the optimiser's
step and the drawing of a sample at the rate of main memory, and the exchanges in rings. Nothing overlaps. Not counted:
the CPU's work of a step beside its chunks (`static.STEP`), which a backbone hides.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from perf import kernels
from perf.gpus import Gpu, Node
from perf.scale import Head
from perf.traffic import collectives, drawing_bytes, optimizer_bytes

HOP = 20e-6  # seconds that an exchange takes however small it is, an assumption
FINISH = {"sgd": kernels.SGD, "momentum": kernels.SGD, "adamw": kernels.ADAMW}


class Step(NamedTuple):
    """Seconds of one step of a rank, predicted."""

    products: float  # the tile kernels and the products: matrix units
    rows: float  # the row-wise kernels: W, its gradient or update, through main memory
    drawing: float  # of a sample: a number for every class
    launches: float  # the CPU's, beside the two above
    optimizer: float
    exchanges: float

    @property
    def total(self) -> float:
        return self.drawing + max(self.products + self.rows, self.launches) + self.optimizer + self.exchanges

    @property
    def bound(self) -> str:
        """What takes longest."""
        names = {
            "matrix products and exp": self.products, "W and its gradient through memory": self.rows,
            "the drawing of a sample": self.drawing,
            "the CPU's launches": self.launches if self.launches > self.products + self.rows else 0.0,
            "the optimiser's step through memory": self.optimizer, "exchanges between ranks": self.exchanges,
        }  # fmt: skip
        return max(names, key=lambda name: names[name])


def chunk_on(head: Head, node: Node) -> int:
    return kernels.chunk_of(node.gpu, dtype_of(head), head.samples, head.dim, head.walked)


def dtype_of(head: Head) -> str:
    return "float32" if head.compute_item == 4 else "bfloat16"


@functools.cache
def parts(gpu: Gpu, dtype: str, n: int, d: int, c: int) -> dict[str, float]:
    return kernels.step_parts(gpu, dtype, n, d, c)


def step(head: Head, node: Node) -> Step:
    of = parts(node.gpu, dtype_of(head), head.samples, head.dim, head.walked)
    tiles = of["reduce_chunk"] + of["weigh_chunk"] + of["products"]
    finish = of[FINISH[head.optimizer]] if head.gradient == "backward" else of["finish_rows"]
    moved = collectives(head)
    return Step(
        products=tiles,
        rows=of["prepare_rows"] + finish + wider_bytes(head) / node.gpu.memory,
        drawing=drawing_bytes(head) / node.gpu.memory,
        launches=of["launches"],
        optimizer=optimizer_bytes(head) / node.gpu.memory,
        exchanges=sum(each.sent(head.ranks) for each in moved) / node.rate(head.ranks) + HOP * len(moved),
    )


def wider_bytes(head: Head) -> int:
    """What W, dW and the state are wider than the kernels' model has them, which is as wide as the products' operands.

    W is read by prepare_rows twice and by finish_rows once, and it or its gradient is written once. State is read and
    written where the update is in backward.
    """
    numbers, item = head.walked * head.dim, head.compute_item
    wider = 4 * (head.weight_item - item)
    if head.gradient == "backward":
        wider += 2 * (head.states * head.state_item - kernels.STATES[FINISH[head.optimizer]] * item)
    return numbers * wider
