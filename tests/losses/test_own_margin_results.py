"""What a margin of a user's own may return: a number a sample. Anything else is an error that names it, and a step that
raises changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import cpu_only
from torch import Tensor

import tritonmargin as tm

N, C, D = 6, 40, 8

WRONG: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "[N, 1]": (lambda cos: cos[:, None], ValueError, r"shape \[N\] = \[6\], got shape \[6, 1\] of torch.float32"),
    "[N, N]": (lambda cos: cos[:, None] * cos, ValueError, r"got shape \[6, 6\] of torch.float32"),
    "[1]": (lambda cos: cos.sum()[None], ValueError, r"got shape \[1\] of torch.float32"),
    "a scalar": (lambda cos: cos.mean(), ValueError, r"got shape \[\] of torch.float32"),
    "[N - 1]": (lambda cos: cos[1:], ValueError, r"got shape \[5\] of torch.float32"),
    "int": (lambda cos: (10 * cos).long(), TypeError, r"got torch.int64 of shape \[6\]"),
    "bool": (lambda cos: cos > 0, TypeError, r"got torch.bool of shape \[6\]"),
    "complex": (lambda cos: cos + 0j, TypeError, r"got torch.complex64 of shape \[6\]"),
    "a float": (lambda cos: 0.5, TypeError, r"a tensor of shape \[N\], got float"),
    "nothing": (lambda cos: None, TypeError, r"got NoneType"),
}
METHODS = {
    "target_cosine": lambda given: given,
    "bounded_cosine": lambda given: given,
    "target_logit": lambda r: r.product,
}


def own(method: str, function: Callable[[Tensor], Any], **attributes: Any) -> tm.Margin:
    """A margin whose `method` returns `function` of its N numbers."""
    numbers = METHODS[method]
    return type("Mine", (tm.Margin,), {method: lambda self, given: function(numbers(given)), **attributes})(s=8.0)


def head_of(margin: tm.Margin, **options: Any) -> tuple[tm.MarginSoftmaxLoss, Tensor, Tensor]:
    torch.manual_seed(0)
    head = tm.MarginSoftmaxLoss(D, C, margin, sample_rate=0.5, seed=3, **options)
    return head, torch.randn(N, D, requires_grad=True), torch.arange(N)


@cpu_only
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", WRONG)
def test_another_result_is_an_error_that_names_margin_shape_and_dtype(what: str, method: str, backend: str) -> None:
    function, kind, words = WRONG[what]
    margin = own(method, function)
    head, x, y = head_of(margin)
    before = head.sampler.clone()
    with tm.use_backend(backend):
        with pytest.raises(kind, match=rf"Mine\.{method} must return .*{words}"):
            head(x, y)
        with pytest.raises(kind, match=rf"Mine\.{method} must return .*{words}"):
            tm.margin_cross_entropy(x, head.weight, y, margin)
    assert torch.equal(head.sampler, before)


@cpu_only
@pytest.mark.parametrize("attributes", [{"gradient": "straight-through"}, {"unit_weight": False}], ids=str)
@pytest.mark.parametrize("what", ["a scalar", "[1]", "int"])
def test_what_would_be_spread_over_the_samples_later_is_found_too(what: str, attributes: dict[str, Any]) -> None:
    function, kind, words = WRONG[what]
    head, x, y = head_of(own("target_cosine", function, **attributes))
    with pytest.raises(kind, match=rf"Mine\.target_cosine must return .*{words}"):
        head(x, y)


@cpu_only
@pytest.mark.parametrize("objective", ["softmax", "lse-hinge", "max-hinge", "hinge"])
@pytest.mark.parametrize("what", ["[N, 1]", "int"])
def test_no_row_moves_for_a_wrong_result(what: str, objective: str) -> None:
    head, x, y = head_of(own("target_cosine", WRONG[what][0]), objective=objective)
    optimizer = tm.optim.RowSGD([head.weight], lr=0.1)
    head.update_in_backward(optimizer)
    before = head.weight.detach().clone()
    with pytest.raises(WRONG[what][1], match=r"Mine\.target_cosine"):
        head(x, y).backward()
    assert torch.equal(head.weight, before)
    assert not optimizer.state


@cpu_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_floating_point_dtype_is_a_number_a_sample(dtype: torch.dtype) -> None:
    x, w, y = torch.randn(N, D), torch.randn(C, D), torch.arange(N)
    found = tm.margin_cross_entropy(x, w, y, own("target_cosine", lambda cos: (cos - 0.25).to(dtype)))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, tm.margin_cross_entropy(x, w, y, tm.CosFace(0.25, s=8.0)), rtol=2e-2, atol=0)


@cpu_only
@pytest.mark.parametrize("n", [0, 1])
def test_an_empty_batch_and_one_sample_are_vectors(n: int) -> None:
    x, w, y = torch.randn(n, D), torch.randn(C, D), torch.arange(n)
    margin = own("target_cosine", lambda cos: cos - 0.25)
    found = tm.margin_cross_entropy(x, w, y, margin, reduction="sum")
    torch.testing.assert_close(found, tm.margin_cross_entropy(x, w, y, tm.CosFace(0.25, s=8.0), reduction="sum"))


class Fails(tm.Margin):
    """Raises in the steps that it is told."""

    fail = False

    def target_cosine(self, cos: Tensor) -> Tensor:
        if self.fail:
            raise ArithmeticError("as planned")
        return cos - 0.2 * (1.0 + cos)


@cpu_only
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("objective", ["softmax", "hinge"])
def test_a_margin_that_raises_leaves_the_sample_to_the_next_step(objective: str, backend: str) -> None:
    losses = []
    for failing in (False, True):
        head, x, y = head_of(Fails(s=8.0), objective=objective)
        with tm.use_backend(backend):
            if failing:
                head.margin.fail = True
                with pytest.raises(ArithmeticError, match="as planned"):
                    head(x, y)
                assert head.sampler.tolist() == [3, 0]
                head.margin.fail = False
            losses.append([float(head(x, y).detach()) for _ in range(3)])
        assert head.sampler.tolist() == [3, 3]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3


@cpu_only
@pytest.mark.parametrize("flag", ["sparse_grad", "logq_correction", "bias", "return_stats"])
@pytest.mark.parametrize("value", ["no", 1, None])
def test_a_flag_is_true_or_false(flag: str, value: Any) -> None:
    x, y = torch.randn(N, D), torch.arange(N)
    message = f"{flag} must be True or False, got {value!r}"
    if flag != "return_stats":
        with pytest.raises(TypeError, match=message):
            tm.MarginSoftmaxLoss(D, C, **{flag: value})
    head = tm.MarginSoftmaxLoss(D, C)
    with pytest.raises(TypeError, match=message):  # noqa: PT012
        if flag == "return_stats":
            head(x, y, return_stats=value)
        elif flag == "bias":
            tm.MarginSoftmaxLoss(D, C, bias=value)
        else:
            setattr(head, flag, value)
            head(x, y)
    if flag != "bias":
        with pytest.raises(TypeError, match=message):
            tm.margin_cross_entropy(x, head.weight, y, tm.ArcFace(), **{flag: value})
