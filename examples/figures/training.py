"""Data, networks and the loop. Real pictures: scikit-learn's digits, and glyphs of the Noto Sans CJK weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import tritonmargin as tm
from examples.glyphs import data
from examples.glyphs.fonts import FONT_SIZE, SIZE, WEIGHTS, font_path

TEN = "永東國語花鳥風月山水"
BATCH = 128


class Pictures(NamedTuple):
    """Labelled pictures, [N, 1, H, W] in 0 to 1, and whether a step shows them changed."""

    images: Tensor
    labels: Tensor
    changed: bool
    names: list[str]

    @property
    def classes(self) -> int:
        return len(self.names)


def digits() -> Pictures:
    """1797 handwritten digits of 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16.0
    return Pictures(images, torch.from_numpy(found.target).long(), False, [str(digit) for digit in range(10)])


def glyphs(characters: str = TEN, weights: tuple[str, ...] = WEIGHTS) -> Pictures:
    """Each character in every weight; a step shows them with random geometry, blur and noise."""
    images, labels = [], []
    for weight in weights:
        font = ImageFont.truetype(str(font_path(weight)), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
        for label, character in enumerate(characters):
            picture = Image.new("L", (SIZE, SIZE))
            ImageDraw.Draw(picture).text((SIZE / 2, SIZE / 2), character, fill=255, font=font, anchor="mm")
            images.append(np.asarray(picture))
            labels.append(label)
    stacked = torch.from_numpy(np.stack(images))[:, None].float() / 255.0
    return Pictures(stacked, torch.tensor(labels), True, list(characters))


def batches(pictures: Pictures, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(pictures.labels), (BATCH,), generator=random)
        yield shown(pictures, rows, random), pictures.labels[rows]


def shown(pictures: Pictures, rows: Tensor, random: torch.Generator) -> Tensor:
    images = pictures.images[rows]
    return data.augment((255 * images[:, 0]).byte(), random) if pictures.changed else images


def network(pictures: Pictures, width: int) -> nn.Module:
    """Two convolutions and two layers; no normalisation at the end, so that embeddings lie where the loss puts them."""
    side = pictures.images.shape[-1]
    stride = 1 if side < 16 else 2
    left = side // 2 // stride**2
    return nn.Sequential(
        nn.Conv2d(1, 24, 5, stride, 2), nn.BatchNorm2d(24), nn.PReLU(),
        nn.Conv2d(24, 32, 3, stride, 1), nn.BatchNorm2d(32), nn.PReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(32 * left * left, 96), nn.PReLU(), nn.Linear(96, width),
    )  # fmt: skip


class Trained(NamedTuple):
    network: nn.Module
    head: tm.MarginSoftmaxLoss
    losses: list[float]
    accuracies: list[float]  # of the steps' own batches, before their update
    gradients: list[float]  # |dL/d(network)| of every step


def train(
    pictures: Pictures, margin: tm.Margin, steps: int, width: int = 2, lr: float = 0.005, objective: str = "softmax",
    seed: int = 0,
) -> Trained:  # fmt: skip
    """AdamW with a cosine schedule: one learning rate suits losses whose gradients differ in size."""
    torch.manual_seed(seed)
    net = network(pictures, width)
    head = tm.MarginSoftmaxLoss(width, pictures.classes, margin, objective=objective)
    nn.init.normal_(head.weight)
    if width == 2:
        # Spread evenly: on a circle two classes cannot pass each other, and random directions would stay in clumps.
        angle = torch.arange(pictures.classes) * (2.0 * torch.pi / pictures.classes)
        head.weight.data = torch.stack([angle.cos(), angle.sin()], dim=1)
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    made = Trained(net, head, [], [], [])
    for step, (images, target) in enumerate(batches(pictures, steps, seed)):
        margin.schedule(step)
        loss, stats = head(net(images), target, return_stats=True)
        optimizer.zero_grad()
        loss.backward()
        made.gradients.append(float(torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])))
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        made.losses.append(float(loss.detach()))
        made.accuracies.append(float(stats.correct.float().mean()))
    return made


@torch.no_grad()
def embed(trained: Trained, pictures: Pictures, count: int = 1500, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Embeddings and labels of pictures as a step shows them."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(pictures.labels), (count,), generator=random)
    trained.network.eval()
    return trained.network(shown(pictures, rows, random)), pictures.labels[rows]
