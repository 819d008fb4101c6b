"""Backends: the four functions of the stream, and which one is in use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType

from tritonmargin.kernels import torch_ops

# The stream's backends. "reference" is not one of them: it never streams, see tritonmargin.reference.
STREAMS: dict[str, ModuleType] = {"torch": torch_ops}
BACKENDS = (*STREAMS, "reference")

# A plain module variable: torch.compile guards on it, so a compiled step follows a later change.
_chosen: str | None = os.environ.get("TRITONMARGIN_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute with backend `name` inside the block, in every thread; TRITONMARGIN_BACKEND does so for a process.

    "torch": the stream in plain PyTorch, any device. "reference": full logits, to compare with. Without a choice the
    loss uses "torch". The Triton kernels ("triton") are not part of this version.

    Raises:
        ValueError: an unknown name, or one this version does not have.
    """
    global _chosen
    check_backend(name)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def current_backend() -> str:
    """The backend's name that a call of the loss uses now."""
    if _chosen is None:
        return "torch"
    check_backend(_chosen)
    return _chosen


def check_backend(name: str) -> None:
    if name == "triton":
        raise ValueError(f"the Triton kernels are not available in this version; use one of {BACKENDS}")
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(map(repr, BACKENDS))}")
