from __future__ import annotations

import html
import json
import re
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
import tomli_w

from fedweight.core.errors import DataError
from fedweight.studies import plots
from fedweight.studies.comparison import PLAN, Comparison
from fedweight.studies.comparison_report import render
from fedweight.studies.plots import comparing
from fedweight.studies.result import Run
from fedweight.studies.summarizing import (
    METRICS,
    reached,
    summary_of,
    write_comparison,
)

from .chromium import Browser

MakeRun = Any
STRATEGIES = ("fedavg", "<i>mine</i>")


def shift(folder: Path, by: float) -> None:
    """Add to every test accuracy of a run, and a little to each client's."""
    for name, columns in (
        ("rounds.csv", ("test_accuracy", "client_accuracy_worst10")),
        ("clients.csv", ("accuracy",)),
    ):
        frame = Run(folder).rounds if name == "rounds.csv" else Run(folder).clients
        for column in columns:
            frame[column] += by
        frame.to_csv(folder / name, index=False)


@pytest.fixture
def found(make_run: MakeRun, tmp_path: Path) -> Comparison:
    """Two strategies with three seeds; the second one is better each time."""
    cells = []
    for strategy in STRATEGIES:
        for seed in range(3):
            name = f"{'mine' if strategy == STRATEGIES[1] else strategy}-seed{seed}"
            folder = make_run(name)
            better = 0.05 + 0.001 * seed if strategy == STRATEGIES[1] else 0.01 * seed
            shift(folder, better)
            cell = {"strategy": strategy, "data": "digits", "seed": seed}
            cells.append({**cell, "candidate": "", "folder": name} | reached(folder))
    plan = {"strategies": [*STRATEGIES], "data-sets": ["digits"], "seeds": [0, 1, 2]}
    (tmp_path / PLAN).write_text(tomli_w.dumps({"comparison": plan}))
    write_comparison(tmp_path, cells)
    return Comparison(tmp_path)


def over_two(found: Comparison) -> Comparison:
    """Return the same comparison as if on two data sets, alike."""
    cells = found.cells.to_dict("records")
    cells = [{**cell, "data": data} for data in ("digits", "more") for cell in cells]
    plan = {"strategies": [*STRATEGIES], "data-sets": ["digits", "more"]}
    plan |= {"seeds": [0, 1, 2]}
    (found.folder / PLAN).write_text(tomli_w.dumps({"comparison": plan}))
    for name in ("cells.csv", "summary.csv"):
        (found.folder / name).unlink()
    write_comparison(found.folder, cells)
    return Comparison(found.folder)


def figures(text: str) -> dict[str, Any]:
    """Return the specifications of a page's figures by their titles."""
    found = re.findall(
        r"<h3>(.*?)</h3>.*?class=\"spec\">(.*?)</script>", text, re.DOTALL
    )
    return {title: json.loads(spec) for title, spec in found}


def data(spec: Any, *fields: str) -> list[dict[str, Any]]:
    (rows,) = (v for v in spec["datasets"].values() if set(fields) <= set(v[0]))
    return list(rows)


def test_a_comparison_has_a_report(found: Comparison) -> None:
    path = found.report()
    assert path == found.folder / "report.html"
    text = path.read_text("utf-8")
    drawn = figures(text)
    assert list(drawn) == [
        *("Accuracy over rounds", "Loss over rounds"),
        *("All clients’ accuracy, at the end", "Accuracy against fairness"),
        *("fedavg", "&lt;i&gt;mine&lt;/i&gt;"),
    ]
    assert render(found) == text  # the same bytes
    shown = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert "<i>" not in shown
    for note in found.notes:
        assert f"<li>{note}</li>" in html.unescape(shown)


def test_curves_are_means_over_seeds_with_their_intervals(found: Comparison) -> None:
    rows = data(figures(render(found))["Accuracy over rounds"], "mean", "low")
    (last,) = (r for r in rows if r["strategy"] == "fedavg" and r["round"] == 3)
    assert last["mean"] == pytest.approx(0.71)
    # Student's interval of 0.70, 0.71 and 0.72, as scipy.stats has it.
    assert last["low"] == pytest.approx(0.71 - 4.302653 * 0.01 / 3**0.5, abs=1e-5)
    assert last["high"] == pytest.approx(0.71 + 4.302653 * 0.01 / 3**0.5, abs=1e-5)


def test_all_clients_stand_side_by_side(found: Comparison) -> None:
    spec = figures(render(found))["All clients’ accuracy, at the end"]
    dots = data(spec, "client", "seed")
    assert len(dots) == 2 * 3 * 4
    assert {round(dot["at"]) for dot in dots if dot["strategy"] == "fedavg"} == {0}
    (bar, _) = data(spec, "low", "middle", "high")
    values = sorted(dot["value"] for dot in dots if dot["strategy"] == "fedavg")
    assert bar["middle"] == pytest.approx((values[5] + values[6]) / 2)


