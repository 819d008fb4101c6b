"""What PyTorch wraps around a loss: each way of use gives the losses and gradients of plain eager use.

torch.func, hooks on what autograd saves, activation checkpointing, copies and averages of a head. What does not work is
here as what happens then. torch.compile and torch.export: test_compiled.py. Data parallelism: test_data_parallel.py.
CUDA graphs: kernels/test_whole_steps.py.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import every_backend, labels, made, not_ttsem, precise
from networks import CLASSES, HEADS, D, N, Network, assert_close, assert_equal, batch, dense, every_head, step
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import tritonmargin as tm

# -- torch.func ------------------------------------------------------------------------------------------------------


def losses(kind: str) -> tuple[Callable[..., Tensor], Tensor, Tensor, Tensor]:
    """A loss as a function of x, w and y, each of which comes twice, stacked."""
    options = HEADS[kind]() | {"sparse_grad": False}
    if options.pop("bias", False):
        options["bias"] = made(CLASSES, seed=9).float()

    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return tm.margin_cross_entropy(x, w, y, chunk_bytes=1, **options)

    y = torch.stack([labels(CLASSES, N, seed) for seed in (1, 2)])
    return loss, made(2, N, D, seed=3).float(), made(2, CLASSES, D, seed=4).float() / 2.0, y


@not_ttsem
@every_head
def test_vmap_over_embeddings_weights_or_labels_and_backward_through_it(kind: str) -> None:
    loss, x, w, y = losses(kind)
    x, w = x.requires_grad_(), w.requires_grad_()
    for over in ((0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)):
        given = [each if axis == 0 else each[0] for each, axis in zip((x, w, y), over, strict=True)]
        found = vmap(loss, in_dims=over)(*given)
        one_by_one = [
            loss(*(each if axis is None else each[i] for each, axis in zip(given, over, strict=True))) for i in range(2)
        ]
        expected = torch.stack(one_by_one)
        assert torch.equal(found, expected)
        grads = [dict(zip("xw", torch.autograd.grad(each.sum(), (x, w)), strict=True)) for each in (found, expected)]
        assert_close(*grads)


@not_ttsem
def test_all_gradients_of_a_batch_at_once() -> None:
    """torch.autograd.grad(is_grads_batched=True), and jacobian(vectorize=True), which does that."""
    given, y = made(N, D).float(), labels(CLASSES, N)
    w = made(CLASSES, D, seed=1).float()

    def loss(x: Tensor) -> Tensor:
        return tm.margin_cross_entropy(x, w, y, tm.ArcFace(s=16.0), reduction="none", chunk_bytes=1)

    x = given.clone().requires_grad_()
    (rows,) = torch.autograd.grad(loss(x), x, torch.eye(N), is_grads_batched=True)
    one_by_one = torch.stack([torch.autograd.grad(loss(x)[i], x)[0] for i in range(N)])
    torch.testing.assert_close(rows, one_by_one)
    for vectorize in (False, True):
        found = torch.autograd.functional.jacobian(loss, given, vectorize=vectorize)
        torch.testing.assert_close(found, one_by_one)


@every_backend
@every_head
def test_functional_call_gives_loss_and_gradients_of_the_numbers_it_is_given(kind: str, backend: str) -> None:
    dtype = precise(backend)[0]
    network, other, given = Network(kind).to(dtype), Network(kind).to(dtype), batch(dtype)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.7)
    numbers = {name: each.detach().requires_grad_() for name, each in other.named_parameters()}
    taken = numbers | dict(other.named_buffers())
    with tm.use_backend(backend):
        loss = functional_call(network, taken, given)
        grads = torch.autograd.grad(loss, list(numbers.values()))
    ours = {"loss": loss.detach(), **dict(zip(numbers, map(dense, grads), strict=True))}
    assert_equal(ours, step(other, other, *given, backend=backend))


@not_ttsem
def test_several_networks_at_once_by_stacked_parameters() -> None:
    """A margin's number is stacked too, where it is a parameter."""
    networks, given = [Network(), Network(), Network()], batch()
    with torch.no_grad():
        for place, network in enumerate(networks):
            network.head.weight += 0.1 * place
            network.head.margin.m = torch.nn.Parameter(torch.tensor(0.1 * place))
    numbers, buffers = stack_module_state(networks)  # type: ignore[arg-type]
    found = vmap(lambda *state: functional_call(networks[0], state, given))(numbers, buffers)
    found.sum().backward()
    for place, network in enumerate(networks):
        expected = step(network, network, *given)
        ours = {name: each.grad[place] for name, each in numbers.items()}
        assert_close({"loss": found[place].detach(), **ours}, expected)


