"""The backward pass of one class pass on a GPU: the launches that class_pass.py lists, chunk by chunk."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonmargin.backends.tiles import row_block
from tritonmargin.backends.triton import products
from tritonmargin.backends.triton import row_kernels as rows_of
from tritonmargin.backends.triton.back_kernel import back_kernel
from tritonmargin.backends.triton.class_pass import Saved, chunk_rows
from tritonmargin.backends.triton.finish_kernel import finish_kernel
from tritonmargin.backends.triton.launch import blocks, call
from tritonmargin.backends.triton.logits_kernels import weigh_kernel
from tritonmargin.backends.triton.plan import Plan
from tritonmargin.backends.triton.products import described
from tritonmargin.backends.triton.update_rules import TRITON_RULES
from tritonmargin.optim.update_rules import RowUpdate, corrections, mixed
from tritonmargin.spec import InputGrads, PassInputs, PassSpec


class Wanted(NamedTuple):
    """Whose gradients a backward makes, and from which parts."""

    x: bool
    weight: bool
    bias: bool
    through: bool = True  # anything comes through the logits; else through the exact rows alone
    norm: bool = False  # |x| has a gradient
    weight_norm: bool = False  # |w_y| has a gradient


class Exact(NamedTuple):
    """A class row per sample that a gradient goes to outside of the products: the hardest other class's."""

    position: Tensor  # [line] int32
    rows: Tensor  # [N, D] w'_h, float32
    product: Tensor  # [line]
    gradient: Tensor  # [line]


class Half(NamedTuple):
    """float16's gradients with their powers of two aside, see `half_kernel`."""

    grads: Tensor
    extremes: Tensor
    power: Tensor
    ys: Tensor


