"""The published failures of losses over many classes, a test each, named after the failure."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE, combinations, every_backend, made, not_ttsem, precise

import tritonmargin as tm
from tritonmargin.margins import MARGINS
from tritonmargin.objectives import OBJECTIVES

CHUNK = 2048  # bytes: a few classes at a time, so that every test walks several chunks


def problem(n=6, d=8, c=131, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, device="cpu").to(DEVICE, dtype).requires_grad_()
    w = torch.randn(c, d, generator=generator, device="cpu").to(DEVICE, dtype).requires_grad_()
    return x, w, torch.randint(c, (n,), generator=generator, device="cpu").to(DEVICE)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


# -- 1 and 2: sizes past 2^31 ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_01_class_number_times_width_past_2_to_the_31():
    """C D = 2^31 + 2^13 elements: the last rows' offsets do not fit 32 bits. bfloat16, 4.3 GB, and no gradient to W."""
    d, c = 1024, (1 << 21) + 8
    w = torch.zeros(c, d, dtype=torch.bfloat16)
    w[-4:] = made(4, d).bfloat16()
    x = made(3, d, seed=1).float().requires_grad_()
    target = torch.tensor([c - 1, c - 2, 5])
    loss, stats = tm.margin_cross_entropy(x, w, target, tm.ArcFace(), reduction="none", return_stats=True)
    few = torch.cat([w[-4:], w[5:6]]).double()
    # All other classes are zero rows, whose logit is 0: c - 5 of them beside these.
    z = 64.0 * F.normalize(x.detach().double()) @ F.normalize(few).T
    own = torch.tensor([3, 2, 4])
    others = z.masked_fill(F.one_hot(own, 5).bool(), -torch.inf)
    rest = torch.logaddexp(others.logsumexp(1), torch.tensor(math.log(c - 5.0), dtype=torch.float64))
    torch.testing.assert_close(stats.rest_logsumexp.double(), rest, rtol=0, atol=0.5)
    assert torch.isfinite(gradients(loss.sum(), x)[0]).all()


def test_01_class_number_times_width_past_2_to_the_31_without_the_memory():
    """The same offsets on an expanded matrix: one row of memory, 2^21 + 8 classes of 1024 numbers."""
    row = made(1, 1024).float()
    c = (1 << 21) + 8
    ids = torch.tensor([0, 7, c - 2, c - 1])
    x = made(2, 1024, seed=1).float()
    loss = tm.margin_cross_entropy(x, row.expand(c, 1024), torch.tensor([c - 1, 7]), tm.NormFace(), class_ids=ids)
    assert loss.item() == pytest.approx(math.log(4), rel=1e-6)


@pytest.mark.slow
def test_02_samples_times_classes_past_2_to_the_31():
    """N C = 2^31 + 2^16 logits, which never exist at once."""
    n, c, d = 1 << 15, (1 << 16) + 2, 2
    x, w, target = problem(n, d, c)
    loss = tm.margin_cross_entropy(x, w, target, tm.CosFace(s=8.0))
    dx, dw = gradients(loss, x, w)
    some = slice(n - 4, n)
    z = 8.0 * F.normalize(x.detach()[some]) @ F.normalize(w.detach()).T
    z[torch.arange(4), target[some]] -= 8.0 * 0.35
    last = tm.margin_cross_entropy(x[some], w, target[some], tm.CosFace(s=8.0))
    torch.testing.assert_close(last, F.cross_entropy(z, target[some]), rtol=1e-5, atol=1e-5)
    assert torch.isfinite(dx).all()
    assert torch.isfinite(dw).all()


# -- 3: nothing to walk ------------------------------------------------------------------------------------------


def test_03_walk_with_no_class_but_the_targets():
    x, w, _ = problem(3)
    target = torch.full((3,), 17)
    for objective in OBJECTIVES:
        loss, stats = tm.margin_cross_entropy(
            x, w, target, tm.ArcFace(), class_ids=torch.tensor([17]), objective=objective, return_stats=True
        )
        assert loss.item() == 0.0
        assert all(not gradient.any() for gradient in gradients(loss, x, w))
        assert (stats.hardest_class == -1).all()
        assert (stats.rest_logsumexp == -torch.inf).all()
        assert stats.correct.all()


