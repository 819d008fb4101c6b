"""Is a provider right? Its loss and gradients beside float64, before its speed counts.

Two numbers of each: `error`, the relative distance, in which rounding shows; and `bias`, by how much the whole is too
large or too small (the projection on the right answer, less 1), in which rounding averages out and a wrong factor does
not.
"""

from __future__ import annotations

from dataclasses import replace

import torch

import tritonmargin as tm
from perf.problem import Problem, margin_of
from perf.providers.base import Provider

N, CLASSES = 64, 1000
# Full logits in plain torch stand below these, in float32 below a fifth (tests/test_perf.py). In bfloat16 their
# gradient is itself off by one part in 1000, and pytorch-metric-learning's by two: less would call them wrong.
ERROR = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 5e-3}
BIAS = {"float32": 2e-5, "bfloat16": 3e-3, "float16": 2e-3}


def small(problem: Problem) -> Problem:
    """The size at which a provider is checked: the problem's width, loss, dtype and device."""
    return replace(problem, n=N, classes=CLASSES)


def errors(provider: Provider, problem: Problem) -> dict[str, float]:
    """`error_loss`, `error_dx`, `error_dw`, and `bias_...` of the gradients. The provider is prepared at `problem`."""
    x, weight = (made.detach().double().requires_grad_() for made in (provider.x, provider.weight))
    if provider.weight_is_transposed:
        weight = weight.detach().t().contiguous().requires_grad_()
    found = provider.gradients()
    right = tm.reference.margin_cross_entropy(
        x, weight, provider.target, margin_of(problem.loss), class_ids=found.class_ids
    )
    assert isinstance(right, torch.Tensor)
    right.backward()
    lines = {"error_loss": distance(found.loss, right.detach())}
    for name, own, exact in (("dx", found.x, x.grad), ("dw", found.weight, weight.grad)):
        assert exact is not None
        own = own.detach().double()
        lines[f"error_{name}"] = distance(own, exact)
        lines[f"bias_{name}"] = float(((own * exact).sum() / (exact * exact).sum() - 1.0).abs())
    return lines


def distance(own: torch.Tensor, exact: torch.Tensor) -> float:
    return float((own.detach().double() - exact).norm() / exact.norm())


def wrong(lines: dict[str, float], dtype: str) -> str:
    """What is wrong with the provider, "" for nothing."""
    said = []
    for name, value in lines.items():
        limit = (ERROR if name.startswith("error") else BIAS)[dtype]
        if not value <= limit:
            said.append(f"{name.replace('_', ' of ')} {value:.1e} > {limit:.0e}")
    return ", ".join(said)
