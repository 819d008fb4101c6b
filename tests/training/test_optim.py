"""Row optimisers: torch's own numbers where every row has a gradient, and what happens to rows that have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import MORE, ONE_CHUNK, cpu_only, made, not_ttsem
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from optimisers import OPTIMISERS, C, D, every_optimiser, gradients, sparse
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import tritonmargin as tm
from tritonmargin.optim import RowAdamW, RowSGD
from tritonmargin.optim.update_rules import corrections, stochastic


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


def test_corrections_keep_their_precision_at_the_first_step() -> None:
    size, root = corrections(torch.tensor([1, 2]), 1.0, 0.9, 0.999)
    assert size.tolist() == pytest.approx([1 / (1 - 0.9), 1 / (1 - 0.81)], rel=1e-14)
    assert root.tolist() == pytest.approx([(1 - 0.999) ** 0.5, (1 - 0.999**2) ** 0.5], rel=1e-12)
    assert ONE_CHUNK < 150, "the losses above walk several chunks"


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
