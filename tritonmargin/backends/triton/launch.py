"""Launching kernels: one way to do it, its errors, and Triton's cache."""

from __future__ import annotations

import errno
import os
import tempfile
import warnings
from typing import Any

import torch
import triton

from tritonmargin.backends.registry import KernelError


def writable_cache() -> None:
    """Triton keeps what it compiles on disk; where it cannot, this process gets a folder of its own."""
    folder = triton.knobs.cache.dir
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        private_cache(error)


def private_cache(error: OSError) -> None:
    folder = triton.knobs.cache.dir
    triton.knobs.cache.dir = tempfile.mkdtemp(prefix="tritonmargin-")
    warnings.warn(
        f"tritonmargin: Triton's cache {error.filename or folder} cannot be written ({error.strerror}); kernels are "
        "compiled again in every process. Set TRITON_CACHE_DIR to a folder that can.",
        stacklevel=3,
    )


def unwritable(error: BaseException | None) -> OSError | None:
    """What of the error says that a place in Triton's cache cannot be written, if anything does."""
    while error is not None:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # which writing says without a name
            closed = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
            if full or (closed and str(error.filename).startswith(triton.knobs.cache.dir)):
                return error
        error = error.__cause__ or error.__context__
    return None


writable_cache()


def call(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Launch; whatever keeps a kernel from being compiled or launched is a `KernelError`."""
    try:
        try:
            kernel[(programs,)](*args, **options)
        except Exception as error:
            # In a cache that can be written, a kernel's own folder may still belong to somebody else.
            forbidden = unwritable(error)
            if forbidden is None:
                raise
            private_cache(forbidden)
            kernel[(programs,)](*args, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise KernelError(f"{type(error).__name__}: {str(error).strip()[-500:]}") from error


def blocks(size: int, block: int) -> int:
    """How many blocks cover so much. triton.cdiv takes microseconds of the CPU."""
    return -(-size // block)
