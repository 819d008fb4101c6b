"""Every launch of our kernels that is compiled, counted or tuned here, by name.

The only file of perf/ that looks into the kernels' backend. A case is a loss that somebody may ask for: the library
computes it and its gradients, and the launches are kept instead of made. Inside `compile.compiling_for` a launch that
is called then compiles and does not run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

import tritonmargin as tm
from perf.kernels.gpus import Gpu
from perf.suite.problem import matmul_precision
from perf.suite.steps import Loss, TrainingStep
from tritonmargin import sampling
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
    loss: Loss = Loss()
    sampled: bool = False  # half of the classes
    samples: int | None = None  # at most


STEP = ("rows", "classes", "reduce", "loss", "sum", "extremes", "half", "weigh", "finish", "back")
TILES = (*TILED, "finish")
BIAS, HINGE = dict(bias=True), dict(objective="hinge")
EVERYTHING = Loss(tm.ASoftmax, BIAS | dict(label_smoothing=0.1, reduction="none"), weighted=True)
UPDATED = EVERYTHING._replace(wide=True)
CASES = {  # what differs from a step of ArcFace whose W and embeddings have the dtype of the products
    "": Case(STEP),
    "sgd": Case(("finish",), Loss(optimizer="momentum")),
    "adamw": Case(("finish",), Loss(optimizer="adamw")),
    "raw rows": Case((*TILES, "back"), Loss(tm.Softmax)),
    "raw rows and bias": Case(("classes", *TILES), Loss(tm.Softmax, BIAS)),
    "bias": Case(("classes", *TILES), Loss(options=BIAS)),
    "label smoothing": Case(("classes", *TILES, "half", "loss"), Loss(options=dict(label_smoothing=0.1))),
    "a sample, W in float32": Case(("rows", "classes", *TILES), Loss(wide=True), sampled=True),
    "everything": Case(("rows", "classes", "loss", "upstream", *TILES, "back"), EVERYTHING),
    "everything, sgd": Case(("finish",), UPDATED._replace(optimizer="momentum"), sampled=True),
    "everything, adamw": Case(("finish",), UPDATED._replace(optimizer="adamw"), sampled=True),
    "numbers": Case(("numbers", "gradients"), Loss(tm.LSoftmax, BIAS | dict(objective="lse-hinge"))),
    "statistics": Case(("reduce",), Loss(statistics=True)),
    "offset": Case(("classes", *TILED), Loss(options=dict(logq_correction=True)), sampled=True),
    "max-hinge": Case(("reduce", "finish", "back"), Loss(options=dict(objective="max-hinge"))),
    "hinge": Case(TILED, Loss(options=HINGE)),
    "hinge and bias": Case(TILES, Loss(options=BIAS | HINGE)),
    "hinge, bias, statistics": Case(("reduce",), Loss(options=BIAS | HINGE, statistics=True)),
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


def nothing(*_: object) -> None:
    pass


@contextlib.contextmanager
def on(gpu: Gpu) -> Iterator[None]:
    """Losses of CPU tensors are planned and launched as on this GPU."""
    device = device_of(gpu)

    def there(tensor: Tensor) -> tiles.Device:  # not a Mock that returns it: those take the CPU microseconds
        return device

    with contextlib.ExitStack() as patches:
        for module in (registry, sampling):
            patches.enter_context(mock.patch.object(module, "why_not_triton", nothing))
        for module in (plan, precision):
            patches.enter_context(mock.patch.object(module, "device_of", there))
        yield


@contextlib.contextmanager
def with_tile(tile: Tiles, gpu: Gpu) -> Iterator[None]:
    """The kernels take this tile instead of the table's; its programs are those of a processor, as in the table."""
    taken, fresh = tile._replace(programs=tile.programs * gpu.processors), plan.make_plan.__wrapped__
    with mock.patch.object(plan, "pick_tiles", return_value=taken), mock.patch.object(plan, "make_plan", fresh):
        yield


@contextlib.contextmanager
def launching(launch: Callable[..., object], add_product: Callable[..., object] = nothing) -> Iterator[None]:
    """Inside, launches are told to `launch` as (kernel, *args, **options), and products of torch are not made."""
    with (
        mock.patch.object(JITFunction, "run", launch),
        mock.patch.object(products, "multiply", nothing),
        mock.patch.object(products, "add_product", add_product),
    ):
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
            run(case, dtype, n, d, k, device)
        for kernel in case.kernels:
            if kernel in made:
                found[f"{kernel}, {name}" if name else kernel] = made[kernel]
    return found


def run(case: Case, dtype: str, n: int, d: int, k: int, device: str) -> None:
    """A step of the case, by the kernels."""
    loss, kind = case.loss, DTYPES[dtype]
    if kind.itemsize == 4 or (loss.optimizer and dtype == "float16"):  # which autocast does not have, and is refused
        loss = loss._replace(wide=False)
    step = TrainingStep(loss, min(n, case.samples or n), d, k, kind, device)
    step.target %= k // 2
    step.class_ids = torch.arange(k // 2, device=device) if case.sampled else None
    with tm.use_backend("triton"), mock.patch.object(numbers, "hardest_of", of_the_first_class):
        step()


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
