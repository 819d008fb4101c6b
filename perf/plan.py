"""Chunk size and memory of a step before it runs, ours beside the usual code with full logits."""

from __future__ import annotations

from typing import NamedTuple

from perf.problem import Problem
from tritonmargin.walk import chunk_classes, retained_classes


class Plan(NamedTuple):
    """Bytes, but for `chunk` and `retained` (classes)."""

    chunk: int
    chunks: int
    weight: int
    gradient: int
    inputs: int
    ours: int  # beyond the three above
    full_logits: int  # likewise
    retain_bytes: int  # what may be retained within the memory
    retained: int  # how many classes' tiles that holds

    @property
    def fixed(self) -> int:
        return self.weight + self.gradient + self.inputs


def plan(p: Problem, memory: int | None = None, chunk_bytes: int = 0, retain_bytes: int = 0) -> Plan:
    """The plan for one step; with `memory`, retain as much as fits it."""
    chunk = chunk_classes(p.n, p.d, p.classes, chunk_bytes)
    inputs = p.n * p.d * p.itemsize + p.n * 8
    needed = 2 * p.weight_bytes + inputs + ours(p, chunk, 0)
    if memory is not None:
        retain_bytes = min(max(memory - needed, 0), p.n * p.classes * p.itemsize)
    kept = retained_classes(p.n, p.classes, chunk, p.itemsize, retain_bytes)
    return Plan(
        chunk=chunk,
        chunks=-(-p.classes // chunk),
        weight=p.weight_bytes,
        gradient=p.weight_bytes,
        inputs=inputs,
        ours=ours(p, chunk, kept),
        full_logits=full_logits(p),
        retain_bytes=kept * p.n * p.itemsize,
        retained=kept,
    )


def ours(p: Problem, chunk: int, retained: int) -> int:
    """Peak of the torch backend's step beyond W, its gradient and the inputs."""
    rows, tile, batch = chunk * p.d, chunk * p.n, p.n * p.d
    low = p.itemsize < 4
    shared = (rows + tile) * p.itemsize + (rows * 4 if low else 0)  # unit rows (in float32 too), tile
    forward = tile * 4 if low else 0  # a sum in float32 copies the tile
    backward = rows * 4  # what the row dot of the Jacobian multiplies out
    backward += rows * (4 + p.itemsize) if low else 0  # A in float32, and as the product leaves it
    per_batch = 7 * batch * 4  # x, unit x, s x, x times the factor, dX, target rows and their share
    return shared + max(forward, backward) + per_batch + retained * p.n * p.itemsize


def full_logits(p: Problem) -> int:
    """Peak of `providers/plain.py`: the end of forward, or the gradient of the normalised weight."""
    forward = 5 * 4 * p.n * p.classes + p.weight_bytes  # five float32 N x C arrays and the unit rows
    backward = 5 * p.weight_bytes
    return max(forward, backward)
