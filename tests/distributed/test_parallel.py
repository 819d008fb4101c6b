"""Classes sharded over real processes equal one process: loss, gradients, weights after some steps, state."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import cpu_only
from ranks import on_ranks
from sharded import D, close, heads, mine, problem
from torch import Tensor, nn

import tritonmargin as tm
from tritonmargin.distributed.shard import shard_range
from tritonmargin.margins import MARGINS
from tritonmargin.objectives import OBJECTIVES
from tritonmargin.sampling import Sampler

pytestmark = cpu_only


# world size, classes, samples of each rank: uneven shards and batches, a rank without samples, ranks without classes
LAYOUTS = {
    "one rank": (1, 10, [6]),
    "two ranks": (2, 131, [3, 5]),
    "three ranks, one without samples": (3, 10, [4, 0, 3]),
    "four ranks, one without classes": (4, 3, [2, 1, 0, 3]),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
# Margins of every kind on every run, and all of them with the slow tests.
some_or_all = pytest.mark.parametrize(
    "names", [("ArcFace", "LSoftmax"), pytest.param(tuple(MARGINS), marks=pytest.mark.slow)], ids=["some", "all"]
)


@pytest.mark.parametrize(("classes", "world", "expected"), [
    (10, 4, [3, 3, 3, 1]), (3, 4, [1, 1, 1, 0]), (9, 8, [2, 2, 2, 2, 1, 0, 0, 0]), (1, 1, [1]),
])  # fmt: skip
def test_ranges_are_those_of_torch_chunk(classes: int, world: int, expected: list[int]) -> None:
    ranges = [shard_range(classes, rank, world) for rank in range(world)]
    assert [stop - start for start, stop in ranges] == expected
    assert ranges[0][0] == 0
    assert ranges[-1][1] == classes
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    chunks = [len(part) for part in torch.arange(classes).chunk(world)]
    assert [size for size in expected if size] == chunks


# -- one step ------------------------------------------------------------------------------------------------------


@some_or_all
@every_layout
def test_13_promise_same_result_for_any_world_size(layout: str, names: tuple[str, ...]) -> None:
    """Every objective and reduction, with and without smoothing; loss, statistics, dX, dW, db to 1e-12, and float32."""
    world, *rest = LAYOUTS[layout]
    on_ranks(world, one_step, names, *rest)


def one_step(names: tuple[str, ...], c: int, sizes: list[int]) -> None:
    float32_step(names, c, sizes)
    x, w, target = problem(c, sum(sizes))
    upstream = torch.arange(1.0, len(target) + 1, dtype=torch.float64)
    own = mine(sizes)
    if len(target) > 3:
        target[3] = -100
    for name, objective, reduction in itertools.product(names, OBJECTIVES, ("mean", "sum", "none")):
        for smoothing in (0.0, 0.1) if objective == "softmax" else (0.0,):
            options: dict[str, Any] = dict(
                margin=MARGINS[name](), reduction=reduction, objective=objective, label_smoothing=smoothing, bias=True
            )
            if reduction != "none":
                options["class_weight"] = torch.linspace(0.5, 2.0, c, dtype=torch.float64)
            one, head = heads(c, w, gradient_for="sum", **options)
            found, expected = [], []
            for each, into, rows in ((one, expected, slice(None)), (head, found, own)):
                leaf = x[rows].clone().requires_grad_()
                loss, stats = each(leaf, target[rows], return_stats=True)
                (loss @ upstream[rows] if reduction == "none" else loss).backward()
                into += [loss.detach(), leaf.grad, each.weight.grad, each.bias.grad, *(s.double() for s in stats)]
            range_ = slice(head.shard.start, head.shard.stop)
            for i, (ours, whole) in enumerate(zip(found, expected, strict=True)):
                part = own if i in (1, 4, 5, 6, 7, 8, 9) or (i == 0 and reduction == "none") else slice(None)
                part = range_ if i in (2, 3) else part
                what = (
                    name,
                    objective,
                    reduction,
                    smoothing,
                    ["loss", "dx", "dw", "db", "t", "rest", "class", "hardest", "correct", "sampled"][i],
                )
                close(ours, whole if whole.ndim == 0 else whole[part], 1e-12, what)


def float32_step(names: tuple[str, ...], c: int, sizes: list[int]) -> None:
    """Against float64, at most twice the error of one process's plain float32 code, or of one rounding."""
    x, w, target = problem(c, sum(sizes), torch.float32)
    own = mine(sizes)
    for name, reduction, rate in itertools.product(names, ("mean", "sum"), (1.0, 0.4)):
        _, head = heads(c, w, margin=MARGINS[name](), gradient_for="sum", reduction=reduction, sample_rate=rate)
        range_ = slice(head.shard.start, head.shard.stop)
        ids = None if rate == 1.0 else drawn_by_all(c, rate, 0, target)
        grads = []
        for dtype in (torch.float64, torch.float32):
            a, b = x.to(dtype, copy=True).requires_grad_(), w.to(dtype, copy=True).requires_grad_()
            loss = tm.reference.margin_cross_entropy(a, b, target, MARGINS[name](), class_ids=ids, reduction=reduction)
            grads.append((loss.detach(), *torch.autograd.grad(loss, (a, b))))
        leaf = x[own].clone().requires_grad_()
        loss = head(leaf, target[own])
        loss.backward()
        for ours, exact, plain, part in zip(
            (loss.detach(), leaf.grad, head.weight.grad), *grads, (slice(None), own, range_), strict=True
        ):
            whole = exact if exact.ndim == 0 else exact[part]
            if not whole.numel():
                continue
            budget = 2.0 * (plain.double() - exact).norm() + 2 * torch.finfo(torch.float32).eps * exact.norm()
            assert (ours.double() - whole).norm() <= budget, (name, reduction, rate)


