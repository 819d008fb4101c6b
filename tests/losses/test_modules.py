"""MarginSoftmaxLoss, sampling, backends and the errors that bad input gets."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
from cases import DEVICE, MACHINE, cpu_only, labels, made, sampled
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import tritonmargin as tm
from tritonmargin import checks
from tritonmargin.margins import MARGINS
from tritonmargin.objectives import OBJECTIVES


def batch(n=6, d=8, c=131):
    return made(n, d).float(), labels(c, n)


# -- the module ----------------------------------------------------------------------------------------------------


def test_head_is_the_function():
    x, target = batch()
    class_weight = torch.rand(131)
    head = tm.MarginSoftmaxLoss(
        8, 131, tm.L2Softmax(s=16.0), bias=True, class_weight=class_weight, label_smoothing=0.1, reduction="sum",
        ignore_index=3, retain_bytes=1000, chunk_bytes=1 << 12,
    )  # fmt: skip
    torch.nn.init.normal_(head.bias)
    target[1] = 3
    loss, stats = head(x, target, return_stats=True)
    expected, expected_stats = tm.margin_cross_entropy(
        x, head.weight, target, head.margin, bias=head.bias, class_weight=class_weight, label_smoothing=0.1,
        reduction="sum", ignore_index=3, return_stats=True, chunk_bytes=1 << 12,
    )  # fmt: skip
    assert torch.equal(loss, expected)
    for ours, other in zip(stats, expected_stats, strict=True):
        torch.testing.assert_close(ours, other, equal_nan=True)
    ids = tm.sample_classes(target, 131, 40)
    sampled = head(x, target, class_ids=ids)
    assert torch.equal(sampled, tm.margin_cross_entropy(
        x, head.weight, target, head.margin, bias=head.bias, class_ids=ids, class_weight=class_weight,
        label_smoothing=0.1, reduction="sum", ignore_index=3, chunk_bytes=1 << 12,
    ))  # fmt: skip


def test_a_heads_chunks_are_as_large_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("tritonmargin.loss.class_pass", lambda _, spec, __: seen.append(spec.chunk_bytes) or 1 / 0)
    for size in (None, 1 << 20):
        with pytest.raises(ZeroDivisionError):
            tm.MarginSoftmaxLoss(8, 131, chunk_bytes=size)(*batch())
    assert seen == [0, 1 << 20]
    assert "chunk_bytes=1048576" in repr(tm.MarginSoftmaxLoss(8, 131, chunk_bytes=1 << 20))


def test_defaults():
    torch.manual_seed(0)
    head = tm.MarginSoftmaxLoss(64, 5000)
    assert isinstance(head.margin, tm.ArcFace)
    assert (head.margin.m, head.margin.s) == (0.5, 64.0)
    assert head.weight.shape == (5000, 64)
    assert head.bias is None
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert abs(head.weight.mean().item()) < 1e-4


def test_state_dict_has_fixed_names_and_none_of_the_margins_numbers():
    for margin in MARGINS.values():
        assert list(tm.MarginSoftmaxLoss(4, 7, margin()).state_dict()) == ["weight"]
    head = tm.MarginSoftmaxLoss(4, 7, bias=True, class_weight=torch.ones(7))
    assert sorted(head.state_dict()) == ["bias", "class_weight", "weight"]
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    other = tm.MarginSoftmaxLoss(4, 7, tm.CosFace(), bias=True, class_weight=torch.zeros(7))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.weight, head.weight)
    assert other.margin.m == 0.35


@pytest.mark.parametrize("name", MARGINS)
def test_deepcopy_and_pickle(name):
    x, target = batch()
    head = tm.MarginSoftmaxLoss(8, 131, MARGINS[name]())
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert repr(other) == repr(head)
        assert torch.equal(other(x, target), head(x, target))
        assert other.weight is not head.weight


def test_repr_tells_what_was_chosen():
    head = tm.MarginSoftmaxLoss(8, 131, tm.ArcFace(m=0.3, s=32.0), bias=True, label_smoothing=0.1)
    assert repr(head) == (
        "MarginSoftmaxLoss(\n"
        "  embedding_dim=8, num_classes=131, bias=True, label_smoothing=0.1\n"
        "  (margin): ArcFace(m=0.3, s=32, beyond_pi='cos-mm', gradient='exact')\n"
        ")"
    )


@cpu_only
def test_scheduled_margin_changes_the_loss_of_a_compiled_step_without_recompiling():
    x, target = batch()
    head = tm.MarginSoftmaxLoss(8, 131, tm.ArcFace().with_schedule(m=tm.WarmUp(0.0, 0.5, steps=10)))
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    losses = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in (0, 5, 10):
            head.margin.schedule(step)
            losses.append(compiled(x, target))
            assert torch.equal(losses[-1], head(x, target))
    assert losses[0] < losses[1] < losses[2]


def test_dtype_moves_weights_and_keeps_margin_numbers():
    x, target = batch()
    head = tm.MarginSoftmaxLoss(8, 131).bfloat16()
    assert head.weight.dtype == torch.bfloat16
    assert head.margin.m == 0.5
    loss = head(x.bfloat16(), target)
    loss.backward()
    assert loss.dtype == torch.float32
    assert head.weight.grad.dtype == torch.bfloat16
    assert tm.MarginSoftmaxLoss(8, 131, dtype=torch.float64).weight.dtype == torch.float64


def test_training_learns_and_sparse_gradients_train_too():
    """Thirty steps of SGD separate 50 classes of 8 numbers, with all classes and with a sample of 20."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(50, 8, generator=generator, device="cpu").to(DEVICE)
    for sparse in (False, True):
        torch.manual_seed(0)
        head = tm.MarginSoftmaxLoss(8, 50, tm.CosFace(m=0.1, s=16.0), sparse_grad=sparse)
        optimiser = torch.optim.SGD(head.parameters(), lr=0.02)
        for _ in range(60):
            target = torch.randint(50, (64,), generator=generator, device="cpu").to(DEVICE)
            x = centres[target] + 0.1 * torch.randn(64, 8, generator=generator, device="cpu").to(DEVICE)
            ids = sampled(target, 50, 40, generator) if sparse else None
            loss = head(x, target, class_ids=ids)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        _, stats = head(centres, torch.arange(50), return_stats=True)
        assert stats.correct.float().mean() > 0.95


