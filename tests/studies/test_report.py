from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedweight.core.errors import OutputError
from fedweight.studies import plots, report
from fedweight.studies.result import Run

MakeRun = Any
NAN = float("nan")


class Page(HTMLParser):
    """Collects what the tests ask of a page, and that its tags close."""

    VOID = frozenset({"meta", "link", "br", "use", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_report_holds_what_was_run(make_run: MakeRun) -> None:
    run = Run(make_run())
    path = run.report()
    assert path == run.folder / "report.html"
    assert list(run.folder.glob(".*")) == []  # nothing left aside
    text = path.read_text("utf-8")
    page = Page(text)
    assert len(page.all("svg")) == 8
    assert all(svg["aria-label"] for svg in page.all("svg"))
    assert "70.0 %" in text  # the last test accuracy
    assert "too few replies" in text
    assert "counted: client 3 most, with a weight" in text
    assert "discrepancy" in text
    assert "nested.deep" in text


def test_what_others_wrote_is_escaped(make_run: MakeRun) -> None:
    name = "<img src=x>"
    folder = make_run(class_names=[name, "b", "c"])
    config = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(config.replace("made-up", name))
    text = report.render(Run(folder))
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&lt;b&gt;&amp;" in text


def test_report_asks_for_nothing(make_run: MakeRun) -> None:
    text = report.render(Run(make_run()))
    page = Page(text)
    assert page.all("script") == []
    for _, attributes in page.tags:
        for name in ("src", "href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:"))
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_ids_are_unique_and_every_reference_has_one(make_run: MakeRun) -> None:
    text = report.render(Run(make_run()))
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
    assert set(references) == set(ids)


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
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    for colour, role in report._ROLES.items():
        assert colour not in drawings
        assert text.count(f"--fw-{role}:") == 3  # light, dark and on paper
    assert set(report._ROLES) == {
        plots.INK,
        plots.MUTED,
        plots.GRID,
        plots.PAPER,
        plots.MISSING,
        plots.BLUE,
        plots.VERMILION,
        plots.GREEN,
    }


def test_sections_without_data_are_left_out(make_run: MakeRun) -> None:
    text = report.render(Run(make_run(weights=False, evaluated=False, rounds=1)))
    Page(text)
    assert "How much each client counts" not in text
    assert "How the clients fare" not in text
    assert "Bad replies and failed rounds" not in text
    assert "Which classes each client holds" in text


def test_interrupted_run_says_so(make_run: MakeRun) -> None:
    text = report.render(Run(make_run(rounds=2, asked=9, model=False)))
    assert "stands at round 2 of 9" in text
    assert "It ended early" in text


def test_many_clients_stay_a_small_file(make_run: MakeRun) -> None:
    text = report.render(Run(make_run(clients=600, rounds=4)))
    assert len(text) < 600_000
    assert "100 more in clients.csv" in text


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
    return report._tiles(run, run.summary())


def test_what_is_said_of_few_is_true_of_few(make_run: MakeRun) -> None:
    few = tiles(Run(make_run(clients=4, rounds=5)))
    assert "Mean of the last 5 rounds" in few
    assert "Worst client<" in few
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


def test_names_are_in_every_table(make_run: MakeRun) -> None:
    run = Run(make_run())
    vars(run)["_own_names"] = {0: "<i>North</i>", 3: "South"}
    text = report.render(run)
    Page(text)
    assert "<i>" not in text
    for caption, name in (
        ("Weights in round", "South"),
        ("Bad replies", "&lt;i&gt;North&lt;/i&gt;"),
        ("Round 3; accuracy", "&lt;i&gt;North&lt;/i&gt;"),
    ):
        (table,) = re.findall(rf"<caption>{caption}.*?</table>", text)
        assert "<th scope='col'>name</th>" in table
        assert f"<td>{name}</td>" in table
    assert " (South) most, with a weight" in text


def test_letters_that_matplotlib_lacks_are_no_warning(make_run: MakeRun) -> None:
    text = report.render(Run(make_run(class_names=["数字", "b", "c"])))
    assert "数字" in text


def browse(path: Path, profile: Path) -> tuple[str, list[str]]:
    """Open a file in a browser without a network: its DOM, what the console said."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)))
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={profile}",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.browser
def test_report_opens_in_a_browser_without_a_complaint(
    make_run: MakeRun, tmp_path: Path
) -> None:
    path = Run(make_run()).report()
    page, complaints = browse(path, tmp_path / "profile")
    assert page.count("<svg") == 8
    assert complaints == []
    # The page's own policy forbids every request, so that one would show up here.
    text = path.read_text("utf-8")
    path.write_text(text.replace("</main>", "<img src='https://x.invalid/'></main>"))
    _, complaints = browse(path, tmp_path / "profile")
    assert "Content Security Policy" in " ".join(complaints)
