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
def played(capability: int = 90, to_the_end: bool = False) -> Iterator[Any]:
    """Tensors say that they are on the GPU, and launches run here; what ttsem saw, and `modules`, what it executed.

    to_the_end: kernels are compiled down to machine code, not only to the module that is executed.
    """
    try:
        from ttsem import sanitize

        from perf.kernels.modules import made_once
    except ModuleNotFoundError as error:
        raise RuntimeError(MISSING) from error

    with (
        made_once(to_the_end) as modules,
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),  # it has no graphs
        sanitize.session(cc=capability) as state,
    ):
        state.modules = modules
        yield state
