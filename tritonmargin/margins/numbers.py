"""A margin's numbers: Python floats that a module keeps, and the tensors that formulas read them from."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")


class Numbers(nn.Module):
    """A module with numbers that may change at run time, such as m and s.

    A number is a Python float in the module's dictionary. That is what reading gives, and what copies, pickles and
    loaders keep. Neither `state_dict()` nor `buffers()` has it: a checkpoint must not change another margin's numbers.

    Formulas take it from `tensor`, one for each device, which a change fills in place. So compiled code is not compiled
    again, a captured CUDA graph sees the change, and nothing is copied to a GPU in a step that changes nothing.

    A number may be learned: an nn.Parameter, or another tensor that somebody differentiates, stays a tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        # By name: its tensors by device, made when they are needed. None: it is learned, its attribute is the tensor.
        self._held: dict[str, dict[torch.device, Tensor] | None] = {}

    def number(self, name: str, value: float | Tensor) -> None:
        """Make `self.<name>` a number with this value, checked by `check_number` now and whenever it is set.

        Raises:
            TypeError: not a number.
            ValueError: a number that `check_number` refuses, or not finite.
        """
        self._held.setdefault(name, None)
        setattr(self, name, value)

    def check_number(self, name: str, value: float) -> None:
        """Raise ValueError if `value` cannot be the number `name`."""
        if not math.isfinite(value):
            raise ValueError(f"{type(self).__name__}: {name} must be a finite number, got {value}")

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """The number as a 0-dim tensor on `device`, in float64 (float32 on MPS); the learned tensor where it is one.

        Under torch.compile that of the CPU, if nothing has asked for the device's before: operations take it as well.
        """
        held = self._held[name]
        if held is None:
            learned: Tensor = getattr(self, name)
            return learned
        if torch.compiler.is_compiling():
            found = None if torch.compiler.is_exporting() else held.get(device, held.get(CPU))
            return self._made(name, device) if found is None else found  # an exported program has constants
        if torch._C._len_torch_dispatch_stack():
            return self._made(name, device)  # a mode has tensors of its own
        found = held.get(device)
        return self._hold(name, device) if found is None else found

    def _made(self, name: str, device: torch.device) -> Tensor:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.full((), getattr(self, name), dtype=dtype, device=device)

    def _hold(self, name: str, device: torch.device) -> Tensor:
        """The number as a new tensor, which is kept for the next ones who ask."""
        with torch.inference_mode(False):  # autograd could not save it for backward
            found = self._made(name, device)
        held = self._held[name]
        # Memory of a graph under capture holds nothing until the graph runs; a fake tensor never does.
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if held is None or capturing or type(found) is not Tensor:
            return found
        return held.setdefault(device, found)

    # -- however it is set -----------------------------------------------------------------------------------------

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # such as `head.margin.m`, which some margins have

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dict__.get("_held", ()):
            super().__setattr__(name, value)
        elif isinstance(value, Tensor) and is_differentiated(value):
            self._check_learned(name, value)
            super().__setattr__(name, value)
            self._held[name] = None
        else:
            self._fill(name, self._settable(name, value))

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name in self._held:
            self._held[name] = None

    def _settable(self, name: str, value: object) -> float:
        """`value` as the float to set.

        Raises:
            TypeError, ValueError: it cannot be the number `name`, or a parameter stands there.
        """
        found = self._checked(name, value)
        if name in self._parameters:
            raise TypeError(
                f"{type(self).__name__}: {name} is a parameter. Change it under torch.no_grad(), or delete it before "
                "you set a number"
            )
        return found

    def _checked(self, name: str, value: object) -> float:
        found = as_float(value)
        if found is None:
            raise TypeError(f"{type(self).__name__}: {name} must be a number, got {value!r}")
        self.check_number(name, found)
        return found

    def _check_learned(self, name: str, value: Tensor) -> None:
        if value.numel() != 1 or not value.is_floating_point():
            raise TypeError(
                f"{type(self).__name__}: {name} must be a number, or a floating-point tensor of one number, "
                f"got {value.dtype} of shape {list(value.shape)}"
            )
        if is_readable(value):
            self._checked(name, value.detach())

    def _fill(self, name: str, value: float) -> None:
        held, before = self._held[name], self.__dict__.get(name)
        self.__dict__[name] = value
        if held is None:
            self._held[name] = {}
            self._hold(name, CPU)
        elif value != before:
            for tensor in held.values():
                tensor.fill_(value)

    # -- copies and moves ------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # A copy has tensors of its own.
        return {**self.__dict__, "_held": {name: None if held is None else {} for name, held in self._held.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        values = self.__dict__.pop("_values", None)
        if values is not None:  # pickled when the numbers were buffers
            self._held = {}
            for name, value in {**values, "s": self.__dict__.get("s")}.items():
                self._buffers.pop(name, None)
                self.number(name, self._parameters.get(name, value))
        for name, held in self._held.items():
            if held is not None:
                self._hold(name, CPU)

    def _apply(self, fn: Any, recurse: bool = True) -> Numbers:
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device="cpu")).device
        if device.type != "meta":
            # Before a step is compiled or captured.
            for name in self._held:
                self.tensor(name, device)
        return self


def as_float(value: object) -> float | None:
    """A real number, or a tensor or array that holds one, as a float; None for anything else."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 and is_readable(value) else None
    elif getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def is_differentiated(value: Tensor) -> bool:
    """Whether somebody differentiates or maps it, so that a float in its place would be another program."""
    return (
        isinstance(value, nn.Parameter)
        or value.requires_grad
        or torch._C._functorch.is_functorch_wrapped_tensor(value)
        or torch.autograd.forward_ad.unpack_dual(value).tangent is not None
    )


def is_readable(value: Tensor) -> bool:
    """Whether it has a value now."""
    plain = type(value) in (Tensor, nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    return plain and not value.is_meta and not torch._C._len_torch_dispatch_stack()
