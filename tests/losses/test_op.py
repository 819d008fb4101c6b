"""What PyTorch asks of an op: gradcheck, opcheck, torch.compile, layouts, and an error for a second derivative."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import (
    KINDS,
    MACHINE,
    ONE_CHUNK,
    asked,
    assert_rows_close,
    every_backend,
    every_kind,
    every_margin,
    every_objective,
    made,
    not_ttsem,
    precise,
    problem,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import tritonmargin as tm
from tritonmargin.class_pass.op import OUTPUTS, SAVED, encode
from tritonmargin.margins import MARGINS
from tritonmargin.spec import PassGrads, PassInputs, PassOutput, PassSpec

CLASSES = ONE_CHUNK + 3


# -- numbers -------------------------------------------------------------------------------------------------------


@every_objective
@every_margin
def test_gradcheck(name: str, objective: str) -> None:
    """Against finite differences, the reference out of sight: all inputs, two chunks, a sample of the classes.

    They take float64, which the kernels leave to the torch backend on every device.
    """
    given, margin = problem(3, 4, CLASSES, bias=True, seed=3), MARGINS[name]()
    if margin.unit_embeddings:
        margin.s = 4.0  # what finite differences can follow
    ids = torch.cat([given.y, torch.arange(0, CLASSES, 2)]).unique()
    class_weight = made(CLASSES, seed=5).abs()
    leaves = tuple(leaf.requires_grad_() for leaf in (given.x, given.w[:, :], given.bias))

    def loss(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return tm.margin_cross_entropy(
            x, w, given.y, margin, bias=bias, class_ids=ids, class_weight=class_weight, objective=objective,
            label_smoothing=0.1 * (objective == "softmax"), reduction="none", chunk_bytes=1,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


def test_gradcheck_of_the_bounded_path() -> None:
    given = problem(3, 4, CLASSES, seed=3)
    for smoothing in (0.0, 0.3):
        assert torch.autograd.gradcheck(
            lambda x, w, smoothing=smoothing: tm.margin_cross_entropy(
                x, w, given.y, tm.ArcFace(s=5.0), label_smoothing=smoothing, reduction="none", chunk_bytes=1
            ),
            (given.x.requires_grad_(), given.w.requires_grad_()),
        )


class Learned(tm.Margin):
    """A margin and a scale that are trained."""

    def __init__(self) -> None:
        super().__init__(s=8.0)
        self.s = torch.nn.Parameter(torch.tensor(8.0, dtype=torch.float64))
        self.m = torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def target_cosine(self, cos: Tensor) -> Tensor:
        return cos - self.m * (1.0 + cos)


@every_backend
@every_objective
def test_a_margin_and_a_scale_can_be_learned(objective: str, backend: str) -> None:
    dtype, size = precise(backend)
    given, margin = problem(6, 9, CLASSES).to(dtype), Learned().to(dtype)
    grads = []
    for loss in (tm.margin_cross_entropy, tm.reference.margin_cross_entropy):
        with tm.use_backend(backend):
            value = loss(given.x, given.w.requires_grad_(), given.y, margin, objective=objective, chunk_bytes=1)
        grads.append(torch.autograd.grad(value, (margin.m, margin.s, given.w)))
    for ours, expected in zip(*grads, strict=True):
        assert_rows_close(ours, expected, size * 1e-10, size * 1e-12)
    assert float(grads[0][0]) > 0


# -- layouts -------------------------------------------------------------------------------------------------------


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, every third element of a larger buffer, and for a matrix the other way round in memory."""
    apart = torch.full((3, *reversed(tensor.shape)), torch.nan).to(tensor.dtype)
    apart = apart.movedim(0, -1).contiguous()[..., 1].permute(*reversed(range(tensor.ndim)))
    return apart.copy_(tensor)


