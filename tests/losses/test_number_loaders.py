"""A margin's numbers after what loaders, copies and moves do to a model: what they were, and so is the loss."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import cpu_only, every_margin
from torch import Tensor, nn

import tritonmargin as tm
from tritonmargin.margins import MARGINS

NUMBERS: dict[str, dict[str, float]] = {
    "Softmax": {},
    "L2Softmax": {"s": 7.0},
    "NormFace": {"s": 7.0},
    "LSoftmax": {"m": 3, "lam": 0.7},
    "ASoftmax": {"m": 3, "lam": 0.7},
    "SphereFaceR": {"m": 1.3, "s": 7.0},
    "CosFace": {"m": 0.3, "s": 7.0},
    "ArcFace": {"m": 0.3, "s": 7.0},
    "CombinedMargin": {"m1": 1.1, "m2": 0.3, "m3": 0.2, "s": 7.0},
}


class Network(nn.Module):
    """Made with a margin's defaults; its numbers are set afterwards, as a recipe or a schedule does."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 6)
        self.head = tm.MarginSoftmaxLoss(6, 20, MARGINS[name]())
        for number, value in NUMBERS[name].items():
            setattr(self.head.margin, number, value)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.layer(x), y)


def on_meta(name: str) -> Network:
    with torch.device("meta"):
        return Network(name)


def transformers_does(network: Network, name: str) -> Network:
    """What `from_pretrained` does, by hand: transformers is no requirement of the tests.

    Built on meta; the state dict's tensors put in; buffers that it does not have made anew without a value; then
    `_init_weights`, which calls `reset_parameters` of modules that have parameters without a value, of others not.
    """
    loaded = on_meta(name)
    for key, value in network.state_dict().items():
        owner, _, last = key.rpartition(".")
        module = loaded.get_submodule(owner)
        if last in module._parameters:
            module._parameters[last] = nn.Parameter(value.clone())
        else:
            module._buffers[last] = value.clone()
    for module in loaded.modules():
        for last, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[last] = torch.full_like(buffer, -9.9e30, device="cpu")  # what empty_like may give
        if hasattr(module, "reset_parameters") and not list(module.parameters()):
            module.reset_parameters()
    return loaded


def assigned(network: Network, name: str) -> Network:
    loaded = on_meta(name)
    loaded.load_state_dict(network.state_dict(), assign=True)
    return loaded


def emptied(network: Network, name: str) -> Network:
    loaded = on_meta(name).to_empty(device="cpu")
    loaded.load_state_dict(network.state_dict())
    return loaded


def saved(network: Network, name: str) -> Network:
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def round_trip(dtype: torch.dtype) -> Callable[[Network, str], Network]:
    def there_and_back(network: Network, name: str) -> Network:
        changed = copy.deepcopy(network).to(dtype).float()
        changed.load_state_dict(network.state_dict())  # the weights are rounded, and are not what is looked at
        return changed

    return there_and_back


WAYS: dict[str, Callable[[Network, str], Network]] = {
    "transformers": transformers_does,
    "meta and assign": assigned,
    "to_empty": emptied,
    "deepcopy": lambda network, name: copy.deepcopy(network),
    "pickle": lambda network, name: pickle.loads(pickle.dumps(network)),
    "torch.save": saved,
    "half": round_trip(torch.float16),
    "bfloat16": round_trip(torch.bfloat16),
    "double": round_trip(torch.float64),
}


@cpu_only
@every_margin
@pytest.mark.parametrize("way", WAYS)
def test_numbers_and_loss_are_what_they_were(way: str, name: str) -> None:
    torch.manual_seed(0)
    network, x, y = Network(name), torch.randn(9, 5), torch.arange(9)
    loaded = WAYS[way](network, name)
    for number, value in NUMBERS[name].items():
        assert getattr(loaded.head.margin, number) == value
    assert repr(loaded.head.margin) == repr(network.head.margin)
    for given in (network, loaded):
        given.zero_grad()
        given(x, y).backward()
    assert torch.equal(loaded(x, y), network(x, y))
    assert torch.equal(loaded.head.weight.grad, network.head.weight.grad)


@cpu_only
def test_a_loaders_buffers_hold_none_of_the_numbers() -> None:
    """There is nothing for it to overwrite, to average or to stack."""
    for name in MARGINS:
        assert not list(Network(name).buffers())


@cpu_only
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda margin: pickle.loads(pickle.dumps(margin))])
def test_a_copy_has_numbers_of_its_own(way: Callable[[Any], Any]) -> None:
    margin = tm.CosFace(m=0.3, s=8.0)
    held = margin.tensor("m", torch.device("cpu"))
    twin = way(margin)
    twin.m, twin.s = 0.1, 4.0
    assert (margin.m, margin.s, float(held)) == (0.3, 8.0, 0.3)
    assert (twin.m, twin.s, float(twin.tensor("m", torch.device("cpu")))) == (0.1, 4.0, 0.1)


def test_a_margin_that_was_pickled_with_buffers_is_read() -> None:
    """One that was made when the numbers were buffers: the buffers, and the floats beside them."""
    margin = tm.CombinedMargin()
    state = {name: value for name, value in vars(margin).items() if name not in ("m1", "m2", "m3")}
    for name in ("_held", "_bound_exponent"):
        del state[name]
    values = {"m1": 1.1, "m2": 0.3, "m3": 0.2}
    state["_values"] = values
    state["_buffers"] = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    state["_non_persistent_buffers_set"] = set(values)
    state["s"] = 16.0
    old = tm.CombinedMargin.__new__(tm.CombinedMargin)
    old.__setstate__(state)
    assert repr(old) == repr(tm.CombinedMargin(1.1, 0.3, 0.2, s=16.0))
    assert not list(old.buffers())
    old.m2 = 0.4
    assert float(old.tensor("m2", torch.device("cpu"))) == 0.4
    assert old.logit_bound == 16.0


@cpu_only
def test_a_number_that_inference_mode_asked_for_first_is_trained_with_later() -> None:
    """Its tensor is no inference tensor, which autograd could not save for backward."""
    head, x, y = tm.MarginSoftmaxLoss(6, 20, tm.ArcFace(m=0.3, s=8.0)), torch.randn(9, 6), torch.arange(9)
    head.margin._held["m"].clear()  # as on a device that nobody has asked for
    with torch.inference_mode():
        head(x, y)
    head(x, y).backward()
    assert head.weight.grad.isfinite().all()


@cpu_only
def test_a_fake_tensor_is_not_kept() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        margin = tm.ArcFace(m=0.3, s=8.0)
        head = tm.MarginSoftmaxLoss(6, 20, margin)
        assert head(torch.randn(9, 6), torch.zeros(9, dtype=torch.int64)).shape == ()
    x, w, y = torch.randn(9, 6), torch.randn(20, 6), torch.arange(9)
    right = tm.margin_cross_entropy(x, w, y, tm.ArcFace(m=0.3, s=8.0))
    assert torch.equal(tm.margin_cross_entropy(x, w, y, margin), right)
