"""Memory and traffic of a head on one of R ranks, as formulas; nothing runs.

C classes are split over the ranks, c = ceil(C / R) rows of D numbers each; a rank has n samples and all ranks together
N = R n. A step walks S = c classes, or of a sample max(round(r c), positives), K at a time. What lies in memory between
steps is the weight and the optimiser's state. A step adds most at one of four times:

    draw      of a sample
    forward   the end of the walk, when the targets' rows are gathered and the chunk's buffers are still there
    backward  in the walk, with the gradient
    step      in the optimiser's step, which copies some rows of the gradient at a time

Every term is bytes: numbers times bytes per number, named after what holds them in tritonmargin. Vectors of N or K
numbers are counted roughly.
"""

from __future__ import annotations

from typing import NamedTuple

from tritonmargin.optim import CHUNK_BYTES
from tritonmargin.walk import chunk_classes, retained_classes

GRADIENTS = ("dense", "sparse", "backward")  # backward: rows are updated in it, and there is no gradient
ITEMS = {2: "bfloat16", 4: "float32"}  # bytes per number
STATES = {"sgd": 0, "momentum": 1, "adamw": 2}  # matrices like the weight
VECTORS = 30  # of N numbers that the loss keeps or makes


class Head(NamedTuple):
    """A head, its optimiser and its batch."""

    classes: int  # of all ranks
    dim: int
    batch: int  # samples per rank
    ranks: int = 1
    rate: float = 1.0  # of classes that a step walks
    gradient: str = "dense"
    optimizer: str = "momentum"
    weight_item: int = 4  # bytes per number
    state_item: int = 4
    compute_item: int = 4  # of the products' operands
    retain: int = 0  # bytes of logits kept from forward to backward
    fused: bool = False  # Triton kernels: elementwise work needs no memory

    @property
    def rows(self) -> int:
        """c, the classes of a rank."""
        return -(-self.classes // self.ranks)

    @property
    def samples(self) -> int:
        """N, of all ranks."""
        return self.ranks * self.batch

    @property
    def sampled(self) -> bool:
        return self.rate < 1.0

    @property
    def walked(self) -> int:
        """S; the positives of a rank are N / R on average, if no two samples have the same class."""
        return min(self.rows, max(round(self.rate * self.rows), -(-self.samples // self.ranks)))

    @property
    def states(self) -> int:
        return STATES[self.optimizer]

    @property
    def title(self) -> str:
        return (
            f"C={self.classes:,}, D={self.dim}, {self.ranks} x {self.batch} samples, r={self.rate:g}, "
            f"{self.gradient}, {self.optimizer}"
        )


class Phase(NamedTuple):
    """Bytes beyond weight and state at one time of a step."""

    name: str
    gradient: int
    chunk: int  # what follows the chunk of classes: rows, tile, what their update multiplies out
    samples: int  # what follows the batch: embeddings of all ranks and their gradients

    @property
    def total(self) -> int:
        return self.gradient + self.chunk + self.samples


class Memory(NamedTuple):
    """Bytes of one rank."""

    weight: int
    state: int
    phases: tuple[Phase, ...]

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        return self.weight + self.state + self.largest.total


def chunk_on_cpu(head: Head) -> int:
    return chunk_classes(head.samples, head.dim, head.walked, 0)


def memory(head: Head, chunk: int) -> Memory:
    """The peak of a rank that walks `chunk` classes at a time."""
    matrix = head.rows * head.dim
    steps = 4 * head.rows if head.optimizer == "adamw" else 0
    return Memory(
        weight=matrix * head.weight_item,
        state=head.states * matrix * head.state_item + steps,
        phases=(drawing(head), forward(head, chunk), backward(head, chunk), optimizer_step(head)),
    )


def gradient_bytes(head: Head) -> int:
    if head.gradient == "backward":
        return 0
    return (head.walked if head.gradient == "sparse" else head.rows) * head.dim * head.weight_item


def lasting_samples(head: Head) -> int:
    """What autograd and the caller keep: embeddings, their copy in float32, all ranks' rows and those of their targets.

    And the numbers of the walked classes, and vectors of N numbers.
    """
    own, everyone = head.batch * head.dim * 4, head.samples * head.dim * 4
    ids = 8 * head.walked if head.sampled else 0
    return 2 * own + 2 * everyone + VECTORS * 4 * head.samples + ids


def buffers(head: Head, chunk: int, forward: bool) -> int:
    """`Walk`: prepared rows and tile in the products' precision, and what torch's elementwise work needs beside."""
    rows, tile = chunk * head.dim, chunk * head.samples
    low = head.compute_item < 4
    size = (rows + tile) * head.compute_item + 3 * 4 * chunk
    if low and not head.fused:
        size += 4 * rows + (4 * tile if forward else 0)
    kept = retained_classes(head.samples, head.walked, chunk, head.compute_item, head.retain)
    return size + kept * head.samples * head.compute_item


def selected(head: Head, chunk: int) -> tuple[int, int]:
    """Copies of a sample's rows while one chunk follows another, and inside a chunk."""
    if head.fused or not head.sampled:
        return 0, 0
    copy = chunk * head.dim * head.weight_item
    return (2 * copy if head.walked > chunk else copy), copy


def by_keys(head: Head) -> bool:
    """Whether a sample is drawn by a number for every class (`sampling.fits`)."""
    return head.sampled and head.fused and head.samples <= round(head.rate * head.rows)


def drawing(head: Head) -> Phase:
    """A number for every class and, while they are mixed, another; then the sample, its sort and the sort's buffers."""
    sample = 48 * head.walked if head.sampled else 0
    numbers = max(16 * head.rows, 8 * head.rows + sample) if by_keys(head) else sample
    own, everyone = 4 * head.batch * head.dim, 4 * head.samples * head.dim
    return Phase("draw", 0, numbers, 2 * own + (everyone if head.ranks > 1 else 0))


def forward(head: Head, chunk: int) -> Phase:
    everyone = head.samples * head.dim
    between, inside = selected(head, chunk)
    scaled = everyone * head.compute_item  # x log2(e)
    product = 4 * everyone  # of the targets' rows with x
    return Phase(
        "forward",
        gradient=0,
        chunk=buffers(head, chunk, forward=True) + max(between, inside),
        samples=lasting_samples(head) + scaled + product,
    )


def backward(head: Head, chunk: int) -> Phase:
    rows, everyone = chunk * head.dim, head.samples * head.dim
    low = head.compute_item < 4
    direct = not low and head.weight_item == 4 and head.gradient != "backward"
    direct = direct and (head.gradient == "sparse" or not head.sampled)
    product = 0 if direct else rows * (head.compute_item + (4 if low and not head.fused else 0))
    between, inside = selected(head, chunk)
    finishing = 0
    if not head.fused:
        finishing = 4 * rows  # what the row dot of the Jacobian multiplies out
        if head.gradient == "backward":
            finishing = max(finishing, updating(head, chunk))
    # x log2(e), x times its factor; dX, targets' shares in dW
    samples = 2 * everyone * head.compute_item + 2 * 4 * everyone
    if head.fused:
        samples += 4 * everyone  # shares in the order of their rows
    return Phase(
        "backward",
        gradient=gradient_bytes(head),
        chunk=buffers(head, chunk, forward=False) + product + max(between, inside + finishing),
        samples=lasting_samples(head) + samples,
    )


def updating(head: Head, rows: int) -> int:
    """What `update_rows` has at its peak, for so many rows, beyond the gradient."""
    numbers, size = rows * head.dim, 0
    picked = head.gradient == "sparse" or (head.gradient == "backward" and head.sampled)
    for item in (head.weight_item, *[head.state_item] * head.states):
        size += numbers * item if picked else 0  # a copy of the rows
        size += numbers * 4 if item < 4 else 0  # and in float32
    if head.optimizer == "adamw":
        size += 4 * numbers + 3 * 8 * rows  # the quotient of the moments, and a row's corrections in float64
    return size


def optimizer_step(head: Head) -> Phase:
    """Some rows of the gradient at a time, each a copy in float32."""
    gradient, copied = gradient_bytes(head), 0
    if head.gradient == "sparse":
        gradient += 8 * head.walked  # their numbers
    if head.gradient != "backward":
        with_gradient = head.walked if head.gradient == "sparse" else head.rows
        rows = min(with_gradient, max(1, CHUNK_BYTES // (4 * head.dim)))
        part = 4 * rows * head.dim
        following = 4 * min(rows, with_gradient - rows) * head.dim
        copied = part + max(updating(head, rows), following)  # a part is there until the next one is
    # Embeddings and their gradient, which a backbone's backward has used by then.
    return Phase("step", gradient, copied, 2 * 4 * head.batch * head.dim)
