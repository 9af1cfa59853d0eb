from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedweight.core.errors import OutputError
from fedweight.studies import pages, report
from fedweight.studies.result import Run

from .chromium import Browser

MakeRun = Any
NAN = float("nan")


class Page(HTMLParser):
    """Collects what the tests ask of a page, and that its tags close."""

    VOID = frozenset({"meta", "link", "br", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


class Shown:
    """What a report holds besides its own scripts: text, figures, rows of tables."""

    def __init__(self, text: str) -> None:
        self.text = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
        data = r'<script type="application/json" class="{}">(.*?)</script>'
        self.figures = [json.loads(t) for t in re.findall(data.format("spec"), text)]
        tables = [json.loads(t) for t in re.findall(data.format("rows"), text)]
        (self.clients,) = tables or ([],)

    def heads(self) -> list[str]:
        """Return what stands above the table of all clients."""
        return re.findall(r'<button type="button">(.*?)</button>', self.text)


def test_report_holds_what_was_run(make_run: MakeRun) -> None:
    run = Run(make_run())
    path = run.report()
    assert path == run.folder / "report.html"
    assert list(run.folder.glob(".*")) == []  # nothing left aside
    shown = Shown(path.read_text("utf-8"))
    page = Page(shown.text)
    assert len(shown.figures) == 9
    words = [div["aria-label"] for div in page.all("div") if div.get("role") == "img"]
    assert len(words) == 9
    assert all(words)
    assert "70.0 %" in shown.text  # the last test accuracy
    assert "too few replies" in shown.text
    assert "counted: client 3 most, with a weight" in shown.text
    assert "nested.deep" in shown.text


def test_the_table_of_clients_says_why_each_counts(make_run: MakeRun) -> None:
    run = Run(make_run())
    shown = Shown(report.render(run))
    heads = shown.heads()
    assert heads[:7] == [
        *("client", "status", "round", "weight", "÷ uniform"),
        *("share of data", "÷ share"),
    ]
    assert heads[7] == "discrepancy"  # what the strategy recorded, beside the weight
    assert heads[8] == "accuracy"
    rows = [dict(zip(heads, row, strict=True)) for row in shown.clients]
    assert [row["client"] for row in rows] == [0, 1, 2, 3]
    # Client 0 failed in round 2, and counted last in round 1, by its data.
    assert [row["round"] for row in rows] == [1, 2, 2, 2]
    assert rows[0]["weight"] == rows[0]["share of data"] == 0.1
    assert rows[0]["÷ uniform"] == 0.4
    assert {row["÷ share"] for row in rows} == {1}
    assert [row["bad replies"] for row in rows] == [1, None, None, None]
    assert rows[0]["last reason"].startswith("RuntimeError")
    # Evaluated last in round 3, whether it counted or not.
    assert rows[3]["accuracy"] == pytest.approx(0.46)


def test_what_others_wrote_is_escaped(make_run: MakeRun) -> None:
    name = "</script><script>alert(1)</script>"
    folder = make_run(class_names=[name, "<img src=x>", "c"])
    config = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(config.replace("made-up", "<img src=x>"))
    run = Run(folder)
    vars(run)["_own_names"] = {0: "<i>North</i>", 1: name}
    run.clients["</td><b>own</b>"] = 1.0
    text = report.render(run)
    shown = Shown(text)
    Page(shown.text)
    # Its own scripts, and its data, are all that is one.
    assert len(re.findall("<script", shown.text)) == len(shown.figures) + 1
    assert text.count("<script>") == 2
    for tag in ("<img", "<i>", "<b>"):
        assert tag not in shown.text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown.text
    assert "&lt;b&gt;&amp;" in shown.text
    assert (
        shown.clients[0][0] == "<i>North</i>"
    )  # as data, which a script shows as text
    assert shown.clients[1][0] == name


def test_report_asks_for_nothing(make_run: MakeRun) -> None:
    text = report.render(Run(make_run()))
    page = Page(Shown(text).text)
    for _, attributes in page.tags:
        for name in ("src", "href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:"))
    (policy,) = (m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert policy.count("'sha256-") == 2  # No other script runs in it.
    assert "unsafe-eval" not in policy
    style = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert "@import" not in style[0]
    assert "url(" not in style[0]


def test_same_run_same_bytes_wherever_it_lies(
    make_run: MakeRun, tmp_path: Path
) -> None:
    folder = make_run()
    other = tmp_path / "elsewhere"
    shutil.copytree(folder, other)
    (other / "timings.csv").write_text("round,seconds,elapsed\n0,99,99\n")
    first = Run(folder).report().read_bytes()
    assert Run(other).report().read_bytes() == first
    assert Run(folder).report().read_bytes() == first


def test_figures_take_their_colours_from_the_page(make_run: MakeRun) -> None:
    text = report.render(Run(make_run()))
    drawn = re.findall(r'class="spec">(.*?)</script>', text)
    style = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)[0]
    for colour, role in pages.ROLES.items():
        assert colour not in "".join(drawn)
        assert style.count(f"--fw-{role}:") == 3  # light, dark and on paper
    for role in re.findall(r"var\(--fw-(\w+)\)", "".join(drawn)):
        assert role in pages.ROLES.values()


def test_a_name_that_is_a_colour_stays_a_name(make_run: MakeRun) -> None:
    run = Run(make_run())
    vars(run)["_own_names"] = {0: "#0b6bb1"}
    assert '"who":"#0b6bb1"' in report.render(run)


def test_sections_without_data_are_left_out(make_run: MakeRun) -> None:
    text = report.render(Run(make_run(weights=False, evaluated=False, rounds=1)))
    Page(Shown(text).text)
    assert "How much each client counts" not in text
    assert "How the clients fare" not in text
    assert "Bad replies and failed rounds" not in text
    assert "Personal models" not in text
    assert "Which classes each client holds" in text


def test_a_run_of_almost_nothing_has_a_report(make_run: MakeRun) -> None:
    folder = make_run(weights=False, evaluated=False, rounds=1)
    for name in ("clients.csv", "partition.csv", "environment.json"):
        (folder / name).unlink()
    (folder / "rounds.csv").write_text("round,status\n0,ok\n")
    text = report.render(Run(folder))
    assert text.count("<script>") == 1  # Nothing is drawn: the runtime stays out.


def test_interrupted_run_says_so(make_run: MakeRun) -> None:
    text = report.render(Run(make_run(rounds=2, asked=9, model=False)))
    assert "stands at round 2 of 9" in text
    assert "It ended early" in text


def test_the_largest_report_stays_small(make_run: MakeRun) -> None:
    run = Run(make_run(clients=500, rounds=1, classes=10))
    few = run.clients[run.clients["round"] == 1]
    generator = np.random.default_rng(0)
    frames = [
        few.assign(round=number, weight=generator.dirichlet(np.ones(500)))
        for number in range(1, 201)
    ]
    import pandas as pd

    vars(run)["clients"] = pd.concat(frames, ignore_index=True)
    text = report.render(run)
    assert len(text.encode()) < 2_000_000
    shown = Shown(text)
    (cells,) = (
        rows
        for figure in shown.figures
        for rows in figure["datasets"].values()
        if "w" in rows[0]
    )
    assert len(cells) == 500  # A row a client, and all rounds of it.
    assert len(cells[0]["w"]) == 200


def test_what_is_left_out_is_said(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(make_run(clients=600, rounds=4))
    for number in range(14):
        run.clients[f"own_{number}"] = 1.0
    text = report.render(run)
    assert "A cell is the mean of 2 clients." in text
    assert "3 more in rounds.csv and clients.csv." not in text
    assert "4 more in rounds.csv and clients.csv." in text  # of gamma, discrepancy, own
    assert len(Shown(text).clients) == 600
    monkeypatch.setattr("fedweight.studies.client_table.MOST_CLIENTS", 250)
    text = report.render(run)
    assert "350 more in clients.csv." in text
    assert len(Shown(text).clients) == 250


def test_failure_keeps_the_former_report(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(make_run())
    path = run.report()
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match="no space left"):
        run.report()
    assert path.read_bytes() == before
    assert list(run.folder.glob(".*")) == []


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([0.1, 0.2, 0.3, 0.4], "4 clients counted: client 3 most, with a weight"),
        ([0.1, 0.2, 0.3, 0.4], "; client 0 least, with 0.1."),
        ([0.0, 0.5, 0.2, 0.3], "3 clients counted: client 1 most"),
        ([0.0, 0.5, 0.2, 0.3], "2 least, with 0.2; client 0 had a weight of 0."),
        ([0.25] * 4, "4 clients counted, all alike, with a weight of 0.25."),
        ([0.0, 1.0, 0.0, 0.0], "client 1 alone counted, with 1; clients 0, 2 and 3"),
        ([0.0] * 4, "no client counted: clients 0, 1, 2 and 3 had a weight of 0."),
        ([NAN, 0.5, NAN, 0.5], "2 clients counted, all alike, with a weight of 0.5."),
    ],
)
def test_weights_in_words(make_run: MakeRun, weights: list[float], said: str) -> None:
    run = Run(make_run(rounds=1))
    run.clients.loc[run.clients["round"] == 1, "weight"] = weights
    words = report._weights_in_words(run)
    assert words.startswith("In round 1, ")
    assert said in words