@not_ttsem
@every_head
def test_gradients_inside_of_torch_func_are_those_of_backward(kind: str) -> None:
    loss, x, w, y = losses(kind)

    def backward(x: Tensor, w: Tensor) -> dict[str, Tensor]:
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        return dict(zip("xw", torch.autograd.grad(loss(x, w, y[0]).sum(), (x, w)), strict=True))

    def summed(x: Tensor, w: Tensor) -> Tensor:
        return loss(x, w, y[0]).sum()

    expected = backward(x[0], w[0])
    for call in (grad(summed, argnums=(0, 1)), jacrev(summed, argnums=(0, 1))):
        assert_close(dict(zip("xw", call(x[0], w[0]), strict=True)), expected)
    out, pulled = vjp(summed, x[0], w[0])
    assert_close(dict(zip("xw", pulled(torch.ones_like(out)), strict=True)), expected)
    both = vmap(grad(summed), in_dims=(0, None))(x, w[0])
    assert_close({"x": both[1]}, {"x": backward(x[1], w[0])["x"]})


@not_ttsem
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_a_head_by_its_parameters_inside_of_torch_func() -> None:
    network, given = Network(), batch()
    numbers = {name: each.detach() for name, each in network.named_parameters()}
    found = grad(lambda numbers: functional_call(network, numbers, given))(numbers)
    expected = step(network, network, *given)
    assert_close(found, {name: expected[name] for name in found})


@not_ttsem
def test_a_second_derivative_inside_of_torch_func_is_refused() -> None:
    loss, x, w, y = losses("bounded")
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        grad(lambda x: grad(lambda x: loss(x, w[0], y[0]).sum())(x).square().sum())(x[0])


@not_ttsem
@pytest.mark.parametrize("make", [tm.Softmax, tm.LSoftmax, tm.ArcFace, tm.NormFace])
@pytest.mark.parametrize("objective", ["softmax", "hinge", "max-hinge"])
def test_forward_mode_is_refused_before_any_work(
    make: type[tm.Margin], objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, along, w, y = made(N, D), made(N, D, seed=1), made(CLASSES, D, seed=2), labels(CLASSES, N)
    monkeypatch.setattr("tritonmargin.loss.class_pass", None)

    def loss(x: Tensor) -> Tensor:
        return tm.margin_cross_entropy(x, w, y, make(), objective=objective, chunk_bytes=1)

    for call in (lambda: jvp(loss, (x,), (along,)), lambda: jacfwd(loss)(x), lambda: hessian(loss)(x)):
        with pytest.raises(NotImplementedError, match="the loss has no forward mode"):
            call()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="the loss has no forward mode"):
        loss(forward_ad.make_dual(x, along))
    with tm.use_backend("reference"):
        _, found = jvp(loss, (x,), (along,))
        expected = (torch.autograd.functional.jacobian(loss, x) * along).sum()
    torch.testing.assert_close(found, expected)


# -- what autograd saves ---------------------------------------------------------------------------------------------


@not_ttsem
@every_backend
@every_head
def test_what_backward_needs_may_wait_in_the_cpus_memory(kind: str, backend: str) -> None:
    dtype = precise(backend)[0]
    network, given = Network(kind).to(dtype), batch(dtype)
    expected = step(network, network, *given, backend=backend)
    with save_on_cpu():
        moved = step(network, network, *given, backend=backend)
    assert_equal(moved, expected)


@not_ttsem
@every_backend
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@every_head
def test_a_checkpointed_head_has_the_same_gradients(kind: str, reentrant: bool, backend: str) -> None:
    dtype = precise(backend)[0]
    network, (x, y) = Network(kind).to(dtype), batch(dtype)
    expected = step(network, network, x, y, backend=backend)
    again = functools.partial(checkpoint, network, use_reentrant=reentrant)
    assert_equal(step(again, network, x.requires_grad_(), y, backend=backend), expected)


