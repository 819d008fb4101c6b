"""How well a network tells apart characters that it was never trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_curve
from torch import Tensor, nn

from examples.glyphs.data import augment, generator
from examples.glyphs.fonts import Glyphs
from examples.glyphs.network import autocast

FALSE_ACCEPTS = (1e-3, 1e-4)
SHIFTS = 40  # impostors per picture and pair of weights: 21 * 40 * 6,000 = 5 million pairs
GALLERY = "Regular"
BATCH = 500
SEED = 20_000_003  # of the distortions; training uses small seeds


@dataclass(frozen=True)
class Verification:
    """Same character or not? TAR: genuine pairs accepted; FAR: impostor pairs accepted at the same threshold."""

    far: np.ndarray
    tar: np.ndarray
    genuine: np.ndarray  # cosines of pairs of one character in two weights
    impostor: np.ndarray  # cosines of pairs of two characters in two weights

    def at(self, far: float) -> float:
        """The largest TAR whose FAR does not exceed `far`."""
        return float(self.tar[np.searchsorted(self.far, far, side="right") - 1])


@torch.no_grad()
def embed(network: nn.Module, glyphs: Glyphs, rows: np.ndarray) -> Tensor:  # [V, P, D]
    """Unit embeddings of every character in every weight."""
    was_training = network.training
    network.eval()
    views = []
    for view in range(glyphs.images.shape[1]):
        pieces = []
        for first in range(0, len(rows), BATCH):
            pictures = evaluation_pictures(glyphs, rows, view, first)
            with autocast():
                pieces.append(F.normalize(network(pictures)))
        views.append(torch.cat(pieces))
    network.train(was_training)
    return torch.stack(views)


def evaluation_pictures(glyphs: Glyphs, rows: np.ndarray, view: int, first: int) -> Tensor:
    """Characters `first` and on in one weight, distorted as in training, the same way whenever asked."""
    pictures = torch.from_numpy(glyphs.images[rows[first : first + BATCH], view])
    return augment(pictures, generator(SEED + view, first))


def verify(embeddings: Tensor) -> Verification:  # [V, P, D] unit rows
    """Every genuine pair across weights, and `SHIFTS` impostors for each of them."""
    views, characters = embeddings.shape[:2]
    genuine, impostor = [], []
    for a in range(views):
        for b in range(a + 1, views):
            genuine.append((embeddings[a] * embeddings[b]).sum(dim=1))
            for shift in range(1, min(SHIFTS, characters - 1) + 1):
                impostor.append((embeddings[a] * embeddings[b].roll(shift, dims=0)).sum(dim=1))
    same, other = torch.cat(genuine).numpy(), torch.cat(impostor).numpy()
    return Verification(*roc(same, other), same, other)


def roc(genuine: np.ndarray, impostor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true accept rates for every threshold, from the strictest on."""
    label = np.concatenate([np.ones(len(genuine), np.int8), np.zeros(len(impostor), np.int8)])
    far, tar, _ = roc_curve(label, np.concatenate([genuine, impostor]), drop_intermediate=False)
    return far, tar


def nearest(embeddings: Tensor, gallery: int, count: int = 1) -> Tensor:  # [V, P, count]
    """For every picture the `count` most similar characters of the gallery's weight."""
    return torch.stack([torch.topk(view @ embeddings[gallery].T, count, dim=1).indices for view in embeddings])


def rank_one(embeddings: Tensor, gallery: int) -> float:
    """Share of the pictures in the other weights whose most similar gallery picture is the same character."""
    right = nearest(embeddings, gallery)[..., 0] == torch.arange(embeddings.shape[1])
    probes = [view for view in range(len(embeddings)) if view != gallery]
    return float(right[probes].float().mean())


def summary(embeddings: Tensor, gallery: int) -> tuple[dict[str, float], Verification]:
    verification = verify(embeddings)
    numbers = {f"tar_at_far_{far:g}": verification.at(far) for far in FALSE_ACCEPTS}
    numbers["rank1"] = rank_one(embeddings, gallery)
    numbers["genuine_pairs"], numbers["impostor_pairs"] = len(verification.genuine), len(verification.impostor)
    return numbers, verification
