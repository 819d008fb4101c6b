"""Which classes a step walks, and what the correction of a sampled sum is worth."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import MORE, assert_same, cost, cpu_only, every_margin, made, oracle, problem, streamed
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import tritonmargin as tm
from tritonmargin.margins import MARGINS
from tritonmargin.sampling import Sampler, by_keys, random_keys

pytestmark = cpu_only


@settings(max_examples=200 * MORE)
@drawn(data=st.data())
def test_a_sample_is_sorted_unique_exact_and_holds_the_positives(data: st.DataObject) -> None:
    classes = data.draw(st.integers(1, 300))
    target = torch.tensor(data.draw(st.lists(st.integers(-3, classes + 3), max_size=20)), dtype=torch.int64)
    samples = data.draw(st.integers(0, classes))
    positives = target[(target >= 0) & (target < classes)].unique()
    found = tm.sample_classes(target, classes, samples, torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    assert len(found) == max(samples, len(positives))
    assert bool((found[1:] > found[:-1]).all())
    assert torch.isin(positives, found).all()
    assert not len(found) or (found[0] >= 0 and found[-1] < classes)


@pytest.mark.parametrize(("classes", "samples"), [(7, 4), (7, 6), (6, 3), (9, 3)])
def test_every_set_of_negatives_is_as_likely(classes: int, samples: int) -> None:
    """Chi-square over all sets that hold the positive class 2; the threshold is the 99.99 % quantile."""
    generator, rounds = torch.Generator().manual_seed(1), 6000
    sets = {(*sorted((2, *others)),): 0 for others in
            itertools.combinations([c for c in range(classes) if c != 2], samples - 1)}  # fmt: skip
    for _ in range(rounds):
        sets[(*tm.sample_classes(torch.tensor([2, 2]), classes, samples, generator).tolist(),)] += 1
    expected = rounds / len(sets)
    chi = sum((count - expected) ** 2 / expected for count in sets.values())
    degrees = len(sets) - 1
    assert chi < degrees + 3.8 * (2 * degrees) ** 0.5 + 10


@settings(max_examples=200 * MORE)
@drawn(data=st.data())
def test_a_sample_by_keys_is_sorted_unique_exact_and_holds_the_positives(data: st.DataObject) -> None:
    """As a GPU draws it: the sample has room for every label."""
    classes = data.draw(st.integers(0, 300))
    target = torch.tensor(data.draw(st.lists(st.integers(-300, classes + 300), max_size=classes)), dtype=torch.int64)
    samples = data.draw(st.integers(len(target), classes))
    state = torch.tensor([data.draw(st.integers(0, (1 << 62) - 1)), data.draw(st.integers(0, 10**6))])
    found = by_keys(random_keys(state, data.draw(st.integers(0, 10**9)), classes + 1), target, samples)
    assert len(found) == samples
    assert found.dtype == torch.int64
    assert bool((found[1:] > found[:-1]).all())
    assert torch.isin(target[(target >= 0) & (target < classes)], found).all()
    assert not len(found) or (found[0] >= 0 and found[-1] < classes)


@pytest.mark.parametrize(("classes", "samples"), [(7, 4), (7, 6), (9, 3)])
@pytest.mark.parametrize("over", ["steps", "seeds", "shards"])
def test_every_set_of_negatives_is_as_likely_by_keys(classes: int, samples: int, over: str) -> None:
    """Over the steps of a run, over seeds, and over the shards of a step, whose classes have other numbers."""
    rounds, target = 6000, torch.tensor([2, 2, -1, 99])
    sets = {(*sorted((2, *others)),): 0 for others in
            itertools.combinations([c for c in range(classes) if c != 2], samples - 1)}  # fmt: skip
    for k in range(rounds):
        seed, step, first = (k if over == name else 0 for name in ("seeds", "steps", "shards"))
        keys = random_keys(torch.tensor([seed, step]), first * classes, classes + 1)
        sets[(*by_keys(keys, target, samples).tolist(),)] += 1
    expected = rounds / len(sets)
    chi = sum((count - expected) ** 2 / expected for count in sets.values())
    degrees = len(sets) - 1
    assert chi < degrees + 3.8 * (2 * degrees) ** 0.5 + 10


def test_keys_are_the_same_numbers_on_every_shard() -> None:
    """And those of the published generator, by Python's integers."""
    state = torch.tensor([3, 5])
    whole = random_keys(state, 0, 100)
    assert torch.equal(random_keys(state, 40, 60), whole[40:])
    key = (7 + 3 * 0x45D6C867337A7221 + 5 * 0x719F3E675CD60581) * 0x9E3779B97F4A7C15 % 2**64
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB % 2**64
    assert int(whole[7]) == (key - 2**64 if key >= 2**63 else key) >> 1