@not_ttsem
def test_a_selective_checkpoint_may_keep_the_class_pass() -> None:
    """Its op then runs once, and the margin again."""
    network, (x, y) = Network(), batch()
    ran: list[str] = []

    def policy(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        once = op is torch.ops.tritonmargin.class_pass.default
        ran.append("again" if context.is_recompute and once else "first" if once else "other")
        return CheckpointPolicy.MUST_SAVE if once else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    kept = functools.partial(checkpoint, network, use_reentrant=False, context_fn=contexts)
    assert_equal(step(kept, network, x, y), step(network, network, x, y))
    assert ran.count("first") == 1


@not_ttsem
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_sampled_head_in_a_checkpoint_draws_twice(reentrant: bool) -> None:
    """As the head's docstring warns: the loss is of the first sample, the gradient of the second."""
    network, (x, y) = Network(sample_rate=0.3), batch()
    alone = [Network(sample_rate=0.3), Network(sample_rate=0.3)]
    first = step(alone[0], alone[0], x, y)
    alone[1](x, y)
    second = step(alone[1], alone[1], x, y)
    again = functools.partial(checkpoint, network, use_reentrant=reentrant)
    assert_equal(step(again, network, x.requires_grad_(), y), second | {"loss": first["loss"]})
    # A checkpoint that is not reentrant ends the second forward as soon as backward has all it needs.
    assert network.head.sampler.tolist() == [0, 2 if reentrant else 1]


@not_ttsem
@every_backend
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_rows_are_updated_once_in_the_backward_of_a_checkpoint(reentrant: bool, backend: str) -> None:
    dtype = precise(backend)[0]
    networks, (x, y) = [Network().to(dtype), Network().to(dtype)], batch(dtype)
    for network in networks:
        network.head.update_in_backward(tm.optim.RowSGD([network.head.weight], lr=0.1, momentum=0.9))
    again = functools.partial(checkpoint, networks[0], use_reentrant=reentrant)
    with tm.use_backend(backend):
        again(x.requires_grad_(), y).backward()
        networks[1](x, y).backward()
    for ours, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(ours, other)
    assert not torch.equal(networks[0].head.weight, Network().to(dtype).head.weight)


# -- copies and averages ---------------------------------------------------------------------------------------------


def by_torch_save(network: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda network: pickle.loads(pickle.dumps(network)),
    "torch.save": by_torch_save,
}


@every_backend
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_made_in_the_middle_of_training_goes_on_alike_and_apart(way: str, backend: str) -> None:
    """Its sample too. An optimizer in backward stays with the original: tests of optimizers."""
    network, (x, y) = Network("smoothed, with a bias and retained logits", sample_rate=0.3), batch()
    network.head.margin.lam = 2.0  # no part of the state dict

    def train(network: nn.Module) -> dict[str, Tensor]:
        found = step(network, network, x, y, backend=backend)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter -= 0.1 * found[name]
        return found

    train(network)
    twin = COPIES[way](network)
    assert twin.head.weight.sampled
    assert repr(twin) == repr(network)
    before = twin.head.weight.detach().clone()
    expected = [train(network), train(network)]
    assert torch.equal(twin.head.weight, before)
    for right in expected:
        assert_equal(train(twin), right)
    assert torch.equal(twin.head.sampler, network.head.sampler)


AVERAGES = {
    "multi_avg_fn": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "avg_fn": {"avg_fn": get_ema_avg_fn(0.9)},
}


@every_backend
@pytest.mark.parametrize("buffers", [False, True], ids=["parameters", "parameters and buffers"])
@pytest.mark.parametrize("way", AVERAGES)
def test_an_exponential_moving_average_of_a_head_is_that_of_its_numbers(way: str, buffers: bool, backend: str) -> None:
    """And its loss that of a head with these numbers, of all classes in eval mode; its margin's numbers are its own."""
    network, (x, y) = Network(sample_rate=0.3), batch()
    average = AveragedModel(network, use_buffers=buffers, **AVERAGES[way])
    expected: dict[str, Tensor] = {}
    for m in (0.1, 0.2, 0.4):
        network.head.margin.m = m
        found = step(network, network, x, y, backend=backend)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter -= 0.1 * found[name]
        average.update_parameters(network)
        now = {name: each.detach().clone() for name, each in network.named_parameters()}
        expected = {name: each.lerp(now[name], 0.1) for name, each in expected.items()} or now
    for name, parameter in average.module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], msg=name)
    assert average.module.head.weight.sampled
    assert average.module.head.margin.m == 0.4  # as it was before the first step
    other = Network()
    other.load_state_dict(average.module.state_dict(), strict=False)
    for module in (average, network):
        module.eval()
    assert_equal(step(average, average.module, x, y, backend=backend), step(other, other, x, y, backend=backend))
