"""Backends: the four functions of the stream, and which one is in use."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from types import ModuleType

import torch

# The stream's backends, modules of the same four functions. "reference" is not one of them: it never streams.
STREAMS = {"torch": "tritonmargin.kernels.torch_ops", "triton": "tritonmargin.kernels.triton_ops"}
BACKENDS = (*STREAMS, "reference")

# A plain module variable: torch.compile guards on it, so a compiled step follows a later change.
_chosen: str | None = os.environ.get("TRITONMARGIN_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute with backend `name` inside the block, in every thread; TRITONMARGIN_BACKEND does so for a process.

    "triton": the kernels, for CUDA and ROCm tensors. "torch": the stream in plain PyTorch, any device. "reference":
    full logits, to compare with. Without a choice the loss uses "triton" where it can and "torch" elsewhere.

    Raises:
        ValueError: an unknown name. A loss on tensors that the chosen backend does not work with raises too.
    """
    global _chosen
    check_name(name)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def current_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The backend's name that a loss on this device, computed in this dtype, uses now.

    Raises:
        ValueError: the chosen backend is unknown, or is "triton" and cannot be used there; the reason is in the text.
    """
    if _chosen is None:
        return "torch" if why_not_triton(device, dtype) else "triton"
    check_name(_chosen)
    reason = why_not_triton(device, dtype) if _chosen == "triton" else None
    if reason:
        raise ValueError(f'the backend "triton" was chosen, but {reason}; the backend "torch" works there')
    return _chosen


def check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(map(repr, BACKENDS))}")


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps the kernels from working with tensors of this kind; None: nothing."""
    if dtype == torch.float64:
        return "it does not compute in float64"
    if device.type == "cuda":
        return missing(device.index)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return missing(None)
    return f"it needs tensors on a CUDA or ROCm device, got {device.type!r}"


@torch.compiler.assume_constant_result
@functools.cache
def missing(index: int | None) -> str | None:
    """What this machine lacks for the kernels: Triton, or a GPU that it compiles for."""
    try:
        import triton
    except ImportError:
        return 'Triton is not installed (pip install "triton>=3.6")'
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        return f"Triton {triton.__version__} is installed and 3.6 is the oldest that works"
    if index is not None and not torch.version.hip and torch.cuda.get_device_capability(index) < (8, 0):
        name = torch.cuda.get_device_name(index)
        return f"{name} has a compute capability below 8.0, the lowest that the kernels are compiled for"
    return None


@functools.cache
def load_backend(name: str) -> ModuleType:
    """The module of a backend; Triton is imported when it is first used."""
    return importlib.import_module(STREAMS[name])
