"""The report of a run: one HTML file that needs nothing but itself.

What it shows is decided here, how in the templates beside this file. Nothing in it
depends on the clock: the same run gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import DataError
from ..core.extras import Imported
from ..core.texts import in_bytes
from ..core.writing import write_whole
from . import plots
from .client_table import all_clients, extremes, with_names
from .pages import (
    Part,
    figure,
    fragment,
    more,
    page,
    plural,
    section,
    settings,
    stacked,
    table,
)
from .plots import groups
from .plots.over_rounds import called
from .plots.style import FEW
from .reader import RunFolder
from .summary import SummedRun

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = Imported("pandas", "studies", "a run's folder")

_MOST_BAD_REPLIES = 200
_MOST_ROUNDS = 200
_MOST_PANELS = 12  # of what a method recorded


def write_report(run: SummedRun) -> Path:
    """Write ``report.html`` in the run's folder, whole or not at all.

    Parameters
    ----------
    run : RunFolder
        Finished or interrupted. What was not recorded is left out.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    OutputError
        It cannot be written; one that was there still is.
    ConfigurationError
        A package is missing that writes reports.
    """
    path = run.folder / "report.html"
    write_whole(path, render(run))
    return path


def render(run: SummedRun) -> str:
    """Return the report as one HTML document.

    Parameters
    ----------
    run : RunFolder
        What to report on.
    """
    summary = run.summary()
    return page(
        "run.html",
        run.name,
        _facts(run, summary),
        _sections(run),
        notice=_notice(summary),
        warnings=summary["warnings"],
        tiles=key_numbers(run, summary),
    )


def notebook_summary(run: SummedRun) -> str:
    """Return the run's key numbers and its accuracy as an HTML fragment.

    Parameters
    ----------
    run : RunFolder
        What to show.
    """
    from .plots.style import svg

    summary = run.summary()
    measure = next(iter(plots.measures(run)), None)
    return fragment(
        "notebook.html",
        title=run.name,
        what=f"{run.strategy} on {run.data_set}",
        tiles=key_numbers(run, summary),
        warnings=summary["warnings"],
        words=_course(run, measure) if measure else "",
        drawing=svg(plots.over_rounds(run, measure)) if measure else "",
    )


# ---------------------------------------------------------------------- the page's top


def _facts(
    run: RunFolder, summary: Mapping[str, Any]
) -> Iterable[tuple[str, str | int | None]]:
    return (
        ("strategy", run.strategy),
        ("objective", _name(run, "objective") or _name(run, "client", "objective")),
        ("data", run.data_set),
        ("partition", _name(run, "partition")),
        ("model", _name(run, "model")),
        ("clients", summary["clients"]),
        ("seed", summary["seed"]),
    )


def _name(run: RunFolder, table: str, key: str = "name") -> str:
    content = run.config.get(table)
    return str(content.get(key, "")) if isinstance(content, dict) else ""


def _notice(summary: Mapping[str, Any]) -> str:
    done, asked = summary["rounds"], summary["rounds_asked"]
    if summary["stopped"]:
        return f"This run stopped early, {summary['stopped']}."
    if asked is not None and done < asked:
        return (
            f"This run stands at round {done} of {asked}. "
            "It ended early; what follows is of the rounds that ended."
        )
    return ""


def key_numbers(run: RunFolder, summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return label, value and remark of what a reader wants to know first."""
    numbers: list[dict[str, str]] = []

    def add(label: str, value: Any, remark: str = "") -> None:
        if value is not None:
            numbers.append({"label": label, "value": value, "remark": remark})

    after = _after(run, "test_accuracy")
    add("Test accuracy", _percent(summary["test_accuracy"]), after)
    averaged = summary["test_accuracies_in_mean"]
    if averaged > 1:
        every = averaged == min(10, summary["rounds"])
        add(
            f"Mean of the last {averaged} {'rounds' if every else 'tests'}",
            _percent(summary["mean_test_accuracy_last_10"]),
            "test accuracy" if every else "test accuracy, in the last 10 rounds",
        )
    for measure in plots.measures(run):
        if measure not in ("accuracy", "loss"):
            for place, whose in (("test", "on the test set"), ("evaluate", "held out")):
                values = run.measured(f"{place}_{measure}")
                if len(values):
                    remark = f"{whose}, {_after(run, f'{place}_{measure}')}"
                    add(called(measure), f"{values.iloc[-1]:.4g}", remark)
                    break
    spread = _percent(summary["client_accuracy_std"])
    add(
        "Clients’ mean accuracy",
        _percent(summary["client_accuracy_mean"]),
        f"standard deviation {spread}" if spread else "",
    )
    highest = _percent(summary["client_accuracy_best10"])
    few = _num_evaluated(run) <= FEW
    add(
        "Worst client" if few else "Worst 10 % of clients",
        _percent(summary["client_accuracy_worst10"]),
        f"best {'client' if few else '10 %'}: {highest}" if highest else "",
    )
    own = run.measured("evaluate_personal_accuracy")
    if len(own):
        after = _after(run, "evaluate_personal_accuracy")
        add("Personal models", _percent(own.iloc[-1]), f"mean accuracy, {after}")
    effective = summary["effective_clients"]
    add(
        "Effective clients",
        None if effective is None else f"{effective:.1f}",
        f"in {_when(run, 'effective_clients')}",
    )
    asked = summary["rounds_asked"]
    add(
        "Rounds",
        str(summary["rounds"]) if asked is None else f"{summary['rounds']} of {asked}",
        plural(summary["failed_rounds"], "failed round", "none failed"),
    )
    add("Bad replies", str(summary["bad_replies"]), "left out of the model")
    if summary["bytes_down"] or summary["bytes_up"]:
        add(
            "Traffic",
            in_bytes(summary["bytes_down"] + summary["bytes_up"]),
            f"{in_bytes(summary['bytes_down'])} down, "
            f"{in_bytes(summary['bytes_up'])} up",
        )
    return numbers


