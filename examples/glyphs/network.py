"""The network: 32 x 32 pixels -> an embedding of 128 numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EMBEDDING_DIM = 128


class GlyphNet(nn.Module):
    """Four convolutions and a linear layer; the BatchNorm at the end keeps embeddings centred and spread out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *convolution(1, 32, kernel=5, stride=2),  # 16 x 16
            *convolution(32, 64, stride=2),  # 8 x 8
            *convolution(64, 64),
            *convolution(64, 128, stride=2),  # 4 x 4
            nn.Flatten(),
            nn.Linear(128 * 4 * 4, EMBEDDING_DIM, bias=False),
            nn.BatchNorm1d(EMBEDDING_DIM),
        )
        self.to(memory_format=torch.channels_last)  # what the CPU's convolutions are fastest with

    def forward(self, x: Tensor) -> Tensor:  # [N, 1, 32, 32] -> [N, 128]
        return self.layers(x.contiguous(memory_format=torch.channels_last)).float()


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def autocast() -> torch.autocast:
    """bfloat16 where the CPU multiplies it (AVX512-BF16, AMX), float32 elsewhere."""
    capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast("cpu", torch.bfloat16, enabled=capable)
