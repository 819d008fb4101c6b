"""Bad input gets an error that names the argument, before any work."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from tritonmargin.arguments import FLOATS
from tritonmargin.class_pass.op import seen_as_ops
from tritonmargin.margins import Margin
from tritonmargin.spec import LossInputs

# What a caller calls the tensors of a loss.
NAMES = {name: name for name in LossInputs._fields}


def check_inputs(inputs: LossInputs, sharded: bool, names: Mapping[str, str] = NAMES) -> None:
    """Everything that shapes, dtypes and devices can tell. What labels hold is looked at in `positions`."""
    x, w = names["embeddings"], names["weight"]
    check_matrix(x, inputs.embeddings, "[N, D]")
    check_matrix(w, inputs.weight, "[C, D]")
    n, d = inputs.embeddings.shape
    classes, width = inputs.weight.shape
    if width != d:
        raise ValueError(f"{x} and {w} must have the same width D, got {d} and {width}")
    if d < 1 or (classes < 1 and not sharded):
        raise ValueError(f"{w} must have at least one class and one column, got shape {(classes, width)}")
    check_integers("target", inputs.target)
    if inputs.target.ndim != 1 or inputs.target.shape[0] != n:
        raise ValueError(f"target must have shape [N] = [{n}], got {tuple(inputs.target.shape)}")
    for name in ("bias", "class_weight"):
        vector = getattr(inputs, name)
        if vector is not None:
            check_class_vector(names[name], vector, classes)
    if inputs.class_ids is not None:
        check_ids(inputs.class_ids)
    device = inputs.embeddings.device
    for name in ("weight", "target", "bias", "class_ids", "class_weight"):
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{names[name]} is on {tensor.device}, {x} on {device}: use one device")
    if device.type == "meta":
        raise NotImplementedError(f"{x} and all else are on the meta device: a loss needs numbers, or FakeTensorMode")


def check_replaced(name: str, parameter: Tensor | None, shape: tuple[int, ...], num_classes: int) -> None:
    """A head's parameter that somebody may have replaced by one of another size."""
    # Inside of torch's older FSDP a parameter is a vector without a shape of its own.
    if parameter is not None and parameter.ndim == len(shape) and parameter.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(parameter.shape)}, and this head of {num_classes} classes needs {shape}: make a "
            "new head for other classes, or load a checkpoint into it with resize='grow'"
        )


def check_margin(margin: Margin) -> None:
    if not isinstance(margin, Margin):
        raise TypeError(f"margin must be a tritonmargin Margin such as tm.ArcFace(), got {margin!r}")


def check_ids(class_ids: Tensor) -> None:
    check_tensor("class_ids", class_ids)
    if class_ids.dtype != torch.int64 or class_ids.ndim != 1:
        raise TypeError(
            f"class_ids must be a 1-D int64 tensor, got {class_ids.dtype} of shape {tuple(class_ids.shape)}"
        )


def check_no_scaler(dtype: torch.dtype) -> None:
    """float16 autocast goes with a GradScaler, which is found out too late."""
    if dtype == torch.float16:
        raise ValueError(
            "update_in_backward under float16 autocast: a GradScaler would scale the rows' update. Use bfloat16, "
            "or sparse_grad=True without update_in_backward"
        )


def check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"{name} is a DTensor: a loss takes plain tensors. For classes that are split over ranks make a "
            f"MarginSoftmaxLoss with process_group=; or pass {name}.full_tensor(), which gathers it"
        )
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch._")
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one")


def check_matrix(name: str, tensor: Tensor, shape: str) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if tensor.ndim != 2:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def check_class_vector(name: str, vector: Tensor, classes: int) -> None:
    check_tensor(name, vector)
    if vector.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {vector.dtype}")
    if tuple(vector.shape) != (classes,):
        raise ValueError(f"{name} must have shape [C] = [{classes}], got {tuple(vector.shape)}")


def check_integers(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{name} must hold integer class numbers, got {tensor.dtype}")


def check_sorted_ids(class_ids: Tensor, num_classes: int) -> None:
    """ValueError unless ids are sorted, unique and class numbers. Waits for the device."""
    if not len(class_ids):
        return
    if not bool((class_ids[1:] > class_ids[:-1]).all()):
        raise ValueError("class_ids must be sorted and unique")
    lowest, highest = int(class_ids[0]), int(class_ids[-1])
    if lowest < 0 or highest >= num_classes:
        raise ValueError(f"class_ids must be in [0, {num_classes}), got values from {lowest} to {highest}")


def looks_at_values(device: torch.device) -> bool:
    """Whether labels are checked: on the CPU always, elsewhere with TRITONMARGIN_DEBUG=1, as it waits for them."""
    return device.type == "cpu" or os.environ.get("TRITONMARGIN_DEBUG", "0") not in ("", "0")


def outside(target: Tensor, num_classes: int, ignore_index: int) -> Tensor | None:
    """Whether some label is no class, on the device; None where `positions` looks."""
    if looks_at_values(target.device):
        return None
    return ((target != ignore_index) & ((target < 0) | (target >= num_classes))).any()


def positions(target: Tensor, class_ids: Tensor | None, num_classes: int, ignore_index: int) -> Tensor:
    """Each target's position in the pass, int64, -1 where it is ignored.

    An operator, so that a compiled step checks too, where somebody has to see one: a call of it costs more time than
    what it does to a small batch.

    Raises:
        ValueError: a label out of range or not in class_ids, ids not sorted. Checked on the CPU always, on other
            devices with TRITONMARGIN_DEBUG=1, because looking means waiting for them.
    """
    found = positions_op if seen_as_ops((target, class_ids)) else find_positions
    return found(target, class_ids, num_classes, ignore_index)


def find_positions(target: Tensor, class_ids: Tensor | None, num_classes: int, ignore_index: int) -> Tensor:
    label = target.to(torch.int64, copy=True)
    valid = label != ignore_index
    careful = looks_at_values(target.device)
    if careful and not all_classes(label, num_classes):
        wrong = label[valid & ((label < 0) | (label >= num_classes))]
        if len(wrong):
            raise ValueError(
                f"target holds class number {int(wrong[0])}, expected 0 <= target < {num_classes} "
                f"or ignore_index = {ignore_index}"
            )
    if class_ids is None:
        return label.masked_fill_(~valid, -1)
    if careful:
        check_sorted_ids(class_ids, num_classes)
    row = torch.searchsorted(class_ids, label)
    if careful:
        found = class_ids[row.clamp(max=len(class_ids) - 1)] == label if len(class_ids) else torch.zeros_like(valid)
        missing = label[valid & ~found]
        if len(missing):
            raise ValueError(
                f"target {int(missing[0])} is not in class_ids: every target must be among the active classes "
                "(tm.sample_classes keeps them)"
            )
    return row.masked_fill_(~valid, -1)


def all_classes(label: Tensor, num_classes: int) -> bool:
    """Whether no label needs a closer look: all are classes, ignored or not."""
    lowest, highest = label.aminmax() if len(label) else (0, 0)
    return int(lowest) >= 0 and int(highest) < num_classes


positions_op = torch.library.custom_op("tritonmargin::positions", find_positions, mutates_args=())


@positions_op.register_fake
def _(target, class_ids, num_classes, ignore_index):  # type: ignore[no-untyped-def]
    return target.new_empty(target.shape, dtype=torch.int64)
