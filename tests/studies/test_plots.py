from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedweight.core.errors import ConfigurationError, DataError
from fedweight.studies import plots
from fedweight.studies.result import Run

MakeRun = Any
DRAWN = (
    plots.accuracy,
    plots.loss,
    plots.weights_heatmap,
    plots.weight_vs_size,
    plots.client_accuracies,
    plots.client_accuracies_by_round,
    plots.labels,
)


@pytest.mark.parametrize("draw", DRAWN)
def test_draws_in_given_axes_and_leaves_settings_alone(
    make_run: MakeRun, draw: Any
) -> None:
    run = Run(make_run())
    before = dict(mpl.rcParams)
    ax = Figure().add_subplot()
    assert draw(run, ax) is ax
    plots.figure_of(ax).canvas.draw()
    assert dict(mpl.rcParams) == before
    assert ax.get_xlabel()
    assert ax.get_ylabel()


def test_figures_show_themselves_in_a_notebook(make_run: MakeRun) -> None:
    run = Run(make_run())
    for figure in (
        run.plot_accuracy(),
        run.plot_loss(),
        run.plot_weights("size"),
        run.plot_weight_vs_size(1),
        run.plot_client_accuracies(),
        run.plot_client_accuracies_by_round(),
        run.plot_labels("size"),
        run.plot_recorded(),
    ):
        assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


def test_heat_map_centres_on_the_uniform_weight(make_run: MakeRun) -> None:
    ax = plots.weights_heatmap(Run(make_run()))
    (image,) = ax.get_images()
    cells = image.get_array()
    assert cells is not None
    assert cells.shape == (4, 3)  # clients x rounds, the failed one among them
    low, high = image.get_clim()
    assert low == -high  # the middle is log2(1): uniform
    # Client 0 held a tenth of round 1's weight, 0.4 of the uniform 1/4.
    assert cells[0, 0] == pytest.approx(np.log2(0.4))
    assert cells.mask[:, 2].all()
    assert cells.mask[0, 1]


def test_heat_map_by_size_begins_with_the_largest(make_run: MakeRun) -> None:
    ax = plots.weights_heatmap(Run(make_run()), order="size")
    assert [label.get_text() for label in ax.get_yticklabels()] == list("3210")
    with pytest.raises(ConfigurationError, match="order must be one of"):
        plots.weights_heatmap(Run(make_run("other")), order="sise")


def test_zero_and_negative_weights_stand_at_the_low_end(make_run: MakeRun) -> None:
    folder = make_run()
    text = (folder / "clients.csv").read_text()
    text = text.replace("ok,,0.1,", "ok,,-0.1,").replace("ok,,0.2,", "ok,,0.0,")
    (folder / "clients.csv").write_text(text)
    (image,) = plots.weights_heatmap(Run(folder)).get_images()
    cells = image.get_array()
    assert cells is not None
    assert list(cells[:2, 0]) == [image.get_clim()[0]] * 2


def test_many_cells_are_averaged() -> None:
    values = np.arange(1200 * 5, dtype=float).reshape(1200, 5)
    values[0] = np.nan
    blocks, rows, columns = plots._block_means(values)
    assert (rows, columns) == (3, 1)
    assert blocks.shape == (400, 5)
    assert blocks[0, 0] == (5 + 10) / 2  # the gap does not count
    assert blocks[1, 0] == 20
    odd, rows, _ = plots._block_means(np.ones((401, 2)))
    assert (odd.shape, rows) == ((201, 2), 2)
    assert (odd == 1).all()


def test_weight_vs_size_names_who_departs_from_the_diagonal(
    make_run: MakeRun,
) -> None:
    folder = make_run()
    ax = plots.weight_vs_size(Run(folder))  # shares of data, exactly: nobody
    assert [text.get_text() for text in ax.texts] == []
    text = (folder / "clients.csv").read_text()
    (folder / "clients.csv").write_text(text.replace("ok,,0.1,", "ok,,0.35,"))
    ax = plots.weight_vs_size(Run(folder), round=1)
    assert [text.get_text() for text in ax.texts] == ["client 0"]
    with pytest.raises(DataError, match="no weights of round 3"):
        plots.weight_vs_size(Run(folder), round=3)


@pytest.mark.parametrize(("clients", "who"), [(4, "client"), (12, "10 %")])
def test_worst_tenth_is_the_recorded_one_and_of_few_one_client(
    make_run: MakeRun, clients: int, who: str
) -> None:
    run = Run(make_run(clients=clients))
    ax = plots.client_accuracies(run)
    assert f"worst {who}: 40.0 %" in [text.get_text() for text in ax.texts]
    ax = plots.client_accuracies_by_round(run)
    ends = {text.get_text() for text in ax.texts}
    assert ends == {f"worst {who}", "median client", f"best {who}"}
    low = min(path.vertices[:, 1].min() for path in ax.collections[0].get_paths())
    worst = run.by_number("accuracy").min().min()
    assert low == pytest.approx(worst) if clients == 4 else low > worst


