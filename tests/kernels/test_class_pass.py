"""The class pass as numbers per sample, forward and backward, against float64; conftest.py says where it runs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from cases import DEVICE, MACHINE
from torch import Tensor

if MACHINE == "cpu":
    pytest.skip("kernels run on a GPU, under ttsem or in the interpreter", allow_module_level=True)

from kernel_cases import (
    AXES,
    NUMBERS,
    Case,
    check_pass,
    exact,
    given,
    near,
    numbers_of_all_kinds,
    pairwise,
    random,
    upstream,
    valid,
)

from tritonmargin.backends.triton import numbers as numbers_module
from tritonmargin.backends.triton.class_pass import forward_pass
from tritonmargin.backends.triton.plan import plan_for
from tritonmargin.spec import PassGrads, PassInputs, PassSpec

CASES = [Case(**chosen) for chosen in pairwise(AXES, valid)]


def test_any_two_values_meet() -> None:
    names = Case._fields
    met = {(a, getattr(case, a), b, getattr(case, b)) for case in CASES for a, b in itertools.combinations(names, 2)}
    for a, b in itertools.combinations(names, 2):
        for u, v in itertools.product(AXES[a], AXES[b]):
            assert (a, u, b, v) in met or not valid(**{a: u, b: v}), (a, u, b, v)
    assert len(CASES) < 30


@pytest.mark.parametrize("case", CASES[:: 8 if MACHINE == "interpreter" else 1], ids=str)
def test_numbers_and_gradients(case: Case) -> None:
    check_pass(case, numbers_module)


@pytest.mark.usefixtures("to_the_end")
@pytest.mark.parametrize("numbers", [name for name in NUMBERS if name != "float32"])
def test_several_tiles_in_every_direction(numbers: str) -> None:
    """The one that every GPU's tiles are executed with; float32 has none of its own."""
    check_pass(Case(numbers, size=(130, 140, 140), added="bias and offset", chunks="chunk_bytes"), numbers_module)


@pytest.mark.parametrize("numbers", [name for name in NUMBERS if name in ("bfloat16", "float32")])
def test_a_wide_row(numbers: str) -> None:
    check_pass(Case(numbers, size=(3, 1024, 70)), numbers_module)


@numbers_of_all_kinds
def test_two_runs_are_equal_bit_by_bit(numbers: str) -> None:
    case = Case(numbers, added="bias", mean="mean, a weight a class", asks="rest and hardest",
                labels="one class", chunks="chunk_bytes")  # fmt: skip
    inputs, _, _, spec = given(case)
    results = []
    for _ in range(2):
        out, saved = numbers_module.forward(inputs, spec)
        back = numbers_module.backward(inputs, saved, PassGrads(**upstream(case)), (True, True, True), spec)
        results.append([*out, *back])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


# -- edges -------------------------------------------------------------------------------------------------------


def plain_spec(**changed: Any) -> PassSpec:
    made: dict[str, Any] = dict(
        unit_weight=True, unit_embeddings=True, scale=8.0, ignore_index=-100, bounded=True, want_rest=True,
        want_hardest=True, sparse=False, dtype=torch.float32, chunk_bytes=0, retain_bytes=0, backend="triton",
    )  # fmt: skip
    return PassSpec(**(made | changed))


def both_ways(inputs: PassInputs, spec: PassSpec) -> Any:
    """Results, and gradients of the sum of what is there."""
    out, saved = numbers_module.forward(inputs, spec)
    one = torch.ones(len(inputs.x), device=DEVICE)
    grads = PassGrads(rest=one, target_product=one, hardest_product=one if spec.want_hardest else None)
    return out, numbers_module.backward(inputs, saved, grads, (True, True, False), spec)


@pytest.mark.parametrize("bounded", [True, False])
def test_no_other_class(bounded: bool) -> None:
    """C = 1: the rest is -inf, nobody is the hardest, and the target's own gradient is all there is."""
    inputs = PassInputs(random(3, 16, seed=1), random(1, 16, seed=2), torch.zeros(3, dtype=torch.int64, device=DEVICE))
    out, back = both_ways(inputs, plain_spec(bounded=bounded))
    assert out.rest.tolist() == [-math.inf] * 3
    assert out.hardest_product.tolist() == [-math.inf] * 3
    assert out.hardest_row.tolist() == [-1] * 3
    right = exact(inputs, inputs.target, inputs.target >= 0, plain_spec())
    right.product.sum().backward()
    near(back.x, right.leaves["x"].grad, 1e-5, "gradient of x")
    near(back.weight, right.leaves["weight"].grad, 1e-5, "gradient of weight")


