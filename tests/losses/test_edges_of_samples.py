"""Ties, bounds and ignored samples, of the statistics and of the correction for a sample of the classes."""

from __future__ import annotations

import torch
from cases import DEVICE, every_backend, labels, made, sampled

import tritonmargin as tm
from tritonmargin.reference import margin_cross_entropy as with_full_logits


@every_backend
def test_a_tie_with_the_hardest_class_is_not_correct(backend: str) -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=DEVICE)
    w = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], device=DEVICE)
    with tm.use_backend(backend):
        _, stats = tm.margin_cross_entropy(
            x, w, torch.tensor([0, 2], device=DEVICE), tm.NormFace(s=4.0).to(DEVICE), return_stats=True
        )
    assert stats.correct.tolist() == [False, True]


@every_backend
def test_the_bound_of_logits_knows_the_correction(backend: str) -> None:
    """exp(s + log of the ratio) leaves float32's range, where exp(s) and the sum over the sample do not."""
    x, w, y = made(2, 8, seed=1).float(), made(200_000, 8, seed=2).float(), torch.tensor([5, 9], device=DEVICE)
    w[10:60] = x[0]
    ids = torch.arange(140, device=DEVICE)
    options = {"class_ids": ids, "logq_correction": True}
    margin = tm.NormFace(s=80.0).to(DEVICE)
    with tm.use_backend(backend):
        found = tm.margin_cross_entropy(x, w, y, margin, **options)
    torch.testing.assert_close(found, with_full_logits(x, w, y, margin, **options))


@every_backend
def test_the_correction_does_not_count_ignored_samples(backend: str) -> None:
    x, w, y = made(6, 8, seed=1).float(), made(60, 8, seed=2).float(), labels(50, 6) + 5
    y[2] = -100
    ids = sampled(y, 60, 20, torch.Generator("cpu").manual_seed(1))
    ids = torch.cat([torch.zeros(1, dtype=torch.int64, device=DEVICE), ids[ids > 0]])  # the first is nobody's target
    options = {"class_ids": ids, "logq_correction": True, "reduction": "none"}
    margin = tm.NormFace(s=8.0).to(DEVICE)
    with tm.use_backend(backend):
        found, stats = tm.margin_cross_entropy(x, w, y, margin, return_stats=True, **options)
    expected, same = with_full_logits(x, w, y, margin, return_stats=True, **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(stats.hardest_logit, same.hardest_logit, equal_nan=True)