class Backward:
    """One backward: what its chunks share is made once, then each chunk is three launches.

    grads: [GRADS, line] gradients of the numbers per sample, all times the numbers `upstream`.
    """

    def __init__(
        self,
        inputs: PassInputs,
        saved: Saved,
        spec: PassSpec,
        plan: Plan,
        grads: Tensor,
        upstream: tuple[Tensor, ...],
        wanted: Wanted,
        update: RowUpdate | None = None,
        hardest: Exact | None = None,
    ) -> None:
        self.inputs, self.saved, self.spec, self.plan = inputs, saved, spec, plan
        self.grads, self.upstream, self.wanted, self.update = grads, upstream, wanted, update
        self.exact = hardest
        through = self.through = wanted.through and plan.n > 0 and plan.active > 0
        self.half = self.halved() if through and spec.dtype == torch.float16 else None
        self.grad_weight, self.grad_bias = self.new_gradients()
        chunk, self.sample_blocks = plan.backward_chunk, blocks(plan.n, plan.weigh.shape[1])
        self.dlogits: Tensor | None = None  # of a chunk
        self.along: Tensor | None = None  # P's part along each row, by blocks of samples
        self.by_class: Tensor | None = None  # the same of dL/db
        self.product: Tensor | None = None  # P x', where torch makes it
        if through:
            self.dlogits = grads.new_empty((chunk, plan.line_n), dtype=spec.dtype)
            if wanted.weight and spec.unit_weight:
                self.along = grads.new_empty(self.sample_blocks * chunk)
            if self.grad_bias is not None:
                self.by_class = grads.new_empty(self.sample_blocks * chunk)
            if wanted.weight and not plan.finish_inside:
                self.product = grads.new_empty((chunk, plan.line_d))
        self.weighing = self.for_weigh()
        self.finishing = self.for_finish()

    def run(self) -> InputGrads:
        plan, chunk = self.plan, self.plan.backward_chunk
        grad_x = None
        if self.wanted.x and self.through:
            grad_x = self.grads.new_empty((plan.line_n, plan.line_d))
        finishes = self.wanted.weight or self.grad_bias is not None
        copies = self.saved.rows
        if plan.copied and copies is None:
            copies = self.grads.new_empty((chunk, plan.line_d), dtype=self.spec.dtype)
        for start in range(0, plan.active, chunk):
            stop = min(start + chunk, plan.active)
            p = None
            if self.dlogits is not None:
                rows = chunk_rows(self.inputs, self.spec, plan, copies, self.saved.class_numbers, start, stop)
                p = self.dlogits if stop - start == chunk else self.dlogits[: stop - start]
                self.weigh(rows, p, start, stop)
                if grad_x is not None:
                    products.add_product(grad_x, p, rows, start == 0, plan.precision)
            if finishes:
                self.finish(p, start, stop)
        return InputGrads(self.back(grad_x) if self.wanted.x else None, self.grad_weight, self.grad_bias)

    def new_gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of weight and of bias: of the active rows, or of all with zeros where nothing is written."""
        weight, bias, ids = self.inputs.weight, self.inputs.bias, self.inputs.class_ids
        grad_weight, grad_bias = None, None
        if self.wanted.weight and self.update is None:
            sparse = self.spec.sparse
            shape = (self.plan.active if sparse else weight.shape[0], self.plan.d)
            grad_weight = (weight.new_zeros if ids is not None and not sparse else weight.new_empty)(shape)
        if self.wanted.bias and bias is not None:
            # A bias may be frozen or trained alone: its rows are finished with those of W.
            grad_bias = (bias.new_zeros if ids is not None else bias.new_empty)(weight.shape[0])
        return grad_weight, grad_bias

    def halved(self) -> Half:
        grads, saved, plan, spec = self.grads, self.saved, self.plan, self.spec
        mean = self.inputs.mean_weight is not None
        half = Half(torch.empty_like(grads), grads.new_empty(2), grads.new_empty(plan.line), torch.empty_like(saved.xs))
        call(
            rows_of.extremes_kernel, 1, grads, saved.numbers, half.extremes, plan.n, plan.line, spec.scale,
            UNIT_X=spec.unit_embeddings, MEAN=mean, BLOCK=1024,
        )  # fmt: skip
        call(
            rows_of.half_kernel, plan.line, grads, half.extremes, saved.xs, half.grads, half.ys, half.power, plan.n,
            plan.line, plan.line_d, MEAN=mean, BLOCK_D=row_block(plan.line_d)[1],
        )  # fmt: skip
        return half

    # -- P = dL/dz and its sums over samples ---------------------------------------------------------------------

    def for_weigh(self) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """The samples, numbers per sample and sums, and constants of `weigh`, for all chunks."""
        inputs, saved, spec, plan, half = self.inputs, self.saved, self.spec, self.plan, self.half
        tile = plan.weigh
        use = tile.descriptors and self.through
        samples: Any = saved.xs
        if plan.library:
            samples = None
        elif use:
            samples = described(saved.xs, tile.shape[1], tile.shape[2])
        more = (
            inputs.bias is not None or inputs.offset is not None,
            inputs.threshold is not None,
            inputs.mean_weight is not None,
        )
        numbers = (
            saved.label, saved.numbers, self.grads if half is None else half.grads,
            None if half is None else half.power, saved.class_numbers,
        )  # fmt: skip
        constants = dict(
            KIND=(spec.unit_weight and not plan.copied, *more, plan.library), HOW=(use, plan.precision),
            TILE=tile.shape, SPLIT=tile.finer(any(more)), **tile.options(),
        )  # fmt: skip
        return samples, numbers, constants

    def weigh(self, rows: Tensor, p: Tensor, start: int, stop: int) -> None:
        saved, plan = self.saved, self.plan
        samples, numbers, constants = self.weighing
        tile, k, stride_z = plan.weigh, stop - start, 0
        a: Any = rows
        if plan.library:
            stride_z = plan.line_n
            if saved.logits is not None and stop <= plan.retained:
                a = saved.logits[start:stop]
            else:
                products.multiply(rows, saved.xs.t(), p, plan.precision)
                a = p
        elif tile.descriptors:
            a = described(rows, tile.shape[0], tile.shape[2])
        call(
            weigh_kernel, tile.programs_for(k, plan.n), a, samples, *numbers, p, (self.along, self.by_class), plan.n,
            k, plan.line_d, start, plan.line, plan.active, rows.stride(0), plan.line_d, stride_z, plan.line_n,
            **constants,
        )  # fmt: skip

    # -- dL/dW, or the optimiser's update of the rows ------------------------------------------------------------

    def for_finish(self) -> tuple[int, Any, tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:
        """How P x' is made, its samples, what is added to it, sizes, and constants of `finish`, for all chunks."""
        inputs, saved, spec, plan, half = self.inputs, self.saved, self.spec, self.plan, self.half
        update, tile, weight = self.update, plan.finish, inputs.weight
        made, samples = 0, saved.xs if half is None else half.ys
        if not self.through or not (self.along is not None or self.wanted.weight):
            made = 2  # there is none
        elif not plan.finish_inside:
            made = 1  # by torch
        use = made == 0 and tile.descriptors
        given: Any = samples
        if use:
            given = described(samples, tile.shape[2], tile.shape[1])
        exact = None
        if self.exact is not None:
            exact = (self.exact.position, self.exact.product, self.exact.gradient, (1, 1))
        sums = (self.along, self.by_class, self.grad_bias, self.sample_blocks)
        beside = (sums, (inputs.x, exact), (self.upstream, None if half is None else half.extremes), weight)
        out = self.grad_weight if update is None else weight
        by_ids = inputs.class_ids is not None and (update is not None or not spec.sparse)
        rule = None if update is None else TRITON_RULES[update.rule]
        # Each of these would spill beside as much of the tile as plain gradients leave in the registers.
        more = weight.dtype == torch.float32 or any(each is not None for each in (half, rule, self.grad_bias))
        sizes = (weight.stride(), 0 if out is None else out.stride(0), inputs.x.stride())
        constants = dict(
            KIND=(plan.d, spec.unit_weight, spec.unit_embeddings, made, spec.unit_weight and plan.copied, by_ids,
                  self.wanted.weight_norm, update is not None and update.seed is not None, (use, plan.precision)),
            RULE=rule, TILE=tile.shape, SPLIT=tile.finer(more), **tile.options(),
        )  # fmt: skip
        return made, given, (beside, out), sizes, constants

    def finish(self, p: Tensor | None, start: int, stop: int) -> None:
        saved, plan = self.saved, self.plan
        made, b, (beside, out), sizes, constants = self.finishing
        tile, k = plan.finish, stop - start
        a: Any = None
        stride_p = plan.line_n
        if p is None or made == 2:
            b = None
        elif made == 1:
            assert self.product is not None
            a, stride_p = self.product[:k], plan.line_d
            products.multiply(p, b, a, plan.precision)
            b = None
        else:
            a = described(p, tile.shape[0], tile.shape[2]) if tile.descriptors else p
        changes, seed, counted = self.changes(start, stop)
        call(
            finish_kernel, tile.programs_for(k, plan.d), a, b, saved.label, saved.numbers, self.grads,
            saved.class_numbers, *beside, self.inputs.class_ids, out, changes, k, start,
            (plan.line_n, plan.line), plan.active, (stride_p, plan.line_d, *sizes), self.spec.scale, seed,
            **constants,
        )  # fmt: skip
        if self.update is not None:
            self.update.touched = True
            if counted is not None and self.update.steps is not None:
                # Not before the launch: a kernel that fails leaves them as they are.
                self.update.steps[self.rows(start, stop)] = counted

    def rows(self, start: int, stop: int) -> slice | Tensor:
        ids = self.inputs.class_ids
        return slice(start, stop) if ids is None else ids[start:stop]

    def changes(self, start: int, stop: int) -> tuple[Any, int, Tensor | None]:
        """The update of these rows as the kernel takes it, its seed, and how many steps they will have seen."""
        update, counted, steps = self.update, None, None
        if update is None:
            return None, 0, None
        if update.steps is not None:
            counted = update.steps[self.rows(start, stop)] + 1
            steps = tuple(each.float() for each in corrections(counted, *update.numbers[:3]))
        seed = 0 if update.seed is None else mixed(update.seed, start) % (1 << 30)
        return (update.numbers, update.state, steps), seed, counted

    # -- dL/dx ---------------------------------------------------------------------------------------------------

    def back(self, grad_x: Tensor | None) -> Tensor:
        """dX' -> dX, with the exact rows' part."""
        inputs, saved, spec, plan, half = self.inputs, self.saved, self.spec, self.plan, self.half
        found = inputs.x.new_empty((plan.n, plan.d))
        if plan.n:
            exact = None if self.exact is None else (self.exact.rows, self.exact.gradient, 1)
            call(
                back_kernel, plan.n, grad_x, inputs.x, saved.numbers, self.grads, self.upstream,
                None if half is None else half.power, None if half is None else half.extremes, saved.target_rows,
                exact, found, plan.line, spec.scale, inputs.x.stride(), plan.line_d,
                UNIT=(spec.unit_embeddings, spec.unit_weight), NORM=self.wanted.norm, D=plan.d,
                BLOCK_D=row_block(plan.d)[1], num_warps=4,
            )  # fmt: skip
        return found
