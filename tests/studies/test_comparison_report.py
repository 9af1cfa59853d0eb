from __future__ import annotations

import html
import json
import math
import re
import tomllib
from collections.abc import Mapping
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
    SUMMARY_COLUMNS,
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
        r"<figure[^>]*><h3>(.*?)</h3>.*?class=\"spec\">(.*?)</script>", text, re.DOTALL
    )
    return {title: json.loads(spec) for title, spec in found}


def table_of(text: str, caption: str) -> list[list[str]]:
    """Return the rows of a page's table, the header's first."""
    at = html.unescape(text).split(f'<p class="caption">{caption}</p>')[1]
    rows = at.split("</table>")[0].split("<tr>")[1:]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


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
    assert shown.index(found.cautions[0]) < shown.index("What differs for real")


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
    shown = table_of(text, "Test accuracy of the last model")
    header, first, mine = shown
    assert header == [
        *("strategy", "verdict", "runs", "mean", "95% interval"),
        *("difference", "95% interval", "p", "Holm p", "Wilcoxon p"),
    ]
    row = summary.iloc[1]
    assert first[:3] == ["fedavg", "baseline", "3"]
    assert first[5:] == [""] * 5
    assert mine == [
        *("<i>mine</i>", f"{'* ' * (row['verdict'] == 'better')}{row['verdict']}", "3"),
        *(f"{row['mean']:.4f}", f"{row['low']:.4f} to {row['high']:.4f}"),
        f"{row['difference']:+.4f}",
        f"{row['difference_low']:+.4f} to {row['difference_high']:+.4f}",
        *(f"{row['p']:.4f}", f"{row['p_holm']:.4f}", "cannot reach"),
    ]
    assert f" {row['difference']:+.4f} " in str(found)
    noise = summary["difference"].where(summary["difference"].isna(), -3.7e-17)
    vars(found)["summary"] = summary.assign(difference=noise)
    assert table_of(render(found), "Test accuracy of the last model")[2][5] == "+0.0000"


def test_numbers_of_a_column_have_as_many_decimals(found: Comparison) -> None:
    means = [1234.5, 1200.25]
    summary = found.summary.iloc[:2].assign(
        metric="test_rmse", mean=means, low=math.nan, p=[math.nan, 1e-7]
    )
    vars(found)["summary"] = summary
    shown = table_of(
        render(found), "Rmse of the last model on the test set (less is better)"
    )
    assert [row[3] for row in shown[1:]] == ["1234", "1200"]
    assert shown[2][7] == "< 0.0001"
    vars(found)["summary"] = summary.assign(mean=[12.5, 1.0])
    shown = table_of(
        render(found), "Rmse of the last model on the test set (less is better)"
    )
    assert [row[3] for row in shown[1:]] == ["12.50", "1.00"]


def test_winners_are_marked_only_where_the_test_says_so(found: Comparison) -> None:
    text = render(found)
    verdicts = found.summary["verdict"].tolist()
    assert "better" in verdicts
    assert text.count("<td>* better</td>") == verdicts.count("better")
    legend = "* better than fedavg: p is at most 0.05."
    before, _, after = text.partition(legend)
    assert "<td>* better</td>" not in before
    assert legend not in after
    assert str(found).count(legend) == 1
    vars(found)["summary"] = found.summary.assign(verdict="undecided")
    for shown in (render(found), str(found)):
        assert "* " not in re.sub(
            r"<(script|style).*?</\1>", "", shown, flags=re.DOTALL
        )


def of_metrics(found: Comparison, values: Mapping[str, Mapping[str, Any]]) -> None:
    """Let a comparison have measured this: values by seed, by strategy and metric."""
    cells: list[dict[str, Any]] = [
        {
            **{"strategy": name, "data": "digits", "seed": seed, "chosen": 1},
            **{"status": "complete", "failed_rounds": 0},
            **{metric: numbers[seed] for metric, numbers in own.items()},
        }
        for name, own in values.items()
        for seed in range(6)
    ]
    plan = {"strategies": [*values], "data-sets": ["digits"], "seeds": [*range(6)]}
    vars(found)["_plan"] = plan
    frame = pd.DataFrame(summary_of(cells), columns=list(SUMMARY_COLUMNS))
    words = ("against", "verdict", "wilcoxon_verdict", "sentence", "chosen", "note")
    vars(found)["summary"] = frame.fillna(dict.fromkeys(words, ""))


FLAT, UP = [0.5 + 0.01 * k for k in range(6)], [0.6 + 0.011 * k for k in range(6)]
NOISE = [value + 0.02 * (-1) ** k for k, value in enumerate(FLAT)]


def test_it_names_all_that_is_told_apart_and_nothing_else(found: Comparison) -> None:
    """The figure of merit first; of a gap it says what came with it."""
    gap = "accuracy_gap"
    of_metrics(
        found,
        {
            "fedavg": {"test_accuracy": UP, gap: UP, "client_accuracy_mean": FLAT},
            "low": {"test_accuracy": FLAT, gap: FLAT, "client_accuracy_mean": NOISE},
            "b": {"test_accuracy": UP, gap: UP, "client_accuracy_mean": NOISE},
            "c": {"test_accuracy": UP, gap: NOISE, "client_accuracy_mean": UP},
        },
    )
    title = METRICS["test_accuracy"].title
    worse, same, clients, narrow, lines = found.verdicts
    assert worse.startswith(f"low is worse than fedavg in the {title}: -0.1")
    assert same == (
        f"b and c are the same as fedavg in the {title}: not one of 6 pairs differs."
    )
    assert clients.startswith("c is better than fedavg in the mean of the clients'")
    said = (
        "is better than fedavg in the gap in accuracy between groups (less is better)"
    )
    assert narrow.startswith(f"low {said}: -0.1")
    row = found.summary[found.summary["metric"] == gap].iloc[1].to_dict()
    beside = found.accuracy_beside(row)
    assert beside.startswith("accuracy worse: -0.1025 (")
    assert narrow.endswith(f"; {beside}.")
    assert lines.startswith(f"c {said}: ")
    text = html.unescape(render(found))
    assert "Gap in accuracy between groups (less is better)</p>" in text
    assert text.count('class="verdict"') == 5
    # The table says it, too.
    assert f'<p class="remark">low: {beside}. c: accuracy same: +0.0000 (' in text


