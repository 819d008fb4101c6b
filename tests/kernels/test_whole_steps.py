"""Whole steps: sampled heads, CUDA graphs, compiled heads. conftest.py says where they run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import DEVICE, MACHINE
from torch import Tensor

if MACHINE == "cpu":
    pytest.skip("kernels run on a GPU, under ttsem or in the interpreter", allow_module_level=True)

from kernel_cases import random

import tritonmargin as tm


def loss_and_gradients(n: int, d: int, c: int, margin: tm.Margin, **options: Any) -> tuple[Tensor, ...]:
    x, w = random(n, d, seed=1).requires_grad_(), random(c, d, seed=2).requires_grad_()
    target = torch.arange(n, device=DEVICE) * 5 % c
    with tm.use_backend("triton"):
        loss = tm.margin_cross_entropy(x, w, target, margin, **{"chunk_bytes": 1, **options})
    return loss.detach(), *torch.autograd.grad(loss, (x, w))


@pytest.mark.parametrize("options", [{}, {"logq_correction": True, "sparse_grad": True}], ids=str)
def test_a_sampled_step_where_the_sample_has_room_for_every_label(options: dict[str, Any]) -> None:
    """The targets' classes and others in every step; the loss is that of the same given by hand. A GPU may not wait."""
    head = tm.MarginSoftmaxLoss(16, 400, tm.ArcFace(), sample_rate=0.1, **options).to(DEVICE)
    x, target = random(20, 16, seed=1).requires_grad_(), torch.arange(20, device=DEVICE) * 19
    head(x, target).backward()  # kernels are compiled
    walked = []
    for _ in range(2):
        x.grad = head.weight.grad = None
        with waits_are_errors():
            loss = head(x, target)
            loss.backward()
        ids = head.weight.grad.to_dense().abs().sum(dim=1).nonzero().squeeze(1)
        assert len(ids) == 40
        assert torch.isin(target, ids).all()
        assert torch.equal(head(x, target, class_ids=ids).detach(), loss.detach())
        walked.append(ids.tolist())
    assert walked[0] != walked[1]
    assert head.sampler.tolist()[1] == 3


@contextlib.contextmanager
def waits_are_errors() -> Iterator[None]:
    if MACHINE != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_captured_in_a_graph() -> None:
    """And a margin's number that is changed in place is the next replay's."""
    if MACHINE != "cuda":
        pytest.skip("graphs need a GPU")
    x, w = random(40, 64, seed=1).requires_grad_(), random(500, 64, seed=2).requires_grad_()
    target = torch.arange(40, device=DEVICE) * 5 % 500
    # Made before the capture, which allows no copy from the CPU, and the margin's numbers are such copies.
    margin = tm.ArcFace().to(DEVICE)
    expected = {m: loss_and_gradients(40, 64, 500, tm.ArcFace(m=m).to(DEVICE)) for m in (0.5, 0.1)}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), tm.use_backend("triton"):
        tm.margin_cross_entropy(x, w, target, margin, chunk_bytes=1).backward()
    torch.cuda.current_stream().wait_stream(side)
    x.grad = w.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), tm.use_backend("triton"):
        loss = tm.margin_cross_entropy(x, w, target, margin, chunk_bytes=1)
        loss.backward()
    losses = []
    for m, right in expected.items():
        margin.m = m  # in place
        graph.replay()
        losses.append(float(loss.detach()))
        for ours, other in zip((loss.detach(), x.grad, w.grad), right, strict=True):
            assert torch.equal(ours, other)
    assert losses[1] < losses[0]


def test_a_head_as_a_graphed_callable() -> None:
    """Other embeddings and targets in every step, as torch.cuda.make_graphed_callables replays them."""
    if MACHINE != "cuda":
        pytest.skip("graphs need a GPU")
    head = tm.MarginSoftmaxLoss(64, 500, tm.ArcFace()).to(DEVICE)
    given = random(40, 64, seed=1).requires_grad_(), torch.arange(40, device=DEVICE)
    replayed = torch.cuda.make_graphed_callables(tm.MarginSoftmaxLoss(64, 500, tm.ArcFace()).to(DEVICE), given)
    replayed.load_state_dict(head.state_dict())
    for seed in (3, 4):
        x, target = random(40, 64, seed=seed).requires_grad_(), torch.arange(40, device=DEVICE) * seed % 500
        right = head(x, target)
        expected = torch.autograd.grad(right, (x, head.weight))
        y = x.detach().clone().requires_grad_()
        loss = replayed(y, target)
        loss.backward()
        assert torch.equal(loss.detach(), right.detach())
        assert torch.equal(y.grad, expected[0])
        assert torch.equal(replayed.weight.grad, expected[1])
        replayed.weight.grad = None


def test_a_sampled_head_in_a_graph_draws_others_in_every_replay() -> None:
    if MACHINE != "cuda":
        pytest.skip("graphs need a GPU")
    head = tm.MarginSoftmaxLoss(64, 500, tm.ArcFace(), sample_rate=0.2).to(DEVICE)
    x, target = random(40, 64, seed=1).requires_grad_(), torch.arange(40, device=DEVICE) * 7
    replayed = torch.cuda.make_graphed_callables(head, (x, target))
    walked = []
    for _ in range(3):
        loss = replayed(x, target)
        loss.backward()
        ids = replayed.weight.grad.abs().sum(dim=1).nonzero().squeeze(1)
        assert len(ids) == 100
        assert torch.isin(target, ids).all()
        right = tm.margin_cross_entropy(x.detach(), head.weight.detach(), target, head.margin, class_ids=ids)
        torch.testing.assert_close(loss.detach(), right)
        walked.append(tuple(ids.tolist()))
        replayed.weight.grad = None
    assert len(set(walked)) == 3


def test_a_compiled_sampled_head_draws_what_it_would_have_drawn() -> None:
    if MACHINE != "cuda":
        pytest.skip("Inductor's code for a GPU needs one")
    head = tm.MarginSoftmaxLoss(64, 500, tm.ArcFace(), sample_rate=0.2).to(DEVICE)
    other = tm.MarginSoftmaxLoss(64, 500, tm.ArcFace(), sample_rate=0.2).to(DEVICE)
    other.load_state_dict(head.state_dict())
    compiled = torch.compile(other)
    for seed in (3, 4):
        x, target = random(40, 64, seed=seed), torch.arange(40, device=DEVICE) * seed % 500
        torch.testing.assert_close(compiled(x, target), head(x, target))
    assert torch.equal(head.sampler, other.sampler)
