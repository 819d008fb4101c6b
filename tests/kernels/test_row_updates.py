"""Optimisers' updates inside backward, and rounding by chance; conftest.py says where they run."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from cases import DEVICE, MACHINE
from torch import Tensor

if MACHINE == "cpu":
    pytest.skip("kernels run on a GPU, under ttsem or in the interpreter", allow_module_level=True)

import triton
import triton.language as tl
from kernel_cases import NUMBERS, Case, exact, given, near, random, upstream

from tritonmargin.backends.triton import numbers as numbers_module
from tritonmargin.backends.triton.update_rules import random_bits
from tritonmargin.optim.update_rules import RowUpdate, update_rows
from tritonmargin.spec import PassGrads

RULES: dict[str, tuple[str, tuple[float, ...], int]] = {
    # name: rule, numbers, how many tensors of state
    "SGD": ("sgd", (0.1, 0.0, 0.0, 0.0), 0),
    "momentum and decay": ("sgd", (0.1, 0.9, 0.01, 0.0), 1),
    "Nesterov": ("sgd", (0.1, 0.9, 0.01, 1.0), 1),
    "AdamW": ("adamw", (0.1, 0.9, 0.99, 1e-8, 0.05), 2),
}
OTHERS = [
    ("momentum and decay", Case(chunks="chunk_bytes")),  # each chunk updates its own rows
    ("AdamW", Case(classes="sampled", labels="one class")),
    ("Nesterov", Case("float16", added="bias", unit=(False, False))),
]
if "bfloat16" in NUMBERS:
    OTHERS.append(("AdamW", Case("bfloat16", chunks="chunk_bytes")))
    OTHERS.append(("momentum and decay", Case("bfloat16", stored="another dtype", added="bias", chunks="chunk_bytes")))


def made_update(rule: str, weight: Tensor, state_dtype: torch.dtype, seed: int | None = None) -> RowUpdate:
    name, values, count = RULES[rule]
    state = []
    for index in range(count):
        each = torch.empty_like(weight, dtype=state_dtype)  # lines like the weight's
        each.copy_((random(*weight.shape, seed=30 + index) * 0.1).abs())
        state.append(each)
    steps = None
    if name == "adamw":
        steps = torch.arange(weight.shape[0], device=DEVICE, dtype=torch.int32) % 4
    return RowUpdate(name, weight, values, tuple(state), steps, seed)


def copied(update: RowUpdate, dtype: torch.dtype) -> RowUpdate:
    """The same step for the oracle, on a CPU in float64."""

    def copy(value: Tensor) -> Tensor:
        return value.detach().cpu().to(dtype).contiguous()

    return RowUpdate(
        update.rule, copy(update.weight), update.numbers, tuple(map(copy, update.state)),
        None if update.steps is None else update.steps.cpu().clone(),
    )  # fmt: skip


def check_update(case: Case, rule: str, state_dtype: torch.dtype, ops: Any = numbers_module) -> None:
    """One update inside backward against the rule in float64. ops: the module `numbers`, or one with a fault."""
    inputs, position, valid, spec = given(case)
    weight = torch.empty_strided(inputs.weight.shape, inputs.weight.stride(), dtype=inputs.weight.dtype, device=DEVICE)
    weight.copy_(inputs.weight)
    weight[5] = weight[77] = 0.25  # a row of zeros has no gradient
    inputs = inputs._replace(weight=weight)
    update = made_update(rule, weight, state_dtype)
    right = exact(inputs, position, valid, spec)
    wanted = copied(update, torch.float64)
    before = weight.clone()
    _, saved = ops.forward(inputs, spec)
    grads = upstream(case)
    needs = (True, True, inputs.bias is not None)
    found = ops.backward(inputs, saved, PassGrads(**grads), needs, spec, update)
    assert found.weight is None
    assert update.touched
    named = {"target_product": right.product, "target_norm": right.norm_w, "embedding_norm": right.norm_x}
    named["rest"] = right.others.logsumexp(dim=1)
    if right.bias is not None:
        at = position.cpu()
        named["target_bias"] = torch.where(at >= 0, right.bias[at.clamp(min=0)], 0.0)
    sum((grads[name].cpu().double() * named[name]).sum() for name in grads).backward()
    place = slice(0, len(weight)) if inputs.class_ids is None else inputs.class_ids.cpu()
    update_rows(wanted, place, right.leaves["weight"].grad[place])
    # dX is that of the rows before the update: the gathered targets, the chunks' rows.
    near(found.x, right.leaves["x"].grad, case.tolerance, "gradient of x")
    stored = 2.0 * torch.finfo(weight.dtype).eps
    close = max(case.tolerance if rule != "AdamW" else 10 * case.tolerance, stored)
    lr = update.numbers[0]
    moved, expected = weight.cpu().double() - before.cpu().double(), wanted.weight - before.cpu().double()
    slack = stored * before.cpu().double().abs().max() / max(float(expected.norm(dim=1).median()), 1e-9)
    near(moved, expected, close + slack, f"update of the weight, lr {lr}")
    for index, (state, other) in enumerate(zip(update.state, wanted.state, strict=True)):
        near(state, other, max(case.tolerance, 2.0 * torch.finfo(state.dtype).eps), f"state {index}")
    if update.steps is not None:
        assert torch.equal(update.steps.cpu(), wanted.steps)


@pytest.mark.usefixtures("to_the_end")
@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str) -> None:
    check_update(Case(), rule, torch.float32)


@pytest.mark.parametrize(("rule", "case"), OTHERS, ids=str)
def test_rows_in_other_places(rule: str, case: Case) -> None:
    check_update(case, rule, torch.float32)


@pytest.mark.parametrize("rule", ["momentum and decay", "AdamW"])
def test_a_state_in_bfloat16(rule: str) -> None:
    check_update(Case(), rule, torch.bfloat16)


def test_rows_that_are_not_in_the_pass_stay() -> None:
    inputs, _, _, spec = given(Case(classes="sampled"))
    inputs = inputs._replace(weight=inputs.weight.clone())
    update = made_update("AdamW", inputs.weight, torch.float32)
    others = torch.ones(len(inputs.weight), dtype=torch.bool, device=DEVICE)
    others[inputs.class_ids] = False
    held = [each[others].clone() for each in (inputs.weight, *update.state, update.steps)]
    _, saved = numbers_module.forward(inputs, spec)
    grads = PassGrads(**upstream(Case(classes="sampled")))
    numbers_module.backward(inputs, saved, grads, (False, True, False), spec, update)
    for now, before in zip((inputs.weight, *update.state, update.steps), held, strict=True):
        assert torch.equal(now[others], before)
        assert not torch.equal(now[~others], before[: len(now[~others])])


def test_rounding_by_chance_is_right_on_average() -> None:
    """Steps far below a rounding of bfloat16: rounded to nearest none happens, by chance the mean one does."""
    inputs, _, _, spec = given(Case(stored="same"))
    target, ones = torch.arange(17, device=DEVICE), torch.ones(129, 32, device=DEVICE, dtype=torch.bfloat16)
    x = torch.full((17, 32), 1.0, device=DEVICE)
    g = torch.full((17,), -1.0, device=DEVICE)
    spec = type(spec)(**{**vars(spec), "unit_weight": False, "unit_embeddings": False, "scale": 1.0, "bounded": False})
    step = 2.0**-12  # bfloat16's next number above 1 is 2^-7 away, so one in 32 moves
    means = []
    for seed in (None, 1, 2, 3):
        weight = ones.clone()
        update = RowUpdate("sgd", weight, (step, 0.0, 0.0, 0.0), seed=seed)
        given_now = inputs._replace(x=x, weight=weight, target=target)
        _, saved = numbers_module.forward(given_now, spec)
        numbers_module.backward(given_now, saved, PassGrads(target_product=g), (False, True, False), spec, update)
        assert torch.equal(weight[17:], ones[17:])  # a number that bfloat16 holds is not rounded
        means.append(float(weight[:17].double().mean()) - 1.0)
        assert set(weight.unique().tolist()) <= {1.0, 1.0 + 2.0**-7}
    assert means[0] == 0.0
    count = 3 * 17 * 32
    deviation = math.sqrt(step * 2.0**-7 / count)
    assert abs(sum(means[1:]) / 3 - step) < 4.0 * deviation
    assert len(set(means[1:])) > 1


# -- the hash ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed"])
def bits_kernel(out, seed, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, random_bits(i.to(tl.int64) * stride, seed))


def bits(seed: int, stride: int = 1, count: int = 1 << 16) -> Tensor:
    out = torch.zeros(count, dtype=torch.int32, device=DEVICE)
    bits_kernel[(count // 4096,)](out, seed, stride, BLOCK=4096)
    return out.cpu().long() & 65535


class Places(NamedTuple):
    seed: int
    stride: int  # between places; of a matrix's column that is its width


# Consecutive seeds are those of the weight and of its states.
PLACES = {
    "a row": Places(1, 1),
    "the next seed": Places(2, 1),
    "a large seed": Places((1 << 30) - 5, 1),
    "a column": Places(1, 512),
    "past 2^32": Places(1, 1 << 20),
}


@pytest.mark.parametrize("where", PLACES)
def test_the_bits_that_round_are_uniform(where: str) -> None:
    values = bits(*PLACES[where])
    for found, cells in ((values >> 8, 256), (values & 255, 256), (values, 65536)):
        counts = torch.bincount(found, minlength=cells).double()
        expected = len(values) / cells
        chi = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi - (cells - 1)) < 5.0 * math.sqrt(2.0 * (cells - 1)), (chi, cells)


def correlation(a: Tensor, b: Tensor) -> float:
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a * b).mean() / (a.std() * b.std())) * math.sqrt(len(a))  # in standard deviations


def test_places_and_seeds_do_not_look_alike() -> None:
    row, column = bits(1), bits(1, 512)
    pairs: dict[str, tuple[Any, Any]] = {
        "neighbours": (row[1:], row[:-1]),
        "rows": (row[512:], row[:-512]),
        "columns": (column[1:], column[:-1]),
        **{f"seed + {k}": (row, bits(1 + k)) for k in (1, 2, 5, 1 << 20)},
    }
    for name, (a, b) in pairs.items():
        assert abs(correlation(a, b)) < 5.0, name
        for bit in (0, 8, 15):
            assert abs(correlation((a >> bit) & 1, (b >> bit) & 1)) < 5.0, (name, bit)
        equal = int((a == b).sum())  # one in 65,536
        assert equal < 10, name
