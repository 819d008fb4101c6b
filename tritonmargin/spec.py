"""What a loss is asked for, and what the class pass takes and gives: values with names, which check themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from tritonmargin.arguments import check_bytes, check_flag, check_integer, check_name, check_number
from tritonmargin.objectives import OBJECTIVES

REDUCTIONS = ("mean", "sum", "none")


class LossInputs(NamedTuple):
    """The tensors of a loss. Under class sharding those of this rank."""

    embeddings: Tensor  # [N, D]
    weight: Tensor  # [C, D]
    target: Tensor  # [N]
    bias: Tensor | None = None  # [C]
    class_ids: Tensor | None = None  # [S]
    class_weight: Tensor | None = None  # [C]


class LossKeywords(TypedDict, total=False):
    """What a loss takes by name, for type checkers; all but `return_stats`, which decides what it returns."""

    bias: Tensor | None
    class_ids: Tensor | None
    sub_centers: int
    class_weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    reduction: str
    objective: str
    sparse_grad: bool
    retain_bytes: int
    chunk_bytes: int | None
    memory_budget: int | None
    logq_correction: bool


@dataclass(frozen=True)
class LossOptions:
    """The options of a loss, see `tritonmargin.margin_cross_entropy`.

    Raises:
        ValueError, TypeError: an option that does not fit, named.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"
    objective: str = "softmax"
    sub_centers: int = 1
    sparse_grad: bool = False
    retain_bytes: int = 0
    chunk_bytes: int | None = None
    memory_budget: int | None = None
    return_stats: bool = False
    logq_correction: bool = False

    def __post_init__(self) -> None:
        check_name("reduction", self.reduction, REDUCTIONS)
        check_name("objective", self.objective, OBJECTIVES)
        check_smoothing(self.label_smoothing, self.objective)
        check_integer("sub_centers", self.sub_centers, 1)
        if self.sub_centers != 1:
            raise ValueError(f"sub_centers is 1 in this version, got {self.sub_centers}")
        for name in ("sparse_grad", "return_stats", "logq_correction"):
            check_flag(name, getattr(self, name))
        if self.logq_correction:
            check_correction(self.label_smoothing, self.objective)
        check_integer("ignore_index", self.ignore_index)
        check_bytes("retain_bytes", self.retain_bytes)
        if self.chunk_bytes is not None:
            check_bytes("chunk_bytes", self.chunk_bytes, 1)
        if self.memory_budget is not None:
            check_bytes("memory_budget", self.memory_budget)


class Stats(NamedTuple):
    """What one pass knows about each sample; all [N], detached. Ignored rows: nan, nan, -1, nan, False."""

    target_logit: Tensor  # t, after the margin, bias included
    rest_logsumexp: Tensor  # log sum_{j != y} exp(z_j)
    hardest_class: Tensor  # int64 class number of the largest z_j, j != y; -1 where there is no other class
    hardest_logit: Tensor  # that z_j
    correct: Tensor  # bool: the target's logit before the margin is above hardest_logit
    sampled: Tensor  # bool, the same for all: rest and hardest are about a sample of the classes, so is `correct`


# -- the class pass --------------------------------------------------------------------------------------------------


class PassInputs(NamedTuple):
    """The tensors of a class pass.

    A backend that `normalises` takes the embeddings as they are, and class numbers of all ranks as labels. Any other
    one takes rows that carry the scale, and positions in the pass.
    """

    x: Tensor  # [N, D]
    weight: Tensor  # [C, D]
    target: Tensor  # [N]  position in the pass, -1 for none; or class number, see PassSpec
    class_ids: Tensor | None = None  # [S]  the active classes; None: all
    bias: Tensor | None = None  # [C]
    mean_weight: Tensor | None = None  # [C]  a_c of mean_logit; may be one number, expanded
    threshold: Tensor | None = None  # [N]  t_i of the hinge
    offset: Tensor | None = None  # [S]  added to the logits of the active classes


@dataclass(frozen=True, kw_only=True)
class PassSpec:
    """What is asked of a class pass, and how it is to be computed."""

    unit_weight: bool  # w'_j = w_j/|w_j|
    unit_embeddings: bool = False  # x'_i = scale x_i/|x_i|; for a backend that normalises
    scale: float = 1.0  # same
    ignore_index: int = -1  # the label of an ignored sample; same
    first_class: int = 0  # class number of the first row of weight; same
    bounded: bool  # exp(z) and its sum stay inside the range of the dtype of sums
    want_rest: bool
    want_hardest: bool
    sparse: bool  # the gradient of weight is one of the active rows
    dtype: torch.dtype  # of the products
    precision: str = "ieee"  # of float32's products: "tf32", or as it is
    memory_budget: int = -1  # bytes beside inputs and gradients; -1: a share of the device's memory
    chunk_bytes: int  # 0: the backend's own size of a chunk
    retain_bytes: int  # -1: the torch backend keeps all logits, where they fit the budget
    backend: str


class PassOutput(NamedTuple):
    """Numbers per sample, [N]. Empty tensors: not asked for.

    z_ij = x'_i . w'_j + b_j + offset_j, without a margin.
    """

    rest: Tensor  # log sum_{j != y} exp(z_ij)
    target_product: Tensor  # x'_i . w'_y, without the bias
    target_norm: Tensor  # |w_y|
    target_bias: Tensor  # b_y
    embedding_norm: Tensor  # |x_i|, from a backend that normalises
    mean_logit: Tensor  # sum_j a_j (x'_i . w'_j + b_j) over the active classes, the target's without its margin
    hinge: Tensor  # sum_{j != y} relu(z_ij - threshold_i)
    violations: Tensor  # how many terms of it are positive; not differentiable
    hardest_product: Tensor  # x'_i . w'_h + b_h without offset, h = argmax_{j != y} z_ij; -inf without another class
    hardest_row: Tensor  # int64, the position of h in the pass, -1 without another class; not differentiable


class PassGrads(NamedTuple):
    """Gradients of what the class pass gave, [N] each; None: not asked for, or nobody differentiates it."""

    rest: Tensor | None = None
    target_product: Tensor | None = None
    target_norm: Tensor | None = None
    target_bias: Tensor | None = None
    embedding_norm: Tensor | None = None
    mean_logit: Tensor | None = None
    hinge: Tensor | None = None
    hardest_product: Tensor | None = None


class InputGrads(NamedTuple):
    """Gradients of what the class pass took; None: not asked for. Of weight the active rows only, where sparse."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


# -- checks ----------------------------------------------------------------------------------------------------------


def check_smoothing(label_smoothing: float, objective: str) -> None:
    check_number("label_smoothing", label_smoothing, "a number between 0 and 1", 0.0, 1.0)
    if label_smoothing and objective != "softmax":
        raise ValueError(f"label_smoothing is defined for objective 'softmax' only, got objective {objective!r}")


def check_correction(label_smoothing: float, objective: str) -> None:
    """What the correction of a sample's sum of exp(z) goes with."""
    if objective not in ("softmax", "lse-hinge"):
        raise ValueError(
            f"logq_correction is for the logsumexp of objectives 'softmax' and 'lse-hinge', got objective {objective!r}"
        )
    if label_smoothing:
        raise ValueError("logq_correction with label_smoothing is not defined: the smoothed part is a mean, not a sum")
