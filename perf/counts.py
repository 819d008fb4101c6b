"""What one step does, counted by formula: flops, passes over the tile and over the class rows, bytes of main memory.

The tile and the rows of a chunk stay in the cache, so a pass over them costs elements, not memory traffic. W is read
from memory once a walk, and its gradient is written to memory that the process did not have before.
"""

from __future__ import annotations

from typing import NamedTuple

from perf.problem import Problem
from perf.providers.base import STEP


class Rate(NamedTuple):
    unit: str  # what is counted: flop, element or byte
    group: str  # what bounds a step in which these take most of the time


RATES = {
    "logits product": Rate("flop", "GEMMs"),
    "dX product": Rate("flop", "GEMMs"),
    "dW product": Rate("flop", "GEMMs"),
    "full product": Rate("flop", "GEMMs"),
    "exp": Rate("element", "passes over the logits"),
    "sum": Rate("element", "passes over the logits"),
    "row pass": Rate("element", "passes over the class rows"),
    "row cast": Rate("element", "passes over the class rows"),
    "read": Rate("byte", "memory traffic"),
    "write fresh": Rate("byte", "memory traffic"),
}


class Part(NamedTuple):
    name: str
    rate: str  # a key of RATES
    amount: float  # in the rate's unit


def parts(provider: str, mode: str, p: Problem) -> list[Part]:
    """Everything that grows with C in one step of ArcFace."""
    if provider == "plain":
        return plain(mode, p)
    if provider not in ("ours", "ours-retain"):
        raise ValueError(f"nothing is counted for {provider!r}")
    return ours(mode, p, retain=provider == "ours-retain")


def ours(mode: str, p: Problem, retain: bool) -> list[Part]:
    """`tritonmargin/stream.py`, bounded logits, unit class rows."""
    tile, rows = p.n * p.classes, p.classes * p.d
    low = p.itemsize < 4
    prepare = [
        Part("read W", "read", rows * p.itemsize),
        Part("unit rows: norm, divide", "row pass", 2 * rows),
        *([Part("unit rows: to float32 and back", "row cast", 2 * rows)] if low else []),
    ]
    found = [*prepare, Part("logits", "logits product", p.flops), Part("exp", "exp", tile), Part("sum", "sum", tile)]
    if retain:
        found.append(Part("keep exp(z)", "write fresh", tile * p.itemsize))
    if mode not in (STEP, "frozen W"):
        return found
    found += [Part(f"{name} again", rate, amount) for name, rate, amount in prepare]
    if retain:
        found.append(Part("read exp(z)", "read", tile * p.itemsize))
    else:
        found += [Part("logits again", "logits product", p.flops), Part("exp again", "exp", tile)]
    found.append(Part("dX", "dX product", p.flops))
    if mode == STEP:
        found += [
            Part("A = P X", "dW product", p.flops),
            Part("Jacobian: dot (2 passes), subtract, scale", "row pass", 4 * rows),
            *([Part("A to float32, dW to its dtype", "row cast", 2 * rows)] if low else []),
            Part("write dW", "write fresh", rows * p.itemsize),
        ]
    return found


def plain(mode: str, p: Problem) -> list[Part]:
    """`providers/plain.py`: N x C and C x D arrays go through main memory with every operation."""
    logits, rows = 4 * p.n * p.classes, p.classes * p.d * p.itemsize
    low = p.itemsize < 4
    casts = [Part("logits to float32", "write fresh", logits)] if low else []
    found = [
        Part("normalise W: read", "read", 2 * rows),
        Part("normalise W: write", "write fresh", rows),
        Part("logits", "full product", p.flops),
        Part("write logits", "write fresh", p.n * p.classes * p.itemsize),
        *casts,
        Part("clamp, scatter, scale, log_softmax: read", "read", 5 * logits),
        Part("clamp, scatter, scale, log_softmax: write", "write fresh", 4 * logits),
    ]
    if mode not in (STEP, "frozen W"):
        return found
    found += [
        Part("their gradients: read", "read", 6 * logits),
        Part("their gradients: write", "write fresh", 5 * logits),
        *casts,
        Part("dX", "full product", p.flops),
    ]
    if mode == STEP:
        found += [
            Part("gradient of unit W", "full product", p.flops),
            Part("normalise W, gradient: read", "read", 5 * rows),
            Part("normalise W, gradient: write", "write fresh", 4 * rows),
        ]
    return found
