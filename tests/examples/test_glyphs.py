"""The glyph demo: data, metric, checkpoints and report, on a few hundred characters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

for module in ("PIL", "fontTools", "sklearn", "matplotlib", "tqdm", "jinja2", "cvttf_NotoSansCJK_Thin"):
    pytest.importorskip(module, reason=f"{module} is part of the demo extra: pip install -e '.[demo]'")

from examples.glyphs import data, evaluate, fonts, train  # noqa: E402
from examples.glyphs.__main__ import main  # noqa: E402
from examples.glyphs.recipes import RECIPES, Budget, Settings  # noqa: E402

ROOT = Path(__file__).parents[2]
LIMIT, CLASSES, UNSEEN, STEPS = 220, 140, 60, 150
SETTINGS = Settings(
    "arcface", Budget(steps=STEPS), CLASSES, limit=LIMIT, unseen=UNSEEN, batch=16, warm_up=5,
    recipe=replace(RECIPES["arcface"], margin_steps=10),
)  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("glyphs")


@pytest.fixture(scope="module")
def glyphs(cache: Path) -> fonts.Glyphs:
    return fonts.load(limit=LIMIT, cache=cache, processes=1)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are split among threads, so equality to the bit wants a fixed number of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batches_of(glyphs: fonts.Glyphs, settings: Settings = SETTINGS) -> data.Batches:
    return data.Batches(glyphs, data.split(glyphs, settings.classes, settings.unseen).train, settings.batch)


# -- glyphs --------------------------------------------------------------------------------------------------------


def test_rendering_with_processes_gives_the_same_pictures(tmp_path: Path) -> None:
    pieces = [fonts.load(("hangul",), ("Thin", "Black"), 30, tmp_path / str(n), processes=n) for n in (1, 2)]
    np.testing.assert_array_equal(pieces[0].images, pieces[1].images)
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_cache_is_read_again_and_its_name_tells_sets_apart(glyphs: fonts.Glyphs, cache: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    again = fonts.load(limit=LIMIT, cache=cache, processes=1)
    np.testing.assert_array_equal(again.rows, glyphs.rows)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    points = np.arange(5)
    names = {fonts.cache_name(("han",), weights, points[:n]) for weights in (("Thin",), ("Bold",)) for n in (3, 5)}
    assert len(names) == 4


def test_glyphs_are_drawn_centred_and_heavier_weight_by_weight(glyphs: fonts.Glyphs) -> None:
    ink = glyphs.images[glyphs.rows].mean(axis=(0, 2, 3))
    assert (np.diff(ink) > 0).all()
    border = np.concatenate([glyphs.images[:, :, [0, -1]].ravel(), glyphs.images[..., [0, -1]].ravel()])
    assert border.mean() < 0.01 * glyphs.images[:, :, 8:24, 8:24].mean()


def test_blank_and_repeated_pictures_are_no_classes() -> None:
    images = np.zeros((6, 2, 4, 4), np.uint8)
    images[[0, 1, 3, 4, 5], 0, 0, 0] = [1, 2, 4, 1, 6]
    images[[0, 1, 3, 4, 5], 1, 0, 0] = [1, 2, 4, 5, 2]  # 4 repeats row 0 in one weight, 5 repeats row 1 in the other
    assert fonts.distinct(images).tolist() == [0, 1, 3]


# -- data ----------------------------------------------------------------------------------------------------------


def test_the_three_sets_are_disjoint_and_the_unseen_one_does_not_depend_on_the_classes(glyphs: fonts.Glyphs) -> None:
    small, large = (data.split(glyphs, classes, UNSEEN, validation=10) for classes in (50, 140))
    for parts in (small, large):
        everything = np.concatenate([parts.train, parts.unseen, parts.validation])
        assert len(np.unique(everything)) == len(everything)
    np.testing.assert_array_equal(small.unseen, large.unseen)
    with pytest.raises(SystemExit, match="hangul"):
        data.split(glyphs, LIMIT, UNSEEN)


def test_a_step_is_a_function_of_seed_and_step(glyphs: fonts.Glyphs) -> None:
    forward, again = batches_of(glyphs), batches_of(glyphs)
    steps = [0, 1, forward.steps_per_epoch, 2 * forward.steps_per_epoch + 3]
    seen = {step: forward(step) for step in steps}
    for step in reversed(steps):  # another order, another object
        for one, other in zip(seen[step], again(step), strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(seen[0][0], seen[1][0])


def test_every_seed_and_step_has_its_own_random_numbers() -> None:
    generators = (data.generator(seed, step) for seed in range(30) for step in range(30))
    drawn = [torch.rand(1, generator=generator, device="cpu").item() for generator in generators]
    assert len(set(drawn)) > 890  # of 900 numbers with 24 bits


def test_an_epoch_shows_every_class_in_every_weight_once(glyphs: fonts.Glyphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "augment", lambda pictures, random: pictures)
    rows = glyphs.rows[:8]
    batches = data.Batches(glyphs, rows, batch=14)
    shown = [batches(step) for step in range(batches.steps_per_epoch)]
    pictures = torch.cat([pictures for pictures, _ in shown])
    assert torch.cat([target for _, target in shown]).bincount().tolist() == [7] * 8
    expected = torch.from_numpy(glyphs.images[rows]).flatten(0, 1)
    assert sorted(map(bytes, pictures.numpy())) == sorted(map(bytes, expected.numpy()))


def test_augmentation_keeps_shape_and_moves_each_picture_its_own_way(glyphs: fonts.Glyphs) -> None:
    same = torch.from_numpy(glyphs.images[np.repeat(glyphs.rows[:1], 20), 3])
    out = data.augment(same, data.generator(0, 0))
    assert out.shape == (20, 1, 32, 32)
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()
    assert torch.pdist(out.flatten(1)).min() > 0.5
    assert torch.equal(out, data.augment(same, data.generator(0, 0)))


def test_the_blur_keeps_the_ink() -> None:
    point = torch.zeros(1, 1, 9, 9)
    point[..., 4, 4] = 1.0
    blurred = data.blurred(point)
    assert blurred.sum() == pytest.approx(1.0)
    assert (blurred[0, 0, 4] * (torch.arange(9.0) - 4) ** 2).sum() / blurred[0, 0, 4].sum() == pytest.approx(1.0)


# -- metric --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [7, 10**6], ids=["many ties", "no ties"])
def test_tar_at_far_agrees_with_trying_every_threshold(levels: int) -> None:
    random = np.random.default_rng(levels)
    genuine, impostor = random.integers(levels, size=60) + levels // 3, random.integers(levels, size=500)
    found = evaluate.Verification(*evaluate.roc(genuine, impostor), genuine, impostor)
    for far in (0.0, 1e-3, 0.01, 0.05, 0.3, 1.0):
        thresholds = np.unique(np.concatenate([genuine, impostor, [10**9]]))
        accepted = [(genuine >= t).mean() for t in thresholds if (impostor >= t).mean() <= far]
        assert found.at(far) == pytest.approx(max(accepted))


def test_the_evaluation_distorts_every_weight_its_own_way(glyphs: fonts.Glyphs) -> None:
    rows, k = glyphs.rows[:4], 3
    flat = replace(glyphs, images=np.repeat(glyphs.images[:, 3:4], 2, axis=1))  # the same weight twice
    first, second = (evaluate.evaluation_pictures(flat, rows, view, 0)[k] for view in (0, 1))
    assert (first - second).norm() > 1.0
    assert torch.equal(first, evaluate.evaluation_pictures(flat, rows, 0, 0)[k])


def test_pairs_are_of_two_weights_and_impostors_of_two_characters() -> None:
    # Numbers instead of unit rows, so that a product tells which weights and which characters it is of.
    character, weight = torch.arange(5.0), torch.tensor([1.0, 10.0, 100.0])
    tagged = torch.stack([torch.stack([torch.full((5,), float(w)), 1000 * character], dim=1) for w in weight])
    found = evaluate.verify(tagged)
    assert len(found.genuine) == 3 * 5
    assert len(found.impostor) == 3 * 5 * 4
    products = {float(a * b) for a, b in ((1, 10), (1, 100), (10, 100))}
    same = {float(p + 1e6 * c * c) for p in products for c in range(5)}
    other = {float(p + 1e6 * c * d) for p in products for c in range(5) for d in range(5) if c != d}
    assert set(found.genuine.tolist()) == same
    assert set(found.impostor.tolist()) == other


def test_rank_one_against_a_loop() -> None:
    drawn = torch.randn(4, 30, 3, generator=torch.Generator().manual_seed(0), device="cpu")
    embeddings = torch.nn.functional.normalize(drawn, dim=2)
    hits = [
        max(range(30), key=lambda other: float(embeddings[v, p] @ embeddings[2, other])) == p
        for v in (0, 1, 3)
        for p in range(30)
    ]
    assert evaluate.rank_one(embeddings, gallery=2) == pytest.approx(np.mean(hits))


# -- training ------------------------------------------------------------------------------------------------------


def test_rates_ramp_stay_and_fall_to_zero() -> None:
    settings = Settings("softmax", Budget(steps=100), warm_up=10, decay=0.25)
    rates = [settings.rate(step, 0.0) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert rates[10:76] == pytest.approx([1.0] * 66)
    assert rates[88] == pytest.approx(0.48)
    assert rates[100] == 0.0
    timed = replace(settings, budget=Budget(seconds=8.0))
    assert timed.rate(50, 7.0) == pytest.approx(0.5)


def same(one: object, other: object) -> bool:
    """Equality of nested checkpoints, to the bit; wall-clock entries excepted."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one if k != "seconds")
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


