"""Row optimisers: torch's own numbers where every row has a gradient, and what happens to rows that have none."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DEVICE, MORE, ONE_CHUNK, cost, cpu_only, every_backend, labels, made, not_ttsem, sampled, using
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import tritonmargin as tm
from tritonmargin.backends.torch_ops import RowGrads, finish_gradient, prepare_rows
from tritonmargin.optim import NoGradient, RowAdamW, RowSGD
from tritonmargin.optim.update_rules import RowUpdate, corrections, stochastic, update_rows

C, D = 40, 6

OPTIMISERS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "sgd": (RowSGD, torch.optim.SGD, {"lr": 0.5}),
    "momentum": (RowSGD, torch.optim.SGD, {"lr": 0.5, "momentum": 0.75}),
    "decay": (RowSGD, torch.optim.SGD, {"lr": 0.5, "momentum": 0.75, "weight_decay": 0.125}),
    "nesterov": (RowSGD, torch.optim.SGD, {"lr": 0.5, "momentum": 0.75, "weight_decay": 0.125, "nesterov": True}),
    "adamw": (RowAdamW, torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
}
every_optimiser = pytest.mark.parametrize("kind", OPTIMISERS)


def sparse(ids: Tensor, values: Tensor, size: int = C) -> Tensor:
    return torch.sparse_coo_tensor(ids[None], values, (size, *values.shape[1:]), is_coalesced=True)


def gradients(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return made(C, D, seed=100 + step).to(dtype)


@every_optimiser
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_all_rows_are_torchs_optimiser(kind: str, dtype: torch.dtype, form: str) -> None:
    """Bit for bit in numbers that need no rounding, within rounding elsewhere."""
    ours, theirs, options = OPTIMISERS[kind]
    for exact in (True, False):
        a, b = (nn.Parameter(made(C, D, seed=1).to(dtype).mul(8).round() / 8 if exact else made(C, D, seed=1).to(dtype))
                for _ in range(2))  # fmt: skip
        one, other = ours([a], **options), theirs([b], **options)
        for step in range(2 if exact else 5):
            grad = gradients(step, dtype)
            grad = (grad * 4).round() / 4 if exact else grad
            a.grad = grad if form == "dense" else sparse(torch.arange(C), grad)
            b.grad = grad.clone()
            before = a.grad.to_dense().clone()
            one.step()
            other.step()
            assert torch.equal(a.grad.to_dense(), before), "a step changed its gradient"
        if exact and kind != "adamw":
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_adamw_is_torchs_bit_for_bit_where_nothing_is_rounded(dtype: torch.dtype, form: str) -> None:
    """Gradients that are powers of two, and numbers with which both bias corrections divide without a remainder."""
    options: dict[str, Any] = dict(lr=0.1875, betas=(0.5, 0.75), eps=0.0, weight_decay=2.0)
    a, b = (nn.Parameter((made(C, D, seed=1).to(dtype) * 8).round() / 8) for _ in range(2))
    grad = torch.exp2((made(C, D, seed=2).to(dtype) * 3).round()) * made(C, D, seed=3).to(dtype).sign()
    one, other = RowAdamW([a], **options), torch.optim.AdamW([b], **options)
    start = a.detach().clone()
    for step in range(1, 3):
        a.grad = grad if form == "dense" else sparse(torch.arange(C), grad)
        b.grad = grad.clone()
        one.step()
        other.step()
        expected = start * 0.625**step - 0.1875 * grad.sign() * (1.0 if step == 1 else 1.625)
        assert torch.equal(b, expected), "the case is not exact"
        assert torch.equal(a, b)


@every_optimiser
@settings(max_examples=15 * MORE)
@drawn(data=st.data())
def test_frozen_rows_wait(kind: str, data: st.DataObject) -> None:
    """Every row is what it would be if it were trained alone, on the steps that sampled it."""
    ours, theirs, options = OPTIMISERS[kind]
    weight = nn.Parameter(made(C, D, seed=1))
    alone = [nn.Parameter(row.clone()) for row in weight.detach()]
    optimiser, others = ours([weight], **options), [theirs([row], **options) for row in alone]
    for step in range(4):
        ids = torch.tensor(sorted(data.draw(st.sets(st.integers(0, C - 1), max_size=12))), dtype=torch.int64)
        weight.grad = sparse(ids, gradients(step)[ids])
        optimiser.step()
        for i in ids.tolist():
            alone[i].grad = gradients(step)[i]
            others[i].step()
    torch.testing.assert_close(weight.detach(), torch.stack([row.detach() for row in alone]), rtol=1e-12, atol=1e-12)


@every_optimiser
@settings(max_examples=15 * MORE)
@drawn(data=st.data())
def test_decaying_rows_are_trained_on_zeros(kind: str, data: st.DataObject) -> None:
    ours, theirs, options = OPTIMISERS[kind]
    a, b = nn.Parameter(made(C, D, seed=1)), nn.Parameter(made(C, D, seed=1))
    one, other = ours([a], unsampled="decay", **options), theirs([b], **options)
    for step in range(4):
        ids = torch.tensor(sorted(data.draw(st.sets(st.integers(0, C - 1), max_size=12))), dtype=torch.int64)
        a.grad = sparse(ids, gradients(step)[ids])
        b.grad = torch.zeros_like(b).index_copy(0, ids, gradients(step)[ids])
        one.step()
        other.step()
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_state_is_what_is_documented() -> None:
    weight = nn.Parameter(made(C, D).float())
    weight.grad = gradients(0, torch.float32)
    for optimiser, matrices in (
        (RowSGD([weight], lr=0.1), 0),
        (RowSGD([weight], lr=0.1, momentum=0.9), 1),
        (RowSGD([weight], lr=0.1, momentum=0.9, state_dtype=torch.bfloat16), 0.5),
        (RowAdamW([weight]), 2),
        (RowAdamW([weight], state_dtype=torch.bfloat16), 1),
    ):
        optimiser.step()
        state = optimiser.state[weight]
        used = sum(value.nbytes for name, value in state.items() if value.ndim == 2)
        assert used == matrices * weight.nbytes
        assert sum(value.nbytes for value in state.values() if value.ndim < 2) <= 8 + 4 * C


@not_ttsem
@every_optimiser
def test_a_resumed_optimiser_goes_on_as_if_never_stopped(kind: str) -> None:
    ours, _, options = OPTIMISERS[kind]
    options = options | {"state_dtype": torch.bfloat16, "stochastic_rounding": True}
    whole = nn.Parameter(made(C, D, seed=1).to(torch.bfloat16))
    optimiser = ours([whole], **options)
    for step in range(6):
        if step == 3:
            resumed = nn.Parameter(whole.detach().clone())
            other = ours([resumed], **options)
            other.load_state_dict(optimiser.state_dict())
        for weight, each in [(whole, optimiser)] + ([(resumed, other)] if step >= 3 else []):
            ids = torch.arange(step, C, 3)
            weight.grad = sparse(ids, gradients(step, torch.bfloat16)[ids])
            each.step()
    assert torch.equal(whole, resumed)


# -- rounding ------------------------------------------------------------------------------------------------------


@not_ttsem
def test_rounding_by_chance_is_right_on_average() -> None:
    value = torch.tensor([1.0, 1.0 + 2**-10, 1.0 + 2**-8, -3.0 - 2**-9, 1e-30, 0.0]).repeat(20_000, 1)
    rounded = stochastic(value, torch.Generator(value.device).manual_seed(0))
    assert torch.equal(rounded, rounded.bfloat16().float()), "not bfloat16 numbers"
    assert ((rounded - value).abs() <= value.abs() * 2.0**-7).all()
    spread = value[0].abs() * 2.0**-8 / 20_000**0.5
    assert ((rounded.double().mean(dim=0) - value[0].double()).abs() <= 4 * spread).all()
    edge = torch.tensor([torch.finfo(torch.bfloat16).max, torch.inf, -torch.inf, torch.nan, 3.4e38])
    kept = stochastic(edge, torch.Generator(edge.device).manual_seed(0))
    assert torch.equal(kept.isnan(), edge.isnan())
    assert torch.equal(kept[1:3], edge[1:3])
    assert kept[0] == edge[0]


@not_ttsem
def test_bfloat16_weights_move_where_rounding_to_nearest_stalls() -> None:
    """A quadratic whose steps are far below half a unit in the last place: the loss falls only by chance's rounding."""
    found = {}
    for by_chance in (False, True):
        weight = nn.Parameter(torch.full((64, 64), 2.0, dtype=torch.bfloat16))
        optimiser = RowSGD([weight], lr=1e-3, stochastic_rounding=by_chance)
        for _ in range(1500):
            weight.grad = weight.detach().clone()  # of |w|^2 / 2: w shrinks by 1e-3 of itself, bfloat16 has 2^-8
            optimiser.step()
        found[by_chance] = float(weight.detach().float().mean())
    assert found[False] == 2.0, "rounding to nearest was expected to stall"
    assert abs(found[True] - 2.0 * 0.999**1500) < 0.02


