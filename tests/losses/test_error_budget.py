"""Any call in any dtype: its error against float64 is at most twice that of plain code, of loss and every gradient."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import BACKENDS, DEVICE, HALVES, MACHINE, MORE, made, sampled
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import tritonmargin as tm
from tritonmargin.objectives import OBJECTIVES

# Margins and what plain code computes in their place: (unit embeddings, unit class rows, phi of theta).
ANGLES = {
    "Softmax": (False, False, None), "L2Softmax": (True, False, None), "NormFace": (True, True, None),
    "LSoftmax": (False, False, "psi"), "ASoftmax": (False, True, "psi"), "SphereFaceR": (True, True, "psi"),
    "CosFace": (True, True, "add"), "ArcFace": (True, True, "add"), "CombinedMargin": (True, True, "add"),
}  # fmt: skip


class Call(NamedTuple):
    """All but the numbers, which a seed makes."""

    name: str
    numbers: dict[str, Any]  # of the margin
    sizes: tuple[int, int, int]  # N, D, C
    lengths: dict[str, float]  # of the rows of x and w, and of b
    near: float  # samples lie beside the row of their class, so far away; 0: anywhere
    label: int  # of some of the samples
    share: float  # of the classes are active; 0: all, without ids
    dtype: torch.dtype
    wide: bool  # W in float32, products in `dtype` by autocast
    strided: bool
    options: dict[str, Any]


class Given(NamedTuple):
    tensors: dict[str, Tensor]  # x, w and perhaps b, float64 that their dtype holds
    y: Tensor
    upstream: Tensor  # [N]
    options: dict[str, Any]  # with tensors


def given_by(call: Call, seed: int) -> Given:
    n, d, c = call.sizes
    shapes = {"x": (n, d), "w": (c, d), "b": (c,)}
    tensors = {
        key: length * made(*shapes[key], seed=10 * seed + i) for i, (key, length) in enumerate(call.lengths.items())
    }
    y = torch.randint(c, (n,), generator=torch.Generator().manual_seed(seed), device="cpu").to(DEVICE)
    y[1::3] = call.label
    if call.near:
        own = tensors["w"][y.clamp(min=0)] / call.lengths["w"] * call.lengths["x"]
        tensors["x"] = own + call.near * tensors["x"]
    options = dict(call.options)
    if options["class_weight"]:
        options["class_weight"] = made(c, seed=10 * seed + 4).abs() + 0.1
    if call.share:
        options["class_ids"] = sampled(y[y >= 0], c, max(2, int(call.share * c)), torch.Generator().manual_seed(seed))
        fits = not options["label_smoothing"] and len(options["class_ids"]) > len(y[y >= 0].unique())
        options["logq_correction"] = options["logq_correction"] and fits
    else:
        options["logq_correction"] = False
    rounded = {key: each.to(kind_of(call, key)).double() for key, each in tensors.items()}
    return Given(rounded, y, made(n, seed=10 * seed + 5), options)


def kind_of(call: Call, key: str) -> torch.dtype:
    return torch.float32 if call.wide and key != "x" else call.dtype


def phi(call: Call, theta: Tensor) -> Tensor:
    numbers = call.numbers
    if ANGLES[call.name][2] == "psi":
        m, lam = numbers["m"], numbers.get("lam", 0.0)
        k = (m * theta / math.pi).floor().clamp(max=math.ceil(m) - 1)
        return (lam * theta.cos() + torch.where(k % 2 == 0, 1.0, -1.0) * (m * theta).cos() - 2 * k) / (1 + lam)
    m1, m2, m3 = (numbers.get(f"m{i}", default) for i, default in ((1, 1.0), (2, 0.0), (3, 0.0)))
    if call.name == "ArcFace":
        m2 = numbers["m"]
    if call.name == "CosFace":
        m3 = numbers["m"]
    alpha = m1 * theta + m2
    beyond = theta.cos() - (math.pi - (math.pi - m2) / m1) * math.sin(math.pi - (math.pi - m2) / m1)
    return torch.where(alpha <= math.pi, alpha.cos(), beyond) - m3


def plain(call: Call, given: Given, products: torch.dtype, sums: torch.dtype) -> dict[str, Tensor]:
    """Full logits as in most projects: products in the dtype, what follows in float32 at least."""
    o, leaves = given.options, {name: each.to(sums).requires_grad_() for name, each in given.tensors.items()}
    kept = (given.y >= 0).nonzero()[:, 0]
    ids = o.get("class_ids", torch.arange(len(leaves["w"]), device=DEVICE))
    x, w, y = leaves["x"][kept], leaves["w"][ids], given.y[kept]
    column, (unit_x, unit_w, angle) = torch.searchsorted(ids, y), ANGLES[call.name]
    s = call.numbers.get("s", 1.0) if unit_x else 1.0
    rows_x = F.normalize(x, eps=0.0) if unit_x else x
    rows_w = F.normalize(w, eps=0.0) if unit_w else w
    z = s * (rows_x.to(products) @ rows_w.to(products).T).to(sums)
    own = s * (rows_x * rows_w[column]).sum(dim=1)
    if angle is not None:
        cos = (F.normalize(x, eps=0.0) * F.normalize(w, eps=0.0)[column]).sum(dim=1)
        edge = 1.0 - torch.finfo(sums).eps  # at 1 itself acos has no derivative
        cos = cos.clamp(-edge, edge)
        length = s * (1.0 if unit_x else x.norm(dim=1)) * (1.0 if unit_w else w.norm(dim=1)[column])
        own = length * phi(call, cos.acos())
    if "b" in leaves:
        z, own = z + leaves["b"][ids], own + leaves["b"][ids][column]
    if o["logq_correction"]:
        positive = torch.isin(ids, y)
        z = z + torch.where(positive, 0.0, math.log((call.sizes[2] - int(positive.sum())) / int((~positive).sum())))
    at = F.one_hot(column, len(ids)).bool()
    full, others = torch.where(at, own[:, None], z), z.masked_fill(at, -math.inf)
    a = torch.ones_like(leaves["w"][:, 0]) if o["class_weight"] is None else o["class_weight"].to(sums)
    rest, hardest = others.logsumexp(dim=1), others.max(dim=1).values
    jumps = {  # how far from where the derivative jumps
        "softmax": [], "hinge": [others - own[:, None]], "lse-hinge": [rest - own],
        "max-hinge": [hardest - own, others.topk(2).values.diff(dim=1)] if len(ids) > 2 else [hardest - own],
    }[o["objective"]]  # fmt: skip
    jump = min((float(each.detach().abs().min()) for each in jumps), default=math.inf)
    if o["objective"] == "softmax":
        each = F.cross_entropy(full, column, reduction="none")
        if sums == torch.float64:  # without p - 1 in it, which is 0 where p differs from 1 by less than 1e-16
            each = F.softplus(rest - own, threshold=100.0)
    elif o["objective"] == "hinge":
        each = (others - own[:, None]).clamp(min=0.0).sum(dim=1)
    else:
        each = ((rest if o["objective"] == "lse-hinge" else hardest) - own).clamp(min=0.0)
    loss, eps = each * a[y], o["label_smoothing"]
    if eps:
        spread = -(F.log_softmax(full, dim=1) * a[ids]).sum(dim=1) / len(ids)
        loss = (1.0 - eps) * loss + eps * spread
    loss = loss / a[y].sum() if o["reduction"] == "mean" else loss
    result = loss if o["reduction"] == "none" else loss.sum()
    return differentiated(result, leaves, given.upstream[kept].to(sums)) | {
        "each": loss.detach(),
        "z": z.detach().abs().max(),
        "jump": loss.new_tensor(jump),
    }


def differentiated(loss: Tensor, leaves: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(leaves.values()), upstream if loss.ndim else loss.new_tensor(1.5))
    return {"loss": loss.detach()} | dict(zip(leaves, found, strict=True))


def ours(call: Call, given: Given, backend: str) -> dict[str, Tensor]:
    leaves = {key: each.to(kind_of(call, key)) for key, each in given.tensors.items()}
    if call.strided:  # the same numbers, every other of a longer line
        leaves |= {key: leaves[key].repeat_interleave(2, dim=1)[:, ::2] for key in ("x", "w")}
    leaves = {key: each.requires_grad_() for key, each in leaves.items()}
    margin = getattr(tm, call.name)(**call.numbers)
    with tm.use_backend(backend), torch.autocast(DEVICE, torch.bfloat16, enabled=call.wide):
        loss = tm.margin_cross_entropy(leaves["x"], leaves["w"], given.y, margin, bias=leaves.get("b"), **given.options)
    found = differentiated(loss, leaves, given.upstream.to(loss.dtype))
    return found | ({"loss": found["loss"][given.y >= 0]} if loss.ndim else {})


def numbers_of(draw: st.DrawFn, name: str) -> dict[str, Any]:
    unit_x, _, angle = ANGLES[name]
    numbers: dict[str, Any] = {"s": draw(st.sampled_from((1.0, 16.0, 64.0, 90.0)))} if unit_x else {}
    if name in ("LSoftmax", "ASoftmax"):
        numbers |= {"m": draw(st.integers(1, 4)), "lam": draw(st.sampled_from((0.0, 5.0, 1000.0)))}
    elif name == "CombinedMargin":
        numbers |= {
            f"m{i}": draw(st.sampled_from(some)) for i, some in ((1, (1.0, 0.9, 1.2)), (2, (0.0, 0.4)), (3, (0.0, 0.2)))
        }
    elif angle:
        numbers["m"] = draw(st.sampled_from((1.0, 1.35, 1.7) if angle == "psi" else (0.0, 0.2, 0.5)))
    return numbers


@st.composite
def calls(draw: st.DrawFn) -> Call:
    name = draw(st.sampled_from(sorted(ANGLES)))
    unit_x, unit_w, _ = ANGLES[name]
    # Lengths of rows: any where they are divided out, else logits between tiny and 100.
    lengths = {
        "x": 10.0 ** draw(st.integers(-3, 3)) if unit_x else draw(st.sampled_from((1e-2, 1.0, 4.0))),
        "w": 10.0 ** draw(st.integers(-3, 3)) if unit_w else draw(st.sampled_from((1e-2, 0.2, 2.0))),
    }
    if draw(st.booleans()):
        lengths["b"] = draw(st.sampled_from((0.1, 5.0)))
    dtype, objective = draw(st.sampled_from((torch.float32, *HALVES))), draw(st.sampled_from(sorted(OBJECTIVES)))
    options = {
        "objective": objective, "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
        "label_smoothing": draw(st.sampled_from((0.0, 0.1))) if objective == "softmax" else 0.0,
        "class_weight": draw(st.sampled_from((True, None))), "chunk_bytes": draw(st.sampled_from((1, None))),
        "retain_bytes": draw(st.sampled_from((0, 10**9))),
        "logq_correction": objective in ("softmax", "lse-hinge") and draw(st.booleans()),
    }  # fmt: skip
    return Call(
        name, numbers_of(draw, name),
        (draw(st.integers(1, 40)), draw(st.integers(2, 70)), draw(st.sampled_from((2, 3, 17, 64, 65, 200)))),
        lengths, draw(st.sampled_from((0.0, 0.1, 1.0))), draw(st.sampled_from((-100, 1))),
        draw(st.sampled_from((0.0, 0.3, 1.0))), dtype, dtype == torch.bfloat16 and draw(st.booleans()),
        draw(st.booleans()), options,
    )  # fmt: skip


def errors(call: Call, seed: int, backend: str) -> dict[str, tuple[float, float]]:
    """Of each result: our error and what is allowed, relative: twice plain code's and one rounding."""
    given = given_by(call, seed)
    exact = plain(call, given, torch.float64, torch.float64)
    usual = plain(call, given, call.dtype, torch.float32)
    found, pairs, z = ours(call, given, backend), {}, max(float(exact["z"]), 1.0)
    for key, value in found.items():
        right, kind = exact[key], torch.float32 if key == "loss" else kind_of(call, key)
        range_, size = torch.finfo(kind), float(right.norm())
        if float(right.abs().max()) > range_.max / 4 or (
            key != "loss" and exact["jump"] < 16 * torch.finfo(call.dtype).eps * z
        ):
            continue  # not a number of this dtype; a sample on the other side of a jump
        # By chance plain code may be exact: one rounding of the largest logit, and of what is stored, it always risks.
        rounding = torch.finfo(torch.float32).eps * z + range_.eps / 4
        # What lies below the normal numbers of float32, or between two numbers of what is stored, may be 0.
        smallest = (1e3 * torch.finfo(torch.float32).tiny + range_.tiny * range_.eps) * math.sqrt(right.numel())
        if key == "loss":  # errors of samples that cancel in a sum do so by chance
            size, theirs = max(size, 1.0), float((usual["each"] - exact["each"]).norm())
        else:
            theirs = float((usual[key].to(kind) - right).norm())
        pairs[key] = float((value - right).norm()) / (size or 1.0), (2.0 * theirs + smallest) / (size or 1.0) + rounding
    return pairs


