"""Classes sharded over real processes equal one process: loss, gradients, weights after some steps, and faults."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import time
import unittest.mock
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import cpu_only, labels, made
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tritonmargin as tm
from tritonmargin import checks
from tritonmargin.distributed import agreement
from tritonmargin.distributed.shard import Shard, shard_range
from tritonmargin.margins import MARGINS
from tritonmargin.objectives import OBJECTIVES
from tritonmargin.sampling import Sampler

pytestmark = cpu_only

D = 7
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


def mine(sizes: list[int]) -> slice:
    start = sum(sizes[: dist.get_rank()])
    return slice(start, start + sizes[dist.get_rank()])


def problem(c: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return made(n, D, seed=seed + 1).to(dtype), made(c, D, seed=seed + 2).to(dtype), labels(c, n, seed)


def heads(c: int, w: Tensor, **options: Any) -> tuple[tm.MarginSoftmaxLoss, tm.MarginSoftmaxLoss]:
    """The head of one process and that of this rank, with the same weights."""
    one = tm.MarginSoftmaxLoss(D, c, dtype=w.dtype, **options)
    with torch.no_grad():
        one.weight.copy_(w)
        if one.bias is not None:
            one.bias.copy_(torch.linspace(-1.0, 1.0, c))
    sharded = tm.MarginSoftmaxLoss(D, c, dtype=w.dtype, process_group=dist.group.WORLD, **options)
    sharded.load_state_dict(one.state_dict())
    return one, sharded


def close(found: Tensor, expected: Tensor, rtol: float, what: object) -> None:
    assert found.shape == expected.shape, what
    size = float(expected.abs().nan_to_num(posinf=0.0).max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        found, expected, rtol=rtol, atol=rtol * size, equal_nan=True, msg=lambda text: f"{what}: {text}"
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


# -- faults --------------------------------------------------------------------------------------------------------


def test_14_ranks_that_disagree_all_hear_what_about() -> None:
    on_ranks(2, disagreements)


def disagreements() -> None:
    rank = dist.get_rank()
    for name, options in {
        "num_classes": dict(num_classes=10 + rank),
        "embedding_dim": dict(embedding_dim=D + rank),
        "margin": dict(margin=tm.ArcFace(m=0.1 * (1 + rank))),
        "dtype": dict(dtype=(torch.float32, torch.bfloat16)[rank]),
        "sample_rate": dict(sample_rate=0.5 + 0.1 * rank),
        "reduction": dict(reduction=("mean", "sum")[rank]),
        "margin is .*half.*": dict(margin=Halved(0.5 + rank)),
        "margin is .*scheduled.*": dict(margin=scheduled(bool(rank))),
    }.items():
        name = name if "margin is" in name else f"{name} is"
        arguments: dict[str, Any] = dict(embedding_dim=D, num_classes=10) | options
        with pytest.raises(ValueError, match=f"{name}.* on rank 1, .* on rank 0"):
            tm.MarginSoftmaxLoss(process_group=dist.group.WORLD, **arguments)
    tm.MarginSoftmaxLoss(D, 10, scheduled(True), process_group=dist.group.WORLD)  # alike, at other addresses
    for options in (dict(dtype=torch.int64), dict(seed="one"), dict(device="nowhere")):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=None if rank else "rank 1 has an error: "):
            tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD, **(options if rank else {}))
    head = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD)
    x, target = made(3, D).float(), torch.tensor([1, 2, 3 if rank else 11])
    with pytest.raises((ValueError, RuntimeError), match="rank 0 .* had an error" if rank else "class number 11"):
        head(x, target)
    with pytest.raises((ValueError, RuntimeError), match="rank 1 .* had an error" if not rank else "same width"):
        head(x[:, : D - rank], torch.tensor([1, 2, 3]))
    with pytest.raises(RuntimeError, match="ask for statistics or none: rank 1 does and rank 0 does not"):
        head(x, torch.tensor([1, 2, 3]), return_stats=bool(rank))
    with pytest.raises(RuntimeError, match="ask for gradients or none"), torch.set_grad_enabled(bool(rank)):
        head(x, torch.tensor([1, 2, 3]))
    ids = torch.tensor([1, 2, 3]) if rank else torch.tensor([3, 2, 1])
    with pytest.raises((ValueError, RuntimeError), match="rank 0 .* had an error" if rank else "sorted and unique"):
        head(x, torch.tensor([1, 2, 3]), class_ids=ids)
    with pytest.raises(RuntimeError, match="ask for class_ids or none: rank 1 does not and rank 0 does"):
        head(x, torch.tensor([1, 2, 3]), class_ids=None if rank else torch.arange(5))
    sampled = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD, sample_rate=0.5).train(bool(rank))
    with pytest.raises(RuntimeError, match="ask for a sample of the classes or none: rank 1 does and rank 0 does not"):
        sampled(x, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="rank 1 has an error: label_smoothing" if not rank else "between 0 and 1"):
        tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD, label_smoothing=2.0 if rank else 0.0)
    with pytest.raises(ValueError, match="has 5 classes, this head 10"):
        head.load_state_dict(tm.MarginSoftmaxLoss(D, 5).state_dict())
    other = tm.MarginSoftmaxLoss(D, 9, process_group=dist.group.WORLD)  # rank 0 has five rows of both
    with pytest.raises(ValueError, match="has 10 classes, this head 9"):
        other.load_state_dict(head.state_dict())
    states = [tm.optim.RowSGD(each.parameters(), lr=0.1, momentum=0.9) for each in (head, other)]
    with pytest.raises(ValueError, match=r"momentum_buffer has shape \(10, 7\), expected \(9, 7\)"):
        states[1].load_state_dict(states[0].state_dict())
    with (
        tm.use_backend("reference" if rank else "torch"),
        pytest.raises((ValueError, RuntimeError), match="neither process groups" if rank else "rank 1 .* had an err"),
    ):
        head(x, torch.tensor([1, 2, 3]))
    with pytest.raises(RuntimeError, match="ask for float64 numbers or none"):
        head(x.double() if rank else x, torch.tensor([1, 2, 3]))
    assert head(x, torch.tensor([1, 2, 3])).isfinite(), "usable after an error"


class Halved(tm.Margin):
    """What a user writes, with a number that repr does not show."""

    def __init__(self, half: float) -> None:
        super().__init__()
        self.half = half

    def target_cosine(self, cos: Tensor) -> Tensor:
        return self.half * cos


def scheduled(really: bool) -> tm.Margin:
    margin = tm.ArcFace(m=0.1)
    return margin.with_schedule(m=lambda step: 0.1 * step) if really else margin


@pytest.mark.parametrize("of_a_group", [True, False])
def test_14_ranks_of_other_groups_all_hear_of_it_within_the_timeout(of_a_group: bool) -> None:
    alone, waiting = on_ranks(2, other_groups, of_a_group, timeout=3.0)
    assert "this rank's group is of the ranks [0, 1], and not all of them made a head with a group" in waiting
    own = "the ranks [0]" if of_a_group else "none"
    assert alone.endswith(
        f"rank 1 waited for [0, 1] to make a head of one group with it; this rank's head is of {own}"
    ), alone


def other_groups(of_a_group: bool) -> str:
    alone = dist.new_group([0])
    group = dist.group.WORLD if dist.get_rank() else alone if of_a_group else None
    try:
        head = tm.MarginSoftmaxLoss(D, 10, process_group=group)
        for _ in range(60):  # steps; a rank that is gone would be noticed at once
            head(torch.randn(2, D), torch.tensor([1, 2]))
            time.sleep(0.1)
    except RuntimeError as error:
        if not dist.get_rank():
            head(torch.randn(2, D), torch.tensor([1, 2]))  # once is enough
        return str(error)
    return ""


def test_14_what_a_rank_waited_for_itself_is_no_news_and_a_lost_store_holds_nobody_up() -> None:
    on_ranks(2, nothing_to_hear)


def nothing_to_hear() -> None:
    """Both gave up on a group and go on with a head of their own."""
    agreement.leave_word([0, 1])
    dist.barrier()
    head = tm.MarginSoftmaxLoss(D, 10)
    head(torch.randn(2, D), torch.tensor([1, 2]))
    assert head.lookout.next < math.inf
    dist.barrier()
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not dist.get_rank():
        os.remove(store.path)
    dist.barrier()
    head.lookout.next = -math.inf
    begin = time.monotonic()
    head(torch.randn(2, D), torch.tensor([1, 2]))
    assert time.monotonic() < begin + 5.0, "the store was waited for"
    assert head.lookout.next == math.inf


def test_14_a_label_that_is_no_class_is_an_error_on_all_ranks_where_nobody_looks() -> None:
    on_ranks(2, labels_of_a_gpu)


def labels_of_a_gpu() -> None:
    """Labels are not looked at on a GPU; what ranks tell each other is waited for there anyway."""
    with unittest.mock.patch.object(checks, "looks_at_values", return_value=False):
        head = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD)
        x = made(2, D).float()
        for wrong in (10, -1, 4000):
            target = torch.tensor([1, wrong if dist.get_rank() else -100])
            with pytest.raises(RuntimeError, match=r"rank 1 .* has a target that is none of the 10 classes"):
                head(x, target)
        assert head(x, torch.tensor([1, -100])).isfinite()


def test_14_a_head_inside_of_ddp_is_refused() -> None:
    on_ranks(2, head_in_ddp)


class Whole(torch.nn.Module):
    """Backbone and head in one."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.backbone, self.head = torch.nn.Linear(D, D), tm.MarginSoftmaxLoss(D, 10, **options)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss = self.head(self.backbone(x), target)
        assert isinstance(loss, Tensor)
        return loss


