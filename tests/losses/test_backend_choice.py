"""Which backend a loss uses: chosen for the process, for a block, in a thread; unknown names are refused at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from cases import cpu_only
from torch._dynamo.testing import CompileCounter

import tritonmargin as tm
from tritonmargin.backends import registry

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    kept = list(registry._stated)
    yield
    registry._stated[:] = kept
    registry.follow()
    assert not registry._entered


def chosen() -> str:
    return registry.current_backend(CPU, torch.float32)


@cpu_only
def test_a_statement_is_about_the_process_and_a_block_about_itself() -> None:
    tm.use_backend("reference")
    assert chosen() == "reference"
    seen: list[str] = []
    with tm.use_backend("torch"):
        assert chosen() == "torch"
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == ["reference"]  # another thread follows the statement, not this thread's block
    assert chosen() == "reference"
    tm.use_backend("torch")
    assert chosen() == "torch"


@cpu_only
def test_a_block_can_be_entered_again_and_decorate_a_function() -> None:
    block = tm.use_backend("reference")
    for _ in range(2):
        with block:
            assert chosen() == "reference"
        assert chosen() == "torch"
    assert tm.use_backend("reference")(chosen)() == "reference"
    assert chosen() == "torch"


@pytest.mark.parametrize("name", ["nonsense", "", "auto", None, 3])
def test_an_unknown_name_is_refused_at_once_and_changes_nothing(name: object) -> None:
    before = chosen()
    with pytest.raises(ValueError, match="'torch', 'triton', 'reference'"):
        tm.use_backend(name)  # type: ignore[arg-type]
    assert chosen() == before


@cpu_only
def test_interleaved_blocks_of_two_threads_end_as_they_began() -> None:
    turns = [threading.Event() for _ in range(3)]
    seen: dict[str, str] = {}

    def first() -> None:
        with tm.use_backend("reference"):
            turns[0].set()
            turns[1].wait(10)
            seen["first"] = chosen()
        turns[2].set()

    def second() -> None:
        turns[0].wait(10)
        with tm.use_backend("torch"):
            turns[1].set()
            turns[2].wait(10)  # the first block ends inside of this one
            seen["second"] = chosen()

    threads = [threading.Thread(target=each) for each in (first, second)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert seen == {"first": "reference", "second": "torch"}
    assert registry._latest is registry.stated()
    assert chosen() == "torch"


@cpu_only
def test_compiled_code_follows_a_later_choice() -> None:
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def step(x: torch.Tensor) -> torch.Tensor:
        return x + len(registry.current_backend(x.device, x.dtype))

    x = torch.zeros(())
    assert step(x) == len("torch")
    with tm.use_backend("reference"):
        assert step(x) == len("reference")
    assert step(x) == len("torch")
    tm.use_backend("reference")
    assert step(x) == len("reference")
    assert counter.frame_count == 2


@cpu_only
def test_a_backward_recomputes_with_the_backend_of_its_block() -> None:
    seen: list[str] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        seen.append(chosen())
        return x.sin()

    x = torch.ones(3, requires_grad=True)
    with tm.use_backend("reference"):
        torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False).sum().backward()
    assert seen == ["reference"] * 2