def drawn_by_all(c: int, rate: float, step: int, target: Tensor) -> Tensor:
    """The union of what the ranks draw in a step, which each rank can draw again."""
    drawn = []
    for rank in range(dist.get_world_size()):
        start, stop = shard_range(c, rank, dist.get_world_size())
        local = torch.where((target >= start) & (target < stop), target - start, -1)
        drawn.append(Sampler(rate, torch.tensor([0, step]), start).draw(local, stop - start) + start)
    return torch.cat(drawn)


# -- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "names"), [
    ("three ranks, one without samples", ("ArcFace", "LSoftmax")),
    ("four ranks, one without classes", ("ArcFace",)),
    *(pytest.param(layout, tuple(MARGINS), marks=pytest.mark.slow) for layout in LAYOUTS),
])  # fmt: skip
def test_13_promise_same_training_for_any_world_size(layout: str, names: tuple[str, ...]) -> None:
    """Sampled and full, mean and sum, with momentum, the update after backward and inside it: W to 1e-10."""
    world, *rest = LAYOUTS[layout]
    on_ranks(world, twenty_steps, names, *rest, timeout=240.0)  # all margins on four ranks take two minutes


def twenty_steps(names: tuple[str, ...], c: int, sizes: list[int]) -> None:
    own = mine(sizes)
    for name, reduction, rate, inside in itertools.product(names, ("mean", "sum"), (1.0, 0.4), (False, True)):
        if inside and reduction == "sum":
            continue
        _, w, _ = problem(c, sum(sizes))
        one, head = heads(c, w, margin=MARGINS[name](), reduction=reduction, gradient_for="sum", sparse_grad=True,
                          sample_rate=rate)  # fmt: skip
        options = dict(lr=0.05 if reduction == "mean" else 0.01, momentum=0.9, weight_decay=0.01)
        optimisers = [tm.optim.RowSGD([each.weight], **options) for each in (one, head)]
        if inside:
            head.update_in_backward(optimisers[1])
        for step in range(20):
            x, _, target = problem(c, sum(sizes), seed=100 + step)
            for optimiser in optimisers:
                optimiser.zero_grad()
            leaf, whole = x[own].clone().requires_grad_(), x.clone().requires_grad_()
            loss = head(leaf, target[own])
            loss.backward()
            ids = drawn_by_all(c, rate, step, target) if rate < 1.0 else None
            expected = one(whole, target, class_ids=ids)
            expected.backward()
            limit = 1e-10 if step else 1e-12
            close(loss.detach(), expected.detach(), limit, (name, rate, inside, step, "loss"))
            close(leaf.grad, whole.grad[own], limit, (name, rate, inside, step, "dx"))
            if not inside:
                rows = one.weight.grad.to_dense()[head.shard.start : head.shard.stop]
                close(head.weight.grad.to_dense(), rows, limit, (name, rate, step, "dw"))
            for optimiser in optimisers:
                optimiser.step()
        close(head.weight.detach(), one.weight.detach()[head.shard.start : head.shard.stop], 1e-10, (name, "W"))