def _after(run: RunFolder, column: str) -> str:
    return f"after {_when(run, column)}"


def _when(run: RunFolder, column: str) -> str:
    """Say in which round something was last measured."""
    measured = run.measured(column)
    if not len(measured) or measured.index[-1] == run.rounds_done:
        return "the last round"
    return f"round {measured.index[-1]}"


def _num_evaluated(run: RunFolder) -> int:
    """Return how many clients the last evaluation was of."""
    if not _has(run, "clients.csv"):
        return 0
    accuracies = run.by_number("accuracy")
    return int(accuracies.iloc[-1].count()) if len(accuracies) else 0


# ------------------------------------------------------------------------ its sections


def _sections(run: RunFolder) -> Iterable[Part]:
    yield section(
        "How much each client counts",
        figure(partial(plots.heatmap, run), wide=True),
        figure(partial(plots.against_data, run)),
        stacked(*extremes(run)),
        text=_weights_in_words(run),
    )
    try:
        measure = plots.client_measure(run)
    except DataError:
        pass
    else:
        yield section(
            "How the clients fare",
            figure(partial(plots.ranked, run, measure)),
            figure(partial(plots.clients_by_round, run, measure)),
        )
    yield section(
        "Personal models",
        figure(partial(plots.own_models, run)),
        figure(partial(plots.personal, run)),
    )
    yield section(
        "Groups",
        *(
            figure(partial(groups.over_rounds, run, *what))
            for what in groups.shown(run)[:_MOST_PANELS]
        ),
        *(
            table(caption, frame.rename(columns=_in_words))
            for caption, frame in groups.last(run)
        ),
        text="How far apart the groups are says nothing of why they are.",
        narrow=True,
    )
    yield section(
        "Over the rounds",
        *(
            figure(partial(plots.over_rounds, run, name), _course(run, name))
            for name in plots.measures(run)
        ),
    )
    yield _recorded(run)
    yield section("The clients’ data", figure(partial(plots.labels, run), wide=True))
    yield section("Bad replies and failed rounds", *_troubles(run))
    yield section("The clients", all_clients(run))
    yield section("The rounds", _rounds_table(run))
    yield section(
        "Configuration",
        settings(run.config),
        settings(run.environment, "Environment"),
    )