def test_the_front_holds_whom_nobody_beats(found: Comparison) -> None:
    cells = found.cells
    spec = comparing.front(cells, found.strategies).to_dict()
    large = next(v for v in spec["datasets"].values() if len(v) == 2)
    assert [row["strategy"] for row in large] == list(STRATEGIES)
    joined = next(v for v in spec["datasets"].values() if len(v) == 1)
    assert [row["strategy"] for row in joined] == ["<i>mine</i>"]
    with pytest.raises(DataError, match="no run has client_accuracy_mean and"):
        comparing.front(cells.drop(columns="client_accuracy_worst10"), STRATEGIES)


def test_of_a_gap_less_is_better(found: Comparison) -> None:
    mine = found.cells["strategy"] == STRATEGIES[1]
    cells = found.cells.assign(equalized_odds_gap=0.1)
    # As accurate as it is, and fairer: nobody else is on the front.
    cells.loc[mine, "equalized_odds_gap"] = 0.05
    which = comparing.gap_front("equalized_odds")
    spec = comparing.front(cells, found.strategies, which).to_dict()
    joined = next(v for v in spec["datasets"].values() if len(v) == 1)
    assert [row["strategy"] for row in joined] == ["<i>mine</i>"]
    # Less fair, it is one of two.
    cells.loc[mine, "equalized_odds_gap"] = 0.3
    spec = comparing.front(cells, found.strategies, which).to_dict()
    assert {len(v) for v in spec["datasets"].values()} == {2, 6}
    vars(found)["cells"] = cells
    titles = list(figures(render(found)))
    assert "Accuracy against the gap in equalized odds" in titles
    assert "Accuracy against the gap in accuracy" not in titles


def test_strategies_of_one_colour_differ_in_what_else_is_drawn(
    found: Comparison,
) -> None:
    """There are six colours, and a study may well compare sixteen strategies."""
    names = [f"strategy {k}" for k in range(16)]
    several = [(0, Run(found.folder / "fedavg-seed0"))]
    curves = comparing.curves(
        dict.fromkeys(names, several), "test_accuracy", "Accuracy", True
    ).to_dict()
    (line,) = (one for one in curves["layer"] if "strokeDash" in one["encoding"])
    cells = pd.concat([found.cells.iloc[:1].assign(strategy=name) for name in names])
    front = comparing.front(cells, names).to_dict()
    (dots,) = (one for one in front["layer"] if "shape" in one["encoding"])
    for drawn, besides in ((line, "strokeDash"), (dots, "shape")):
        scales = [drawn["encoding"][by]["scale"] for by in ("color", besides)]
        assert all(one["domain"] == names for one in scales)
        looks = {
            json.dumps(one) for one in zip(*(s["range"] for s in scales), strict=True)
        }
        assert len(looks) == len(names)


def test_numbers_of_the_tables_are_those_that_a_terminal_shows(
    found: Comparison,
) -> None:
    summary = found.summary
    assert summary["wilcoxon_verdict"].eq("cannot reach").any()
    text = render(found)
    for said in ("95% from", "Wilcoxon p", "<td>cannot reach</td>"):
        assert said in text
    noise = summary["difference"].where(summary["difference"].isna(), 3.7e-17)
    vars(found)["summary"] = summary.assign(difference=noise)
    assert "e-17" not in render(found)


def test_winners_are_marked_only_where_the_test_says_so(found: Comparison) -> None:
    text = render(found)
    verdicts = found.summary["verdict"].tolist()
    assert "better" in verdicts
    assert text.count("<td>*</td>") == verdicts.count("better")
    footnote = "<li>* better than fedavg.</li>"
    assert text.count(footnote) == 1
    summary = found.summary.assign(verdict="undecided")
    vars(found)["summary"] = summary
    text = render(found)
    assert "<td>*</td>" not in text
    assert footnote not in text


def test_it_begins_with_who_differs_and_how_sure_that_is(found: Comparison) -> None:
    rows = found.summary[found.summary["metric"] == "test_accuracy"]
    numbers = rows["sentence"].iloc[1].removeprefix("better: ")
    title = METRICS["test_accuracy"].title
    said = f"<i>mine</i> is better than fedavg in the {title}: {numbers}."
    assert found.verdicts == [said]
    assert said in str(found)
    for shown in (render(found), found._repr_html_()):
        at = shown.index(html.escape(said, quote=False))
        assert at < shown.index("Intervals are 95% t intervals")
    assert "3 seeds tell little: at most large" in found.notes[0]
    # Where nobody differs from the first, one line says so.
    names = [*STRATEGIES, "third"]
    cells = [
        {**cell, "strategy": name, "test_accuracy": 0.5 + 0.01 * seed * (-1) ** k}
        for k, name in enumerate(names)
        for seed, cell in enumerate(found.cells.to_dict("records")[:3])
    ]
    vars(found)["_plan"] = {"strategies": names, "data-sets": ["digits"], "seeds": [0]}
    assert found.notes[0].startswith("1 seed tells little: ")
    assert "10 or more, --seeds 0-9, tell more" in found.notes[0]
    vars(found)["_plan"]["seeds"] = [*range(5)]
    assert found.notes[0].startswith("Verdicts are the paired t test's at 0.05")
    vars(found)["summary"] = pd.DataFrame(summary_of(cells)).fillna({"against": ""})
    first, mine, third = found.verdicts
    assert first == f"No strategy is told apart from fedavg in the {title}."
    assert mine.startswith(f"<i>mine</i> is not told apart from fedavg in the {title}:")
    assert "(3 pairs, Holm over 2 comparisons)." in mine
    assert third == (
        f"third is the same as fedavg in the {title}: not one of 3 pairs differs."
    )
    # Two data sets are two pairs, however many seeds each has.
    verdict, *_ = over_two(found).verdicts
    assert verdict.startswith(
        f"<i>mine</i> is not told apart from fedavg in the {title} over all data sets: "
        "all 2 data sets differ by the same +"
    )


