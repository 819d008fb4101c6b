"""What decides about a loss and has to be alike on all ranks, as one number that travels with the batch sizes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from tritonmargin.margins import Margin
from tritonmargin.spec import LossOptions

PLAIN = (float, int, bool, str)


class Settings(NamedTuple):
    """What decides about one loss."""

    margin: Margin
    options: LossOptions
    sample_rate: float
    also: Mapping[str, object]  # what else the head was told

    def named(self, look: bool) -> dict[str, object]:
        """By name.

        look: whether values of tensors count, which waits for their device. Otherwise numbers that are learned are left
        out.
        """
        options = self.options
        return {
            "reduction": options.reduction,
            "objective": options.objective,
            "label_smoothing": options.label_smoothing,
            "ignore_index": options.ignore_index,
            "logq_correction": options.logq_correction,
            "sample_rate": self.sample_rate,
            **margin_settings("margin", self.margin, look),
            **self.also,
        }


def margin_settings(prefix: str, margin: Margin, look: bool) -> dict[str, object]:
    """A margin's kind, its plain attributes, its numbers, and those of margins inside of it."""
    own = margin.__dict__
    found: dict[str, object] = {prefix: type(margin).__qualname__}
    for name, value in own.items():
        if type(value) in PLAIN and name[0] != "_" and name != "training":
            found[f"{prefix}.{name}"] = value
    tensors: dict[str, Any] = {**own["_buffers"], **own["_parameters"]} if look else {}
    for name, each in tensors.items():
        if each is not None and each.ndim == 0:
            found[f"{prefix}.{name}"] = number(each)
    for name, inner in own["_modules"].items():
        if isinstance(inner, Margin):
            found |= margin_settings(f"{prefix}.{name}", inner, look)
    return found


def number(tensor: Tensor) -> object:
    """Its value; what is on no device has none."""
    return None if tensor.is_meta else tensor.detach().item()


class Fingerprint:
    """A number below 2^56 of settings, the same in every process that has the same; made when they have changed."""

    def __init__(self) -> None:
        self.settings: dict[str, object] = {}
        self.number = 0

    def of(self, settings: dict[str, object]) -> int:
        if settings != self.settings:
            words = [
                (name, float(value) if isinstance(value, int | float) else value) for name, value in settings.items()
            ]
            self.number = int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=7).digest(), "big")
            self.settings = settings
        return self.number


def words_of(margin: Margin) -> str:
    """What ranks compare: the margin as it is printed, its plain attributes, its schedules."""
    shown = (*margin.number_names, "s", "training")
    plain = {
        name: value
        for name, value in sorted(vars(margin).items())
        if isinstance(value, int | float | str) and not name.startswith("_") and name not in shown
    }
    schedules = dict(sorted(margin._schedules.items()))
    words = f"{margin!r}" + (f" with {plain}" if plain else "") + (f" scheduled {schedules}" if schedules else "")
    return re.sub(r" at 0x[0-9a-fA-F]+", "", words)  # addresses in memory differ between ranks
