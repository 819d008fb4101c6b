"""The kernels that draw a sample of the classes, against the torch code that draws the same; conftest.py says where."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from cases import DEVICE, MACHINE, combinations
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tritonmargin as tm
from tritonmargin import permutation
from tritonmargin.backends import registry as kernels
from tritonmargin.backends.registry import KernelError
from tritonmargin.sampling import Sampler, draw, draw_by_torch

if MACHINE == "cpu":
    pytest.skip("kernels run on a GPU, under ttsem or in the interpreter", allow_module_level=True)

from tritonmargin.backends.triton import draw_kernels
from tritonmargin.backends.triton.draw_kernels import draw_by_triton

# (C, S, N, first class), and why.
SIZES = {
    "one class and no sample": (1, 0, 0, 0),
    "two classes": (2, 1, 1, 3),
    "points beyond": (7, 6, 6, 1),
    "as many labels as samples": (100, 50, 50, 9),
    "no labels": (1000, 130, 0, 4),
    "one past every block": (4095, 513, 129, 5),
    "six rounds": (10_007, 1030, 300, 1 << 33),
    "few of many": (100_000_000, 200, 190, 17),
    "classes past 32 bits": (30_000_000_017, 64, 64, 12_345_678_901),
}
LABELS = {
    "any": lambda c, n: torch.randint(c, (n,)),
    "some out of range": lambda c, n: torch.randint(-3, c + 3, (n,)),
    "all equal": lambda c, n: torch.full((n,), min(2, c - 1)),
    "none": lambda c, n: -1 - torch.arange(n),
    "far out of range": lambda c, n: torch.tensor([-(1 << 63), (1 << 63) - 1, 0])[torch.arange(n) % 3],
}


@combinations(("size", "labels"), SIZES, LABELS)
def test_the_kernels_draw_what_torch_draws(size: str, labels: str) -> None:
    c, s, n, first = SIZES[size]
    torch.manual_seed(1)
    target = LABELS[labels](c, n).to(DEVICE)
    for state in ((0, 0), (1 << 61, 1000), (-5, 7)):
        state = torch.tensor(state, device=DEVICE)
        found = draw_by_triton(target, state, first, c, s)
        assert torch.equal(found, draw_by_torch(target, state, first, c, s))
        assert len(found) == s
        assert torch.isin(target[(target >= 0) & (target < c)], found).all()


@pytest.mark.usefixtures("to_the_end")
def test_points_that_walk_more_than_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sides that leave as many points beyond the classes as there are classes."""
    c, s = 37, 30
    target, state = torch.tensor([36, 5, 5, -1], device=DEVICE), torch.tensor([1, 2], device=DEVICE)
    close = draw_by_triton(target, state, 0, c, s)
    monkeypatch.setattr(permutation, "sides", lambda size: (6, 12))
    far = draw_by_triton(target, state, 0, c, s)
    assert torch.equal(far, draw_by_torch(target, state, 0, c, s))
    assert not torch.equal(close, far)
    assert bool((far[1:] > far[:-1]).all())
    assert far[-1] == 36


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels that are launched from now on."""
    launch, found = draw_kernels.call, []

    def call(kernel: Any, *args: Any, **options: Any) -> None:
        found.append(kernel)
        launch(kernel, *args, **options)

    monkeypatch.setattr(draw_kernels, "call", call)
    return found


class Calls(TorchDispatchMode):
    """Operations that a device has to do something for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        poison = name == "fill_" and torch.are_deterministic_algorithms_enabled()  # see conftest.py
        if not func.is_view and not poison and not name.startswith(("empty", "new_empty")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n", [20, 0])
def test_a_draw_takes_at_most_eight_calls_of_the_device(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []  # and not run: what plays a GPU computes with torch
    monkeypatch.setattr(draw_kernels, "call", lambda kernel, *args, **options: launched.append(kernel))
    state, target = torch.tensor([1, 2], device=DEVICE), torch.arange(n, device=DEVICE) * 7
    with Calls() as calls:
        sampler = Sampler(0.1, state)
        sampler.draw(target, 1000)
        sampler.advance()
    assert sorted(calls.names) == ["add_", "draw"]
    launched.clear()
    with Calls() as calls:
        draw_by_triton(target, state, 0, 1000, 100)  # what is in the op
    assert len(launched) == (3 if n else 1)
    assert sorted(calls.names) == (["cumsum", "sort", "sort", "sort"] if n else ["sort"])


def test_a_sampler_draws_the_same_on_every_device_and_backend(launched: list[Any]) -> None:
    """The kernels where a loss would use them, and none where it would not."""
    target = torch.tensor([3, 90, -1, 17])

    def drawn(device: str, backend: str | None) -> tuple[Tensor, int]:
        launched.clear()
        sampler = Sampler(0.1, torch.tensor([7, 4], device=device), 200)
        if backend is None:
            return sampler.draw(target.to(device), 1000).cpu(), len(launched)
        with tm.use_backend(backend):
            return sampler.draw(target.to(device), 1000).cpu(), len(launched)

    expected, launches = drawn("cpu", "torch")
    assert launches == 0
    for device, backend, kernels_used in (
        (DEVICE, None, 3), (DEVICE, "triton", 3), (DEVICE, "torch", 0), (DEVICE, "reference", 0),
    ):  # fmt: skip
        found, launches = drawn(device, backend)
        assert torch.equal(found, expected)
        assert launches == kernels_used


def test_a_kernel_that_fails_leads_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise KernelError("no such card")

    state, target = torch.tensor([1, 2], device=DEVICE), torch.tensor([5, 6], device=DEVICE)
    expected = draw(target, state, 0, 100, 10)
    monkeypatch.setattr(draw_kernels, "call", broken)
    monkeypatch.setattr(kernels, "_failed", False)
    kernels.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="one of them failed .no such card"):
        assert torch.equal(draw(target, state, 0, 100, 10), expected)
    monkeypatch.setattr(kernels, "_failed", False)
    with tm.use_backend("triton"), pytest.raises(KernelError, match="no such card"):
        draw(target, state, 0, 100, 10)


def test_the_size_of_a_sample_compiles_nothing(pytestconfig: pytest.Config) -> None:
    """Nor the number of labels, the first class, or the number of classes: but for small ones, with their rounds."""
    if not MACHINE.startswith("ttsem"):
        pytest.skip("asks ttsem what was compiled")
    state = torch.tensor([1, 2], device=DEVICE)

    def drawn(n: int, s: int, c: int, first: int) -> None:
        draw_by_triton(torch.arange(n, device=DEVICE), state, first, c, s)

    drawn(20, 100, 5000, 0)
    before = pytestconfig.ttsem_modules()
    for n, s, c, first in ((1, 1, 10_000, 1), (128, 256, 9999, 16), (300, 700, 123_456, 777)):
        drawn(n, s, c, first)
    assert pytestconfig.ttsem_modules() == before


def test_a_draw_in_a_graph_is_another_one_in_every_replay() -> None:
    if MACHINE != "cuda":
        pytest.skip("graphs need a GPU")
    state, target = torch.tensor([1, 0], device=DEVICE), torch.arange(40, device=DEVICE) * 7
    sampler = Sampler(0.2, state)
    sampler.draw(target, 500)  # kernels are compiled
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = sampler.draw(target, 500)
        sampler.advance()
    for step in range(3):
        graph.replay()
        assert torch.equal(ids, draw_by_torch(target, torch.tensor([1, step], device=DEVICE), 0, 500, 100))


def test_what_the_kernels_share_with_torch_is_one_text() -> None:
    """No constant of the permutation is written twice."""
    source = inspect.getsource(draw_kernels)
    assert "0x" not in source
