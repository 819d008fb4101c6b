"""The class pass as autograd and compilers see it. The only file that knows `torch.library`.

Eager code runs a plain `torch.autograd.Function` over the backend's forward and backward: an operator of torch costs
the CPU more time than a small pass on a GPU. Whoever traces or transforms (torch.compile, torch.export, torch.func,
fake tensors, dispatch modes) sees the same two functions as operators, `tritonmargin::class_pass` and
`tritonmargin::class_pass_backward`. Their schemas are flat: the tensors of `PassInputs`, then the fields of `PassSpec`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tritonmargin.backends.registry import KernelError, backend_after, load_backend
from tritonmargin.optim.update_rules import RowUpdate
from tritonmargin.spec import InputGrads, PassGrads, PassInputs, PassOutput, PassSpec

SAVED = 10  # tensors that a backend may save for backward: torch.func.vmap takes no lists of tensors
INPUTS, OUTPUTS, GRADS = len(PassInputs._fields), len(PassOutput._fields), len(PassGrads._fields)
SPEC = tuple(field.name for field in fields(PassSpec))  # ends with "backend"
PLAIN = (Tensor, torch.nn.Parameter)


def code_of_results() -> str:
    """A checksum of the code that decides which results the operators have, and of what shape.

    Inductor keeps compiled graphs on disk by the operators' names and arguments. It must not find one that another
    version of this package made, whose results had other shapes.
    """
    package, found = Path(__file__).parents[1], 0
    for folder in ("class_pass", "backends"):
        for file in sorted((package / folder).rglob("*.py")):
            found = zlib.crc32(file.read_bytes(), found)
    return f"{zlib.crc32((package / 'spec.py').read_bytes(), found):08x}"


CODE = code_of_results()
batched = torch._C._functorch.is_legacy_batchedtensor  # torch.autograd.grad(is_grads_batched=True)


class Updater(Protocol):
    """An optimizer that can update rows while backward finishes their gradient: `tritonmargin.optim.RowOptimizer`."""

    def begin_in_backward(self, weight: Tensor) -> RowUpdate: ...

    def finish_in_backward(self, weight: Tensor, update: RowUpdate, ids: Tensor | None) -> None: ...


def class_pass(inputs: PassInputs, spec: PassSpec, updater: Updater | None = None) -> PassOutput:
    """One class pass, differentiable once in x, weight and bias.

    With `updater` the weight gets no gradient: its rows are updated in backward.

    Raises:
        KernelError: a kernel of the backend could not be compiled or launched.
    """
    grad = torch.is_grad_enabled()
    updates = updater is not None and grad and inputs.weight.requires_grad
    if not updates and seen_as_ops(inputs):
        if inside_torch_func("Grad"):
            return PassOutput(*Transformed.apply(spec, *inputs)[:OUTPUTS])
        found = torch.ops.tritonmargin.class_pass(*inputs, *encode(spec))
        return PassOutput(*found[:OUTPUTS])
    if grad and any(each is not None and each.requires_grad for each in (inputs.x, inputs.weight, inputs.bias)):
        return PassOutput(*ClassPass.apply(spec, updater if updates else None, *inputs))
    return load_backend(spec.backend).forward(inputs, spec)[0]


def seen_as_ops(tensors: Sequence[Tensor | None]) -> bool:
    """Whether somebody looks who has to see operators: a compiler, a transform, a mode, a tensor with its own rules."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or any(each is not None and (type(each) not in PLAIN or batched(each)) for each in tensors)
    )


# -- forward and backward, whoever calls them ------------------------------------------------------------------------


def forward_pass(inputs: PassInputs, spec: PassSpec) -> tuple[PassOutput, tuple[Tensor, ...]]:
    """The backend's forward, as an operator where it has to be one."""
    if not seen_as_ops(inputs):
        return load_backend(spec.backend).forward(inputs, spec)
    found = torch.ops.tritonmargin.class_pass(*inputs, *encode(spec))
    return PassOutput(*found[:OUTPUTS]), tuple(found[OUTPUTS:])


def backward_pass(
    inputs: PassInputs,
    saved: tuple[Tensor, ...],
    grads: PassGrads,
    needs: tuple[bool, bool, bool],
    spec: PassSpec,
    update: RowUpdate | None = None,
) -> InputGrads:
    """The backend's backward, as an operator where it has to be one; its result cannot be differentiated."""

    def run() -> InputGrads:
        return by_backend(inputs, saved, grads, needs, spec, update)

    if update is None and seen_as_ops((*inputs, *grads)):
        tensors = (*inputs, *padded(saved, inputs.x), *grads)
        run_op = TransformedBackward.apply if inside_torch_func("Grad") else backward_as_op
        packed = run_op((*needs, *encode(spec)), *tensors)
        return InputGrads(*(each if need else None for each, need in zip(packed, needs, strict=True)))
    return once(run, inputs.x, inputs.weight, inputs.bias, *grads)


