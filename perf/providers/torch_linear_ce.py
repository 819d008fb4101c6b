"""`torch.nn.functional.linear_cross_entropy`: linear and cross-entropy, without margin and normalisation.

Without `options` it is those two calls. With them it takes the batch in chunks of rows: by default so few that a
chunk's logits are as large as the input, at C >> N one. 64 rows suit many classes better.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from perf.providers.base import STEP, WHOLE, Provider
from perf.suite.problem import Problem

if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
    raise ImportError(f"torch {torch.__version__} has no chunked linear_cross_entropy; 2.13 has")


class LinearCrossEntropy(Provider):
    name, title = "torch-lce", "F.linear_cross_entropy"
    losses = ("softmax",)
    chunking: torch.nn.LinearCrossEntropyOptions | None = None

    def forward(self) -> Tensor:
        return F.linear_cross_entropy(self.x, self.weight, self.target, options=self.chunking)


class Chunked(LinearCrossEntropy):
    """Gradients are made in forward, so only the whole step can be compared."""

    name, title = "torch-lce-chunked", "F.linear_cross_entropy, its default chunking"
    modes = (STEP, WHOLE)
    chunking = torch.nn.LinearCrossEntropyOptions()


class ChunkedByHand(Chunked):
    name, title = "torch-lce-rows64", "F.linear_cross_entropy, batch_chunk_size=64"
    chunking = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=64)

    def supports(self, problem: Problem) -> str | None:
        return super().supports(problem) or ("the batch is one chunk" if problem.n <= 64 else None)
