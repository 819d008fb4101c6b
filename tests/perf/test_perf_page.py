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
ROOT = Path(__file__).parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
CPU = {"cpu": "an abacus", "cores": 2, "caches": {}, "memory_gib": 16.0, "instruction_set": "beads", "torch": "2.13.0",
       "threads": 2, "date": "2026-12-01", "load_before": 0.1, "device": "cpu", "plan": "default"}  # fmt: skip
GPU = {**CPU, "device": "cuda", "gpu": "a large GPU", "gpu_memory_gib": 80.0}
TIMES = {"ours": 1.0, "ours-retain": 0.8, "plain": 2.0, "pml": 3.0}  # of a step, in units of ours


def made(
    times: dict[str, float] = TIMES, loss: str = "arcface", dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    modes: tuple[str, ...] = (STEP, WHOLE), sizes: Any = (10_000, 100_000, 1_000_000), scatter: float = 0.001,
    noise: float = 0.0, rounds: int = 6, facts: dict[str, Any] = CPU, **changed: Any,
) -> Results:  # fmt: skip
    """Steps of 0.123 us a class times `times`. Others scatter beside ours, all by `noise`; `changed`: of the others."""
    rows, samples = [], []
    for dtype, c, mode in itertools.product(dtypes, sizes, modes):
        size = {"dtype": dtype, "C": c, "loss": loss, "device": facts["device"], "run": "1"}
        for name, factor in {**times, BASELINE: 0.3}.items():
            taken, own = 1.23e-7 * c * factor, "ours" in name
            off, all_off = scatter * (name not in ("ours", BASELINE)), noise * (name != BASELINE)
            line = fp32_line(
                name, mode, median_s=taken, x_gemm=factor / 0.3, times_ours=factor, work="all classes",
                q25_s=taken, q75_s=taken, error_loss=1e-8, error_dx=3e-7, error_dw=4e-7, limit_s=taken / 2,
                peak_mb=(1e-2 if own else 1e-1) * c, beyond_mb=14.3 if own else 2e-2 * c,
            ) | size | (changed if name != "ours" else {})  # fmt: skip
            rows += [line] if name != BASELINE else []
            for k in range(rounds):
                part = (1.0 + off * (2 * (k % 2) - 1)) * (1.0 + all_off * (2 * (k // 2 % 2) - 1))
                samples += [{**line, "round": k, "position": "", "seconds": taken * part}]
    rows = pd.DataFrame(rows).reindex(columns=list(results.COLUMNS))
    empty = results.load(Path("/nonexistent"))
    return empty._replace(rows=rows, samples=pd.DataFrame(samples, columns=empty.samples.columns), runs={"1": facts})


def but(found: Results, where: str, **columns: Any) -> Results:
    """The run with other values in some rows; without these rows if none are given."""
    rows, there = found.rows.copy(), found.rows.eval(where)
    rows.loc[there, [*columns]] = [*columns.values()]
    return found._replace(rows=rows if columns else rows[~there])


def written(folder: Path, found: Results) -> str:
    return page.write(folder, found).read_text()


def first_table(text: str) -> list[dict[str, str]]:
    lines = re.findall(r"<tr>(.*?)</tr>", text.partition("</table>")[0], re.DOTALL)
    head, *rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line) for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_first_screen_answers_and_the_rest_is_linked(tmp_path: Path) -> None:
    text = written(tmp_path, made())
    order = [text.index(f"<{tag}") for tag in ("nav>", 'p class="answer"', "svg ", "table>")]
    assert order == sorted(order)
    assert set(re.findall(r'href="#(\w+)"', text)) <= set(re.findall(r'id="(\w+)"', text)), "links lead somewhere"
    assert not re.search(r'(src|href)="http|@import|url\(http', text), "one file, and nothing to fetch"
    assert "faster in 24 of 24 comparisons" in text
    assert "1,000,000 classes, N=256, D=512, float32: 123 ms, 14.3 MB. The fastest other, plain: 246 ms, 20 GB." in text
    assert {path.name for path in tmp_path.iterdir()} >= {"time.png", "memory.png"}
    assert "24 of 24" in (tmp_path / "summary.md").read_text()
    assert str(tmp_path) not in text
    assert "is missing" not in text
    text = written(tmp_path, made()._replace(rows=made().rows.iloc[1:], runs={}))  # one less in float32
    assert re.search("bfloat16: 123 ms.*runs.json is missing.*arcface, bfloat16, N=256", text, re.DOTALL)


@pytest.mark.parametrize("theirs", [0.5051, 0.9949, 1.0051, 1.117, 3.3333])
def test_a_ratio_is_that_of_the_times_beside_it(tmp_path: Path, theirs: float) -> None:
    """Whatever the median ratio within the rounds: who looks at two times divides them."""
    found = statistics.find(made({"ours": 1.0, "plain": theirs}, times_ours=theirs * 1.02))
    for row in page.headline(found, found.headline).to_dict("records"):
        values = [float(row[name].split()[0]) / (1e3 if "ms" in row[name] else 1) for name in ("ours", "fastest other")]
        assert row["ours is"].startswith(f"{terminal.digits(max(values) / min(values))}x")
        assert ("faster" in row["ours is"]) == (values[1] >= values[0])


def test_comparisons_beyond_the_noise_are_counted(tmp_path: Path) -> None:
    two = {"ours": 1.0, "plain": 1.1}
    once = but(made(two), "provider == 'ours' and C == 1000000", samples=1, median_s=3.0, beyond_mb=math.nan)
    for found, expected, why in (
        (made(two), {"faster": 12}, "by 10 %"), (made(two, scatter=0.2), {"equal": 12}, "within that noise"),
        (made({"ours": 1.0, "plain": 0.5}), {"slower": 12}, "by half"),
        (made(two, times_ours=0.97), {"equal": 12}, "times and ratios that disagree say nothing"),
        (made(two, rounds=1), {}, "one round is no comparison"), (made(two, rounds=0), {"unknown": 12}, "no samples"),
        (once, {"faster": 8}, "nor is one cold step of ours, whatever samples of other runs say"),
        (made(two, wrong="error of dw"), {}, "who is wrong is not ranked"),
        (but(made(two), "provider == 'ours'", wrong="error of dw"), {}, "nobody is compared with ours that is wrong"),
    ):  # fmt: skip
        assert statistics.find(found).compared["verdict"].value_counts().to_dict() == expected, why
    row = [*first_table(written(tmp_path, once))[2].values()]
    assert row == ["1,000,000, bfloat16", "3 s (one step)", "135 ms", "-", "plain", "-", "20 GB"]
    text = written(tmp_path, but(once, "C < 1000000"))
    assert "3 s (one step).</p>" in text
    assert not {"ours is", "our memory"} & {*first_table(text)[0]}, "columns without a value"
    assert "svg" not in text.partition("<body>")[2], "one number of classes is a picture of dots"


def test_a_gpus_folder_without_samples_compares_each_mode_with_its_like(tmp_path: Path) -> None:
    found = made({"ours": 1.0, "plain": 0.5}, modes=(STEP, GRAPH), dtypes=("tf32",), facts=GPU, rounds=0)
    found = but(found, f"provider == 'ours' and mode == '{GRAPH}'", median_s=1e-4)
    text = written(tmp_path, found)
    modes = [(row["mode"], row["ours is"]) for row in first_table(text)[:2]]
    assert modes == [("launched", "2x slower"), ("CUDA graph", "6.15x faster")]
    assert re.search("tf32, launched: 123 ms.* In a CUDA graph: 0.1 ms.* fastest other, plain: 61.5 ms", text)
    for said in ("less time in 3 of 6 comparisons", "samples.csv.gz is missing", "leave of 80 GiB"):
        assert said in text
    assert "leave of" not in written(tmp_path, found._replace(runs={"1": {**GPU, "gpu_memory_gib": None}}))
    row = first_table(written(tmp_path, but(found, f"provider == 'plain' and mode == '{GRAPH}'")))[1]
    assert (row["ours"], row["ours is"], row["which"]) == ("0.1 ms", "-", "none: no other code was measured")


def test_what_could_not_be_measured_is_told(tmp_path: Path) -> None:
    found, note = made(dtypes=("float32", "bfloat16", "float16")), "out of memory: 9 GB"
    assert "ran out of memory" not in written(tmp_path, found)
    text = written(tmp_path, but(found, "C == 1000000 and provider != 'ours'", samples=0, note=note))
    shown = [row["which"] for row in first_table(text)]  # the main dtype at all its sizes, others where others ran
    assert sorted(shown) == [f"none: {note}", *["plain"] * 5]
    assert "A cross on the grey line" in text
    nothing = found.rows.assign(samples=0, note=note, median_s=math.nan)
    for rows in (nothing, nothing.iloc[:0]):
        none = made(rounds=0)._replace(rows=rows)
        assert "Nothing could be measured" in written(tmp_path, none)
        assert page.on_terminal(none)[0][0].startswith("Nothing could be measured")
    assert "Nothing was compared" in written(tmp_path, made({"ours": 1.0}))


def test_the_first_table_has_six_lines_at_most_and_all_stand_below(tmp_path: Path) -> None:
    """Sizes where others were measured, then the largest, each in all its modes; the pictures' dtype before others."""
    sizes = 10_000, 12_000, 30_000, 100_000, 110_000, 300_000, 1_000_000, 1_100_000
    many = made(dtypes=("float32",), modes=(STEP,), sizes=sizes)
    on_gpu = but(made(modes=(STEP, GRAPH), facts=GPU), "dtype == 'float32' and C == 10000")
    for found, dtype, classes, total, said in (
        (but(many, "provider != 'ours' and C != 110000"), "float32", {*sizes} - {10_000, 12_000}, 8, "2 of 2"),
        (on_gpu, "bfloat16", [10_000, 100_000, 1_000_000] * 2, 10, "20 of 20"),
    ):  # fmt: skip
        text = written(tmp_path, found)
        assert f"in {said} comparisons" in text
        assert [row["classes"] for row in first_table(text)] == [f"{c:,}, {dtype}" for c in sorted(classes)]
        assert len(first_table(text.partition("at all its sizes")[2])) == total


def test_other_losses_own_heads_and_runs_without_ours_are_shown(tmp_path: Path) -> None:
    for loss in ("cosface", "softmax"):
        text = written(tmp_path, made(loss=loss, modes=(WHOLE,), dtypes=("float32",)))
        assert (f"{loss}, whole step, N=256" in text, len(first_table(text))) == (True, 3)
    shown = page.on_terminal(made({"ours": 1.0, "mine": 2.0, "plain": 1.5}))[0][1]
    assert list(shown["mine"][:2]) == ["2.46 ms, 200 MB", "24.6 ms, 2 GB"]
    for name in ("mine", "torch-lce", "ours-retain"):
        ((said, shown),) = page.on_terminal(made({name: 2.0}))
        assert (said, "2.46 ms" in shown.to_string()) == ("Nothing was compared with other code.", True)
        assert ("which" in shown) == (name != "ours-retain"), "others stand in the first table all the same"


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
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
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,900", "--virtual-time-budget=5000",
             f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]  # fmt: skip
    done = subprocess.run([BROWSER, *flags, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stdout[:500]
    seen = json.loads(title[1].replace("&quot;", '"'))
    good = seen["wide"] <= 0 == seen["empty"] and seen["nav"] < 200 and (width < 1000 or seen["table"] < 800)
    assert good, seen


def slowed(before: Results, factor: float, **changed: object) -> Results:
    """The run as if ours took `factor` times as long."""
    rows, samples = before.rows.copy(), before.samples.copy()
    ours = rows["provider"].str.startswith("ours")
    rows.loc[ours, ["median_s", "x_gemm"]] *= factor
    rows.loc[ours, [*changed]] = [*changed.values()]
    samples.loc[samples["provider"].str.startswith("ours"), "seconds"] *= factor
    return before._replace(rows=rows, samples=samples)


def test_fifteen_percent_are_found_and_equal_runs_are_equal() -> None:
    for factor, verdict, bad in ((1.0, "", False), (1.15, "slower", True), (1 / 1.15, "faster", False)):
        found = compare.compare(made(), slowed(made(), factor), 0.1)
        own, said = found["provider"].str.startswith("ours"), compare.regressions(found, 0.1)
        assert (set(found.loc[own, "verdict"]), set(found.loc[~own, "verdict"])) == ({verdict}, {""})
        assert (any("ours as a whole" in line for line in said), bool(said)) == (bad, bad)
    without = made(rounds=0)
    found = compare.compare(without, slowed(without, 1.15), 0.1)
    assert set(found["verdict"]) == {"slower", ""}
    assert compare.words(found, 0.1).startswith("Samples are missing")


def test_noise_hides_what_it_must() -> None:
    found = compare.compare(made(noise=0.1), slowed(made(noise=0.1), 1.15), 0.1)
    assert set(found["verdict"]) == {""}
    assert any("ours as a whole" in line for line in compare.regressions(found, 0.1)), "many rows see it all the same"
    found = compare.compare(made(noise=0.6), slowed(made(noise=0.6), 1.15), 0.1)
    assert compare.regressions(found, 0.1) == [], "not even all of them"
    assert "0 of our " in compare.words(found, 0.1)
    drift = made().samples.assign(seconds=lambda samples: samples["seconds"] * (1 + samples["round"]))
    for versus in ("ours", BASELINE):
        assert statistics.bands(made().rows, drift, versus).max() == statistics.LEAST, "a slower machine is none"


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
    for code, two in enumerate(((a, a), (a, b), (str(tmp_path), a))):
        assert CliRunner().invoke(app, ["compare", *two]).exit_code == code
    (tmp_path / "d" / "runs.json").rename(tmp_path / "runs.json")
    for two in ((a, d), (d, a)):
        done = CliRunner().invoke(app, ["compare", *two])
        assert (done.exit_code, "lacks run 1: which machine" in done.output) == (2, True)
    (tmp_path / "runs.json").rename(tmp_path / "d" / "runs.json")
    assert "machines: times are comparable" in CliRunner().invoke(app, ["compare", a, c]).output
    assert "1 cases are not in" in " ".join(CliRunner().invoke(app, ["compare", a, d]).output.split())
    assert "24 of 24" in CliRunner().invoke(app, ["report", a]).output


def test_the_tables_of_readme_and_docs_are_those_of_the_committed_results() -> None:
    """And, by a second way, of rows of the CSVs picked by hand."""
    sides = cpu, gpu = [results.load(ROOT / "reports" / name) for name in ("cpu", "gpu-h200")]
    assert readme.numbers(*sides) in (ROOT / "README.md").read_text(), "python -m perf readme"
    for path in (ROOT / "README.md", *ROOT.glob("docs/performance/*.md")):
        assert readme.rewritten(path.read_text(), *sides, ROOT) == path.read_text(), f"{path}: python -m perf readme"
    _, of_gpu, _, of_cpu = (
        {cells[1]: cells[2:-1] for cells in map(re.compile(r"[ *]*\|[ *]*").split, part.splitlines()) if cells[1:]}
        for part in readme.numbers(*sides).split("\n\n")
    )
    assert 2 * 3 <= len(of_gpu) + len(of_cpu) <= 2 * (12 + 2)
    size = "D == 512 and loss == 'arcface' and N == {} and dtype == '{}' and C == {}"
    rows = gpu.rows.query(size.format(1024, "bfloat16", 100_000)).set_index(["provider", "mode"])
    ours = rows["median_s"]["ours"]
    assert of_gpu["tritonmargin"][3:5] == [f"{1e3 * ours[STEP]:.3g} ms", f"{1e3 * ours[GRAPH]:.3g} ms"]
    other = rows.loc["plain-compiled", STEP]
    expected = [f"{1e3 * other['median_s']:.3g} ms", f"{other['beyond_mb'] / 1e3:.3g} GB"]
    assert of_gpu["full logits, torch.compile"][3::2] == expected
    rows = cpu.rows.query(size.format(256, "float32", 10_000)).set_index(["provider", "mode"])
    for title, provider in (("full logits", "plain"), ("tritonmargin", "ours")):
        row = rows.loc[provider, STEP]
        assert of_cpu[title][0].startswith(f"{1e3 * row['median_s']:.3g} ms, ")
        assert float(of_cpu[title][0].split()[-2]) == pytest.approx(row["beyond_mb"], rel=5e-3)