def by_backend(
    inputs: PassInputs,
    saved: tuple[Tensor, ...],
    grads: PassGrads,
    needs: tuple[bool, bool, bool],
    spec: PassSpec,
    update: RowUpdate | None = None,
) -> InputGrads:
    """The backend's backward; the torch backend's, if a kernel fails and nobody asked for the backend by name."""
    backend = load_backend(spec.backend)
    try:
        return backend.backward(inputs, saved, grads, needs, spec, update)
    except KernelError as error:
        other = backend_after(error, spec.backend, update)
        if backend.normalises:
            # Its inputs and what it saved are not those of the torch backend, which would have to begin anew.
            raise KernelError(
                f"tritonmargin: a kernel failed in backward ({error}). The next step does without the kernels."
            ) from error
        return other.backward(inputs, saved, grads, needs, spec, update)


def asked_for(inputs: PassInputs, spec: PassSpec, grads: Sequence[Tensor | None]) -> PassGrads:
    """The gradients of the outputs [OUTPUTS], without those of outputs that nobody asked for, which are empty."""
    out = PassOutput(*grads[:OUTPUTS])  # type: ignore[arg-type]
    hinging = inputs.threshold is not None
    return PassGrads(
        rest=out.rest if spec.want_rest and not hinging else None,
        target_product=out.target_product,
        target_norm=out.target_norm,
        target_bias=None if inputs.bias is None else out.target_bias,
        embedding_norm=out.embedding_norm if load_backend(spec.backend).normalises else None,
        mean_logit=None if inputs.mean_weight is None else out.mean_logit,
        hinge=out.hinge if hinging else None,
        hardest_product=out.hardest_product if spec.want_hardest else None,
    )


def constants(inputs: PassInputs, out: PassOutput, saved: Sequence[Tensor]) -> list[Tensor]:
    """Outputs without a gradient. Under the hinge the logsumexp is one of the statistics."""
    hinging = inputs.threshold is not None
    return [out.violations, out.hardest_row, *saved, *([out.rest] if hinging else [])]


def input_gradients(ctx: Any, grads: Sequence[Tensor | None], needs: tuple[bool, bool, bool]) -> list[Tensor | None]:
    """Gradients of all of PassInputs."""
    inputs, saved = unpacked(ctx)
    spec: PassSpec = ctx.spec
    found = backward_pass(inputs, saved, asked_for(inputs, spec, grads), needs, spec)
    return by_position(found, inputs, spec)


def unpacked(ctx: Any) -> tuple[PassInputs, tuple[Tensor, ...]]:
    tensors = ctx.saved_tensors  # once: activation checkpointing may make them anew each time
    return PassInputs(*tensors[:INPUTS]), tensors[INPUTS:]


def by_position(found: InputGrads, inputs: PassInputs, spec: PassSpec) -> list[Tensor | None]:
    grad_weight = found.weight
    if grad_weight is not None and spec.sparse:
        grad_weight = as_sparse(grad_weight, inputs.weight, inputs.class_ids)
    positions = {"x": found.x, "weight": grad_weight, "bias": found.bias}
    return [positions.get(name) for name in PassInputs._fields]


def as_sparse(rows: Tensor, weight: Tensor, ids: Tensor | None) -> Tensor:
    """The gradient [C, D] of which `rows` are the ones that are not 0."""
    ids = torch.arange(weight.shape[0], device=weight.device) if ids is None else ids
    return torch.sparse_coo_tensor(ids[None], rows, weight.shape, is_coalesced=True, check_invariants=False)


def wanted(needs_input_grad: Sequence[bool]) -> tuple[bool, bool, bool]:
    needs = PassInputs(*needs_input_grad)  # type: ignore[arg-type]
    return bool(needs.x), bool(needs.weight), bool(needs.bias)


def forward_mode(tensors: Sequence[Tensor | None]) -> bool:
    """Whether somebody differentiates these tensors in forward mode, torch.func.jvp among them."""
    level = torch.autograd.forward_ad._current_level
    if torch.compiler.is_compiling() or level < 0:
        return False
    unpack = torch.autograd.forward_ad.unpack_dual
    # Inside of another transform, as in a hessian, the tangents are not those of the tensors that are seen here.
    return inside_torch_func("Jvp") or any(each is not None and unpack(each).tangent is not None for each in tensors)


# -- eager -----------------------------------------------------------------------------------------------------------