@pytest.mark.parametrize(("n", "numbers"), [(0, "float32"), *((5, numbers) for numbers in NUMBERS)])
def test_no_class_in_the_pass(n: int, numbers: str) -> None:
    dtype, precision, _ = NUMBERS[numbers]
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    x, w = random(n, 16, seed=1, dtype=dtype), random(9, 16, seed=2, dtype=dtype)
    target = torch.full((n,), 50, device=DEVICE)  # another rank's
    out, back = both_ways(PassInputs(x, w, target, none), plain_spec(dtype=dtype, precision=precision))
    assert out.rest.tolist() == [-math.inf] * n
    assert out.hardest_row.tolist() == [-1] * n
    assert back.x.shape == x.shape
    assert back.weight.shape == w.shape
    assert not back.x.any()
    assert not back.weight.any()


@numbers_of_all_kinds
def test_no_sample(numbers: str) -> None:
    """Nothing to launch, nothing to describe to the memory accelerator."""
    dtype, precision, _ = NUMBERS[numbers]
    x, w = random(0, 16, seed=1, dtype=dtype), random(70, 16, seed=2, dtype=dtype)
    target = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    out, back = both_ways(PassInputs(x, w, target), plain_spec(dtype=dtype, precision=precision))
    assert out.rest.shape == out.target_product.shape == out.hardest_row.shape == (0,)
    assert back.x.shape == (0, 16)
    assert back.weight.shape == (70, 16)
    assert not back.weight.any()


@numbers_of_all_kinds
def test_rows_that_carry_the_scale_need_no_running_maximum(numbers: str) -> None:
    """A compiled step normalises in PyTorch, and knows a bound of the logits all the same."""
    dtype, precision, error = NUMBERS[numbers]
    x = 8.0 * torch.nn.functional.normalize(random(20, 16, seed=1))  # float32, as the step makes it
    inputs = PassInputs(x, random(140, 16, seed=2, dtype=dtype), torch.arange(20, device=DEVICE) * 5)
    spec = plain_spec(unit_embeddings=False, scale=1.0, want_hardest=False, dtype=dtype, precision=precision)
    out, back = both_ways(inputs, spec)
    right = exact(inputs, inputs.target, inputs.target >= 0, spec)
    rest = right.others.logsumexp(dim=1)
    (rest + right.product).sum().backward()
    near(out.rest, rest, 8 * error, "rest")
    near(back.x, right.leaves["x"].grad, 8 * error, "gradient of x")
    near(back.weight, right.leaves["weight"].grad, 8 * error, "gradient of weight")


@pytest.mark.parametrize("bounded", [True, False])
def test_not_a_number_comes_out_where_it_went_in(bounded: bool) -> None:
    """In the samples that see it, of all numbers."""
    x, w = random(20, 16, seed=1), random(140, 16, seed=2)
    x[7] = math.nan
    target = torch.arange(20, device=DEVICE) * 5
    spec = plain_spec(bounded=bounded, unit_weight=False, unit_embeddings=False, scale=1.0)
    out, _ = numbers_module.forward(PassInputs(x, w, target), spec)
    for value in (out.rest, out.hardest_product, out.target_product, out.embedding_norm):
        assert value.isnan().nonzero().flatten().tolist() == [7]
    threshold = torch.zeros(20, device=DEVICE)
    out, _ = numbers_module.forward(PassInputs(x, w, target, threshold=threshold), plain_spec(want_rest=False))
    assert out.hinge.isnan().nonzero().flatten().tolist() == [7]


def test_of_equal_logits_the_lowest_class_is_the_hardest() -> None:
    x, w = torch.ones(3, 16, device=DEVICE), torch.ones(300, 16, device=DEVICE)
    target = torch.tensor([0, 5, 299], device=DEVICE)
    for chunk_bytes in (0, 1):
        out, _ = numbers_module.forward(PassInputs(x, w, target), plain_spec(chunk_bytes=chunk_bytes))
        assert out.hardest_row.tolist() == [1, 0, 0]


@numbers_of_all_kinds
def test_rows_of_any_length(numbers: str) -> None:
    """A row too short for float32 to square counts as 0; a long one has its direction."""
    dtype, precision, tolerance = NUMBERS[numbers]
    short = [0.0, 1e-30] if dtype != torch.float16 else [0.0, 0.0]
    long = 1e12 if dtype != torch.float16 else 100.0
    w = torch.ones(5, 16, device=DEVICE) * torch.tensor([*short, 1e-4, 1.0, long], device=DEVICE)[:, None]
    inputs = PassInputs(torch.ones(5, 16, device=DEVICE, dtype=dtype), w.to(dtype), torch.arange(5, device=DEVICE))
    out, back = both_ways(inputs, plain_spec(dtype=dtype, precision=precision, want_hardest=False))
    right = torch.tensor([0.0, 0.0, 8.0, 8.0, 8.0])
    near(out.target_product, right, 1e-6, "product")
    near(out.rest, torch.stack([torch.cat([right[:i], right[i + 1 :]]).logsumexp(0) for i in range(5)]), tolerance, "")
    assert back.x.isfinite().all()
    assert back.weight.isfinite().all()
    assert not back.weight[:2].any()