def tiles(run: Run) -> str:
    return "\n".join(
        f"{tile['label']}|{tile['value']}|{tile['remark']}"
        for tile in report.key_numbers(run, run.summary())
    )


def test_what_is_said_of_few_is_true_of_few(make_run: MakeRun) -> None:
    few = tiles(Run(make_run(clients=4, rounds=5)))
    assert "Mean of the last 5 rounds" in few
    assert "Worst client|" in few
    assert "best client: " in few
    many = tiles(Run(make_run("many", clients=30, rounds=12)))
    assert "Mean of the last 10 rounds" in many
    assert "Worst 10 % of clients" in many


def test_what_is_said_of_the_last_round_is_of_the_last_round(make_run: MakeRun) -> None:
    run = Run(make_run(rounds=4))
    tested = run.rounds["round"].isin([0, 2])
    run.rounds.loc[~tested, "test_accuracy"] = NAN
    run.rounds.loc[run.rounds["round"] == 4, "effective_clients"] = NAN
    text = tiles(run)
    assert "after round 2" in text
    assert "in round 3" in text
    assert "Mean of the last" not in text  # One is no mean.
    run = Run(run.folder)
    run.rounds.loc[run.rounds["round"] == 3, "test_accuracy"] = NAN
    assert "Mean of the last 3 tests" in tiles(run)


