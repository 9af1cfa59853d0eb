from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedweight.core.errors import ConfigurationError, DataError
from fedweight.studies import plots, report
from fedweight.studies.plots import heat, weights
from fedweight.studies.result import Run

MakeRun = Any
DRAWN = (
    plots.over_rounds,
    plots.heatmap,
    plots.against_data,
    plots.ranked,
    plots.clients_by_round,
    plots.labels,
)


def rows(chart: Any, *fields: str) -> list[dict[str, Any]]:
    """Return the data of a chart that have these fields."""
    found = [
        values
        for values in chart.to_dict()["datasets"].values()
        if set(fields) <= set(values[0])
    ]
    assert len(found) == 1
    return list(found[0])


def encodings(chart: Any, channel: str) -> list[dict[str, Any]]:
    """Return what a channel shows in each layer of a chart that has it."""
    spec = chart.to_dict()
    layers = spec.get("layer") or spec.get("vconcat") or [spec]
    return [one["encoding"][channel] for one in layers if channel in one["encoding"]]


def title(chart: Any) -> tuple[str, str]:
    found = chart.to_dict()["title"]
    return found["text"], found.get("subtitle", "")


def test_plots_are_charts_that_are_written_without_a_browser(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = Run(make_run())
    for k, chart in enumerate(
        (
            run.plot_accuracy(),
            run.plot_loss(),
            run.plot_weights("size"),
            run.plot_weight_vs_size(1),
            run.plot_client_accuracies(),
            run.plot_client_accuracies_by_round(),
            run.plot_labels("size"),
            run.plot_recorded(),
        )
    ):
        chart.to_dict(validate=True)
        chart.save(tmp_path / f"{k}.png")
        chart.save(tmp_path / f"{k}.svg")
        assert (tmp_path / f"{k}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{k}.svg").read_text()


@pytest.mark.parametrize("draw", DRAWN)
def test_a_chart_is_the_same_each_time(make_run: MakeRun, draw: Any) -> None:
    folder = make_run()
    first, again = (json.dumps(draw(Run(folder)).to_dict()) for _ in range(2))
    assert first == again


def test_heat_map_centres_on_the_uniform_weight(make_run: MakeRun) -> None:
    chart = plots.heatmap(Run(make_run()))
    cells = rows(chart, "w")
    assert [len(row["w"]) for row in cells] == [3] * 4  # the failed round among them
    (colour,) = encodings(chart, "color")
    low, *_, high = colour["scale"]["domain"]
    assert low == -high  # the middle is log2(1): uniform
    # Client 0 held a tenth of round 1's weight, 0.4 of the uniform 1/4.
    assert cells[0]["w"][0] == 400  # thousandths
    assert [row["w"][2] for row in cells] == [None] * 4
    assert cells[0]["w"][1] is None
    assert "took no part" in title(chart)[1]


def test_heat_map_by_size_begins_with_the_largest(make_run: MakeRun) -> None:
    chart = plots.heatmap(Run(make_run()), order="size")
    assert [row["who"] for row in rows(chart, "w")] == list("3210")
    with pytest.raises(ConfigurationError, match="order must be one of"):
        plots.heatmap(Run(make_run("other")), order="sise")


def test_zero_and_negative_weights_stand_at_the_low_end(make_run: MakeRun) -> None:
    folder = make_run()
    text = (folder / "clients.csv").read_text()
    text = text.replace("ok,,0.1,", "ok,,-0.1,").replace("ok,,0.2,", "ok,,0.0,")
    (folder / "clients.csv").write_text(text)
    chart = plots.heatmap(Run(folder))
    assert [row["w"][0] for row in rows(chart, "w")][:2] == [-400, 0]
    # What is drawn of them is computed in the figure, and drawn here for once.
    import vl_convert

    drawn = vl_convert.vegalite_to_scenegraph(chart.to_dict())
    fills = [item.get("fill") for item in marks(drawn["scenegraph"], "rect")]
    assert fills.count("rgb(18, 60, 107)") == 2  # the scale's low end


def marks(scene: Any, kind: str) -> list[dict[str, Any]]:
    """Return every mark of a kind in what was drawn."""
    found = []
    if isinstance(scene, dict):
        if scene.get("marktype") == kind:
            found += scene["items"]
        for inner in scene.get("items", []):
            found += marks(inner, kind)
    return found


def test_many_cells_are_averaged() -> None:
    values = np.arange(1200 * 5, dtype=float).reshape(1200, 5)
    values[0] = np.nan
    blocks, merged, every = heat.block_means(values, 400)
    assert (merged, every) == (3, 1)
    assert blocks.shape == (400, 5)
    assert blocks[0, 0] == (5 + 10) / 2  # the gap does not count
    assert blocks[1, 0] == 20
    odd, merged, _ = heat.block_means(np.ones((501, 2)))
    assert (odd.shape, merged) == ((251, 2), 2)
    assert (odd == 1).all()
    # A row a client up to 500 clients over 200 rounds; beyond, rounds are merged.
    assert heat.block_means(np.ones((500, 200)))[1:] == (1, 1)
    assert heat.block_means(np.ones((500, 400)))[1:] == (1, 2)
    assert heat.block_means(np.ones((10, 5000)))[1:] == (1, 5)


def test_a_thinned_heat_map_says_of_whom_and_when_a_cell_is(make_run: MakeRun) -> None:
    run = Run(make_run(clients=501, rounds=1))
    chart = plots.heatmap(run)
    cells = rows(chart, "w")
    assert [cells[0]["who"], cells[-1]["who"]] == ["0 to 1", "500 to 500"]
    assert "A cell is the mean of 2 clients." in title(chart)[1]


def test_weight_vs_size_names_who_departs_from_the_diagonal(
    make_run: MakeRun,
) -> None:
    folder = make_run()
    named = [row["label"] for row in rows(plots.against_data(Run(folder)), "label")]
    assert named == [""] * 3  # shares of data, exactly: nobody
    text = (folder / "clients.csv").read_text()
    (folder / "clients.csv").write_text(text.replace("ok,,0.1,", "ok,,0.35,"))
    chart = plots.against_data(Run(folder), round=1)
    found = rows(chart, "label")
    assert [row["label"] for row in found] == ["client 0", "", "", ""]
    assert [row["kind"] for row in found[:1]] == ["counts for more than its data"]
    with pytest.raises(DataError, match="no weights of round 3"):
        plots.against_data(Run(folder), round=3)


def test_of_very_many_clients_those_that_stand_out_are_drawn(
    make_run: MakeRun,
) -> None:
    run = Run(make_run(clients=2000, rounds=1, classes=1))
    first = run.clients.index[run.clients["round"] == 1][3]
    run.clients.loc[first, "weight"] = 0.2
    chart = plots.against_data(run)
    found = rows(chart, "label")
    assert len(found) <= weights.MOST_DOTS
    assert [row["label"] for row in found if row["label"]] == ["client 3"]
    assert f"{len(found)} of the 2000 clients are drawn" in title(chart)[1]


@pytest.mark.parametrize(("clients", "who"), [(4, "client"), (12, "10 %")])
def test_worst_tenth_is_the_recorded_one_and_of_few_one_client(
    make_run: MakeRun, clients: int, who: str
) -> None:
    run = Run(make_run(clients=clients))
    assert f"Worst {who}: 40.0 %" in title(plots.ranked(run))[1]
    bands = rows(plots.clients_by_round(run), "a", "e")
    low = min(row["a"] for row in bands)
    worst = run.by_number("accuracy").min().min()
    assert low == pytest.approx(worst) if clients == 4 else low > worst
    assert {row["worst"] for row in bands} == {"0"}
    assert {row["best"] for row in bands} == {str(clients - 1)}


def test_of_what_is_better_when_less_the_largest_is_the_worst(
    make_run: MakeRun,
) -> None:
    run = Run(make_run())
    run.clients["rmse"] = run.clients["client"] + 1.0
    assert plots.client_measure(run) == "accuracy"
    ranks = rows(plots.ranked(run, "rmse"), "rank", "client")
    assert [row["client"] for row in ranks] == list("3210")
    assert {row["worst"] for row in rows(plots.clients_by_round(run, "rmse"), "a")} == {
        "3"
    }
    del run.clients["accuracy"]
    assert plots.client_measure(run) == "rmse"


@pytest.mark.parametrize("clients", [3, 30])
@pytest.mark.parametrize("order", ["number", "size"])
def test_names_are_at_the_axes_and_at_the_pointer(
    make_run: MakeRun, clients: int, order: str
) -> None:
    run = Run(make_run(clients=clients))
    names = {k: f"Ward {chr(65 + k % 26)}{k}" for k in range(clients)}
    names[1] = "$x^2$ of a very long name\x1b[2J"
    vars(run)["names"] = names
    first = names[0] if order == "number" else names[clients - 1]
    for chart, channel in (
        (plots.heatmap(run, order), "y"),
        (plots.labels(run, order), "x"),
    ):
        (axis,) = (
            found["axis"] for found in encodings(chart, channel) if found.get("axis")
        )
        assert len(axis["values"]) <= 24
        shown = json.loads(axis["labelExpr"].partition("]")[0] + "]")
        assert shown[0] == first
        if clients == 3:
            assert "$x^2$ of a very…" in shown
    whose = [row["who"] for row in rows(plots.heatmap(run, order), "w")]
    assert sorted(whose) == sorted(names.values())


def test_what_is_not_there_is_said(make_run: MakeRun) -> None:
    run = Run(make_run(weights=False, evaluated=False))
    with pytest.raises(DataError, match="'feddisco' aggregates without weights"):
        plots.heatmap(run)
    with pytest.raises(DataError, match="no client's accuracy"):
        plots.ranked(run, "accuracy")
    with pytest.raises(DataError, match="nothing of rmse"):
        plots.over_rounds(run, "rmse")
    with pytest.raises(DataError, match="nothing of personal models"):
        plots.own_models(run)
    (run.folder / "partition.csv").write_text("client,train_examples\n0,3\n")
    with pytest.raises(DataError, match="no classes"):
        plots.labels(Run(run.folder))


@pytest.mark.parametrize(("clients", "classes"), [(2, 2), (600, 100)])
def test_labels_of_few_and_of_many(
    make_run: MakeRun, clients: int, classes: int
) -> None:
    chart = plots.labels(Run(make_run(clients=clients, classes=classes, rounds=1)))
    found = rows(chart, "s")
    assert len(found) * len(found[0]["s"]) <= 40_000
    assert ("mean of 2 clients" in title(chart)[1]) == (clients > 500)
    # Shares of a client's data: together they are all of it.
    assert sum(found[0]["s"]) == pytest.approx(1, abs=0.01)


def test_an_example_may_have_several_labels(make_run: MakeRun) -> None:
    run = Run(make_run(clients=2, classes=2, rounds=1))
    text = "client,train_examples,label_0,label_1\n0,4,4,2\n1,10,1,0\n"
    (run.folder / "partition.csv").write_text(text)
    found = rows(plots.labels(Run(run.folder)), "s")
    assert [row["size"] for row in found] == [4, 10]
    assert [row["s"] for row in found] == [[1, 0.5], [0.1, 0]]


def test_other_measures_and_personal_models_are_drawn(make_run: MakeRun) -> None:
    run = Run(make_run())
    run.rounds["test_rmse"] = [4.0, 3.0, 2.0, 1.0]
    assert plots.measures(run) == ["accuracy", "loss", "rmse"]
    chart = plots.over_rounds(run, "rmse")
    assert title(chart)[0] == "RMSE over rounds"
    assert [row["value"] for row in rows(chart, "series")] == [4, 3, 2, 1]
    run.clients["personal_accuracy"] = run.clients["accuracy"] + [0.1, -0.1, 0, 0] * 4
    assert "better one for 1 of 4 clients" in title(plots.own_models(run))[1]
    (first, *_) = rows(plots.own_models(run), "client")
    assert first["own"] == pytest.approx(first["global"] + 0.1)
    assert {row["series"] for row in rows(plots.personal(run), "series")} == {
        "personal models",
        "global model",
    }
    assert list(plots.own_numbers(run)) == ["gamma", "discrepancy"]


def test_failed_rounds_are_shaded_and_say_why(make_run: MakeRun) -> None:
    chart = plots.over_rounds(Run(make_run()))
    (failed,) = rows(chart, "why")
    assert (failed["at"], failed["why"]) == (3, "too few replies")
    assert title(chart)[1] == "Grey: a round that failed."


def test_what_a_method_recorded_of_clients_is_drawn(make_run: MakeRun) -> None:
    run = Run(make_run())
    assert list(plots.own_numbers(run)) == ["gamma", "discrepancy"]
    assert title(plots.recorded(run))[0] == "gamma"
    with pytest.raises(DataError, match=r"no 'disc'.* recorded gamma and discrepancy"):
        plots.recorded(run, "disc")
    # Only the clients' numbers: most methods record no other.
    del run.rounds["gamma"]
    chart = plots.recorded(run)
    assert title(chart)[0] == "discrepancy of a client"
    points = rows(chart, "c")
    assert [row["round"] for row in points] == [1, 2, 3]
    # The clients' values are 0, 0.1, 0.2 and 0.3; in round 2 the first is missing.
    assert [row["c"] for row in points] == pytest.approx([0.15, 0.2, 0.15])


def test_shares_that_nobody_knows_are_said(make_run: MakeRun) -> None:
    run = Run(make_run())
    del run.clients["examples"]
    assert plots.against_data(run)  # The partition knows them.
    (run.folder / "partition.csv").unlink()
    run = Run(run.folder)
    del run.clients["examples"]
    with pytest.raises(DataError, match="does not say how much data"):
        plots.against_data(run)
    assert run.report().is_file()


def test_nobody_waits_for_the_plot_library_who_draws_nothing() -> None:
    code = (
        "import sys, fedweight.studies.report, fedweight.studies.runner\n"
        "print([m for m in ('altair', 'jinja2', 'vl_convert') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


GROUPS = """\
round,part,client,attribute,group,examples,accuracy,selection_rate,tpr,fpr,loss
1,held-out,,sex,f,40,0.5,0.2,0.4,0.1,0.9
1,held-out,,sex,m,60,0.7,0.5,0.8,0.2,0.6
1,held-out,0,sex,f,10,0.1,,,,2.0
2,held-out,,sex,f,40,0.6,0.3,0.5,,0.8
2,held-out,,sex,m,60,0.9,0.4,0.7,,0.5
2,test,,<i>age</i>,old,9,0.25,,,,0.7
2,test,,<i>age</i>,young,1,0.75,,,,0.1
"""


def test_groups_are_drawn_and_how_far_apart_they_are_is_told(
    make_run: MakeRun,
) -> None:
    run = Run(make_run())
    assert plots.groups.shown(run) == []
    (run.folder / "groups.csv").write_text(GROUPS)
    rates = ("accuracy", "selection_rate", "tpr", "fpr", "loss")
    assert plots.groups.shown(run) == [
        *(("test", "<i>age</i>", rate) for rate in ("accuracy", "loss")),
        *(("held-out", "sex", rate) for rate in rates),
    ]
    chart = plots.groups.over_rounds(run, "held-out", "sex", "accuracy")
    assert [row["value"] for row in rows(chart, "series")] == [0.5, 0.6, 0.7, 0.9]
    assert {row["series"] for row in rows(chart, "series")} == {"f", "m"}
    with pytest.raises(DataError, match="no tpr of <i>age</i>"):
        plots.groups.over_rounds(run, "test", "<i>age</i>", "tpr")
    tables = dict(plots.groups.last(run))
    held_out = tables["By sex, round 2, on all clients’ held-out data"]
    assert held_out["group"].tolist() == ["f", "m", "largest difference"]
    # Demographic parity: selection rates of 0.3 and 0.4; "fpr" nobody knows then.
    assert held_out["selection_rate"].tolist() == pytest.approx([0.3, 0.4, 0.1])
    assert held_out["tpr"].tolist() == pytest.approx([0.5, 0.7, 0.2])
    assert "fpr" not in held_out
    run.groups.loc[run.groups["group"] == "f", "tpr"] = np.nan
    [held_out] = [t for name, t in plots.groups.last(run) if name.startswith("By sex")]
    assert np.isnan(held_out["tpr"].iloc[-1])  # Of one group there is none.
    text = report.render(run)
    assert "Selection rate by sex" in text
    assert "By &lt;i&gt;age&lt;/i&gt;, round 2" in text
    assert "<i>" not in text


def test_losses_that_exploded_leave_a_report(make_run: MakeRun) -> None:
    run = Run(make_run())
    for column in ("loss", "accuracy", "discrepancy"):
        run.clients[column] = np.inf
    run.clients["personal_accuracy"] = np.inf
    run.rounds["test_loss"] = np.inf
    text = report.render(run)
    assert "Infinity" not in text
    with pytest.raises(DataError, match="no client's accuracy"):
        plots.ranked(run, "accuracy")
    run.clients.loc[run.clients["client"] == 1, "accuracy"] = 0.5
    assert len(rows(plots.ranked(run, "accuracy"), "rank", "client")) == 1


def test_personal_models_of_after_the_rounds_are_drawn(make_run: MakeRun) -> None:
    run = Run(make_run())
    (run.folder / "personal.csv").write_text(
        "client,status,held_out_examples,loss,accuracy,personal_loss,personal_accuracy\n"
        "0,ok,5,1,0.4,1,0.6\n1,ok,5,1,0.5,1,0.25\n2,failed,,,,,\n"
    )
    chart = plots.own_models(run)
    text, note = title(chart)
    assert text == "Own against global model, after the last round"
    assert "better one for 1 of 2 clients" in note
    assert [row["own"] for row in rows(chart, "own", "client")] == [0.6, 0.25]
    heads, *_ = report.render(run).split('class="rows">')
    assert '<button type="button">personal accuracy</button>' in heads
    run.rounds["evaluate_personal_accuracy"] = [*[np.nan] * 3, 0.425]
    assert "evaluate_personal_accuracy" not in plots.own_numbers(run)
    (tile,) = (
        tile
        for tile in report.key_numbers(run, run.summary())
        if tile["label"] == "Personal models"
    )
    assert tile["value"] == "42.5 %"
    assert tile["remark"] == "mean accuracy, after the last round"


def test_a_name_at_the_right_edge_stands_left_of_its_dot(make_run: MakeRun) -> None:
    run = Run(make_run())
    run.clients.loc[run.clients["client"] == 3, "weight"] = 0.1
    mark = plots.against_data(run).to_dict()["layer"][-1]["mark"]
    assert mark["align"]["expr"].startswith("datum.share < ")
    assert mark["align"]["expr"].endswith("? 'left' : 'right'")
