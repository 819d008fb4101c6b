"""Is a provider right? Its loss and gradients beside float64, before its speed counts.

Two numbers of each: `error`, the relative distance, shows rounding. `bias`, the projection on the right answer less 1,
shows a wrong factor: rounding averages out in it.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tritonmargin as tm
from perf.providers.base import Provider
from perf.providers.plain import plain_loss
from perf.suite.plans import Row
from perf.suite.problem import Problem, margin_of, matmul_precision

N, CLASSES = 64, 1000  # at which a provider is checked
KINDS = ("float32", "tf32", "bfloat16", "float16")
# Full logits in plain torch stand below these, in float32 below a fifth. In bfloat16 their gradient is itself off by
# one part in 1000, and pytorch-metric-learning's by two: less would call them wrong.
ERROR = {"float64": 1e-6, "float32": 2e-5, "tf32": 5e-3, "bfloat16": 3e-2, "float16": 5e-3}
BIAS = {"float64": 1e-6, "float32": 2e-5, "tf32": 2e-3, "bfloat16": 3e-3, "float16": 2e-3}


def small(problem: Problem) -> Problem:
    return replace(problem, n=N, classes=CLASSES)


def errors(provider: Provider, problem: Problem) -> dict[str, float]:
    """`error_loss`, `error_dx`, `error_dw`, and `bias_...` of the gradients. The provider is prepared at `problem`."""
    x, weight = (made.detach().double().requires_grad_() for made in (provider.x, provider.weight))
    if provider.weight_is_transposed:
        weight = weight.detach().t().contiguous().requires_grad_()
    loss, margin = provider.checked_step(), margin_of(problem.loss)
    right = tm.reference.margin_cross_entropy(x, weight, provider.target, margin, class_ids=provider.class_ids())
    right.backward()
    lines = {"error_loss": distance(loss, right.detach())}
    for name, own, exact in (("dx", provider.x.grad, x.grad), ("dw", provider.weight_gradient(), weight.grad)):
        lines[f"error_{name}"] = distance(own, exact)
        lines[f"bias_{name}"] = float(((own.detach().double() * exact).sum() / (exact * exact).sum() - 1.0).abs())
    return lines


def distance(own: Tensor, exact: Tensor) -> float:
    return float((own.detach().double() - exact).norm() / exact.norm())


def wrong(lines: dict[str, float], dtype: str) -> str:
    """What is wrong with the provider, "" for nothing."""
    limits = {name: (ERROR if name.startswith("error") else BIAS)[dtype] for name in lines}
    over = [name for name, value in lines.items() if not value <= limits[name]]
    return ", ".join(f"{name.replace('_', ' of ')} {lines[name]:.1e} > {limits[name]:.0e}" for name in over)


def budget(device: str, dtypes: Sequence[str] = KINDS, n: int = 512, d: int = 512, classes: int = 50_000) -> list[Row]:
    """ArcFace by ours (on a GPU: by the kernels) and by plain torch in the same dtype, both versus float64.

    The loss is that of every sample: the error of a mean is small by chance. Ours may have twice plain torch's error.
    """
    lines, margin = [], margin_of("arcface")
    for dtype in dtypes:
        problem = Problem(n, d, classes, dtype)
        made = [each.detach().to(device) for each in problem.tensors()[:3]]  # by the CPU: ttsem draws no numbers
        exact = one_step(partial(tm.reference.margin_cross_entropy, margin=margin), torch.float64, *made)
        with matmul_precision(dtype):
            plain = one_step(plain_loss, problem.torch_dtype, *made)
            with tm.use_backend("torch" if device == "cpu" else "triton"):
                ours = one_step(partial(tm.margin_cross_entropy, margin=margin), problem.torch_dtype, *made)
        for of, own, usual, right in zip(("loss", "dx", "dw"), ours, plain, exact, strict=True):
            line: Row = {"loss": "arcface", "dtype": dtype, "N": n, "D": d, "C": classes, "of": of}
            line |= {"ours": distance(own, right), "plain": distance(usual, right)}
            lines.append(line | {"within_budget": line["ours"] <= 2.0 * line["plain"] + 1e-7})
    return lines


def one_step(loss: Any, dtype: torch.dtype, x: Tensor, weight: Tensor, target: Tensor) -> list[Tensor]:
    """The losses [N] and the gradients of their mean."""
    x, weight = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    losses = loss(x, weight, target, reduction="none")
    return [losses.detach(), *torch.autograd.grad(losses.mean(), (x, weight))]
