"""`make mutants`: cosmic-ray's mutations of margins, objectives and the class pass against the fast tests.

A mutant that no test notices is a survivor. A survivor that changes no value is listed with its reason in
`equivalent_mutants.toml`; any other one fails the run. Each worker mutates its own copy of the package and forks from a
process that has torch loaded, so a mutant costs its tests and no start-up. A mutant is known by the function, the line
before and the line after; without --fresh, one that was noticed, or that survived and has a reason, is not run again
while its function has that line.

    python tests/mutants.py [--only class_pass] [--workers 2] [--more] [--fresh] [--list]
"""

from __future__ import annotations

import argparse
import ast
import collections
import difflib
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
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".cache" / "mutants"
REPORT = ROOT / "reports" / "mutants.md"
LOG = WORK / "outcomes.jsonl"
REASONS = ROOT / "tests" / "equivalent_mutants.toml"
TIMEOUT = 240  # seconds for a mutant's tests; a mutant that hangs counts as noticed

LOSSES = "functional", "linear_cross_entropy", "failures", "autograd", "stream", "chunks", "modules", "budget"
MARGIN_TESTS = [f"losses/test_{name}.py" for name in ("margins", "margin_numbers", "own_margins")]
CORE_TESTS = [f"losses/test_{name}.py" for name in LOSSES]
WITH_OPTIMIZERS = [*CORE_TESTS, "training/test_optim.py", "training/test_update_in_backward.py"]
TESTS = {
    "margins/angular.py": MARGIN_TESTS,
    "margins/base.py": [*MARGIN_TESTS, *CORE_TESTS],
    "margins/multiplicative.py": MARGIN_TESTS,
    "margins/plain.py": [*MARGIN_TESTS, "losses/test_functional.py"],
    "margins/schedules.py": MARGIN_TESTS,
    "objectives.py": CORE_TESTS,
    "class_pass/backward.py": WITH_OPTIMIZERS,
    "class_pass/exp_range.py": CORE_TESTS,
    "class_pass/forward.py": CORE_TESTS,
    "class_pass/op.py": WITH_OPTIMIZERS,
}
MORE = {
    "class_pass/chunks.py": CORE_TESTS,
    "backends/torch_backend.py": WITH_OPTIMIZERS,
    "backends/torch_ops.py": CORE_TESTS,
    "backends/triton/plan.py": ["kernels/test_plan.py"],
    "labels.py": CORE_TESTS,
    "loss.py": CORE_TESTS,
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


class Mutant(NamedTuple):
    module: str
    operator: str
    occurrence: int  # of the operator in the module
    function: str  # the outermost function or class, or "" for the module
    old: str
    new: str
    ordinal: int  # among those of the function that read alike

    @property
    def name(self) -> list[object]:
        return [self.module, self.operator, self.function, self.old, self.new, self.ordinal]


def run_before() -> dict[str, bool]:
    """Names of mutants that an earlier run ran, and whether one noticed them."""
    lines = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []
    found: dict[str, bool] = {}
    for name, caught in lines:
        found[json.dumps(name)] = caught or found.get(json.dumps(name), False)
    return found


def work_items(only: str) -> list[Mutant]:
    """Every mutation."""
    from cosmic_ray.commands import init
    from cosmic_ray.work_db import WorkDB, use_db

    WORK.mkdir(parents=True, exist_ok=True)
    modules = [module for module in TESTS if only in module]
    with use_db(WORK / "session.sqlite", WorkDB.Mode.create) as database:
        init([ROOT / "tritonmargin" / module for module in modules], database, {})
        items = [item.mutations[0] for item in database.work_items]
    seen: collections.Counter[str] = collections.Counter()
    mutants = []
    for spec in sorted(items, key=lambda spec: (str(spec.module_path), spec.operator_name, spec.occurrence)):
        if not OPERATORS.match(spec.operator_name):
            continue
        module = str(Path(spec.module_path).relative_to(ROOT / "tritonmargin"))
        function, old, new = changed_lines(Path(spec.module_path).read_text(), spec.operator_name, spec.occurrence)
        alike = json.dumps([module, spec.operator_name, function, old, new])
        mutants.append(Mutant(module, spec.operator_name, spec.occurrence, function, old, new, seen[alike]))
        seen[alike] += 1
    return mutants


def changed_lines(source: str, operator: str, occurrence: int) -> tuple[str, str, str]:
    """The function that a mutation changes, the lines before and the lines after."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    after = mutate_code(source, get_operator(operator)(), occurrence) or source
    before_lines, after_lines = source.split("\n"), after.split("\n")
    changed = list(difflib.unified_diff(before_lines, after_lines, n=0))
    place = int(re.match(r"@@ -(\d+)", changed[2])[1]) if changed else 0
    function = ""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.lineno <= place <= (node.end_lineno or 0):
            function = node.name
    old, new = (" ".join(line[1:].strip() for line in changed[3:] if line.startswith(sign)) for sign in "-+")
    return function, old, new


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
        path = copy / "tritonmargin" / job.module
        with use_mutation(path, get_operator(job.operator)(), job.occurrence) as (_, after):
            caught = after is None or noticed(TESTS[job.module])
        with open(LOG, "a") as log:
            log.write(json.dumps([job.name, caught]) + "\n")
        results.put((job, caught))
    results.put(None)


def reasons() -> dict[tuple[str, str, str], str]:
    listed = tomllib.loads(REASONS.read_text()).get("mutant", [])
    return {(entry["module"], entry["line"], entry["mutant"]): entry["reason"] for entry in listed}


def write_report(outcomes: list[tuple[Mutant, bool]], ran: int, minutes: float) -> int:
    """Write the report; returns the number of survivors without a reason."""
    known = reasons()
    survivors = sorted({(mutant.module, mutant.old, mutant.new) for mutant, caught in outcomes if not caught})
    open_ones = [survivor for survivor in survivors if survivor not in known]
    lines = [
        "# Mutation run",
        "",
        f"`make mutants` on {time.strftime('%Y-%m-%d')}: {len(outcomes)} mutants, the last {ran} in {minutes:.0f} min; "
        f"{sum(caught for _, caught in outcomes)} noticed, {len(survivors)} distinct survivors, "
        f"{len(open_ones)} of them without a reason.",
        "",
        "| module | mutants | noticed |",
        "|---|---|---|",
    ]
    for module in dict.fromkeys(mutant.module for mutant, _ in outcomes):
        own = [caught for mutant, caught in outcomes if mutant.module == module]
        lines.append(f"| {module} | {len(own)} | {sum(own)} |")
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
            print(f"{sum(item.module == module for item in items):5d}  {module}")
        return 0
    before = {} if options.fresh else run_before()
    known = reasons()
    done = {
        item: before[json.dumps(item.name)]
        for item in items
        if before.get(json.dumps(item.name))
        or (json.dumps(item.name) in before and (item.module, item.old, item.new) in known)
    }
    if done:
        print(f"{len(done)} of {len(items)} were run before", flush=True)
    outcomes = list(done.items())
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
        mutant, caught = outcome
        if not caught:
            print(f"survived  {mutant.module}  {mutant.operator}\n    - {mutant.old}\n    + {mutant.new}", flush=True)
        if len(outcomes) % 50 == 0:
            print(f"{len(outcomes) - len(done)}/{len(items)}  {(time.monotonic() - start) / 60:.1f} min", flush=True)
    for process in workers:
        process.join()
    if options.only:
        return 0
    return 1 if write_report(outcomes, len(items), (time.monotonic() - start) / 60) else 0


if __name__ == "__main__":
    sys.exit(main())
