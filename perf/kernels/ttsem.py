"""ttsem in a GPU's place: kernels are compiled for a compute capability and executed on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

MISSING = (
    "ttsem is not installed: pip install '.[kernels]' on Python 3.12 or later; on 3.11: "
    "pip install --no-deps --ignore-requires-python ttsem==0.1.0"
)


@contextmanager
def played(capability: int = 90) -> Iterator[Any]:
    """Tensors say that they are on the GPU, and launches run here; what ttsem saw."""
    try:
        from ttsem import sanitize
    except ModuleNotFoundError as error:
        raise RuntimeError(MISSING) from error

    with (
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),  # it has no graphs
        sanitize.session(cc=capability) as state,
    ):
        yield state
