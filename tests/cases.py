"""Problems, how to run a loss on them, and how close two results have to be."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import tritonmargin as tm
from tritonmargin.class_pass.op import class_pass
from tritonmargin.margins import MARGINS
from tritonmargin.objectives import OBJECTIVES
from tritonmargin.sampling import draw
from tritonmargin.spec import PassInputs, PassOutput, PassSpec

# The machine of this run (see conftest.py), and the backends that work there.
MACHINE = os.environ.get("TRITONMARGIN_TESTS", "cpu")
BACKENDS = ["torch"] if MACHINE == "cpu" else ["triton"]
EVERY = not MACHINE.startswith("ttsem") or os.environ.get("TRITONMARGIN_EVERY") == "1"
DEVICE = "cpu" if MACHINE in ("cpu", "interpreter") else "cuda"

# Fake tensors, compiled graphs and what autograd does on its own are real on a CPU and on a GPU.
not_ttsem = pytest.mark.skipif(MACHINE.startswith("ttsem"), reason="asks torch about a device that is not there")
cpu_only = pytest.mark.skipif(MACHINE != "cpu", reason="about what torch does on a CPU")

# HYPOTHESIS_MORE=20 draws 20 times as many examples, other ones on every run.
MORE = int(os.environ.get("HYPOTHESIS_MORE", "1"))

ONE_CHUNK = 64  # classes: the least that a chunk holds, and what it holds with chunk_bytes=1

every_margin = pytest.mark.parametrize("name", MARGINS)
every_objective = pytest.mark.parametrize("objective", OBJECTIVES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32, torch.float64)

# Kinds of loss that take different ways through the stream.
KINDS = {
    "bounded": tm.ArcFace(m=0.4, s=16.0),
    "unit rows past the bound": tm.CosFace(m=0.3, s=200.0),
    "raw rows, |w_y| asked for": tm.LSoftmax(m=3, lam=1.0),
    "raw rows": tm.Softmax(),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@dataclass(frozen=True)
class Problem:
    """What a loss is differentiated by, the labels, and one upstream gradient per sample."""

    x: Tensor  # [N, D]
    w: Tensor  # [C, D]
    y: Tensor  # [N]
    upstream: Tensor  # [N]
    bias: Tensor | None = None  # [C]

    def to(self, dtype: torch.dtype) -> Problem:
        """Rounded to `dtype`: a result in float64 then differs from one in `dtype` by the arithmetic alone."""
        rounded = {
            field.name: value.to(dtype)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and value.is_floating_point()
        }
        return replace(self, **rounded)


def made(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(DEVICE)


def labels(c: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(c, (n,), generator=torch.Generator().manual_seed(seed), device="cpu").to(DEVICE)


def sampled(target: Tensor, classes: int, samples: int, generator: torch.Generator) -> Tensor:
    """`sample_classes`, the same sample on every machine: a generator of the CPU draws on the CPU alone."""
    state = torch.empty(2, dtype=torch.int64, device="cpu").random_(generator=generator)
    with tm.use_backend("torch"):  # where every tensor says that it is on a GPU, kernels take their time
        return draw(target.cpu().long(), state, 0, classes, samples).to(target.device)


def problem(n: int = 6, d: int = 9, c: int = 131, *, bias: bool = False, seed: int = 0) -> Problem:
    """Random, with about unit logits for losses that do not normalise, and upstream gradients of both signs."""
    seed *= 10
    return Problem(
        x=made(n, d, seed=seed + 1),
        w=made(c, d, seed=seed + 2) / math.sqrt(d),
        y=labels(c, n, seed + 3),
        upstream=made(n, seed=seed + 4),
        bias=made(c, seed=seed + 5) if bias else None,
    )


def at_angle(cosine: Tensor, own: Tensor, aside: Tensor) -> Tensor:  # [N], [N, D], [N, D] -> [N, D]
    """Rows of length 1 at these cosines from `own`, leaning towards `aside`."""
    own = F.normalize(own)
    aside = F.normalize(aside - (aside * own).sum(dim=1, keepdim=True) * own)
    return cosine[:, None] * own + (1.0 - cosine**2).clamp(min=0.0).sqrt()[:, None] * aside


def combinations(names: tuple[str, ...], *axes: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrised by every combination; where kernels are executed on a CPU, 0.1 s a launch, by every second one.

    By all of them there too with TRITONMARGIN_EVERY=1, as `make test-all` asks for. Else neighbours take turns along
    each axis: of three, any two values of two of them still meet.
    """
    found = []
    for numbered in itertools.product(*map(enumerate, axes)):
        if EVERY or sum(place for place, _ in numbered) % 2 == 0:
            found.append(tuple(value for _, value in numbered))
    return pytest.mark.parametrize(names, found)


def using(backend: str | None) -> contextlib.AbstractContextManager[None]:
    """`use_backend`, which refuses the kernels what they do not compute, or the library's own choice."""
    return contextlib.nullcontext() if backend is None else tm.use_backend(backend)


def precise(backend: str) -> tuple[torch.dtype, float]:
    """The most precise dtype that a backend computes in, and how many times coarser than float64 it is."""
    return (torch.float64, 1.0) if backend == "torch" else (torch.float32, 2e6)


