"""`torch.nn.functional.linear_cross_entropy`: linear and cross-entropy, without margin and normalisation.

Without `options` it is those two calls. With them it takes the batch in chunks of rows: by default so few that a
chunk's logits are as large as the input, at C >> N one. 64 rows suit many classes better.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from perf.providers.base import STEP, WHOLE, Provider
from perf.suite.problem import Problem


class LinearCrossEntropy(Provider):
    name, title = "torch-lce", "F.linear_cross_entropy"
    losses = ("softmax",)
    chunking: ClassVar[dict[str, int] | None] = None

    @classmethod
    def missing(cls) -> str:
        there = hasattr(torch.nn, "LinearCrossEntropyOptions")
        return "" if there else f"torch {torch.__version__} has no chunked linear_cross_entropy; 2.13 has"

    def forward(self) -> Tensor:
        options = None if self.chunking is None else torch.nn.LinearCrossEntropyOptions(**self.chunking)
        return F.linear_cross_entropy(self.x, self.weight, self.target, options=options)


class Chunked(LinearCrossEntropy):
    """Gradients are made in forward, so only the whole step can be compared."""

    name, title = "torch-lce-chunked", "F.linear_cross_entropy, its default chunking"
    modes = (STEP, WHOLE)
    chunking: ClassVar = {}


class ChunkedByHand(Chunked):
    name, title = "torch-lce-rows64", "F.linear_cross_entropy, batch_chunk_size=64"
    chunking: ClassVar = {"batch_chunk_size": 64}

    def supports(self, problem: Problem) -> str:
        return super().supports(problem) or ("the batch is one chunk" if problem.n <= 64 else "")
