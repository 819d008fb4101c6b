"""The classifier head as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tritonmargin.checks import check_class_vector, check_options
from tritonmargin.functional import Stats, margin_cross_entropy
from tritonmargin.margins import ArcFace, Margin


class MarginSoftmaxLoss(nn.Module):
    """Class weights, a margin, and the loss over all classes without their N x C logits.

    `head(embeddings, target)` is `tm.margin_cross_entropy(embeddings, head.weight, target, head.margin, ...)`.

    The weight starts as N(0, 0.01), as in the face recognition recipes, and the bias as 0. The state dict holds
    `weight` and, if there is one, `bias`, and `class_weight`; never the margin's numbers.

    Args:
        embedding_dim: D.
        num_classes: C.
        margin: default `ArcFace(m=0.5, s=64)`.
        sample_rate: fraction of the classes to walk in a step; only 1.0 in this version. Pass `class_ids` from
            `tm.sample_classes` to walk some.
        sub_centers: rows a class; only 1 in this version.
        bias: whether logits have a bias.
        sparse_grad: the gradient of `weight` is sparse, with the walked rows only.
        retain_bytes: bytes of logits that may be kept from forward to backward (faster, more memory).
        process_group: shards the classes; only None in this version.
        class_weight: [C], multiplies the loss of the class's samples.
        ignore_index, label_smoothing, reduction, objective: see `tm.margin_cross_entropy`.
        device, dtype: of weight and bias.

    Raises:
        ValueError, TypeError: an option that does not fit, named.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        margin: Margin | None = None,
        *,
        sample_rate: float = 1.0,
        sub_centers: int = 1,
        bias: bool = False,
        sparse_grad: bool = False,
        retain_bytes: int = 0,
        process_group: object | None = None,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        objective: str = "softmax",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("embedding_dim", embedding_dim), ("num_classes", num_classes)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {size!r}")
        margin = ArcFace() if margin is None else margin
        check_options(margin, label_smoothing, reduction, objective, sub_centers)
        if sample_rate != 1.0:
            raise ValueError(
                f"sample_rate is 1.0 in this version, got {sample_rate!r}; pass class_ids to walk a sample"
            )
        if process_group is not None:
            raise ValueError("process_group: sharding the classes is not part of this version")
        if class_weight is not None:
            check_class_vector("class_weight", class_weight, num_classes)
        self.embedding_dim = embedding_dim
        self.num_classes = num_classes
        self.margin = margin
        self.sparse_grad = sparse_grad
        self.retain_bytes = retain_bytes
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.objective = objective
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype)) if bias else None
        self.register_buffer("class_weight", class_weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """weight ~ N(0, 0.01), bias = 0."""
        nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, embeddings: Tensor, target: Tensor, class_ids: Tensor | None = None, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, Stats]:
        """The loss of embeddings [N, D] with target [N]; with `return_stats` a pair (loss, Stats)."""
        return margin_cross_entropy(
            embeddings,
            self.weight,
            target,
            self.margin,
            bias=self.bias,
            class_ids=class_ids,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            objective=self.objective,
            sparse_grad=self.sparse_grad,
            retain_bytes=self.retain_bytes,
            return_stats=return_stats,
        )

    def extra_repr(self) -> str:
        shown = {
            "bias": (self.bias is not None, False),
            "objective": (self.objective, "softmax"),
            "label_smoothing": (self.label_smoothing, 0.0),
            "reduction": (self.reduction, "mean"),
            "ignore_index": (self.ignore_index, -100),
            "sparse_grad": (self.sparse_grad, False),
            "retain_bytes": (self.retain_bytes, 0),
        }
        changed = [f"{name}={value!r}" for name, (value, default) in shown.items() if value != default]
        return ", ".join([f"embedding_dim={self.embedding_dim}, num_classes={self.num_classes}", *changed])
