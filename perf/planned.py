"""`python -m perf plan` on GPUs: which settings fit, what they should cost. Nothing of it was measured."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

from perf.gpus import Node
from perf.predicted import Step, chunk_on, step
from perf.scale import GRADIENTS, ITEMS, Head, Memory, memory
from perf.traffic import collectives

RESERVED = 2e9  # bytes of a GPU for the CUDA context, NCCL's buffers and the allocator's slack, an assumption
RATES = (0.3, 0.1, 0.03, 0.01)
MOST_RANKS = 1 << 16
FORMS = {"dense": "dense gradient", "sparse": "sparse gradient", "backward": "update in backward"}


class Option(NamedTuple):
    """One setting and what it takes, predicted."""

    head: Head
    memory: Memory
    step: Step

    def fits(self, room: float) -> bool:
        return self.memory.peak <= room

    @property
    def numbers(self) -> tuple[object, ...]:
        """What the trained numbers depend on: dtypes and rate. The gradient's form changes cost alone."""
        return self.head.state_item, self.head.weight_item, self.head.rate

    @property
    def form(self) -> str:
        """The setting without its rate."""
        head = self.head
        stochastic = ", rounded by chance" if head.weight_item == 2 else ""
        state = f"{ITEMS[head.state_item]} state, " if head.states else ""
        return f"{FORMS[head.gradient]}, {state}{ITEMS[head.weight_item]} weights{stochastic}"

    @property
    def setting(self) -> str:
        return f"{self.form}, sample rate {self.head.rate:g}"


class Plan(NamedTuple):
    """The settings from the one asked for on, each cheaper in memory than the one before, mostly."""

    node: Node
    room: float  # bytes that the head may take of a GPU
    options: list[Option]

    @property
    def recommended(self) -> Option | None:
        """Of what fits with the numbers of the first that does, the fastest; of equally fast ones the smallest."""
        fitting = [each for each in self.options if each.fits(self.room)]
        alike = [each for each in fitting if each.numbers == fitting[0].numbers]
        return min(alike, key=lambda each: (each.step.total, each.memory.peak), default=None)


def option(head: Head, node: Node) -> Option:
    return Option(head, memory(head, chunk_on(head, node)), step(head, node))


def plan(head: Head, node: Node, room: float | None = None) -> Plan:
    room = node.gpu.capacity - RESERVED if room is None else room
    return Plan(node, room, [option(each, node) for each in ladder(head)])


def ladder(head: Head) -> list[Head]:
    """From what was asked for: gradients of less memory, then state, weights and rates, each with those before."""
    steps = [head]
    for form in GRADIENTS[GRADIENTS.index(head.gradient) + 1 :]:
        steps.append(steps[-1]._replace(gradient=form))
    if head.states and head.state_item > 2:
        steps.append(steps[-1]._replace(state_item=2))
    if head.weight_item > 2:
        steps.append(steps[-1]._replace(weight_item=2))
    return steps + [steps[-1]._replace(rate=rate) for rate in RATES if rate < head.rate]


def ranks_needed(head: Head, node: Node, room: float) -> int | None:
    """The least power of two of ranks, as many samples on each, on which the last setting of the ladder fits."""
    smallest, ranks = ladder(head)[-1], head.ranks
    while ranks <= MOST_RANKS:
        wider = smallest._replace(ranks=ranks)
        if memory(wider, chunk_on(wider, node)).peak <= room:
            return ranks
        ranks *= 2
    return None


# -- tables ------------------------------------------------------------------------------------------------------


def memory_table(made: Plan) -> pd.DataFrame:
    """GB (10^9) of a rank: what was asked for, and what is recommended."""
    shown = {"as asked": made.options[0]}
    if made.recommended and made.recommended is not made.options[0]:
        shown["recommended"] = made.recommended
    lines = []
    for name, each in shown.items():
        most = each.memory.largest
        parts = {
            "weights": each.memory.weight, "optimiser state": each.memory.state, "gradient": most.gradient,
            "chunk buffers": most.chunk, "activations": most.samples, "in all": each.memory.peak,
        }  # fmt: skip
        lines.append({"": name, **{part: gb(size) for part, size in parts.items()}, "peak in": most.name})
    return pd.DataFrame(lines)


def traffic_table(head: Head) -> pd.DataFrame:
    return pd.DataFrame([
        {"exchange": each.kind, "what": each.what, "MB": f"{each.bytes / 1e6:.4g}",
         "MB sent by a rank": f"{each.sent(head.ranks) / 1e6:.4g}"}
        for each in collectives(head)
    ])  # fmt: skip


def options_table(made: Plan) -> pd.DataFrame:
    lines = []
    for each in made.options:
        lines.append({
            "setting": each.setting, "GB, predicted": gb(each.memory.peak),
            "fits": "yes" if each.fits(made.room) else "NO", "ms, predicted": f"{1e3 * each.step.total:.3g}",
            "bound by": each.step.bound,
        })  # fmt: skip
    return pd.DataFrame(lines)


def time_table(made: Plan) -> pd.DataFrame:
    """Milliseconds of a step, by what takes them."""
    each = made.recommended or made.options[0]
    of = each.step
    parts = {
        "matrix products and exp": of.products, "W and its gradient through memory": of.rows,
        "launches, if the CPU is slower than both": of.launches, "drawing of a sample": of.drawing,
        "optimiser's step": of.optimizer,
        "exchanges between ranks": of.exchanges, "step": of.total,
    }  # fmt: skip
    return pd.DataFrame([{"part": name, "ms, predicted": f"{1e3 * seconds:.3g}"} for name, seconds in parts.items()])


def verdict(made: Plan) -> str:
    """The recommended setting, or that there is none."""
    head, found = made.options[0].head, made.recommended
    where = f"{head.ranks} x {made.node.gpu.name}, {gb(made.room)} GB of each for the head"
    if found is not None:
        return (
            f"recommended on {where}: {found.setting}; predicted {gb(found.memory.peak)} GB a rank, "
            f"{1e3 * found.step.total:.3g} ms a step, bound by {found.step.bound}"
        )
    ranks = ranks_needed(head, made.node, made.room)
    more = "more ranks do not help" if ranks is None else f"{ranks} ranks would do, predicted, with the last of them"
    return f"impossible on {where}: no setting fits; {more}"


def gb(size: float) -> str:
    return f"{size / 1e9:.3g}"
