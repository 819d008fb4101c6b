"""Cases of the class pass by kernels, what float64 says about them, and how far a result may be off."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import DEVICE, MACHINE, made
from torch import Tensor

from tritonmargin.backends import triton as backend
from tritonmargin.spec import PassGrads, PassInputs, PassSpec

TTSEM = MACHINE.startswith("ttsem")

# How a case multiplies: the dtype of x, tl.dot's precision, and how far a row of a gradient may be off.
NUMBERS = {
    "bfloat16": (torch.bfloat16, "ieee", 2e-2),
    "float16": (torch.float16, "ieee", 3e-3),
    "tf32": (torch.float32, "tf32", 3e-3),
    "float32": (torch.float32, "ieee", 1e-5),
}
if MACHINE == "interpreter":  # it multiplies bfloat16 wrongly (Triton 3.6 to 3.9) and knows no TF32
    NUMBERS = {name: NUMBERS[name] for name in ("float32", "float16")}
numbers_of_all_kinds = pytest.mark.parametrize("numbers", NUMBERS)


class Case(NamedTuple):
    """One class pass. What an axis may hold is in `AXES`."""

    numbers: str = "float32"
    stored: str = "same"
    unit: tuple[bool, bool] = (True, True)  # embeddings, class rows
    size: tuple[int, int, int] = (17, 32, 129)  # N, D, C
    classes: str = "all"
    added: str = "nothing"
    mean: str = "no mean"
    asks: str = "rest"
    chunks: str = "one chunk"
    layout: str = "dense"
    labels: str = "random"
    needs: str = "everything"

    @property
    def tolerance(self) -> float:
        return NUMBERS[self.numbers][2]

    def __str__(self) -> str:
        unit = "".join("u" if each else "r" for each in self.unit)
        plain = Case(self.numbers)
        rest = [value for key, value in self._asdict().items() if key not in ("numbers", "unit", "size")]
        usual = [value for key, value in plain._asdict().items() if key not in ("numbers", "unit", "size")]
        differs = [value for value, known in zip(rest, usual, strict=True) if value != known]
        return ", ".join([f"{self.numbers} {unit} {'x'.join(map(str, self.size))}", *differs])


AXES: dict[str, tuple[Any, ...]] = {
    "numbers": tuple(NUMBERS),
    "unit": tuple(itertools.product((True, False), repeat=2)),
    # One past a tile of 16 samples, of 128 and 256 classes; one sample; a width past a block, and an odd one: the
    # products take W as it is where D is a multiple of 16.
    "size": ((17, 32, 129), (1, 33, 257), (20, 144, 70)),
    "stored": ("same", "another dtype"),
    "classes": ("all", "sampled", "sampled, sparse"),
    "added": ("nothing", "bias", "offset"),
    "mean": ("no mean", "mean, one weight", "mean, a weight a class"),
    "asks": ("rest", "rest and hardest", "hinge"),
    "chunks": ("one chunk", "chunk_bytes", "memory_budget", "retained"),
    "layout": ("dense", "other columns", "other rows"),
    "labels": ("random", "one class", "ignored", "elsewhere"),
    "needs": ("everything", "frozen x", "frozen W"),
}


def pairwise(axes: dict[str, Sequence[Any]], valid: Callable[..., bool] = lambda **_: True) -> list[dict[str, Any]]:
    """Few combinations in which any two values of two axes meet, where they may."""
    names = list(axes)
    open_pairs = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(axes[a])), range(len(axes[b])))
        if valid(**{a: axes[a][i], b: axes[b][j]})
    }
    found: list[dict[str, Any]] = []
    while open_pairs:
        row = dict(min(open_pairs, key=lambda pair: (names.index(pair[0][0]), names.index(pair[1][0]), pair)))
        for name in sorted(names, key=lambda name: (name not in row, names.index(name))):
            if name not in row:
                row[name] = best(name, row, axes, open_pairs, valid, names, len(found))
        open_pairs -= {pair for pair in open_pairs if all(row[name] == index for name, index in pair)}
        found.append({name: axes[name][row[name]] for name in names})
    return found


def best(
    name: str, row: dict[str, int], axes: dict[str, Sequence[Any]], open_pairs: set[Any], valid: Callable[..., bool],
    names: list[str], turn: int,
) -> int:  # fmt: skip
    """The value that closes most open pairs with what is chosen; values take turns where several do."""

    def gain(index: int) -> int:
        new = (name, index)
        pairs = [(each, new) if names.index(each[0]) < names.index(name) else (new, each) for each in row.items()]
        return sum(pair in open_pairs for pair in pairs)

    chosen = {key: axes[key][index] for key, index in row.items()}
    count = len(axes[name])
    fitting = [index for index in range(count) if valid(**chosen, **{name: axes[name][index]})]
    return max(fitting, key=lambda index: (gain(index), -((index - turn) % count)))


def valid(**chosen: Any) -> bool:
    """Label smoothing, and with it a mean, is defined for the sum of exp(z) alone."""
    return not (chosen.get("asks") == "hinge" and chosen.get("mean", "no mean") != "no mean")


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return made(*shape, seed=seed).to(dtype)


def laid_out(content: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides; what lies between them is nan."""
    rows, columns = content.shape
    if layout == "dense":
        return content.contiguous()
    if layout == "transposed":
        return content.t().contiguous().t()
    wide = layout == "other columns"
    memory = torch.full((rows * (2 - wide), columns * (1 + wide)), math.nan, dtype=content.dtype, device=DEVICE)
    view = memory[:, ::2] if wide else memory[::2]
    return view.copy_(content)


