"""One row a sample: embeddings as the class pass takes them, and numbers of the sample's own class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tritonmargin.backends.torch_ops import inverse_norm
from tritonmargin.distributed.single import SINGLE, Single
from tritonmargin.margins import Margin

if TYPE_CHECKING:
    from tritonmargin.distributed.shard import Shard


def scaled_rows(
    x: Tensor, margin: Margin, ranks: Shard | Single = SINGLE
) -> tuple[Tensor, Tensor]:  # [N, D] -> [N, D], [N]
    """The rows that the class pass multiplies with: s x/|x| (0 for a zero row) or x itself; and |x|.

    ranks: each of them multiplies these rows with its own classes.
    """
    norm = torch.linalg.vector_norm(x, dim=1)
    if not margin.unit_embeddings:
        return x, norm
    length = norm.detach()
    length = length.masked_fill(length < 4.0 * torch.finfo(x.dtype).tiny, torch.inf)
    scale = margin.scale_on(x.device)
    if isinstance(scale, Tensor):  # it may have a gradient
        return ranks.shared(scale) * UnitRows.apply(x, length, 1.0), norm
    return UnitRows.apply(x, length, scale), norm


class UnitRows(torch.autograd.Function):
    """y = s x/|x| from x and |x|, which has no gradient of its own, in half of autograd's operations.

    dL/dx = (s g - y (y . g)/s)/|x|. A zero row is given the length inf: y and dL/dx are 0.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, length: Tensor, s: float) -> Tensor:
        return x / length[:, None] * s

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        _, length, ctx.s = inputs
        ctx.save_for_backward(output, length)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, length = ctx.saved_tensors
        along = torch.linalg.vecdot(rows, grad) / ctx.s
        return (grad * ctx.s).addcmul(rows, along[:, None], value=-1.0) / length[:, None], None, None


def target_numbers(x: Tensor, weight: Tensor, own: Tensor, margin: Margin) -> tuple[Tensor, Tensor]:
    """x . w'_y and |w_y|, [N] each, from gathered rows; 0 where the class is not here."""
    if not len(weight):
        return x.new_zeros(len(x)), x.new_zeros(len(x))
    rows = torch.where(own[:, None] >= 0, weight.index_select(0, own.clamp(min=0)).to(x.dtype), 0.0)
    norm = torch.linalg.vector_norm(rows, dim=1)
    product = (x * rows).sum(dim=1)
    return (product * inverse_norm(norm) if margin.unit_weight else product), norm


def own_numbers(vector: Tensor, own: Tensor, dtype: torch.dtype) -> Tensor:  # [C], [N] -> [N]
    """The numbers of the samples' classes, 0 where a class is not here."""
    if not len(vector):
        return own.new_zeros(own.shape, dtype=dtype)
    # Not index_select: its backward adds with atomics on a GPU.
    return torch.where(own >= 0, vector[own.clamp(min=0)].to(dtype), 0.0)