class ClassPass(torch.autograd.Function):
    """The class pass; with an updater its backward updates the rows of the weight, which gets no gradient."""

    @staticmethod
    def forward(ctx: Any, spec: PassSpec, updater: Updater | None, *tensors: Any) -> tuple[Tensor, ...]:
        inputs = PassInputs(*tensors)
        out, saved = forward_pass(inputs, spec)
        ctx.spec, ctx.updater, ctx.done = spec, updater, False
        ctx.weight = None if updater is None else inputs.weight
        ctx.save_for_backward(*tensors, *saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*constants(inputs, out, ()))
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        needs = wanted(ctx.needs_input_grad[2:])
        if ctx.updater is None:
            return None, None, *input_gradients(ctx, grads, needs)
        return None, None, *updating(ctx, grads, needs)


def updating(ctx: Any, grads: Sequence[Tensor | None], needs: tuple[bool, bool, bool]) -> list[Tensor | None]:
    """`input_gradients`, and the rows of the weight are updated."""
    update = begin_update(ctx, needs[1])
    inputs, saved = unpacked(ctx)
    needs = needs[0], update is not None, needs[2]
    found = backward_pass(inputs, saved, asked_for(inputs, ctx.spec, grads), needs, ctx.spec, update)
    if update is not None:
        ctx.updater.finish_in_backward(ctx.weight, update, inputs.class_ids)
    return by_position(found._replace(weight=None), inputs, ctx.spec)


def begin_update(ctx: Any, need_weight: bool) -> RowUpdate | None:
    """The optimizer's step on ctx.weight, once; None where this backward is not about the weight."""
    if ctx.done:
        raise RuntimeError(
            "tritonmargin: a second backward through a loss whose weight was updated in its first one "
            "(update_in_backward): the weight is no longer the one of the forward pass"
        )
    update: RowUpdate | None = None
    if need_weight and is_trained(ctx.weight):
        update = ctx.updater.begin_in_backward(ctx.weight)
    ctx.done = update is not None
    return update


def is_trained(weight: Tensor) -> bool:
    """Whether this backward is about the weight: `torch.autograd.grad(loss, x)` must not update it."""
    return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(weight).node)


def once(run: Callable[[], InputGrads], *tensors: Tensor | None) -> InputGrads:
    """What `run` finds in a backward, given the tensors that it follows from; it cannot be differentiated again."""
    return InputGrads(*Once.apply(run, *tensors)) if torch.is_grad_enabled() else run()


class Once(torch.autograd.Function):
    """What `run` returns, given the tensors that it follows from; who differentiates it hears that it cannot be."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[], InputGrads], *tensors: Any) -> tuple[Tensor | None, ...]:
        return tuple(run())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        no_double_backward(ctx, *grads)


def no_double_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "tritonmargin: the loss can be differentiated once; its gradient has no gradient (double backward). "
        'Use tm.use_backend("reference") for second derivatives on small problems.'
    )


# -- torch.func's grad, vjp and jacrev, which take functions of another form than eager code and compilers ------------


def inside_torch_func(transform: str) -> bool:
    """Whether a transform of this kind is being done: "Grad", "Jvp" or "Vmap"."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    kind = getattr(torch._C._functorch.TransformType, transform)
    return any(each.key() == kind for each in torch._C._functorch.get_interpreter_stack() or ())