def other_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype == torch.float32 else torch.float32


FIRST_CLASS = 7  # of the rows of W, where some labels are elsewhere


class Given(NamedTuple):
    inputs: PassInputs
    position: Tensor  # [N] of the label in the pass, -1 elsewhere and where it is ignored
    valid: Tensor  # [N]
    spec: PassSpec


@functools.lru_cache(maxsize=4)
def given(case: Case) -> Given:
    n, d, c = case.size
    dtype, precision, _ = NUMBERS[case.numbers]
    stored = dtype if case.stored == "same" else other_dtype(dtype)
    x, w = random(n, d, seed=1), random(c, d, seed=2) * (0.3 if case.unit[1] else 1.5 / math.sqrt(d))
    if n > 3:
        x[3] = 0.0
    w[5] = w[min(77, c - 1)] = 0.0
    x, w = laid_out(x.to(dtype), case.layout), laid_out(w.to(stored), case.layout)
    ids = None
    if case.classes != "all":
        ids = torch.arange(c, device=DEVICE)[torch.arange(c, device=DEVICE) % 7 != 3]
    active = c if ids is None else len(ids)
    own = torch.arange(n, device=DEVICE) * 29 % active  # some in every chunk, the zero rows among them
    if case.labels == "one class":
        own[: n - n // 3] = active - 1
    ignored = torch.zeros(n, dtype=torch.bool, device=DEVICE)
    elsewhere = torch.zeros_like(ignored)
    target = own if ids is None else ids[own]
    if case.labels == "ignored":
        ignored[1::4] = True
        x[ignored] = math.nan
    if case.labels == "elsewhere":
        target = target + FIRST_CLASS
        elsewhere[::4] = True
        target[::8], target[4::8] = 0, c + FIRST_CLASS + 3
    target = torch.where(ignored, -100, target)
    position = torch.where(ignored | elsewhere, -1, own)
    spec = PassSpec(
        unit_weight=case.unit[1], unit_embeddings=case.unit[0], scale=10.0 if case.unit[0] else 1.0, ignore_index=-100,
        first_class=FIRST_CLASS if case.labels == "elsewhere" else 0,
        bounded=all(case.unit) and "bias" not in case.added, want_rest=case.asks != "hinge",
        want_hardest="hardest" in case.asks, sparse="sparse" in case.classes, dtype=dtype, precision=precision,
        chunk_bytes=1 if case.chunks in ("chunk_bytes", "retained") else 0,
        memory_budget=1 if case.chunks == "memory_budget" else -1,
        retain_bytes=70 * 4 * (n + 16) if case.chunks == "retained" else 0, backend="triton",
    )  # fmt: skip
    inputs = PassInputs(
        x=x, weight=w, target=target, class_ids=ids,
        bias=random(c, seed=3, dtype=stored) if "bias" in case.added else None,
        mean_weight=mean_weight(case, c),
        offset=random(active, seed=4) if "offset" in case.added else None,
    )  # fmt: skip
    if case.asks == "hinge":
        inputs = inputs._replace(threshold=in_a_gap(inputs, position, ~ignored, spec))
    return Given(inputs, position, ~ignored, spec)


def mean_weight(case: Case, c: int) -> Tensor | None:
    if case.mean == "no mean":
        return None
    if case.mean == "mean, one weight":
        return torch.full((), 1.0 / c, device=DEVICE).expand(c)
    return random(c, seed=5).abs() / c


def double(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().cpu().double()


class Exact(NamedTuple):
    """What a pass gives, in float64."""

    z: Tensor  # [N, active]
    others: Tensor  # the same, -inf at the targets
    product: Tensor
    rows: Tensor  # [active, D] w'
    xs: Tensor  # [N, D] x'
    norm_x: Tensor
    norm_w: Tensor  # of the targets
    bias: Tensor | None  # [active]
    leaves: dict[str, Tensor]


def normalised(rows: Tensor) -> tuple[Tensor, Tensor]:
    norm = rows.norm(dim=1)
    return torch.where(norm[:, None] > 0, rows / norm.clamp(min=1e-300)[:, None], 0.0), norm


def exact(inputs: PassInputs, position: Tensor, valid: Tensor, spec: PassSpec) -> Exact:
    position, valid = position.cpu(), valid.cpu()
    x, w, bias = (double(each) for each in (inputs.x, inputs.weight, inputs.bias))
    leaves = {"x": torch.where(valid[:, None], x, 0.0), "weight": w} | ({} if bias is None else {"bias": bias})
    for leaf in leaves.values():
        leaf.requires_grad_()
    where = slice(None) if inputs.class_ids is None else inputs.class_ids.cpu()
    xs, norm_x = normalised(leaves["x"])
    xs = spec.scale * xs if spec.unit_embeddings else leaves["x"]
    rows, norm = normalised(leaves["weight"])
    rows = (rows if spec.unit_weight else leaves["weight"])[where]
    z = xs @ rows.T
    bias = None if bias is None else leaves["bias"][where]
    for each in (bias, double(inputs.offset)):
        z = z if each is None else z + each
    own = position[:, None] == torch.arange(z.shape[1])
    here = position >= 0
    at = position.clamp(min=0)
    product = (xs * rows[at]).sum(dim=1) if len(rows) else torch.zeros(len(x), dtype=torch.float64)
    norm_w = norm[where][at] if len(rows) else product
    return Exact(
        z, z.masked_fill(own, -math.inf), torch.where(here, product, 0.0), rows, xs, norm_x,
        torch.where(here, norm_w, 0.0), bias, leaves,
    )  # fmt: skip


def in_a_gap(inputs: PassInputs, position: Tensor, valid: Tensor, spec: PassSpec) -> Tensor:
    """Thresholds that no rounding carries a logit over: the middle of the widest gap in the upper half."""
    z = exact(inputs, position, valid, spec).others.detach().sort(dim=1).values
    middle = z.shape[1] // 2
    gaps = z.diff(dim=1)[:, middle:-1]
    place = gaps.argmax(dim=1, keepdim=True) + middle
    return (z.gather(1, place) + z.gather(1, place + 1))[:, 0].div(2).float().to(DEVICE)


# -- how close ---------------------------------------------------------------------------------------------------


def near(actual: Tensor, expected: Tensor, tolerance: float, what: str, least: float = 1e-30) -> None:
    """Numbers to `tolerance` of the largest one, or of `least`; rows to that of their own length and a third of the
    median's, for a row may be what is left of parts that cancel."""
    actual, expected = actual.detach().cpu().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} for {tuple(expected.shape)}"
    same = actual == expected  # infinities
    error = torch.where(same, 0.0, actual - expected)
    finite = torch.where(expected.isfinite(), expected, 0.0)
    if actual.ndim == 2:
        error, size = error.norm(dim=1), finite.norm(dim=1)
        some = size[size > 0]
        size = size + 0.3 * (some.median() if len(some) else 1.0)
    else:
        error, size = error.abs(), finite.abs().max() if finite.numel() else finite.new_ones(())
    relative = error / size.clamp(min=least)
    wrong = ~(relative <= tolerance)
    if wrong.any():
        worst = int(relative.nan_to_num(math.inf).argmax())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {len(relative)} wrong, the worst, {worst}, by {relative[worst]:.3g} of its "
            f"size, allowed {tolerance:g}"
        )


