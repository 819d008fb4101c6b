"""Wrong arguments of a head: when it is made, called, changed and given an optimizer. Named at once, nothing done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs import FLAG, HUGE, IDS, INTEGER, LABELS, NAME, NUMBER, ROWS, VECTOR, C, D, Setting, check_refused, rows
from cases import cpu_only
from torch import nn

import tritonmargin as tm

pytestmark = cpu_only

OPTIONAL = tuple(each for each in INTEGER if each is not None)
CHOICE = tuple(each for each in NAME if each is not None)
DTYPES = (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e8m0fnu, "float32", 32, float)
OPTIONS: dict[str, tuple[Any, ...]] = {
    "sample_rate": (*NUMBER, -0.1, 1.1, HUGE),
    "logq_correction": FLAG,
    "sparse_grad": FLAG,
    "retain_bytes": (*INTEGER, -1),
    "chunk_bytes": (*OPTIONAL, 0, -1),
    "memory_budget": (*OPTIONAL, -1),
    "on_nonfinite": CHOICE,
    "ignore_index": INTEGER,
    "label_smoothing": (*NUMBER, -0.1, 1.1, HUGE),
    "reduction": NAME,
    "objective": NAME,
}
MADE = OPTIONS | {
    "embedding_dim": (*INTEGER, 0, -1),
    "num_classes": (*INTEGER, 0, -1),
    "margin": ("arcface", tm.ArcFace, nn.Identity(), 0.5, True),
    "sub_centers": (*INTEGER, 0, 2, -1),
    "bias": FLAG,
    "process_group": ("world", 3, True, object(), [0, 1]),
    "gradient_for": NAME,
    "class_weight": VECTOR,
    "seed": (*INTEGER, -HUGE),
    "device": ("nowhere", 1.5, [0], "", object()),
    "dtype": DTYPES,
}
CALLED = {"embeddings": ROWS, "target": LABELS, "class_ids": IDS, "return_stats": FLAG}


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


@pytest.mark.parametrize(("argument", "value", "word"), rows(MADE))
def test_a_head_that_is_made(argument: str, value: Any, word: str, setting: Setting) -> None:
    given = dict(embedding_dim=D, num_classes=C) | {argument: value}
    check_refused(setting, lambda: tm.MarginSoftmaxLoss(**given), word)


@pytest.mark.parametrize(("argument", "value", "word"), rows(CALLED))
def test_a_head_that_is_called(argument: str, value: Any, word: str, setting: Setting) -> None:
    given = dict(embeddings=setting.x, target=setting.y) | {argument: value}
    check_refused(setting, lambda: setting.head(**given), word)


@pytest.mark.parametrize(("argument", "value", "word"), rows(OPTIONS))
def test_a_head_that_is_changed(argument: str, value: Any, word: str, setting: Setting) -> None:
    """Either when it is set, or in the next call, which draws no sample."""
    if argument == "sample_rate":
        return check_refused(setting, lambda: setattr(setting.head, argument, value), word)
    setattr(setting.head, argument, value)
    return check_refused(setting, lambda: setting.head(setting.x, setting.y), word)


@pytest.mark.parametrize("value", ["sgd", True, 3, tm.optim.RowSGD, torch.optim.SGD, nn.Identity()])
def test_update_in_backward(value: Any, setting: Setting) -> None:
    check_refused(setting, lambda: setting.head.update_in_backward(value), "update_in_backward")


def test_update_in_backward_by_an_optimizer_of_something_else(setting: Setting) -> None:
    others = (torch.optim.SGD([setting.head.weight], lr=0.1), tm.optim.RowSGD([nn.Parameter(torch.ones(C, D))], lr=0.1))
    for other in others:
        check_refused(setting, lambda each=other: setting.head.update_in_backward(each), "update_in_backward")
