"""What autograd asks of a loss: a second backward, no gradient at all, frozen inputs, autocast, checkpointing."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, not_ttsem
from test_failures import CHUNK, gradients, problem
from torch.utils.checkpoint import checkpoint

import tritonmargin as tm
from tritonmargin.objectives import OBJECTIVES


def test_15_second_backward_needs_retain_graph_and_then_agrees():
    x, w, target = problem()
    for retain in (0, 10**9):
        loss = tm.margin_cross_entropy(x, w, target, tm.ArcFace(), retain_bytes=retain, chunk_bytes=CHUNK)
        first = torch.autograd.grad(loss, (x, w), retain_graph=True)
        second = torch.autograd.grad(loss, (x, w))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, (x, w))


def test_15_second_backward_with_retained_logits_of_plain_softmax():
    """Retained raw logits must not be overwritten by the first backward."""
    x, w, target = problem()
    for objective in OBJECTIVES:
        loss = tm.margin_cross_entropy(
            x, w, target, tm.Softmax(), objective=objective, retain_bytes=10**9, chunk_bytes=CHUNK
        )
        first = torch.autograd.grad(loss, (x, w), retain_graph=True)
        second = torch.autograd.grad(loss, (x, w))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_15_double_backward_says_so():
    x, w, target = problem()
    loss = tm.margin_cross_entropy(x, w, target, tm.ArcFace())
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        dx.square().sum().backward()


def test_15_no_grad_and_inference_mode():
    x, w, target = problem()
    expected = tm.margin_cross_entropy(x, w, target, tm.ArcFace())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = tm.margin_cross_entropy(x, w, target, tm.ArcFace(), retain_bytes=10**9)
        assert not loss.requires_grad
        assert torch.equal(loss, expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_15_frozen_inputs(objective):
    x, w, target = problem()
    dx, dw = gradients(tm.margin_cross_entropy(x, w, target, tm.ArcFace(), objective=objective), x, w)
    only_x = tm.margin_cross_entropy(x, w.detach(), target, tm.ArcFace(), objective=objective)
    only_w = tm.margin_cross_entropy(x.detach(), w, target, tm.ArcFace(), objective=objective)
    assert torch.equal(gradients(only_x, x)[0], dx)
    assert torch.equal(gradients(only_w, w)[0], dw)
    assert not tm.margin_cross_entropy(x.detach(), w.detach(), target, tm.ArcFace()).requires_grad


def test_15_autocast():
    x, w, target = problem()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = tm.margin_cross_entropy(x, w, target, tm.ArcFace(), chunk_bytes=CHUNK)
    assert loss.dtype == torch.float32
    dx, dw = gradients(loss, x, w)
    assert dx.dtype == dw.dtype == torch.float32
    expected = tm.margin_cross_entropy(x, w, target, tm.ArcFace())
    assert loss != expected  # products were in bfloat16
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    exact = gradients(expected, x, w)
    for ours, plain in zip((dx, dw), exact, strict=True):
        assert (ours - plain).norm() < 0.1 * plain.norm()


@not_ttsem
def test_15_checkpointed():
    x, w, target = problem()
    expected = gradients(tm.margin_cross_entropy(x, w, target, tm.ArcFace()), x, w)
    loss = checkpoint(tm.margin_cross_entropy, x, w, target, tm.ArcFace(), use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(gradients(loss, x, w), expected, strict=True))


def test_15_changing_the_weight_before_backward_is_noticed():
    x, w, target = problem()
    loss = tm.margin_cross_entropy(x, w, target, tm.ArcFace())
    with torch.no_grad():
        w.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