def test_other_measures_are_told_first(make_run: MakeRun) -> None:
    run = Run(make_run())
    run.rounds["test_rmse"] = [4.0, 3.0, 2.0, 1.25]
    assert "RMSE|1.25|on the test set, after the last round" in tiles(run)
    assert "RMSE over rounds" in report.render(run)


def test_names_are_in_every_table(make_run: MakeRun) -> None:
    run = Run(make_run())
    vars(run)["_own_names"] = {0: "<i>North</i>", 3: "South"}
    text = report.render(run)
    shown = Shown(text)
    for caption, head, name in (
        ("Weights in round", "client", "South"),
        ("Bad replies", "name", "&lt;i&gt;North&lt;/i&gt;"),
    ):
        (table,) = re.findall(
            rf'aria-label="{caption}[^"]*">\s*(<table.*?</table>)', text, re.DOTALL
        )
        assert f">{head}</th>" in table
        assert f"<td>{name}</td>" in table
    assert shown.heads()[:2] == ["client", "number"]
    assert [row[:2] for row in shown.clients] == [
        *(["<i>North</i>", 0], ["1", 1], ["2", 2], ["South", 3]),
    ]
    assert " (South) most, with a weight" in text


def test_nodes_numbers_of_64_bits_keep_every_digit(make_run: MakeRun) -> None:
    folder = make_run()
    for name in ("clients.csv", "partition.csv"):
        before = r"^(\d+,)" if name == "clients.csv" else "^()"
        text = re.sub(
            f"{before}3,",
            r"\g<1>17446744073709551615,",
            (folder / name).read_text(),
            flags=re.MULTILINE,
        )
        (folder / name).write_text(text)
    shown = Shown(report.render(Run(folder)))
    assert "17446744073709551615" in [row[0] for row in shown.clients]


def test_a_notebook_shows_numbers_and_a_drawing(make_run: MakeRun) -> None:
    run = Run(make_run())
    vars(run)["warnings"] = ["<b>beware</b>"]
    text = run._repr_html_()
    assert "<svg" in text
    assert "70.0 %" in text
    assert "&lt;b&gt;beware" in text
    assert "var(--fw" not in text  # Its page defines no colours.


@pytest.mark.parametrize("absent", ["altair", "jinja2", "vl_convert"])
def test_without_a_package_a_run_has_no_report_and_says_so(
    tmp_path: Path, ready_python: Any, absent: str
) -> None:
    errors = tmp_path / "errors.txt"
    errors.touch()
    code = (
        f"import os; os.dup2(os.open({str(errors)!r}, os.O_WRONLY), 2)\n"
        f"import sys; assert {absent!r} not in sys.modules\n"
        f"sys.modules[{absent!r}] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        f"u.find_spec = lambda n, *a: None if n == {absent!r} else find(n, *a)\n"
        "import fedweight\n"
        "run = fedweight.run(settings={'run.rounds': 1, 'training.epochs': 1},"
        f" out={str(tmp_path / 'x')!r}, progress=False)\n"
        "print((run.folder / 'report.html').exists(), run.complete)"
    )
    ready_python.start(code)
    assert ready_python.finish().strip() == "False True", errors.read_text()
    (line,) = errors.read_text().strip().splitlines()
    assert line.endswith(
        f"no report.html is written: a report needs {absent}, which is not installed. "
        "Install fedweight[studies]."
    )


