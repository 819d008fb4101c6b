"""Every launch of our kernels that is compiled, counted or tuned here, by name.

The only file of perf/ that looks into the kernels' backend. A case is a loss that somebody may ask for: the backend's
own forward and backward run, and their launches are kept instead of made. Inside `compile.compiling_for` a launch that
is called then compiles and does not run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

import tritonmargin as tm
from perf.kernels.gpus import Gpu
from perf.suite.problem import matmul_precision
from tritonmargin.backends import precision, tiles
from tritonmargin.backends.triton import BACKEND, draw_kernels, numbers, plan, products
from tritonmargin.optim import update_rules
from tritonmargin.spec import LossInputs, LossOptions, PassGrads, PassInputs, PassSpec

Launches = dict[str, Callable[..., object]]
Tiles = tiles.Tiles
TABLE = Path(tiles.__file__).with_name("tiles.json")

# Of x and W. "tf32" is float32 whose products torch was told to round to it.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
N, D, C = 1024, 512, 1_000_000
K = 4096  # classes, where only the code matters

TILED = ("reduce", "weigh")  # both look at every logit
SGD, ADAMW = "finish, sgd", "finish, adamw"  # finish that updates the rows
HEAVIEST = "reduce, hinge, bias, statistics"
BETWEEN = ("reduce, statistics", "reduce, bias", "weigh, bias", "weigh, label smoothing")

family = tiles.family  # the target whose lines of the table another one uses: sm_103 those of sm_100
this_gpu = tiles.gpu  # of a number: its target and processors


class Case(NamedTuple):
    """A loss, and which of its kernels differ from those of the cases before."""

    kernels: tuple[str, ...]
    margin: type[tm.Margin] = tm.ArcFace
    options: dict[str, Any] = {}  # noqa: RUF012  of LossOptions
    bias: bool = False
    weighted: bool = False  # classes have weights
    sampled: bool = False  # half of the classes
    wide: bool = False  # W in float32, as under autocast
    rule: str = ""  # of an update in backward
    asked: tuple[str, ...] | None = None  # numbers per sample for PyTorch, and what else; None: the kernels' own loss
    samples: int | None = None  # at most


STEP = ("rows", "classes", "reduce", "loss", "sum", "extremes", "half", "weigh", "finish", "back")
TILES = (*TILED, "finish")
EVERYTHING = dict(options=dict(label_smoothing=0.1, reduction="none"), bias=True, weighted=True)
CASES = {  # what differs from a step of ArcFace whose W and embeddings have the dtype of the products
    "": Case(STEP),
    "sgd": Case(("finish",), rule="sgd"),
    "adamw": Case(("finish",), rule="adamw"),
    "raw rows": Case((*TILES, "back"), tm.Softmax),
    "raw rows and bias": Case(("classes", *TILES), tm.Softmax, bias=True),
    "bias": Case(("classes", *TILES), bias=True),
    "label smoothing": Case(("classes", *TILES, "half", "loss"), options=dict(label_smoothing=0.1)),
    "a sample, W in float32": Case(("rows", "classes", *TILES), sampled=True, wide=True),
    "everything": Case(("rows", "classes", "loss", "upstream", *TILES, "back"), tm.ASoftmax, **EVERYTHING),
    "everything, sgd": Case(("finish",), **EVERYTHING, sampled=True, wide=True, rule="sgd"),
    "everything, adamw": Case(("finish",), **EVERYTHING, sampled=True, wide=True, rule="adamw"),
    "numbers": Case(("numbers", "gradients"), asked=("bias",)),
    "statistics": Case((*TILED, "finish", "back"), asked=("statistics",)),
    "offset": Case(("classes", *TILED), asked=("offset",)),
    "hinge": Case(TILED, asked=("hinge",)),
    "hinge and bias": Case(TILES, asked=("hinge", "bias")),
    "hinge, bias, statistics": Case(("reduce",), asked=("hinge", "bias", "statistics", "rest")),
    "16 samples": Case(TILES, samples=16),
    "64 samples": Case(TILES, samples=64),
}  # fmt: skip
IN_A_STEP = ("", "sgd", "adamw")


def device_of(gpu: Gpu) -> tiles.Device:
    return tiles.Device(gpu.target, gpu.processors, gpu.capacity)


def plan_of(gpu: Gpu, dtype: str, n: int, d: int, c: int, other_rows: bool = False) -> plan.Plan:
    """How the library cuts a pass over c classes on this GPU; other_rows: the products cannot take those of W."""
    kind, how, device = DTYPES[dtype], "tf32" if dtype == "tf32" else "ieee", device_of(gpu)
    copied = other_rows or dtype in ("tf32", "float16")
    return plan.make_plan(n, d, c, device, kind, how, copied, device.memory // 64, 0, 0)


@contextlib.contextmanager
def on(gpu: Gpu) -> Iterator[None]:
    """Losses are planned as on this GPU."""
    device = device_of(gpu)

    def there(tensor: Tensor) -> tiles.Device:  # not a Mock that returns it: those take the CPU microseconds
        return device

    with contextlib.ExitStack() as patches:
        for module in (plan, precision):
            patches.enter_context(mock.patch.object(module, "device_of", there))
        yield


@contextlib.contextmanager
def with_tile(tile: Tiles, gpu: Gpu) -> Iterator[None]:
    """The kernels take this tile instead of the table's; its programs are those of a processor, as in the table."""
    taken, fresh = tile._replace(programs=tile.programs * gpu.processors), plan.make_plan.__wrapped__
    with mock.patch.object(plan, "pick_tiles", return_value=taken), mock.patch.object(plan, "make_plan", fresh):
        yield


def nothing(*_: object) -> None:
    pass