def head_in_ddp() -> None:
    x, target = torch.randn(2, D), torch.tensor([1, 2])
    sharded = Whole(process_group=dist.group.WORLD)
    updated = Whole()
    updated.head.update_in_backward(tm.optim.RowSGD([updated.head.weight], lr=0.1))
    for model in (sharded, updated):
        with pytest.raises(RuntimeError, match="the head is inside DistributedDataParallel"):
            DistributedDataParallel(model)(x, target)
    DistributedDataParallel(Whole())(x, target).backward()  # a head that is a module like any other may be
    for options, ignored, other in (
        ({}, ["head.weight"], ""),
        ({"bias": True}, ["head.weight"], "head.bias"),
        ({"bias": True}, ["head.weight", "head.bias"], ""),
        ({"class_weight": torch.ones(10)}, ["head.weight"], "head.class_weight"),
        ({"class_weight": torch.ones(10)}, ["head.weight", "head.class_weight"], ""),
    ):
        apart = Whole(process_group=dist.group.WORLD, **options)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(apart, ignored)
        expected = pytest.raises(RuntimeError, match=f"the first one's {other}") if other else contextlib.nullcontext()
        with expected:
            DistributedDataParallel(apart)(x, target).backward()


def test_14_a_head_inside_of_fully_shard_is_refused() -> None:
    on_ranks(2, head_in_fsdp)