def test_drawing_by_keys_reads_nothing_back() -> None:
    """What would wait for a GPU. The other way does, so that it would be seen."""
    target = torch.tensor([3, 3, -1, 50])

    def names(draw: Callable[[], object]) -> set[str]:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            draw()
        return {event.name() for event in profiler.profiler.kineto_results.events()}

    waits = {"aten::nonzero", "aten::item", "aten::_local_scalar_dense", "aten::_unique2", "aten::masked_select"}
    assert not waits & names(lambda: by_keys(random_keys(torch.tensor([1, 2]), 0, 101), target, 10))
    assert waits & names(lambda: tm.sample_classes(target, 100, 10))


def test_drawing_by_keys_takes_16_bytes_a_class() -> None:
    state, target = torch.tensor([1, 2]), torch.arange(64)
    used = [cost(lambda c=c: by_keys(random_keys(state, 0, c + 1), target, 1000)).peak for c in (10**5, 3 * 10**5)]
    assert (used[1] - used[0]) / (2 * 10**5) == pytest.approx(16.0, abs=0.1)


def test_drawing_by_keys_in_one_graph() -> None:
    draw = torch.compile(lambda state, target: by_keys(random_keys(state, 5, 101), target, 10), backend="aot_eager",
                         fullgraph=True)  # fmt: skip
    for step in range(3):
        state, target = torch.tensor([1, step]), torch.tensor([3, 3, -1, 50 + step])
        assert torch.equal(draw(state, target), by_keys(random_keys(state, 5, 101), target, 10))


def test_sampling_takes_memory_for_the_sample_alone() -> None:
    """The same at a hundred times the classes."""
    target = torch.arange(64)
    used = [cost(lambda c=c: tm.sample_classes(target, c, 2000)).peak for c in (10**5, 10**7)]
    assert used[1] < 1.2 * used[0] + 10_000


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"logq_correction": True}], ids=str)
def test_a_sampled_step_takes_memory_for_the_sample_alone(options: dict[str, Any]) -> None:
    used = []
    for c in (20_000, 200_000):
        head = tm.MarginSoftmaxLoss(16, c, sample_rate=1000 / c, sparse_grad=True, **options)
        x, target = torch.randn(8, 16, requires_grad=True), torch.arange(8)
        head(x, target).backward()
        head.weight.grad = None
        used.append(cost(lambda head=head, x=x, target=target: head(x, target).backward()).peak)
    assert used[1] < 1.2 * used[0]


def test_a_sampler_goes_on_where_it_was_and_differs_between_shards_and_seeds() -> None:
    def draws(seed: int, first_class: int, steps: int, start: int = 0) -> list[list[int]]:
        sampler = Sampler(0.1, torch.tensor([seed, start]), first_class)
        return [sampler.draw(torch.tensor([3]), 1000).tolist() for _ in range(steps)]

    whole = draws(0, 0, 6)
    assert len({tuple(each) for each in whole}) == 6
    assert draws(0, 0, 3, start=3) == whole[3:]
    assert draws(0, 1000, 6) != whole
    assert draws(1, 0, 6) != whole
    assert all(len(each) == 100 for each in whole)


def test_a_resumed_head_draws_what_it_would_have_drawn() -> None:
    x, target = torch.randn(4, 5), torch.tensor([1, 2, 3, 4])
    head = tm.MarginSoftmaxLoss(5, 100, sample_rate=0.2)
    head(x, target)
    other = tm.MarginSoftmaxLoss(5, 100, sample_rate=0.2)
    other.load_state_dict(head.state_dict())
    assert [float(head(x, target)) for _ in range(3)] == [float(other(x, target)) for _ in range(3)]


