"""Buffers that several processes of one machine use: W and the optimiser's state of a size exist once.

An anonymous file in memory (memfd) has no name and no limit of its own, and goes when its last user goes.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def file_of(size: int) -> Iterator[str]:
    """The path of a file of `size` bytes, for this process and those that it starts."""
    if hasattr(os, "memfd_create"):
        number = os.memfd_create("tritonmargin-perf")
        try:
            os.ftruncate(number, size)
            yield f"/proc/{os.getpid()}/fd/{number}"
        finally:
            os.close(number)
        return
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(size)
        yield file.name


def tensor_of(path: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """The file's content, shared with everyone who opens it."""
    count = 1
    for length in shape:
        count *= length
    return torch.from_file(path, shared=True, size=count, dtype=dtype).view(shape)