def test_it_says_what_was_compared_and_where_the_runs_are(found: Comparison) -> None:
    config = found.folder / "fedavg-seed1" / "config.toml"
    tables = tomllib.loads(config.read_text())
    tables["strategy"]["note"] = "another"
    config.write_text(tomli_w.dumps(tables))
    shown = re.sub(r"<script.*?</script>", "", render(found), flags=re.DOTALL)
    closed = shown[shown.index("<summary>What all runs share") :]
    rows = dict(re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', closed))
    assert rows["rounds"] == str(tables["run"]["rounds"])
    assert (rows["nested.deep"], "note" in rows) == ("[1, 2]", False)
    assert f"<dt>rounds</dt><dd>{tables['run']['rounds']}</dd>" in shown
    for folder in found.cells["folder"]:
        assert f'<a href="./{folder}/">{folder}</a>' in shown
    assert shown.count("fedweight report FOLDER") == 1


def test_weights_of_all_strategies_are_on_one_scale(found: Comparison) -> None:
    folder = found.folder / "mine-seed0"
    text = (folder / "clients.csv").read_text()
    (folder / "clients.csv").write_text(text.replace("ok,,0.1,", "ok,,0.001,"))
    drawn = figures(render(found))
    scales = [
        spec["encoding"]["color"]["scale"]["domain"]
        for title, spec in drawn.items()
        if title in ("fedavg", "&lt;i&gt;mine&lt;/i&gt;")
    ]
    assert scales[0] == scales[1]
    assert plots.reach(Run(folder)) == scales[0][-1]


def test_runs_that_failed_are_told_and_the_rest_is_drawn(found: Comparison) -> None:
    found.cells.loc[0, ["status", "reason"]] = ["failed", "no <b>power</b>"]
    text = render(found)
    assert "failed: fedavg-seed0: no &lt;b&gt;power&lt;/b&gt;" in text
    rows = data(figures(text)["Accuracy over rounds"], "mean", "low")
    (last,) = (r for r in rows if r["strategy"] == "fedavg" and r["round"] == 3)
    assert last["mean"] == pytest.approx(0.715)


def test_over_several_data_sets_ranks_are_drawn(found: Comparison) -> None:
    """With one data set there are none."""
    assert "Over the data sets" not in render(found)
    wide = over_two(found)
    shown = render(wide)
    svg, *others = re.findall(r'class="diagram">(<svg.*?</svg>)', shown)
    assert len(others) == 2
    root = ElementTree.fromstring(svg)
    assert svg == wide.ranking().svg()
    assert "<i>mine</i> 1.00" in "".join(root.itertext())
    assert "Wilcoxon&#39;s test cannot reach 0.05 with fewer than 6" in shown
    table = shown.split("Bayesian signed ranks")[-1].split("</table>")[0]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", table)
    row = wide.signed_ranks().iloc[0]
    assert cells[:2] == ["test accuracy of the last model", "&lt;i&gt;mine&lt;/i&gt;"]
    assert float(cells[2]) == pytest.approx(row["better"], abs=1e-3)


@pytest.mark.browser
def test_it_opens_on_a_desk_on_a_phone_and_on_paper(
    found: Comparison, tmp_path: Path
) -> None:
    browser = Browser(tmp_path / "profile")
    try:
        path = over_two(found).report()
        for width in (1400, 390):
            browser.size(width)
            browser.open(path)
            assert browser.complaints == []
            assert len(browser.requests) == 1
            assert browser.ask("document.querySelectorAll('.chart svg').length") == 12
            assert browser.ask("document.querySelectorAll('.diagram svg').length") == 3
            assert browser.ask("document.documentElement.scrollWidth") == width
        browser.media("print", dark=True)
        browser.size(720)
        assert browser.ask("document.documentElement.scrollWidth") == 720
        for folded in ("details table", "details .scroll table"):
            box = f"document.querySelector('{folded}').getBoundingClientRect()"
            assert browser.ask(f"{box}.height") > 50
            assert browser.ask(f"{box}.right") <= 720
        paper = "getComputedStyle(document.querySelector('figure')).backgroundColor"
        assert browser.ask(paper) == "rgb(255, 255, 255)"
        assert browser.pdf().startswith(b"%PDF")
        assert browser.complaints == []
    finally:
        browser.close()