@every_backend
@every_objective
@every_kind
def test_strided_inputs(kind: str, objective: str, backend: str) -> None:
    dtype, size = precise(backend)
    given = problem(6, 9, 2 * ONE_CHUNK + 1, bias=KINDS[kind].unit_weight is False).to(dtype)
    options = {"class_ids": torch.cat([given.y, torch.arange(0, 128, 2)]).unique()}
    options["class_weight"] = made(2 * ONE_CHUNK + 1, seed=5).abs().to(dtype)
    results = []
    for change in (torch.clone, strided):
        x, w = (change(leaf.detach()).requires_grad_() for leaf in (given.x, given.w))
        bias = None if given.bias is None else change(given.bias.detach()).requires_grad_()
        with tm.use_backend(backend):
            loss = tm.margin_cross_entropy(
                x, w, change(given.y), KINDS[kind], bias=bias, objective=objective, reduction="none", chunk_bytes=1,
                **{key: change(value) for key, value in options.items()},
            )  # fmt: skip
        leaves = [leaf for leaf in (x, w, bias) if leaf is not None]
        results.append((loss, *torch.autograd.grad(loss, leaves, change(given.upstream))))
    assert not strided(given.x).is_contiguous()
    for ours, plain in zip(*results, strict=True):
        assert_rows_close(ours, plain, size * 1e-12, size * 1e-13)


@every_backend
def test_expanded_inputs(backend: str) -> None:
    """One row of memory for all samples, one for all classes, and the gradient of a sum, which is one number."""
    dtype, size = precise(backend)
    given = problem(6, 9, CLASSES).to(dtype)
    for x, w in ((given.x[:1].expand(6, 9), given.w), (given.x, given.w[:1].expand(CLASSES, 9))):
        results = []
        for change in (torch.Tensor.contiguous, torch.Tensor.detach):
            a, b = change(x).requires_grad_(), change(w).requires_grad_()
            with tm.use_backend(backend):
                loss = tm.margin_cross_entropy(a, b, given.y, tm.CosFace(s=8.0), reduction="none", chunk_bytes=1)
            results.append(torch.autograd.grad(loss.sum(), (a, b)))
        for ours, plain in zip(*results, strict=True):
            assert_rows_close(ours, plain, size * 1e-12, size * 1e-13)


# -- second derivatives --------------------------------------------------------------------------------------------


@every_backend
@every_objective
@every_kind
def test_a_second_derivative_is_an_error(kind: str, objective: str, backend: str) -> None:
    """A gradient penalty must not vanish silently."""
    given = problem(6, 9, CLASSES).to(precise(backend)[0])
    x, w = given.x.requires_grad_(), given.w.requires_grad_()
    with tm.use_backend(backend):
        loss = tm.margin_cross_entropy(x, w, given.y, KINDS[kind], objective=objective, chunk_bytes=1)
    grads = torch.autograd.grad(loss, (x, w), create_graph=True)
    for gradient in grads:
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(gradient.square().sum(), (x, w), retain_graph=True, allow_unused=True)


# -- opcheck -------------------------------------------------------------------------------------------------------

