"""Wrong arguments, in tables: a call, an argument, and values that it must refuse before it does anything."""

from __future__ import annotations

import contextlib
import traceback
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonmargin as tm
from tritonmargin.backends import registry

N, D, C = 6, 8, 11
PACKAGE = Path(tm.__file__).parent
HUGE = 1 << 70
NAN, INF = float("nan"), float("inf")

# Values that an argument of a kind must refuse.
FLAG = ("no", 1, 0, 1.5, None, torch.tensor(True))
INTEGER = (1.5, 2.0, "3", True, None, HUGE, [3], 1j)
NUMBER = ("0.5", True, None, NAN, INF, -INF, [0.5], 1j)
NAME = ("nonsense", "", None, 3, True, ["mean"])
PATH = (None, 3, "", ["folder"])


class Setting:
    """Everything that a wrong call might change."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.x = torch.randn(N, D, requires_grad=True)
        self.w = torch.randn(C, D, requires_grad=True)
        self.y = torch.tensor([0, 3, 10, 3, -100, 5])
        self.head = tm.MarginSoftmaxLoss(D, C, tm.ArcFace(m=0.3, s=16.0), sample_rate=0.6, bias=True)
        self.margins: dict[str, Any] = {
            "ArcFace": tm.ArcFace(), "CosFace": tm.CosFace(), "CombinedMargin": tm.CombinedMargin(1.1, 0.2, 0.1),
            "LSoftmax": tm.LSoftmax(m=3, lam=1.0), "ASoftmax": tm.ASoftmax(), "SphereFaceR": tm.SphereFaceR(),
            "L2Softmax": tm.L2Softmax(), "NormFace": tm.NormFace(), "Softmax": tm.Softmax(),
        }  # fmt: skip
        self.sgd = tm.optim.RowSGD([self.head.weight], lr=0.1, momentum=0.9)
        self.adamw = tm.optim.RowAdamW([self.head.bias], lr=0.1)
        self.head.weight.grad, self.head.bias.grad = torch.ones(C, D), torch.ones(C)

    def seen(self) -> Any:
        """All of it, as values that can be compared."""
        tensors = [self.x, self.w, self.y, self.x.grad, self.w.grad, *self.head.state_dict().values()]
        tensors += [self.head.weight.grad, self.head.bias.grad, torch.get_rng_state()]
        return plain(
            {
                "tensors": tensors,
                "versions": [None if each is None else each._version for each in tensors[:3]],
                "head": {name: value for name, value in vars(self.head).items() if name[0] != "_"},
                "updater": self.head._updater is None,
                "margin": [repr(self.head.margin), *map(repr, self.margins.values())],
                "schedules": [dict(margin._schedules) for margin in self.margins.values()],
                "optimizers": [self.sgd.state_dict(), self.adamw.state_dict()],
                "backend": (list(registry._stated), list(registry._entered), registry._latest),
                "torch": (torch.get_default_dtype(), torch.is_grad_enabled()),
                "files": sorted(str(path) for path in self.folder.rglob("*")),
            }
        )


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().tolist()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else repr(value)


@contextlib.contextmanager
def no_work() -> Iterator[None]:
    """No class pass starts, no sample is drawn."""
    refuse = unittest.mock.Mock(side_effect=AssertionError("work began before the argument was refused"))
    with contextlib.ExitStack() as stack:
        for place in ("loss.load_backend", "loss.by_reference", "sampling.draw", "reference.target_logit"):
            stack.enter_context(unittest.mock.patch(f"tritonmargin.{place}", refuse))
        yield


def check_refused(setting: Setting, call: Callable[[], object], word: str) -> None:
    """`call` raises an error of this package that says `word`, and nothing has changed."""
    before = setting.seen()
    with no_work(), pytest.raises((TypeError, ValueError, NotImplementedError)) as caught:
        call()
    assert type(caught.value) in (TypeError, ValueError, NotImplementedError)
    assert word in str(caught.value)
    where = Path(traceback.extract_tb(caught.value.__traceback__)[-1].filename)
    assert PACKAGE in where.parents, f"raised in {where}: {caught.value}"
    assert setting.seen() == before


def rows(table: dict[str, tuple[Any, ...]], call: str = "") -> list[Any]:
    """One case for each wrong value of each argument. `argument @ word`: the error has to say `word`."""
    cases = []
    for key, values in table.items():
        argument, _, word = key.partition(" @ ")
        for place, value in enumerate(values):
            name = f"{call}{argument}-{place}-{words(value)}"
            cases.append(pytest.param(argument, value, word or argument, id=name))
    return cases


def words(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        return f"{kind} {value.dtype} {value.device}".replace("torch.", "")
    return (
        repr(value)[:30]
        if isinstance(value, str | int | float | None | list | tuple | complex)
        else type(value).__name__
    )


def odd_tensors(shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Values that stand where a dense floating-point tensor of this shape has to."""
    good = torch.ones(shape)
    with warnings.catch_warnings():  # torch says of all of these that they are young, or old
        warnings.simplefilter("ignore")
        odd = [torch.nested.nested_tensor([good, good]), torch.quantize_per_tensor(good, 0.1, 0, torch.qint8)]
        odd += [good.to_sparse_csr(), good.to_mkldnn()] if len(shape) == 2 else []
    return (
        good.tolist(), "x", 3, good.numpy(), good.long(), good.bool(), good.to(torch.complex64), good[0], good[None],
        good.to(torch.float8_e4m3fn), good.to(torch.float8_e5m2), good.to_sparse(), good.to("meta"), nn.Identity(),
        *odd,
    )  # fmt: skip


# Values that a tensor of a loss must refuse.
Y = torch.tensor([0, 3, 10, 3, -100, 5])
LABELS = (
    None, Y.tolist(), Y.numpy(), Y.float(), Y.bool(), Y.to(torch.complex64), Y.to(torch.uint16), Y[:, None], Y[:5],
    Y[0], Y.to_sparse(), Y.to("meta"), torch.nested.nested_tensor([Y, Y], layout=torch.jagged), torch.rand(N, C),
    Y.clamp(min=0) + 1, torch.full((N,), -1), torch.full((N,), 1 << 40),
)  # fmt: skip
ROWS = (None, torch.randn(N, 0), torch.randn(N, D - 1), *odd_tensors((N, D)))
CLASS_ROWS = (None, torch.randn(0, D), torch.randn(C, D + 1), *odd_tensors((C, D)))
VECTOR = (torch.randn(C - 1), torch.randn(C, 1), 0.0, *odd_tensors((C,)))
IDS = (
    [0, 3, 5, 10], torch.tensor([0, 3, 5, 10], dtype=torch.int32), torch.tensor([0.0, 3.0, 5.0, 10.0]), 3,
    torch.tensor([[0, 3, 5, 10]]), torch.tensor([3, 0, 5, 10]), torch.tensor([0, 3, 3, 5, 10]),
    torch.tensor([-1, 0, 3, 5, 10]), torch.tensor([0, 3, 5, 10, 11]), torch.tensor([0, 3, 5]),
    torch.tensor([0, 3, 5, 10]).to("meta"), torch.tensor([0, 3, 5, 10]).to_sparse(), torch.ones(C, dtype=torch.bool),
)  # fmt: skip
