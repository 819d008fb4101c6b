"""insightface's formulas (arcface_torch, since 2022-12), as its users write them around a linear layer.

Its ArcFace turns all logits into angles and back under no_grad, so the gradient of the target's logit is that of its
cosine: another loss than ArcFace's derivative ("arcface-straight-through").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perf.problem import SCALE, cosine_of_margin
from perf.providers.base import Provider


class InsightFace(Provider):
    name, title = "insightface", "insightface's formulas"
    losses = ("arcface-straight-through", "cosface")

    def forward(self) -> Tensor:
        m = cosine_of_margin(self.problem.loss)[2]
        logits = F.linear(F.normalize(self.x), F.normalize(self.weight)).float().clamp(-1.0, 1.0)
        samples = torch.arange(len(self.target), device=self.target.device)
        if self.problem.loss == "cosface":
            logits[samples, self.target] -= m
            return F.cross_entropy(SCALE * logits, self.target)
        with torch.no_grad():
            logits.arccos_()
            logits[samples, self.target] += m
            logits.cos_()
        return F.cross_entropy(SCALE * logits, self.target)


PROVIDERS = (InsightFace,)