def ratios(call: Call, backend: str, seed: int = 1) -> dict[str, float]:
    """Our errors divided by what is allowed. Few numbers may be wrong by chance: then on average over other numbers."""
    found = [errors(call, seed, backend)]
    if any(not error <= allowed for error, allowed in found[0].values()):
        found = [errors(call, seed + i, backend) for i in range(1, 21)]
    keys = {key for each in found for key in each}
    norm = {key: [math.hypot(*(each[key][i] for each in found if key in each)) for i in (0, 1)] for key in keys}
    return {key: error / allowed for key, (error, allowed) in norm.items()}


@settings(max_examples=(150 if MACHINE in ("cpu", "cuda") else 8) * MORE)
@drawn(calls(), st.sampled_from(BACKENDS), st.integers(1, 10**6))
def test_any_call_is_within_twice_plain_codes_error(call: Call, backend: str, seed: int) -> None:
    for key, ratio in ratios(call, backend, seed).items():
        assert ratio <= 1.0, (key, ratio)


@pytest.mark.parametrize(
    ("dtype", "objective"),
    [*((torch.float32, name) for name in OBJECTIVES), *((dtype, "softmax") for dtype in HALVES)],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_many_samples_of_two_classes(backend: str, dtype: torch.dtype, objective: str) -> None:
    """Every class row gets the sum of half of the samples. The loss is one number, and may be right by chance."""
    n = 65_536 if MACHINE in ("cpu", "cuda") else 640
    options = dict.fromkeys(("label_smoothing", "chunk_bytes", "retain_bytes"), 0) | {"chunk_bytes": None}
    options |= {"objective": objective, "reduction": "mean", "class_weight": None, "logq_correction": False}
    lengths = {"x": 1.0, "w": 0.3, "b": 0.3}
    call = Call("CosFace", {"m": 0.2, "s": 16.0}, (n, 16, 2), lengths, 0.0, 1, 0.0, dtype, False, False, options)
    error: dict[str, list[float]] = {key: [] for key in lengths}
    allowed: dict[str, list[float]] = {key: [] for key in lengths}
    for seed in (1, 2, 3):
        given = given_by(call, seed)
        exact, usual = plain(call, given, torch.float64, torch.float64), plain(call, given, dtype, torch.float32)
        found = ours(call, given, backend)
        for key in lengths:
            error[key].append(float((found[key] - exact[key]).norm()))
            allowed[key].append(float((usual[key].to(dtype) - exact[key]).norm()))
    for key in lengths:
        assert math.hypot(*error[key]) <= 2.0 * math.hypot(*allowed[key]), key
