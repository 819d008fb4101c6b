"""Which backend is in use, and what happens where its kernels fail."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor  # the ops' annotations are looked up here too, where `falling_back` is

from tritonmargin.compiling import constant_result

if TYPE_CHECKING:
    from tritonmargin.backends.types import Backend
    from tritonmargin.optim.update_rules import RowUpdate

# Modules that have a `BACKEND`. "reference" is not one of them: it has no class pass.
MODULES = {"torch": "tritonmargin.backends.torch_backend", "triton": "tritonmargin.backends.triton"}
BACKENDS = (*MODULES, "reference")
LOADED: dict[str, Backend] = {}

F = TypeVar("F", bound=Callable[..., Any])

_failed = False  # a kernel did, in a call that left the choice to the library
_default = os.environ.get("TRITONMARGIN_BACKEND")
_stated: list[use_backend] = []  # choices for the process, the last one counts
_entered: list[use_backend] = []  # blocks that are open, of all threads
# What compiled code follows: a plain module variable, on which torch.compile guards. It knows no threads.
_latest = _default


class Blocks(threading.local):
    """The blocks that are open in a thread."""

    def __init__(self) -> None:
        self.names: list[str] = []


_here = Blocks()


class use_backend(contextlib.ContextDecorator):
    """Compute with backend `name`: from now on, in every thread; or in a with block, or a decorated function, alone.

        tm.use_backend("torch")

        with tm.use_backend("reference"):
            loss = head(embeddings, target)

    "triton": the kernels, for CUDA and ROCm tensors. "torch": the class pass in plain PyTorch, any device. "reference":
    full logits, to compare with. Without a choice the loss uses "triton" where it can and "torch" elsewhere. The
    environment variable TRITONMARGIN_BACKEND chooses for a process. A block is about its own thread, and about a
    backward that it starts; code compiled by torch.compile follows the block that was opened last in any thread.

    Raises:
        ValueError: an unknown name. A loss on tensors that the chosen backend does not work with raises too.
    """

    def __init__(self, name: str) -> None:
        check_name(name)
        self.name = name
        _stated[:] = [*_stated[-100:], self]  # until it is entered it is a statement
        follow()

    def __call__(self, function: F) -> F:
        self.is_block()
        return super().__call__(function)

    def __enter__(self) -> None:
        self.is_block()
        _here.names.append(self.name)
        _entered.append(self)
        follow()

    def __exit__(self, *error: object) -> None:
        _here.names.pop()
        _entered.remove(self)
        follow()

    def is_block(self) -> None:
        _stated[:] = [each for each in _stated if each is not self]
        follow()


def follow() -> None:
    global _latest
    _latest = _entered[-1].name if _entered else stated()


def stated() -> str | None:
    return _stated[-1].name if _stated else _default


def chosen() -> str | None:
    """The name that this thread computes with, if somebody chose."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() >= 0:
        return _latest  # autograd's threads have no blocks of their own
    return _here.names[-1] if _here.names else stated()


def current_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The backend's name that a loss on this device, computed in this dtype, uses now.

    Without a choice it is "auto" where the kernels can be used: they, and "torch" should they fail to compile.

    Raises:
        ValueError: the chosen backend is unknown, or is "triton" and cannot be used there; the reason is in the text.
    """
    name = chosen()
    if name is None:
        reason = why_not_triton(device, dtype)
        if reason and device.type == "cuda" and dtype != torch.float64:
            warn_once(reason)
        return "torch" if reason or _failed else "auto"
    check_name(name)
    reason = why_not_triton(device, dtype) if name == "triton" else None
    if reason:
        raise ValueError(f'the backend "triton" was chosen, but {reason}; the backend "torch" works there')
    return name


def check_name(name: str) -> None:
    if not isinstance(name, str) or name not in BACKENDS:
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


@constant_result
def missing(index: int | None) -> str | None:
    """What this machine lacks for the kernels: Triton, or a GPU that it compiles for."""
    return looked_for(index)


@functools.cache  # behind a function of its own: torch.compile warns of a cache that it meets
def looked_for(index: int | None) -> str | None:
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


@constant_result
@functools.cache
def warn_once(reason: str) -> None:
    warnings.warn(
        f'tritonmargin: the Triton kernels are not used, because {reason}. The backend "torch" takes their place, '
        "slower.",
        stacklevel=4,
    )


def load_backend(name: str) -> Backend:
    """The backend of this name; Triton is imported when it is first used."""
    name = "torch" if name == "auto" and _failed else "triton" if name == "auto" else name
    load(name)
    return LOADED[name]


@constant_result  # a compiler runs it: it cannot trace an import
def load(name: str) -> None:
    if name not in LOADED:
        LOADED[name] = importlib.import_module(MODULES[name]).BACKEND


class KernelError(RuntimeError):
    """A Triton kernel could not be compiled or launched."""


def backend_after(error: KernelError, name: str, update: RowUpdate | None = None) -> Backend:
    """The backend that takes over from `name`, one of whose kernels failed: "torch", with one warning.

    Raises:
        KernelError: nobody takes over, and what to do: the backend was asked for by name, or rows are updated already.
    """
    global _failed
    if name != "auto":
        raise KernelError(
            f"tritonmargin: a kernel failed ({error}). tm.use_backend('torch') does without the kernels; "
            "please report the error with the GPU's name and the versions of torch and triton."
        ) from error
    if update is not None and update.touched:
        raise KernelError(
            f"tritonmargin: a kernel failed in the middle of an update of the weight ({error}): some rows "
            "are updated and some are not. Load the last checkpoint and use tm.use_backend('torch')."
        ) from error
    warn_once(f"one of them failed ({error})")
    _failed = True
    return load_backend("torch")


def on_device(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, whatever the tensors' is."""
    return torch.cuda.device(x.device) if x.is_cuda and x.device.type == "cuda" else contextlib.nullcontext()


def falling_back(op: Callable[..., Any]) -> Callable[..., Any]:
    """An op on x, ..., backend, on x's device; a kernel that fails under "auto" leads to "torch" (`backend_after`)."""

    @functools.wraps(op)
    def run(x: Tensor, *args: Any) -> Any:
        with on_device(x):
            try:
                return op(x, *args)
            except KernelError as error:
                return op(x, *args[:-1], backend_after(error, args[-1]).name)

    return run