# -- sampling ------------------------------------------------------------------------------------------------------


def test_sample_classes():
    target = torch.tensor([9, 3, 3, -100, 99])
    ids = sampled(target, 100, 20, torch.Generator().manual_seed(0))
    assert ids.dtype == torch.int64
    assert len(ids) == 20
    assert (ids[1:] > ids[:-1]).all()
    assert {3, 9, 99} <= set(ids.tolist())
    assert ids.min() >= 0
    assert ids.max() < 100
    again = sampled(target, 100, 20, torch.Generator().manual_seed(0))
    assert torch.equal(ids, again)
    assert not torch.equal(ids, sampled(target, 100, 20, torch.Generator().manual_seed(1)))
    assert tm.sample_classes(target, 100, 2).tolist() == [3, 9, 99]  # positives are never dropped
    assert torch.equal(tm.sample_classes(target, 100, 100), torch.arange(100))
    assert tm.sample_classes(target[:0], 100, 0).tolist() == []


def test_sampled_negatives_are_uniform():
    generator = torch.Generator().manual_seed(0)
    count = torch.zeros(20)
    for _ in range(2000):
        count[sampled(torch.tensor([7]), 20, 6, generator)] += 1
    assert count[7] == 2000
    negatives = torch.cat([count[:7], count[8:]])
    # Each of 19 negatives is drawn with probability 5/19: mean 526, standard deviation 20.
    assert (negatives - 2000 * 5 / 19).abs().max() < 90


def test_sample_classes_says_what_is_wrong():
    target = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="num_samples must be <= num_classes = 10, got 11"):
        tm.sample_classes(target, 10, 11)
    with pytest.raises(ValueError, match="num_samples must be an integer >= 0, got -1"):
        tm.sample_classes(target, 10, -1)
    with pytest.raises(ValueError, match="num_classes must be an integer >= 1"):
        tm.sample_classes(target, 0, 0)
    with pytest.raises(TypeError, match="target must hold integer class numbers"):
        tm.sample_classes(target.float(), 10, 5)
    with pytest.raises(ValueError, match=r"shape \[N\]"):
        tm.sample_classes(target[None], 10, 5)


# -- backends ------------------------------------------------------------------------------------------------------


@cpu_only
def test_use_backend():
    x, target = batch()
    w = torch.randn(131, 8, requires_grad=True)
    streamed = tm.margin_cross_entropy(x, w, target, tm.ArcFace())
    with tm.use_backend("reference"):
        full = tm.margin_cross_entropy(x, w, target, tm.ArcFace())
        with tm.use_backend("torch"):
            assert torch.equal(tm.margin_cross_entropy(x, w, target, tm.ArcFace()), streamed)
        (dw,) = torch.autograd.grad(full, w, create_graph=True)
        assert dw.requires_grad  # the reference has second derivatives
    torch.testing.assert_close(full, streamed)
    for name in ("cuda", ""):
        with pytest.raises(ValueError, match="'torch', 'triton', 'reference'"), tm.use_backend(name):
            pass
    assert torch.equal(tm.margin_cross_entropy(x, w, target, tm.ArcFace()), streamed)