def upstream(case: Case) -> dict[str, Tensor]:
    """Gradients of what is asked for, 0 for ignored samples; one of them with a stride, and large and small ones."""
    n = case.size[0]
    use = ["target_product", "hinge" if case.asks == "hinge" else "rest"]
    use += ["embedding_norm"] if not case.unit[0] else []
    use += ["target_norm"] if not case.unit[1] else []
    use += ["mean_logit"] if case.mean != "no mean" else []
    use += ["hardest_product"] if "hardest" in case.asks else []
    use += ["target_bias"] if given(case).inputs.bias is not None else []
    valid = given(case).valid
    sizes = torch.where(torch.arange(n, device=DEVICE) % 5 == 2, 1e-3, 1.0)
    found = {}
    for seed, name in enumerate(use):
        value = random(n, seed=20 + seed) * 0.3
        value = (value.abs() if name in ("rest", "hinge") else value) * sizes
        found[name] = torch.where(valid, value, 0.0)
    found["target_product"] = torch.stack([found["target_product"]] * 2, dim=1)[:, 0]
    return found


def check_pass(case: Case, ops: Any) -> None:
    """Forward and backward of one case against float64. ops: the module `numbers`, or one with a fault."""
    inputs, position, valid, spec = given(case)
    out, saved = ops.forward(inputs, spec)
    right = exact(inputs, position, valid, spec)
    expected = {
        "target_product": right.product,
        "target_norm": right.norm_w,
        "embedding_norm": right.norm_x,
    }
    if spec.want_rest:
        expected["rest"] = right.others.logsumexp(dim=1)
    if inputs.mean_weight is not None:
        a = double(inputs.mean_weight)
        expected["mean_logit"] = right.z @ (a if inputs.class_ids is None else a[inputs.class_ids.cpu()])
    if inputs.threshold is not None:
        excess = right.others - double(inputs.threshold)[:, None]
        expected["hinge"] = excess.relu().sum(dim=1)
        assert torch.equal(out.violations.cpu().double(), (excess > 0).sum(dim=1).double())
    if spec.want_hardest:
        row = out.hardest_row.cpu()
        chosen = right.others.gather(1, row[:, None])[:, 0]
        most = right.others.amax(dim=1)
        assert (most - chosen <= case.tolerance * (1.0 + most.abs())).all(), "the hardest class is another one"
        expected["hardest_product"] = (right.xs * right.rows[row]).sum(dim=1)
        if inputs.bias is not None:
            expected["hardest_product"] = expected["hardest_product"] + right.bias[row]
    if inputs.bias is not None:
        place = position.cpu()
        expected["target_bias"] = torch.where(place >= 0, right.bias[place.clamp(min=0)], 0.0)
    coarse = ("rest", "mean_logit", "hinge")  # the others come from no product of a tile
    for name, value in expected.items():
        near(getattr(out, name), value, case.tolerance / 4 if name in coarse else 1e-6, name, least=1.0)
    check_gradients(case, ops, saved, expected, right)


