"""What users of other margin softmax and Partial FC code complain of most, one test each, in the order of frequency."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import assert_same, cost, cpu_only, every_margin, made, oracle, problem, streamed
from ranks import on_ranks
from torch import Tensor

import tritonmargin as tm
from tritonmargin.margins import MARGINS

pytestmark = cpu_only


def test_complaint_1_memory_grows_with_the_number_of_classes() -> None:
    """A step at ten times the classes has the same peak, sampled or not, but for one number a class: 1/|w|."""
    d, peaks, full = 16, [], []
    for c in (200_000, 2_000_000):
        x, target = made(8, d).float().requires_grad_(), torch.arange(8)
        head = tm.MarginSoftmaxLoss(d, c, sample_rate=1000 / c, memory_budget=8 << 20)
        optimizer = tm.optim.RowSGD(head.parameters(), lr=0.1)
        head.update_in_backward(optimizer)

        def step(head: Any = head, x: Tensor = x, target: Tensor = target, optimizer: Any = optimizer) -> None:
            head(x, target).backward()
            optimizer.step()

        step()
        peaks.append(cost(step).peak)
        head.eval()  # all classes
        full.append(cost(step).peak - 4 * c)
    assert peaks[1] < 1.2 * peaks[0]
    assert full[1] < 1.2 * full[0]


@every_margin
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_complaint_2_nan_and_divergence(name: str, dtype: torch.dtype) -> None:
    """Training at the papers' scales with samples exactly at, and opposite, their class: everything stays finite."""
    torch.manual_seed(0)
    head = tm.MarginSoftmaxLoss(8, 50, MARGINS[name]())
    x = torch.randn(12, 8)
    with torch.no_grad():
        x[0], x[1], x[2] = head.weight[0], -head.weight[1], 0.0
    x.requires_grad_()
    target = torch.arange(12)
    optimizer = torch.optim.SGD([head.weight, x], lr=0.1, momentum=0.9)
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = head(x, target)
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite()
        assert x.grad.isfinite().all()
        assert head.weight.grad.isfinite().all()
        optimizer.step()


def test_complaint_3_resume_on_another_number_of_ranks_merge_and_export(tmp_path: Path) -> None:
    """Two ranks write, one process goes on, merged and exported; and nothing is initialised again behind one's back."""
    from safetensors.torch import load_file

    on_ranks(2, saves, str(tmp_path))
    head = tm.MarginSoftmaxLoss(6, 11)
    optimizer = tm.optim.RowSGD(head.parameters(), lr=0.1, momentum=0.9)
    state = {"head": head.state_dict(), "optimizer": optimizer.state_dict()}
    assert tm.checkpoint.load(tmp_path / "kept", state) == 1
    head.load_state_dict(state["head"])
    optimizer.load_state_dict(state["optimizer"])
    expected = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)])
    assert torch.equal(head.weight, expected)
    tm.checkpoint.export_centers(head, tmp_path / "centers.safetensors")
    centers = load_file(tmp_path / "centers.safetensors")["centers"]
    torch.testing.assert_close(centers, expected / expected.norm(dim=1, keepdim=True))
    other = tm.MarginSoftmaxLoss(6, 12)
    before = other.weight.detach().clone()
    with pytest.raises(tm.checkpoint.CheckpointError, match=r"11.*12|12.*11"):
        tm.checkpoint.load(tmp_path / "kept", {"head": other.state_dict()})
    assert torch.equal(other.weight, before)


def saves(folder: str) -> None:
    head = tm.MarginSoftmaxLoss(6, 11, process_group=dist.group.WORLD)
    optimizer = tm.optim.RowSGD(head.parameters(), lr=0.1, momentum=0.9)
    head(made(3, 6).float(), torch.tensor([0, 5, 10])).backward()
    optimizer.step()
    tm.checkpoint.save(f"{folder}/kept", {"head": head.state_dict(), "optimizer": optimizer.state_dict()}, 1)
    torch.save(head.weight.detach(), f"{folder}/{dist.get_rank()}.pt")


@every_margin
def test_complaint_4_whether_the_gradient_is_that_of_the_loss(name: str) -> None:
    """Against differences of the loss, and over two halves of a batch. Ranks: test_parallel.py, test_13."""
    given = problem(6, 5, 23)
    margin = MARGINS[name]()

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return tm.margin_cross_entropy(x, w, given.y, margin)

    x, w = given.x.clone().requires_grad_(), given.w.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (x, w), eps=1e-6, atol=1e-5)
    whole = torch.autograd.grad(loss(x, w), (x, w))
    for half in (slice(0, 3), slice(3, 6)):
        (tm.margin_cross_entropy(x[half], w, given.y[half], margin) / 2).backward()
    for accumulated, expected in zip((x.grad, w.grad), whole, strict=True):
        torch.testing.assert_close(accumulated, expected, rtol=1e-10, atol=1e-12)


