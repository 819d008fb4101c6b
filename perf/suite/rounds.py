"""Measure the cases of one size.

Every provider has a process of its own; W and the optimiser's state exist once, in memory that they share (on a GPU
each has its own). First each is checked against float64 (accuracy.py), then they take turns: the baseline, A, B, C,
..., the baseline again, round after round. What changes during a run (clock rates, neighbours) so meets every row
alike, and a row is divided by the baseline and by our row of the same round.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator

from perf.providers import class_of, title
from perf.providers.base import GRAPHS, MODES, WHOLE, WHOLE_GRAPH
from perf.suite import accuracy, memory
from perf.suite.plans import BASELINE, KEY, Budget, Case, Row
from perf.suite.problem import Problem, fill
from perf.suite.results import Block
from perf.suite.worker import Failed, Worker

# Two implementations of one loss differ by rounding, and not by more than this.
AGREE = {"float32": 1e-3, "float64": 1e-6, "bfloat16": 3e-2, "float16": 3e-2, "tf32": 1e-2}
PAUSE = 0.002  # seconds: threads that wait for work of another process spin a little before they sleep
# Seconds that a first step may take where it compiles, a check or W's copy elsewhere.
COMPILING, PREPARING = 300.0, 60.0


class History(dict[tuple[str, str, str], list[tuple[Problem, float]]]):
    """What steps took so far: what a larger one will take."""

    def add(self, case: Case, seconds: float) -> None:
        self.setdefault((case.provider, case.mode, case.problem.dtype), []).append((case.problem, seconds))

    def predict(self, case: Case) -> float:
        """Seconds, at least about, 0 if nothing is known: in proportion to C from the nearest size.

        From another N or D, if need be, only to the root of their ratio: part of a step does not depend on them.
        """
        p = case.problem
        known = self.get((case.provider, case.mode, p.dtype), [(p, 0.0)])
        other, seconds = min(
            known, key=lambda each: (each[0].n != p.n, each[0].d != p.d, abs(math.log(each[0].flops / p.flops)))
        )
        return seconds * p.classes / other.classes * math.sqrt(p.n * p.d / (other.n * other.d))


@contextlib.contextmanager
def buffers(problem: Problem) -> Iterator[tuple[str, ...]]:
    """The files of W, filled, and of the optimiser's state; none on a GPU, where a process has its own."""
    if problem.on_gpu:
        yield ()
        return
    with memory.file_of(problem.weight_bytes) as weight, memory.file_of(problem.weight_bytes) as momentum:
        fill(memory.tensor_of(weight, problem.torch_dtype, problem.classes, problem.d))
        yield weight, momentum


def too_large(problem: Problem, what: str) -> str:
    """Why a matrix like W does not fit into this machine's free memory, or nothing."""
    left = memory.available_bytes() - memory.RESERVE
    if problem.on_gpu or problem.weight_bytes <= left:
        return ""
    return f"out of memory: {what} is {problem.weight_bytes / 1e9:.3g} GB, and {max(left, 0) / 1e9:.3g} GB are free"


