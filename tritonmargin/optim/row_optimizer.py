"""Optimisers for class weights of which a step sees a sample of the rows."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tritonmargin.arguments import FLOATS, check_dtype, check_flag, check_integer, check_name
from tritonmargin.backends.precision import accumulate
from tritonmargin.checks import looks_at_values
from tritonmargin.distributed.dtensors import is_dtensor
from tritonmargin.distributed.state import first_row, like, local, own_rows, rows_like
from tritonmargin.optim.update_rules import RowUpdate, mixed, update_rows

UNSAMPLED = ("frozen", "decay")
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CHUNK_BYTES = 32 << 20  # rows updated at a time: room for their copies in the precision of sums
# No weight of a loss is this large, and every scale that a GradScaler starts with is (its default is 2^16).
SCALED = 1024.0


class NoGradient(Tensor):
    """What stands in `weight.grad` after the rows were updated in backward: it says why there is nothing to use."""

    optimizer: weakref.ref[RowOptimizer]  # the one that updated them; it holds the weight, which holds this

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("__get__", "__set__"):
            return super().__torch_function__(func, types, args, kwargs or {})
        raise RuntimeError(
            "tritonmargin: this weight has no gradient, its rows were updated during backward (update_in_backward). "
            "So the gradient can be neither clipped, nor unscaled by a GradScaler, nor accumulated over several "
            "backwards. Use the optimizer without update_in_backward for that (a sparse gradient, sparse_grad=True, "
            "can be unscaled and accumulated; clip_grad_norm_ takes dense ones only)."
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return "NoGradient()"


class RowOptimizer(torch.optim.Optimizer):
    """What the two optimisers share: rows with a gradient, rows without, and the update inside backward."""

    state_names: tuple[str, ...] = ()

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        if isinstance(params, Tensor | str | bytes) or not isinstance(params, Iterable):
            raise TypeError(f"params must be an iterable of parameters or of dicts, got {type(params).__name__}")
        params = list(params)
        for each in params:
            if not isinstance(each, Tensor | dict | tuple):
                raise TypeError(f"params must hold parameters or dicts with them, got {type(each).__name__}")
        if not params:
            raise ValueError("params holds no parameter")
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; ValueError or TypeError for what does not fit, such as a parameter not [C, D] or [C].

        Nothing is added then.
        """
        super().add_param_group(param_group)
        try:
            self.check_all(self.param_groups[-1])
            for weight in self.param_groups[-1]["params"]:
                check_rows(weight)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def check_all(self, group: dict[str, Any]) -> None:
        """ValueError or TypeError for an option of a group that does not fit."""
        self.check_group(group)
        check_name("unsampled", group["unsampled"], UNSAMPLED)
        if group["state_dtype"] is not None:
            check_dtype("state_dtype", group["state_dtype"], STATE_DTYPES)
        check_flag("stochastic_rounding", group["stochastic_rounding"])
        check_integer("seed", group["seed"])

    def check_group(self, group: dict[str, Any]) -> None:
        """ValueError for a number out of range."""
        raise NotImplementedError

    def rule(self, group: dict[str, Any]) -> tuple[str, tuple[float, ...], int]:
        """The rule's name, its numbers, and how many matrices of state it needs."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the rows of every gradient, sparse or dense; those of `update_in_backward` are done already."""
        loss = None
        if closure is not None and not callable(closure):
            raise TypeError(f"closure must be callable, got {closure!r}")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                grad = weight.grad
                if isinstance(grad, NoGradient):
                    if grad.optimizer() is not self:
                        raise RuntimeError(
                            "update_in_backward: another optimizer than this one updated the weight's rows"
                        )
                    weight.grad = None
                elif grad is not None:
                    self.apply(weight, grad)
        return loss

    def apply(self, weight: Tensor, grad: Tensor) -> None:
        """One update of `weight` by its gradient."""
        update = self.begin(weight)
        parameter, weight, grad = weight, local(weight), local(grad)
        ids = None
        if grad.is_sparse:
            ids, grad = rows_of(grad)
        elif getattr(weight, "sampled", False) and update.unsampled == "frozen" and moves_all(update):
            warnings.warn(
                "tritonmargin: the gradient of a sampled head's weight is dense, so rows that were not sampled "
                "move too, by momentum or decay, in spite of unsampled='frozen'. Ask the head for sparse_grad=True or "
                "use head.update_in_backward(optimizer)",
                stacklevel=3,
            )
            weight.sampled = False  # type: ignore[attr-defined]  # said once
        for rows in self.chunks(weight, len(grad)):
            # A copy: an optimiser leaves gradients as they are.
            part = grad[rows].to(accumulate(weight.dtype), copy=True)
            update_rows(
                update, rows if ids is None else ids[rows], part.reshape(len(part), -1) if weight.ndim == 1 else part
            )
        self.finish(parameter, update, ids)

    def begin(self, weight: Tensor) -> RowUpdate:
        """The update that the next step makes, for whoever has the gradient rows by rows; then call `finish`.

        Raises:
            RuntimeError: the last one stopped after it had moved some rows and before it had moved all.
        """
        started = self.started.get(weight)
        if started is not None and started.touched:
            raise RuntimeError(
                "tritonmargin: the last update of this weight stopped in the middle (out of memory, Ctrl-C, an error): "
                "some rows have moved and some have not. Load the last checkpoint, weight and optimizer"
            )
        group, rows = self.group_of(weight), local(weight.detach())
        rule, numbers, _ = self.rule(group)
        state = self.state_of(weight)
        step = int(state["step"])
        self.started[weight] = update = RowUpdate(
            rule=rule,
            weight=matrix(rows),
            numbers=numbers,
            state=tuple(matrix(local(state[name])) for name in self.state_names if name in state),
            steps=local(state["row_steps"]) if "row_steps" in state else None,
            seed=self.seed_of(weight, step) if group["stochastic_rounding"] else None,
            unsampled=group["unsampled"],
        )
        return update

    @property
    def started(self) -> dict[Tensor, RowUpdate]:
        """Updates that are not finished. Not part of the state: a loaded one is that of a finished step."""
        found: dict[Tensor, RowUpdate] = self.__dict__.setdefault("_started", {})
        return found

    def seed_of(self, weight: Tensor, step: int) -> int:
        """Another one for every step, parameter and shard."""
        place = next(i for i, other in enumerate(self.parameters()) if other is weight)
        return mixed(self.group_of(weight)["seed"], step, place, first_row(weight))

    def state_of(self, weight: Tensor) -> dict[str, Any]:
        """The state of one parameter, zeros before its first step."""
        state: dict[str, Any] = self.state[weight]
        for name in self.names_of_state(weight):
            if name not in state:
                state[name] = self.new_state(weight, name)
        return state

    def names_of_state(self, weight: Tensor) -> list[str]:
        rule, _, matrices = self.rule(self.group_of(weight))
        return ["step", *self.state_names[:matrices], *(["row_steps"] if rule == "adamw" else [])]

    def new_state(self, weight: Tensor, name: str) -> Tensor:
        if name == "step":
            return torch.tensor(0, dtype=torch.int64, device="cpu")
        if name == "row_steps":
            return rows_like(weight, torch.int32)
        dtype = self.group_of(weight)["state_dtype"] or accumulate(weight.dtype)
        return torch.zeros_like(weight, dtype=dtype, requires_grad=False)

    def shape_of_state(self, weight: Tensor, name: str) -> Tensor:
        """A tensor of the shape, on the device: a matrix is the weight."""
        return self.new_state(weight, name) if name in ("step", "row_steps") else weight.detach()

    def finish(self, weight: Tensor, update: RowUpdate, ids: Tensor | None) -> None:
        """Rows that had no gradient: `ids` are those that had one, None: all. Only now it is a step."""
        if ids is not None and update.unsampled != "frozen":
            self.update_others(update, ids)
        self.state[weight]["step"] += 1
        self.started.pop(weight, None)

    def update_others(self, update: RowUpdate, ids: Tensor) -> None:
        """Those that are not among `ids`, with a gradient of 0."""
        weight = update.weight
        sampled = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
        sampled[ids] = True
        for rows in self.chunks(weight, len(weight)):
            others = (~sampled[rows]).nonzero().squeeze(1) + rows.start
            zero = torch.zeros(len(others), weight.shape[1], dtype=accumulate(weight.dtype), device=weight.device)
            update_rows(update, others, zero)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; under class sharding tensors of all classes, for any ranks, and `step`, which all ranks hold.

        Before the first step too, so that a new optimizer has what a checkpoint is loaded into.
        """
        for weight in self.parameters():
            self.state_of(weight)
        saved = super().state_dict()
        for place, weight in enumerate(self.parameters()):
            shard = getattr(weight, "shard", None)
            if shard is not None and place in saved["state"]:
                own = saved["state"][place]
                saved["state"][place] = {
                    name: shard.as_replica(value) if name == "step" else shard.as_dtensor(value)
                    for name, value in own.items()
                }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps its own dtype, which need not be the weight's.

        The state's keys are what its groups call their parameters, in order: numbers, or the names that
        `torch.distributed.checkpoint.state_dict` gives them.

        Raises:
            ValueError, TypeError: state of another kind of optimizer, of other parameters, or of another shape, or
                options that do not fit; nothing is changed then.
        """
        if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
            raise TypeError(f"state_dict must have 'state' and 'param_groups', got {type(state_dict).__name__}")
        weights = self.parameters()
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        unknown = state_dict["state"].keys() - set(keys)
        if len(keys) != len(weights) or unknown:
            said = f"state of {min(map(str, unknown))!r}, which is none of them" if unknown else "groups of them"
            raise ValueError(
                f"the state dict has {len(keys)} parameters and {said}; this optimizer has {len(weights)} parameters"
            )
        if any("unsampled" not in group for group in state_dict["param_groups"]):
            raise ValueError("the state dict's groups have no 'unsampled': it is another optimizer's")
        groups, states = self.param_groups, self.state
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        try:
            for group in self.param_groups:
                self.check_all(group)
            loaded = [
                self.loaded(state_dict["state"].get(key, {}), weight) for key, weight in zip(keys, weights, strict=True)
            ]
        except (TypeError, ValueError):
            self.param_groups, self.state = groups, states
            raise
        self.started.clear()
        for weight, state in zip(weights, loaded, strict=True):
            self.state[weight] = state

    def loaded(self, given: dict[str, Any], weight: Tensor) -> dict[str, Any]:
        """The state that a dict gives a parameter whose group is loaded already; {}: none yet."""
        own = self.names_of_state(weight)
        found = {
            name: loaded_like(self.shape_of_state(weight, name), value, weight, name)
            for name, value in given.items()
            if name in own or wrong_state(name, own)
        }
        missing = set(own) - found.keys() if found else ()
        if missing:
            raise ValueError(f"the state dict has no {min(missing)!r}: it is another optimizer's")
        return found

    def parameters(self) -> list[Tensor]:
        return [weight for group in self.param_groups for weight in group["params"]]

    def check_weight(self, weight: Tensor) -> None:
        """ValueError or TypeError unless the optimizer has this parameter, and can write its rows."""
        if is_dtensor(weight):
            raise TypeError(
                "update_in_backward inside fully_shard: it gathers the rows for each step and drops them. Call the "
                "optimizer without update_in_backward, or shard the classes with process_group= outside of fully_shard"
            )
        self.group_of(weight)
        if not weight.is_contiguous():
            raise ValueError("update_in_backward: weight must be contiguous")

    def check_not_tied(self, weight: Tensor, embeddings: Tensor) -> None:
        """ValueError if the embeddings are made from the weight; looked at until they have had a gradient once."""
        seen: set[int] = self.__dict__.setdefault("_not_tied", set())
        if id(weight) in seen or not (weight.requires_grad and embeddings.requires_grad):
            return
        own, found, left = torch.autograd.graph.get_gradient_edge(weight).node, set(), [embeddings.grad_fn]
        while left:
            node = left.pop()
            if node is own:
                raise ValueError(
                    "update_in_backward: the embeddings are made from the head's weight (tied weights), whose gradient "
                    "then has another part. Use the optimizer without update_in_backward, or do not share the weight"
                )
            if node is not None and node not in found:
                found.add(node)
                left += [each for each, _ in node.next_functions]
        seen.add(id(weight))

    def refuse_scaled(self, weight: Tensor, grad: Tensor) -> None:
        """For the gradient that a loss receives in backward, before it moves rows.

        Its value is looked at on the CPU always, on other devices before this optimizer's first update of the weight
        and with TRITONMARGIN_DEBUG=1, because looking means waiting for it.

        Raises:
            RuntimeError: it is as large as a GradScaler's scale. The rows' update could not be unscaled.
        """
        # Of this object, not of its state: one that goes on from a checkpoint may have got a GradScaler meanwhile.
        seen: set[int] = self.__dict__.setdefault("_looked_at", set())
        first = id(weight) not in seen
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if not grad.numel() or capturing or not (first or looks_at_values(grad.device)):
            return
        scale = float(grad.detach().abs().max())
        if scale >= SCALED:
            raise RuntimeError(
                f"tritonmargin: the loss is multiplied by {scale:g} before backward, as by a GradScaler. Rows updated "
                "during backward (update_in_backward) cannot be unscaled. Keep the loss out of the GradScaler, which "
                "bfloat16 does not need, or use the optimizer without update_in_backward, with sparse_grad=True. A "
                "factor that is meant belongs into the learning rate."
            )
        seen.add(id(weight))

    def begin_in_backward(self, weight: Tensor) -> RowUpdate:
        """`begin`, for a loss that updates rows while it finishes their gradient (`head.update_in_backward`)."""
        if weight.grad is not None:
            raise RuntimeError(
                "tritonmargin: a second backward before the optimizer's step() or zero_grad(): update_in_backward "
                "updates the rows in every backward and cannot accumulate gradients over several"
            )
        if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
            raise RuntimeError(
                "tritonmargin: a hook on the weight waits for its gradient, and there is none: its rows are updated "
                "during backward (update_in_backward). Remove the hook or use the optimizer without update_in_backward"
            )
        return self.begin(weight)

    def finish_in_backward(self, weight: Tensor, update: RowUpdate, ids: Tensor | None) -> None:
        """`finish`; leaves in weight.grad what says that there is none."""
        self.finish(weight, update, ids)
        # Kernels write without autograd's knowledge: other losses that were computed from these rows must not go back.
        torch.autograd.graph.increment_version(weight)
        nothing = weight.new_zeros(()).expand(weight.shape).as_subclass(NoGradient)
        nothing.optimizer = weakref.ref(self)
        weight.grad = nothing

    def chunks(self, weight: Tensor, count: int) -> Iterator[slice]:
        size = max(1, CHUNK_BYTES // (4 * max(1, weight[:1].numel())))
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

    def group_of(self, weight: Tensor) -> dict[str, Any]:
        for group in self.param_groups:
            if any(param is weight for param in group["params"]):
                return group
        raise ValueError("update_in_backward: the optimizer has no such parameter; make it from head.parameters()")


def moves_all(update: RowUpdate) -> bool:
    """Whether a row whose gradient is 0 moves: by what the state holds, or by decay."""
    return bool(update.state) or update.numbers[2 if update.rule == "sgd" else 4] != 0.0


def rows_of(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers and rows of a sparse gradient, each once.

    Ours are in order and unique, but autograd forgets that they are, and coalescing would copy all of them.
    """
    ids, values = grad._indices()[0], grad._values()
    if grad.is_coalesced() or bool((ids[1:] > ids[:-1]).all()):
        return ids, values
    grad = grad.coalesce()
    return grad.indices()[0], grad.values()


def check_rows(weight: Tensor) -> None:
    """ValueError or TypeError unless an optimizer of rows can have this parameter."""
    if weight.dtype not in FLOATS or weight.layout is not torch.strided or weight.is_nested:
        raise TypeError(f"params must be dense and floating point, got {weight.dtype}, {weight.layout}")
    if weight.ndim not in (1, 2):
        raise ValueError(f"params must have shape [C, D] or [C], got {tuple(weight.shape)}")


def matrix(tensor: Tensor) -> Tensor:
    """[C, D]: a vector counts as rows of one number."""
    return tensor[:, None] if tensor.ndim == 1 else tensor


def loaded_like(own: Tensor, value: Tensor, weight: Tensor, name: str) -> Tensor:
    """A copy of a state dict's tensor where the optimizer has its own; a shard's rows of one of all classes."""
    shard = getattr(weight, "shard", None) if own.ndim else None
    every = own.shape if shard is None else (shard.num_classes, *own.shape[1:])
    if value.shape != every:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(every)}")
    value = like(name, value, own) if shard is None else own_rows(name, value, shard)
    return value.to(own.device, copy=True)


def wrong_state(name: str, known: list[str]) -> bool:
    raise ValueError(f"the state dict has {name!r}, expected {', '.join(known)}: it is another optimizer's")
