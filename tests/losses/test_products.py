"""How float32 is multiplied: one answer for a whole class pass, while torch has one setting for all threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from tritonmargin.backends.precision import as_operand, multiplying, precision

SETTING = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    before = SETTING.fp32_precision
    yield
    SETTING.fp32_precision = before


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("asked", ["ieee", "tf32"])
def test_products_are_made_as_asked_and_the_setting_comes_back(before: str, asked: str) -> None:
    SETTING.fp32_precision = before
    with multiplying(asked):
        assert (SETTING.fp32_precision == "tf32") == (asked == "tf32")
    assert SETTING.fp32_precision == before
    with pytest.raises(ZeroDivisionError), multiplying(asked):
        raise ZeroDivisionError
    assert SETTING.fp32_precision == before


def test_another_thread_sees_what_the_user_set() -> None:
    """Not what a class pass has set for the moment: it would take it for its own whole pass."""
    SETTING.fp32_precision = "ieee"
    inside, seen = threading.Event(), []

    def ask() -> None:
        inside.wait()
        seen.append(precision(torch.float32, "sm_90"))

    thread = threading.Thread(target=ask)
    thread.start()
    with multiplying("tf32"):
        inside.set()
        thread.join(0.2)  # it waits for the lock
        assert not seen
    thread.join()
    assert seen == ["ieee"]


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_torchs_setting_is_followed_by_gpus_that_have_tf32(setting: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        expected = "ieee" if setting == "highest" else "tf32"
        assert precision(torch.float32, "gfx942") == precision(torch.float32, "sm_80") == expected
        assert precision(torch.float32, "gfx90a") == precision(torch.bfloat16, "sm_90") == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_operands_are_rounded_to_tf32_where_they_would_be_cut_off() -> None:
    values = 1.0 + torch.arange(3) * 2.0**-11 * 0.75
    assert as_operand(values, torch.float32, "tf32") is values  # on a CPU nothing is cut off
    on_gpu = SimpleNamespace(is_cuda=True, to=lambda dtype: on_gpu, contiguous=lambda: values, view=values.view)
    assert as_operand(on_gpu, torch.float32, "tf32").tolist() == [1.0, 1.0, 1.0 + 2.0**-10]
    assert as_operand(on_gpu, torch.float32, "ieee") is on_gpu
