"""The class pass itself: both exponentials and its outputs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from cases import (
    KINDS,
    ONE_CHUNK,
    asked,
    assert_rows_close,
    cost,
    cpu_only,
    every_backend,
    every_objective,
    made,
    oracle,
    passed,
    precise,
    problem,
    streamed,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import tritonmargin as tm
from tritonmargin.class_pass.exp_range import is_bounded, split_factor
from tritonmargin.class_pass.op import OUTPUTS, SAVED, class_pass, encode
from tritonmargin.spec import PassGrads, PassInputs, PassOutput, PassSpec

EVERYTHING = 10**9
CHUNKS = 3  # of 64, 64 and 3 classes
CLASSES = 2 * ONE_CHUNK + 3


# -- the exponential, with and without a running max ---------------------------------------------------------------


@pytest.mark.parametrize(("s", "dtype", "bounded"), [
    (8.0, torch.float32, True),
    (79.9, torch.float32, True),  # 79.9 + log 131 = 84.8
    (80.5, torch.float32, False),  # 85.4
    (700.0, torch.float64, True),  # + log 131 = 704.9 of 709.8 - 3.7
    (702.0, torch.float64, False),
])  # fmt: skip
@pytest.mark.parametrize("where", ["at the bound", "at its negative", "some here, some there", "between"])
@every_backend
def test_both_sides_of_the_switch(
    s: float, dtype: torch.dtype, bounded: bool, where: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the logits are: neither exp nor its sum nor the factors of both gradients leave the range."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels leave float64 to the torch backend")
    taken = []

    def spy(inputs: PassInputs, spec: PassSpec, updater: object = None) -> PassOutput:
        taken.append(spec.bounded)
        return class_pass(inputs, spec)

    monkeypatch.setattr("tritonmargin.loss.class_pass", spy)
    given = problem(6, 9, CLASSES)
    if where != "between":
        axis, sign = made(1, 9, seed=5), torch.ones(6, 1, dtype=torch.float64)
        sign[{"at the bound": [], "at its negative": range(6), "some here, some there": range(3)}[where]] = -1.0
        given = replace(given, w=axis + 1e-3 * given.w, x=sign * axis + 0.03 * given.x)
    given = given.to(dtype)
    ours = streamed(given, tm.NormFace(s=s), reduction="none", backend=backend)
    assert taken == [bounded]
    expected = oracle(given, tm.NormFace(s=s), reduction="none")
    tolerance = 4.0 * s * torch.finfo(dtype).eps
    assert_rows_close(ours["loss"], expected["loss"], tolerance, what="loss")
    # Samples and classes on one axis: their gradients are what is left of it, 3e-2 and 1e-3.
    left = 1.0 if where == "between" else 30.0
    assert (ours["dw"] - expected["dw"]).norm() <= left * tolerance * expected["dw"].norm()
    left = 1.0 if where == "between" else 1e3
    assert (ours["dx"] - expected["dx"]).norm() <= left * tolerance * expected["dx"].norm()


@cpu_only
@every_backend
@every_objective
def test_the_bounded_path_needs_no_maximum(objective: str, backend: str) -> None:
    given = problem(6, 9, CLASSES).to(torch.float32)
    maxima = {
        name: cost(
            lambda margin=margin: tm.margin_cross_entropy(
                given.x, given.w, given.y, margin, objective=objective, chunk_bytes=1
            )
        ).maxima
        for name, margin in KINDS.items()
    }
    hardest = CHUNKS * (objective == "max-hinge")  # looked for by a maximum a chunk
    running = CHUNKS * (objective in ("softmax", "lse-hinge"))
    assert maxima["bounded"] == hardest
    assert all(count == hardest + running for name, count in maxima.items() if name != "bounded")


@cpu_only
@pytest.mark.parametrize("chunks", [1, 4])
def test_the_hardest_class_is_found_without_a_copy_of_the_tile(chunks: int) -> None:
    """Where every sample's hardest class is in the chunk, too."""
    n, classes = 64, 4096
    x, w = torch.ones(n, 4), torch.linspace(-1.0, 1.0, classes)[:, None].expand(-1, 4).contiguous()
    tile = 4 * n * classes // chunks

    def loss() -> object:
        chunk_bytes = 4 * (n + 8) * classes // chunks
        target = torch.zeros(n, dtype=torch.long)
        return tm.margin_cross_entropy(x, w, target, tm.Softmax(), objective="max-hinge", chunk_bytes=chunk_bytes)

    with torch.no_grad(), tm.use_backend("torch"):
        assert cost(loss).above(tile // 2) == 1


def test_is_bounded() -> None:
    """The sum of `classes` exponentials at the bound is a number, with a factor of 40 to spare."""
    for dtype in (torch.float32, torch.float64):
        for classes in (1, 2, 1000, 10**7, 10**9):
            limit = math.log(torch.finfo(dtype).max) - 3.7 - math.log(classes)
            assert is_bounded(limit - 1e-3, classes, dtype)
            assert not is_bounded(limit + 1e-3, classes, dtype)
    assert is_bounded(64.0, 10**9, torch.float32)
    assert not is_bounded(math.inf, 2, torch.float64)
    assert is_bounded(1.0, 0, torch.float32)


@pytest.mark.parametrize("s", [1.0, 64.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@every_backend
def test_both_paths_are_the_same_function(dtype: torch.dtype, s: float, backend: str) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels leave float64 to the torch backend")
    given = problem(6, 9, CLASSES)
    acc = torch.float32 if dtype == torch.bfloat16 else dtype
    x = (s * torch.nn.functional.normalize(given.x)).to(acc)
    results = []
    for bounded, retain in itertools.product((True, False), (0, EVERYTHING)):
        a, w = x.clone().requires_grad_(), given.w.to(dtype).requires_grad_()
        out = passed(a, w, given.y, dtype, bounded=bounded, retain_bytes=retain, backend=backend)
        results.append((out.rest, *torch.autograd.grad(out.rest, (a, w), given.upstream.to(acc))))
    # exp(z) of a bfloat16 z is rounded once more before the products on either path, at a different power of e, and the
    # rows are unit rows on one path and scaled in the tile on the other.
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-5}[dtype]
    for result in results[1:]:
        for ours, other in zip(result, results[0], strict=True):
            error, size = (ours.double() - other.double()).norm(), other.double().norm()
            assert error <= rtol * size


def test_split_factor_stays_inside_the_range_of_float32() -> None:
    """Whatever the samples' ease and upstream gradients: 2^K f, 2^-K and every product of f with a tile are normal.

    At s = 64 rest lies between -64 and 64 + log C.
    """
    sizes = torch.tensor([1e-17, 1e-6, 1.0, 1e6, 1e12])
    rests = torch.tensor([-64.0, -20.0, 0.0, 20.0, 64.0, 75.0])
    smallest = torch.finfo(torch.float32).tiny
    for n in (1, 2):
        for chosen in itertools.product(itertools.product(sizes, rests), repeat=n):
            g, rest = (torch.stack(column) for column in zip(*chosen, strict=True))
            total = rest.exp()
            outer, inner, undo = split_factor(g, total, [])
            assert torch.isfinite(inner * 80.0).all()
            assert smallest <= undo < math.inf
            assert math.frexp(float(undo))[0] == 0.5  # a power of two: exact
            torch.testing.assert_close(outer, 1.0 / total, rtol=1e-6, atol=0)
            # The largest exp(z) of a sample's tile is its total; its product with f is g, and that times 2^K fits too.
            assert (g.double() / undo.double()).amax() * 1e6 < torch.finfo(torch.float32).max
            # In W's gradient samples are added: one may vanish beside another whose gradient is 1e7 times larger.
            matters = g > 1e-7 * g.amax()
            exact = g.double() / total.double()
            torch.testing.assert_close((inner.double() * undo.double())[matters], exact[matters], rtol=3e-5, atol=0)
    # No gradient at all, or no other class: nothing to scale, nothing that is not a number.
    outer, inner, undo = split_factor(torch.zeros(3), torch.tensor([1e-28, 1.0, 0.0]), [])
    assert not inner.any()
    assert torch.isfinite(outer).all()
    assert undo > 0
    assert split_factor(torch.zeros(1), torch.zeros(1), [])[0] == 0
    negative = split_factor(torch.tensor([-2.0]), torch.tensor([3.0]), [])
    assert float(negative[1] * negative[2]) == pytest.approx(-2.0 / 3.0, rel=1e-6)
    # What is added beside the sum has to bear e^K too.
    _, _, undo = split_factor(torch.tensor([1e-20]), torch.tensor([1.0]), [torch.tensor([[1e20, -1e25]])])
    assert 1e25 / float(undo) < 1e31


# -- the op's outputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("sampled", [False, True])
@every_backend
def test_every_output_and_its_gradient(sampled: bool, unit: bool, backend: str) -> None:
    """All outputs at once, weighted at random, against their definitions."""
    dtype, size = (torch.float64, 1.0) if backend == "torch" else (torch.float32, 1e6)
    given = problem(8, 9, CLASSES, bias=not unit).to(dtype)
    ids = torch.cat([given.y, torch.arange(0, CLASSES, 3)]).unique() if sampled else None
    row = given.y if ids is None else torch.searchsorted(ids, given.y)
    row = row.clone()
    row[2] = -1
    class_weight, threshold = made(CLASSES, seed=7).abs().to(dtype), made(8, seed=8).to(dtype)
    upstream = [made(8, seed=20 + k).to(dtype) for k in range(7)]
    values, grads = [], []
    for streaming in (True, False):
        x, w = given.x.clone().requires_grad_(), given.w.clone().requires_grad_()
        b = None if given.bias is None else given.bias.clone().requires_grad_()
        kept = [leaf for leaf in (x, w, b) if leaf is not None]
        total = torch.zeros((), dtype=dtype)
        found: dict[str, Tensor] = {}
        # The hinge and the logsumexp share one pass's gradient, so they are asked for one after the other.
        for hinging in (False, True):
            t = threshold if hinging else None
            if streaming:
                out = passed(x, w, row, dtype, class_ids=ids, bias=b, mean_weight=class_weight, threshold=t,
                             unit_weight=unit, bounded=False, want_hardest=True, backend=backend)._asdict()  # fmt: skip
            else:
                out = by_definition(x, w, row, ids, b, class_weight, t, unit)
            names = ["hinge"] if hinging else ["rest"]
            names += ["target_product", "target_norm", "mean_logit", "hardest_product"]
            names += [] if b is None else ["target_bias"]
            for name, weight in zip(names, upstream, strict=False):
                total = total + out[name] @ weight
            found |= {name: out[name] for name in [*names, "hardest_row"]}
            if hinging:
                found["violations"] = out["violations"]
        values.append(found)
        grads.append(torch.autograd.grad(total, kept))
    ours, expected = values
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert_rows_close(value, expected[name], size * 1e-11, size * 1e-12, name)
    for gradient, other in zip(*grads, strict=True):
        assert_rows_close(gradient, other, size * 1e-10, size * 1e-12)


def by_definition(
    x: Tensor, w: Tensor, row: Tensor, ids: Tensor | None, b: Tensor | None, class_weight: Tensor,
    threshold: Tensor | None, unit: bool,
) -> dict[str, Tensor]:  # fmt: skip
    if ids is not None:
        w, class_weight, b = w[ids], class_weight[ids], None if b is None else b[ids]
    norm = w.norm(dim=1)
    rows = w / norm[:, None] if unit else w
    z = x @ rows.T + (0.0 if b is None else b)
    own = torch.arange(len(w)) == row[:, None]
    others = z.masked_fill(own, -torch.inf)
    hardest = others.argmax(dim=1)
    valid, place = row >= 0, row.clamp(min=0)
    out = {
        "rest": others.logsumexp(dim=1),
        "target_product": torch.where(valid, (x * rows[place]).sum(dim=1), 0.0),
        "target_norm": torch.where(valid, norm[place], 0.0),
        "mean_logit": x @ (class_weight @ rows) + (0.0 if b is None else (class_weight * b).sum()),
        "hardest_row": hardest,
        "hardest_product": z.gather(1, hardest[:, None])[:, 0],
    }
    if b is not None:
        out["target_bias"] = torch.where(valid, b[place], 0.0)
    if threshold is not None:
        excess = (others - threshold[:, None]).relu()
        out |= {"hinge": excess.sum(dim=1), "violations": (excess > 0).to(z.dtype).sum(dim=1)}
    return out


@every_backend
def test_the_first_class_can_be_the_hardest(backend: str) -> None:
    """Its logit is a product in full precision like any other's, not what the tile had in units of log 2."""
    given = problem(6, 9, CLASSES).to(torch.float32)
    given.w[0] = 3.0 * given.x[0]
    given.y[0] = 5
    with tm.use_backend(backend):
        _, stats = tm.margin_cross_entropy(
            given.x, given.w, given.y, tm.CosFace(s=16.0), chunk_bytes=1, return_stats=True
        )
    assert int(stats.hardest_class[0]) == 0
    torch.testing.assert_close(float(stats.hardest_logit[0]), 16.0, rtol=1e-5, atol=0)


def test_a_gradient_of_the_hardest_logit_alone() -> None:
    """The op's outputs are independent of each other: one may have a gradient where another has none."""
    x, w = made(5, 4).requires_grad_(), made(9, 4).requires_grad_()
    target = torch.arange(5)
    out = passed(x, w, target, torch.float64, want_hardest=True, bounded=False, unit_weight=False)
    found = torch.autograd.grad(out.hardest_product.sum(), (x, w))
    others = (x @ w.t()).scatter(1, target[:, None], -torch.inf)
    expected = torch.autograd.grad(others.amax(dim=1).sum(), (x, w))
    for own, right in zip(found, expected, strict=True):
        torch.testing.assert_close(own, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("retain", [0, 10**6])
@every_backend
def test_an_offset_is_a_bias_of_the_active_rows(bounded: bool, retain: int, backend: str) -> None:
    dtype, size = precise(backend)
    given = problem(6, 9, CLASSES)
    ids = torch.cat([given.y, torch.arange(0, CLASSES, 3, device=given.y.device)]).unique()
    row, offset = torch.searchsorted(ids, given.y), made(len(ids), seed=9).to(dtype)
    bias = torch.zeros(CLASSES, dtype=dtype, device=ids.device)
    bias[ids] = offset
    found = []
    for options in ({"offset": offset, "bounded": bounded, "retain_bytes": retain}, {"bias": bias, "bounded": False}):
        x, w = given.x.to(dtype).requires_grad_(), given.w.to(dtype).requires_grad_()
        out = passed(x, w, row, dtype, class_ids=ids, backend=backend, want_hardest=True, **options)
        grads = torch.autograd.grad(out.rest @ given.upstream.to(dtype), (x, w))
        found.append((out.rest, out.hardest_row, *grads))
    for ours, expected in zip(*found, strict=True):
        assert_rows_close(ours, expected, size * 1e-11, size * 1e-12)


FAKED = {
    "bounded": {},
    "retained": {"retain_bytes": 10**6},
    "smoothed": {"mean_weight": True, "bounded": False},
    "biased": {"bias": True, "bounded": False, "unit_weight": False},
    "hinge": {"threshold": True, "bounded": False, "want_rest": False},
    "sampled": {"class_ids": True},
    "offset": {"class_ids": True, "offset": True},
    "sparse": {"class_ids": True, "sparse": True},
    "everything sparse": {"sparse": True},
    "hardest only": {"want_rest": False, "want_hardest": True, "bounded": False},
}


@cpu_only
@pytest.mark.parametrize("name", FAKED)
def test_fake_outputs_look_like_real_ones(name: str) -> None:
    """Shapes and dtypes that the ops promise to a compiler, forward and backward, each gradient asked for or not."""
    given = problem(6, 9, CLASSES, bias=True).to(torch.float32)
    ids = torch.cat([given.y, torch.arange(0, CLASSES, 2)]).unique()
    tensors = {"class_ids": ids, "bias": given.bias, "mean_weight": made(CLASSES).float(), "threshold": given.upstream,
               "offset": made(len(ids)).float()}  # fmt: skip
    changed = {key: tensors[key] if value is True and key in tensors else value for key, value in FAKED[name].items()}
    inputs, spec = asked(given.x, given.w, given.y % 3, torch.float32, **changed)
    real = torch.ops.tritonmargin.class_pass(*inputs, *encode(spec))
    mode = FakeTensorMode()

    def fake(value: object) -> object:
        return mode.from_tensor(value) if isinstance(value, Tensor) else value

    with mode:
        promised = torch.ops.tritonmargin.class_pass(*map(fake, inputs), *encode(spec))
    assert len(real) == OUTPUTS + SAVED
    assert [(t.shape, t.dtype, t.stride()) for t in promised] == [(t.shape, t.dtype, t.stride()) for t in real]
    g = PassGrads(rest=given.upstream if spec.want_rest else None, target_product=given.upstream)
    for needs in itertools.product((True, False), (True, False), {True, False} if inputs.bias is not None else {False}):
        arguments = [*inputs, *real[OUTPUTS:], *g]
        made_of = torch.ops.tritonmargin.class_pass_backward(*arguments, *needs, *encode(spec))
        with mode:
            promised = torch.ops.tritonmargin.class_pass_backward(*map(fake, arguments), *needs, *encode(spec))
        assert [(t.shape, t.dtype) for t in promised] == [(t.shape, t.dtype) for t in made_of]