def run(
    loss: Callable[..., Any], given: Problem, margin: tm.Margin, *, backend: str | None = None, **options: Any
) -> dict[str, Tensor]:
    """The loss and its gradients by name; the upstream gradient is the problem's, or 1.5 for a scalar loss."""
    leaves = {"dx": given.x, "dw": given.w} | ({} if given.bias is None else {"db": given.bias})
    leaves = {key: value.detach().requires_grad_() for key, value in leaves.items()}
    with using(backend):
        value = loss(leaves["dx"], leaves["dw"], given.y, margin, bias=leaves.get("db"), **options)
        upstream = given.upstream.to(value.dtype) if value.ndim else torch.tensor(1.5, dtype=value.dtype)
        grads = torch.autograd.grad(value, list(leaves.values()), upstream)
    dense = (grad.to_dense() if grad.is_sparse else grad for grad in grads)
    return {"loss": value.detach(), **dict(zip(leaves, dense, strict=True))}


def streamed(given: Problem, margin: tm.Margin, **options: Any) -> dict[str, Tensor]:
    """`run` of the loss under test, a chunk as small as it can be."""
    return run(tm.margin_cross_entropy, given, margin, **{"chunk_bytes": 1, **options})


def oracle(given: Problem, margin: tm.Margin, **options: Any) -> dict[str, Tensor]:
    """`run` of the reference in float64 on the same, possibly rounded, numbers."""
    options = {key: in_float64(value) for key, value in options.items()}
    return run(tm.reference.margin_cross_entropy, given.to(torch.float64), margin, **options)


SPEC = {
    "unit_weight": True, "bounded": True, "want_rest": True, "want_hardest": False, "sparse": False, "chunk_bytes": 1,
    "retain_bytes": 0, "backend": "torch",
}  # fmt: skip


def asked(x: Tensor, w: Tensor, position: Tensor, dtype: torch.dtype, **changed: Any) -> tuple[PassInputs, PassSpec]:
    """A class pass for a plain logsumexp over unit rows, one chunk as small as it can be, unless changed."""
    tensors = {name: changed.pop(name) for name in PassInputs._fields if name in changed}
    return PassInputs(x, w, position, **tensors), PassSpec(**SPEC | {"dtype": dtype} | changed)


def passed(x: Tensor, w: Tensor, position: Tensor, dtype: torch.dtype, **changed: Any) -> PassOutput:
    return class_pass(*asked(x, w, position, dtype, **changed))


def in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_rows_close(actual: Tensor, expected: Tensor, rtol: float, atol: float = 0.0, what: str = "") -> None:
    """Every row to `rtol` of its own largest entry, so that an easy sample's tiny gradient counts as well."""
    assert actual.shape == expected.shape, what
    actual, expected = actual.double(), expected.double()
    size = expected.abs().amax(dim=-1, keepdim=True) if expected.ndim > 1 and expected.numel() else expected.abs()
    wrong = (actual - expected).abs() > rtol * size + atol
    wrong |= actual.isnan() ^ expected.isnan()
    if wrong.any():
        error = ((actual - expected).abs() / (size + atol / rtol)).nan_to_num(torch.inf)
        place = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} wrong, worst at {place}: {actual[tuple(place)]:.9g} for "
            f"{expected[tuple(place)]:.9g}, {error.max():.3g} of its row, allowed {rtol:g} + {atol:g} absolute"
        )


def assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol: float = 0.0, what: object = ""
) -> None:
    assert actual.keys() == expected.keys()
    for key in expected:
        assert_rows_close(actual[key], expected[key], rtol, atol, f"{what} {key}")


def rms(error: Tensor) -> float:
    return float(error.double().square().mean().sqrt()) if error.numel() else 0.0


# -- what a call cost ----------------------------------------------------------------------------------------------

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::_addmm_activation")


@dataclass(frozen=True)
class Cost:
    """Seen by the profiler, which looks inside custom ops, as dispatch modes do not."""

    sizes: list[int]  # bytes of every allocation
    peak: int  # the most bytes alive at one time, of those allocated meanwhile
    products: list[tuple[str, ...]]  # the tensor dtypes of every matrix product
    maxima: int  # reductions over a tile by max, which the bounded path has no use for

    def above(self, size: int) -> int:
        """How many allocations have at least `size` bytes."""
        return sum(allocated >= size for allocated in self.sizes)


def cost(call: Callable[[], object], shapes: bool = True) -> Cost:
    """What a call costs; without `shapes` the dtypes of products are not seen, and watching takes half the time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=shapes) as profiler:
        kept = call()
    events = profiler.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    alive = peak = 0
    for change in changes:
        alive += change
        peak = max(peak, alive)
    del kept
    assert changes, "the profiler saw no allocation at all"
    return Cost(
        sizes=[change for change in changes if change > 0],
        peak=peak,
        products=[
            tuple(dtype for dtype in event.dtypes() if dtype not in ("", "Scalar"))
            for event in events
            if event.name() in PRODUCTS
        ],
        maxima=sum(event.name() == "aten::amax" for event in events),
    )
