"""Wrong arguments of optimizers, clipping and checkpoints. Named at once, nothing done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs import FLAG, HUGE, INF, INTEGER, NAME, NAN, NUMBER, PATH, C, D, Setting, check_refused, rows
from cases import cpu_only
from torch import nn

import tritonmargin as tm

pytestmark = cpu_only

AT_LEAST_ZERO = (*NUMBER, -1.0, HUGE**20)
GROUP: dict[str, tuple[Any, ...]] = {
    "lr": AT_LEAST_ZERO,
    "weight_decay": AT_LEAST_ZERO,
    "unsampled": NAME,
    "state_dtype": (torch.int8, torch.float16, torch.float8_e4m3fn, torch.complex64, "float32", 32, float, True),
    "stochastic_rounding": FLAG,
    "seed": (*INTEGER, -HUGE),
}
PARAMETERS = (
    [nn.Parameter(torch.ones(2, 2, 2))], [nn.Parameter(torch.tensor(1.0))],
    [nn.Parameter(torch.ones(C, D).to_sparse())],
    [nn.Parameter(torch.ones(C, D, dtype=torch.complex64))], [nn.Parameter(torch.ones(C, D).to(torch.float8_e5m2))],
    [nn.Parameter(torch.ones(C, D, dtype=torch.int64), requires_grad=False)],
)  # fmt: skip
SGD = GROUP | {"momentum": AT_LEAST_ZERO, "nesterov": (*FLAG, True)}
ADAMW = GROUP | {
    "eps": AT_LEAST_ZERO,
    "betas": (
        (0.9,), (0.9, 0.99, 0.999), (0.9, 1.0), (-0.1, 0.9), (NAN, 0.9), (0.9, INF), (True, 0.9), ("0.9", 0.99), "ab",
        0.9, None, {0.9: 1, 0.99: 2}, torch.tensor([0.9, 0.99]), (), (0.9, None),
    ),
}  # fmt: skip
PARAMS = {"params": (None, 3, "weight", b"weight", [3], ["weight"], [None], [], torch.ones(C, D), *PARAMETERS)}
CLIP = {
    "parameters": (None, 3, [3], ["weight"], [None], 1.5),
    "max_norm": ("1", None, True, NAN, -1.0, -INF, [1.0], 1j, torch.ones(2)),
    "norm_type": ("2", None, True, NAN, -1.0, 0, -INF, [2], 1j),
    "error_if_nonfinite": FLAG,
    "foreach": tuple(each for each in FLAG if each is not None),
}
STEP = (*INTEGER, -1)
GROUPS = ("world", 3, True, object())
SAVE = {
    "folder": PATH,
    "state": (None, 3, [], "state", torch.ones(2), nn.Identity()),
    "step": STEP,
    "group": GROUPS,
    "keep": (*INTEGER, 0, -1),
    "asynchronous": FLAG,
}
LOAD = {
    "folder": PATH,
    "state": SAVE["state"],
    "step": tuple(each for each in STEP if each is not None),
    "group": GROUPS,
    "resize": ("shrink", "", 3, True, 1.5, ["grow"]),
}
EXPORT = {
    "head": (None, 3, "head", nn.Linear(D, C), torch.ones(C, D), tm.MarginSoftmaxLoss),
    "path": PATH,
    "dtype": (torch.float64, torch.int8, torch.float8_e4m3fn, "float32", 32, float),
    "chunk_classes": (*INTEGER, 0, -1),
}
IMPORT = {"folder": PATH, "head": EXPORT["head"]}
STATES = (None, 3, "state", [], {}, {"state": {}}, {"param_groups": []}, torch.ones(2))


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


@pytest.mark.parametrize(("argument", "value", "word"), rows(SGD | PARAMS))
def test_row_sgd(argument: str, value: Any, word: str, setting: Setting) -> None:
    given = dict(params=[setting.w], lr=0.1) | {argument: value}
    check_refused(setting, lambda: tm.optim.RowSGD(**given), word)


@pytest.mark.parametrize(("argument", "value", "word"), rows(ADAMW | PARAMS))
def test_row_adamw(argument: str, value: Any, word: str, setting: Setting) -> None:
    given = dict(params=[setting.w]) | {argument: value}
    check_refused(setting, lambda: tm.optim.RowAdamW(**given), word)


@pytest.mark.parametrize(("argument", "value", "word"), rows(ADAMW | {"params": PARAMETERS}))
def test_a_group_that_is_added(argument: str, value: Any, word: str, setting: Setting) -> None:
    group = dict(params=[setting.w]) | {argument: value}
    check_refused(setting, lambda: setting.adamw.add_param_group(group), word)


@pytest.mark.parametrize(("argument", "value", "word"), rows(SGD))
def test_a_group_that_is_loaded(argument: str, value: Any, word: str, setting: Setting) -> None:
    state = tm.optim.RowSGD([setting.head.weight], lr=0.5).state_dict()
    state["param_groups"][0][argument] = value
    check_refused(setting, lambda: setting.sgd.load_state_dict(state), word)


@pytest.mark.parametrize("state", STATES, ids=[type(each).__name__ + str(i) for i, each in enumerate(STATES)])
def test_a_state_that_is_none(state: Any, setting: Setting) -> None:
    check_refused(setting, lambda: setting.sgd.load_state_dict(state), "state_dict")


@pytest.mark.parametrize("closure", [3, "closure", torch.ones(2), True], ids=repr)
def test_a_closure_that_is_none(closure: Any, setting: Setting) -> None:
    check_refused(setting, lambda: setting.sgd.step(closure), "closure")


@pytest.mark.parametrize(("argument", "value", "word"), rows(CLIP))
def test_clip_grad_norm(argument: str, value: Any, word: str, setting: Setting) -> None:
    given = dict(parameters=setting.head.parameters(), max_norm=0.1) | {argument: value}
    check_refused(setting, lambda: tm.clip_grad_norm_(**given), word)


@pytest.mark.parametrize(("argument", "value", "word"), rows(SAVE))
def test_save(argument: str, value: Any, word: str, setting: Setting) -> None:
    given = dict(folder=setting.folder / "new", state={"head": setting.head.state_dict()}, step=3) | {argument: value}
    check_refused(setting, lambda: tm.checkpoint.save(**given), word)


@pytest.mark.parametrize(("argument", "value", "word"), rows(LOAD))
def test_load(argument: str, value: Any, word: str, setting: Setting) -> None:
    state = {"head": setting.head.state_dict()}
    tm.checkpoint.save(setting.folder, {"head": {key: 2 * each for key, each in state["head"].items()}}, 3)
    given = dict(folder=setting.folder, state=state) | {argument: value}
    check_refused(setting, lambda: tm.checkpoint.load(**given), word)


@pytest.mark.parametrize(("argument", "value", "word"), rows(EXPORT))
def test_export_centers(argument: str, value: Any, word: str, setting: Setting) -> None:
    given = dict(head=setting.head, path=setting.folder / "centers.safetensors") | {argument: value}
    check_refused(setting, lambda: tm.checkpoint.export_centers(**given), word)


@pytest.mark.parametrize(("argument", "value", "word"), rows(IMPORT))
def test_import_insightface(argument: str, value: Any, word: str, setting: Setting) -> None:
    torch.save(torch.ones(C, D), setting.folder / "rank_0_softmax_weight.pt")
    given = dict(folder=setting.folder, head=setting.head) | {argument: value}
    check_refused(setting, lambda: tm.checkpoint.import_insightface(**given), word)