def test_backend_from_the_environment():
    program = (
        "import torch, tritonmargin as tm\n"
        "loss = tm.margin_cross_entropy(torch.ones(1, 2), torch.eye(2), torch.tensor([0]), tm.NormFace())\n"
        "print(float(loss))"
    )
    for name in ("reference", "nonsense"):
        variables = {**os.environ, "TRITONMARGIN_BACKEND": name}
        done = subprocess.run(
            [sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False
        )
        if name == "nonsense":
            assert done.returncode != 0
            assert "unknown backend 'nonsense'" in done.stderr
        else:
            assert float(done.stdout) == pytest.approx(0.693147, rel=1e-5), done.stderr


# -- bad input -----------------------------------------------------------------------------------------------------

X, T = batch()
W = torch.randn(131, 8)
BAD_CALLS = {
    "embeddings of rank 1": (dict(embeddings=X[0]), ValueError, r"embeddings must have shape \[N, D\], got \(8,\)"),
    "embeddings of rank 3": (dict(embeddings=X[None]), ValueError, "embeddings must have shape"),
    "embeddings a list": (dict(embeddings=[[1.0]]), TypeError, "embeddings must be a tensor, got list"),
    "integer embeddings": (dict(embeddings=X.long()), TypeError, "embeddings must be float16.*got torch.int64"),
    "weight a list": (dict(weight=[[1.0]]), TypeError, "weight must be a tensor, got list"),
    "complex weight": (dict(weight=W + 0j), TypeError, "weight must be float16"),
    "weight of rank 1": (dict(weight=W[0]), ValueError, r"weight must have shape \[C, D\]"),
    "no classes": (dict(weight=W[:0]), ValueError, "at least one class"),
    "no columns": (dict(weight=W[:, :0], embeddings=X[:, :0]), ValueError, "at least one class and one column"),
    "widths": (dict(weight=W[:, :7]), ValueError, "same width D, got 8 and 7"),
    "N mismatch": (dict(target=T[:5]), ValueError, r"target must have shape \[N\] = \[6\], got \(5,\)"),
    "target of rank 2": (dict(target=T[None]), ValueError, r"target must have shape \[N\]"),
    "float labels": (dict(target=T.float()), TypeError, "target must hold integer class numbers, got torch.float32"),
    "bool labels": (dict(target=T > 3), TypeError, "got torch.bool"),
    "label too large": (dict(target=T + 131), ValueError, "expected 0 <= target < 131"),
    "bias shape": (dict(bias=torch.zeros(130)), ValueError, r"bias must have shape \[C\] = \[131\], got \(130,\)"),
    "bias dtype": (dict(bias=torch.zeros(131).long()), TypeError, "bias must be float16, bfloat16"),
    "class_weight shape": (dict(class_weight=torch.ones(131, 1)), ValueError, "class_weight must have shape"),
    "class_ids dtype": (dict(class_ids=T.int()), TypeError, "class_ids must be a 1-D int64 tensor"),
    "class_ids rank": (dict(class_ids=T[None]), TypeError, "class_ids must be a 1-D int64"),
    "class_ids unsorted": (dict(class_ids=torch.arange(131).flip(0)), ValueError, "sorted and unique"),
    "class_ids repeated": (dict(class_ids=torch.arange(131) // 2), ValueError, "sorted and unique"),
    "class_ids too large": (dict(class_ids=torch.arange(132)), ValueError, r"class_ids must be in \[0, 131\)"),
    "class_ids negative": (dict(class_ids=torch.arange(-1, 131)), ValueError, "class_ids must be in"),
    "target not walked": (dict(class_ids=T.unique()[1:]), ValueError, "is not in class_ids"),
    "margin a number": (dict(margin=0.5), TypeError, "margin must be a tritonmargin Margin"),
    "margin a class": (dict(margin=tm.ArcFace), TypeError, "margin must be a tritonmargin Margin"),
    "reduction": (dict(reduction="avg"), ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    "objective": (dict(objective="hinged"), ValueError, "'softmax', 'lse-hinge', 'max-hinge', 'hinge', got 'hinged'"),
    "smoothing": (dict(label_smoothing=1.5), ValueError, "label_smoothing must be a number between 0 and 1, got 1.5"),
    "smoothing nan": (dict(label_smoothing=float("nan")), ValueError, "label_smoothing must be a number between"),
    "smoothing a hinge": (dict(label_smoothing=0.1, objective="hinge"), ValueError, "objective 'softmax' only"),
    "sub_centers": (dict(sub_centers=3), ValueError, "sub_centers is 1 in this version"),
    "ignore_index": (dict(ignore_index=1.0), TypeError, "ignore_index must be an integer"),
    "retain_bytes": (dict(retain_bytes=-1), ValueError, "retain_bytes must be a number of bytes"),
    "chunk_bytes": (dict(chunk_bytes=0), ValueError, "chunk_bytes must be a number of bytes"),
    "device": (dict(weight=W.to("meta")), ValueError, f"weight is on meta, embeddings on {X.device}"),
}


@pytest.mark.usefixtures("debug")
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_is_refused_before_any_work_and_changes_nothing(name):
    if name == "device" and MACHINE.startswith("ttsem"):
        pytest.skip("every tensor says that it is on the GPU")
    changes, error, message = BAD_CALLS[name]
    arguments = dict(embeddings=X, weight=W, target=T, margin=tm.ArcFace()) | changes
    before = copy.deepcopy((X, W, T))
    with torch.profiler.profile() as profile, pytest.raises(error, match=message):
        tm.margin_cross_entropy(**arguments)
    assert not any(event.key in ("aten::mm", "aten::addmm_") for event in profile.key_averages())
    assert all(torch.equal(a, b) for a, b in zip(before, (X, W, T), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(embedding_dim=0), "embedding_dim must be an integer >= 1, got 0"),
        (dict(num_classes=2.5), "num_classes must be an integer >= 1, got 2.5"),
        (dict(sample_rate=1.5), "sample_rate must be a number between 0 and 1, got 1.5"),
        (dict(logq_correction=True, objective="hinge"), "logq_correction is for"),
        (dict(gradient_for="fsdp"), "gradient_for must be one of"),
        (dict(on_nonfinite="ignore"), "on_nonfinite must be one of"),
        (dict(sub_centers=3), "sub_centers is 1 in this version"),
        (dict(process_group=object()), "process_group must be a torch.distributed process group"),
        (dict(reduction="avg"), "reduction must be one of"),
        (dict(objective="svm"), "objective must be one of"),
        (dict(class_weight=torch.ones(6)), r"class_weight must have shape \[C\] = \[7\]"),
    ],
)
def test_bad_head_is_refused_when_it_is_made(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tm.MarginSoftmaxLoss(**(dict(embedding_dim=4, num_classes=7) | arguments))


def test_labels_are_looked_at_on_other_devices_only_in_debug_mode(monkeypatch):
    cuda = torch.device("cuda")
    assert checks.looks_at_values(torch.device("cpu"))
    assert not checks.looks_at_values(cuda)
    monkeypatch.setenv("TRITONMARGIN_DEBUG", "1")
    assert checks.looks_at_values(cuda)


def test_only_the_label_check_looks_at_values():
    """Fake tensors raise as soon as anything asks for their values, which on a GPU means waiting for it."""
    with FakeTensorMode(), torch.no_grad():
        x, w = torch.empty(6, 8), torch.empty(131, 8)
        target = torch.empty(6, dtype=torch.int64)
        ids = torch.empty(50, dtype=torch.int64)
        for objective in OBJECTIVES:
            loss, stats = tm.margin_cross_entropy(
                x, w, target, tm.ArcFace(), class_ids=ids, objective=objective, return_stats=True
            )
            assert loss.shape == ()
            assert stats.hardest_class.shape == (6,)
        with pytest.raises(DataDependentOutputException):
            stats.correct.all().item()  # what this test would see


# -- small sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("objective", ["softmax", "lse-hinge", "max-hinge", "hinge"])
def test_empty_batch(objective, reduction):
    x = torch.zeros(0, 8, requires_grad=True)
    w = W.clone().requires_grad_()
    loss, stats = tm.margin_cross_entropy(
        x, w, T[:0], tm.ArcFace(), objective=objective, reduction=reduction, return_stats=True
    )
    assert loss.shape == ((0,) if reduction == "none" else ())
    if reduction != "none":
        assert loss.isnan() if reduction == "mean" else loss == 0
    assert all(field.shape == (0,) for field in stats)
    dx, dw = torch.autograd.grad(loss.sum(), (x, w))
    assert dx.shape == (0, 8)
    assert not dw.any()


@pytest.mark.parametrize("name", MARGINS)
def test_one_class_and_one_dimension(name):
    for c, d in ((1, 1), (1, 5), (2, 1), (5, 1)):
        x, w = made(3, d).requires_grad_(), made(c, d, seed=1).requires_grad_()
        target = torch.tensor([0, c - 1, 0])
        loss = tm.margin_cross_entropy(x, w, target, MARGINS[name](), reduction="none")
        expected = tm.reference.margin_cross_entropy(x, w, target, MARGINS[name](), reduction="none")
        torch.testing.assert_close(loss, expected)
        for ours, other in zip(
            torch.autograd.grad(loss.sum(), (x, w)), torch.autograd.grad(expected.sum(), (x, w)), strict=True
        ):
            # D = 1 has cosines of +-1 only, where SphereFaceR's slope is cut at 1e9: rounding shows in the sixth digit.
            torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