def test_templates_that_did_not_travel_are_those_of_the_installed_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = pages.check_pages()
    monkeypatch.setattr(pages, "__file__", str(tmp_path / "pages.py"))
    monkeypatch.syspath_prepend(str(real.parents[2]))
    assert pages.check_pages() == real
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(
        pages.ConfigurationError, match="in what Flower ships of an app"
    ):
        pages.check_pages()


# ------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def opened(browser: Browser, make_run: MakeRun) -> Browser:
    """The report of a run with names, in a window of a desk."""
    run = Run(make_run(clients=30, rounds=5, class_names=["<script>", "b", "c"]))
    names = {client: f"Ward {client} <b>x</b>" for client in range(30)}
    vars(run)["_own_names"] = names
    browser.media()
    browser.size(1400)
    browser.open(run.report())
    return browser


HOVER = """
(() => {{ const figure = document.querySelectorAll("figure")[{which}];
figure.scrollIntoView({{block: "center"}});
const marks = [...figure.querySelectorAll("{marks}")];
const box = marks[{place}].getBoundingClientRect();
return {{
    x: box.x + box.width / 2, y: box.y + box.height / 2, found: marks.length
}} }})()
"""
TOLD = "document.querySelector('#vg-tooltip-element')?.innerText"


@pytest.mark.browser
def test_report_opens_in_a_browser_without_a_complaint(opened: Browser) -> None:
    assert opened.complaints == []
    assert all(url.startswith(("file:", "data:")) for url in opened.requests)
    assert len(opened.requests) == 1
    assert opened.ask("document.querySelectorAll('.chart svg').length") == 9
    assert not opened.ask("document.querySelector('.chart:empty') !== null")


@pytest.mark.browser
def test_the_page_forbids_requests_and_other_scripts(
    browser: Browser, make_run: MakeRun
) -> None:
    path = Run(make_run()).report()
    text = path.read_text("utf-8")
    more = "<img src='https://x.invalid/'><script>window.stranger = 1</script></main>"
    path.write_text(text.replace("</main>", more))
    browser.open(path)
    said = " ".join(browser.complaints)
    assert "x.invalid" in said
    assert "Content Security Policy" in said
    assert browser.ask("window.stranger") is None


@pytest.mark.browser
@pytest.mark.parametrize(
    ("which", "marks"),
    [
        (0, ".mark-rect.role-mark.marks path, .mark-rect.role-mark path"),
        (1, ".mark-symbol.role-mark path"),
        (2, ".mark-symbol.role-mark path"),
    ],
)
def test_the_pointer_tells_names(opened: Browser, which: int, marks: str) -> None:
    place = opened.ask(HOVER.format(which=which, marks=marks, place=9))
    assert place["found"] >= 25
    opened.mouse("mouseMoved", place["x"] - 1, place["y"] - 1)
    opened.mouse("mouseMoved", place["x"], place["y"])
    told = opened.ask(f"new Promise(d => setTimeout(() => d({TOLD}), 100))")
    assert re.search(r"Ward \d+ <b>x</b>", told), told
    assert opened.ask("document.querySelector('#vg-tooltip-element b')") is None


@pytest.mark.browser
def test_ctrl_and_the_wheel_widen_the_rounds_and_the_wheel_alone_scrolls(
    opened: Browser,
) -> None:
    ticks = (
        "[...document.querySelectorAll('figure')[4].querySelectorAll"
        "('.role-axis-label text')].map(t => t.textContent).join()"
    )
    place = opened.ask(HOVER.format(which=4, marks=".mark-line path", place=0))
    before = opened.ask(ticks)
    wheel = {"deltaX": 0, "deltaY": -300}
    opened.mouse("mouseMoved", place["x"], place["y"])
    opened.mouse("mouseWheel", place["x"], place["y"], **wheel)
    later = f"new Promise(d => setTimeout(() => d({ticks}), 200))"
    assert opened.ask(later) == before
    place = opened.ask(HOVER.format(which=4, marks=".mark-line path", place=0))
    opened.mouse("mouseWheel", place["x"], place["y"], modifiers=2, **wheel)
    assert opened.ask(later) != before