def test_13_gradients_of_a_backbone_in_ddp_fsdp_or_averaged_by_hand() -> None:
    """gradient_for: under DDP and fully_shard, which average, "ddp" gives the exact gradient; summed by hand, "sum"."""
    on_ranks(2, backbones)


def backbones() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, init_device_mesh

    sizes, c = [3, 5], 20
    x, w, target = problem(c, 8)
    own = mine(sizes)
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(D, 12), nn.Tanh(), nn.Linear(12, D)).double()
    one, _ = heads(c, w)
    one(plain(x), target).backward()
    expected = [parameter.grad.clone() for parameter in plain.parameters()]

    def fresh() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(D, 12), nn.Tanh(), nn.Linear(12, D)).double()

    ways = {
        "ddp": (nn.parallel.DistributedDataParallel(fresh()), "ddp"),
        "fsdp": (fully_shard(fresh(), mesh=init_device_mesh("cpu", (2,))), "ddp"),
        "by hand": (fresh(), "sum"),
        "compiled ddp": (torch.compile(nn.parallel.DistributedDataParallel(fresh()), backend="aot_eager"), "ddp"),
    }
    for way, (backbone, gradient_for) in ways.items():
        _, head = heads(c, w, gradient_for=gradient_for)
        head(backbone(x[own]), target[own]).backward()
        for parameter, exact in zip(backbone.parameters(), expected, strict=True):
            grad = parameter.grad
            if way == "by hand":
                dist.all_reduce(grad)
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            close(grad, exact, 1e-12, way)
    with torch.autocast("cpu", torch.bfloat16):
        _, head = heads(c, w.float())
        loss = head(x[own].float(), target[own])
    exact = one(x, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=2e-2, atol=2e-2)


# -- state ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_promise_resume_on_a_different_world_size(tmp_path: Any) -> None:
    """Head, sampler and row optimiser, 3 ranks -> 2 -> 4 -> 1: weights bit for bit, and then the same steps."""
    for number, world in enumerate((3, 2, 4, 1)):
        on_ranks(world, goes_on, str(tmp_path), number)


def goes_on(folder: str, number: int) -> None:
    import torch.distributed.checkpoint as dcp

    c = 10
    torch.manual_seed(number)
    head = tm.MarginSoftmaxLoss(D, c, sample_rate=0.5, bias=True, process_group=dist.group.WORLD, dtype=torch.float64)
    optimiser = tm.optim.RowAdamW(head.parameters(), lr=0.01)
    if number:
        step(head, optimiser, 0)  # so that there is state to load into
        state = {"head": head.state_dict(), "optimiser": optimiser.state_dict()}
        dcp.load(state, checkpoint_id=f"{folder}/{number - 1}")
        head.load_state_dict(state["head"])
        optimiser.load_state_dict(state["optimiser"])
    before = torch.load(f"{folder}/{number - 1}.pt") if number else None
    if before is not None:
        assert torch.equal(gathered(head.weight), before["weight"])
        for name, value in optimiser.state[head.weight].items():
            assert torch.equal(value if name == "step" else gathered(value), before[name]), name
        assert torch.equal(head.sampler, before["sampler"])
    for i in range(3):
        step(head, optimiser, i)
    dcp.save({"head": head.state_dict(), "optimiser": optimiser.state_dict()}, checkpoint_id=f"{folder}/{number}")
    state = optimiser.state[head.weight]
    kept = {name: value if name == "step" else gathered(value) for name, value in state.items()}
    kept |= {"weight": gathered(head.weight), "sampler": head.sampler}
    if dist.get_rank() == 0:
        torch.save(kept, f"{folder}/{number}.pt")


def step(head: tm.MarginSoftmaxLoss, optimiser: tm.optim.RowAdamW, seed: int) -> None:
    x, _, target = problem(head.num_classes, 5, seed=seed)
    optimiser.zero_grad()
    head(x, target).backward()
    optimiser.step()


def gathered(own: Tensor) -> Tensor:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own.detach())
    return torch.cat(parts)


def test_each_rank_starts_from_rows_of_its_own() -> None:
    rows = [torch.tensor(each) for each in on_ranks(2, fresh_rows)]
    assert not torch.equal(rows[0], rows[1])
    assert abs(float(torch.cat(rows).std()) - 0.01) < 0.001


def fresh_rows() -> list[list[float]]:
    torch.manual_seed(0)
    rows: list[list[float]] = tm.MarginSoftmaxLoss(D, 1000, process_group=dist.group.WORLD).weight.tolist()
    return rows
