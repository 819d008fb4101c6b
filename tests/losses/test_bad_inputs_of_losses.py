"""Wrong arguments of the losses as functions and of sample_classes: named at once, nothing done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs import (
    CLASS_ROWS,
    FLAG,
    HUGE,
    IDS,
    INTEGER,
    LABELS,
    NAME,
    NUMBER,
    ROWS,
    VECTOR,
    C,
    D,
    Setting,
    check_refused,
    rows,
)
from cases import cpu_only
from torch import nn

import tritonmargin as tm

pytestmark = cpu_only

OPTIONS: dict[str, tuple[Any, ...]] = {
    "ignore_index": INTEGER,
    "label_smoothing": (*NUMBER, -0.1, 1.1, HUGE),
    "reduction": NAME,
}
LOSS = {
    "embeddings": ROWS,
    "weight": CLASS_ROWS,
    "target": LABELS,
    "margin": (None, "arcface", tm.ArcFace, nn.Identity(), 0.5),
    "bias": VECTOR,
    "class_ids": IDS,
    "class_weight": VECTOR,
    **OPTIONS,
    "objective": NAME,
    "sub_centers": (*INTEGER, 0, 2, -1),
    "sparse_grad": FLAG,
    "return_stats": FLAG,
    "logq_correction": FLAG,
    "retain_bytes": (*INTEGER, -1),
    "chunk_bytes": (*(each for each in INTEGER if each is not None), 0, -1),
    "memory_budget": (*(each for each in INTEGER if each is not None), -1),
}
LINEAR = {
    "input": ROWS,
    "linear_weight": CLASS_ROWS,
    "target": LABELS,
    "linear_bias": VECTOR,
    "weight": VECTOR,
    **OPTIONS,
    "ignore_index": tuple(each for each in INTEGER if each is not None),
}
SAMPLE = {
    "target": (*LABELS[:8], LABELS[9], LABELS[10], LABELS[12], LABELS[13], "x"),
    "num_classes": (*INTEGER, 0, -1),
    "num_samples": (*INTEGER, -1, C + 1),
    "generator": (0, "seed", 1.5, torch.Generator),
}


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


@pytest.mark.parametrize(("argument", "value", "word"), rows(LOSS))
def test_margin_cross_entropy(argument: str, value: Any, word: str, setting: Setting) -> None:
    given = dict(embeddings=setting.x, weight=setting.w, target=setting.y, margin=tm.ArcFace()) | {argument: value}
    check_refused(setting, lambda: tm.margin_cross_entropy(**given), word)


@pytest.mark.parametrize(("argument", "value", "word"), rows(LOSS))
def test_the_reference(argument: str, value: Any, word: str, setting: Setting) -> None:
    given = dict(embeddings=setting.x, weight=setting.w, target=setting.y, margin=tm.ArcFace()) | {argument: value}
    check_refused(setting, lambda: tm.reference.margin_cross_entropy(**given), word)


@pytest.mark.parametrize(("argument", "value", "word"), rows(LINEAR))
def test_linear_cross_entropy(argument: str, value: Any, word: str, setting: Setting) -> None:
    given = dict(input=setting.x, linear_weight=setting.w, target=setting.y) | {argument: value}
    check_refused(setting, lambda: tm.linear_cross_entropy(**given), word)


@pytest.mark.parametrize(("argument", "value", "word"), rows(SAMPLE))
def test_sample_classes(argument: str, value: Any, word: str, setting: Setting) -> None:
    given = dict(target=setting.y, num_classes=C, num_samples=7) | {argument: value}
    check_refused(setting, lambda: tm.sample_classes(**given), word)


@pytest.mark.parametrize(("wrong", "word"), [
    (dict(label_smoothing=0.1, objective="hinge"), "label_smoothing"),
    (dict(label_smoothing=0.1, logq_correction=True), "logq_correction"),
    (dict(logq_correction=True, objective="max-hinge"), "logq_correction"),
])  # fmt: skip
def test_options_that_do_not_go_together(wrong: dict[str, Any], word: str, setting: Setting) -> None:
    margin = tm.ArcFace()
    for loss in (tm.margin_cross_entropy, tm.reference.margin_cross_entropy):
        check_refused(setting, lambda loss=loss: loss(setting.x, setting.w, setting.y, margin, **wrong), word)


def test_everything_on_the_meta_device(setting: Setting) -> None:
    x, w, y = (tensor.to("meta") for tensor in (setting.x, setting.w, setting.y))
    head = tm.MarginSoftmaxLoss(D, C, sample_rate=0.5, device="meta")
    for call, word in (
        (lambda: tm.margin_cross_entropy(x, w, y, tm.ArcFace()), "embeddings"),
        (lambda: tm.linear_cross_entropy(x, w, y), "input"),
        (lambda: tm.reference.margin_cross_entropy(x, w, y, tm.Softmax()), "embeddings"),
        (lambda: head(x, y), "embeddings"),
    ):
        check_refused(setting, call, f"{word} and all else are on the meta device")


def test_labels_of_a_single_sample(setting: Setting) -> None:
    for target in (torch.tensor(C), torch.tensor(-1), torch.tensor(1.0), torch.tensor([1])):
        check_refused(setting, lambda y=target: tm.linear_cross_entropy(setting.x[0], setting.w, y), "")


@pytest.mark.parametrize("name", ["nonsense", "", None, 3, True, b"torch", ["torch"], "Torch"])
def test_use_backend(name: Any, setting: Setting) -> None:
    check_refused(setting, lambda: tm.use_backend(name), "backend")