def test_a_sampled_head_walks_the_sample_in_training_and_all_classes_in_evaluation() -> None:
    x, target = torch.randn(6, 5), torch.tensor([0, 7, 7, -100, 99, 3])
    head = tm.MarginSoftmaxLoss(5, 100, sample_rate=0.1, sparse_grad=True)
    head(x, target).backward()
    walked = head.weight.grad.coalesce().indices()[0]
    assert len(walked) == 10
    assert torch.isin(target[target >= 0], walked).all()
    full = tm.MarginSoftmaxLoss(5, 100)
    full.load_state_dict({"weight": head.weight})
    assert torch.equal(head.eval()(x, target), full(x, target))
    few = tm.MarginSoftmaxLoss(5, 100, sample_rate=0.0, sparse_grad=True)
    few(x, target).backward()
    assert few.weight.grad.coalesce().indices()[0].tolist() == [0, 3, 7, 99]
    assert few(x, target, return_stats=True)[1].sampled.tolist() == [True] * 6
    assert few.eval()(x, target, return_stats=True)[1].sampled.tolist() == [False] * 6


@every_margin
@pytest.mark.parametrize("objective", ["softmax", "lse-hinge"])
def test_the_corrected_loss_against_the_reference(name: str, objective: str) -> None:
    given = problem(6, 9, 131)
    ids = tm.sample_classes(given.y, 131, 40, torch.Generator().manual_seed(0))
    options = dict(class_ids=ids, logq_correction=True, objective=objective, reduction="none")
    assert_same(streamed(given, MARGINS[name](), **options), oracle(given, MARGINS[name](), **options), 1e-9, 1e-12)


def test_the_corrected_sum_is_right_on_average_and_the_plain_one_is_not() -> None:
    """exp(rest) over many samples, against the sum over all classes: within 4 standard errors of the mean."""
    given = problem(5, 8, 400)
    margin = tm.NormFace(s=4.0)
    generator = torch.Generator().manual_seed(3)

    def rest(**options: object) -> torch.Tensor:
        return tm.margin_cross_entropy(given.x, given.w, given.y, margin, return_stats=True, **options)[
            1
        ].rest_logsumexp

    full = rest().exp()
    for corrected in (True, False):
        found = torch.stack([
            rest(class_ids=tm.sample_classes(given.y, 400, 40, generator), logq_correction=corrected).exp()
            for _ in range(600)
        ])  # fmt: skip
        error = (found.mean(dim=0) - full) / (found.std(dim=0) / 600**0.5)
        assert (error.abs() < 4.0).all() if corrected else (error < -20.0).all()


def test_a_correction_of_all_classes_or_of_positives_alone_changes_nothing() -> None:
    given = problem(6, 9, 131)
    for ids in (torch.arange(131), given.y.unique()):
        plain, corrected = (
            streamed(given, tm.ArcFace(), class_ids=ids, logq_correction=logq) for logq in (False, True)
        )
        assert_same(corrected, plain, 1e-12, 1e-300)


def test_the_correction_needs_a_sum_to_correct() -> None:
    given = problem()
    for options, message in (
        (dict(objective="max-hinge"), "'softmax' and 'lse-hinge'"),
        (dict(label_smoothing=0.1), "label_smoothing is not defined"),
    ):
        with pytest.raises(ValueError, match=message):
            tm.margin_cross_entropy(given.x, given.w, given.y, tm.ArcFace(), logq_correction=True, **options)


def test_a_step_of_all_classes_by_sampling_is_the_full_step() -> None:
    """Partial FC at rate 1 is the full loss: a training curve, step by step."""
    curves = []
    for sampled in (False, True):
        torch.manual_seed(0)
        head = tm.MarginSoftmaxLoss(6, 60, tm.ArcFace(m=0.2, s=8.0), dtype=torch.float64)
        optimiser = tm.optim.RowSGD(head.parameters(), lr=1.0, momentum=0.9)
        losses = []
        for step in range(30):
            x = made(8, 6, seed=step)
            ids = torch.arange(60) if sampled else None
            loss = head(x, torch.arange(8) * 7 % 60, class_ids=ids)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-12)
