"""Bad input gets an error that names the argument, before any work."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonmargin.margins import Margin
from tritonmargin.objectives import OBJECTIVES

if TYPE_CHECKING:
    from tritonmargin.optim import RowOptimizer

REDUCTIONS = ("mean", "sum", "none")


def check_call(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: Margin,
    bias: Tensor | None,
    class_ids: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    objective: str,
    sub_centers: int,
    retain_bytes: int,
    chunk_bytes: int | None,
    logq_correction: bool = False,
    updater: RowOptimizer | None = None,
    sharded: bool = False,
) -> None:
    """Everything that shapes, dtypes and devices can tell. What labels hold is looked at in `positions`."""
    check_matrix("embeddings", embeddings, "[N, D]")
    check_matrix("weight", weight, "[C, D]")
    n, d = embeddings.shape
    classes = weight.shape[0]
    if weight.shape[1] != d:
        raise ValueError(f"embeddings and weight must have the same width D, got {d} and {weight.shape[1]}")
    if d < 1 or (classes < 1 and not sharded):
        raise ValueError(f"weight must have at least one class and one column, got shape {tuple(weight.shape)}")
    check_integers("target", target)
    if target.ndim != 1 or target.shape[0] != n:
        raise ValueError(f"target must have shape [N] = [{n}], got {tuple(target.shape)}")
    for name, vector in (("bias", bias), ("class_weight", class_weight)):
        if vector is not None:
            check_class_vector(name, vector, classes)
    if class_ids is not None:
        check_tensor("class_ids", class_ids)
        if class_ids.dtype != torch.int64 or class_ids.ndim != 1:
            raise TypeError(
                f"class_ids must be a 1-D int64 tensor, got {class_ids.dtype} of shape {tuple(class_ids.shape)}"
            )
    for name, tensor in (
        ("weight", weight),
        ("target", target),
        ("bias", bias),
        ("class_ids", class_ids),
        ("class_weight", class_weight),
    ):
        if tensor is not None and tensor.device != embeddings.device:
            raise ValueError(f"{name} is on {tensor.device}, embeddings on {embeddings.device}: use one device")
    check_options(margin, label_smoothing, reduction, objective, sub_centers)
    check_sampling(logq_correction, label_smoothing, objective)
    if updater is not None:
        updater.check_weight(weight)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
    for name, size in (("retain_bytes", retain_bytes), ("chunk_bytes", 1 if chunk_bytes is None else chunk_bytes)):
        if isinstance(size, bool) or not isinstance(size, int) or size < (name == "chunk_bytes"):
            raise ValueError(f"{name} must be a number of bytes, an integer >= 0 (chunk_bytes: >= 1), got {size!r}")


def check_options(margin: Margin, label_smoothing: float, reduction: str, objective: str, sub_centers: int) -> None:
    """The options that a module can check when it is made."""
    if not isinstance(margin, Margin):
        raise TypeError(f"margin must be a tritonmargin Margin such as tm.ArcFace(), got {margin!r}")
    check_name("reduction", reduction, REDUCTIONS)
    check_name("objective", objective, tuple(OBJECTIVES))
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, int | float):
        raise TypeError(f"label_smoothing must be a number, got {label_smoothing!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    if label_smoothing and objective != "softmax":
        raise ValueError(f"label_smoothing is defined for objective 'softmax' only, got objective {objective!r}")
    if sub_centers != 1:
        raise ValueError(f"sub_centers is 1 in this version, got {sub_centers!r}")


def check_sampling(logq_correction: bool, label_smoothing: float, objective: str) -> None:
    """What the correction of a sample's sum of exp(z) goes with."""
    if not logq_correction:
        return
    if objective not in ("softmax", "lse-hinge"):
        raise ValueError(
            f"logq_correction is for the logsumexp of objectives 'softmax' and 'lse-hinge', got objective {objective!r}"
        )
    if label_smoothing:
        raise ValueError("logq_correction with label_smoothing is not defined: the smoothed part is a mean, not a sum")


def check_no_scaler(dtype: torch.dtype) -> None:
    """float16 autocast goes with a GradScaler, which is found out too late."""
    if dtype == torch.float16:
        raise ValueError(
            "update_in_backward under float16 autocast: a GradScaler would scale the rows' update. Use bfloat16, "
            "or sparse_grad=True without update_in_backward"
        )


def check_name(argument: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, known))}, got {value!r}")


def check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")


def check_matrix(name: str, tensor: Tensor, shape: str) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if tensor.ndim != 2:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def check_class_vector(name: str, vector: Tensor, classes: int) -> None:
    check_tensor(name, vector)
    if not vector.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {vector.dtype}")
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


@torch.library.custom_op("tritonmargin::positions", mutates_args=())
def positions(target: Tensor, class_ids: Tensor | None, num_classes: int, ignore_index: int) -> Tensor:
    """Each target's position in the walk, int64, -1 where it is ignored. An op, so that a compiled step checks too.

    Raises:
        ValueError: a label out of range or not in class_ids, ids not sorted. Checked on the CPU always, on other
            devices with TRITONMARGIN_DEBUG=1, because looking means waiting for them.
    """
    label = target.to(torch.int64, copy=True)
    kept = label != ignore_index
    careful = looks_at_values(target.device)
    if careful:
        wrong = label[kept & ((label < 0) | (label >= num_classes))]
        if len(wrong):
            raise ValueError(
                f"target holds class number {int(wrong[0])}, expected 0 <= target < {num_classes} "
                f"or ignore_index = {ignore_index}"
            )
    if class_ids is None:
        return label.masked_fill_(~kept, -1)
    if careful:
        check_sorted_ids(class_ids, num_classes)
    row = torch.searchsorted(class_ids, label)
    if careful:
        found = class_ids[row.clamp(max=len(class_ids) - 1)] == label if len(class_ids) else torch.zeros_like(kept)
        missing = label[kept & ~found]
        if len(missing):
            raise ValueError(
                f"target {int(missing[0])} is not in class_ids: every target must be among the walked classes "
                "(tm.sample_classes keeps them)"
            )
    return row.masked_fill_(~kept, -1)


@positions.register_fake
def _(target, class_ids, num_classes, ignore_index):  # type: ignore[no-untyped-def]
    return target.new_empty(target.shape, dtype=torch.int64)
