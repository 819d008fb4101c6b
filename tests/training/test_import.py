"""What `import tritonmargin` takes beside `import torch`: little, as slow modules are imported by who uses them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from cases import cpu_only

import tritonmargin as tm
from tritonmargin.compiling import constant_result

pytestmark = cpu_only

ROOT = Path(tm.__file__).parents[1]
SLOW = (
    "triton",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "sympy",
)

MEASURE = """
import resource, sys, time
def used():
    return time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = used()
import torch
middle, before = used(), set(sys.modules)
import tritonmargin
end = used()
import json
times = [(b[0] - a[0], b[1]) for a, b in ((begin, middle), (middle, end))]
print(json.dumps({"times": times, "added": sorted(set(sys.modules) - before), "all": sorted(sys.modules)}))
"""

STEP = """
import json, sys, torch
import tritonmargin as tm
head = tm.MarginSoftmaxLoss(8, 100, sample_rate=0.5, sparse_grad=True)
head(torch.randn(4, 8, requires_grad=True), torch.arange(4)).backward()
print(json.dumps({"all": sorted(sys.modules)}))
"""


def run(code: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def imports() -> list[Any]:
    return [run(MEASURE) for _ in range(3)]


def test_no_slow_module_is_imported(imports: list[Any]) -> None:
    assert not {name for name in imports[0]["all"] if name in SLOW}


def test_what_is_imported_beside_torch_is_the_package(imports: list[Any]) -> None:
    others = [name for name in imports[0]["added"] if name.partition(".")[0] != "tritonmargin"]
    assert len(others) <= 5, others


def test_time_and_memory_are_nearly_those_of_torch(imports: list[Any]) -> None:
    """Seconds of the CPU, which other processes do not change much; the median of three."""
    own = median(found["times"][1][0] / found["times"][0][0] for found in imports)
    memory = median(found["times"][1][1] / found["times"][0][1] for found in imports)
    assert own <= 0.2
    assert memory <= 1.2


def test_a_step_on_a_cpu_needs_none_either() -> None:
    assert not {name for name in run(STEP)["all"] if name in SLOW}


def test_what_is_imported_later_is_there_all_the_same() -> None:
    first = "import tritonmargin as tm; assert callable(tm.checkpoint.save); assert 'checkpoint' in dir(tm)"
    for code in (
        first,
        "from tritonmargin import checkpoint; assert checkpoint.load",
        "import tritonmargin.checkpoint, tritonmargin as tm; assert tm.checkpoint is tritonmargin.checkpoint",
        "from tritonmargin import *; assert checkpoint.CheckpointError",
    ):
        run(f"{code}\nprint('null')")
    with pytest.raises(AttributeError, match="module 'tritonmargin' has no attribute 'nothing'"):
        tm.nothing  # noqa: B018


def test_compilers_are_told_what_torch_tells_them() -> None:
    """torch.compiler.assume_constant_result marks a function; so do we, without torch._dynamo."""
    ours, theirs = constant_result(lambda: 1), torch.compiler.assume_constant_result(lambda: 1)
    assert vars(ours) == vars(theirs) != {}