OPS = torch.ops.tritonmargin
FORWARD = {
    "bounded": {},
    "retained": {"retain_bytes": 10**6},
    "one chunk retained": {"retain_bytes": ONE_CHUNK * 5 * 4},
    "unbounded": {"bounded": False, "unit_weight": False, "bias": True, "want_hardest": True},
    "sampled": {"class_ids": True, "mean_weight": True, "sparse": True},
    "smoothed": {"bounded": False, "mean_weight": True, "bias": True},
    "hinge": {"bounded": False, "threshold": True, "want_rest": False},
    "max": {"bounded": False, "want_rest": False, "want_hardest": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "offset": {"class_ids": True, "offset": True},
    "permuted": {},
}


@not_ttsem
@pytest.mark.parametrize("name", FORWARD)
def test_opcheck_of_the_class_pass(name: str) -> None:
    inputs, spec = op_inputs(name)
    inputs = inputs._replace(x=inputs.x.requires_grad_(), weight=inputs.weight.requires_grad_())
    # Gradients are compared between eager and compiled, so every output must be asked for by a fixed order of sums.
    opcheck(OPS.class_pass.default, (*inputs, *encode(spec)))


@not_ttsem
@pytest.mark.parametrize("retain_bytes", [0, 3, 10**6])
def test_fake_outputs_of_an_empty_batch(retain_bytes: int) -> None:
    inputs, spec = op_inputs("retained", retain_bytes=retain_bytes)
    inputs = inputs._replace(x=inputs.x[:0], target=inputs.target[:0])
    opcheck(OPS.class_pass.default, (*inputs, *encode(spec)), test_utils="test_faketensor")


@not_ttsem
def test_vmap_over_a_loss() -> None:
    x, w, y = made(2, 3, 5), made(CLASSES, 5), torch.arange(3)
    for margin in (tm.ArcFace(), tm.CosFace(), tm.Softmax()):
        found = torch.func.vmap(lambda x, margin=margin: tm.margin_cross_entropy(x, w, y, margin))(x)
        torch.testing.assert_close(found, torch.stack([tm.margin_cross_entropy(each, w, y, margin) for each in x]))


def op_inputs(name: str, **changed: object) -> tuple[PassInputs, PassSpec]:
    given = problem(5, 7, CLASSES, bias=True).to(torch.float32)
    ids = torch.cat([given.y, torch.arange(0, CLASSES, 2)]).unique()
    tensors = {"class_ids": ids, "bias": given.bias, "mean_weight": torch.rand(CLASSES), "threshold": given.upstream}
    tensors["offset"] = torch.rand(len(ids))
    options = {key: tensors.get(key, value) if value is True else value for key, value in FORWARD[name].items()}
    position = torch.searchsorted(ids, given.y) if "class_ids" in options else given.y
    x, w = given.x, given.w
    if name == "permuted":
        x, w = x.T.contiguous().T, w.T.contiguous().T
    return asked(x, w, position, **{"dtype": torch.float32} | options | changed)


@not_ttsem
@pytest.mark.parametrize("name", FORWARD)
def test_opcheck_of_its_backward(name: str) -> None:
    """The backward op by itself, with every upstream gradient that goes with the outputs."""
    inputs, spec = op_inputs(name)
    found = OPS.class_pass.default(*inputs, *encode(spec))
    out, saved = PassOutput(*found[:OUTPUTS]), found[OUTPUTS:]
    g = torch.linspace(-1.0, 1.0, 5)
    grads = PassGrads(
        rest=g if spec.want_rest else None,
        target_product=g,
        target_norm=g / out.target_norm,
        target_bias=None if inputs.bias is None else g,
        mean_logit=None if inputs.mean_weight is None else g,
        hinge=None if inputs.threshold is None else g,
        hardest_product=g if spec.want_hardest else None,
    )
    wanted = [(True, True, inputs.bias is not None), (True, False, False), (False, True, False)]
    for needs in wanted[: 3 if name in ("bounded", "unbounded") else 1]:
        opcheck(OPS.class_pass_backward.default, (*inputs, *saved, *grads, *needs, *encode(spec)))


def test_the_schemas_are_what_the_values_say() -> None:
    """Positions in the operators' flat arguments are fields, in order: a field more is an argument more."""
    for op, more in (
        (OPS.class_pass.default, 0),
        (OPS.class_pass_backward.default, SAVED + len(PassGrads._fields) + 3),
    ):
        names = [argument.name for argument in op._schema.arguments]
        fields = list(PassSpec.__dataclass_fields__)
        assert names[: len(PassInputs._fields)] == list(PassInputs._fields)
        assert names[-len(fields) :] == fields
        assert len(names) == len(PassInputs._fields) + more + len(fields)


@not_ttsem
def test_opcheck_of_positions() -> None:
    target = torch.tensor([3, -100, 8, 3])
    opcheck(OPS.positions.default, (target, None, 9, -100))
    opcheck(OPS.positions.default, (target.to(torch.int32), torch.tensor([1, 3, 8]), 9, -100))


# -- torch.compile -------------------------------------------------------------------------------------------------


class Network(torch.nn.Module):
    def __init__(self, margin: tm.Margin, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(5, 7)
        self.head = tm.MarginSoftmaxLoss(7, CLASSES, margin, **options)

    def forward(self, x: Tensor, y: Tensor, class_ids: Tensor | None = None) -> Tensor:
        return self.head(self.layer(x).relu(), y, class_ids)


def check_compiled(compiled: torch.nn.Module, network: Network, x: Tensor, y: Tensor, **rest: Tensor) -> Tensor:
    results = []
    for module in (compiled, network):
        network.zero_grad()
        loss = module(x, y, **rest)
        loss.backward()
        results.append([loss.detach(), *(p.grad.to_dense() for p in network.parameters())])
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)
    return results[0][0]


@not_ttsem
@pytest.mark.parametrize("options", [
    {"margin": tm.ArcFace(s=16.0)},
    {"margin": tm.LSoftmax(), "bias": True, "label_smoothing": 0.1, "retain_bytes": 10**6},
    {"margin": tm.ASoftmax(), "objective": "max-hinge"},
    {"margin": tm.Softmax(), "objective": "hinge"},
], ids=["bounded", "smoothed, with a bias", "max-hinge", "hinge"])  # fmt: skip
def test_compiled_step_is_the_eager_one(options: dict[str, object]) -> None:
    """Also after the margin's number and the batch size have changed, without compiling again for the number."""
    torch.compiler.reset()
    network = Network(**options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    x, y = made(32, 5).float(), torch.arange(32)
    losses = [check_compiled(compiled, network, x, y)]
    once = counter.frame_count
    margin = network.head.margin
    number = {"ArcFace": "m", "LSoftmax": "lam", "ASoftmax": "lam"}.get(type(margin).__name__)
    if number:
        setattr(margin, number, 0.9)
        losses.append(check_compiled(compiled, network, x, y))
        assert losses[0] != losses[1]
    assert counter.frame_count == once
    # Once more for another batch size, and that one serves all others.
    counts = []
    for n in (17, 5, 29, 3):
        y[1] = -100
        check_compiled(compiled, network, x[:n].clone(), y[:n].clone())
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, counts


@not_ttsem
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_compiled_step_with_sampled_classes_and_autocast(sparse: bool) -> None:
    torch.compiler.reset()
    network = Network(tm.CosFace(s=16.0), sparse_grad=sparse)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, fullgraph=True, backend=counter, dynamic=True)
    x, y = made(32, 5).float(), torch.arange(32)
    samples = [torch.cat([y[:n], torch.arange(0, CLASSES, step)]).unique() for n, step in ((32, 2), (9, 3), (20, 5))]
    counts = []
    for n, ids in zip((32, 9, 20), samples, strict=True):
        plain = check_compiled(compiled, network, x[:n].clone(), y[:n].clone(), class_ids=ids)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, counts
    # The interpreter multiplies bfloat16 operands wrongly.
    half = torch.float16 if MACHINE == "interpreter" else torch.bfloat16
    with torch.autocast(x.device.type, half):
        low = check_compiled(compiled, network, x[:n].clone(), y[:n].clone(), class_ids=ids)
    assert plain.dtype == low.dtype == torch.float32
    assert plain != low


@not_ttsem
def test_compiled_function_under_every_option() -> None:
    """What tracing could bake in or leave out: stats, a reduction of none, class weights."""
    torch.compiler.reset()
    given = problem(6, 9, CLASSES, bias=True).to(torch.float32)
    class_weight = torch.rand(CLASSES)
    for objective, reduction in itertools.product(("softmax", "max-hinge"), ("none", "mean")):

        def call(
            x: Tensor, w: Tensor, b: Tensor, objective: str = objective, reduction: str = reduction
        ) -> tuple[Tensor, tm.Stats]:
            return tm.margin_cross_entropy(
                x, w, given.y, tm.Softmax(), bias=b, class_weight=class_weight, objective=objective,
                reduction=reduction, return_stats=True, chunk_bytes=1,
            )  # fmt: skip

        results = []
        for function in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
            leaves = [leaf.clone().requires_grad_() for leaf in (given.x, given.w, given.bias)]
            loss, stats = function(*leaves)
            results.append([loss, *stats, *torch.autograd.grad(loss.square().sum(), leaves)])
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager, equal_nan=True)
