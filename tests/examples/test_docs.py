"""README.md and docs/ say what is there: every Python snippet runs, and every link, file, command, option, target and
name exists. `docs/testing.md` tells writers what a snippet finds and which comments change how it is taken.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tritonmargin as tm

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LARGE, DIVISOR, LARGEST = 100_000, 1000, 4000  # whole numbers of a snippet, so that it runs in a moment
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Block(NamedTuple):
    """A fenced block: its language, its text, the line it begins at, and the marks in comments right above it."""

    language: str
    text: str
    line: int
    marks: dict[str, str]


def blocks(text: str) -> list[Block]:
    found: list[Block] = []
    marks: dict[str, str] = {}
    language, begun = None, 0
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("```"):
            if language is None:
                language, begun = line[3:].strip(), number + 1
            else:
                found.append(Block(language, "\n".join(lines[begun:number]), begun + 1, marks))
                language, marks = None, {}
        elif language is None:
            mark = re.fullmatch(r"<!-- (needs|file): (\S+) -->", line.strip())
            marks = {**marks, mark[1]: mark[2]} if mark else marks if not line.strip() else {}
    assert language is None, "a block that is not closed"
    return found


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def code(text: str) -> list[str]:
    """What is code on a page: the fenced blocks and the spans between backticks."""
    return [*(block.text for block in blocks(text)), *re.findall(r"`([^`\n]+)`", prose(text))]


# -- snippets ------------------------------------------------------------------------------------------------------


class Shrink(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if type(node.value) is int and node.value >= LARGE:
            node.value = min(node.value // DIVISOR, LARGEST)
        return node


def run(block: Block, page: Path, names: dict[str, Any]) -> None:
    # Line numbers of a traceback are those of the page.
    tree = ast.parse("\n" * (block.line - 1) + block.text, str(page))
    compiled = compile(ast.fix_missing_locations(Shrink().visit(tree)), str(page), "exec")
    if block.marks.get("needs") == "ranks":
        # In a group of one rank; what is sharded over it does not outlive it.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        exec(compiled, dict(names))
        dist.destroy_process_group()
    elif block.marks.get("needs") != "cuda" or torch.cuda.is_available():
        exec(compiled, names)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What a page's snippets find, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yield {
        "__name__": "snippets", "torch": torch, "F": F, "nn": nn, "dist": dist, "tm": tm,
        "embeddings": torch.randn(32, 512, requires_grad=True), "weight": torch.randn(1000, 512, requires_grad=True),
        "target": torch.randint(100, (32,)), "backbone": nn.Linear(16, 512), "images": torch.randn(32, 16),
        "DistributedDataParallel": DistributedDataParallel,
    }  # fmt: skip
    if dist.is_initialized():
        dist.destroy_process_group()


@every_page
@pytest.mark.filterwarnings("ignore")
def test_every_snippet_runs(page: Path, names: dict[str, Any]) -> None:
    for block in blocks(page.read_text()):
        if block.language == "python":
            run(block, page, names)


@every_page
def test_a_snippet_of_a_file_is_in_it(page: Path) -> None:
    for block in blocks(page.read_text()):
        if "file" in block.marks:
            assert block.text in (ROOT / block.marks["file"]).read_text(), f"{page.name}:{block.line}"


def test_snippets_are_shrunk_and_fail_where_they_are_wrong(names: dict[str, Any]) -> None:
    text = "<!-- needs: cuda -->\n\n```python\nundefined\n```\n\n```python\nx = 1_000_000 + 200\ny = 100_000_000\n```\n"
    first, second = blocks(text)
    assert first.marks == {"needs": "cuda"}
    assert second.marks == {}
    run(second, ROOT / "README.md", names)
    assert (names["x"], names["y"]) == (1200, LARGEST)
    with pytest.raises(NameError):
        run(first._replace(marks={}), ROOT / "README.md", names)
    with pytest.raises(SyntaxError):
        run(first._replace(text="x ="), ROOT / "README.md", names)


# -- what pages name -----------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(path.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text()))


def wrong_links(page: Path) -> list[str]:
    wrong = []
    for link in links(page):
        if re.match(r"https?:|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            wrong.append(link)
    return wrong


def wrong_files(text: str) -> list[str]:
    """Paths inside the repository that are not there; one with a star stands for several."""
    found = re.findall(
        r"(?<![\w/.-])((?:docs|examples|perf|reports|tests|tritonmargin|\.ci)/[\w./*-]+)", "\n".join(code(text))
    )
    return [path for path in found if not list(ROOT.glob(path.rstrip("/.")))]


@cache
def targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def wrong_targets(text: str) -> list[str]:
    found = re.findall(r"(?:^|[\s;&])make ([a-z][\w-]*)", "\n".join(code(text)), flags=re.MULTILINE)
    return [f"make {name}" for name in found if name not in targets()]


@cache
def commands() -> dict[str, set[str]]:
    """The options of every command of `python -m perf`."""
    typer = pytest.importorskip("typer")
    from perf.cli import app

    group = typer.main.get_command(app)
    options = {
        name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in group.commands.items()
    }
    return {**options, "": {option for parameter in group.params for option in parameter.opts}}


def wrong_commands(text: str) -> list[str]:
    wrong = []
    for piece in code(text):
        for words in re.findall(r"python -m (.+)", piece.replace("\\\n", " ")):
            line = words.partition("#")[0].split()
            if line[0] == "perf":
                command = line[1] if len(line) > 1 and not line[1].startswith("-") else ""
                known = commands().get(command)
                wrong += [f"perf {command}"] if known is None else []
                options = {word.partition("=")[0] for word in line if word.startswith("--")}
                wrong += [f"perf {command} {option}" for option in options - (known or options) - {"--help"}]
            elif line[0].startswith("examples") and importlib.util.find_spec(line[0]) is None:
                wrong.append(line[0])
    return wrong


def wrong_names(text: str) -> list[str]:
    """`tm.Name`, `test_name` and TRITONMARGIN_NAME that nothing has."""
    pieces = "\n".join(code(text))
    wrong = []
    for name in re.findall(r"\btm\.([A-Za-z_][\w.]*)", pieces):
        here: Any = tm
        for part in name.strip(".").split("."):
            here = getattr(here, part, None)
        wrong += [] if here is not None else [f"tm.{name}"]
    for name, rest in re.findall(r"(?<![\w/])(test_\w+)(\.{3}|\*)?", pieces):
        there = f"def {name}" in all_tests() if rest else f"def {name}(" in all_tests()
        wrong += [] if there or list((ROOT / "tests").rglob(f"{name}{'*' if rest else ''}.py")) else [name]
    return wrong + [name for name in re.findall(r"TRITONMARGIN_[A-Z_]+", pieces) if name not in sources()]


@cache
def all_tests() -> str:
    return "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py") if path.name != Path(__file__).name)


@cache
def sources() -> str:
    """Where environment variables are read."""
    return all_tests() + "\n".join(path.read_text() for path in (ROOT / "tritonmargin").rglob("*.py"))


CHECKS = (wrong_files, wrong_targets, wrong_commands, wrong_names)


@every_page
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    assert wrong_links(page) == []
    assert [word for check in CHECKS for word in check(text)] == []


def test_what_is_not_there_is_found(tmp_path: Path) -> None:
    wrong = {
        "perf/nothing.py": wrong_files, "tests/test_nothing*.py": wrong_files,
        "make nothing": wrong_targets,
        "python -m perf nothing": wrong_commands, "python -m perf run --nothing": wrong_commands,
        "python -m examples.nothing": wrong_commands,
        "tm.Nothing": wrong_names, "tm.optim.Nothing": wrong_names, "test_nothing": wrong_names,
        "test_nothing_at_all...": wrong_names,
        "TRITONMARGIN_NOTHING": wrong_names,
    }  # fmt: skip
    for words, check in wrong.items():
        assert check(f"See `{words}`."), words
        assert check(f"```\n{words}\n```\n"), words
    page = tmp_path / "page.md"
    page.write_text("# One two: three\n\n[a](page.md#one-two-three) [b](page.md#one) [c](gone.md) [d](https://x.org)\n")
    assert wrong_links(page) == ["page.md#one", "gone.md"]


def test_every_page_can_be_reached_from_readme() -> None:
    seen: set[Path] = set()
    left = [PAGES[0]]
    while left:
        page = left.pop()
        if page not in seen and page.suffix == ".md" and page.is_relative_to(ROOT) and page.exists():
            seen.add(page)
            left += [(page.parent / link.partition("#")[0]).resolve() for link in links(page) if ":" not in link]
    assert set(PAGES) - seen == set()


def test_readme_is_short() -> None:
    text = PAGES[0].read_text()
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 1800
