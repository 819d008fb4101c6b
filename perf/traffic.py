"""What the ranks of a step send one another, and what an optimiser's step moves: bytes, as formulas."""

from __future__ import annotations

from typing import NamedTuple

from perf.scale import Head, by_keys, gradient_bytes

SETTINGS = 8  # int64 that a rank tells the others before each step, see parallel.Shard.batch
# Bytes that drawing a sample on a GPU moves per class (`sampling.by_keys`): a dozen operations that read and write
# 8-byte numbers, and a selection byte by byte.
DRAWN = 12 * 16 + 9 * 8
RULE_PASSES = {"sgd": 3, "momentum": 8, "adamw": 22}  # matrices in float32 that a rule's operations read and write


class Collective(NamedTuple):
    """One exchange of a step."""

    kind: str
    what: str
    bytes: int  # of the whole tensor: what a gather ends with, what a reduction begins with

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends in a ring: (R - 1)/R of the tensor, in a sum over all twice that."""
        return (2 if self.kind == "all_reduce" else 1) * (ranks - 1) / ranks * self.bytes


def collectives(head: Head, numbers: int = 2) -> list[Collective]:
    """Of one forward and backward, in order. `numbers`: of a target that its rank alone has, x . w'_y and |w_y|."""
    if head.ranks == 1:
        return []
    per_sample, embeddings = 4 * head.samples, 4 * head.samples * head.dim
    return [
        Collective("all_gather", "number of samples and settings", 8 * SETTINGS * head.ranks),
        Collective("all_gather", "embeddings", embeddings),
        Collective("all_gather", "norms of embeddings", per_sample),
        Collective("all_gather", "labels", 8 * head.samples),
        Collective("all_reduce", f"{numbers} numbers of targets", numbers * per_sample),
        Collective("all_reduce", "largest logsumexp", per_sample),
        Collective("all_reduce", "sum of exp", per_sample),
        Collective("reduce_scatter", "dX", embeddings),
    ]


def drawing_bytes(head: Head) -> int:
    return DRAWN * head.rows if by_keys(head) else 0


def optimizer_bytes(head: Head) -> int:
    """What the optimiser moves through memory outside of backward, every tensor of every operation counted.

    With it what only the gradient's form costs: a dense gradient of a sample starts as zeros.
    """
    if head.gradient == "backward":
        return 0
    numbers = (head.walked if head.gradient == "sparse" else head.rows) * head.dim
    moved = numbers * (head.weight_item + 4) + RULE_PASSES[head.optimizer] * 4 * numbers  # the copy, the rule
    for item in (head.weight_item, *[head.state_item] * head.states):
        moved += 2 * (item + 4) * numbers if item < 4 else 0  # to float32 and back
        moved += 4 * item * numbers if head.gradient == "sparse" else 0  # picked out and put back
    zeros = head.sampled and head.gradient == "dense"
    return moved + (gradient_bytes(head) if zeros else 0)
