"""What compilers are told of a function, without importing them: torch._dynamo takes as long to import as torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._compile import _disable_dynamo

F = TypeVar("F", bound=Callable[..., Any])


def constant_result(function: F) -> F:
    """`torch.compiler.assume_constant_result`: what it returns when a step is compiled is part of the graph."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def untraced(function: F) -> F:
    """`torch.compiler.disable`, which imports torch._dynamo in the first call."""
    return _disable_dynamo(function)  # type: ignore[return-value]