KILLED_RUN = f"""
import sys
from pathlib import Path
import torch
from examples.glyphs import data, fonts, train
from examples.glyphs.recipes import Budget, Recipe, Settings
torch.set_num_threads(1)
settings = {SETTINGS!r}
glyphs = fonts.load(limit=settings.limit, cache=Path(sys.argv[1]))
rows = data.split(glyphs, settings.classes, settings.unseen).train
train.train(settings, data.Batches(glyphs, rows, settings.batch), Path(sys.argv[2]), interval=0.0)
"""


def test_killed_at_any_moment_and_resumed_is_the_same_as_never_killed(
    glyphs: fonts.Glyphs, cache: Path, tmp_path: Path, one_thread: None
) -> None:
    """A checkpoint after every step, so most kills come while one is being written."""
    checkpoint = tmp_path / "killed" / train.CHECKPOINT
    reached = [0]
    for wait in (0.05, 0.2):
        written = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED_RUN, str(cache), str(checkpoint.parent)], cwd=ROOT, env=os.environ
        )
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == written:
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        reached.append(torch.load(checkpoint, weights_only=True)["step"])
    assert 0 < reached[1] < reached[2] < STEPS

    resumed = train.train(SETTINGS, batches_of(glyphs), checkpoint.parent)
    straight = train.train(SETTINGS, batches_of(glyphs), tmp_path / "straight")
    assert resumed.step == straight.step == STEPS
    for run in (resumed, straight):
        del run.curves["seconds"]
    assert same(resumed.state(), straight.state())
    assert np.mean(straight.curves["loss"][-20:]) < np.mean(straight.curves["loss"][:20])


