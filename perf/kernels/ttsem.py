"""ttsem in a GPU's place: kernels are compiled for a compute capability and executed on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

MISSING = (
    "ttsem is not installed: pip install '.[kernels]' on Python 3.12 or later; on 3.11: "
    "pip install --no-deps --ignore-requires-python ttsem==0.1.0"
)


@contextmanager
def played(capability: int = 90) -> Iterator[Any]:
    """Tensors say that they are on the GPU, and launches run here; what ttsem saw."""
    try:
        from ttsem import harness, sanitize
    except ModuleNotFoundError as error:
        raise RuntimeError(MISSING) from error

    parse, capturing = harness.mlir.parse, torch.cuda.is_current_stream_capturing
    harness.mlir.parse = functools.lru_cache(maxsize=1000)(parse)  # a launch like an earlier one is parsed once
    torch.cuda.is_current_stream_capturing = lambda: False  # it has no graphs
    try:
        with sanitize.session(cc=capability) as state:
            yield state
    finally:
        harness.mlir.parse, torch.cuda.is_current_stream_capturing = parse, capturing
