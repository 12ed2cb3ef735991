"""Tables, CSV, Markdown and the page show every row, with its figures or its reason."""

import csv
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from repmlp_deploy.bench.measure.results import Report
from repmlp_deploy.bench.report.page import headlines, to_html
from repmlp_deploy.bench.report.plots import COLOURS, MARKERS, look_of, report_plots
from repmlp_deploy.bench.report.tables import conventions, facts, tables, to_csv, to_markdown
from repmlp_deploy.bench.subjects.table import chosen_rows
from repmlp_deploy.precision import PRECISIONS
from support.bench_reports import MEDIANS, make_report, make_scenarios

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
VOID = {"meta", "br", "hr", "img", "input", "link"}


class _Page(HTMLParser):
    """Collects what a page consists of, and notices tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.text, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_no_row_is_missing_and_one_that_did_not_run_says_why():
    report = make_report()
    first, *_ = tables(report)
    assert [row[0] for row in first.rows] == [*MEDIANS]
    (missing,) = [table for table in tables(report) if table.title == "not measured"]
    assert [row[1:] for row in missing.rows] == [("trt fp32", "no NVIDIA GPU")]
    assert all(len(row) == len(table.columns) for table in tables(report) for row in table.rows)


def test_the_base_row_and_ratios_are_marked():
    cells = {row[0]: row for row in tables(make_report())[0].rows}
    column = tables(make_report())[0].columns.index("vs base")
    assert cells["torch-merged fp32"][column] == "base"
    assert re.fullmatch(r"[45]\.\d\d× \([45]\.\d\d×–[45]\.\d\d×\)", cells["onnx fp32"][column])


def test_proof_of_what_ran_stands_in_the_report():
    proof = tables(make_report())[-3]
    said = " ".join(" ".join(row) for row in proof.rows)
    assert "device cpu; threads 2; dtype bf16" in said
    assert "did not run: no NVIDIA GPU" in said


def test_csv_holds_a_line_a_row_with_units():
    report = make_report()
    lines = list(csv.DictReader(io.StringIO(to_csv(report))))
    assert len(lines) == len(report.rows)
    assert float(lines[0]["p50_ms"]) == report.rows[0].summary.p50_ms
    assert lines[-1]["status"] == "unavailable"
    assert lines[-1]["p50_ms"] == ""


def test_markdown_tables_have_as_many_cells_as_headings():
    report = make_report().model_copy(update={"title": "a | b"})
    blocks = to_markdown(report).split("\n\n")
    for block in (b for b in blocks if b.startswith("|")):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1


def test_what_a_reader_must_know_is_said():
    said = "\n".join(facts(make_report().model_copy(update={"interrupted": True})))
    assert "seeded" in said
    assert "something to know" in said
    assert "interrupted" in said
    assert "governor not readable" in said
    assert any("from its warm-up on" in line for line in conventions(make_report()))


def test_scenarios_have_a_table_per_source_with_the_first_way_as_base():
    report = make_report().model_copy(update={"scenarios": make_scenarios(sources=("tensors", "jpeg"))})
    found = [table for table in tables(report) if "load scenarios" in table.title]
    assert [table.title for table in found] == [
        "net, load scenarios from tensors; server: 99 % within 100 ms",
        "net, load scenarios from JPEG bytes to classes; server: 99 % within 100 ms",
    ]
    assert found[0].rows == (
        ("onnx fp32", "one at a time", "7.5", "50", "base", "50", "base", "88", "1.0e-06"),
        ("onnx fp32", "batched", "3.75", "100", "2.00×", "100", "2.00×", "88", "1.0e-06"),
    )
    assert all(len(row) == len(table.columns) for table in tables(report) for row in table.rows)
    (missing,) = [table for table in tables(report) if table.title == "not measured"]
    assert ("net", "onnx fp32, batched, streams", "one thread cannot be shared") in missing.rows
    for text in (to_html(report), to_markdown(report)):
        assert "2.00×" in text
        assert "load generator" in text
    assert "load generator" not in to_markdown(make_report())


def test_a_single_scenario_has_its_columns_alone():
    report = make_report().model_copy(update={"scenarios": make_scenarios(scenarios=("offline",))})
    (table,) = [table for table in tables(report) if "load scenarios" in table.title]
    assert table.columns == ("format", "way", "offline samples/s", "vs one at a time", "error")


def test_scenarios_are_lines_of_the_csv_and_come_back_from_json():
    report = make_report().model_copy(update={"scenarios": make_scenarios()})
    lines = list(csv.DictReader(io.StringIO(to_csv(report))))[len(report.rows) :]
    assert [line["mode"] for line in lines[-3:]] == [
        f"server, tensors, {way}" for way in ("single", "batched", "streams")
    ]
    assert float(lines[-2]["images_per_s"]) == 100.0
    assert lines[-1]["images_per_s"] == ""
    assert lines[-1]["reason"] == "one thread cannot be shared"
    assert Report.from_json(report.to_json()) == report


def test_the_page_is_whole_and_needs_no_network():
    """Tags match, ids are unique, nothing is loaded from elsewhere, and what is not ours is escaped."""
    report = make_report(modes=("steady", "idle", "end-to-end"))
    text = to_html(report)
    page = _Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") for link in page.links)
    assert "script" not in page.tags
    assert not re.search(r"@import|url\((?!#)", text)
    assert "net on &lt;a CPU&gt; &amp; more" in text
    said = "".join(page.text)
    for words in (*MEDIANS, "no NVIDIA GPU", "latency (ms", "images/s", "GFLOP/s", "FLOP per byte", "largest error"):
        assert words in said
    assert len(report_plots(report)) == text.count("<figure ") == 2 * 3 + 1 + 1 + 2


def test_every_reference_inside_a_figure_has_its_target():
    page = _Page(to_html(make_report()))
    assert {link[1:] for link in page.links} <= set(page.ids)


def test_formats_differ_in_colour_and_in_marker():
    assert len(set(COLOURS)) == len(COLOURS) == len(MARKERS) == len(set(MARKERS))
    rows = chosen_rows(None, tuple(PRECISIONS))
    assert len(rows) > len(COLOURS)
    assert len({look_of(i) for i in range(len(rows))}) == len(rows)


def test_the_headline_names_the_fastest_row_and_how_sure_that_is():
    (first, second) = headlines(make_report())
    assert "openvino bf16 is fastest" in first
    assert "95 %" in first
    assert "batch 8" in second
    assert "× as fast as torch-merged fp32" in first
    assert not re.search(r"\de[+-]\d+ ?[×t]", first), "ratios have no exponents"
    rows = make_report().rows[1:5]  # without the baseline the first row is what ratios are against
    other = make_report().model_copy(update={"rows": (rows[0].model_copy(update={"ratio": None}), *rows[1:])})
    assert "as fast as onnx-merged fp32" in headlines(other)[0]


def test_a_report_without_any_figure_still_makes_a_page():
    rows = tuple(row for row in make_report().rows if row.status == "unavailable")
    empty = make_report().model_copy(update={"rows": rows, "machine": None, "counts": {}, "profile": ()})
    assert "no NVIDIA GPU" in to_html(empty)
    assert to_csv(empty).count("\n") == 1 + len(rows)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed to look at the page with")
@pytest.mark.parametrize("width", [1280, 500], ids=["desktop", "phone"])
def test_a_browser_shows_the_page_without_sideways_scrolling(tmp_path, width):
    """The page is no wider than the window, and every figure has a size; tables scroll inside their own box."""
    probe = (
        "<script>const s=[...document.querySelectorAll('figure svg')].map(e=>e.getBoundingClientRect());"
        "document.title=[document.documentElement.scrollWidth<=window.innerWidth,s.length,"
        "s.every(b=>b.width>200&&b.height>100&&b.right<=window.innerWidth)].join()</script></body>"
    )
    page = tmp_path / "page.html"
    page.write_text(to_html(make_report()).replace("</body>", probe), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()],
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )
    assert "<title>true,6,true</title>" in done.stdout
