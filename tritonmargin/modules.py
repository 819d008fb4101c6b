"""The classifier head as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tritonmargin.arguments import check_device, check_dtype, check_flag, check_integer, check_name, check_number
from tritonmargin.checks import check_class_vector, check_margin, check_replaced
from tritonmargin.distributed.agreement import Lookout, check_agreement
from tritonmargin.distributed.around import Around
from tritonmargin.distributed.dtensors import is_dtensor
from tritonmargin.distributed.settings import words_of
from tritonmargin.distributed.single import GRADIENT_FOR, SINGLE
from tritonmargin.distributed.state import like, own_rows, whole
from tritonmargin.loss import SETTINGS, compute_loss
from tritonmargin.margins import ArcFace, Margin
from tritonmargin.nonfinite import skipped
from tritonmargin.optim.row_optimizer import RowOptimizer
from tritonmargin.optim.update_rules import mixed
from tritonmargin.sampling import Sampler
from tritonmargin.spec import LossInputs, LossOptions, Stats

if TYPE_CHECKING:
    from tritonmargin.distributed.shard import Shard

ON_NONFINITE = ("raise", "skip")


class MarginSoftmaxLoss(nn.Module):
    """Class weights, a margin, and the loss over all classes without their N x C logits.

    `head(embeddings, target)` is `tm.margin_cross_entropy(embeddings, head.weight, target, head.margin, ...)`.

    The weight starts as N(0, 0.01), as in the face recognition recipes, and the bias as 0. The state dict holds
    `weight` and, if there is one, `bias`, `class_weight`, and the sampler's two numbers `sampler`; never the margin's
    numbers. Under a process group all of them are DTensors: rows of all classes, and the sampler that all ranks hold.

    **Class sampling** (Partial FC, An et al. 2021). With `sample_rate` < 1 a training step visits the classes of the
    batch and random others, round(sample_rate C) in all or more if the batch has more, drawn anew in every forward.
    In eval mode all classes are active. `head.sample_rate = 0.5` is the rate of the next forward, whatever it was.
    `Stats` of a sampled step are about the active classes only. Keep a sampled head out of `torch.utils.checkpoint`,
    which runs its forward twice, on two samples.

    **Class sharding.** With `process_group` every rank holds the rows of a contiguous range of classes, split as
    `torch.chunk` splits them, and calls the head with its own samples, as many as it has. The loss is that of the
    samples of all ranks and the same number on every rank; every rank has to call backward on it. `weight.grad` is
    the exact gradient for the rank's rows: do not average it, and keep the head out of DistributedDataParallel and
    `fully_shard`. Each rank's rows start from random numbers of their own and draw samples of their own.

    Args:
        embedding_dim: D.
        num_classes: C, of all ranks.
        margin: default `ArcFace(m=0.5, s=64)`.
        sample_rate: fraction of the classes that are active in a training step, in [0, 1]; 0: those of the batch.
        logq_correction: correct the sampled sum of exp(z), see `tm.margin_cross_entropy`. A sample that is no more than
            the batch's classes has nothing to correct.
        sub_centers: rows a class; only 1 in this version.
        bias: whether logits have a bias. Its gradient is dense, and an optimizer's momentum and decay move all of it.
        sparse_grad: the gradient of `weight` is sparse, with the active rows only.
        retain_bytes: bytes of logits that may be kept from forward to backward (faster, more memory).
        chunk_bytes, memory_budget: memory of a chunk and of a step in bytes, see `tm.margin_cross_entropy`.
        process_group: a `torch.distributed` process group to shard the classes over.
        gradient_for: "ddp", the default under a process group: the gradient of embeddings is the number of ranks
            times that of the loss, since DistributedDataParallel and FSDP divide a backbone's gradients by it. "sum":
            the gradient of the loss.
        on_nonfinite: what to do when the loss is nan or inf, on all ranks alike: "raise" FloatingPointError, or
            "skip": return it such that backward leaves all gradients as they are, of `weight` and of the backbone.
            Both wait for the device. Under a GradScaler whose scale is a power of two from 1024 on, as its default is,
            "skip" makes all gradients nan, so that the scaler skips the step. None: nothing. Inside
            DistributedDataParallel its ranks agree in every forward with gradients; inside `fully_shard` it is an
            error. With FSDP around the backbone call `backbone.reshard()` after a loss that is not finite: its
            parameters stay gathered where backward does not come, and a later update is not seen by them.
        class_weight: [C], multiplies the loss of the class's samples.
        ignore_index, label_smoothing, reduction, objective: see `tm.margin_cross_entropy`.
        seed: of the class sampling.
        device, dtype: of weight and bias.

    Raises:
        ValueError, TypeError: an option that does not fit, named. Under a process group also on every rank whose
            options are not those of the first rank. In a forward, and when the head is saved, also if `weight` or
            `bias` were replaced by ones of another size.
        RuntimeError: under a process group whose ranks did not all make a head of it, within the group's timeout. A
            rank whose own head is of a smaller group, or of none, hears of it in `forward` after that.
    """

    class_weight: Tensor | None
    sampler: Tensor | None

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        margin: Margin | None = None,
        *,
        sample_rate: float = 1.0,
        logq_correction: bool = False,
        sub_centers: int = 1,
        bias: bool = False,
        sparse_grad: bool = False,
        retain_bytes: int = 0,
        chunk_bytes: int | None = None,
        memory_budget: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        gradient_for: str = "ddp",
        on_nonfinite: str | None = None,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        objective: str = "softmax",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        margin = ArcFace() if margin is None else margin
        try:
            check_head(embedding_dim, num_classes, margin, class_weight, seed)
            LossOptions(
                ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction, objective=objective,
                sub_centers=sub_centers, logq_correction=logq_correction, sparse_grad=sparse_grad,
                retain_bytes=retain_bytes, chunk_bytes=chunk_bytes, memory_budget=memory_budget,
            )  # fmt: skip
            check_flag("bias", bias)
            check_choices(sample_rate, process_group, gradient_for, on_nonfinite)
            check_place(device, dtype)
            self.embedding_dim = embedding_dim
            self.num_classes = num_classes
            self.margin = margin
            self._sample_rate = sample_rate
            self.logq_correction = logq_correction
            self.sparse_grad = sparse_grad
            self.retain_bytes = retain_bytes
            self.chunk_bytes = chunk_bytes
            self.memory_budget = memory_budget
            self.on_nonfinite = on_nonfinite
            self.ignore_index = ignore_index
            self.label_smoothing = label_smoothing
            self.reduction = reduction
            self.objective = objective
            self.seed = seed
            self.shard = shard_of(num_classes, process_group, gradient_for)
            self.lookout, self.around = Lookout(process_group), Around()
            self._updater: RowOptimizer | None = None
            rows = num_classes if self.shard is None else self.shard.stop - self.shard.start
            self.weight = nn.Parameter(torch.empty(rows, embedding_dim, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
            if class_weight is not None and class_weight.is_meta and not self.weight.is_meta:
                raise ValueError(f"class_weight is on meta, the head's weight on {self.weight.device}: use one device")
            if self.shard is not None and class_weight is not None:
                class_weight = class_weight[self.shard.start : self.shard.stop].clone()
            self.register_buffer("class_weight", class_weight)
            self.register_buffer("sampler", None)
            if sample_rate < 1.0:
                self.make_sampler()
            self.mark_rows()
        except Exception as error:
            if isinstance(process_group, dist.ProcessGroup):
                check_agreement(process_group, {"error": str(error)})  # the others would wait for this rank
            raise
        if self.shard is not None:
            check_agreement(self.shard.group, self.description())
            self.shard.join()
        self.reset_parameters()

    @property
    def sample_rate(self) -> float:
        """Fraction of the classes that are active in a training step."""
        return self._sample_rate

    @sample_rate.setter
    def sample_rate(self, rate: float) -> None:
        check_sample_rate(rate)
        sampled, self._sample_rate = self._sample_rate < 1.0, rate
        if rate < 1.0:
            self.make_sampler()
        if sampled != (rate < 1.0):
            self.mark_rows()  # not if it only moves: an optimizer says once what it says of a sampled weight

    def make_sampler(self) -> None:
        """The seed and no step, if there is no sampler yet. It stays when a later rate has no use for it."""
        if self.sampler is None:
            self.sampler = torch.tensor([self.seed, 0], device=self.weight.device)

    def reset_parameters(self) -> None:
        """weight ~ N(0, 0.01), bias = 0, the sampler at its seed's first step."""
        self.mark_rows()
        if self.sampler is not None:
            self.sampler.copy_(torch.tensor([self.seed, 0]))
        generator = None
        if self.shard is not None and not self.weight.is_meta:
            # Ranks are often seeded alike, and their rows must not be.
            drawn = int(torch.randint(1 << 62, (1,), device="cpu"))
            generator = torch.Generator(self.weight.device).manual_seed(mixed(drawn, self.shard.start))
        nn.init.normal_(self.weight, std=0.01, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def mark_rows(self) -> None:
        """Say on the parameters which classes their rows are and whether a step sees them all: optimizers ask."""
        self.weight.sampled = self.sample_rate < 1.0  # type: ignore[attr-defined]
        for parameter in (self.weight, self.bias):
            if parameter is not None and self.shard is not None:
                parameter.shard = self.shard  # type: ignore[attr-defined]

    def _apply(self, fn: Any, recurse: bool = True) -> MarginSoftmaxLoss:
        nowhere = self.sampler is not None and self.sampler.is_meta
        super()._apply(fn, recurse)
        if nowhere and self.sampler is not None:
            self.sampler.copy_(torch.tensor([self.seed, 0]))  # `to_empty` gives it memory and no numbers
        self.mark_rows()  # `to_empty` and others make new parameters
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a head is not trained by the optimizer that trains the original.
        return {**self.__dict__, "_updater": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "sample_rate" in state:  # pickled when it was a plain attribute
            state["_sample_rate"] = state.pop("sample_rate")
        state.setdefault("memory_budget", None)  # pickled before there was one
        super().__setstate__(state)
        if "lookout" not in state:
            self.lookout = Lookout(None if self.shard is None else self.shard.group)
        self.around = Around()
        self.mark_rows()

    @overload
    def forward(
        self, embeddings: Tensor, target: Tensor, class_ids: Tensor | None = None, return_stats: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def forward(
        self, embeddings: Tensor, target: Tensor, class_ids: Tensor | None = None, *, return_stats: Literal[True]
    ) -> tuple[Tensor, Stats]: ...
    @overload
    def forward(
        self, embeddings: Tensor, target: Tensor, class_ids: Tensor | None = None, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, Stats]: ...
    def forward(
        self, embeddings: Tensor, target: Tensor, class_ids: Tensor | None = None, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, Stats]:
        """The loss of embeddings [N, D] with target [N]; with `return_stats` a pair (loss, Stats).

        class_ids: the active classes instead of those that `sample_rate` would draw; under a process group rows of
            this rank, with the targets of all ranks' samples that are among them.
        """
        if not torch.compiler.is_compiling() and dist.is_available() and dist.is_initialized():
            self.lookout.look()
            self.around.check(self)
        ranks = SINGLE if self.shard is None else self.shard
        sampler = None
        if class_ids is None and self.training and self.sample_rate < 1.0 and self.sampler is not None:
            sampler = Sampler(self.sample_rate, self.sampler, ranks.start)
        sampled = class_ids is not None or sampler is not None
        try:
            self.check_rows()
            check_flag("logq_correction", self.logq_correction)
            check_nonfinite(self.on_nonfinite)
            options = self.options(return_stats, self.logq_correction and sampled)
        except (TypeError, ValueError):
            ranks.announce_error(self.weight, SETTINGS)
            raise
        inputs = LossInputs(embeddings, self.weight, target, self.bias, class_ids, self.class_weight)
        also = {"training": self.training, "on_nonfinite": self.on_nonfinite}
        result = compute_loss(
            inputs, self.margin, options, ranks=ranks, sampler=sampler, updater=self._updater, also=also
        )
        if self.on_nonfinite is None:
            return result
        loss, stats = result if isinstance(result, tuple) else (result, None)
        loss = self.if_finite(loss)
        return loss if stats is None else (loss, stats)

    if TYPE_CHECKING:
        __call__ = forward  # torch says of it that it takes and returns Any

    def check_rows(self) -> None:
        """ValueError if somebody has put a weight or a bias of another size in place of the head's."""
        rows = self.num_classes if self.shard is None else self.shard.stop - self.shard.start
        check_replaced("weight", self.weight, (rows, self.embedding_dim), self.num_classes)
        check_replaced("bias", self.bias, (rows,), self.num_classes)

    def options(self, return_stats: bool, logq_correction: bool) -> LossOptions:
        """Those of the next loss: the head's attributes may have changed since the last one."""
        return LossOptions(
            ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, reduction=self.reduction,
            objective=self.objective, sparse_grad=self.sparse_grad, retain_bytes=self.retain_bytes,
            chunk_bytes=self.chunk_bytes, memory_budget=self.memory_budget, return_stats=return_stats,
            logq_correction=logq_correction,
        )  # fmt: skip

    def if_finite(self, loss: Tensor) -> Tensor:
        """The loss; or what `on_nonfinite` says, on all ranks alike, if any rank's is nan or inf."""
        bad = (~loss.detach().isfinite()).any().to(torch.float32)
        if self.shard is not None:
            bad = self.shard.all_max(bad) if self.reduction == "none" else bad
        elif loss.requires_grad and dist.is_available() and dist.is_initialized():
            bad = self.around.somewhere(self, bad)
        if not bool(bad):
            return loss
        if self.on_nonfinite == "raise":
            value = loss.detach().sum()
            where = "of another rank is" if value.isfinite() else f"is {value.item()}:"
            raise FloatingPointError(f"the loss {where} nan or inf in some sample, on all ranks")
        return skipped(loss, scaled=self._updater is None)

    def update_in_backward(self, optimizer: RowOptimizer | None) -> None:
        """Let `optimizer` update `weight` during backward, chunk by chunk: its C x D gradient never exists.

        Each backward then is a step of the optimizer for `weight`; its `step()` still has to be called, for other
        parameters and to say that the step is over. `weight` has no gradient, so that nothing can accumulate it over
        several backwards, clip or unscale it: whoever tries gets an error. None ends it. A loss that is multiplied by
        1024 or more before backward, as a GradScaler does, raises RuntimeError there before any row moves; on a GPU
        this is looked at in the optimizer's first step only, or with TRITONMARGIN_DEBUG=1.

        Raises:
            TypeError: not an optimizer of `tm.optim`, or `fully_shard` has split the rows.
            ValueError: the optimizer does not have `weight`.
        """
        if optimizer is not None:
            if not isinstance(optimizer, RowOptimizer):
                raise TypeError(f"update_in_backward needs tm.optim.RowSGD or RowAdamW, got {type(optimizer).__name__}")
            optimizer.check_weight(self.weight)
        self._updater = optimizer

    # -- the state dict: tensors of all classes, whichever rank has which ------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.check_rows()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.shard is None:
            return
        for name in ("weight", "bias", "class_weight"):
            own = destination.get(prefix + name)
            if own is not None:
                destination[prefix + name] = self.shard.as_dtensor(own.detach())
        if self.sampler is not None:
            destination[prefix + "sampler"] = self.shard.as_replica(self.sampler.detach())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = dict(state_dict)
        for name in ("weight", "bias", "class_weight"):
            key, value = prefix + name, given.get(prefix + name)
            if isinstance(value, Tensor) and self.shard is not None:
                given[key] = own_rows(key, value, self.shard)
            elif is_dtensor(value):
                if len(value) != self.num_classes:
                    raise ValueError(f"{key} has {len(value)} classes, this head {self.num_classes}")
                given[key] = like(key, value, getattr(self, name))
        # Another sample rate is no other model. The steps are counted on if a later rate asks for a sample.
        if prefix + "sampler" in given:
            self.make_sampler()
        sampler = given.pop(prefix + "sampler", self.sampler)
        if self.sampler is not None:
            given[prefix + "sampler"] = whole(prefix + "sampler", sampler)
        super()._load_from_state_dict(given, prefix, *args)
        self.mark_rows()

    def description(self) -> dict[str, object]:
        """What all ranks must agree on."""
        return {
            "embedding_dim": self.embedding_dim,
            "num_classes": self.num_classes,
            "dtype": str(self.weight.dtype),
            "margin": words_of(self.margin),
            "bias": self.bias is not None,
            "class_weight": self.class_weight is not None,
            "seed": self.seed,
            "gradient_for": None if self.shard is None else self.shard.gradient_for,
            **{name: value for name, (value, _) in self.settings().items()},
        }

    def settings(self) -> dict[str, tuple[object, object]]:
        """Options by name, each with its default."""
        return {
            "sample_rate": (self.sample_rate, 1.0),
            "logq_correction": (self.logq_correction, False),
            "objective": (self.objective, "softmax"),
            "label_smoothing": (self.label_smoothing, 0.0),
            "reduction": (self.reduction, "mean"),
            "ignore_index": (self.ignore_index, -100),
            "sparse_grad": (self.sparse_grad, False),
            "retain_bytes": (self.retain_bytes, 0),
            "chunk_bytes": (self.chunk_bytes, None),
            "memory_budget": (self.memory_budget, None),
            "on_nonfinite": (self.on_nonfinite, None),
        }

    def extra_repr(self) -> str:
        shown = {"bias": (self.bias is not None, False), **self.settings()}
        changed = [f"{name}={value!r}" for name, (value, default) in shown.items() if value != default]
        if self.shard is not None:
            changed.append(f"classes {self.shard.start} to {self.shard.stop} of rank {self.shard.rank}")
        return ", ".join([f"embedding_dim={self.embedding_dim}, num_classes={self.num_classes}", *changed])


def shard_of(num_classes: int, group: dist.ProcessGroup | None, gradient_for: str) -> Shard | None:
    if group is None:
        return None
    from tritonmargin.distributed.shard import Shard  # with DTensor and torch._dynamo

    return Shard(num_classes, group, gradient_for)


def check_head(embedding_dim: int, num_classes: int, margin: Margin, class_weight: Tensor | None, seed: int) -> None:
    """What can be said about a head's tensors before it is made."""
    check_integer("embedding_dim", embedding_dim, 1)
    check_integer("num_classes", num_classes, 1)
    check_margin(margin)
    check_integer("seed", seed)
    if class_weight is not None:
        check_class_vector("class_weight", class_weight, num_classes)


def check_choices(
    sample_rate: float, process_group: dist.ProcessGroup | None, gradient_for: str, on_nonfinite: str | None
) -> None:
    check_sample_rate(sample_rate)
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed process group, got {process_group!r}")
    check_name("gradient_for", gradient_for, GRADIENT_FOR)
    check_nonfinite(on_nonfinite)


def check_place(device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    if device is not None:
        check_device("device", device)
    if dtype is not None:
        check_dtype("dtype", dtype)


def check_nonfinite(on_nonfinite: str | None) -> None:
    if on_nonfinite is not None:
        check_name("on_nonfinite", on_nonfinite, ON_NONFINITE)


def check_sample_rate(rate: float) -> None:
    check_number("sample_rate", rate, "a number between 0 and 1", 0.0, 1.0)
