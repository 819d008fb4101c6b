"""Numbers that change from step to step are no reason to compile again, and a captured graph reads them in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import cpu_only, every_margin, not_ttsem
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import tritonmargin as tm
from tritonmargin.margins import MARGINS


def graphs_of(head: nn.Module, changes: list[dict[str, float]], fullgraph: bool = True) -> int:
    """How many graphs the steps took; each has the loss and the gradient of the eager step."""
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(head, backend=counter, fullgraph=fullgraph)
    torch.manual_seed(0)
    given, y = torch.randn(6, 8), torch.arange(6)
    for change in changes:
        for name, value in change.items():
            setattr(head.margin, name, value)
        found = []
        for call in (compiled, head):
            x = given.clone().requires_grad_()
            loss = call(x, y)
            loss.backward()
            found.append((loss.detach(), x.grad))
        torch.testing.assert_close(*found)
    return counter.frame_count


@not_ttsem
@every_margin
def test_twenty_values_of_every_number_take_one_graph(name: str) -> None:
    margin = MARGINS[name]()
    changes: list[dict[str, float]] = [
        {number: 5.0 + 2.9 * step if number == "s" else 1.0 + 0.03 * step for number in margin.number_names}
        for step in range(20)
    ]
    assert graphs_of(tm.MarginSoftmaxLoss(8, 131, margin), changes) == 1


@not_ttsem
@pytest.mark.parametrize("options", [{"objective": "hinge"}, {"label_smoothing": 0.1}, {"bias": True}], ids=str)
def test_it_takes_one_graph_under_other_options_too(options: dict[str, Any]) -> None:
    head = tm.MarginSoftmaxLoss(8, 131, tm.ArcFace(), **options)
    assert graphs_of(head, [{"s": 10.0 + step, "m": 0.02 * step} for step in range(20)]) == 1


@not_ttsem
def test_past_64_a_power_of_two_that_is_passed_takes_one_more() -> None:
    """The bound of the logits decides how they are summed."""
    head = tm.MarginSoftmaxLoss(8, 131, tm.CosFace())
    assert graphs_of(head, [{"s": value} for value in (64.0, 65.0, 70.0, 90.0, 128.0)]) == 2
    assert graphs_of(head, [{"s": value} for value in (30.0, 500.0, 450.0, 300.0, 512.0)]) == 2


@not_ttsem
def test_a_schedule_takes_one_graph() -> None:
    margin = tm.ArcFace().with_schedule(m=tm.WarmUp(0.0, 0.5, 19), s=tm.WarmUp(10.0, 60.0, 19))
    head, (x, y) = tm.MarginSoftmaxLoss(8, 131, margin), (torch.randn(6, 8), torch.arange(6))
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(head, backend=counter, fullgraph=True)
    for step in range(20):
        margin.schedule(step)
        torch.testing.assert_close(compiled(x, y), head(x, y))
    assert counter.frame_count == 1


class Reads(tm.Margin):
    """A user's own, with a number in each of the ways to read it."""

    def __init__(self, by_tensor: bool) -> None:
        super().__init__(s=8.0)
        self.by_tensor = by_tensor
        self.number("m", 0.2)

    def target_cosine(self, cos: Tensor) -> Tensor:
        return cos - (self.tensor("m", cos.device) if self.by_tensor else self.m) * (1.0 + cos)


@not_ttsem
@pytest.mark.parametrize(("by_tensor", "graphs"), [(True, 1), (False, 2)])
def test_a_margin_of_ones_own_takes_one_graph_by_tensor_and_two_by_float(by_tensor: bool, graphs: int) -> None:
    """A float is a constant of the first graph; the second takes any."""
    changes = [{"m": 0.1 + 0.01 * step, "s": 10.0 + step} for step in range(20)]
    assert graphs_of(tm.MarginSoftmaxLoss(8, 131, Reads(by_tensor)), changes) == graphs


@cpu_only
def test_a_change_fills_the_tensor_that_was_handed_out() -> None:
    """So that who holds it, a captured graph for one, reads the new value."""
    margin, cpu = tm.CombinedMargin(), torch.device("cpu")
    numbers = {name: margin.tensor(name, cpu) for name in margin.number_names}
    margin.double().float().to("cpu")
    for name, value in {"m1": 1.2, "m2": 0.3, "m3": 0.1, "s": 20.0}.items():
        setattr(margin, name, value)
        assert margin.tensor(name, cpu) is numbers[name]
        assert float(numbers[name]) == value


@cpu_only
def test_a_step_that_changes_nothing_writes_nothing() -> None:
    margin = tm.ArcFace(m=0.3).with_schedule(m=tm.WarmUp(0.0, 0.5, 2))
    held = margin.tensor("m", torch.device("cpu"))
    margin.schedule(2)
    version = held._version
    margin.schedule(3)
    margin.m = 0.5
    assert held._version == version
    margin.schedule(1)
    assert held._version == version + 1


@not_ttsem
@pytest.mark.parametrize("name", ["LSoftmax", "ArcFace"])
def test_an_exported_program_has_the_numbers_as_constants(name: str) -> None:
    margin = MARGINS[name]()
    head, (x, y) = tm.MarginSoftmaxLoss(8, 131, margin), (torch.randn(6, 8), torch.arange(6))
    for strict in (False, True):
        program = torch.export.export(head, (x, y), strict=strict)
        assert not list(program.buffers())
        right = head(x, y)
        for number in margin.number_names:
            setattr(margin, number, getattr(margin, number) + 0.5)
        torch.testing.assert_close(program.module()(x, y), right)