def test_a_large_bias_stays_with_its_class() -> None:
    """Samples that fill up a tile have the bias as their logit, and exp(100) is infinite."""
    bias = random(40, seed=3)
    bias[7] = 100.0
    inputs = PassInputs(random(20, 16, seed=1), random(40, 16, seed=2), torch.arange(20, device=DEVICE), None, bias)
    spec = plain_spec(bounded=False, unit_weight=False, unit_embeddings=False, scale=1.0, want_hardest=False)
    out, back = both_ways(inputs, spec)
    right = exact(inputs, inputs.target, inputs.target >= 0, spec)
    rest = right.others.logsumexp(dim=1)
    (rest + right.product).sum().backward()
    near(out.rest, rest, 1e-6, "rest")
    near(back.x, right.leaves["x"].grad, 1e-4, "gradient of x")
    near(back.weight, right.leaves["weight"].grad, 1e-4, "gradient of weight")


def test_nothing_but_exact_rows() -> None:
    """Gradients of the targets' numbers alone: no tile is made, and rows without a sample get 0."""
    x, w = random(20, 16, seed=1), random(140, 16, seed=2)
    target = torch.arange(20, device=DEVICE) * 7 % 60
    inputs, spec = PassInputs(x, w, target), plain_spec(unit_weight=False, unit_embeddings=False, scale=1.0)
    _, saved = numbers_module.forward(inputs, spec)
    g = random(20, seed=3)
    back = numbers_module.backward(inputs, saved, PassGrads(target_product=g), (True, True, False), spec)
    right = torch.zeros(140, 16, dtype=torch.float64).index_add(
        0, target.cpu(), (g[:, None].double() * x.double()).cpu()
    )
    near(back.weight, right, 1e-6, "gradient of weight")
    near(back.x, (g[:, None].double() * w[target].double()).cpu(), 1e-6, "gradient of x")


@pytest.mark.parametrize("labels", ["ignored", "elsewhere"])
@pytest.mark.parametrize("classes", ["all", "sampled"])
def test_labels_are_resolved_once(labels: str, classes: str) -> None:
    inputs, position, valid, spec = given(Case(labels=labels, classes=classes))
    plan = plan_for(inputs.x, inputs.weight, inputs.class_ids, spec)
    saved, _ = forward_pass(inputs, spec, plan)
    found = saved.label.cpu()
    assert torch.equal(found[: plan.n].long(), torch.where(valid, position, -2).cpu())
    assert (found[plan.n :] == -2).all()  # samples that fill up a line


def test_float32_products_follow_what_is_asked_for() -> None:
    """IEEE is exact; TF32 rounds operands to ten bits, to nearest."""

    def error(precision: str) -> float:
        inputs = PassInputs(random(20, 64, seed=1), random(40, 64, seed=2), torch.arange(20, device=DEVICE))
        spec = plain_spec(unit_weight=False, unit_embeddings=False, scale=1.0, bounded=False, precision=precision,
                          want_hardest=False)  # fmt: skip
        out, _ = numbers_module.forward(inputs, spec)
        right = exact(inputs, inputs.target, inputs.target >= 0, spec).others.logsumexp(dim=1)
        return float((out.rest.cpu().double() - right).abs().max())

    assert error("ieee") < 1e-5
    if "tf32" in NUMBERS:
        assert 1e-5 < error("tf32") < 1e-2


def holds_tf32(values: Tensor) -> bool:
    """Whether nothing is in the bits that matrix units cut off."""
    return not bool((values.contiguous().view(torch.int32) & 0x1FFF).any())


@pytest.mark.skipif("tf32" not in NUMBERS, reason="the interpreter has no TF32")
def test_operands_of_tf32_are_rounded_to_nearest() -> None:
    inputs, _, _, spec = given(Case("tf32", unit=(False, False)))
    saved, _ = forward_pass(inputs, spec, plan_for(inputs.x, inputs.weight, None, spec))
    for made, of in ((saved.xs, inputs.x), (saved.rows, inputs.weight)):
        n, d = of.shape
        assert holds_tf32(made[:n])
        near(made[:n, :d].flatten(), of.cpu().flatten(), 2.0**-11, "operand")
        assert not made[:n, d:].any()
        assert not holds_tf32(of)
