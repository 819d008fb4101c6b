"""Mistakes that one rank makes with a sharded head: every rank hears of them, and what they are about."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import cpu_only, made
from ranks import on_ranks
from torch import Tensor, nn

import tritonmargin as tm

pytestmark = cpu_only

D, C = 7, 10
SECONDS = 20.0  # of a group in which nobody should wait


def sharded(**options: Any) -> tm.MarginSoftmaxLoss:
    return tm.MarginSoftmaxLoss(D, C, process_group=dist.group.WORLD, **options)


def given(n: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    return made(n, D, seed=seed).float().requires_grad_(), torch.arange(n)


# -- other settings, other heads -----------------------------------------------------------------------------------


def changed_on_one(name: str, value: object) -> None:
    head = sharded(margin=tm.CombinedMargin(m1=1.0, m2=0.3, m3=0.1), label_smoothing=0.0)
    head(*given()).backward()
    if dist.get_rank():
        owner = head.margin if name.startswith("margin.") else head
        setattr(owner, name.removeprefix("margin."), value)
    before = head.weight.detach().clone()
    with pytest.raises(ValueError, match=rf"{name} is .* on rank 1, .* on rank 0"):
        head(*given())
    assert torch.equal(head.weight, before)
    changed = getattr(head.margin if name.startswith("margin.") else head, name.removeprefix("margin."))
    values: list[Any] = [None, None]
    dist.all_gather_object(values, changed)
    if name.startswith("margin."):
        setattr(head.margin, name.removeprefix("margin."), float(values[0]))
    else:
        setattr(head, name, values[0])
    head(*given()).sum().backward()  # usable once they agree


@pytest.mark.parametrize(("name", "value"), [
    ("margin.m2", 0.4), ("margin.m3", 0.2), ("margin.s", 32.0), ("reduction", "sum"), ("objective", "lse-hinge"),
    ("label_smoothing", 0.1), ("ignore_index", 3), ("on_nonfinite", "skip"), ("training", False),
])  # fmt: skip
def test_a_setting_that_one_rank_changes_is_an_error_on_all(name: str, value: object) -> None:
    on_ranks(2, changed_on_one, name, value, timeout=SECONDS)


class Halved(tm.Margin):
    """What a user writes: a plain number, a number that is learned, another margin inside."""

    def __init__(self) -> None:
        super().__init__(s=8.0)
        self.half, self.inner = 0.5, tm.ArcFace(m=0.1)
        self.learned = nn.Parameter(torch.tensor(0.2))

    def target_cosine(self, cos: Tensor) -> Tensor:
        return self.half * self.inner.target_cosine(cos) - self.learned


def changed_inside() -> None:
    rank = dist.get_rank()
    for name, value in (("margin.half", 0.4), ("margin.inner.m", 0.2), ("margin.learned", 0.1)):
        head = sharded(margin=Halved())
        head(*given())
        *owners, last = name.split(".")
        owner: Any = head
        for each in owners:
            owner = getattr(owner, each)
        if rank and last == "learned":
            owner.learned.data.fill_(value)
        elif rank:
            setattr(owner, last, value)
        with pytest.raises(ValueError, match=f"{name} is .* on rank 1, .* on rank 0"):
            head(*given())
    head = sharded(margin=tm.ArcFace())
    head.margin = tm.CosFace() if rank else head.margin
    with pytest.raises(ValueError, match="margin is 'CosFace' on rank 1, 'ArcFace' on rank 0"):
        head(*given())
    head = sharded(sample_rate=0.5)
    head.sample_rate = 0.5 if rank else 0.7
    with pytest.raises(ValueError, match=r"sample_rate is 0.5 on rank 1, 0.7 on rank 0"):
        head(*given())


def test_what_one_rank_changes_inside_of_a_margin_is_an_error_on_all() -> None:
    on_ranks(2, changed_inside, timeout=SECONDS)


def equal_in_other_words() -> None:
    head = sharded(label_smoothing=0.0)
    head.label_smoothing = 0 if dist.get_rank() else 0.0
    head.retain_bytes = 1000 * dist.get_rank()  # memory is each rank's own affair
    assert head(*given()).isfinite()


def test_equal_numbers_of_another_type_and_another_memory_are_no_difference() -> None:
    on_ranks(2, equal_in_other_words, timeout=SECONDS)


def crossed() -> None:
    heads = [sharded(), sharded()]
    rank = dist.get_rank()
    loss = heads[0](*given()) + heads[1](*given())
    loss.backward()
    mistake = "rank 1 .* calls head 2 of those made for it, rank 0 head 1"
    with pytest.raises(RuntimeError, match=mistake):
        heads[rank](*given())
    assert (heads[0](*given()) + heads[1](*given())).isfinite()
    with pytest.raises((RuntimeError, ValueError), match="rank 1 .* had an error" if not rank else "same width"):
        heads[rank](given()[0][:, : D - rank], given()[1])


def test_two_heads_called_in_another_order_are_an_error_on_all_ranks() -> None:
    on_ranks(2, crossed, timeout=SECONDS)


# -- a rank that does not call -------------------------------------------------------------------------------------


def evaluates_alone() -> str:
    sharded()
    head = sharded()
    head(*given()).backward()
    head.eval()
    if dist.get_rank():
        time.sleep(4.0)  # the other one gives up meanwhile
        head.train()
    try:
        head(*given())
    except RuntimeError as error:
        time.sleep(2.0 * (1 - dist.get_rank()))  # keeps the store for the other one
        return str(error)
    return "no error"


def test_a_rank_that_evaluates_alone_hears_which_head_and_call_it_waited_in_and_so_does_the_other() -> None:
    begin = time.monotonic()
    alone, late = on_ranks(2, evaluates_alone, timeout=2.0)
    assert alone.startswith(
        "tritonmargin: rank 0 waited for other ranks in call 2 of head 2 of this process group (10 classes), in vain: "
    ), alone
    assert "must call a sharded head equally often, in evaluation too" in alone
    assert "rank 0 gave up in call 2 of head 2 of this process group" in late, late
    assert time.monotonic() - begin < 30.0


def goes_back_alone() -> str:
    head = sharded()
    loss = head(*given())
    head(*given())
    if dist.get_rank():
        time.sleep(4.0)
        return ""
    with pytest.raises(RuntimeError) as error:
        loss.backward()
    return str(error.value)


def test_a_rank_that_goes_back_alone_hears_which_backward_it_waited_in() -> None:
    alone, _ = on_ranks(2, goes_back_alone, timeout=2.0)
    assert "rank 0 waited for other ranks in the backward of call 1 of head 1 of this process group" in alone, alone


# -- numbers that ranks learn --------------------------------------------------------------------------------------


class Learned(tm.ArcFace):
    """The scale is learned."""

    def __init__(self) -> None:
        super().__init__(m=0.3)
        self.s = nn.Parameter(torch.tensor(8.0, dtype=torch.float64))


def learned_scale() -> None:
    rows = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    for objective in ("softmax", "hinge", "max-hinge"):
        options: dict[str, Any] = dict(dtype=torch.float64, objective=objective)
        one, head = tm.MarginSoftmaxLoss(D, C, Learned(), **options), sharded(margin=Learned(), **options)
        with torch.no_grad():
            one.weight.copy_(made(C, D, seed=1))
        head.load_state_dict({"weight": one.weight.detach()}, strict=False)
        x, target = made(6, D, seed=2), torch.tensor([1, 2, 9, 3, 4, 7])
        for each, own in ((one, slice(None)), (head, rows)):
            each(x[own], target[own]).backward()
        torch.testing.assert_close(head.margin.s.grad, one.margin.s.grad, rtol=1e-12, atol=0.0)


def test_the_gradient_of_a_learned_scale_is_that_of_one_process() -> None:
    on_ranks(2, learned_scale, timeout=SECONDS)
