"""Memory of a head on one of R ranks, as a formula, and the settings that fit; nothing runs.

Every rank holds ceil(C / R) of the C classes, rows of D numbers, and has n of the N = R n samples. Weight and optimiser
state lie in memory between steps. Every term is bytes; vectors of a number per sample or class are counted roughly. On
CPUs it is the torch backend that is counted (`memory`), on GPUs the kernels' (`memory_of_kernels`).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from perf.kernels.gpus import GPUS, H200, Gpu
from perf.suite.machine import memory_bytes
from tritonmargin.class_pass.chunks import chunk_classes
from tritonmargin.optim.row_optimizer import CHUNK_BYTES

GRADIENTS = {"dense": "dense gradient", "sparse": "sparse gradient", "backward": "update in backward"}
ITEMS = {2: "bfloat16", 4: "float32"}  # bytes per number
STATES = {"sgd": 0, "momentum": 1, "adamw": 2}  # matrices like the weight
RESERVED = 2e9  # bytes of a GPU for the CUDA context, NCCL's buffers and the allocator's slack: an assumption
RATES, MOST_RANKS = (0.3, 0.1, 0.03, 0.01), 1 << 16
CARDS = {"a100": GPUS["sm_80"], "h100": GPUS["sm_90"], "h200": H200, "b200": GPUS["sm_100"], "mi300x": GPUS["gfx942"]}


class Head(NamedTuple):
    """A head, its optimiser and its batch."""

    classes: int  # of all ranks
    dim: int
    batch: int  # samples per rank
    ranks: int = 1
    rate: float = 1.0  # of a rank's classes that are active in a step
    gradient: str = "dense"
    optimizer: str = "momentum"
    weight_item: int = 4  # bytes per number
    state_item: int = 4
    compute_item: int = 4  # of the products' operands

    @property
    def rows(self) -> int:
        return -(-self.classes // self.ranks)

    @property
    def samples(self) -> int:
        return self.ranks * self.batch

    @property
    def active(self) -> int:
        """Classes of a step; a rank has N / R = n positives on average, if no two samples have the same class."""
        return min(self.rows, max(round(self.rate * self.rows), self.batch))

    @property
    def setting(self) -> str:
        state = f"{ITEMS[self.state_item]} state, " if STATES[self.optimizer] else ""
        sampled = f", sample rate {self.rate:g}" if self.rate < 1.0 else ""
        return f"{GRADIENTS[self.gradient]}, {state}{ITEMS[self.weight_item]} weights{sampled}"

    @property
    def title(self) -> str:
        return f"C={self.classes:,}, D={self.dim}, {self.ranks} x {self.batch} samples, {self.optimizer}"


class Memory(NamedTuple):
    """Bytes of one rank: between steps, and beyond that in the phase of a step that needs most."""

    weight: int
    state: int
    phase: str  # draw, forward, backward or step
    gradient: int
    chunk: int  # what follows the chunk of classes: rows, tile, what their update multiplies out
    batch: int  # what follows the samples: embeddings of all ranks and their gradients

    @property
    def peak(self) -> int:
        return self.weight + self.state + self.gradient + self.chunk + self.batch


Phase = tuple[str, int, int, int]  # its name; bytes of the gradient, of the chunk, of the batch


def memory(head: Head, chunk: int) -> Memory:
    """The peak of a rank that has `chunk` classes at a time, in PyTorch."""
    sampled, sparse, in_backward = head.rate < 1.0, head.gradient == "sparse", head.gradient == "backward"
    low = head.compute_item < 4  # then it works in float32 as well
    own, everyone = 4 * head.batch * head.dim, 4 * head.samples * head.dim  # embeddings in float32
    rows, tile = chunk * head.dim, chunk * head.samples

    # The end of the class pass in forward, when the targets' rows are gathered and the chunk's buffers are still there.
    buffers = (rows + tile) * head.compute_item + 4 * chunk + 4 * rows * low
    copy = rows * head.weight_item if sampled else 0  # of a sample's rows, until they are normalised
    # x and its copy in float32, all ranks' rows and those of their targets, some 30 vectors, the sample's numbers
    lasting = 2 * (own + everyone) + 30 * 4 * head.samples + 8 * head.active * sampled
    scaled = everyone * head.compute_item // 4  # x log2(e); and the product of the targets' rows and x
    forward = ("forward", 0, buffers + 4 * tile * low + copy, lasting + scaled + everyone)

    # The class pass of backward, with the gradient.
    direct = head.compute_item == head.weight_item == 4 and not in_backward and (sparse or not sampled)
    product = 0 if direct else rows * (head.compute_item + 4 * low)
    finishing = max(4 * rows, updating(head, chunk) * in_backward)  # the row dot, or the update
    targets = own * chunk // max(head.active, 1)  # gradients of the targets in a chunk
    # x times its factor; dX and the targets' gradient
    batch = lasting + 2 * scaled + 2 * everyone + targets
    backward = ("backward", gradient_bytes(head), buffers + product + max(copy, finishing), batch)
    return around(head, forward, backward)


def memory_of_kernels(head: Head, gpu: Gpu) -> Memory:
    """The peak of a rank on this GPU: the buffers of `backends.triton.class_pass`."""
    from perf.kernels.cases import plan_of  # Triton is imported when it is needed

    dtype = "float32" if head.compute_item == 4 else "bfloat16"
    other_rows = head.rate < 1.0 or head.weight_item != head.compute_item
    plan = plan_of(gpu, dtype, head.samples, head.dim, head.active, other_rows)
    item, blocks = head.compute_item, -(-plan.n // plan.weigh.shape[1])
    line_x = plan.line_n * plan.line_d
    copies = plan.line_d * item * plan.copied

    # x, on several ranks all of theirs; x' for the products, the targets' rows; numbers per sample, class and sample's
    # class; copied class rows, if forward keeps them.
    lasting = 4 * head.batch * head.dim + 4 * head.samples * head.dim * (head.ranks > 1)
    lasting += line_x * item + plan.n * plan.d * head.weight_item + (8 + 1 + 6) * 4 * plan.line
    kept = plan.active * (3 * 4 + 8 * (head.rate < 1.0)) + plan.active * copies * plan.whole

    slots = -(-min(plan.forward_chunk, plan.active) // plan.reduce.shape[1])
    chunked = plan.forward_chunk * (copies * (not plan.whole) + 4 * plan.line_n * plan.library)
    forward = ("forward", 0, kept + chunked, lasting + 4 * plan.n * slots)

    # P, its sums per class, copied rows and, where the library multiplies, the gradient's; the gradients of x' and x.
    per_class = plan.line_n * item + 4 * blocks + copies * (not plan.whole)
    per_class += 4 * plan.line_d * (not plan.finish_inside)
    # A row's steps and corrections, in float64.
    per_class += (4 + 4 * 8) * (head.optimizer == "adamw" and head.gradient == "backward")
    batch = lasting + 4 * line_x + 4 * plan.n * plan.d
    backward = ("backward", gradient_bytes(head), kept + plan.backward_chunk * per_class, batch)
    return around(head, forward, backward)


def gradient_bytes(head: Head) -> int:
    graded = {"backward": 0, "sparse": head.active, "dense": head.rows}[head.gradient]  # rows
    return graded * head.dim * head.weight_item


def around(head: Head, forward: Phase, backward: Phase) -> Memory:
    """The largest phase of a step: these two, the draw before them, the optimiser's step after them."""
    own, everyone = 4 * head.batch * head.dim, 4 * head.samples * head.dim
    # The drawing of a sample, its sort and the sort's buffers.
    draw = ("draw", 0, 48 * head.active * (head.rate < 1.0), 2 * own + everyone * (head.ranks > 1))

    # Some rows of the gradient at a time in float32, which are there until the next ones are.
    gradient, sparse = gradient_bytes(head), head.gradient == "sparse"
    graded = gradient // (head.dim * head.weight_item)
    some = min(graded, max(1, CHUNK_BYTES // (4 * head.dim)))
    copied = 4 * some * head.dim + max(updating(head, some), 4 * min(some, graded - some) * head.dim)
    # A sparse gradient has class numbers. Of the batch: embeddings and gradient, for a backbone's backward.
    step = ("step", gradient + 8 * head.active * sparse, copied, 2 * own)
    matrix = head.rows * head.dim
    states = STATES[head.optimizer] * matrix * head.state_item + 4 * head.rows * (head.optimizer == "adamw")
    largest = max((draw, forward, backward, step), key=lambda phase: sum(phase[1:]))
    return Memory(matrix * head.weight_item, states, *largest)


def updating(head: Head, rows: int) -> int:
    """What an update of so many rows has at its peak, beyond the gradient."""
    numbers = rows * head.dim
    picked = head.gradient == "sparse" or (head.gradient == "backward" and head.rate < 1.0)
    items = (head.weight_item, *[head.state_item] * STATES[head.optimizer])
    size = sum(numbers * (item * picked + 4 * (item < 4)) for item in items)  # a copy of the rows, and in float32
    # the quotient of the moments, and a row's corrections in float64
    return size + (4 * numbers + 3 * 8 * rows) * (head.optimizer == "adamw")


class Plan(NamedTuple):
    """The settings from the one asked for on, each with those before: the first that fits is the least of a change."""

    gpu: str | None  # one of CARDS; None: processes on CPUs
    capacity: float  # bytes of a rank for the head
    options: list[tuple[Head, Memory]]

    @property
    def fitting(self) -> tuple[Head, Memory] | None:
        return next((each for each in self.options if each[1].peak <= self.capacity), None)


def plan(head: Head, gpu: str | None = None, capacity: float | None = None) -> Plan:
    """What fits on each of the head's ranks, which have `capacity` bytes for it; by default all of the machine's."""
    if capacity is None:
        capacity = memory_bytes() if gpu is None else CARDS[gpu].capacity - RESERVED
    return Plan(gpu, capacity, [(each, memory_on(each, gpu)) for each in ladder(head)])


def memory_on(head: Head, gpu: str | None) -> Memory:
    if gpu is None:
        return memory(head, chunk_classes(head.samples, head.dim, head.active, 0))
    return memory_of_kernels(head, CARDS[gpu])


def ladder(head: Head) -> list[Head]:
    """From what was asked for: gradients of less memory, then state, weights and rates, each with those before."""
    forms = list(GRADIENTS)
    changes = [{"gradient": form} for form in forms[forms.index(head.gradient) + 1 :]]
    changes += [{"state_item": 2}] * bool(STATES[head.optimizer]) + [{"weight_item": 2}]
    changes += [{"rate": rate} for rate in RATES if rate < head.rate]
    made = itertools.accumulate(changes, lambda before, change: before._replace(**change), initial=head)
    return list(dict.fromkeys(made))  # without what changes nothing


def ranks_needed(head: Head, gpu: str | None, capacity: float) -> int | None:
    """The least of its ranks doubled again and again, as many samples on each, on which it fits."""
    while memory_on(head, gpu).peak > capacity:
        head = head._replace(ranks=2 * head.ranks)
        if head.ranks > MOST_RANKS:
            return None
    return head.ranks


def plan_table(made: Plan) -> pd.DataFrame:
    """GB (10^9) of a rank in each setting."""
    lines = []
    for head, each in made.options:
        ranks = ranks_needed(head, made.gpu, made.capacity)
        sizes = (each.weight, each.state, each.gradient, each.chunk, each.batch, each.peak)
        lines.append((head.setting, *map(gb, sizes), "yes" if each.peak <= made.capacity else "NO", str(ranks or "-")))
    names = "setting", "weights", "state", "gradient", "buffers", "batch", "in all", "fits", "ranks needed"
    return pd.DataFrame(lines, columns=names)


def verdict(made: Plan) -> str:
    """The first setting that fits, or how many ranks the last one needs."""
    head = made.options[0][0]
    where = f"{head.ranks} x {CARDS[made.gpu].name if made.gpu else 'CPU'}, {gb(made.capacity)} GB of each for the head"
    if made.fitting:
        head, found = made.fitting
        return f"fits on {where}: {head.setting}; {gb(found.peak)} GB a rank by formula"
    ranks = ranks_needed(made.options[-1][0], made.gpu, made.capacity)
    more = f"{ranks} ranks would do with the last of them" if ranks else f"not even {MOST_RANKS:,} ranks would do"
    return f"no setting fits on {where}; {more}"


def gb(size: float) -> str:
    return f"{size / 1e9:.3g}"


PUBLISHED = {(1_000_000, 0.1): 5.62, (1_000_000, 1.0): 9.966, (29_000_000, 0.1): 32.324}  # GB, by classes and rate


def write_table(out: Path) -> Path:
    """plan.csv and plan.md: heads of 1 to 100 million classes on 8 GPUs."""
    lines = []
    for size in itertools.product((1_000_000, 10_000_000, 29_000_000, 100_000_000), (0.1, 1.0)):
        options = plan(Head(size[0], 512, 128, 8, size[1], compute_item=2), "h100").options
        lines.append((*size, *(each.peak / 1e9 for _, each in options[0:5:2]), PUBLISHED.get(size, "")))
    names = ("classes", "rate", "dense_gradient_gb", "update_in_backward_gb", "bfloat16_too_gb", "published_gb")
    frame = pd.DataFrame(lines, columns=names)
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "plan.csv", index=False, float_format="%.5g")
    shown = frame.rename(columns=lambda name: name.replace("_", " "))
    (out / "plan.md").write_text(f"""\
# Memory of heads of up to 100 million classes on 8 GPUs

GB (10^9) of each of 8 {CARDS["h100"].name}, by the formula of `python -m perf plan-check`: within 1 % of 48 peaks
measured on CPUs ([plan_check.csv](plan_check.csv)), on GPUs not measured. D=512, 128 samples a GPU, momentum SGD,
bfloat16 products; weights and state are float32, in the setting "bfloat16 too" bfloat16.

{shown.to_markdown(index=False, floatfmt=".3g", intfmt=",")}

Published: measured on 8 V100, a ResNet50 and its activations included; rate 1 is model parallel, 0.1 Partial FC
(deepinsight/insightface, recognition/arcface_torch/docs/speed_benchmark.md, 2021-07). Ours is the head alone.
""")
    return out / "plan.md"