# -- inside backward -----------------------------------------------------------------------------------------------


def trained(
    kind: str, inside: bool, dtype: torch.dtype, rate: float, unsampled: str, steps: int = 4, margin: str = "arc"
) -> tuple[Tensor, Tensor]:
    """The weight after some steps, and the last embeddings' gradient."""
    ours, _, options = OPTIMISERS[kind]
    torch.manual_seed(0)
    kinds = {"arc": tm.ArcFace(m=0.3, s=16.0), "plain": tm.Softmax(), "norm": tm.LSoftmax(m=2)}
    head = tm.MarginSoftmaxLoss(9, 150, kinds[margin], sparse_grad=True, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(made(150, 9, seed=3))
    optimiser = ours([head.weight], unsampled=unsampled, **options)
    if inside:
        head.update_in_backward(optimiser)
    for step in range(steps):
        x = made(7, 9, seed=10 + step).to(dtype).requires_grad_()
        target = labels(150, 7, step)
        optimiser.zero_grad()
        ids = None
        if rate < 1.0:
            ids = sampled(target, 150, round(rate * 150), torch.Generator().manual_seed(step))
        head(x, target, class_ids=ids).backward()
        assert isinstance(head.weight.grad, NoGradient) == inside
        optimiser.step()
    return head.weight.detach(), x.grad


@every_backend
@every_optimiser
@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("unsampled", ["frozen", "decay"])
def test_inside_backward_is_the_same_update(
    kind: str, rate: float, unsampled: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.float64 if backend == "torch" else torch.float32
    monkeypatch.setattr("tritonmargin.class_pass.chunks.cache_bytes", lambda: 1)  # several chunks
    for margin in ("arc", "plain", "norm"):
        with using(backend):
            expected, expected_dx = trained(kind, False, dtype, rate, unsampled, margin=margin)
            found, found_dx = trained(kind, True, dtype, rate, unsampled, margin=margin)
        rtol = 1e-12 if dtype == torch.float64 else 2e-4
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
        torch.testing.assert_close(found_dx, expected_dx, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kind", ["nesterov", "adamw"])
@pytest.mark.parametrize("place", ["rows in order", "row numbers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_updated_as_the_rule_says(kind: str, place: str, dtype: torch.dtype) -> None:
    """The end of a gradient with an update, against the rule on its own in float64."""
    d = 33
    ours, _, options = OPTIMISERS[kind]
    start, stop = 5, 5 + 37
    weight = nn.Parameter(made(90, d, seed=1).to(dtype))
    ids = torch.arange(0, 90, 2, device=DEVICE) if place == "row numbers" else None
    gradient = made(stop - start, d, seed=2).float()
    where: Any = slice(start, stop)
    if ids is not None:
        ids = ids[:45]
        start, stop = 3, 40
        gradient, where = gradient[: stop - start], ids[start:stop]
    optimiser = ours([weight], **options)
    results = []
    for oracle in (True, False):
        update = optimiser.begin(weight)
        state = tuple(made(90, d, seed=3 + i).square().to(dtype) for i in range(len(update.state)))
        steps = None if update.steps is None else torch.arange(90, dtype=torch.int32, device=DEVICE) % 5
        if oracle:
            update = RowUpdate(update.rule, weight.detach().double(), update.numbers,
                               tuple(each.double() for each in state), steps)  # fmt: skip
            update_rows(update, where, gradient.double())
        else:
            update = RowUpdate(update.rule, weight.detach().clone(), update.numbers, state, steps)
            buffer = torch.empty_like(gradient).to(dtype)
            prepared = prepare_rows(update.weight, ids, start, stop, False, buffer, buffer)
            scratch = gradient.clone()
            finish_gradient(scratch, scratch, prepared, start, RowGrads([]), None, update.weight, where, update)
        results.append((update.weight, *update.state, update.steps))
    eps = torch.finfo(dtype).eps
    for expected, found in zip(*results, strict=True):
        if expected is not None:
            torch.testing.assert_close(found.double(), expected.double(), rtol=2 * eps, atol=8e-6)
    untouched = torch.ones(90, dtype=torch.bool, device=DEVICE)
    untouched[where] = False
    assert torch.equal(results[1][0][untouched], weight.detach()[untouched])


def test_rounding_by_chance_inside_backward() -> None:
    """Rows that would round back to themselves move on average as they should."""
    k, d = 200, 64
    weight = torch.full((k, d), 1.0, dtype=torch.bfloat16, device=DEVICE)
    update = RowUpdate("sgd", weight, (1.0, 0.0, 0.0, 0.0), seed=5)
    step = torch.full((k, d), 2.0**-11, device=DEVICE)  # 1/16 of the gap below 1
    prepared = prepare_rows(weight, None, 0, k, False, step.to(torch.bfloat16), step.to(torch.bfloat16))
    finish_gradient(step, step.clone(), prepared, 0, RowGrads([]), None, weight, slice(0, k), update)
    moved = (weight == 1.0 - 2.0**-8).float().mean()
    assert set(weight.float().unique().tolist()) == {1.0, 1.0 - 2.0**-8}
    expected = 2.0**-11 / 2.0**-8
    assert abs(float(moved) - expected) < 5 * (expected / (k * d)) ** 0.5


@cpu_only
def test_what_needs_a_gradient_says_that_there_is_none() -> None:
    head = tm.MarginSoftmaxLoss(5, 12)
    optimiser = RowSGD(head.parameters(), lr=0.1)
    head.update_in_backward(optimiser)
    x, target = made(3, 5).float(), torch.tensor([1, 2, 3])
    loss = head(x, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"no gradient.*clipped"):
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.unscale_(optimiser)
    with pytest.raises(RuntimeError, match="second backward through"):
        loss.backward()
    with pytest.raises(RuntimeError, match="accumulate gradients"):
        head(x, target).backward()
    optimiser.step()
    with pytest.raises(RuntimeError, match="accumulate gradients"):
        (head(x, target) + head(x, target)).backward()
    with torch.autocast(x.device.type, torch.float16), pytest.raises(ValueError, match="GradScaler would scale"):
        head(x, target)
    with pytest.raises(RuntimeError, match="no gradient"):
        torch.optim.SGD(head.parameters(), lr=0.1).step()
    before = head.weight.detach().clone()
    optimiser.step()
    assert torch.equal(before, head.weight), "step() updated a second time"
    assert head.weight.grad is None
    head(x, target).backward()
    assert not torch.equal(before, head.weight)
    head.update_in_backward(None)
    optimiser.zero_grad()
    head(x, target).backward()
    assert head.weight.grad.shape == head.weight.shape


@every_backend
def test_rows_that_moved_are_not_walked_back_with(backend: str) -> None:
    """The weight is changed in place, and autograd knows: kernels, too, say so."""
    head = tm.MarginSoftmaxLoss(16, 40, tm.ArcFace(s=8.0), device=DEVICE)
    optimiser = RowSGD(head.parameters(), lr=0.1)
    head.update_in_backward(optimiser)
    x, target = made(3, 16).float().to(DEVICE), torch.tensor([1, 2, 3], device=DEVICE)
    with tm.use_backend(backend):
        first, second = head(x, target), head(x, target)
        first.backward()
        optimiser.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            second.backward()


@cpu_only
@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_on_the_weight_is_refused_before_rows_move(hook: str) -> None:
    head = tm.MarginSoftmaxLoss(5, 12)
    head.update_in_backward(RowSGD(head.parameters(), lr=0.1))
    handle = getattr(head.weight, hook)(lambda grad: None)
    before = head.weight.detach().clone()
    with pytest.raises(RuntimeError, match="a hook on the weight"):
        head(made(3, 5).float(), torch.tensor([1, 2, 3])).backward()
    assert torch.equal(head.weight, before)
    handle.remove()
    head(made(3, 5).float(), torch.tensor([1, 2, 3])).backward()
    assert not torch.equal(head.weight, before)


@cpu_only
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_scaled_loss_is_refused_before_rows_move(reduction: str) -> None:
    head = tm.MarginSoftmaxLoss(5, 12, reduction=reduction)
    optimiser = RowSGD(head.parameters(), lr=0.1, momentum=0.9)
    head.update_in_backward(optimiser)
    x, target = made(3, 5).float(), torch.tensor([1, 2, 3])
    scaler = torch.amp.GradScaler("cpu")
    for done in range(2):  # before the first step, and after it
        weights, momentum = head.weight.detach().clone(), optimiser.state_of(head.weight)["momentum_buffer"].clone()
        with pytest.raises(RuntimeError, match=r"multiplied by 65536.*GradScaler"):
            scaler.scale(head(x, target).sum()).backward()
        assert torch.equal(weights, head.weight), "rows moved before the error"
        assert optimiser.state[head.weight]["step"] == done
        assert torch.equal(momentum, optimiser.state[head.weight]["momentum_buffer"])
        (head(x, target).sum() * 1000.0).backward()  # a weight of the loss, nothing is left over from the error
        assert not torch.equal(weights, head.weight)
        optimiser.step()


@cpu_only
def test_where_looking_waits_for_the_device_the_first_step_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tm.optim.row_optimizer, "looks_at_values", lambda device: False)
    head = tm.MarginSoftmaxLoss(5, 12)
    optimiser = RowSGD(head.parameters(), lr=0.1)
    head.update_in_backward(optimiser)
    x, target = made(3, 5).float(), torch.tensor([1, 2, 3])
    with pytest.raises(RuntimeError, match="GradScaler"):
        (head(x, target) * 65536.0).backward()
    head(x, target).backward()
    optimiser.step()
    (head(x, target) * 65536.0).backward()
    optimiser.step()
    resumed = RowSGD(head.parameters(), lr=0.1)
    resumed.load_state_dict(optimiser.state_dict())
    head.update_in_backward(resumed)
    with pytest.raises(RuntimeError, match="GradScaler"):  # its first, though not its state's
        (head(x, target) * 65536.0).backward()


@cpu_only
@pytest.mark.parametrize("optimizer", ["momentum", "decay", "adamw", "plain", "sparse", "told to move all"])
def test_a_dense_gradient_of_a_sampled_head_is_said_to_move_all_rows(optimizer: str) -> None:
    head = tm.MarginSoftmaxLoss(5, 40, sample_rate=0.2, sparse_grad=optimizer == "sparse")
    made_of = {"decay": dict(weight_decay=0.1), "plain": {}}.get(optimizer, dict(momentum=0.9))
    made_of = made_of | (dict(unsampled="decay") if optimizer == "told to move all" else {})
    rows = RowAdamW(head.parameters()) if optimizer == "adamw" else RowSGD(head.parameters(), lr=0.1, **made_of)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            head(made(3, 5).float(), torch.tensor([1, 2, 3])).backward()
            rows.step()
    found = [str(each.message) for each in said if "sparse_grad=True" in str(each.message)]
    assert len(found) == (optimizer in ("momentum", "decay", "adamw"))


@cpu_only
def test_a_bias_has_its_gradient_beside_rows_that_are_updated() -> None:
    biases = []
    for inside in (False, True):
        head = tm.MarginSoftmaxLoss(9, 150, tm.Softmax(), bias=True, dtype=torch.float64)
        with torch.no_grad():
            head.weight.copy_(made(150, 9, seed=3))
        if inside:
            head.update_in_backward(RowSGD([head.weight], lr=0.1))
        head(made(7, 9, seed=4), torch.arange(7)).backward()
        biases.append(head.bias.grad)
    torch.testing.assert_close(biases[1], biases[0], rtol=1e-12, atol=1e-12)


@cpu_only
def test_frozen_embeddings_cost_no_product_inside_backward_either() -> None:
    head = tm.MarginSoftmaxLoss(9, 150)
    head.update_in_backward(RowSGD([head.weight], lr=0.1))
    products = []
    for trained_x in (True, False):
        loss = head(made(7, 9).float().requires_grad_(trained_x), torch.arange(7))
        products.append(len(cost(loss.backward).products))
        head.weight.grad = None
    assert products == [2, 1]  # dX and A: the logits are kept


@cpu_only
def test_no_gradient_of_w_is_ever_made() -> None:
    """Peak of a step: buffers of a chunk, and nothing of the size of W."""
    head = tm.MarginSoftmaxLoss(64, 200_000, memory_budget=8 << 20)
    optimiser = RowSGD(head.parameters(), lr=0.1, momentum=0.9)
    head.update_in_backward(optimiser)
    x, target = made(8, 64).float().requires_grad_(), torch.arange(8)
    head(x, target).backward()  # the momentum is made here

    def step() -> None:
        optimiser.zero_grad()
        head(x, target).backward()
        optimiser.step()

    head_bytes = head.weight.nbytes
    watched = cost(step)
    assert watched.above(head_bytes) == 0
    assert watched.peak < 20 << 20


@cpu_only
@pytest.mark.parametrize(("make", "message"), [
    (lambda w: RowSGD([w], lr=-1.0), "lr must be"),
    (lambda w: RowSGD([w], lr=0.1, momentum=float("nan")), "momentum must be"),
    (lambda w: RowSGD([w], lr=0.1, nesterov=True), "nesterov needs"),
    (lambda w: RowSGD([w], lr=0.1, unsampled="drop"), "'frozen', 'decay'"),
    (lambda w: RowAdamW([w], betas=(0.9, 1.0)), "betas must be"),
    (lambda w: RowAdamW([w], state_dtype=torch.int8), "state_dtype must be"),
])  # fmt: skip
def test_bad_options_are_named(make: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(nn.Parameter(torch.zeros(3, 2)))


@cpu_only
def test_update_in_backward_wants_its_own_kind_of_optimiser() -> None:
    head = tm.MarginSoftmaxLoss(5, 12)
    with pytest.raises(TypeError, match="RowSGD or RowAdamW"):
        head.update_in_backward(torch.optim.SGD(head.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="no such parameter"):
        head.update_in_backward(RowSGD([nn.Parameter(torch.zeros(3, 2))], lr=0.1))


def test_corrections_keep_their_precision_at_the_first_step() -> None:
    size, root = corrections(torch.tensor([1, 2]), 1.0, 0.9, 0.999)
    assert size.tolist() == pytest.approx([1 / (1 - 0.9), 1 / (1 - 0.81)], rel=1e-14)
    assert root.tolist() == pytest.approx([(1 - 0.999) ** 0.5, (1 - 0.999**2) ** 0.5], rel=1e-12)
    assert ONE_CHUNK < 150, "the losses above walk several chunks"


@cpu_only
def test_a_gradient_of_the_embeddings_alone_trains_nothing() -> None:
    head = tm.MarginSoftmaxLoss(5, 12)
    head.update_in_backward(RowSGD(head.parameters(), lr=0.1))
    x, target, before = made(3, 5).float().requires_grad_(), torch.tensor([1, 2, 3]), head.weight.detach().clone()
    loss = head(x, target)
    (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(loss, x)[0], grad), "nothing was updated, so a second time is allowed"
    head(x, target).backward(inputs=[x])
    assert torch.equal(head.weight, before)
    assert torch.equal(grad, x.grad)
    head(x, target).backward()
    assert not torch.equal(head.weight, before)


@cpu_only
def test_a_copy_of_a_head_is_not_trained_by_the_originals_optimiser() -> None:
    head = tm.MarginSoftmaxLoss(5, 12)
    optimiser = RowSGD(head.parameters(), lr=0.1)
    head.update_in_backward(optimiser)
    x, target = made(3, 5).float(), torch.tensor([1, 2, 3])
    other = copy.deepcopy(head)
    other(x, target).backward()
    assert isinstance(other.weight.grad, Tensor)
    assert not isinstance(other.weight.grad, NoGradient)
    head(x, target).backward()
    with pytest.raises(RuntimeError, match="another optimizer"):
        RowSGD(head.parameters(), lr=0.5).step()


@cpu_only
def test_a_momentum_that_is_raised_later_counts() -> None:
    a, b = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(3, 2))
    one, other = RowSGD([a], lr=1.0), torch.optim.SGD([b], lr=1.0)
    for step in range(4):
        for optimiser, weight in ((one, a), (other, b)):
            if step == 1:
                optimiser.param_groups[0]["momentum"] = 0.9
            weight.grad = torch.ones(3, 2)
            optimiser.step()
    assert torch.equal(a, b)


@cpu_only
def test_torchs_state_dicts_of_names_are_understood() -> None:
    """torch.distributed.checkpoint.state_dict calls parameters by their names."""

    def trained(steps: int) -> tuple[tm.MarginSoftmaxLoss, tm.optim.RowAdamW]:
        torch.manual_seed(0)
        head = tm.MarginSoftmaxLoss(4, 6, bias=True)
        optimiser = tm.optim.RowAdamW(head.parameters(), lr=0.1)
        for seed in range(steps):
            optimiser.zero_grad()
            head(made(3, 4, seed=seed).float(), torch.tensor([0, 2, 5])).backward()
            optimiser.step()
        return head, optimiser

    head, optimiser = trained(3)
    named = get_optimizer_state_dict(head, optimiser)
    assert set(named["state"]) == {"weight", "bias"}
    for options in (None, StateDictOptions(flatten_optimizer_state_dict=True)):
        other, loaded = trained(1)
        named = get_optimizer_state_dict(head, optimiser, options=options)
        set_optimizer_state_dict(other, loaded, named, options=options)
        for mine, theirs in zip(head.parameters(), other.parameters(), strict=True):
            for name, value in optimiser.state[mine].items():
                assert torch.equal(value, loaded.state[theirs][name]), name
    numbered = optimiser.state_dict()
    numbered["state"][7] = numbered["state"].pop(1)
    with pytest.raises(ValueError, match="state of '7', which is none of them"):
        loaded.load_state_dict(numbered)
    with pytest.raises(ValueError, match=r"has 1 parameters .* this optimizer has 2"):
        loaded.load_state_dict(tm.optim.RowAdamW([head.weight], lr=0.1).state_dict())
    assert int(loaded.state[other.weight]["step"]) == 3


def test_a_wrong_state_dict_changes_nothing() -> None:
    def used(make: Callable[..., Any], rows: int, lr: float) -> Any:
        weight = nn.Parameter(torch.zeros(rows, 2))
        optimiser = make([weight], lr=lr, momentum=0.9)
        weight.grad = torch.ones(rows, 2)
        optimiser.step()
        return optimiser

    optimiser = used(RowSGD, 4, 0.5)
    for other in (used(RowSGD, 3, 0.25), used(torch.optim.SGD, 4, 0.25)):
        with pytest.raises(ValueError, match=r"has shape|another optimizer"):
            optimiser.load_state_dict(other.state_dict())
        assert optimiser.param_groups[0]["lr"] == 0.5
        assert optimiser.state[optimiser.parameters()[0]]["momentum_buffer"].sum() == 8


@cpu_only
@pytest.mark.parametrize(("group", "message"), [
    ({"unsampled": "Frozen"}, "'frozen', 'decay'"), ({"lr": -1.0}, "lr must be"),
    ({"state_dtype": torch.int8}, "state_dtype"),
    ({"params": [nn.Parameter(torch.zeros(2, 2, 2))]}, r"\[C, D\] or \[C\]"),
])  # fmt: skip
def test_groups_are_checked_too(group: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowSGD([{"params": [nn.Parameter(torch.zeros(3, 2))], **group}], lr=0.1)


@cpu_only
def test_a_head_made_on_the_meta_device_starts_like_any_other() -> None:
    head = tm.MarginSoftmaxLoss(5, 20, sample_rate=0.5, device="meta", seed=3)
    head.to_empty(device="cpu")
    head.reset_parameters()
    assert head.sampler.tolist() == [3, 0]
    assert abs(float(head.weight.std()) - 0.01) < 0.005
