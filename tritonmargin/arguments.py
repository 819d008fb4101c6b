"""Arguments that are no tensors: what does not fit gets an error that names the argument, before any work.

A wrong type is a TypeError, a wrong value of a right type a ValueError.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what weights and embeddings may be
LARGEST = (1 << 63) - 1  # of torch's integers
MAX = sys.float_info.max
REAL: Any = Real  # its comparison with a float has no type


def check_name(argument: str, value: object, known: Iterable[str]) -> None:
    if not (isinstance(value, str) and value in known):
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, known))}, got {value!r}")


def check_flag(argument: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{argument} must be True or False, got {value!r}")


def check_integer(argument: str, value: object, lowest: int | None = None, words: str = "an integer") -> None:
    """An int that torch can hold, at least `lowest`."""
    words = words if lowest is None else f"{words} >= {lowest}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} must be {words}, got {value!r}")
    if lowest is not None and value < lowest:
        raise ValueError(f"{argument} must be {words}, got {value}")
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{argument} must be {words}, of 64 bits, got {value}")


def check_number(argument: str, value: Any, words: str, lowest: float = -MAX, highest: float = MAX) -> None:
    """A finite real number in a range, which `words` describe."""
    if isinstance(value, bool) or not isinstance(value, REAL):
        raise TypeError(f"{argument} must be {words}, got {value!r}")
    if not lowest <= value <= highest:
        raise ValueError(f"{argument} must be {words}, got {value}")


def check_bytes(argument: str, size: object, lowest: int = 0) -> None:
    check_integer(argument, size, lowest, "a number of bytes, an integer")


def check_dtype(argument: str, dtype: object, known: tuple[torch.dtype, ...] = FLOATS) -> None:
    words = ", ".join(str(each).removeprefix("torch.") for each in known)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{argument} must be one of torch's dtypes {words}, got {dtype!r}")
    if dtype not in known:
        raise ValueError(f"{argument} must be one of torch's dtypes {words}, got {dtype}")


def check_device(argument: str, device: object) -> None:
    try:
        torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{argument} must be a torch device, got {device!r}: {error}") from None


def check_path(argument: str, path: object) -> None:
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise TypeError(f"{argument} must be a path, got {path!r}")
