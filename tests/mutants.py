"""`make mutants`: cosmic-ray's mutations of margins, objectives and stream against the fast tests.

A mutant that no test notices is a survivor. A survivor that changes no value is listed with its reason in
`equivalent_mutants.toml`; any other one fails the run. Each worker mutates its own copy of the package and forks from a
process that has torch loaded, so a mutant costs its tests and no start-up. What was noticed in a module that has not
changed since is not run again without --fresh.

    python tests/mutants.py [--only stream] [--workers 2] [--more] [--fresh] [--list]
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".cache" / "mutants"
REPORT = ROOT / "reports" / "mutants.md"
LOG = WORK / "outcomes.jsonl"
REASONS = ROOT / "tests" / "equivalent_mutants.toml"
TIMEOUT = 240  # seconds for a mutant's tests; a mutant that hangs counts as noticed

MARGIN_TESTS = ["test_margins.py"]
CORE_TESTS = ["test_functional.py", "test_failures.py", "test_stream.py", "test_modules.py", "test_budget.py"]
TESTS = {
    "margins/angular.py": MARGIN_TESTS,
    "margins/base.py": [*MARGIN_TESTS, *CORE_TESTS],
    "margins/multiplicative.py": MARGIN_TESTS,
    "margins/plain.py": [*MARGIN_TESTS, "test_functional.py"],
    "margins/schedules.py": MARGIN_TESTS,
    "objectives.py": CORE_TESTS,
    "stream.py": CORE_TESTS,
}
MORE = {
    "walk.py": CORE_TESTS,
    "kernels/torch_ops.py": CORE_TESTS,
    "functional.py": CORE_TESTS,
}
# Starting compilers and interpreters takes seconds and says nothing about values that the eager tests do not.
SKIPPED = "not compile and not environment and not opcheck and not past_2_to"

# Of cosmic-ray's operators those that a slip of the hand could make. Type hints are full of | and stay out.
OPERATORS = re.compile(
    r"core/(Replace(BinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|Pow_Mul|Mod_Add|FloorDiv_Mul)"
    r"|ComparisonOperator_(Lt_LtE|Lt_GtE|Gt_GtE|Gt_LtE|GtE_Gt|GtE_Lt|LtE_Lt|LtE_Gt|Eq_NotEq|NotEq_Eq|Is_IsNot|IsNot_Is)"
    r"|UnaryOperator_(USub_UAdd|Delete_Not|Delete_USub)|TrueWithFalse|FalseWithTrue|AndWithOr|OrWithAnd"
    r"|BreakWithContinue|ContinueWithBreak)|NumberReplacer|AddNot|ZeroIterationForLoop)$"
)


def noticed_before() -> set[tuple[str, str, int]]:
    """Mutations that an earlier run noticed, of modules as they are now."""
    if not LOG.exists():
        return set()
    lines = [json.loads(line) for line in LOG.read_text().splitlines()]
    return {(line[1], line[2], line[3]) for line in lines if line[0] == digest(line[1]) and line[4]}


def digest(module: str) -> str:
    return hashlib.sha256((ROOT / "tritonmargin" / module).read_bytes()).hexdigest()[:16]


def work_items(only: str) -> list[tuple[str, str, int]]:
    """(module, operator, occurrence) of every mutation."""
    from cosmic_ray.commands import init
    from cosmic_ray.work_db import WorkDB, use_db

    WORK.mkdir(parents=True, exist_ok=True)
    modules = [module for module in TESTS if only in module]
    with use_db(WORK / "session.sqlite", WorkDB.Mode.create) as database:
        init([ROOT / "tritonmargin" / module for module in modules], database, {})
        items = [item.mutations[0] for item in database.work_items]
    return [
        (str(Path(spec.module_path).relative_to(ROOT / "tritonmargin")), spec.operator_name, spec.occurrence)
        for spec in items
        if OPERATORS.match(spec.operator_name)
    ]


def worker(number: int, jobs: multiprocessing.Queue, results: multiprocessing.Queue) -> None:
    import hypothesis  # noqa: F401  loaded once, shared by every fork
    import pytest
    import torch
    from cosmic_ray.mutating import use_mutation
    from cosmic_ray.plugins import get_operator

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    copy = WORK / f"worker{number}"
    shutil.rmtree(copy, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("tritonmargin", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", copy)
    sys.path.insert(0, str(copy))
    os.chdir(copy)

    def noticed(tests: list[str]) -> bool:
        child = os.fork()
        if child == 0:
            os.setsid()
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            arguments = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow", "-k", SKIPPED]
            code = 1
            try:
                code = pytest.main([*arguments, *(str(copy / "tests" / test) for test in tests)])
            finally:
                os._exit(int(code))
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status != 0
            time.sleep(0.02)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return True

    while (job := jobs.get()) is not None:
        module, operator, occurrence = job
        path = copy / "tritonmargin" / module
        with use_mutation(path, get_operator(operator)(), occurrence) as (before, after):
            caught = after is None or noticed(TESTS[module])
        changed = [] if after is None else list(difflib.unified_diff(before.split("\n"), after.split("\n"), n=0))[3:]
        old = " ".join(line[1:].strip() for line in changed if line.startswith("-"))
        new = " ".join(line[1:].strip() for line in changed if line.startswith("+"))
        with open(LOG, "a") as log:
            log.write(json.dumps([digest(module), module, operator, occurrence, caught]) + "\n")
        results.put((module, operator.removeprefix("core/"), old, new, caught))
    results.put(None)


def reasons() -> dict[tuple[str, str, str], str]:
    listed = tomllib.loads(REASONS.read_text()).get("mutant", [])
    return {(entry["module"], entry["line"], entry["mutant"]): entry["reason"] for entry in listed}


def write_report(outcomes: list[tuple[str, str, str, str, bool]], minutes: float) -> int:
    """Write the report; returns the number of survivors without a reason."""
    known = reasons()
    survivors = sorted({(module, old, new) for module, _, old, new, caught in outcomes if not caught})
    open_ones = [survivor for survivor in survivors if survivor not in known]
    lines = [
        "# Mutation run",
        "",
        f"`make mutants`, {time.strftime('%Y-%m-%d')}: {len(outcomes)} mutants in {minutes:.0f} minutes, "
        f"{sum(caught for *_, caught in outcomes)} noticed, {len(survivors)} distinct survivors, "
        f"{len(open_ones)} of them without a reason.",
        "",
        "| module | mutants | noticed |",
        "|---|---|---|",
    ]
    for module in dict.fromkeys(outcome[0] for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome[0] == module]
        lines.append(f"| {module} | {len(own)} | {sum(outcome[4] for outcome in own)} |")
    lines += ["", "## Survivors, and why they change no value", ""]
    for module, old, new in survivors:
        reason = known.get((module, old, new), "**no reason given**")
        lines += [f"- `{module}`: {reason}", "", f"      - {old}", f"      + {new}", ""]
    REPORT.write_text("\n".join(lines).rstrip() + "\n")
    return len(open_ones)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="modules whose path contains this; the report is not written")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--more", action="store_true", help="also " + ", ".join(MORE))
    parser.add_argument("--fresh", action="store_true", help="run every mutant again")
    parser.add_argument("--list", action="store_true", help="count the mutants and stop")
    options = parser.parse_args()
    if options.more:
        TESTS.update(MORE)
    items = work_items(options.only)
    if options.list:
        for module in TESTS:
            print(f"{sum(item[0] == module for item in items):5d}  {module}")
        return 0
    done = set() if options.fresh else noticed_before() & set(items)
    if done:
        print(f"{len(done)} of {len(items)} were noticed before")
    outcomes = [(module, operator.removeprefix("core/"), "", "", True) for module, operator, _ in done]
    items = [item for item in items if item not in done]
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    jobs, results = context.Queue(), context.Queue()
    for item in [*items, *[None] * options.workers]:
        jobs.put(item)
    workers = [context.Process(target=worker, args=(n, jobs, results)) for n in range(options.workers)]
    for process in workers:
        process.start()
    running = options.workers
    while running:
        outcome = results.get()
        if outcome is None:
            running -= 1
            continue
        outcomes.append(outcome)
        module, operator, old, new, caught = outcome
        if not caught:
            print(f"survived  {module}  {operator}\n    - {old}\n    + {new}", flush=True)
        if len(outcomes) % 50 == 0:
            print(f"{len(outcomes) - len(done)}/{len(items)}  {(time.monotonic() - start) / 60:.1f} min", flush=True)
    for process in workers:
        process.join()
    if options.only:
        return 0
    return 1 if write_report(outcomes, (time.monotonic() - start) / 60) else 0


if __name__ == "__main__":
    sys.exit(main())