@every_margin
def test_complaint_5_other_margins_inside_partial_fc(name: str) -> None:
    """Any margin on a sample of the classes is the reference on these classes, gradient of the norms included."""
    given = problem(6, 9, 131)
    ids = tm.sample_classes(given.y, 131, 40)
    options = dict(class_ids=ids, reduction="none")
    assert_same(streamed(given, MARGINS[name](), **options), oracle(given, MARGINS[name](), **options), 1e-9, 1e-12)


@pytest.mark.parametrize(("beyond_pi", "expected"), [
    ("cos-mm", lambda theta, m: math.cos(theta) - m * math.sin(m)),
    ("continuous", lambda theta, m: math.cos(theta) - (1.0 + math.cos(math.pi - m))),
    ("raw", lambda theta, m: math.cos(theta + m)),
    ("clip", lambda theta, m: -1.0),
])  # fmt: skip
def test_complaint_6_what_a_margin_does_beyond_pi(beyond_pi: str, expected: Any) -> None:
    theta, m, s = 3.0, 0.5, 10.0
    x = torch.tensor([[math.cos(theta), math.sin(theta)]], dtype=torch.float64)
    w = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    margin = tm.ArcFace(m=m, s=s, beyond_pi=beyond_pi)
    _, stats = tm.margin_cross_entropy(x, w, torch.tensor([0]), margin, return_stats=True)
    assert float(stats.target_logit) == pytest.approx(s * expected(theta, m), rel=1e-12)


def test_complaint_7_a_loss_that_can_be_compared_between_sampling_rates() -> None:
    """The corrected sampled loss is near the full one at any rate; the plain one is below by about log(1/rate)."""
    given = problem(40, 16, 3000)
    margin, generator = tm.NormFace(s=8.0), torch.Generator().manual_seed(0)
    full = float(tm.margin_cross_entropy(given.x, given.w, given.y, margin))
    for rate in (0.1, 0.3):
        errors = {}
        for corrected in (False, True):
            found = [
                float(tm.margin_cross_entropy(
                    given.x, given.w, given.y, margin, logq_correction=corrected,
                    class_ids=tm.sample_classes(given.y, 3000, round(rate * 3000), generator),
                ))
                for _ in range(20)
            ]  # fmt: skip
            errors[corrected] = sum(found) / 20 - full
        assert abs(errors[True]) < 0.05
        assert errors[False] < -0.6 * math.log(1.0 / rate)


def test_complaint_8_one_device_without_torch_distributed() -> None:
    assert not dist.is_initialized()
    head = tm.MarginSoftmaxLoss(5, 100, sample_rate=0.2)
    assert head(made(3, 5).float(), torch.tensor([1, 2, 3])).isfinite()
    plain = tm.MarginSoftmaxLoss(5, 100)
    assert plain(made(3, 5).float(), torch.tensor([1, 2, 3])).isfinite()
    assert not dist.is_initialized()


@pytest.mark.parametrize("make", [
    torch.optim.AdamW, torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop,
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.SparseAdam(p), lambda p: tm.optim.RowSGD(p, lr=0.1), lambda p: tm.optim.RowAdamW(p),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*gradient of a sampled head's weight is dense")
@pytest.mark.parametrize("sparse", [False, True])
def test_complaint_9_adamw_and_other_optimisers(make: Any, sparse: bool) -> None:
    """Dense gradients go with any optimiser of torch, sparse ones with SGD, Adagrad, SparseAdam and our own."""
    torch.manual_seed(0)
    head = tm.MarginSoftmaxLoss(5, 40, tm.CosFace(m=0.1, s=8.0), sample_rate=0.5, sparse_grad=sparse)
    optimizer = make(head.parameters())
    takes_sparse = type(optimizer).__name__ in ("SGD", "Adagrad", "SparseAdam", "RowSGD", "RowAdamW")
    x, target = made(4, 5).float(), torch.arange(4)
    losses = []
    for _ in range(40):
        loss = head(x, target)
        optimizer.zero_grad()
        loss.backward()
        takes_dense = type(optimizer).__name__ != "SparseAdam"
        if not (takes_sparse if sparse else takes_dense):
            with pytest.raises(RuntimeError, match=r"sparse|dense"):
                optimizer.step()
            return
        optimizer.step()
        losses.append(float(head.eval()(x, target)))
        head.train()
    assert losses[-1] < losses[0]