class Transformed(torch.autograd.Function):
    """`ClassPass` without an updater."""

    generate_vmap_rule = True

    @staticmethod
    def forward(spec: PassSpec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.ops.tritonmargin.class_pass(*tensors, *encode(spec))
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        setup_forward(ctx, (*inputs[1:], *encode(inputs[0])), output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return None, *input_gradients(ctx, grads, wanted(ctx.needs_input_grad[1:]))


def backward_as_op(constants: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = torch.ops.tritonmargin.class_pass_backward(*tensors, *constants)
    return found


class TransformedBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(constants: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return backward_as_op(constants, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return no_double_backward(ctx, *grads)


# -- the operators ---------------------------------------------------------------------------------------------------


def encode(spec: PassSpec) -> tuple[Any, ...]:
    """The fields of a spec in the order of the schema; the last one, the backend's name, with the code's."""
    return (*(getattr(spec, name) for name in SPEC[:-1]), f"{spec.backend} {CODE}")


def decode(values: Sequence[Any]) -> PassSpec:
    return PassSpec(**dict(zip(SPEC, (*values[:-1], values[-1].partition(" ")[0]), strict=True)))


def padded(saved: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """As many tensors as the schema has, empty ones on the device of x at the end."""
    return (*saved, *(x.new_empty(0) for _ in range(SAVED - len(saved))))


def schema_of(named: Sequence[str], kind: str) -> str:
    return ", ".join(f"{kind} {name}" for name in named)


def schemas() -> dict[str, str]:
    optional = PassInputs._field_defaults
    inputs = ", ".join(f"Tensor{'?' if name in optional else ''} {name}" for name in PassInputs._fields)
    kinds = {"bool": "bool", "float": "float", "int": "SymInt", "torch.dtype": "ScalarType", "str": "str"}
    spec = ", ".join(f"{kinds[str(field.type)]} {field.name}" for field in fields(PassSpec))
    saved = schema_of([f"saved_{i}" for i in range(SAVED)], "Tensor")
    grads = schema_of([f"grad_{name}" for name in PassGrads._fields], "Tensor?")
    needs = schema_of(["need_x", "need_weight", "need_bias"], "bool")
    results = ", ".join(["Tensor"] * (OUTPUTS + SAVED))
    return {
        "class_pass": f"({inputs}, {spec}) -> ({results})",
        "class_pass_backward": f"({inputs}, {saved}, {grads}, {needs}, {spec}) -> (Tensor, Tensor, Tensor)",
    }


def forward_op(*args: Any) -> tuple[Tensor, ...]:
    inputs, spec = PassInputs(*args[:INPUTS]), decode(args[INPUTS:])
    try:
        out, saved = load_backend(spec.backend).forward(inputs, spec)
    except KernelError as error:
        # A graph is made for one backend: it cannot fall back, but the next call is compiled for another one.
        backend_after(error, spec.backend)
        raise
    return apart((*out, *padded(saved, inputs.x)), inputs)


def forward_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, spec = PassInputs(*args[:INPUTS]), decode(args[INPUTS:])
    out, saved = load_backend(spec.backend).fake(inputs, spec)
    return apart((*out, *padded(saved, inputs.x)), inputs)


def apart(results: Sequence[Tensor], inputs: PassInputs) -> tuple[Tensor, ...]:
    """The results, copies of those that are inputs or other results: an operator's results are its own."""
    taken = {id(each) for each in inputs}
    found = []
    for each in results:
        found.append(each.clone() if id(each) in taken else each)
        taken.add(id(each))
    return tuple(found)


def split_backward(args: Sequence[Any]) -> tuple[PassInputs, tuple[Tensor, ...], PassGrads, Any, PassSpec]:
    at = [INPUTS, INPUTS + SAVED, INPUTS + SAVED + GRADS, INPUTS + SAVED + GRADS + 3]
    saved, needs = tuple(args[at[0] : at[1]]), tuple(args[at[2] : at[3]])
    return PassInputs(*args[: at[0]]), saved, PassGrads(*args[at[1] : at[2]]), needs, decode(args[at[3] :])


def backward_op(*args: Any) -> tuple[Tensor, ...]:
    inputs, saved, grads, needs, spec = split_backward(args)
    found = by_backend(inputs, saved, grads, needs, spec)
    nothing = (inputs.x, inputs.weight, inputs.x if inputs.bias is None else inputs.bias)
    return tuple(other.new_empty(0) if each is None else each for each, other in zip(found, nothing, strict=True))


def backward_fake(*args: Any) -> tuple[Tensor, ...]:
    (x, weight, _, class_ids, bias, *_), _, _, (need_x, need_weight, need_bias), spec = split_backward(args)
    rows = class_ids.shape[0] if class_ids is not None and spec.sparse else weight.shape[0]
    return (
        torch.empty(x.shape if need_x else (0,), dtype=x.dtype, device=x.device),
        torch.empty((rows, weight.shape[1]) if need_weight else (0,), dtype=weight.dtype, device=weight.device),
        (x if bias is None else bias).new_empty(weight.shape[0] if need_bias else 0),
    )


def setup_forward(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.spec = decode(inputs[INPUTS:])
    out, saved = PassOutput(*output[:OUTPUTS]), output[OUTPUTS:]
    ctx.save_for_backward(*inputs[:INPUTS], *saved)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*constants(PassInputs(*inputs[:INPUTS]), out, saved))


def differentiate_forward(ctx: Any, *grads: Any) -> Any:
    found = input_gradients(ctx, grads, wanted(ctx.needs_input_grad[:INPUTS]))
    return (*found, *[None] * len(SPEC))


LIBRARY = torch.library.Library("tritonmargin", "FRAGMENT")
for name, schema in schemas().items():
    LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
LIBRARY.impl("class_pass", forward_op, "CompositeExplicitAutograd")
LIBRARY.impl("class_pass_backward", backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("tritonmargin::class_pass", forward_fake, lib=LIBRARY)
torch.library.register_fake("tritonmargin::class_pass_backward", backward_fake, lib=LIBRARY)
torch.library.register_autograd(
    "tritonmargin::class_pass", differentiate_forward, setup_context=setup_forward, lib=LIBRARY
)
torch.library.register_autograd("tritonmargin::class_pass_backward", no_double_backward, lib=LIBRARY)