class Rounds:
    """Measures the sizes of a run, one after another, and remembers what holds for all of them."""

    def __init__(self, budget: Budget, threads: int) -> None:
        self.budget, self.threads, self.history = budget, threads, History()
        self.checks: dict[tuple[str, str, str, int], Row] = {}  # of a provider's loss, dtype and width: its errors
        self.hung: dict[str, str] = {}  # who ran out of time before its first step, and why it is not run again

    def measure(self, cases: list[Case], progress: Callable[[str], None]) -> Block:
        """A row for every case of one size, measured or with the reason why not; a case that fails never raises."""
        self.problem = cases[0].problem
        self.progress = lambda words: progress(f"{self.problem.title}: {words}")
        self.workers: dict[str, Worker] = {}
        self.samples: list[Row] = []
        self.notes: dict[Case | str, str] = {}
        self.found: dict[Case, Row] = {}
        self.errors: dict[str, Row] = {}
        if why := too_large(self.problem, "W"):
            return [blank(case, why) for case in cases], []
        with buffers(self.problem) as files:
            try:
                if self.problem.on_gpu:
                    self.compile_ahead(cases)
                for name in dict.fromkeys([BASELINE, *(case.provider for case in cases)]):
                    self.progress(f"{name} is checked")
                    self.start(name, files)
                for mode in MODES:
                    self.mode(mode, [case for case in cases if case.mode == mode])
            finally:
                for worker in self.workers.values():
                    worker.stop()
        return [self.row(case) for case in cases], self.samples

    def compile_ahead(self, cases: list[Case]) -> None:
        """All providers at once, each in its own process: one after another they take minutes.

        Nothing is measured, and what fails here, e.g. for the memory that all take together, is tried again alone.
        """
        self.progress("compiling")
        modes: dict[str, list[str]] = {}
        for case in cases:
            if case.provider not in self.hung and not self.too_long(case):
                modes.setdefault(case.provider, []).append(case.mode)
        for name, own in modes.items():
            self.workers[name] = Worker(name, self.threads)
            self.workers[name].tell("ahead", self.problem, own)
        for name in modes:
            with contextlib.suppress(Failed):
                self.workers[name].answer(COMPILING)

    def start(self, name: str, files: tuple[str, ...]) -> None:
        """The provider's process, checked and ready at this size; or a note."""
        if name in self.hung:
            self.notes[name] = self.hung[name]
            return
        patience = COMPILING if class_of(name).compiles or self.problem.on_gpu else PREPARING
        try:
            if why := self.alive(name).ask("supports", self.problem, timeout=patience):
                raise Failed(why)
            if name != BASELINE:
                self.errors[name] = self.check(self.workers[name], patience)
                if "stopped after" in self.errors[name]["wrong"]:
                    raise Failed(self.errors[name]["wrong"])
            self.alive(name).ask("prepare", self.problem, files, timeout=patience)
        except Failed as failure:
            self.notes[name] = str(failure)
            if "stopped after" in str(failure):
                self.hung[name] = f"not run: {failure}, at {self.problem.title}"
            self.workers.pop(name).stop()

    def alive(self, name: str) -> Worker:
        if name not in self.workers or not self.workers[name].alive:
            self.workers[name] = Worker(name, self.threads)
        return self.workers[name]

    def check(self, worker: Worker, patience: float) -> Row:
        small = accuracy.small(self.problem)
        key = worker.name, small.loss, small.dtype, small.d
        if key not in self.checks:
            with buffers(small) as files:
                try:
                    found = worker.ask("check", small, files, timeout=patience)
                    self.checks[key] = {**found, "wrong": accuracy.wrong(found, small.dtype)}
                except Failed as failure:
                    self.checks[key] = {"wrong": f"the check failed: {failure}"}
        return self.checks[key]

    def mode(self, mode: str, cases: list[Case]) -> None:
        running = [case for case in cases if self.warm_up(case)]
        for number in range(self.budget.most):
            spent = {case: sum(self.by_round(case.provider, mode).values()) for case in running}
            active = [case for case in running if case not in self.notes and self.budget.another(number, spent[case])]
            if not active:
                break
            self.progress(f"{mode}, round {number + 1}, {len(active)} providers")
            baseline = Case(self.problem, BASELINE, "no-grad")
            self.sample(baseline, mode, number, first=True)
            for case in (*active, baseline):
                self.sample(case, mode, number)
        if mode != "forward" and mode not in GRAPHS:  # a graph's memory is that of the step that it captured
            for case in running:
                with contextlib.suppress(Failed):
                    worker = self.workers[case.provider]
                    self.found[case] |= worker.ask("peak", mode, timeout=20 * self.budget.longest)

    def warm_up(self, case: Case) -> bool:
        """The first step; whether there is something to repeat."""
        kind, worker = class_of(case.provider), self.workers.get(case.provider)
        if worker is None:
            return False
        longest, why = self.budget.longest, self.too_long(case)
        if case.mode in (WHOLE, WHOLE_GRAPH) and not any(other.mode == WHOLE for other in self.found):
            why = why or too_large(self.problem, "the momentum")  # later it is there, once for all
        if why:
            self.notes[case] = why
            return False
        self.progress(f"{case.mode}, first step of {case.provider}")
        patience = max(3 * longest, 2.0) + (COMPILING if kind.compiles or self.problem.on_gpu else 0.0)
        try:
            took, loss = worker.ask("step", case.mode, timeout=patience)
        except Failed as failure:
            self.notes[case] = str(failure)
            if "stopped after" in str(failure):
                self.history.add(case, patience)
            return False
        self.found[case] = {"loss_value": loss}
        if took > longest and (self.problem.on_gpu or not kind.compiles):
            self.keep(case, case.mode, 0, took)
            self.notes[case] = f"one step, the first: past the budget of {longest:g} s"
            return False
        return True

    def too_long(self, case: Case) -> str:
        """Why a case is left out by what smaller ones took, or nothing."""
        expected, longest = self.history.predict(case), self.budget.longest
        return f"predicted {expected:.2g} s a step, past the budget of {longest:g} s" if expected > longest else ""

    def sample(self, case: Case, mode: str, number: int, first: bool = False) -> None:
        if case.provider in self.workers:
            time.sleep(PAUSE)
            try:
                took, _ = self.workers[case.provider].ask("step", case.mode, timeout=10 * self.budget.longest)
                self.keep(case, mode, number, took, first)
            except Failed as failure:
                self.notes[case] = str(failure)

    def keep(self, case: Case, mode: str, number: int, took: float, first: bool = False) -> None:
        """`mode`: of the round; the baseline has one in every mode's rounds, twice."""
        line = dict(zip(KEY, case._replace(mode=mode).key, strict=True))
        self.samples.append({**line, "round": number, "position": "first" if first else "", "seconds": took})
        self.history.add(case, took)

    def by_round(self, provider: str, mode: str) -> dict[int, float]:
        """Seconds of every round; the baseline's are the means of its two."""
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
            values = [*own.values()] if len(own) > 1 else [*own.values()] * 2
            q25, median, q75 = statistics.quantiles(values, n=4, method="inclusive")
            line |= {"samples": len(own), "median_s": median, "q25_s": q25, "q75_s": q75}
            line["x_gemm"] = ratio(own, self.by_round(BASELINE, case.mode))
            peer = "ours-sampled" if line["work"] == "sampled" else "ours"
            line["times_ours"] = ratio(own, self.by_round(peer, case.mode))
        line |= self.found.get(case, {}) | self.errors.get(case.provider, {})
        line["wrong"] = "; ".join(part for part in (line.get("wrong", ""), self.disagreement(case)) if part)
        line["note"] = self.notes.get(case) or self.notes.get(case.provider, "")
        return line

    def disagreement(self, case: Case) -> str:
        """A loss that is not ours at the same size, in words: whoever is fast computes the same thing."""
        mine = self.found.get(case, {}).get("loss_value")
        ours = [found["loss_value"] for other, found in self.found.items() if other.provider == "ours"]
        if mine is None or not ours or class_of(case.provider).work != "all classes":
            return ""
        good = abs(mine - ours[0]) <= AGREE[self.problem.dtype] * abs(ours[0])
        return "" if good else f"its loss is {mine:.6g}, ours {ours[0]:.6g}"


def blank(case: Case, note: str = "") -> Row:
    """The line of a case of which nothing is known yet."""
    about = {"title": title(case.provider), "work": class_of(case.provider).work}
    return {**dict(zip(KEY, case.key, strict=True)), **about, "samples": 0, "wrong": "", "note": note}


def ratio(a: dict[int, float], b: dict[int, float]) -> float:
    """The median over the rounds that both took part in; nan for none."""
    both = [a[number] / b[number] for number in a if number in b]
    return statistics.median(both) if both else math.nan
