"""Rows that are updated inside backward: the same numbers, what is refused, and what it costs."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from cases import DEVICE, cost, cpu_only, every_backend, labels, made, sampled, using
from optimisers import OPTIMISERS, every_optimiser
from torch import Tensor, nn

import tritonmargin as tm
from tritonmargin.backends.torch_ops import RowGrads, finish_gradient, prepare_rows
from tritonmargin.optim import NoGradient, RowAdamW, RowSGD
from tritonmargin.optim.update_rules import RowUpdate, update_rows


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
def test_update_in_backward_wants_its_own_kind_of_optimiser() -> None:
    head = tm.MarginSoftmaxLoss(5, 12)
    with pytest.raises(TypeError, match="RowSGD or RowAdamW"):
        head.update_in_backward(torch.optim.SGD(head.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="no such parameter"):
        head.update_in_backward(RowSGD([nn.Parameter(torch.zeros(3, 2))], lr=0.1))


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
