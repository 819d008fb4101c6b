"""What a user writes is clean under `mypy --strict`, and runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import cpu_only

import tritonmargin as tm

pytestmark = cpu_only

ROOT = Path(tm.__file__).parents[1]

USER = """
import sys
import torch
from torch import Tensor
import tritonmargin as tm

class Halved(tm.Margin):
    def target_cosine(self, cos: Tensor) -> Tensor:
        return cos - 0.2 * (1 + cos)

x, w, y = torch.randn(4, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True), torch.arange(4)
loss: Tensor = tm.margin_cross_entropy(x, w, y, tm.ArcFace(m=0, s=64), bias=torch.zeros(20), label_smoothing=0)
both: tuple[Tensor, tm.Stats] = tm.margin_cross_entropy(x, w, y, Halved(s=16), return_stats=True, reduction="sum")
plain: Tensor = tm.linear_cross_entropy(x, w, y, linear_bias=torch.zeros(20), label_smoothing=0.1)
exact: Tensor = tm.reference.margin_cross_entropy(x, w, y, tm.CosFace(0.3, 16), class_ids=tm.sample_classes(y, 20, 9))
margins: list[tm.Margin] = [tm.CombinedMargin(1, 0.2, 0), tm.LSoftmax(3, lam=1), tm.SphereFaceR(m=2), tm.Softmax()]
arcface: tm.ArcFace = tm.ArcFace(torch.nn.Parameter(torch.tensor(0.3))).with_schedule(s=tm.WarmUp(8, 32.5, steps=10))
head = tm.MarginSoftmaxLoss(8, 20, tm.ArcFace(m=0.3), sample_rate=1, memory_budget=1 << 20, on_nonfinite="skip")
head.margin.m = 0.5
head.margin.s = 32
m: float = head.margin.m
head.margin.with_schedule(m=tm.WarmUp(0, 0.5, 2000), s=lambda step: 16 + step).schedule(3)
head.sample_rate = 0.5
optimizers: list[torch.optim.Optimizer] = [tm.optim.RowSGD(head.parameters(), lr=1, momentum=0.9, nesterov=True)]
adamw = tm.optim.RowAdamW([{"params": [w], "lr": 0.1}], betas=(0.9, 0.99), state_dtype=torch.bfloat16)
value: Tensor = head(x, y)
pair, stats = head(x, y, return_stats=True)
names: Tensor = stats.hardest_class
torch.autograd.backward(value)  # Tensor.backward has no types
norm: Tensor = tm.clip_grad_norm_(head.parameters(), 1, norm_type=2)
optimizers[0].step()

@tm.use_backend("torch")
def evaluate(x: Tensor, y: Tensor, more: bool) -> Tensor:
    with torch.no_grad(), tm.use_backend("reference"):
        found = tm.margin_cross_entropy(x, head.weight, y, tm.NormFace(), return_stats=more)
    return found if isinstance(found, Tensor) else found[0]

evaluate(x, y, True)
state = {"head": head.state_dict(), "optimizer": optimizers[0].state_dict(), "epoch": 3}
path: str = str(tm.checkpoint.save(sys.argv[1], state, step=3).result())
step: int | None = tm.checkpoint.load(sys.argv[1], state)
tm.checkpoint.export_centers(head, sys.argv[1] + "/centers.safetensors", dtype=torch.float16)
"""

WRONG = {
    "loss: str = tm.margin_cross_entropy(x, w, y, tm.ArcFace())": "Incompatible types in assignment",
    "pair: Tensor = tm.margin_cross_entropy(x, w, y, tm.ArcFace(), return_stats=True)": "Incompatible types",
    "tm.margin_cross_entropy(x, w, y, tm.ArcFace(), label_smooth=0.1)": "No overload variant",
    "tm.ArcFace(m='0.5')": "incompatible type",
    "tm.MarginSoftmaxLoss(8, 20)(x, y).nothing": 'has no attribute "nothing"',
    "tm.nothing": 'has no attribute "nothing"',
    "tm.checkpoint.save('folder', {}, step='3')": "incompatible type",
}  # fmt: skip
BEGIN = """import torch
from torch import Tensor
import tritonmargin as tm
x, w, y = torch.ones(2, 3), torch.ones(4, 3), torch.arange(2)
"""


def test_a_users_file_is_clean_and_a_wrong_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "wrong.py").write_text(BEGIN + "\n".join(WRONG) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file="]
    command += [f"--cache-dir={ROOT / '.cache' / 'mypy'}"]  # torch takes half a minute to read
    files = [str(tmp_path / name) for name in ("user.py", "wrong.py")]
    done = subprocess.run(
        [*command, *files], cwd=tmp_path, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    said = done.stdout.splitlines()
    assert [line for line in said if "error" in line and "wrong.py" not in line and not line.startswith("Found")] == []
    for place, message in enumerate(WRONG.values(), start=BEGIN.count("\n") + 1):
        assert any(f"wrong.py:{place}:" in line and message in line for line in said), f"{message}: {done.stdout}"


@pytest.mark.filterwarnings("ignore")
def test_it_runs(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    subprocess.run(
        [sys.executable, tmp_path / "user.py", tmp_path / "folder"], env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (tmp_path / "folder" / "centers.safetensors").exists()


def test_the_package_says_that_it_has_types() -> None:
    assert (ROOT / "tritonmargin" / "py.typed").exists()