COLUMN = """
[...document.querySelectorAll(".live tbody tr")].map(r => r.cells[{which}].textContent)
"""


@pytest.mark.browser
def test_clients_are_sorted_and_searched(opened: Browser) -> None:
    names = opened.ask(COLUMN.format(which=0))
    assert len(names) == 30
    assert names[2] == "Ward 2 <b>x</b>"
    opened.ask(
        "[...document.querySelectorAll('.live th button')]"
        ".find(b => b.textContent === 'weight').click()"
    )
    weights = [float(w) for w in opened.ask(COLUMN.format(which=4))]
    assert weights == sorted(weights, reverse=True)
    opened.ask("document.querySelector('.live th[aria-sort] button').click()")
    weights = [float(w) for w in opened.ask(COLUMN.format(which=4))]
    assert weights == sorted(weights)
    opened.ask("document.querySelector('.live input').focus()")
    opened.call("Input.insertText", text="wArD 2 failed")
    assert opened.ask(COLUMN.format(which=0)) == []
    opened.ask("document.querySelector('.live input').select()")
    opened.call("Input.insertText", text="ward 12")
    assert opened.ask(COLUMN.format(which=0)) == ["Ward 12 <b>x</b>"]
    assert opened.ask("document.querySelector('.count').textContent") == "1 of 30."


@pytest.mark.browser
def test_a_phone_shows_all_without_scrolling_sideways(opened: Browser) -> None:
    wide = "document.documentElement.scrollWidth"
    opened.size(390)
    opened.open(Path(opened.requests[0].removeprefix("file://")))
    assert opened.ask(wide) == 390
    over = opened.ask(
        "[...document.querySelectorAll('figure, .chart svg, .tiles div')]"
        ".filter(e => e.getBoundingClientRect().right > 390).length"
    )
    assert over == 0
    assert opened.complaints == []


@pytest.mark.browser
def test_figures_follow_the_dark_mode(opened: Browser) -> None:
    fill = (
        "getComputedStyle(document.querySelector('.chart .role-axis-title text')).fill"
    )
    light = opened.ask(fill)
    opened.media(dark=True)
    assert (light, opened.ask(fill)) == ("rgb(31, 41, 51)", "rgb(232, 235, 239)")
    opened.media("print", dark=True)
    assert opened.ask(fill) == light


@pytest.mark.browser
def test_paper_has_what_is_folded_up_too(opened: Browser) -> None:
    high = "document.querySelector('details table').getBoundingClientRect().height"
    assert opened.ask("document.querySelector('details').open") is False
    opened.media("print")
    opened.size(720)
    assert opened.ask(high) > 50
    assert opened.ask("document.documentElement.scrollWidth") == 720
    assert opened.pdf().startswith(b"%PDF")
    opened.media()
    assert opened.ask("document.querySelector('details').open") is False


@pytest.mark.browser
def test_many_cells_are_drawn_on_a_canvas_and_told(
    browser: Browser, make_run: MakeRun
) -> None:
    run = Run(make_run(clients=300, rounds=20))
    vars(run)["_own_names"] = {client: f"Ward {client}" for client in range(300)}
    browser.media()
    browser.size(1400)
    browser.open(run.report())
    assert browser.complaints == []
    place = browser.ask(HOVER.format(which=0, marks="canvas", place=0))
    assert place["found"] == 1
    browser.mouse("mouseMoved", place["x"] - 3, place["y"])
    browser.mouse("mouseMoved", place["x"], place["y"])
    told = browser.ask(f"new Promise(d => setTimeout(() => d({TOLD}), 300))")
    assert re.search(r"Ward 1\d\d", told), told


def test_what_draws_figures_is_put_together_once_on_a_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import vl_convert

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []
    real = vl_convert.javascript_bundle

    def bundle() -> str:
        made.append(1)
        return real()  # type: ignore[call-arg]

    monkeypatch.setattr(
        pages, "vl_convert", type("", (), {"javascript_bundle": bundle})
    )
    fresh = pages._runtime.__wrapped__
    script = fresh()
    assert "</script" not in script
    assert fresh() == script
    assert len(made) == 1
    (kept,) = (tmp_path / "fedweight").iterdir()
    kept.write_text(kept.read_text().replace("window.vegaEmbed", "window.other"))
    assert fresh() == script  # What was changed is put together again.
    assert len(made) == 2
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fresh() == script  # Without a place for it, too.
