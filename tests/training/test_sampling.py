"""Which classes a step walks, and what the correction of a sampled sum is worth."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import MORE, assert_same, cost, cpu_only, every_margin, made, oracle, problem, streamed
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from uniformity import indicators, of_classes, of_neighbours, of_pairs

import tritonmargin as tm
from tritonmargin.margins import MARGINS
from tritonmargin.permutation import Permutation, random_number, sides
from tritonmargin.sampling import Sampler, draw, draw_by_torch

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


MANY = pytest.param(6000, marks=pytest.mark.slow)  # rounds: what is but a little wrong takes more to be seen


@pytest.mark.parametrize("rounds", [1500, MANY])
@pytest.mark.parametrize(("classes", "samples"), [(7, 4), (7, 6), (6, 3), (9, 3)])
def test_every_set_of_negatives_is_as_likely(classes: int, samples: int, rounds: int) -> None:
    """Chi-square over all sets that hold the positive class 2; the threshold is the 99.99 % quantile."""
    generator = torch.Generator().manual_seed(1)
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
def test_a_draw_of_static_size_is_sorted_unique_exact_and_holds_the_positives(data: st.DataObject) -> None:
    """What a step draws: any seed, step and first class; the sample has room for every label."""
    classes = data.draw(st.integers(0, 300))
    target = torch.tensor(data.draw(st.lists(st.integers(-300, classes + 300), max_size=classes)), dtype=torch.int64)
    samples = data.draw(st.integers(len(target), classes))
    state = torch.tensor([data.draw(st.integers(-(1 << 63), (1 << 63) - 1)), data.draw(st.integers(0, 10**6))])
    found = draw(target, state, data.draw(st.integers(0, 10**12)), classes, samples)
    assert len(found) == samples
    assert found.dtype == torch.int64
    assert bool((found[1:] > found[:-1]).all())
    assert torch.isin(target[(target >= 0) & (target < classes)], found).all()
    assert not len(found) or (found[0] >= 0 and found[-1] < classes)


@pytest.mark.parametrize("rounds", [1500, MANY])
@pytest.mark.parametrize("over", ["steps", "seeds", "shards"])
def test_every_set_of_negatives_is_as_likely_in_a_run(over: str, rounds: int) -> None:
    """Over the steps of a run, over seeds, and over the shards of a step."""
    classes, samples, target = 7, 4, torch.tensor([2, 2, -1, 99])
    sets = {(*sorted((2, *others)),): 0 for others in
            itertools.combinations([c for c in range(classes) if c != 2], samples - 1)}  # fmt: skip
    for k in range(rounds):
        seed, step, first = (k if over == name else 0 for name in ("seeds", "steps", "shards"))
        sets[(*draw(target, torch.tensor([seed, step]), first * classes, classes, samples).tolist(),)] += 1
    expected = rounds / len(sets)
    chi = sum((count - expected) ** 2 / expected for count in sets.values())
    degrees = len(sets) - 1
    assert chi < degrees + 3.8 * (2 * degrees) ** 0.5 + 10


@pytest.mark.parametrize(("labels", "keys"), [
    pytest.param([2, 2, 0, -1, 5000], 4000, id="labels"),
    pytest.param([2, 2, 0, -1, 5000], 20_000, id="labels, many keys", marks=pytest.mark.slow),
    pytest.param([], 20_000, id="no labels, many keys", marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.parametrize(("classes", "samples"), [(7, 5), (20, 9), (100, 30), (1000, 100)])
def test_samples_are_uniform_and_know_nothing_of_each_other(
    classes: int, samples: int, labels: list[int], keys: int
) -> None:
    """Within 4 standard deviations over 20,000 keys, or some of them: two ranks, 10,000 steps.

    Single classes that are nobody's label and pairs of them; a class of one rank with a class of the other, a class of
    one step with a class of the next.
    """
    target = torch.tensor(labels, dtype=torch.int64)
    drawn = [draw_by_torch(target, torch.tensor([3, k // 2]), k % 2 * classes, classes, samples) for k in range(keys)]
    inside = indicators(drawn, classes)
    others = torch.ones(classes, dtype=torch.bool)
    others[target[(target >= 0) & (target < classes)]] = False
    assert inside[:, ~others].all()
    inside = inside[:, others]
    found = {
        "classes": of_classes(inside),
        "pairs": of_pairs(inside),
        "ranks": of_neighbours(inside[0::2], inside[1::2]),
        "steps": of_neighbours(inside[:-2], inside[2:]),
    }
    assert all(abs(z) < 4.0 for z in found.values()), found


def test_what_is_not_uniform_is_seen() -> None:
    """Two rounds are too few for pairs, and a counter as key is no key."""
    classes, samples = 100, 30
    assert sides(classes) == (10, 10)
    two_rounds, no_key = [], []
    for step in range(2000):
        order = Permutation(torch.tensor([3, step]), 0, classes)
        order.tables = order.tables[:2]
        two_rounds.append(order.at(torch.arange(samples)).sort().values)
        no_key.append((torch.arange(samples) * 37 + step) % classes)
    assert of_pairs(indicators(two_rounds, classes)) > 20.0
    assert of_neighbours(indicators(no_key[:-1], classes), indicators(no_key[1:], classes)) > 20.0


def test_a_permutation_is_one_to_one_and_knows_its_inverse() -> None:
    """At sizes that are products of near numbers and at others, which leave points beyond."""
    for size in (*range(1, 150), 997, 4095, 4096, 10_007, 65_537):
        a, b = sides(size)
        assert a * b >= size
        assert size < 3 or min(a, b) > 1
        order = Permutation(torch.tensor([5, size]), 7, size)
        ranks = torch.arange(size)
        found = order.at(ranks)
        assert torch.equal(found.sort().values, ranks)
        assert torch.equal(order.rank(found), ranks)
        assert torch.equal(order.at(ranks[: size // 2]), found[: size // 2])  # a number at a time


def test_sizes_past_32_bits() -> None:
    size = 40_000_000_007
    order, ranks = Permutation(torch.tensor([1, 2]), 10**12, size), torch.arange(1000) * 39_999_999
    found = order.at(ranks)
    assert torch.equal(order.rank(found), ranks)
    assert found.max() < size
    assert len(found.unique()) == 1000
    assert 0.4 < float((found > size // 2).double().mean()) < 0.6


def test_keys_are_numbers_of_the_published_generator() -> None:
    """The first numbers of SplitMix64 that starts at 1234567, as its author prints them."""
    numbers = random_number(torch.tensor(1234567), torch.arange(3))
    assert [int(number) % 2**64 for number in numbers] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423,
    ]  # fmt: skip


@settings(max_examples=100 * MORE)
@drawn(data=st.data())
def test_a_draw_is_the_labels_and_the_first_others_of_the_order(data: st.DataObject) -> None:
    """By Python's integers, all classes in their order: what a seed draws, in this and in every later version."""
    classes = data.draw(st.integers(2, 60))
    target = data.draw(st.lists(st.integers(-2, classes + 2), max_size=classes - 1))
    samples = data.draw(st.integers(len(target), classes - 1))
    seed, step, first = (data.draw(st.integers(low, 10**12)) for low in (-9, 0, 0))
    labels = {label for label in target if 0 <= label < classes}
    others = [number for number in in_order(seed, step, first, classes) if number not in labels]
    expected = sorted([*labels, *others[: samples - len(labels)]])
    found = draw(torch.tensor(target, dtype=torch.int64), torch.tensor([seed, step]), first, classes, samples)
    assert found.tolist() == expected