@pytest.mark.parametrize("clients", [3, 30])
@pytest.mark.parametrize("order", ["number", "size"])
def test_names_are_at_the_axes(make_run: MakeRun, clients: int, order: str) -> None:
    run = Run(make_run(clients=clients))
    names = {k: f"Ward {chr(65 + k % 26)}{k}" for k in range(clients)}
    names[1] = "$x^2$ of a very long name\x1b[2J"
    vars(run)["names"] = names
    first = names[0] if order == "number" else names[clients - 1]
    for axis in (
        plots.weights_heatmap(run, order=order).yaxis,
        plots.labels(run, order=order).xaxis,
    ):
        shown = [label.get_text() for label in axis.get_ticklabels()]
        assert shown[0] == first
        assert len(shown) <= 20
        if clients == 3:
            assert r"\$x^2\$ of a very…" in shown
        figure = plots.figure_of(axis.axes)
        figure.savefig(io.BytesIO())  # Nothing is taken for a formula.


def test_what_is_not_there_is_said(make_run: MakeRun) -> None:
    run = Run(make_run(weights=False, evaluated=False))
    with pytest.raises(DataError, match="'feddisco' aggregates without weights"):
        plots.weights_heatmap(run)
    with pytest.raises(DataError, match="no client's accuracy"):
        plots.client_accuracies(run)
    (run.folder / "partition.csv").write_text("client,train_examples\n0,3\n")
    with pytest.raises(DataError, match="no classes"):
        plots.labels(Run(run.folder))


def test_class_names_with_dollars_are_no_formulas(make_run: MakeRun) -> None:
    run = Run(
        make_run(class_names=["$<50k$", "$\\frac", "a name too long to be shown"])
    )
    ax = plots.labels(run)
    plots.figure_of(ax).canvas.draw()
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names[0] == r"\$<50k\$"
    assert names[2] == "a name too long…"


@pytest.mark.parametrize(("clients", "classes"), [(2, 2), (450, 100)])
def test_labels_of_few_and_of_many(
    make_run: MakeRun, clients: int, classes: int
) -> None:
    ax = plots.labels(Run(make_run(clients=clients, classes=classes, rounds=1)))
    plots.figure_of(ax).canvas.draw()
    assert ("mean of 2 clients" in ax.get_xlabel()) == (clients > 400)


@pytest.mark.parametrize(("clients", "classes", "rounds"), [(1, 2, 1), (20, 3, 20)])
@pytest.mark.parametrize("draw", [*DRAWN, plots.recorded])
def test_nothing_is_cut_off(
    make_run: MakeRun, draw: Any, clients: int, classes: int, rounds: int
) -> None:
    run = Run(make_run(clients=clients, classes=classes, rounds=rounds))
    if clients == 20:
        vars(run)["names"] = {k: f"Hospital {k}" for k in range(clients)}
    drawn = draw(run)
    figure = drawn if isinstance(drawn, Figure) else plots.figure_of(drawn)
    canvas = FigureCanvasAgg(figure)
    for _ in range(2):  # Drawn again, it is laid out again.
        canvas.draw()
        width, height = figure.get_size_inches()
        box = figure.get_tightbbox(canvas.get_renderer())
        assert min(box.x0, box.y0) > -0.03
        assert box.x1 < width + 0.03
        assert box.y1 < height + 0.03


def test_what_a_method_recorded_of_clients_is_drawn(make_run: MakeRun) -> None:
    run = Run(make_run())
    titles = [axes.get_title(loc="left") for axes in plots.recorded(run).axes]
    assert titles == ["gamma", "discrepancy of a client"]
    # Only the clients' numbers: most methods record no other.
    del run.rounds["gamma"]
    (axes, _) = plots.recorded(run).axes
    assert axes.get_title(loc="left") == "discrepancy of a client"
    (line,) = axes.get_lines()
    assert line.get_xdata().tolist() == [1, 2, 3]
    # The clients' values are 0, 0.1, 0.2 and 0.3; in round 2 the first is missing.
    assert line.get_ydata().tolist() == pytest.approx([0.15, 0.2, 0.15])


def test_more_than_can_be_drawn_is_said(make_run: MakeRun) -> None:
    run = Run(make_run())
    for number in range(20):
        run.clients[f"own_{number}"] = 1.0
    figure = plots.recorded(run)
    assert sum(axes.get_visible() for axes in figure.axes) == 12
    assert figure.get_supxlabel() == "10 more in rounds.csv and clients.csv"


def test_shares_that_nobody_knows_are_said(make_run: MakeRun) -> None:
    run = Run(make_run())
    del run.clients["examples"]
    assert plots.weight_vs_size(run)  # The partition knows them.
    (run.folder / "partition.csv").unlink()
    run = Run(run.folder)
    del run.clients["examples"]
    with pytest.raises(DataError, match="does not say how much data"):
        plots.weight_vs_size(run)
    assert run.report().is_file()


def test_names_at_line_ends_keep_apart(make_run: MakeRun) -> None:
    ax = Figure(figsize=(5, 3)).add_subplot()
    ax.set_ylim(0, 1)
    plots._label_ends(ax, [(1.0, "a", "k"), (0.99, "b", "k"), (0.98, "c", "k")])
    places = sorted(text.xy[1] for text in ax.texts)  # type: ignore[attr-defined]
    assert np.diff(places).min() > 0.05
    assert places[-1] <= 1.0