def _in_words(column: str) -> str:
    return groups.RATES.get(column, column).lower()


def _recorded(run: RunFolder) -> Part:
    names = list(plots.own_numbers(run))
    rest = more(len(names) - _MOST_PANELS, "rounds.csv and clients.csv")
    return section(
        "What the method recorded",
        *(
            figure(plots.recorded(run, name), f"{name}, by round")
            for name in names[:_MOST_PANELS]
        ),
        text=rest,
        narrow=True,
    )


def _weights_in_words(run: RunFolder) -> str:
    if not _has(run, "clients.csv") or run.weights_by_number.empty:
        return ""
    number = int(run.weights_by_number.index.max())
    row = pd.Series(run.weights_by_number.loc[number]).dropna()
    some = row[row != 0].sort_values(kind="stable")
    without = [int(client) for client in row[row == 0].index]
    zero = f"{run.called(without)} had a weight of 0"
    if some.empty:
        return f"In round {number}, no client counted: {zero}."
    least_of, most_of = (
        run.called([int(client)]) for client in (some.index[0], some.index[-1])
    )
    most, least, uniform = some.iloc[-1], some.iloc[0], 1 / len(row)
    counted = f"In round {number}, {plural(len(some), 'client')} counted"
    if len(some) == 1:
        said = f"In round {number}, {most_of} alone counted, with {most:.4g}"
    elif most - least <= 1e-6 * abs(most):
        said = f"{counted}, all alike, with a weight of {most:.4g}"
    else:
        said = (
            f"{counted}: {most_of} most, with a weight of {most:.4g}, "
            f"{most / uniform:.2f} times the uniform weight {uniform:.4g}; "
            f"{least_of} least, with {least:.4g}"
        )
    return f"{said}; {zero}." if without else f"{said}."


def _course(run: RunFolder, what: str) -> str:
    """Say in words what a curve shows, for those who cannot see it."""
    words = []
    for column, name in (
        (f"test_{what}", "on the server's test set"),
        (f"evaluate_{what}", "on the clients' held-out data"),
        (f"train_{what}", "in the clients' training"),
    ):
        if column not in run.rounds:
            continue
        values = run.rounds.set_index("round")[column].dropna()
        if len(values):
            words.append(
                f"{name} from {values.iloc[0]:.3g} in round {values.index[0]} "
                f"to {values.iloc[-1]:.3g} in round {values.index[-1]}"
            )
    return f"{what.capitalize()} over rounds: {'; '.join(words)}."


def _troubles(run: RunFolder) -> Iterable[Part]:
    if "status" in run.rounds:
        failed = run.rounds[run.rounds["status"] == "failed"]
        if len(failed):
            columns = [name for name in ("round", "reason") if name in failed]
            yield table(
                "Failed rounds: the global model was kept",
                failed[columns].head(_MOST_BAD_REPLIES),
                more(len(failed) - _MOST_BAD_REPLIES, "rounds.csv"),
            )
    if _has(run, "clients.csv") and len(bad := run.bad_replies):
        columns = [n for n in ("round", "client", "status", "reason") if n in bad]
        yield table(
            f"Bad replies: {len(bad)}, none of them in the model",
            with_names(run, bad[columns].head(_MOST_BAD_REPLIES)),
            more(len(bad) - _MOST_BAD_REPLIES, "clients.csv"),
        )


def _rounds_table(run: RunFolder) -> Part:
    rows = run.rounds.dropna(axis=1, how="all").drop(columns="reason", errors="ignore")
    return table(
        "Round 0 is before training",
        rows.tail(_MOST_ROUNDS),
        more(len(rows) - _MOST_ROUNDS, "rounds.csv, from before these"),
        closed="Every round in numbers",
    )


def _has(run: RunFolder, name: str) -> bool:
    return (run.folder / name).is_file()


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"
