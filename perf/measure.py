"""Measure the cases of a plan, size by size.

At a size every provider has a process of its own; W and the optimiser's state exist once, in memory that they share.
First each is checked against float64 (correct.py), then they take turns: the yardstick, A, B, C, ..., the yardstick
again, round after round. What changes during a run (clock rates, neighbours) so meets every row alike, and a row is
divided by the yardstick and by our row of the same round.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from perf import correct, limits, shared
from perf.grid import YARDSTICK, Budget, Case
from perf.problem import Problem, fill
from perf.providers import class_of, skipped_words, split, title
from perf.providers.base import MODES, WHOLE
from perf.terminal import Say
from perf.worker import Failed, Worker

# Two implementations of one loss differ by rounding, and not by more than this.
AGREE = {"float32": 1e-3, "float64": 1e-6, "bfloat16": 3e-2, "float16": 3e-2}
PAUSE = 0.002  # seconds: threads that wait for work of another process spin a little before they sleep
COMPILING = 300.0  # seconds that a first step may take where it compiles

Row = dict[str, Any]


class Block(NamedTuple):
    rows: list[Row]  # a line per case
    samples: list[Row]  # a line per timed step


class History:
    """What steps took so far: what a larger one will take."""

    def __init__(self) -> None:
        self.taken: dict[tuple[str, str, str], list[tuple[Problem, float]]] = {}

    def add(self, case: Case, seconds: float) -> None:
        self.taken.setdefault(self.key(case), []).append((case.problem, seconds))

    def predict(self, case: Case) -> float | None:
        """Seconds, at least about: in proportion to C from the nearest size, if possible of the same N and D.

        From another N or D only to the root of their ratio: part of every step does not depend on them.
        """
        known, p = self.taken.get(self.key(case)), case.problem
        if not known:
            return None
        other, seconds = min(
            known, key=lambda each: (each[0].n != p.n, each[0].d != p.d, abs(math.log(each[0].flops / p.flops)))
        )
        return seconds * p.classes / other.classes * math.sqrt(p.n * p.d / (other.n * other.d))

    @staticmethod
    def key(case: Case) -> tuple[str, str, str]:
        return case.provider, case.mode, case.problem.dtype


class Checks(dict[tuple[str, str, str, int], Row]):
    """Errors of every provider, once for a loss, dtype and width."""

    def of(self, worker: Worker, problem: Problem) -> Row:
        key = worker.name, problem.loss, problem.dtype, problem.d
        if key not in self:
            small = correct.small(problem)
            with buffers(small) as files:
                try:
                    found = worker.ask("check", small, files, timeout=COMPILING)
                    self[key] = {**found, "wrong": correct.wrong(found, problem.dtype)}
                except Failed as failure:
                    self[key] = {"wrong": f"the check failed: {failure}"}
        return self[key]


@contextlib.contextmanager
def buffers(problem: Problem) -> Any:
    """The files of W, filled, and of the optimiser's state; none on a GPU, where a process has its own."""
    if problem.device != "cpu":
        yield ()
        return
    with shared.file_of(problem.weight_bytes) as weight, shared.file_of(problem.weight_bytes) as momentum:
        fill(shared.tensor_of(weight, problem.torch_dtype, problem.classes, problem.d))
        yield weight, momentum


def measure(
    problem: Problem,
    cases: list[Case],
    budget: Budget,
    threads: int,
    history: History,
    checks: Checks,
    say: Say = print,
) -> Block:
    """A row for every case of one size, measured or with the reason why not; never raises for a case that fails."""
    turn = Turn(problem, budget, threads, history, checks, say)
    if why := no_room(problem, "W"):
        return Block([blank(case, why) for case in cases], [])
    with buffers(problem) as files:
        try:
            turn.begin(cases, files)
            for mode in MODES:
                turn.mode([case for case in cases if case.mode == mode])
        finally:
            turn.end()
    return Block([turn.row(case) for case in cases], turn.samples)


def no_room(problem: Problem, what: str) -> str:
    """Why a matrix like W can't be had on this machine, or nothing."""
    left = limits.available_bytes() - limits.RESERVE
    if problem.device != "cpu" or problem.weight_bytes <= left:
        return ""
    return f"out of memory: {what} is {problem.weight_bytes / 1e9:.3g} GB, and {max(left, 0) / 1e9:.3g} GB are free"