def head_in_fsdp() -> None:
    x, target = torch.randn(2, D), torch.tensor([1, 2])
    mesh = init_device_mesh("cpu", (2,))
    inside = fully_shard(Whole(process_group=dist.group.WORLD), mesh=mesh)
    with pytest.raises(RuntimeError, match="fully_shard takes each rank's rows for parts of one tensor"):
        inside(x, target)
    whole = Whole(process_group=dist.group.WORLD)
    fully_shard(whole.backbone, mesh=mesh)
    whole(x, target).backward()
    fully_shard(Whole(), mesh=mesh)(x, target).backward()  # a head that is a module like any other may be


def test_14_a_scaled_loss_on_one_rank_is_refused_on_all() -> None:
    on_ranks(2, scaled_on_one)


def scaled_on_one() -> None:
    """Each rank has its own samples' losses, and a factor of its own."""
    head = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD, reduction="none")
    head.update_in_backward(tm.optim.RowSGD([head.weight], lr=0.1))
    before = head.weight.detach().clone()
    loss = head(torch.randn(2, D, requires_grad=True), torch.tensor([1, 7]))
    with pytest.raises(RuntimeError, match="as by a GradScaler"):
        (loss * (1.0 if dist.get_rank() else 65536.0)).sum().backward()
    assert torch.equal(head.weight, before)


def test_14_a_tensor_on_another_device_is_an_error_on_all_ranks() -> None:
    """What ranks tell each other goes over the device of the weights: NCCL knows no other."""
    on_ranks(2, elsewhere)


