"""The usual code with full logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from perf.problem import MARGIN, SCALE
from perf.providers.base import Provider


class Plain(Provider):
    """ArcFace as training repositories write it, in its better form: no arccos, no one-hot mask, float32 logits."""

    name, title = "plain", "full logits, plain code"
    logits_copies = 6

    def forward(self) -> Tensor:
        cos = F.linear(F.normalize(self.x), F.normalize(self.weight)).float().clamp(-1.0, 1.0)
        own = cos.gather(1, self.target[:, None])
        sine = (1.0 - own * own).clamp(min=1e-9).sqrt()
        lowered = own * math.cos(MARGIN) - sine * math.sin(MARGIN)
        lowered = torch.where(own > math.cos(math.pi - MARGIN), lowered, own - MARGIN * math.sin(MARGIN))
        logits = cos.scatter(1, self.target[:, None], lowered)
        return F.cross_entropy(SCALE * logits, self.target)


PROVIDERS = (Plain,)
