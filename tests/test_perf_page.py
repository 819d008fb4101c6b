"""What a run of the perf suite leaves: data, the page, and how two runs are compared; at tiny sizes."""

from __future__ import annotations

import html.parser
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

for module in ("pandas", "matplotlib", "tabulate", "typer", "rich", "jinja2"):
    pytest.importorskip(module, reason=f"{module} is part of the perf extra: pip install -e '.[perf]'")

import pandas as pd  # noqa: E402
from perf_cases import SMALL, fp32_line  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from perf import (  # noqa: E402
    ceilings,
    compare,
    findings,
    grid,
    machine,
    noise,
    readme,
    report,
    results,
)
from perf.cli import app  # noqa: E402
from perf.grid import Case  # noqa: E402
from perf.providers.base import STEP, WHOLE  # noqa: E402

pytestmark = pytest.mark.xdist_group("page")  # the run that most of these look at is made once


# -- a run, and its page -----------------------------------------------------------------------------------------

TINY = ["--classes", "300,2000", "--dim", "16", "--batch", "8", "--threads", "1", "--modes", f"forward,{STEP},{WHOLE}"]
RUN = [
    "run",
    "--tiny",
    *TINY,
    "--providers",
    "ours,ours-retain,ours-in-backward,ours-sampled,ours:retain=0.5,plain,pml",
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reports")
    before = torch.get_num_threads()
    done = CliRunner().invoke(app, [*RUN, "--dtype", "fp32,bf16", "--out", str(out)])
    torch.set_num_threads(before)
    assert done.exit_code == 0, done.output
    assert "comparisons with other code" in done.output
    return out


def test_a_run_leaves_data_with_a_schema(written: Path) -> None:
    found = results.load(written)
    assert list(found.rows.columns) == list(results.COLUMNS)
    assert (found.rows["samples"] > 0).all(), found.rows[found.rows["samples"] == 0].to_string()
    assert (found.rows["wrong"] == "").all(), found.rows["wrong"].unique()
    assert set(found.rows["provider"]) == set(RUN[-1].split(","))
    assert {"GEMM", "exp", "copy"} == set(found.ceilings["kind"])
    for name in ("cpu", "cores", "caches", "torch", "threads", "date", "load_before", "commit", "versions", "budget"):
        assert name in found.runs["1"]
    # A row's numbers are those of its samples.
    row = found.rows[(found.rows["provider"] == "plain") & (found.rows["mode"] == STEP)].iloc[0]
    assert row["flops"] == 3 * 2 * row["N"] * row["D"] * row["C"]
    assert row["bytes"] == 3 * row["D"] * row["C"] * (2 if row["dtype"] == "bfloat16" else 4)
    own = found.samples
    for name in results.KEY:
        own = own[own[name] == row[name]]
    assert own["seconds"].median() == pytest.approx(row["median_s"], rel=1e-4)


def test_a_second_run_measures_only_what_is_missing(written: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(written, out)
    before = (out / "results.csv").read_text()
    assert CliRunner().invoke(app, [*RUN, "--dtype", "fp32,bf16", "--out", str(out)]).exit_code == 0
    assert (out / "results.csv").read_text() == before
    more = [*RUN[:-1], "ours,insightface", "--losses", "cosface", "--dtype", "fp32", "--out", str(out)]
    assert CliRunner().invoke(app, more).exit_code == 0
    found = results.load(out)
    assert set(found.runs) == {"1", "2"}
    assert set(found.rows.loc[found.rows["run"] == "2", "loss"]) == {"cosface"}
    assert (found.rows["run"] == "1").sum() == len(before.splitlines()) - 1


def test_a_longer_budget_tries_again_what_was_left_out(tmp_path: Path) -> None:
    line = ["run", *TINY, "--classes", "2000", "--modes", STEP, "--providers", "ours,plain", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, [*line, "--longest", "1e-9"]).exit_code == 0
    found = results.load(tmp_path).rows
    assert found["note"].str.startswith("one step, the first").all()
    assert CliRunner().invoke(app, [*line, "--longest", "1e-9"]).exit_code == 0
    assert set(results.load(tmp_path).runs) == {"1"}
    assert CliRunner().invoke(app, [*line, "--longest", "100"]).exit_code == 0
    found = results.load(tmp_path).rows
    assert (found["note"] == "").all()
    assert (found["samples"] >= 5).all()
    assert set(found["run"]) == {"2"}


def test_a_run_that_is_out_of_time_says_what_it_left_and_the_next_one_goes_on(tmp_path: Path) -> None:
    line = ["run", *TINY, "--classes", "1000,2000", "--modes", STEP, "--providers", "ours,plain", "--out"]
    line.append(str(tmp_path))
    assert CliRunner().invoke(app, [*line, "--minutes", "1e-9"]).exit_code == 0
    found = results.load(tmp_path).rows
    assert (found["note"] == "not begun: the run's 1e-09 minutes were over").all()
    assert (found["samples"] == 0).all()
    assert len(found) == 4
    assert "not begun: the run" in (tmp_path / "index.html").read_text()
    assert CliRunner().invoke(app, line).exit_code == 0
    found = results.load(tmp_path).rows
    assert (found["note"] == "").all()
    assert (found["samples"] >= 5).all()


def test_control_c_leaves_a_valid_part(tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "perf", *RUN[:-1], "ours,plain", "--classes", "300,400,500,600,700,800,900,1000"]
    process = subprocess.Popen(
        [*command, "--out", str(out)], cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 120
    while not (out / "results.csv").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    found = results.load(out)
    assert len(found.rows) > 0
    if process.returncode == 130:  # it was not done by then
        assert "goes on from here" in said
        assert len(found.rows) < 8 * 6
        assert "stopped" not in (out / "index.html").read_text()


class Page(html.parser.HTMLParser):
    """What a browser would look for: pictures, the numbers of the first screen, links."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[dict[str, str | None]] = []
        self.times: list[float] = []
        self.anchors: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag in ("img", "source"):
            self.pictures.append(found)
        if "data-value" in found:
            self.times.append(float(found["data-value"] or "nan"))
        if found.get("id"):
            self.anchors.add(str(found["id"]))
        if tag == "a":
            self.links.append(str(found["href"]))


def test_the_page_holds_everything_and_says_what_the_csv_says(written: Path) -> None:
    text = (written / "index.html").read_text()
    page = Page()
    page.feed(text)
    assert len(page.pictures) >= 2 * 5
    for picture in page.pictures:
        assert str(picture.get("src") or picture.get("srcset")).startswith("data:image/svg+xml;base64,")
        assert picture.get("alt") or "srcset" in picture
    assert "http" not in re.sub(r"data:[^\"]*", "", text), "the page is one file"
    assert {link.removeprefix("#") for link in page.links} <= page.anchors
    rows = results.load(written).rows
    for value in page.times:
        assert value in [pytest.approx(other) for other in rows["times_ours"]]
    assert len(page.times) == 4  # two dtypes, two sizes
    assert str(written) not in text
    assert os.path.expanduser("~") not in text or os.path.expanduser("~") == "/"


def browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(browser() is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page(written: Path, tmp_path: Path, width: int) -> None:
    """No picture is broken, nothing is wider than the screen, and the headline's numbers are there to read."""
    probe = """<script>addEventListener('load', () => {
        const broken = [...document.images].filter(image => !image.naturalWidth).length;
        const wide = document.documentElement.scrollWidth - innerWidth;
        document.title = JSON.stringify({broken, wide, images: document.images.length, errors: window.seen || 0,
            times: [...document.querySelectorAll('.times')].map(each => each.textContent)});
    })</script><script>onerror = () => { window.seen = (window.seen || 0) + 1 }</script>"""
    page = tmp_path / "probed.html"
    page.write_text((written / "index.html").read_text().replace("</head>", probe + "</head>"))
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},900",
        "--virtual-time-budget=5000",
    ]
    done = subprocess.run(
        [str(browser()), *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stdout[:500]
    seen = json.loads(title[1].replace("&quot;", '"'))
    assert seen["broken"] == seen["errors"] == 0
    assert seen["images"] >= 5
    assert seen["wide"] <= 0
    headline = findings.find(results.load(written)).headline
    assert seen["times"] == [findings.digits(value) for value in headline["times"]]


def test_report_renders_again_from_the_csvs(written: Path) -> None:
    before = (written / "summary.md").read_text()
    (written / "summary.md").unlink()
    assert CliRunner().invoke(app, ["report", "--out", str(written)]).exit_code == 0
    assert (written / "summary.md").read_text() == before
    assert "Which setting should I use?" in before
    assert str(written) not in before


def ranked(
    times: float, wrong: str = "", scatter: float = 0.0, rounds: int = 6, ours_wrong: str = ""
) -> findings.Findings:
    lines, samples = [], []
    for provider, ratio in (("ours", 1.0), ("plain", times)):
        line = fp32_line(provider, STEP, median_s=ratio, x_gemm=3.0 * ratio, times_ours=ratio, beyond_mb=1.0)
        lines.append({**line, "work": "all classes", "q25_s": ratio, "q75_s": ratio,
                      "samples": rounds, "note": "", "run": "1", "limit_s": 0.5,
                      "wrong": wrong if provider == "plain" else ours_wrong,
                      "peak_mb": 2.0, "error_dx": 0.0, "error_dw": 0.0, "error_loss": 0.0})  # fmt: skip
        off = scatter if provider == "plain" else 0.0
        samples += [{**{name: line[name] for name in results.KEY}, "run": "1", "round": k, "place": "",
                     "seconds": ratio * (1.0 + off * (2 * (k % 2) - 1))} for k in range(rounds)]  # fmt: skip
    empty = results.load(Path("/nonexistent"))
    return findings.find(empty._replace(rows=pd.DataFrame(lines), samples=pd.DataFrame(samples)))


def test_the_first_sentence_counts_what_is_beyond_the_noise() -> None:
    assert findings.sentence(ranked(2.0)).startswith("Ours is faster in 1 of 1")
    assert "slower in 1" in findings.sentence(ranked(0.5))
    assert "within the noise in 1" in findings.sentence(ranked(1.1, scatter=0.2))
    assert len(report.behind(ranked(0.5))) == 1
    assert report.behind(ranked(0.5))[0]["times"] == 2.0


def test_one_step_is_no_comparison() -> None:
    """A case past the budget was measured once: what its ratio is worth nobody knows, and it says so."""
    found = ranked(0.5, rounds=1)
    assert found.counts["measured"] == 2
    assert found.counts["compared"] == 0
    assert found.behind.empty
    assert report.headline_table(found)["its time"].tolist() == ["500 ms (one step)"]


def test_nobody_is_compared_with_ours_where_ours_is_wrong() -> None:
    found = ranked(0.5, ours_wrong="error of dw 1.0e-03 > 2e-05")
    assert found.counts["compared"] == 0
    assert found.behind.empty


def test_who_is_wrong_is_not_ranked() -> None:
    found = ranked(0.5, wrong="error of dw 1.0e-03 > 2e-05")
    assert found.counts["compared"] == 0
    assert found.headline.empty
    assert found.behind.empty
    assert len(found.wrong) == 1


def test_growth_is_fitted() -> None:
    lines = [
        fp32_line("ours", STEP, median_s=0.01 + 2e-12 * 256 * 512 * c) | {"C": c}
        for c in (1000, 10_000, 100_000, 1_000_000)
    ]
    made = findings.growth(pd.DataFrame(lines)).iloc[0]
    assert made["a_ms"] == pytest.approx(10.0, rel=1e-6)
    assert made["b_ps"] == pytest.approx(2.0, rel=1e-6)
    assert made["typical_error"] < 1e-6


def test_ceilings_bound_what_the_work_needs() -> None:
    rates = [{"kind": "GEMM", "dtype": "float32", "per_second": 1.0}, {"kind": "copy", "dtype": "", "per_second": 1e30}]
    assert ceilings.limit(Case(SMALL, "ours", STEP), rates) == 3 * SMALL.flops
    assert ceilings.limit(Case(SMALL, "ours-sampled", STEP), rates) == pytest.approx(0.3 * SMALL.flops)
    slow = [{**line, "per_second": {"GEMM": 1e30, "copy": 1.0}[line["kind"]]} for line in rates]
    assert ceilings.limit(Case(SMALL, "plain", WHOLE), slow) == 5 * SMALL.weight_bytes
    assert ceilings.limit(Case(SMALL, "ours", STEP), []) is None


def test_readmes_numbers_are_those_of_the_committed_results() -> None:
    root = Path(__file__).parent.parent
    committed = results.load(root / "reports" / "perf")
    text = (root / "README.md").read_text()
    gate = json.loads((root / "reports" / "gpu-h200" / "gate.json").read_text())
    others = readme.elsewhere(root / "reports" / "perf", root)
    others = {folder: each for folder, each in others.items() if f"\n- [{folder}](" in text}  # not this machine's own
    assert {"reports/perf-intel-xeon", "reports/perf-amd-epyc"} <= set(others)
    assert readme.rewritten(text, committed, gate, others) == text, "make readme-numbers"
    assert "**" in readme.numbers(committed)
    assert len(committed.rows) > 300


def test_readmes_numbers_follow_the_results(written: Path) -> None:
    found = results.load(written)
    text = f"before {readme.BEGIN} old {readme.END} after"
    made = readme.rewritten(text, found)
    assert made.startswith("before ")
    assert made.endswith(" after")
    assert " old " not in made
    assert "comparisons" in made
    assert "other machines" not in made
    (written.parent / f"{written.name}-empty").mkdir(exist_ok=True)
    assert f"{written.name}-empty" not in readme.elsewhere(written, written.parent)
    beside = readme.rewritten(text, found, others={"elsewhere": found})
    assert "On other machines:\n\n- [elsewhere](elsewhere/index.html): " in beside
    assert beside.count(machine.one_line(next(iter(found.runs.values())))) == 2
    with pytest.raises(ValueError, match="end of numbers"):
        readme.rewritten("nothing", found)


def test_compiled_code_is_put_beside_both_of_ours() -> None:
    wanted = {"plain-compiled": (1.2, 1.8, 9.0), "ours-retain": (0.8, 0.9, 1.0), "ours": (1.0, 1.0, 1.0)}
    lines = [
        {**fp32_line(provider, STEP, times_ours=value), "C": 1000 * (1 + place), "wrong": ""}
        for provider, values in wanted.items() for place, value in enumerate(values)
    ]  # fmt: skip
    lines[2]["wrong"] = "its dx is off"
    said = readme.compiled(pd.DataFrame(lines))
    assert said.endswith(
        ": ArcFace in float32 1.5 (1.2 to 1.8, 2 sizes), over ours with all logits retained 1.75 (1.5 to 2, 2 sizes)."
    )
    assert readme.compiled(pd.DataFrame(lines[3:])) == ""


# -- comparing runs ----------------------------------------------------------------------------------------------


def slowed(before: results.Results, factor: float, **changed: object) -> results.Results:
    rows, samples = before.rows.copy(), before.samples.copy()
    ours = rows["provider"].str.startswith("ours")
    rows.loc[ours, ["median_s", "x_gemm"]] *= factor
    samples.loc[samples["provider"].str.startswith("ours"), "seconds"] *= factor
    for column, value in changed.items():
        rows.loc[ours, column] = value
    return before._replace(rows=rows, samples=samples)


def spread(found: results.Results, part: float) -> results.Results:
    """The run as if its steps had scattered by that part of their time, and nothing else."""
    samples = found.samples.copy()
    place = samples["round"] % 2
    samples["seconds"] = 1.0 + part * (2 * place - 1) * (samples["provider"] != grid.YARDSTICK)
    return found._replace(samples=samples)


@pytest.fixture
def steady(written: Path) -> results.Results:
    return spread(results.load(written), 0.001)


def test_a_slowdown_of_fifteen_percent_is_found(steady: results.Results) -> None:
    assert compare.regressions(compare.compare(steady, steady, 0.1), 0.1) == []
    found = compare.compare(steady, slowed(steady, 1.15), 0.1)
    assert set(found.loc[found["provider"].str.startswith("ours"), "verdict"]) == {"slower"}
    assert set(found.loc[~found["provider"].str.startswith("ours"), "verdict"]) == {""}
    assert any("ours as a whole" in line for line in compare.regressions(found, 0.1))
    faster = compare.compare(steady, slowed(steady, 1 / 1.15), 0.1)
    assert "faster" in set(faster["verdict"])
    assert compare.regressions(faster, 0.1) == []


def test_noise_hides_what_it_must(steady: results.Results) -> None:
    noisy = spread(steady, 0.1)
    found = compare.compare(noisy, slowed(noisy, 1.15), 0.1)
    assert set(found["verdict"]) == {""}
    assert any("ours as a whole" in line for line in compare.regressions(found, 0.1)), "many rows see it all the same"
    noisy = spread(steady, 0.5)
    found = compare.compare(noisy, slowed(noisy, 1.15), 0.1)
    assert compare.regressions(found, 0.1) == [], "not even all of them"
    assert " 0 of our " in compare.words(found, 0.1)


def test_what_fails_now_is_a_regression_and_what_nobody_tried_is_none(steady: results.Results) -> None:
    gone = slowed(steady, 1.0, samples=0, note="out of memory: 9 GB")
    bad = compare.regressions(compare.compare(steady, gone, 0.1), 0.1)
    assert bad
    assert all("failed: out of memory" in line for line in bad)
    untried = slowed(steady, 1.0, samples=0, note="not begun: the run's 2 minutes were over")
    assert compare.regressions(compare.compare(steady, untried, 0.1), 0.1) == []


def test_a_bands_width_is_that_of_the_ratio() -> None:
    def line(provider: str, number: int, seconds: float, place: str = "") -> dict[str, object]:
        size = {"loss": "arcface", "dtype": "float32", "N": 1, "D": 1, "C": 1, "device": "cpu"}
        rest = {"mode": STEP, "run": "1", "round": number, "place": place, "seconds": seconds}
        return {**size, "provider": provider, **rest}

    # A machine that slows down as a whole scatters times and not ratios.
    lines = [line(name, k, (1.0 + k) * factor) for k in range(8) for name, factor in (("ours", 1.0), ("plain", 2.0))]
    assert noise.of_ratios(pd.DataFrame(lines), "ours").tolist() == pytest.approx([0.0, 0.0])
    lines = [line("ours", k, 1.0) for k in range(8)] + [line("plain", k, 2.0 + k % 2) for k in range(8)]
    found = noise.of_ratios(pd.DataFrame(lines), "ours")
    assert found.tolist() == pytest.approx([0.0, 1.2533 / 1.349 / math.sqrt(8) / 2.5])
    again = [{**each, "run": "2", "seconds": 10.0} for each in lines if each["provider"] == "ours"]
    both = noise.of_ratios(pd.DataFrame(lines + again), "ours")
    assert both.xs("1", level="run").tolist() == found.tolist(), "another run's times were not taken in turns"
    yard = [line("gemm", k, 1.0, "first") for k in range(8)] + [line("gemm", k, 1.0 + 0.1 * (k % 2)) for k in range(8)]
    assert noise.of_yardstick(pd.DataFrame(yard)) == pytest.approx(1.2533 * 0.1 / 1.349 / math.sqrt(8) / 1.05)


def test_wrong_results_errors_and_memory_are_regressions_too(steady: results.Results) -> None:
    for changed, word in (({"wrong": "off"}, "wrong"), ({"error_dw": 1.0}, "error"), ({"peak_mb": 1e4}, "memory")):
        bad = compare.regressions(compare.compare(steady, slowed(steady, 1.0, **changed), 0.1), 0.1)
        assert bad
        assert all(word in line for line in bad)


def test_compare_command(written: Path, tmp_path: Path, steady: results.Results) -> None:
    results.save(tmp_path / "a", steady)
    results.save(tmp_path / "b", slowed(steady, 1.5))
    same = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "a")])
    assert same.exit_code == 0, same.output
    assert "two machines" not in same.output
    slower = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert slower.exit_code == 1
    assert "slower" in slower.output
    assert CliRunner().invoke(app, ["compare", str(tmp_path), str(written)]).exit_code == 2
    other = steady._replace(runs={name: run | {"cpu": "an abacus"} for name, run in steady.runs.items()})
    results.save(tmp_path / "c", other)
    said = CliRunner().invoke(app, ["compare", str(tmp_path / "c"), str(tmp_path / "a")]).output
    assert "two machines" in said
    assert "an abacus" in said
    assert "cases are not in" not in said
    results.save(tmp_path / "d", steady._replace(rows=steady.rows.iloc[1:]))
    fewer = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "d")])
    assert "measured 1 cases are not in" in " ".join(fewer.output.split())
    assert fewer.exit_code == 0