def elsewhere() -> None:
    head = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD)
    x, target = torch.randn(2, D), torch.tensor([1, 2])
    rank = dist.get_rank()
    with pytest.raises((ValueError, RuntimeError), match="use one device" if rank else "rank 1 .* had an error"):
        head(x.to("meta") if rank else x, target.to("meta") if rank else target)


def test_14_a_skipped_step_with_fsdp_and_accumulation_is_the_same_as_on_one_process() -> None:
    on_ranks(2, skipped_with_fsdp)


def skipped_with_fsdp() -> None:
    """FSDP's parameters stay gathered where backward does not come: `reshard()` after a loss that is skipped."""

    def net() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(D, 8), torch.nn.ReLU(), torch.nn.Linear(8, D))

    options: dict[str, Any] = dict(margin=tm.NormFace(s=4.0), on_nonfinite="skip")
    backbone, alone = fully_shard(net(), mesh=init_device_mesh("cpu", (2,))), net()
    head = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD, **options)
    full = tm.MarginSoftmaxLoss(D, 10, **options)
    full.load_state_dict({"weight": head.state_dict()["weight"].full_tensor()})
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (backbone, alone)]
    for step in range(6):
        xs = [made(2, D, seed=10 * step + rank).float() for rank in range(2)]
        if step % 2:
            xs[1][0, 0] = torch.nan
        else:
            for optimizer in optimizers:
                optimizer.zero_grad()
        target = torch.tensor([1, 9])
        loss = head(backbone(xs[dist.get_rank()]), target)
        loss.backward()
        if not loss.isfinite():
            backbone.reshard()
        full(alone(torch.cat(xs)), target.repeat(2)).backward()
        if step % 2:
            for optimizer in optimizers:
                optimizer.step()
    for ours, other in zip(backbone.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.full_tensor(), other, rtol=1e-5, atol=1e-6)


def test_statistics_are_of_a_sample_on_every_rank_if_on_one() -> None:
    assert on_ranks(2, sampled_statistics) == [True, True]


def sampled_statistics() -> bool:
    # Two classes on rank 0, one of them walked, and one on rank 1, which has nothing to choose from.
    head = tm.MarginSoftmaxLoss(D, 3, process_group=dist.group.WORLD, sample_rate=0.5)
    _, stats = head(made(1, D).float(), torch.tensor([2]), return_stats=True)
    return bool(stats.sampled.all())


def test_a_rank_without_samples_or_gradient_takes_part() -> None:
    on_ranks(2, bystander)


def bystander() -> None:
    head = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD)
    leaf = made(3, D).float().requires_grad_()
    if dist.get_rank():
        head(torch.empty(0, D), torch.empty(0, dtype=torch.int64)).backward()
    else:
        head(leaf, torch.tensor([1, 2, 3])).backward()
        assert leaf.grad.abs().sum() > 0
    fresh = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD, device="meta")
    assert fresh.state_dict()["weight"].to_local().is_meta
    fresh.to_empty(device="cpu")
    fresh.reset_parameters()
    for each in (head, fresh, copy.deepcopy(head)):
        state = tm.optim.RowSGD(each.parameters(), lr=0.1, momentum=0.9).state_dict()["state"][0]
        assert state["momentum_buffer"].shape == (10, D), "not a tensor of all classes"
        assert not each.state_dict()["weight"].to_local().is_meta


def test_14_nan_on_one_rank_is_seen_by_all() -> None:
    on_ranks(3, nan_on_one)


def nan_on_one() -> None:
    for reduction in ("mean", "sum", "none"):
        for way in ("raise", "skip"):
            head = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD, on_nonfinite=way, reduction=reduction)
            x = made(2, D, seed=dist.get_rank()).float()
            if dist.get_rank() == 1:
                x[1, 3] = torch.nan
            x.requires_grad_()
            target = torch.tensor([1, 9])
            if way == "raise":
                with pytest.raises(FloatingPointError, match="on all ranks"):
                    head(x, target)
            else:
                before = head.weight.detach().clone()
                optimiser = tm.optim.RowSGD(head.parameters(), lr=0.1, momentum=0.9)
                head(x, target).sum().backward()
                optimiser.step()
                assert x.grad is None
                assert torch.equal(head.weight, before)
            head(made(2, D).float(), target).sum().backward()
            assert head.weight.grad.isfinite().all()


