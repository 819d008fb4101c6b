"""Wrong numbers and choices of margins and schedules, given or set later. Named at once, nothing done."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs import HUGE, INF, NAME, NAN, NUMBER, Setting, check_refused, rows
from cases import cpu_only

import tritonmargin as tm

pytestmark = cpu_only

TENSORS = (torch.ones(2), torch.tensor(NAN), torch.tensor(1j), torch.ones(1, device="meta"), torch.tensor(True))
ANY = (*NUMBER, *TENSORS)
SCALE = (*ANY, 0, -1.0, HUGE**20)
ANGLE = (*ANY, -0.1, 3.2, 28.6, HUGE)
WHOLE = (*ANY, 0, -3, 1.5)
MARGINS: dict[str, dict[str, tuple[Any, ...]]] = {
    "ArcFace": {"m": ANGLE, "s": SCALE, "beyond_pi": NAME, "gradient": NAME},
    "CosFace": {"m": (*ANY, HUGE**20), "s": SCALE},
    "CombinedMargin": {
        "m1": (*ANY, 0, -1.0), "m2": ANGLE, "m3": (*ANY, -0.1), "s": SCALE, "beyond_pi": NAME, "gradient": NAME,
    },
    "LSoftmax": {"m": WHOLE, "lam": (*ANY, -0.1)},
    "ASoftmax": {"m": WHOLE, "lam": (*ANY, -0.1)},
    "SphereFaceR": {"m": (*ANY, 0.9, -2), "s": SCALE, "gradient": NAME},
    "L2Softmax": {"s": SCALE},
    "NormFace": {"s": SCALE},
}  # fmt: skip
EVERY = [pytest.param(name, *case.values, id=case.id) for name in MARGINS for case in rows(MARGINS[name], name + ".")]
STEP = ("3", None, NAN, INF, [1], 1j)
SCHEDULES = {
    "start": NUMBER,
    "stop": NUMBER,
    "steps": (*NUMBER, -1),
    "base": (*NUMBER, -1),
    "gamma": (*NUMBER, -1),
    "power": (*NUMBER, -1),
    "minimum": (*NUMBER, -1),
}


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


@pytest.mark.parametrize(("name", "argument", "value", "word"), EVERY)
def test_a_margin_that_is_made(name: str, argument: str, value: Any, word: str, setting: Setting) -> None:
    check_refused(setting, lambda: getattr(tm, name)(**{argument: value}), word)


@pytest.mark.parametrize(("name", "argument", "value", "word"), EVERY)
def test_a_margin_that_is_changed(name: str, argument: str, value: Any, word: str, setting: Setting) -> None:
    check_refused(setting, lambda: setattr(setting.margins[name], argument, value), word)


@pytest.mark.parametrize("flag", ["unit_embeddings", "unit_weight"])
@pytest.mark.parametrize("value", ["no", 1, 0, None, 1.5], ids=repr)
def test_what_a_margin_normalises(flag: str, value: Any, setting: Setting) -> None:
    own = type("Own", (tm.Margin,), {flag: value, "target_cosine": lambda self, cos: cos})
    check_refused(setting, own, flag)
    check_refused(setting, lambda: setattr(setting.margins["NormFace"], flag, value), flag)


@pytest.mark.parametrize(("argument", "value", "word"), rows(SCHEDULES))
def test_a_schedule_that_is_made(argument: str, value: Any, word: str, setting: Setting) -> None:
    warm = argument in ("start", "stop", "steps")
    given = (dict(start=0.0, stop=0.5, steps=10) if warm else {}) | {argument: value}
    check_refused(setting, lambda: (tm.WarmUp if warm else tm.Annealing)(**given), word)


@pytest.mark.parametrize("call", [tm.WarmUp(0.0, 0.5, 10), tm.Annealing(), tm.ArcFace().schedule], ids=["w", "a", "m"])
@pytest.mark.parametrize("step", [*STEP, True], ids=repr)
def test_the_step_of_a_schedule(call: Callable[[Any], object], step: Any, setting: Setting) -> None:
    check_refused(setting, lambda: call(step), "step")


@pytest.mark.parametrize(("schedules", "word"), [
    ({"m": 0.5}, "schedule of m"), ({"m": "warm"}, "schedule of m"), ({"m": None}, "schedule of m"),
    ({"zz": math.sin}, "zz"), ({"m": math.sin, "zz": math.sin}, "zz"), ({"beyond_pi": math.sin}, "beyond_pi"),
    ({"": math.sin}, "''"), ({"m": math.sin, "s": 3}, "schedule of s"),
])  # fmt: skip
def test_schedules_that_are_attached(schedules: dict[str, Any], word: str, setting: Setting) -> None:
    check_refused(setting, lambda: setting.margins["ArcFace"].with_schedule(**schedules), word)


@pytest.mark.parametrize("value", [4.0, NAN, "0.5", None, torch.ones(2)], ids=["4", "nan", "str", "None", "tensor"])
def test_what_a_schedule_gives(value: Any, setting: Setting) -> None:
    """No number is set, not even one whose own schedule is right."""
    margin = setting.margins["ArcFace"].with_schedule(s=lambda step: 8.0, m=lambda step: value)
    check_refused(setting, lambda: margin.schedule(3), "m ")
