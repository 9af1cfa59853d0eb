from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from fedweight.errors import ConfigurationError, DataError
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


def test_worst_tenth_is_the_recorded_one(make_run: MakeRun) -> None:
    ax = plots.client_accuracies(Run(make_run()))
    assert "worst 10 %: 40.0 %" in [text.get_text() for text in ax.texts]


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


def test_names_at_line_ends_keep_apart(make_run: MakeRun) -> None:
    ax = Figure(figsize=(5, 3)).add_subplot()
    ax.set_ylim(0, 1)
    plots._label_ends(ax, [(1.0, "a", "k"), (0.99, "b", "k"), (0.98, "c", "k")])
    places = sorted(text.xy[1] for text in ax.texts)  # type: ignore[attr-defined]
    assert np.diff(places).min() > 0.05
    assert places[-1] <= 1.0