class Turn:
    """One size, while it is measured."""

    def __init__(
        self, problem: Problem, budget: Budget, threads: int, history: History, checks: Checks, say: Say
    ) -> None:
        self.problem, self.budget, self.threads = problem, budget, threads
        self.history, self.checks, self.say = history, checks, say
        self.workers: dict[str, Worker] = {}
        self.yardstick: Worker | None = None
        self.samples: list[Row] = []
        self.notes: dict[Case | str, str] = {}
        self.no_state: str | None = None  # not asked yet
        self.found: dict[Case, Row] = {}
        self.errors: dict[str, Row] = {}

    def begin(self, cases: Iterable[Case], files: tuple[str, ...]) -> None:
        self.files = files
        self.yardstick = self.start(YARDSTICK)
        for name in dict.fromkeys(case.provider for case in cases):
            self.say(f"{self.problem.title}: {name} is checked")
            self.start(name)

    def start(self, name: str) -> Worker | None:
        """The provider's process, ready at this size; or None, with a note."""
        try:
            split(name)
        except ValueError as error:
            self.notes[name] = skipped_words(name) or str(error)
            return None
        worker = Worker(name, self.threads)
        try:
            why = worker.ask("supports", self.problem)
            if why is None:
                if name != YARDSTICK:
                    checked = self.checks.of(worker, self.problem)
                    worker = worker if worker.alive else Worker(name, self.threads)
                    self.errors[name] = checked
                worker.ask("prepare", self.problem, self.files)
        except Failed as failure:
            why = str(failure)
        if why is not None:
            self.notes[name] = why
            worker.stop()
            return None
        self.workers[name] = worker
        return worker

    def mode(self, cases: list[Case]) -> None:
        """All cases of one mode, in turns."""
        running = [case for case in cases if self.warm_up(case)]
        for number in range(self.budget.most):
            active = [case for case in running if self.goes_on(case, number)]
            if not active:
                break
            self.say(f"{self.problem.title}: {active[0].mode}, round {number + 1}, {len(active)} providers")
            self.sample(Case(self.problem, YARDSTICK, "no-grad"), active[0].mode, number, first=True)
            for case in active:
                self.sample(case, case.mode, number)
            self.sample(Case(self.problem, YARDSTICK, "no-grad"), active[0].mode, number)
        for case in running:
            self.peak(case)

    def warm_up(self, case: Case) -> bool:
        """The first step; whether there is something to repeat."""
        kind, worker = class_of(case.provider), self.workers.get(case.provider)
        if worker is None or kind is None:
            return False
        expected = self.history.predict(case)
        if expected is not None and expected > self.budget.longest:
            self.notes[case] = f"predicted {expected:.0f} s a step, past the budget of {self.budget.longest:g} s"
            return False
        if case.mode == WHOLE and (why := self.state()):
            self.notes[case] = why
            return False
        self.say(f"{self.problem.title}: {case.mode}, first step of {case.provider}")
        patience = max(3 * self.budget.longest, 2.0) + (COMPILING if kind.compiles else 0.0)
        try:
            if case.mode == WHOLE:
                worker.ask("hold_state")
            took, loss, grown = worker.ask("first", case.mode, timeout=patience)
        except Failed as failure:
            self.notes[case] = str(failure)
            if "stopped after" in str(failure):
                self.history.add(case, patience)
            return False
        self.found[case] = {"loss_value": loss, "rss_mb": grown}
        if took > self.budget.longest and not kind.compiles:
            self.keep(case, case.mode, 0, took)
            self.history.add(case, took)
            self.notes[case] = f"one step, the first: past the budget of {self.budget.longest:g} s"
            return False
        return True

    def state(self) -> str:
        """Room for the optimiser's state, asked for once, or why there is none."""
        if self.no_state is None:
            self.no_state = no_room(self.problem, "the momentum")
        return self.no_state

    def goes_on(self, case: Case, number: int) -> bool:
        if case in self.notes:
            return False
        return self.budget.another(number, sum(self.times(case)))

    def sample(self, case: Case, mode: str, number: int, first: bool = False) -> None:
        worker = self.yardstick if case.provider == YARDSTICK else self.workers[case.provider]
        if worker is None:
            return
        time.sleep(PAUSE)
        try:
            took, _ = worker.ask("step", case.mode, timeout=10 * self.budget.longest)
        except Failed as failure:
            self.notes[case] = str(failure)
            return
        self.keep(case, mode, number, took, first)
        if case.provider != YARDSTICK:
            self.history.add(case, took)

    def keep(self, case: Case, mode: str, number: int, took: float, first: bool = False) -> None:
        """`mode`: of the round; the yardstick has one in every mode's rounds, twice."""
        p = self.problem
        self.samples.append({
            "loss": p.loss, "dtype": p.dtype, "N": p.n, "D": p.d, "C": p.classes, "device": p.device,
            "provider": case.provider, "mode": mode, "round": number, "seconds": took,
            "place": "first" if first else "",
        })  # fmt: skip

    def peak(self, case: Case) -> None:
        """The memory of another step."""
        worker = self.workers[case.provider]
        if not worker.alive or case.mode == "forward":
            return
        with contextlib.suppress(Failed):
            self.found[case] |= worker.ask("peak", case.mode, timeout=20 * self.budget.longest)

    def end(self) -> None:
        for worker in [*self.workers.values(), *([self.yardstick] if self.yardstick else [])]:
            if worker.alive:
                worker.stop()

    # -- what was found ------------------------------------------------------------------------------------------

    def times(self, case: Case) -> list[float]:
        return list(self.by_round(case.provider, case.mode).values())

    def by_round(self, provider: str, mode: str) -> dict[int, float]:
        """The yardstick's are the means of its two."""
        found: dict[int, list[float]] = {}
        for line in self.samples:
            if (line["provider"], line["mode"]) == (provider, mode):
                found.setdefault(line["round"], []).append(line["seconds"])
        return {number: statistics.fmean(values) for number, values in found.items()}

    def row(self, case: Case) -> Row:
        """The case's line; ratios are medians over rounds of the ratio within a round."""
        line = blank(case)
        own = self.by_round(case.provider, case.mode)
        if own:
            q25, median, q75 = quartiles(list(own.values()))
            line |= {"samples": len(own), "median_s": median, "q25_s": q25, "q75_s": q75}
            line["x_gemm"] = ratio(own, self.by_round(YARDSTICK, case.mode))
            peer = "ours-sampled" if line["work"] == "sampled" else "ours"
            line["times_ours"] = ratio(own, self.by_round(peer, case.mode))
        line |= self.found.get(case, {}) | self.errors.get(case.provider, {})
        line["wrong"] = "; ".join(part for part in (line.get("wrong", ""), self.disagreement(case)) if part)
        line["note"] = self.notes.get(case) or self.notes.get(case.provider, "")
        return line

    def disagreement(self, case: Case) -> str:
        """A loss that is not ours at the same size, in words: whoever is fast computes the same thing."""
        mine = self.found.get(case, {}).get("loss_value")
        kind = class_of(case.provider)
        ours = [found["loss_value"] for other, found in self.found.items() if other.provider == "ours"]
        if mine is None or not ours or kind is None or kind.work != "all classes":
            return ""
        good = abs(mine - ours[0]) <= AGREE[self.problem.dtype] * abs(ours[0])
        return "" if good else f"its loss is {mine:.6g}, ours {ours[0]:.6g}"


def blank(case: Case, note: str = "") -> Row:
    """The line of a case of which nothing is known yet."""
    p, kind = case.problem, class_of(case.provider)
    return {
        "loss": p.loss, "dtype": p.dtype, "N": p.n, "D": p.d, "C": p.classes, "device": p.device,
        "provider": case.provider, "title": title(case.provider), "work": kind.work if kind else "",
        "mode": case.mode, "samples": 0, "wrong": "", "note": note,
    }  # fmt: skip


def ratio(a: dict[int, float], b: dict[int, float]) -> float:
    """The median over the rounds that both took part in; nan for none."""
    both = [a[number] / b[number] for number in a if number in b]
    return statistics.median(both) if both else math.nan


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    q25, median, q75 = statistics.quantiles(values, n=4, method="inclusive")
    return q25, median, q75