def test_an_interval_beside_undecided_contradicts_nothing(found: Comparison) -> None:
    """It is of one comparison, where the p that decides is of all of them."""
    near = [v + 0.01 + 0.008 * (-1) ** k for k, v in enumerate(FLAT)]
    others = {f"n{k}": {"test_accuracy": NOISE} for k in range(4)}
    fedavg, some = {"test_accuracy": FLAT}, {"test_accuracy": near}
    of_metrics(found, {"fedavg": fedavg, "near": some, **others})
    row = found.summary.set_index("strategy").loc["near"]
    assert row["difference_low"] > 0
    assert row["p"] < 0.05 < row["p_holm"]
    assert row["sentence"] == (
        f"undecided: {row['difference']:+.4f}, by itself 95% interval "
        f"{row['difference_low']:+.4f} to {row['difference_high']:+.4f} and p = "
        f"{row['p']:.3g}, but corrected p = {row['p_holm']:.3g} (6 pairs, Holm over 5 "
        "comparisons)"
    )
    (said,) = found.verdicts
    assert said == (
        "No strategy is told apart from fedavg in the "
        f"{METRICS['test_accuracy'].title}."
    )
    of_metrics(found, {"fedavg": fedavg, "near": some})
    assert ", 95% interval +0.0" in found.verdicts[0]
    assert "by itself" not in found.verdicts[0]


def test_it_says_what_the_tests_speak_of(found: Comparison) -> None:
    """Of each metric by itself, of these data, and of one comparison or all."""
    for shown in (str(found), html.unescape(render(found))):
        assert "Each of the 3 metrics is tested by itself." in shown
        assert (
            "The more metrics there are, the likelier one of them differs by" in shown
        )
        assert "Seeds redraw splits of the same data, the first model and who" in shown
        assert "Holm's" not in shown
    names = {name: {"test_accuracy": FLAT} for name in ("fedavg", "a", "b")}
    of_metrics(found, names)
    for shown in (str(found), html.unescape(render(found))):
        assert "test's at 0.05 by Holm's p over 2 comparisons; Wilcoxon's" in shown
        assert "each of one comparison alone, as p is; Holm's p decides" in shown
        assert "metrics is tested by itself" not in shown


def test_it_begins_with_who_differs_and_how_sure_that_is(found: Comparison) -> None:
    rows = found.summary[found.summary["metric"] == "test_accuracy"]
    numbers = rows["sentence"].iloc[1].removeprefix("better: ")
    title = METRICS["test_accuracy"].title
    said = f"<i>mine</i> is better than fedavg in the {title}: {numbers}."
    assert found.verdicts[0] == said
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
    first, third = found.verdicts
    assert first == f"No strategy is told apart from fedavg in the {title}."
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
    above = text[: text.index("What differs for real")]
    assert "failed: fedavg-seed0: no &lt;b&gt;power&lt;/b&gt;" in above
    assert found.warnings
    assert all(line in html.unescape(above) for line in found.warnings)
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


BEYOND = """[...document.querySelectorAll('.chart svg')].filter(svg =>
  [...svg.querySelectorAll('PART')].some(one =>
    one.getBoundingClientRect().right > svg.getBoundingClientRect().right + 1)
).length"""
SCROLLED = """[...document.querySelectorAll('.even')].map(table => {
  const box = table.parentElement;
  const more = box.scrollWidth - box.clientWidth;
  box.scrollLeft = more;
  const cell = table.rows[1].cells[0].getBoundingClientRect();
  const moved = cell.left - box.getBoundingClientRect().left;
  box.scrollLeft = 0;
  return [more, moved];
})"""
BROKEN = """[...document.querySelectorAll('.even tr')].flatMap(row => {
  const words = [...row.cells].slice(1, 9);
  return words.filter(cell => {
    const all = document.createRange();
    all.selectNodeContents(cell);
    return new Set([...all.getClientRects()].map(one => one.top)).size > 1;
  }).map(cell => cell.textContent);
}).filter(text => !text.includes(' '))"""


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
            # Nothing of a legend, or of a name beside an axis, is cut off.
            for part in (".role-legend", ".role-axis-label"):
                assert browser.ask(BEYOND.replace("PART", part)) == 0
            scrolled = browser.ask(SCROLLED)
            assert len(scrolled) == 11
            for more, moved in scrolled:
                # On a desk all columns are seen; on a phone the first one stays.
                assert (more > 0) is (width == 390)
                assert abs(moved) < 1.5
        browser.media("print", dark=True)
        browser.size(720)
        assert browser.ask("document.documentElement.scrollWidth") == 720
        for folded in ("details table", "details .scroll table"):
            box = f"document.querySelector('{folded}').getBoundingClientRect()"
            assert browser.ask(f"{box}.height") > 50
            assert browser.ask(f"{box}.right") <= 720
        assert browser.ask(BROKEN) == []
        paper = "getComputedStyle(document.querySelector('figure')).backgroundColor"
        assert browser.ask(paper) == "rgb(255, 255, 255)"
        assert browser.pdf().startswith(b"%PDF")
        assert browser.complaints == []
    finally:
        browser.close()
