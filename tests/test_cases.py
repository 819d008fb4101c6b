"""What the tests of a GPU rest on, looked at where there is none."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}


def drawn_elsewhere(source: str) -> list[int]:
    """Lines whose numbers are to be drawn where the generator may not be.

    On a GPU new tensors are there (conftest.py), a `torch.Generator()` is the CPU's, and torch refuses both together.
    A draw with a generator has to name its device, and `cases.sampled` takes the labels of a sample to the CPU.
    """
    tree, found = ast.parse(source), []
    on_a_cpu_only = any(
        isinstance(line, ast.Assign) and ast.unparse(line) == "pytestmark = cpu_only" for line in tree.body
    )
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        owner, name, given = ast.unparse(call.func.value), call.func.attr, {word.arg for word in call.keywords}
        if owner == "torch" and name in DRAWS:
            wrong = "generator" in given and "device" not in given
        else:
            wrong = name == "sample_classes" and not on_a_cpu_only and (len(call.args) > 3 or "generator" in given)
            wrong = wrong and not ast.unparse(call.args[0]).endswith(".cpu()")
        if wrong:
            found.append(call.lineno)
    return found


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.stem)
def test_numbers_are_drawn_where_their_generator_is(path: Path) -> None:
    assert drawn_elsewhere(path.read_text()) == []


@pytest.mark.parametrize(("line", "wrong"), [
    ("torch.randn(3, generator=g)", True),
    ("x = 2 * torch.randint(5, (3,), generator=torch.Generator().manual_seed(0)).to(DEVICE)", True),
    ("torch.randn(3, generator=g, device='cpu').to(DEVICE)", False),
    ("torch.randn(3)", False),
    ("tm.sample_classes(y, 9, 5, g)", True),
    ("tm.sample_classes(y, 9, 5, generator=g)", True),
    ("tm.sample_classes(y.cpu(), 9, 5, g)", False),
    ("tm.sample_classes(y, 9, 5)", False),
    ("pytestmark = cpu_only\ntm.sample_classes(y, 9, 5, g)", False),
    ("pytestmark = cpu_only\ntorch.randn(3, generator=g)", True),  # may be drawn when the file is imported
])  # fmt: skip
def test_a_draw_in_the_wrong_place_is_seen(line: str, wrong: bool) -> None:
    assert bool(drawn_elsewhere(line)) == wrong