def test_14_a_skipped_step_leaves_the_backbone_alone() -> None:
    """0 times the nan of a backbone's activations is nan: backward must not go there at all."""
    first, second = on_ranks(2, nan_in_a_backbone)
    assert first == second, "the replicas differ"


def nan_in_a_backbone() -> list[float]:
    torch.manual_seed(0)
    backbone = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)))
    head = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD, on_nonfinite="skip")
    head.update_in_backward(rows := tm.optim.RowSGD(head.parameters(), lr=0.1))
    optimiser = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
    target = torch.tensor([1, 9])
    for step in range(4):
        before = [each.detach().clone() for each in (*backbone.parameters(), head.weight)]
        x = made(2, D, seed=10 * step + dist.get_rank()).float()
        if step % 2 and dist.get_rank():
            x[0, 0] = torch.nan
        optimiser.zero_grad()
        loss = head(backbone(x), target)
        loss.backward()
        if step % 2 == 0:
            optimiser.step()
        else:
            assert all(each.grad is None for each in (*backbone.parameters(), head.weight))
        rows.step()
        after = (*backbone.parameters(), head.weight)
        assert all(torch.equal(a, b) == bool(step % 2) for a, b in zip(before, after, strict=True)), step
        assert all(each.isfinite().all() for each in after)
    return [float(each.detach().double().sum()) for each in backbone.parameters()]


def test_14_an_overflow_on_one_rank_is_skipped_by_all_with_torchs_sharded_scaler() -> None:
    (steps, sums), other = on_ranks(2, overflow_on_one)
    assert (steps, sums) == other, "the replicas differ"
    assert steps == [(8.0, True), (4.0, False), (4.0, True)]


def overflow_on_one() -> tuple[list[tuple[float, bool]], list[float]]:
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    torch.manual_seed(0)
    backbone = nn.parallel.DistributedDataParallel(nn.Linear(D, D))
    head = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD)
    everything = [*backbone.parameters(), *head.parameters()]
    optimiser = torch.optim.SGD(everything, lr=0.1)
    scaler = ShardedGradScaler(device="cpu", init_scale=8.0, process_group=dist.group.WORLD)
    steps = []
    for step in range(3):
        optimiser.zero_grad()
        x = made(2, D, seed=10 * step + dist.get_rank()).float()
        scaler.scale(head(backbone(x), torch.tensor([1, 9]))).backward()
        if step == 1 and dist.get_rank() == 1:
            head.weight.grad[0, 0] = torch.inf
        before = [each.detach().clone() for each in everything]
        scaler.step(optimiser)
        scaler.update()
        moved = [not torch.equal(a, b) for a, b in zip(before, everything, strict=True)]
        assert len(set(moved)) == 1
        steps.append((scaler.get_scale(), moved[0]))
    return steps, [float(each.detach().double().sum()) for each in backbone.parameters()]


@pytest.mark.parametrize("moment", ["before the step", "between forward and backward"])
def test_14_a_dead_rank_ends_the_others_within_the_timeout(moment: str) -> None:
    begin = time.monotonic()
    errors = on_ranks(3, one_dies, moment, timeout=5.0)
    assert errors[1] is None
    assert all("error" in str(error).lower() or "closed" in str(error).lower() for error in (errors[0], errors[2]))
    assert time.monotonic() - begin < 40


def one_dies(moment: str) -> str:
    head = tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD)
    x = made(2, D, seed=dist.get_rank()).float().requires_grad_()
    if dist.get_rank() == 1 and moment == "before the step":
        os._exit(1)
    try:
        loss = head(x, torch.tensor([1, 9]))
        if dist.get_rank() == 1:
            os._exit(1)
        loss.backward()
    except RuntimeError as error:
        return f"error: {error}"
    return "nothing happened"


def one_of_two_sums() -> None:
    a, b = (torch.ones(3, requires_grad=True) for _ in range(2))
    first, second = Shard(4).all_sums(a, b)
    assert first.tolist() == second.tolist() == [2.0, 2.0, 2.0]
    first.sum().backward()
    assert a.grad is not None
    assert a.grad.tolist() == [1.0, 1.0, 1.0]
    assert b.grad is None


def test_a_sum_that_nobody_differentiates_has_no_gradient() -> None:
    """The class pass would gather rows for the gradient of |w_y|, were it zeros."""
    on_ranks(2, one_of_two_sums)
