"""The page of a run, the comparison of two runs and README's tables, on results that are made up here."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from perf_cases import fp32_line
from typer.testing import CliRunner

from perf.cli import app
from perf.providers.base import GRAPH, STEP, WHOLE
from perf.report import compare, page, readme, statistics, terminal
from perf.suite import results
from perf.suite.plans import BASELINE
from perf.suite.results import Results

pd = pytest.importorskip("pandas")
ROOT = Path(__file__).parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CPU = {"cpu": "an abacus", "cores": 2, "caches": {}, "memory_gib": 16.0, "instruction_set": "beads", "torch": "2.13.0",
       "threads": 2, "date": "2026-12-01", "load_before": 0.1, "device": "cpu", "plan": "default"}  # fmt: skip
GPU = {**CPU, "device": "cuda", "gpu": "a large GPU", "gpu_memory_gib": 80.0}
TIMES = {"ours": 1.0, "ours-retain": 0.8, "plain": 2.0, "pml": 3.0}  # of a step, in units of ours


def made(
    times: dict[str, float] = TIMES, loss: str = "arcface", dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    modes: tuple[str, ...] = (STEP, WHOLE), scatter: float = 0.001, rounds: int = 6, facts: dict[str, Any] = CPU,
    **changed: Any,
) -> Results:  # fmt: skip
    """Steps of 0.123 microseconds a class times `times`; `changed`: columns of all rows but ours."""
    rows, samples = [], []
    for dtype, c, mode in itertools.product(dtypes, (10_000, 100_000, 1_000_000), modes):
        size = {"dtype": dtype, "C": c, "loss": loss, "device": facts["device"]}
        for name, factor in {**times, BASELINE: 0.3}.items():
            taken = 1.23e-7 * c * factor
            line = fp32_line(
                name, mode, median_s=taken, x_gemm=factor / 0.3, times_ours=factor, work="all classes", run="1",
                q25_s=taken, q75_s=taken, error_loss=1e-8, error_dx=3e-7, error_dw=4e-7, limit_s=taken / 2,
                peak_mb=(1e-2 if "ours" in name else 1e-1) * c, beyond_mb=14.3 if "ours" in name else 2e-2 * c,
            ) | size | (changed if name != "ours" else {})  # fmt: skip
            rows += [line] if name != BASELINE else []
            off = 0.0 if name in ("ours", BASELINE) else scatter
            samples += [
                {**{key: line[key] for key in results.KEY}, "run": "1", "round": k, "position": "",
                 "seconds": taken * (1.0 + off * (2 * (k % 2) - 1))}
                for k in range(rounds)
            ]  # fmt: skip
    empty = results.load(Path("/nonexistent"))
    rows = pd.DataFrame(rows).reindex(columns=list(results.COLUMNS))
    return empty._replace(rows=rows, samples=pd.DataFrame(samples), runs={"1": facts})


def no_samples(found: Results) -> Results:
    return found._replace(samples=found.samples.iloc[:0])


def written(folder: Path, found: Results) -> str:
    return page.write(folder, found).read_text()


def first_table(text: str) -> list[list[str]]:
    lines = re.findall(r"<tr>(.*?)</tr>", text.partition("</table>")[0], re.DOTALL)
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line) for line in lines]


def test_the_first_screen_answers_and_the_rest_is_linked(tmp_path: Path) -> None:
    text = written(tmp_path, made())
    order = [text.index(f"<{tag}") for tag in ("nav>", 'p class="answer"', "svg ", "table>")]
    assert order == sorted(order)
    assert set(re.findall(r'href="#(\w+)"', text)) <= set(re.findall(r'id="(\w+)"', text)), "links lead somewhere"
    assert not re.search(r'(src|href)="http|@import|url\(http', text), "one file, and nothing to fetch"
    assert "faster in 24 of 24 comparisons" in text
    assert "1,000,000 classes, N=256, D=512, float32: 123 ms, 14.3 MB. The fastest other, plain: 246 ms, 20 GB." in text
    assert len(first_table(text)) == 1 + 6
    assert {path.name for path in tmp_path.iterdir()} >= {"time.png", "memory.png"}
    assert "24 of 24" in (tmp_path / "summary.md").read_text()
    assert str(tmp_path) not in text
    found = made()._replace(rows=made().rows.iloc[1:])  # one less in float32: the pictures and the sentence go together
    assert re.search("bfloat16: 123 ms.*arcface, bfloat16, N=256", written(tmp_path, found), re.DOTALL)


@pytest.mark.parametrize("theirs", [0.5051, 0.9949, 1.0051, 1.117, 3.3333])
def test_a_ratio_is_that_of_the_times_beside_it(tmp_path: Path, theirs: float) -> None:
    """Whatever the median ratio within the rounds: who looks at two times divides them."""
    shown = page.headline(statistics.find(made({"ours": 1.0, "plain": theirs}, times_ours=theirs * 1.02)))
    assert len(shown) == 6
    for row in shown.to_dict("records"):
        values = [float(row[name].split()[0]) / (1e3 if "ms" in row[name] else 1) for name in ("ours", "fastest other")]
        assert row["ours is"].startswith(f"{terminal.digits(max(values) / min(values))}x")
        assert ("faster" in row["ours is"]) == (values[1] >= values[0])


def verdicts(found: Results) -> dict[str, int]:
    return statistics.find(found).compared["verdict"].value_counts().to_dict()


def test_comparisons_beyond_the_noise_are_counted() -> None:
    two = {"ours": 1.0, "plain": 1.1}
    assert verdicts(made(two)) == {"faster": 12}
    assert verdicts(made(two, scatter=0.2)) == {"equal": 12}
    assert verdicts(made({"ours": 1.0, "plain": 0.5})) == {"slower": 12}
    assert verdicts(made(two, times_ours=0.97)) == {"equal": 12}, "times and ratios that disagree say nothing"
    assert verdicts(made(two, rounds=1)) == {}, "one step is no comparison"
    assert verdicts(made(two, wrong="error of dw")) == {}, "who is wrong is not ranked"
    found = made(two)
    found.rows.loc[found.rows["provider"] == "ours", "wrong"] = "error of dw"
    assert verdicts(found) == {}, "nobody is compared with ours where ours is wrong"
    assert verdicts(no_samples(made(two))) == {"unknown": 12}


def test_a_gpus_folder_without_samples_shows_both_modes_and_claims_no_noise(tmp_path: Path) -> None:
    found = no_samples(made(modes=(STEP, GRAPH), dtypes=("tf32",), facts=GPU))
    text = written(tmp_path, found)
    assert "CUDA graph" in first_table(text)[0]
    assert "less time in 12 of 12 comparisons" in text
    assert "Noise was not recorded" in text
    assert "leave of 80 GiB" in text
    assert "leave of" not in written(tmp_path, found._replace(runs={"1": {**GPU, "gpu_memory_gib": None}}))


@pytest.mark.parametrize("loss", ["cosface", "softmax"])
def test_a_run_of_another_loss_has_its_tables(tmp_path: Path, loss: str) -> None:
    text = written(tmp_path, made(loss=loss, modes=(WHOLE,), dtypes=("float32",)))
    assert f"{loss}, whole step, N=256" in text
    assert len(first_table(text)) == 1 + 3


def test_what_could_not_be_measured_is_told(tmp_path: Path) -> None:
    found, note = made(), "out of memory: 9 GB"
    found.rows.loc[(found.rows["C"] == 1_000_000) & (found.rows["provider"] != "ours"), ["samples", "note"]] = [0, note]
    text = written(tmp_path, found)
    assert f"none: {note}" in text
    assert text.count(note) > 4
    nothing = found.rows.assign(samples=0, note=note, median_s=math.nan)
    for rows in (nothing, nothing.iloc[:0]):
        none = no_samples(found._replace(rows=rows))
        assert "Nothing could be measured" in written(tmp_path, none)
        assert page.on_terminal(none)[0][0].startswith("Nothing could be measured")
    assert "Nothing was compared" in written(tmp_path, made({"ours": 1.0}))


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page(tmp_path: Path, width: int) -> None:
    """Nothing is wider than the screen; the navigation is above the fold, and on a desk the table is too."""
    probe = """<script>addEventListener('load', () => {
        const end = name => Math.round(document.querySelector(name).getBoundingClientRect().bottom);
        const empty = [...document.querySelectorAll('svg')].filter(one => !one.clientHeight).length;
        const wide = document.documentElement.scrollWidth - innerWidth;
        parent.postMessage(JSON.stringify({empty, wide, nav: end('nav'), table: end('table')}), '*')
    })</script>"""
    (tmp_path / "page.html").write_text(written(tmp_path, made()).replace("</head>", probe + "</head>"))
    frame = tmp_path / "frame.html"  # a window of a headless browser is never narrower than 500
    frame.write_text(f"""<title></title><iframe src="page.html" width="{width}" height="800"></iframe>
        <script>addEventListener('message', event => {{ document.title = event.data }})</script>""")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,900", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [str(BROWSER), *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stdout[:500]
    seen = json.loads(title[1].replace("&quot;", '"'))
    assert seen["wide"] <= 0 == seen["empty"]
    assert seen["nav"] < 200
    assert width < 1000 or seen["table"] < 800


def slowed(before: Results, factor: float, **changed: object) -> Results:
    """The run as if ours took `factor` times as long."""
    rows, samples = before.rows.copy(), before.samples.copy()
    ours = rows["provider"].str.startswith("ours")
    rows.loc[ours, ["median_s", "x_gemm"]] *= factor
    samples.loc[samples["provider"].str.startswith("ours"), "seconds"] *= factor
    for column, value in changed.items():
        rows.loc[ours, column] = value
    return before._replace(rows=rows, samples=samples)


def noisy(part: float) -> Results:
    """A run whose steps scatter by that part of their time: every ratio to the baseline does."""
    found = made()
    own = found.samples["provider"] != BASELINE
    found.samples.loc[own, "seconds"] *= 1.0 + part * (2 * (found.samples["round"][own] // 2 % 2) - 1)
    return found


def test_fifteen_percent_are_found_and_equal_runs_are_equal() -> None:
    steady = noisy(0.001)
    assert compare.regressions(compare.compare(steady, steady, 0.1), 0.1) == []
    found = compare.compare(steady, slowed(steady, 1.15), 0.1)
    own = found["provider"].str.startswith("ours")
    assert set(found.loc[own, "verdict"]) == {"slower"}
    assert set(found.loc[~own, "verdict"]) == {""}
    assert any("ours as a whole" in line for line in compare.regressions(found, 0.1))
    faster = compare.compare(steady, slowed(steady, 1 / 1.15), 0.1)
    assert "faster" in set(faster["verdict"])
    assert compare.regressions(faster, 0.1) == []
    without = no_samples(steady)
    assert set(compare.compare(without, slowed(without, 1.15), 0.1)["verdict"]) == {"slower", ""}


def test_noise_hides_what_it_must() -> None:
    found = compare.compare(noisy(0.1), slowed(noisy(0.1), 1.15), 0.1)
    assert set(found["verdict"]) == {""}
    assert any("ours as a whole" in line for line in compare.regressions(found, 0.1)), "many rows see it all the same"
    found = compare.compare(noisy(0.6), slowed(noisy(0.6), 1.15), 0.1)
    assert compare.regressions(found, 0.1) == [], "not even all of them"
    assert "0 of our " in compare.words(found, 0.1)


def test_a_machine_that_is_slower_as_a_whole_changes_nothing() -> None:
    rows, samples = made()[:2]
    drift = samples.assign(seconds=samples["seconds"] * (1 + samples["round"]))
    for versus in ("ours", BASELINE):
        assert statistics.bands(rows, drift, versus).max() == statistics.LEAST


@pytest.mark.parametrize(
    ("changed", "word"),
    [({"wrong": "off"}, "wrong"), ({"error_dw": 1.0}, "error"), ({"peak_mb": 1e6}, "memory"),
     ({"samples": 0, "note": "out of memory: 9"}, "failed: out of memory"), ({"samples": 0, "note": "not begun"}, "")],
)  # fmt: skip
def test_what_is_wrong_larger_or_fails_is_a_regression(changed: dict[str, Any], word: str) -> None:
    bad = compare.regressions(compare.compare(made(), slowed(made(), 1.0, **changed), 0.1), 0.1)
    assert bool(bad) == bool(word), "what nobody tried is none"
    assert all(word in line for line in bad)


def test_compare_and_report_commands(tmp_path: Path) -> None:
    for name, found in {"a": made(), "b": slowed(made(), 1.5), "c": made()._replace(runs={"1": GPU})}.items():
        results.save(tmp_path / name, found)
    results.save(tmp_path / "d", made()._replace(rows=made().rows.iloc[1:]))
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    assert CliRunner().invoke(app, ["compare", a, a]).exit_code == 0
    assert CliRunner().invoke(app, ["compare", a, b]).exit_code == 1
    assert CliRunner().invoke(app, ["compare", str(tmp_path), a]).exit_code == 2
    assert "machines: times are comparable" in CliRunner().invoke(app, ["compare", a, c]).output
    assert "1 cases are not in" in " ".join(CliRunner().invoke(app, ["compare", a, d]).output.split())
    assert "24 of 24" in CliRunner().invoke(app, ["report", a]).output


def test_the_tables_of_readme_and_docs_are_those_of_the_committed_results() -> None:
    sides = [results.load(ROOT / "reports" / name) for name in ("cpu", "gpu-h200")]
    assert readme.numbers(*sides) in (ROOT / "README.md").read_text(), "python -m perf readme"
    for path in (ROOT / "README.md", *ROOT.glob("docs/performance/*.md")):
        assert readme.rewritten(path.read_text(), *sides, ROOT) == path.read_text(), f"{path}: python -m perf readme"
    assert 2 * 3 <= sum(line.startswith("|") for line in readme.numbers(*sides).splitlines()) <= 2 * (12 + 2)


def cells(table: str) -> dict[str, list[str]]:
    """The cells of a Markdown table by the first of their line."""
    lines = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines if line}


def test_cells_of_readmes_tables_are_the_medians_of_the_csv() -> None:
    """By a second way: rows of the CSVs picked by hand."""
    folders = ROOT / "reports/cpu", ROOT / "reports/gpu-h200"
    cpu, gpu = (pd.read_csv(folder / "results.csv") for folder in folders)
    _, of_gpu, _, of_cpu = map(cells, readme.numbers(*(results.load(folder) for folder in folders)).split("\n\n"))
    gpu = gpu.query("N == 1024 and D == 512 and dtype == 'bfloat16' and C == 100000 and loss == 'arcface'")
    ours = gpu.query("provider == 'ours'").set_index("mode")["median_s"]
    assert of_gpu["tritonmargin"][3:5] == [f"{1e3 * ours[STEP]:.3g} ms", f"{1e3 * ours[GRAPH]:.3g} ms"]
    other = gpu.query("provider == 'plain-compiled' and mode == 'forward+backward'").iloc[0]
    expected = [f"{1e3 * other['median_s']:.3g} ms", f"{other['beyond_mb'] / 1e3:.3g} GB"]
    assert of_gpu["full logits, torch.compile"][3::2] == expected
    cpu = cpu.query("N == 256 and D == 512 and dtype == 'float32' and C == 10000 and mode == 'forward+backward'")
    for title, provider, loss in (("full logits", "plain", "arcface"), ("tritonmargin", "ours", "arcface")):
        row = cpu.query(f"provider == '{provider}' and loss == '{loss}'").iloc[0]
        assert of_cpu[title][0].startswith(f"{1e3 * row['median_s']:.3g} ms, ")
        assert float(of_cpu[title][0].split()[-2]) == pytest.approx(row["beyond_mb"], rel=5e-3)
