"""Every launch of our kernels that is compiled, counted or tuned here, by name.

The only file of perf/ that looks into the kernels' backend. A case is a loss that somebody may ask for: the library
computes it and its gradients, and the launches are kept instead of made. Inside `compile.compiling_for` a launch that
is called then compiles and does not run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

import tritonmargin as tm
from perf.kernels.gpus import Gpu
from perf.suite.problem import matmul_precision
from tritonmargin.backends import precision, registry, tiles
from tritonmargin.backends.triton import draw_kernels, numbers, plan, products
from tritonmargin.spec import PassInputs, PassSpec

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
    options: dict[str, Any] = {}  # noqa: RUF012  of the head
    weighted: bool = False  # classes have weights
    sampled: bool = False  # half of the classes
    wide: bool = False  # W in float32, under autocast
    rule: str = ""  # of an update in backward
    statistics: bool = False
    samples: int | None = None  # at most


STEP = ("rows", "classes", "reduce", "loss", "sum", "extremes", "half", "weigh", "finish", "back")
TILES = (*TILED, "finish")
BIAS = dict(bias=True)
EVERYTHING = dict(options=BIAS | dict(label_smoothing=0.1, reduction="none"), weighted=True)
CASES = {  # what differs from a step of ArcFace whose W and embeddings have the dtype of the products
    "": Case(STEP),
    "sgd": Case(("finish",), rule="sgd"),
    "adamw": Case(("finish",), rule="adamw"),
    "raw rows": Case((*TILES, "back"), tm.Softmax),
    "raw rows and bias": Case(("classes", *TILES), tm.Softmax, BIAS),
    "bias": Case(("classes", *TILES), options=BIAS),
    "label smoothing": Case(("classes", *TILES, "half", "loss"), options=dict(label_smoothing=0.1)),
    "a sample, W in float32": Case(("rows", "classes", *TILES), sampled=True, wide=True),
    "everything": Case(("rows", "classes", "loss", "upstream", *TILES, "back"), tm.ASoftmax, **EVERYTHING),
    "everything, sgd": Case(("finish",), **EVERYTHING, sampled=True, wide=True, rule="sgd"),
    "everything, adamw": Case(("finish",), **EVERYTHING, sampled=True, wide=True, rule="adamw"),
    "numbers": Case(("numbers", "gradients"), tm.LSoftmax, BIAS | dict(objective="lse-hinge")),
    "statistics": Case(("reduce",), statistics=True),
    "offset": Case(("classes", *TILED), options=dict(logq_correction=True), sampled=True),
    "max-hinge": Case(("reduce", "finish", "back"), options=dict(objective="max-hinge")),
    "hinge": Case(TILED, options=dict(objective="hinge")),
    "hinge and bias": Case(TILES, options=BIAS | dict(objective="hinge")),
    "hinge, bias, statistics": Case(("reduce",), options=BIAS | dict(objective="hinge"), statistics=True),
    "16 samples": Case(TILES, samples=16),
    "64 samples": Case(TILES, samples=64),
}  # fmt: skip
IN_A_STEP = ("", "sgd", "adamw")
RULES: dict[str, Callable[..., Any]] = {
    "sgd": partial(tm.optim.RowSGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
    "adamw": partial(tm.optim.RowAdamW, weight_decay=0.1),
}


def device_of(gpu: Gpu) -> tiles.Device:
    return tiles.Device(gpu.target, gpu.processors, gpu.capacity)


def plan_of(gpu: Gpu, dtype: str, n: int, d: int, c: int, other_rows: bool = False) -> plan.Plan:
    """How the library cuts a pass over c classes on this GPU; other_rows: the products cannot take those of W."""
    kind, how, device = DTYPES[dtype], "tf32" if dtype == "tf32" else "ieee", device_of(gpu)
    copied = other_rows or dtype in ("tf32", "float16")
    return plan.make_plan(n, d, c, device, kind, how, copied, device.memory // 64, 0, 0)


@contextlib.contextmanager
def on(gpu: Gpu) -> Iterator[None]:
    """Losses of CPU tensors are planned and launched as on this GPU."""
    device = device_of(gpu)
    with (  # functions, for a Mock that returns a value takes the CPU microseconds
        mock.patch.object(registry, "why_not_triton", lambda *_: None),
        mock.patch.object(plan, "device_of", lambda _: device),
        mock.patch.object(precision, "device_of", lambda _: device),
    ):
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
    """The case's loss and its gradients."""
    made, kind = partial(torch.ones, device=device), DTYPES[dtype]
    wide = case.wide and kind.itemsize == 2 and not (case.rule and dtype == "float16")  # which is refused
    weights = made(k) if case.weighted else None
    head = tm.MarginSoftmaxLoss(
        d, k, case.margin(), class_weight=weights, device=device, dtype=torch.float32 if wide else kind, **case.options
    )
    if case.rule:
        low = {"state_dtype": head.weight.dtype} if head.weight.dtype == torch.bfloat16 else {}
        head.update_in_backward(RULES[case.rule](head.parameters(), **low, stochastic_rounding=bool(low)))
    ids = torch.arange(k // 2, device=device) if case.sampled else None
    x, target = made(n, d, dtype=kind).requires_grad_(), torch.arange(n, device=device) % (k // 2)
    with (
        torch.autocast(x.device.type, kind, enabled=wide), tm.use_backend("triton"),
        mock.patch.object(numbers, "hardest_of", of_the_first_class),
    ):  # fmt: skip
        loss = head(x, target, ids, case.statistics)
    loss = loss[0] if case.statistics else loss
    loss.backward(torch.ones_like(loss))


def of_the_first_class(inputs: PassInputs, spec: PassSpec, of: plan.Plan, *_: Any) -> tuple[Tensor, Tensor, Any]:
    """In place of what looks at numbers that no launch has written."""
    row = inputs.target.new_zeros(of.line, dtype=torch.int32)
    product, rows = row.float(), inputs.x.new_zeros((of.n, of.d), dtype=torch.float32)
    return product[: of.n], row[: of.n].long(), (row, rows, product)


def draws() -> Launches:
    """The three kernels that draw a tenth of the classes, launched as the library does: ids and state are int64."""
    with kept(False) as found:
        draw_kernels.draw_by_triton(torch.arange(N), torch.tensor([1, 0]), 0, C, C // 10)
    return {f"draw: {name}": launch for name, launch in found.items()}