def check_gradients(case: Case, ops: Any, saved: Any, expected: dict[str, Tensor], right: Exact) -> None:
    inputs, _, _, spec = given(case)
    grads = upstream(case)
    needs = {
        "everything": (True, True, True),
        "frozen x": (False, True, True),
        "frozen W": (True, False, True),
    }[case.needs]
    needs = (*needs[:2], needs[2] and inputs.bias is not None)
    found = ops.backward(inputs, saved, PassGrads(**grads), needs, spec)
    sum((double(grads[name]) * expected[name]).sum() for name in grads).backward()
    for name, wanted in zip(("x", "weight", "bias"), needs, strict=True):
        actual = getattr(found, name)
        assert (actual is not None) == wanted, f"{name}: {'missing' if wanted else 'nobody asked for it'}"
        if not wanted:
            continue
        leaf = right.leaves[name].grad
        if inputs.class_ids is not None and name != "x":
            ids = inputs.class_ids.cpu()
            if name == "weight" and spec.sparse:
                leaf = leaf[ids]
            else:
                others = torch.ones(len(leaf), dtype=torch.bool)
                others[ids] = False
                assert not actual.cpu()[others].any(), f"{name} of classes that are not in the pass"
        rounding = 2.0 * torch.finfo(actual.dtype).eps
        near(actual, leaf, max(case.tolerance, rounding), f"gradient of {name}")
        assert actual.dtype == getattr(inputs, name).dtype


# -- kernels with a mistake in them ------------------------------------------------------------------------------


def broken(folder: Path, monkeypatch: pytest.MonkeyPatch, *edits: tuple[str, str]) -> Any:
    """A copy of the Triton backend in which each `old` is `new`; its `numbers` and its `BACKEND` are ready to use."""
    name = f"broken_{folder.name}"
    files = {path.name: path.read_text() for path in Path(backend.__file__).parent.glob("*.py")}
    for old, new in edits:
        found = [file for file, text in files.items() if old in text]
        assert len(found) == 1 == files[found[0]].count(old), f"not once in the source: {old}"
        files[found[0]] = files[found[0]].replace(old, new)
    (folder / name).mkdir()
    for file, text in files.items():
        (folder / name / file).write_text(text.replace("tritonmargin.backends.triton", name))
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module(name)
