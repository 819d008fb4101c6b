"""The derivation in pictures: what the curves are, and that everything is drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

for module in ("matplotlib", "sklearn", "PIL", "tqdm", "cvttf_NotoSansCJK_Regular"):
    pytest.importorskip(module, reason=f"{module} is part of the demo extra: pip install -e '.[demo]'")

import tritonmargin as tm  # noqa: E402
from examples.figures import __main__, curves, hinges, planes, training  # noqa: E402


def test_curves_are_the_papers_functions() -> None:
    theta = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    value, slope = curves.curve(tm.ArcFace(m=0.5), theta)
    torch.testing.assert_close(value, torch.cos(theta + 0.5))
    torch.testing.assert_close(slope, torch.sin(theta + 0.5) / torch.sin(theta))
    value, slope = curves.curve(tm.CosFace(m=0.35), theta)
    torch.testing.assert_close(value, theta.cos() - 0.35)
    assert slope.tolist() == [1.0, 1.0, 1.0]
    value, _ = curves.curve(tm.ASoftmax(m=2), theta)
    expected = [math.cos(0.6), math.cos(2.0), -math.cos(4.0) - 2.0]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64))
    assert curves.curve(tm.ArcFace(gradient="straight-through"), theta)[1].tolist() == [1.0, 1.0, 1.0]


def test_every_margin_is_drawn_in_a_panel() -> None:
    drawn = {type(margin).__name__ for margins in curves.PANELS.values() for margin in margins.values()}
    assert drawn == {"NormFace", "CosFace", "ArcFace", "CombinedMargin", "ASoftmax", "SphereFaceR"}
    assert len(planes.losses(100)) == 7


def test_the_sum_of_hinges_grows_with_classes_and_softmax_does_not() -> None:
    small, large = 20, 2000
    found = {objective: hinges.growth(objective, (small, large)) for objective in hinges.NAMES}
    grown = {name: line.dx[1] / line.dx[0] for name, line in found.items()}
    assert grown["hinge"] > 0.5 * large / small
    assert max(grown["softmax"], grown["lse-hinge"], grown["max-hinge"]) < 1.5


def test_ten_glyphs_are_learned() -> None:
    pictures = training.glyphs(weights=("Regular", "Bold"))
    assert pictures.images.shape == (20, 1, 32, 32)
    assert all(0.02 < float(image.mean()) < 0.6 for image in pictures.images)
    assert torch.equal(pictures.labels, torch.arange(10).repeat(2))
    trained = training.train(pictures, tm.NormFace(s=16.0), steps=80, width=16)
    assert sum(trained.accuracies[-10:]) > 5.0 > 10 * trained.accuracies[0]


@pytest.mark.slow
def test_everything_is_drawn(tmp_path: Path) -> None:
    __main__.main(["--steps", "4", "--largest", "200", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {
        "convergence.png", "curves.png", "hinges.png", "numbers.json", "plane_digits.png", "plane_glyphs.png",
    }  # fmt: skip
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert {"date", "machine", "steps", "batch"} <= set(numbers)
    assert set(numbers["digits"]) == set(numbers["glyphs"]) == set(planes.losses(4))
    assert set(numbers["convergence"]) == set(hinges.NAMES)
    for line in numbers["digits"].values():
        assert 0.0 <= line["accuracy"] <= 1.0
        assert 0.0 <= line["own angle"] <= 180.0