def test_the_first_ctrl_c_finishes_the_step_and_writes_the_checkpoint(
    glyphs: fonts.Glyphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = batches_of(glyphs)

    def interrupting(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return batches(step)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(train.Interrupted, match="after step 5"):
        train.train(SETTINGS, interrupting, tmp_path, interval=1e9)
    assert signal.getsignal(signal.SIGINT) is before
    assert torch.load(tmp_path / train.CHECKPOINT, weights_only=True)["step"] == 5


def test_a_run_given_more_steps_from_its_plateau_is_the_longer_run(
    glyphs: fonts.Glyphs, tmp_path: Path, one_thread: None
) -> None:
    short, long = (replace(SETTINGS, budget=Budget(steps=steps)) for steps in (20, 30))
    batches = batches_of(glyphs)
    train.train(short, batches, tmp_path / "short")
    continued = train.train(long, batches, tmp_path / "continued", begin=tmp_path / "short" / train.PLATEAU)
    straight = train.train(long, batches, tmp_path / "long")
    assert continued.step == 30
    assert same(continued.network.state_dict(), straight.network.state_dict())
    assert same(continued.head.state_dict(), straight.head.state_dict())


def test_a_checkpoint_of_other_settings_is_refused_and_named_apart(glyphs: fonts.Glyphs, tmp_path: Path) -> None:
    mine = replace(SETTINGS, budget=Budget(steps=2))
    train.train(mine, batches_of(glyphs, mine), tmp_path)
    other = replace(mine, recipe=replace(mine.recipe, m=0.5))
    assert other.name != mine.name
    with pytest.raises(SystemExit, match=r"other settings: recipe.*--fresh"):
        train.train(other, batches_of(glyphs, other), tmp_path)


def test_time_spent_counts_across_a_resume(glyphs: fonts.Glyphs, tmp_path: Path) -> None:
    settings = replace(SETTINGS, budget=Budget(seconds=0.5))
    first = train.train(settings, batches_of(glyphs, settings), tmp_path)
    assert 0.5 <= first.seconds < 2.0
    again = train.train(settings, batches_of(glyphs, settings), tmp_path)
    assert (again.step, again.seconds) == (first.step, first.seconds)


# -- the whole -----------------------------------------------------------------------------------------------------


def test_a_tiny_run_writes_the_report(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"--limit {LIMIT} --classes {CLASSES} --unseen {UNSEEN} --batch 16 --cache {cache} --out {tmp_path}"
    assert main([*line.split(), "--minutes", "0.01"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    names = [row["name"] for row in metrics["results"]]
    assert names[:2] == ["arcface", "softmax"]
    assert names[-1] == "untrained"
    for row in metrics["results"]:
        assert 0.0 <= row["tar_at_far_0.0001"] <= row["tar_at_far_0.001"] <= 1.0
    for row in metrics["memory"]:
        assert row["gradient_of_the_weight"] < row["head"]
    large = [row for row in metrics["memory"] if row["classes"] == 10 * CLASSES]
    assert all(row["full_logits"] > 2 * row["one_copy_of_the_logits"] for row in large)
    page = (tmp_path / "index.html").read_text()
    for picture in ("pictures.png", "roc.png", "curves.png", "neighbours.png"):
        assert picture in page
        assert (tmp_path / picture).stat().st_size > 5000
    assert str(tmp_path) not in page + json.dumps(metrics)
    assert "ArcFace" in capsys.readouterr().out


def test_too_few_characters_and_wrong_options_are_told(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="unseen ones leave"):
        main(["--limit", str(LIMIT), "--classes", "10000", "--cache", str(cache)])
    with pytest.raises(SystemExit):
        main(["--loss", "triplet"])
    assert "invalid choice: 'triplet'" in capsys.readouterr().err


def test_the_head_of_millions_reports_at_a_small_size(tmp_path: Path) -> None:
    from examples import million

    million.main(["--classes", "2e4", "--dim", "16", "--steps", "2", "--out", str(tmp_path / "million")])
    found = json.loads((tmp_path / "million.json").read_text())
    assert [row["rows"] for row in found["sampled"]] == [500, 1000, 2000, 4000]
    assert found["usual code"]["first that does not fit"] is None
    first, last = found["loss of the first batch, first and last"]
    assert last < first
    assert "20,000 classes" in (tmp_path / "million.md").read_text()