@pytest.mark.usefixtures("debug")
def test_03_walk_with_no_class_at_all():
    x, w, _ = problem(3)
    target = torch.full((3,), -100)
    nothing = torch.empty(0, dtype=torch.int64)
    loss = tm.margin_cross_entropy(x, w, target, tm.ArcFace(), class_ids=nothing, reduction="none")
    assert loss.tolist() == [0.0, 0.0, 0.0]
    assert all(not gradient.any() for gradient in gradients(loss.sum(), x, w))
    with pytest.raises(ValueError, match="not in class_ids"):
        tm.margin_cross_entropy(x, w, torch.zeros(3, dtype=torch.int64), tm.ArcFace(), class_ids=nothing)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_03_a_first_chunk_that_holds_only_the_target(objective):
    """A masked first chunk leaves a running max at -inf, where -inf - -inf would be nan."""
    x, w, _ = problem(4, 8, 131)
    target = torch.zeros(4, dtype=torch.int64)
    loss = tm.margin_cross_entropy(x, w, target, tm.Softmax(), objective=objective, chunk_bytes=1)
    expected = tm.reference.margin_cross_entropy(x, w, target, tm.Softmax(), objective=objective)
    torch.testing.assert_close(loss, expected)


# -- 4 to 6: cosines at the edge, zero rows, hopeless rows ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cosine", [1.0, -1.0, 1.0 - 1e-7, -1.0 + 1e-7])
@pytest.mark.parametrize("name", MARGINS)
def test_04_target_cosine_at_one(name, cosine, dtype):
    x, w, target = problem(5, 8, 67)
    w = w.detach()
    side = w[target].roll(1, 1)
    side = side - (side * w[target]).sum(1, keepdim=True) / w[target].square().sum(1, keepdim=True) * w[target]
    side = F.normalize(side) * math.sqrt(max(0.0, 1.0 - cosine**2))
    x = (cosine * F.normalize(w[target]) + side).to(dtype).requires_grad_()
    w = w.to(dtype).requires_grad_()
    loss = tm.margin_cross_entropy(x, w, target, MARGINS[name](), reduction="none", chunk_bytes=CHUNK)
    expected = tm.reference.margin_cross_entropy(x.double(), w.double(), target, MARGINS[name](), reduction="none")
    tolerance = 1e-3 if dtype == torch.float32 else 0.6
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    for gradient in gradients(loss.sum(), x, w):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MARGINS)
def test_05_zero_rows(name, dtype):
    """A zero embedding or class row counts as direction 0: logit 0, no gradient where it is normalised."""
    margin = MARGINS[name]()
    x, w, target = problem(5, 8, 67)
    with torch.no_grad():
        x[1] = 0.0
        w[target[2]] = 0.0
        w[3] = 0.0
    target[0] = 3
    x, w = x.detach().to(dtype).requires_grad_(), w.detach().to(dtype).requires_grad_()
    loss = tm.margin_cross_entropy(x, w, target, margin, reduction="none", chunk_bytes=CHUNK)
    expected = tm.reference.margin_cross_entropy(x.double(), w.double(), target, margin, reduction="none")
    tolerance = 1e-4 if dtype == torch.float32 else 0.5
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    dx, dw = gradients(loss.sum(), x, w)
    assert torch.isfinite(dx).all()
    assert torch.isfinite(dw).all()
    if margin.unit_embeddings:
        assert not dx[1].any()
    if margin.unit_weight:
        assert not dw[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_06_hopeless_rows_have_a_loss_above_100(dtype):
    """log(p.clamp(1e-30)) stops at 69.0776 and its gradient at 0."""
    x, w, _ = problem(6, 16, 131)
    target = torch.arange(6)
    w = w.detach()
    x = -w[target]
    w[100:106] = x  # a wrong class exactly where the embedding points
    x, w = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
    loss = tm.margin_cross_entropy(x, w, target, tm.ArcFace(s=64.0), reduction="none", chunk_bytes=CHUNK)
    expected = tm.reference.margin_cross_entropy(x.double(), w.double(), target, tm.ArcFace(), reduction="none")
    assert (loss > 100).all()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
    dx, dw = gradients(loss.sum(), x, w)
    assert torch.isfinite(dx).all()
    assert torch.isfinite(dw).all()
    # At cos = +-1 the normalised gradient vanishes; a little beside it, it must be there at full size.
    twisted = (x.detach().float() + 0.3 * x.detach().float().roll(1, 1)).to(dtype).requires_grad_()
    loss = tm.margin_cross_entropy(twisted, w, target, tm.ArcFace(s=64.0))
    assert gradients(loss, twisted)[0].float().norm(dim=1).min() > 0.1


# -- 7 and 8: upstream gradients and ignored rows ------------------------------------------------------------------


@every_backend
@combinations(("name", "objective"), MARGINS, OBJECTIVES)
def test_07_reduction_none_with_any_upstream_gradient(name, objective, backend):
    dtype, size = precise(backend)
    x, w, target = problem(6, 8, 131, dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, w)]
    upstream = made(6, seed=3)

    def both(function, *leaves):
        loss = function(*leaves, target, MARGINS[name](), reduction="none", objective=objective)
        return gradients((loss * upstream).sum(), *leaves) + gradients(
            function(*leaves, target, MARGINS[name](), reduction="none", objective=objective).square().mean(), *leaves
        )

    with tm.use_backend(backend):
        found = both(tm.margin_cross_entropy, x, w)
    for ours, expected in zip(found, both(tm.reference.margin_cross_entropy, *exact), strict=True):
        largest = 1.0 if dtype == torch.float64 else float(expected.abs().max())
        torch.testing.assert_close(ours.double(), expected, rtol=1e-9 * size, atol=1e-10 * size * largest)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=not_ttsem)], ids=["eager", "compiled"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("ignored", [[0, 1, 2, 3, 4, 5], [2], [0, 5]])
def test_08_ignored_rows_add_exactly_nothing(ignored, objective, compiled):
    x, w, target = problem(6, 8, 131)
    target[ignored] = -100
    kept = [i for i in range(6) if i not in ignored]
    with torch.no_grad():
        x[ignored] = torch.nan  # whatever their embedding holds

    def step(x, w, target):
        return tm.margin_cross_entropy(x, w, target, tm.ArcFace(), objective=objective, reduction="none")

    run = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False) if compiled else step
    loss = run(x, w, target)
    assert not loss[ignored].any()
    dx, dw = gradients(loss.sum(), x, w)
    assert not dx[ignored].any()
    alone = step(x[kept], w, target[kept]) if kept else torch.zeros(0)
    torch.testing.assert_close(loss[kept], alone, rtol=1e-6, atol=1e-6)
    if kept:
        torch.testing.assert_close(dw, gradients(alone.sum(), w)[0], rtol=1e-5, atol=1e-6)
    else:
        assert not dw.any()
        assert tm.margin_cross_entropy(x, w, target, tm.ArcFace(), objective=objective).isnan()
        assert tm.margin_cross_entropy(x, w, target, tm.ArcFace(), objective=objective, reduction="sum") == 0


