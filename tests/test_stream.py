"""The class pass itself: both exponentials, its outputs, chunks and retained tiles, and what a call costs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from cases import (
    KINDS,
    ONE_CHUNK,
    Cost,
    Problem,
    asked,
    assert_rows_close,
    cost,
    cpu_only,
    every_backend,
    every_kind,
    every_margin,
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
from tritonmargin.class_pass.chunks import chunk_classes, retained_classes
from tritonmargin.class_pass.exp_range import is_bounded, split_factor
from tritonmargin.class_pass.forward import Saved, run_forward
from tritonmargin.class_pass.op import OUTPUTS, SAVED, class_pass, encode
from tritonmargin.margins import MARGINS
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
    upstream = [made(8, seed=20 + k).to(dtype) for k in range(6)]
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
        "hardest_product": (x * rows[hardest]).sum(dim=1),
    }
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


# -- chunks and retained tiles -------------------------------------------------------------------------------------


def test_chunk_classes_is_what_the_budget_allows() -> None:
    for n, d, budget in ((256, 512, 8 << 20), (1024, 512, 1 << 24), (32, 64, 1 << 20)):
        chunk = chunk_classes(n, d, 10**6, budget)
        assert chunk % 64 == 0
        assert chunk * (n + 2 * d) * 4 <= budget < (chunk + 64) * (n + 2 * d) * 4
        assert chunk_classes(n, d, 100, budget) == 100
    assert chunk_classes(4, 4, 1000, 1) == ONE_CHUNK
    assert chunk_classes(4, 4, 0, 1) == 1
    assert chunk_classes(0, 4, 10, 1) == 10
    assert chunk_classes(256, 512, 10**6, 0) >= 64  # the machine's own budget


def test_retained_classes_are_whole_chunks_or_all() -> None:
    assert retained_classes(10, 1000, 64, 4, 0) == 0
    assert retained_classes(10, 1000, 64, 4, 64 * 40 - 1) == 0
    assert retained_classes(10, 1000, 64, 4, 64 * 40) == 64
    assert retained_classes(10, 1000, 64, 4, 3 * 64 * 40 - 1) == 128
    assert retained_classes(10, 1000, 64, 4, 1000 * 40 - 1) == 960
    assert retained_classes(10, 1000, 64, 4, 1000 * 40) == 1000
    assert retained_classes(0, 1000, 64, 4, 10**4) == 1000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every_objective
@every_kind
@every_backend
def test_promise_same_result_for_any_chunk_size_and_retained_tiles(
    backend: str, kind: str, objective: str, dtype: torch.dtype
) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels leave float64 to the torch backend")
    given = problem(6, 9, CLASSES, bias=kind == "raw rows").to(dtype)
    options = {"objective": objective, "reduction": "none", "backend": backend}
    expected = streamed(given, KINDS[kind], chunk_bytes=EVERYTHING, **options)
    one_chunk = ONE_CHUNK * 6 * dtype.itemsize
    for chunk, retain in itertools.product((1, EVERYTHING), (0, one_chunk, EVERYTHING)):
        ours = streamed(given, KINDS[kind], chunk_bytes=chunk, retain_bytes=retain, **options)
        for key, value in ours.items():
            error, size = (value.double() - expected[key].double()).norm(), expected[key].double().norm()
            assert error <= 16.0 * torch.finfo(dtype).eps * max(KINDS[kind].s, 8.0) * size + 1e-30, (key, chunk, retain)


@pytest.mark.parametrize("objective", ["softmax", "max-hinge"])
def test_low_precision_rows_are_rounded_once_wherever_they_are_made(objective: str) -> None:
    """Raw rows' gradients are made in place, listed classes' in a buffer: the same bits, for many samples a row too."""
    given = problem(60, 24, 300, seed=1).to(torch.bfloat16)
    y = given.y % 7 * 30  # 7 rows with some nine samples each, over several chunks
    given = replace(given, x=given.x.requires_grad_(), w=given.w.requires_grad_(), y=y)
    found = [
        torch.autograd.grad(
            tm.margin_cross_entropy(given.x, given.w, given.y, tm.Softmax(), objective=objective, chunk_bytes=1,
                                    class_ids=ids),
            (given.x, given.w),
        )
        for ids in (None, torch.arange(300, device=given.w.device))
    ]  # fmt: skip
    for direct, buffered in zip(*found, strict=True):
        assert torch.equal(direct, buffered)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@every_objective
@every_margin
def test_a_second_run_is_bitwise_the_same(name: str, objective: str, dtype: torch.dtype) -> None:
    """Classes drawn twice and thrice, so that a sum over samples in another order would show."""
    given, margin = problem(40, 9, CLASSES), MARGINS[name]()
    given = replace(given, y=given.y % 7).to(dtype)
    for retain in (0, EVERYTHING):
        runs = [streamed(given, margin, objective=objective, retain_bytes=retain) for _ in range(2)]
        for key, value in runs[0].items():
            assert torch.equal(value, runs[1][key])


# -- what a call costs ---------------------------------------------------------------------------------------------


def step(given: Problem, margin: tm.Margin, frozen: str = "", shapes: bool = True, **options: object) -> list[Cost]:
    """Costs of forward and of backward, the leaves named in `frozen` without a gradient."""
    leaves = {name: getattr(given, name).clone().requires_grad_(name not in frozen) for name in ("x", "w")}
    bias = None if given.bias is None else given.bias.clone().requires_grad_("b" not in frozen)
    found: list[Tensor] = []

    def forward() -> None:
        options.setdefault("chunk_bytes", 1)
        loss = tm.margin_cross_entropy(leaves["x"], leaves["w"], given.y, margin, bias=bias, **options)
        found.append(loss[0] if isinstance(loss, tuple) else loss)

    def backward() -> None:
        found[0].backward()

    return [cost(forward, shapes)] + ([cost(backward, shapes)] if found[0].requires_grad else [])


@cpu_only
@pytest.mark.parametrize("retain", [0, ONE_CHUNK * 6 * 4, EVERYTHING], ids=["none", "one chunk", "everything"])
@pytest.mark.parametrize("frozen", ["", "x", "w", "xw"], ids=["nothing", "x", "w", "both"])
@every_objective
@every_kind
def test_matrix_products_per_chunk(kind: str, objective: str, frozen: str, retain: int) -> None:
    """One forward; backward one for the tile unless it was kept, one for each gradient that somebody wants."""
    given = problem(6, 9, CLASSES).to(torch.float32)
    costs = step(given, KINDS[kind], frozen, objective=objective, retain_bytes=retain)
    assert len(costs[0].products) == CHUNKS
    if frozen == "xw":
        assert len(costs) == 1
        return
    kept = 0 if retain == 0 else 1 if retain < EVERYTHING else CHUNKS
    backward = CHUNKS - kept + CHUNKS * (2 - len(frozen))
    # The hardest class is one row a sample: nothing to multiply.
    assert len(costs[1].products) == (0 if objective == "max-hinge" else backward)


@cpu_only
@pytest.mark.parametrize("frozen", ["", "x", "w"], ids=["nothing", "x", "w"])
@every_objective
@every_kind
def test_a_cpu_retains_all_logits_where_half_of_the_budget_has_room(kind: str, objective: str, frozen: str) -> None:
    """One byte less and there are as many products as without; and so with a chunk that the caller sized."""
    given = problem(6, 9, CLASSES).to(torch.float32)
    tiles, products = 6 * CLASSES * 4, 0 if objective == "max-hinge" else 2 - len(frozen)
    again = 0 if objective == "max-hinge" else 1
    for budget, chunk, expected in (
        (None, None, products),
        (20 * tiles, None, products),
        (2 * tiles, 10**6, products + again),
    ):
        options = {"objective": objective, "memory_budget": budget, "chunk_bytes": chunk}
        costs = step(given, KINDS[kind], frozen, **options)
        assert [len(each.products) for each in costs] == [1, expected], (budget, chunk)
    # Chunks of 64 classes now, so a retained tile shows in each of them.
    for budget, kept in ((2 * tiles, True), (2 * tiles - 1, False)):
        costs = step(given, KINDS[kind], frozen, objective=objective, memory_budget=budget, chunk_bytes=None)
        chunks = len(costs[0].products)
        assert chunks > 1
        assert len(costs[1].products) == chunks * (products if kept else products + again), budget


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@every_objective
@every_kind
def test_retained_logits_change_no_bit(kind: str, objective: str, dtype: torch.dtype) -> None:
    """Not even in low precision, with a bias or without a bound: kept is what backward would have made."""
    given = problem(6, 9, CLASSES, bias=kind == "raw rows").to(dtype)
    kept = streamed(given, KINDS[kind], objective=objective, retain_bytes=EVERYTHING)
    made_again = streamed(given, KINDS[kind], objective=objective)
    for key, value in made_again.items():
        assert torch.equal(kept[key], value), key


@cpu_only
def test_no_grad_keeps_no_tile() -> None:
    given = problem(16, 9, 40 * ONE_CHUNK).to(torch.float32)
    tiles = 16 * 40 * ONE_CHUNK * 4
    assert step(given, tm.ArcFace(), retain_bytes=EVERYTHING)[0].above(tiles) == 1
    with torch.no_grad():
        paid = step(given, tm.ArcFace(), retain_bytes=EVERYTHING)[0]
    assert paid.above(tiles) == 0
    assert len(paid.products) == 40
    leaves = given.x, given.w
    for retain, kept in ((-1, 1), (0, 0)):
        inputs, spec = asked(*leaves, given.y, torch.float32, retain_bytes=retain, chunk_bytes=0, memory_budget=10**7)
        saved = Saved(*run_forward(inputs, spec)[1])
        assert len(saved.retained) == kept * len(given.w)


BIG = {"n": 64, "d": 32, "c": 300 * ONE_CHUNK}
SOME = 4 * ONE_CHUNK * (64 + 2 * 32) * 4  # bytes of a chunk of 256 classes, of 19,200
MEMORY = {
    "plain": {},
    "label_smoothing": {"label_smoothing": 0.1},
    "class_weight": {"class_weight": made(BIG["c"]).float().abs() + 0.1},
    "stats": {"return_stats": True},
    "lse-hinge": {"objective": "lse-hinge"},
    "max-hinge": {"objective": "max-hinge"},
    "hinge": {"objective": "hinge"},
    "sampled": {"class_ids": torch.arange(0, BIG["c"], 2)},
    "sampled and sparse": {"class_ids": torch.arange(0, BIG["c"], 2), "sparse_grad": True},
    "sparse": {"sparse_grad": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MEMORY)
@every_kind
@every_backend
def test_nothing_as_large_as_the_logits_or_a_second_weight(
    backend: str, kind: str, name: str, dtype: torch.dtype
) -> None:
    """N x C does not exist, and C x D once: the gradient."""
    given = problem(**BIG, bias=kind == "raw rows").to(dtype)
    ids = MEMORY[name].get("class_ids")
    given = replace(given, y=given.y // 2 * 2) if ids is not None else given
    with tm.use_backend(backend):
        forward, backward = step(given, KINDS[kind], chunk_bytes=SOME, shapes=False, **MEMORY[name])
    rows = BIG["c"] if ids is None or "sparse" not in name else len(ids)
    weight, logits = BIG["c"] * BIG["d"] * dtype.itemsize, BIG["n"] * BIG["c"] * dtype.itemsize
    gradient = rows * BIG["d"] * dtype.itemsize
    assert forward.above(logits) + backward.above(logits) == 0
    # Vectors of C are allowed, and so is a chunk; together they do not reach half of W.
    assert forward.above(weight // 2) == 0
    assert backward.above(gradient // 2) == 1
    assert backward.peak < gradient + weight // 2
    assert forward.peak < weight // 2


def test_the_memory_test_notices_the_usual_code() -> None:
    given = problem(**BIG).to(torch.float32)
    with tm.use_backend("reference"):
        forward, backward = step(given, tm.ArcFace(), chunk_bytes=SOME)
    assert forward.above(BIG["n"] * BIG["c"] * 4) > 1
    assert forward.above(BIG["c"] * BIG["d"] * 4 // 2) > 1
    assert backward.above(BIG["c"] * BIG["d"] * 4 // 2) > 1


def test_autocast_makes_no_cast_copy_of_the_weight() -> None:
    given = problem(**BIG).to(torch.float32)
    with torch.autocast(given.x.device.type, torch.bfloat16):
        forward, backward = step(given, tm.ArcFace(), chunk_bytes=SOME, shapes=False)
    assert forward.above(BIG["c"] * BIG["d"]) == 0
    assert backward.above(BIG["c"] * BIG["d"]) == 1
