"""Who is trained on and who is never seen, which pictures make up a step, and what a picture goes through."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.glyphs.fonts import Glyphs

UNSEEN = 6000  # characters kept for the evaluation
VALIDATION = 2000  # characters kept for choosing the settings, so that the choice never saw the evaluation


@dataclass(frozen=True)
class Split:
    """Disjoint sets of characters, as rows of `Glyphs.images`. Position k of `train` is class k."""

    train: np.ndarray
    unseen: np.ndarray
    validation: np.ndarray


def split(glyphs: Glyphs, classes: int, unseen: int = UNSEEN, validation: int = VALIDATION, seed: int = 0) -> Split:
    """A seeded permutation cut in three. The unseen characters do not depend on `classes`."""
    left = len(glyphs) - unseen
    if classes > left:
        raise SystemExit(
            f"{classes} classes are too many: {len(glyphs)} glyphs less {unseen} unseen ones leave {left}; "
            "`--scripts han hangul` has more"
        )
    order = np.random.default_rng(seed).permutation(glyphs.rows)
    rest = order[unseen:]
    return Split(train=rest[:classes], unseen=order[:unseen], validation=rest[classes : classes + validation])


class Batches:
    """Step number -> pictures and labels. A function of the seed and the step alone, so a resumed run draws the same.

    An epoch shows every class in every font weight once, in a random order.
    """

    def __init__(self, glyphs: Glyphs, rows: np.ndarray, batch: int, seed: int = 0) -> None:
        self.images, self.rows, self.batch, self.seed = glyphs.images, rows, batch, seed
        self.views = glyphs.images.shape[1]
        self.steps_per_epoch = max(1, len(rows) * self.views // batch)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:  # [N, 1, 32, 32] float, [N] int64
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            total = len(self.rows) * self.views
            order = np.random.default_rng((self.seed, epoch)).permutation(total)
            self._epoch, self._order = epoch, np.resize(order, max(total, self.batch))
        items = self._order[position * self.batch : (position + 1) * self.batch]
        target, view = np.divmod(items, self.views)
        pictures = torch.from_numpy(self.images[self.rows[target], view])
        return augment(pictures, generator(self.seed, step)), torch.from_numpy(target)


def generator(seed: int, step: int) -> torch.Generator:
    """An independent stream of random numbers for each seed and step."""
    # torch's CPU generator looks at the lower 32 bits of its seed only: both numbers have to be mixed into them.
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


def augment(pictures: Tensor, random: torch.Generator) -> Tensor:  # [N, H, W] uint8 -> [N, 1, H, W] float32
    """Random geometry, blur, contrast and noise, each picture its own."""
    n = len(pictures)
    x = pictures.unsqueeze(1).float().div_(255.0)
    x = F.grid_sample(x, F.affine_grid(geometry(n, random), list(x.shape), align_corners=False), align_corners=False)
    # A mixture of the picture and its blurred self is a blur of every strength for the price of one.
    amount = torch.rand(n, 1, 1, 1, generator=random)
    x = torch.lerp(x, blurred(x), amount)
    contrast = 0.5 + 0.5 * torch.rand(n, 1, 1, 1, generator=random)
    noise = 0.15 * torch.rand(n, 1, 1, 1, generator=random)
    return x.mul_(contrast).addcmul_(torch.randn(x.shape, generator=random), noise)


def geometry(n: int, random: torch.Generator) -> Tensor:  # [N, 2, 3]
    """Affine maps: up to 15 degrees, 20 % of size, 10 % of shape, a shear of 0.2, a shift of 3 pixels."""
    angle, grow, stretch, shear, right, down = torch.empty(6, n).uniform_(-1.0, 1.0, generator=random)
    angle, shear = angle * math.radians(15.0), shear * 0.2
    width, height = torch.exp(0.2 * grow + 0.1 * stretch), torch.exp(0.2 * grow - 0.1 * stretch)
    cos, sin = torch.cos(angle), torch.sin(angle)
    across = (width * cos, shear * cos - height * sin, 0.1875 * right)
    along = (width * sin, shear * sin + height * cos, 0.1875 * down)
    return torch.stack(across + along, dim=1).view(n, 2, 3)


def blurred(x: Tensor) -> Tensor:  # [N, 1, H, W]
    """A binomial blur of standard deviation 1 pixel, along rows and then columns."""
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16.0
    return F.conv2d(F.conv2d(x, kernel.view(1, 1, 1, 5), padding=(0, 2)), kernel.view(1, 1, 5, 1), padding=(2, 0))
