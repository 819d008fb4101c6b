"""The setting that torch's products follow while float16 is multiplied: torch has one for all threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from tritonmargin.backends import precision as products

ON_GPU = SimpleNamespace(is_cuda=True)
ON_CPU = SimpleNamespace(is_cuda=False)
SETTING = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    target = ["sm_90"]
    monkeypatch.setattr(products, "device_of", lambda x: SimpleNamespace(target=target[0]))
    before = SETTING.fp32_precision
    yield target
    SETTING.fp32_precision = before


def now() -> tuple[str, str]:
    """What torch's products follow, and what the kernels'."""
    return SETTING.fp32_precision, products.precision(torch.float32, "sm_90")


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_float16_is_multiplied_as_tf32_and_the_setting_comes_back(before: str) -> None:
    SETTING.fp32_precision = before
    outside = now()
    with products.products(torch.float16, ON_GPU, True):
        assert now() == ("tf32", "tf32")
    assert now() == outside
    with pytest.raises(ZeroDivisionError), products.products(torch.float16, ON_GPU, True):
        raise ZeroDivisionError
    assert now() == outside


def test_other_passes_and_machines_leave_it_alone(gpu: list[str]) -> None:
    SETTING.fp32_precision = "ieee"
    for dtype, x in ((torch.float32, ON_GPU), (torch.bfloat16, ON_GPU), (torch.float16, ON_CPU)):
        with products.products(dtype, x, True):
            assert now() == ("ieee", "ieee")
    with products.products(torch.float16, ON_GPU, False):  # not by the kernels
        assert now() == ("ieee", "ieee")
    gpu[0] = "gfx90a"
    with products.products(torch.float16, ON_GPU, True):
        assert now() == ("ieee", "ieee")
    gpu[0] = "gfx942"
    with products.products(torch.float16, ON_GPU, True):
        assert now() == ("tf32", "tf32")


def test_a_pass_keeps_its_precision_whatever_is_set_meanwhile() -> None:
    SETTING.fp32_precision = "tf32"
    with products.products(torch.float32, ON_GPU, True):
        SETTING.fp32_precision = "ieee"
        assert now() == ("ieee", "tf32")
        with products.products(torch.float32, ON_GPU, True):
            assert now() == ("ieee", "ieee")
        assert now() == ("ieee", "tf32")
    assert now() == ("ieee", "ieee")


def test_the_last_of_several_threads_puts_the_setting_back() -> None:
    """The first to leave takes nothing from the others, and a float32 walk beside them keeps its own."""
    SETTING.fp32_precision = "ieee"
    begun, done = threading.Barrier(3, timeout=60), threading.Barrier(3, timeout=60)
    seen: dict[str, list[tuple[str, str]]] = {"float16": [], "float32": []}

    def half() -> None:
        with products.products(torch.float16, ON_GPU, True):
            begun.wait()
            done.wait()
            seen["float16"].append(now())

    def single() -> None:
        with products.products(torch.float32, ON_GPU, True):
            begun.wait()
            seen["float32"].append(now())
            done.wait()

    threads = [threading.Thread(target=each) for each in (half, single)]
    with products.products(torch.float16, ON_GPU, True):
        for thread in threads:
            thread.start()
        begun.wait()
    done.wait()
    for thread in threads:
        thread.join()
    assert seen == {"float16": [("tf32", "tf32")], "float32": [("tf32", "ieee")]}
    assert now() == ("ieee", "ieee")


def test_operands() -> None:
    assert products.operands(torch.float16) == torch.float32
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert products.operands(dtype) == dtype