@contextlib.contextmanager
def launching(launch: Callable[..., object], add_product: Callable[..., object] = nothing) -> Iterator[None]:
    """Inside, launches are told to `launch` as (kernel, *args, **options), and products of torch are not made."""
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", launch))
        patches.enter_context(mock.patch.object(products, "multiply", nothing))
        patches.enter_context(mock.patch.object(products, "add_product", add_product))
        yield


@contextlib.contextmanager
def kept(runs: bool) -> Iterator[Launches]:
    """Launches inside, by their kernels' names, each kernel's first; with `runs` they are made too."""
    found, before = Launches(), JITFunction.run

    def keep(kernel: Any, *args: Any, **options: Any) -> None:
        # JITFunction.run is looked up when the launch is called: who compiles it may have put an own one in its place.
        found.setdefault(kernel.fn.__name__.removesuffix("_kernel"), lambda: kernel.run(*args, **options))
        if runs:
            before(kernel, *args, **options)

    with launching(keep):
        yield found


def launches(
    names: Iterable[str], dtype: str, n: int = N, d: int = D, k: int = K, device: str = "cpu", runs: bool = False
) -> Launches:
    """The launches of these cases, as "KERNEL, CASE", on the GPU of `on` or of this machine."""
    found = Launches()
    for name in names:
        case = CASES[name]
        with matmul_precision(dtype), kept(runs) as made:
            run(case, dtype, min(n, case.samples or n), d, k, device)
        for kernel in case.kernels:
            if kernel in made:
                found[f"{kernel}, {name}" if name else kernel] = made[kernel]
    return found


def run(case: Case, dtype: str, n: int, d: int, k: int, device: str) -> None:
    """The case's loss and its gradients, by the backend."""
    made, kind = partial(torch.ones, device=device), DTYPES[dtype]
    x = made(n, d, dtype=kind).requires_grad_()
    weight = made(k, d, dtype=torch.float32 if case.wide else kind).requires_grad_()
    target, ids = torch.arange(n, device=device) % (k // 2), None
    if case.sampled:
        ids = torch.arange(k // 2, device=device)
    if case.asked is not None:
        numbers_of(PassInputs(x, weight, target, ids), dtype, case.asked)
        return
    bias = made(k).requires_grad_() if case.bias else None
    rule = update_rules.RowUpdate("sgd", weight, ()) if not case.rule else update_of(case.rule, weight.detach())
    updater: Any = SimpleNamespace(begin_in_backward=lambda _: rule, finish_in_backward=lambda *_: None)
    inputs = LossInputs(x, weight, target, bias, ids, made(k) if case.weighted else None)
    margin = case.margin().to(device)
    loss = BACKEND.fused(inputs, margin, LossOptions(**case.options), kind, updater if case.rule else None)
    assert loss is not None
    loss.backward(torch.ones_like(loss))


def numbers_of(inputs: PassInputs, dtype: str, asked: tuple[str, ...]) -> None:
    """Numbers per sample, as a margin in PyTorch takes them, and gradients for all of them."""
    made, n, k = partial(torch.ones, device=inputs.x.device), len(inputs.x), len(inputs.weight)
    inputs = inputs._replace(
        bias=made(k) if "bias" in asked else None, offset=made(k) if "offset" in asked else None,
        threshold=made(n) if "hinge" in asked else None,
    )  # fmt: skip
    rest, hardest = "hinge" not in asked or "rest" in asked, "statistics" in asked
    spec = PassSpec(
        unit_weight=True, unit_embeddings=True, scale=64.0, bounded=inputs.bias is None, want_rest=rest,
        want_hardest=hardest, sparse=False, dtype=DTYPES[dtype], chunk_bytes=0, retain_bytes=0, backend=BACKEND.name,
        precision=precision.precision_of(DTYPES[dtype], inputs.x),
    )  # fmt: skip
    with torch.no_grad(), mock.patch.object(numbers, "hardest_of", of_the_first_class):
        saved = BACKEND.forward(inputs, spec)[1]
        grads = PassGrads(*[made(n)] * len(PassGrads._fields))
        grads = grads._replace(mean_logit=None, hardest_product=grads.rest if hardest else None)
        BACKEND.backward(inputs, saved, grads, (True, True, inputs.bias is not None), spec)


def of_the_first_class(inputs: PassInputs, spec: PassSpec, of: plan.Plan, *_: Any) -> tuple[Tensor, Tensor, Any]:
    """In place of what looks at numbers that no launch has written."""
    row = inputs.target.new_zeros(of.line, dtype=torch.int32)
    product, rows = row.float(), inputs.x.new_zeros((of.n, of.d), dtype=torch.float32)
    return product[: of.n], row[: of.n].long(), (row, rows, product)


def update_of(rule: str, w: Tensor) -> update_rules.RowUpdate:
    """The rows' update in backward: bfloat16 is rounded by chance, state included."""
    low = w.dtype == torch.bfloat16
    first, second = (torch.zeros_like(w, dtype=w.dtype if low else torch.float32) for _ in range(2))
    seed = 1 if low else None
    if rule == "sgd":
        return update_rules.RowUpdate(rule, w, (0.1, 0.9, 5e-4, 0.0), (first,), seed=seed)
    steps = torch.zeros(len(w), dtype=torch.int32, device=w.device)
    return update_rules.RowUpdate(rule, w, (1e-3, 0.9, 0.999, 1e-8, 0.1), (first, second), steps, seed)


def draws() -> Launches:
    """The three kernels that draw a tenth of the classes, launched as the library does: ids and state are int64."""
    with kept(False) as found:
        draw_kernels.draw_by_triton(torch.arange(N), torch.tensor([1, 0]), 0, C, C // 10)
    return {f"draw: {name}": launch for name, launch in found.items()}