# -- 9: labels -----------------------------------------------------------------------------------------------------


@not_ttsem
@pytest.mark.usefixtures("debug")
def test_09_labels_out_of_range_negative_or_of_a_wrong_type():
    x, w, target = problem()
    before = copy.deepcopy((x.detach(), w.detach()))
    for wrong in (131, -1, -101, 2**40):
        bad = target.clone()
        bad[3] = wrong
        with pytest.raises(ValueError, match=rf"target holds class number {wrong}, expected 0 <= target < 131"):
            tm.margin_cross_entropy(x, w, bad, tm.ArcFace())
        compiled = torch.compile(tm.margin_cross_entropy, fullgraph=True, backend="aot_eager")
        with pytest.raises(ValueError, match=f"class number {wrong}"):
            compiled(x, w, bad, tm.ArcFace())
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match="target must hold integer class numbers"):
            tm.margin_cross_entropy(x, w, target.to(dtype), tm.ArcFace())
    assert torch.equal(x, before[0])
    assert torch.equal(w, before[1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_09_labels_of_any_integer_type(dtype):
    x, w, target = problem(c=101)
    expected = tm.margin_cross_entropy(x, w, target, tm.ArcFace())
    assert torch.equal(tm.margin_cross_entropy(x, w, target.to(dtype), tm.ArcFace()), expected)


# -- 10 and 11: layouts and side effects ---------------------------------------------------------------------------


def layouts(tensor):
    """The same numbers in other layouts."""
    tensor = tensor.detach()
    wide = torch.zeros(tensor.shape[0], 2 * tensor.shape[1], dtype=tensor.dtype)
    wide[:, ::2] = tensor
    padded = torch.zeros(tensor.shape[0], tensor.shape[1] + 3, dtype=tensor.dtype)
    padded[:, 3:] = tensor
    return [tensor.T.contiguous().T, wide[:, ::2], padded[:, 3:], tensor.flip(0).flip(0)]


@pytest.mark.parametrize("margin", [tm.Softmax(), tm.ArcFace(), tm.LSoftmax()], ids=repr)
def test_10_inputs_and_upstream_gradients_in_any_layout(margin):
    x, w, target = problem(dtype=torch.float64)
    expected = tm.margin_cross_entropy(x, w, target, margin, chunk_bytes=CHUNK)
    grads = gradients(expected, x, w)
    spread = torch.zeros(6, 2, dtype=torch.int64)
    spread[:, 1] = target
    for a, b in itertools.product(layouts(x), layouts(w)):
        a, b = a.requires_grad_(), b.requires_grad_()
        loss = tm.margin_cross_entropy(a, b, spread[:, 1], margin, chunk_bytes=CHUNK)
        torch.testing.assert_close(loss, expected)
        for ours, plain in zip(gradients(loss, a, b), grads, strict=True):
            torch.testing.assert_close(ours, plain)
    # `.sum().backward()` hands an expanded gradient to backward; a strided one is as good.
    loss = tm.margin_cross_entropy(x, w, target, margin, reduction="none", chunk_bytes=CHUNK)
    expanded = torch.autograd.grad(loss, (x, w), torch.ones((), dtype=torch.float64).expand(6), retain_graph=True)
    strided = torch.autograd.grad(loss, (x, w), torch.ones(6, 2, dtype=torch.float64)[:, 0])
    for ours, plain in zip(expanded + strided, grads + grads, strict=True):
        torch.testing.assert_close(ours, plain * 6)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", MARGINS)
def test_11_inputs_are_left_alone(name, objective):
    x, w, target = problem()
    bias = torch.randn(131).requires_grad_()
    ids = tm.sample_classes(target, 131, 50)
    class_weight = torch.rand(131)
    inputs = [x, w, target, bias, ids, class_weight]
    values, versions = [tensor.detach().clone() for tensor in inputs], [tensor._version for tensor in inputs]
    loss, _ = tm.margin_cross_entropy(
        x, w, target, MARGINS[name](), bias=bias, class_ids=ids, class_weight=class_weight, objective=objective,
        retain_bytes=4000, chunk_bytes=CHUNK, return_stats=True,
    )  # fmt: skip
    loss.backward()
    for tensor, value, version in zip(inputs, values, versions, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


# -- 12: one bad row -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", MARGINS)
def test_12_nan_or_inf_in_one_embedding_poisons_only_its_row(name, objective, bad):
    x, w, target = problem()
    clean = tm.margin_cross_entropy(
        x, w, target, MARGINS[name](), objective=objective, reduction="none", chunk_bytes=CHUNK
    )
    with torch.no_grad():
        x[2, 1] = bad
    loss, stats = tm.margin_cross_entropy(
        x, w, target, MARGINS[name](), objective=objective, reduction="none", chunk_bytes=CHUNK, return_stats=True
    )
    if bad != bad:
        assert loss[2].isnan()
        assert not stats.correct[2]
    else:
        assert not loss[2].isfinite() or MARGINS[name].unit_embeddings
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(loss[others], clean[others])
    dx = gradients(loss[others].sum(), x)[0]
    assert torch.isfinite(dx[others]).all()


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", MARGINS)
def test_12_nan_in_one_class_row_is_seen_by_every_sample(name, objective, place):
    """Whatever chunk it is in, and whatever chunks before and after it hold."""
    x, w, target = problem()
    with torch.no_grad():
        w[0 if place == "first" else -1, 1] = torch.nan
    loss, stats = tm.margin_cross_entropy(
        x, w, target, MARGINS[name](), objective=objective, reduction="none", chunk_bytes=CHUNK, return_stats=True
    )
    assert loss.isnan().all()
    assert stats.hardest_logit[target != (0 if place == "first" else len(w) - 1)].isnan().all()
    assert not stats.correct.any()