def in_order(seed: int, step: int, first: int, classes: int) -> list[int]:
    """Numbers below 4,096 as the permutation has them, one after the other."""
    a, b = sides(classes)
    start = seed * 0x45D6C867337A7221 + step * 0x719F3E675CD60581 + first * 0x2127599BF4325C37

    def splitmix(start: int, index: int) -> int:
        number = (start + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
        number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        number = (number ^ (number >> 27)) * 0x94D049BB133111EB % 2**64
        return number ^ (number >> 31)

    def moved(point: int) -> int:
        left, right = divmod(point, b)
        for k in range(0, 12, 2):
            left = (left - ((splitmix(splitmix(start, k), right) >> 24) * a >> 40)) % a
            right = (right - ((splitmix(splitmix(start, k + 1), left) >> 24) * b >> 40)) % b
        return left * b + right

    numbers = []
    for point in range(classes):
        point = moved(point)
        while point >= classes:
            point = moved(point)
        numbers.append(point)
    return numbers


def test_the_sides_of_some_sizes() -> None:
    """What a seed draws follows from them."""
    expected = {1: (2, 1), 2: (2, 1), 3: (2, 2), 7: (3, 3), 20: (4, 5), 1000: (25, 40), 10**5: (250, 400),
                10**8: (10_000, 10_000), 4_000_037: (1532, 2611)}  # fmt: skip
    assert {size: sides(size) for size in expected} == expected


def test_a_draw_reads_nothing_back() -> None:
    """What would wait for a GPU. With more labels than samples it does, so that it would be seen."""
    target = torch.tensor([3, 3, -1, 50])

    def names(call: Callable[[], object]) -> set[str]:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            call()
        return {event.name() for event in profiler.profiler.kineto_results.events()}

    waits = {"aten::nonzero", "aten::item", "aten::_local_scalar_dense", "aten::_unique2", "aten::masked_select"}
    sampler = Sampler(0.1, torch.tensor([1, 2]))
    assert not waits & names(lambda: sampler.draw(target, 101))
    assert not waits & names(lambda: tm.sample_classes(target, 100, 10))
    assert waits & names(lambda: tm.sample_classes(target, 100, 3))


def test_a_draw_looks_at_no_more_than_the_sample() -> None:
    """The same memory at a hundred times the classes, but for the rounds' tables, which have as many as a side."""
    target = torch.arange(64)
    used = [cost(lambda c=c: tm.sample_classes(target, c, 10**5)).peak for c in (10**6, 10**8)]
    assert used[1] < 1.2 * used[0]
    assert used[1] < 60 * 10**5
    few = cost(lambda: tm.sample_classes(target, 10**8, 100)).peak
    assert few < 25 * 6 * 10**4


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_sampled_head_is_one_graph_and_draws_what_it_would_have_drawn(dynamic: bool | None) -> None:
    """And a later sample rate is the next step's."""
    head, other = (tm.MarginSoftmaxLoss(5, 100, sample_rate=0.3) for _ in range(2))
    other.load_state_dict(head.state_dict())
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rate in (0.3, 0.5, 1.0, 0.3):
        head.sample_rate = other.sample_rate = rate
        for n in (9, 20):
            x, target = made(n, 5).float(), torch.arange(n)
            assert torch.equal(compiled(x, target), head(x, target))
    assert torch.equal(head.sampler, other.sampler)
    assert head.sampler.tolist() == [0, 6]


def test_the_op_of_a_draw_is_what_torch_expects_of_an_op() -> None:
    torch.library.opcheck(
        torch.ops.tritonmargin.draw.default,
        (torch.tensor([3, 3, -1, 50]), torch.tensor([1, 2]), 5, 101, 10, "torch"),
    )


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
        found = []
        for _ in range(steps):
            found.append(sampler.draw(torch.tensor([3]), 1000).tolist())
            sampler.advance()
        return found

    whole = draws(0, 0, 6)
    assert len({tuple(each) for each in whole}) == 6
    assert draws(0, 0, 3, start=3) == whole[3:]
    assert draws(0, 1000, 6) != whole
    assert draws(1, 0, 6) != whole
    assert all(len(each) == 100 for each in whole)


def test_the_sample_rate_may_change_from_step_to_step() -> None:
    """Also of a head that was made without; the rows of its gradient are those of the sample."""
    x, target = torch.randn(4, 5), torch.tensor([1, 2, 3, 4])
    head = tm.MarginSoftmaxLoss(5, 100, sparse_grad=True)
    assert "sampler" not in head.state_dict()
    for rate, rows in ((1.0, None), (0.5, 50), (0.1, 10), (0, 4), (1.0, None), (0.2, 20)):
        head.sample_rate = rate
        assert head.sample_rate == rate
        assert head.weight.sampled == (rate < 1.0)
        head.weight.grad = None
        head(x, target).backward()
        grad = head.weight.grad
        assert len(grad.coalesce().indices()[0]) == rows if rows else len(grad) == 100
    assert head.sampler.tolist() == [0, 4]
    assert "sample_rate=0.2" in repr(head)
    for rate in (1.5, -0.1, float("nan"), True, None, "half"):
        with pytest.raises((TypeError, ValueError), match="sample_rate must be a number between 0 and 1, got"):
            head.sample_rate = rate
    assert head.sample_rate == 0.2
    assert copy.deepcopy(head).sample_rate == pickle.loads(pickle.dumps(head)).sample_rate == 0.2


def test_a_later_sample_rate_draws_as_one_that_the_head_was_made_with() -> None:
    x, target = torch.randn(4, 5), torch.tensor([1, 2, 3, 4])
    head, other = tm.MarginSoftmaxLoss(5, 100, sample_rate=0.2, seed=3), tm.MarginSoftmaxLoss(5, 100, seed=3)
    other.load_state_dict({"weight": head.weight})  # a checkpoint without a sampler, and none is missed
    other.sample_rate = 0.2
    assert all(torch.equal(head(x, target), other(x, target)) for _ in range(3))


@pytest.mark.parametrize("before", [1.0, 0.5])
def test_a_resumed_head_counts_on_whatever_its_rate_was_when_it_was_loaded(before: float) -> None:
    x, target = torch.randn(4, 5), torch.tensor([1, 2, 3, 4])
    head = tm.MarginSoftmaxLoss(5, 100, sample_rate=0.2, seed=3)
    head(x, target)
    other = tm.MarginSoftmaxLoss(5, 100, sample_rate=before)
    other.load_state_dict(head.state_dict())
    other.sample_rate = 0.2
    assert all(torch.equal(head(x, target), other(x, target)) for _ in range(3))
    plain = tm.MarginSoftmaxLoss(5, 100)
    head.load_state_dict(plain.state_dict())  # and the reverse
    assert head.sampler.tolist() == [3, 4]


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
