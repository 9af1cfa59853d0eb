"""The report of a run: one HTML file that needs nothing but itself.

It holds no script and asks for nothing from anywhere. Its figures take their colours
from the page, so they follow the reader's light or dark mode. Nothing in it depends
on the clock: the same run gives the same bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import DataError
from ..core.extras import Imported
from ..core.texts import plain
from ..core.writing import write_whole
from .columns import TESTED
from .reader import RunFolder
from .summary import SummedRun

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    pd = Imported("pandas", "studies", "a run's folder")

_MOST_CLIENTS = 500  # rows of the table of clients
_MOST_BAD_REPLIES = 200
_MOST_ROUNDS = 200


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
    title = escape(run.name)
    return _PAGE.format(
        title=title,
        style=_STYLE,
        lead=_lead(run, summary),
        notice=_notice(summary),
        tiles=_tiles(run, summary),
        sections="\n".join(_sections(run)),
    )


def notebook_summary(run: SummedRun) -> str:
    """Return the run's key numbers and its accuracy as an HTML fragment.

    Parameters
    ----------
    run : RunFolder
        What to show.
    """
    from . import plots

    summary = run.summary()
    rows = "".join(
        f"<tr><th scope='row' style='text-align:left'>{escape(label)}</th>"
        f"<td style='text-align:right'>{value}</td></tr>"
        for label, value, _ in _key_numbers(run, summary)
    )
    try:
        figure = plots.figure_of(plots.accuracy(run))
        curve = _svg(figure, "fw", _course(run, "accuracy"), fallback=True)
    except DataError:
        curve = ""
    return (
        "<div style='display:flex;flex-wrap:wrap;gap:24px;align-items:center;"
        "background:#fff;color:#1f2933;padding:12px;border-radius:8px'>"
        f"<table><caption style='text-align:left'><b>{escape(run.name)}</b>: "
        f"{escape(run.strategy)} on {escape(run.data_set)}</caption>{rows}</table>"
        f"{_warnings(summary)}"
        f"<div style='flex:1 1 340px;max-width:480px'>{curve}</div></div>"
    )


# ---------------------------------------------------------------------- the page's top


def _lead(run: RunFolder, summary: Mapping[str, Any]) -> str:
    parts = [
        ("strategy", run.strategy),
        ("objective", _name(run, "objective") or _name(run, "client", "objective")),
        ("data", run.data_set),
        ("partition", _name(run, "partition")),
        ("model", _name(run, "model")),
        ("clients", summary["clients"]),
        ("seed", summary["seed"]),
    ]
    return "".join(
        f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in parts
        if value not in (None, "")
    )


def _name(run: RunFolder, table: str, key: str = "name") -> str:
    content = run.config.get(table)
    return str(content.get(key, "")) if isinstance(content, dict) else ""


def _notice(summary: Mapping[str, Any]) -> str:
    done, asked = summary["rounds"], summary["rounds_asked"]
    parts = _warnings(summary)
    if summary["stopped"]:
        parts = (
            f"<p class='notice'>This run stopped early, {escape(summary['stopped'])}."
            "</p>"
        ) + parts
    elif asked is not None and done < asked:
        parts = (
            f"<p class='notice'>This run stands at round {done} of {asked}. "
            "It ended early; what follows is of the rounds that ended.</p>"
        ) + parts
    return parts


def _warnings(summary: Mapping[str, Any]) -> str:
    """Return what a reader must know first, as a list."""
    lines = "".join(f"<li>{escape(line)}</li>" for line in summary["warnings"])
    return f"<ul class='notice' role='note'>{lines}</ul>" if lines else ""


def _key_numbers(
    run: RunFolder, summary: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """Return label, value and remark of what a reader wants to know first."""
    from . import plots

    numbers: list[tuple[str, str, str]] = []

    def add(label: str, value: Any, remark: str = "") -> None:
        if value is not None:
            numbers.append((label, value, remark))

    after = _after(run, "test_accuracy")
    add("Test accuracy", _percent(summary["test_accuracy"]), after)
    for column in TESTED:
        value = summary.get(column)
        label = column.capitalize().replace("_", " ")
        add(label, None if value is None else f"{value:.4g}", _after(run, column))
    averaged = summary["test_accuracies_in_mean"]
    if averaged > 1:
        every = averaged == min(10, summary["rounds"])
        add(
            f"Mean of the last {averaged} {'rounds' if every else 'tests'}",
            _percent(summary["mean_test_accuracy_last_10"]),
            "test accuracy" if every else "test accuracy, in the last 10 rounds",
        )
    spread = _percent(summary["client_accuracy_std"])
    add(
        "Clients’ mean accuracy",
        _percent(summary["client_accuracy_mean"]),
        f"standard deviation {spread}" if spread else "",
    )
    highest = _percent(summary["client_accuracy_best10"])
    tenth = "10 %"
    if _num_evaluated(run) <= plots.FEW:
        tenth = "client"
    add(
        "Worst client" if tenth == "client" else "Worst 10 % of clients",
        _percent(summary["client_accuracy_worst10"]),
        f"best {tenth}: {highest}" if highest else "",
    )
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
        _plural(summary["failed_rounds"], "failed round", "none failed"),
    )
    add("Bad replies", str(summary["bad_replies"]), "left out of the model")
    if summary["bytes_down"] or summary["bytes_up"]:
        add(
            "Traffic",
            _bytes(summary["bytes_down"] + summary["bytes_up"]),
            f"{_bytes(summary['bytes_down'])} down, {_bytes(summary['bytes_up'])} up",
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


def _tiles(run: RunFolder, summary: Mapping[str, Any]) -> str:
    return "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd>"
        f"<dd class='remark'>{escape(remark)}</dd></div>"
        for label, value, remark in _key_numbers(run, summary)
    )


# ------------------------------------------------------------------------ its sections


def _sections(run: RunFolder) -> Iterable[str]:
    from . import plots

    few = _num_evaluated(run) <= plots.FEW
    yield _section(
        "How much each client counts",
        _weights_in_words(run),
        _figure(lambda: plots.weights_heatmap(run), "weights", wide=True),
        _figure(lambda: plots.weight_vs_size(run), "size"),
        _extremes(run),
    )
    yield _section(
        "How the clients fare",
        "",
        _figure(lambda: plots.client_accuracies(run), "clients"),
        _figure(
            lambda: plots.client_accuracies_by_round(run),
            "spread",
            caption="The dark band holds the middle half of the clients, the light "
            f"one {'all of them' if few else 'the middle four fifths'}.",
        ),
    )
    yield _section(
        "Over the rounds",
        "",
        _figure(lambda: plots.accuracy(run), "accuracy", _course(run, "accuracy")),
        _figure(lambda: plots.loss(run), "loss", _course(run, "loss")),
    )
    yield _section(
        "What the method recorded",
        "",
        _figure(lambda: plots.recorded(run), "recorded", wide=True),
    )
    yield _section(
        "The clients’ data",
        "",
        _figure(lambda: plots.labels(run), "labels", wide=True),
    )
    yield _section("Bad replies and failed rounds", "", _troubles(run))
    yield _section("The clients in the last round", "", _clients_table(run))
    yield _section("The rounds", "", _rounds_table(run))
    yield _section(
        "Configuration",
        "",
        _settings(run.config),
        f"<details><summary>Environment</summary>{_settings(run.environment)}</details>"
        if run.environment
        else "",
    )


def _section(title: str, text: str, *content: str) -> str:
    inner = "".join(content)
    if not inner:
        return ""
    text = f"<p class='lede'>{text}</p>" if text else ""
    return (
        f"<section><h2>{escape(title)}</h2>{text}"
        f"<div class='grid'>{inner}</div></section>"
    )


def _weights_in_words(run: RunFolder) -> str:
    if not _has(run, "clients.csv") or run.weights_by_number.empty:
        return ""
    number = int(run.weights_by_number.index.max())
    row = pd.Series(run.weights_by_number.loc[number]).dropna()
    some = row[row != 0].sort_values(kind="stable")
    without = [int(client) for client in row[row == 0].index]
    zero = f"{escape(run.called(without))} had a weight of 0"
    if some.empty:
        return f"In round {number}, no client counted: {zero}."
    least_of, most_of = (
        escape(run.called([int(client)])) for client in (some.index[0], some.index[-1])
    )
    most, least, uniform = some.iloc[-1], some.iloc[0], 1 / len(row)
    counted = f"In round {number}, {_plural(len(some), 'client')} counted"
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


def _extremes(run: RunFolder) -> str:
    """Return a table of the clients that count most and least."""
    from . import plots

    if not _has(run, "clients.csv") or run.weights_by_number.empty:
        return ""
    number = int(run.weights_by_number.index.max())
    row = pd.Series(run.weights_by_number.loc[number]).dropna()
    row = row.sort_values(ascending=False, kind="stable")
    shares = pd.Series(plots.data_shares(run, number, row.index), index=row.index)
    frame = pd.DataFrame(
        {
            "client": row.index,
            "weight": row.to_numpy(),
            "÷ uniform": row.to_numpy() * len(row),
            "share of data": shares.to_numpy(),
            "÷ share": (row / shares.where(shares > 0)).to_numpy(),
        }
    )
    frame = _with_names(run, frame)
    if len(frame) <= 10:
        parts = [(f"Weights in round {number}", frame)]
    else:
        parts = [
            (f"The five that count most, round {number}", frame.head(5)),
            (f"The five that count least, round {number}", frame.tail(5)),
        ]
    return "<div>" + "".join(_table(name, part) for name, part in parts) + "</div>"


def _with_names(run: RunFolder, rows: pd.DataFrame) -> pd.DataFrame:
    """Put the clients' names beside their numbers, where they have names."""
    rows = rows.drop(columns="name", errors="ignore")
    if run.names:
        names = [run.names.get(int(client), "") for client in rows["client"]]
        rows.insert(list(rows.columns).index("client") + 1, "name", names)
    return rows


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


def _troubles(run: RunFolder) -> str:
    parts = []
    if "status" in run.rounds:
        failed = run.rounds[run.rounds["status"] == "failed"]
        if len(failed):
            columns = [name for name in ("round", "reason") if name in failed]
            parts.append(
                _table(
                    "Failed rounds: the global model was kept",
                    failed[columns].head(_MOST_BAD_REPLIES),
                    more=len(failed) - _MOST_BAD_REPLIES,
                )
            )
    if _has(run, "clients.csv") and len(bad := run.bad_replies):
        columns = [n for n in ("round", "client", "status", "reason") if n in bad]
        parts.append(
            _table(
                f"Bad replies: {len(bad)}, none of them in the model",
                _with_names(run, bad[columns].head(_MOST_BAD_REPLIES)),
                more=len(bad) - _MOST_BAD_REPLIES,
            )
        )
    return "".join(parts)


def _clients_table(run: RunFolder) -> str:
    if not _has(run, "clients.csv") or run.clients.empty:
        return ""
    number = run.clients["round"].max()
    rows = run.clients[run.clients["round"] == number].drop(columns="round")
    rows = rows.sort_values("client", kind="stable").dropna(axis=1, how="all")
    if "reason" in rows and (rows["reason"] == "").all():
        rows = rows.drop(columns="reason")
    return _table(
        f"Round {number}; accuracy and loss are those of its new global model on "
        "the clients’ held-out data",
        _with_names(run, rows.head(_MOST_CLIENTS)),
        more=len(rows) - _MOST_CLIENTS,
    )


def _rounds_table(run: RunFolder) -> str:
    rows = run.rounds.dropna(axis=1, how="all").drop(columns="reason", errors="ignore")
    table = _table(
        "Round 0 is before training",
        rows.tail(_MOST_ROUNDS),
        more=len(rows) - _MOST_ROUNDS,
        of="rounds.csv, from before these",
    )
    return f"<details><summary>Every round in numbers</summary>{table}</details>"


def _has(run: RunFolder, name: str) -> bool:
    return (run.folder / name).is_file()


# ------------------------------------------------------------------------------ tables


def _table(
    caption: str, frame: pd.DataFrame, more: int = 0, of: str = "clients.csv"
) -> str:
    """Return a frame as a table in a box that scrolls."""
    numeric = [pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes]
    head = "".join(
        f"<th scope='col'{_NUMBER if number else ''}>{escape(_readable(name))}</th>"
        for name, number in zip(frame.columns, numeric, strict=True)
    )
    columns = []
    for name, number in zip(frame.columns, numeric, strict=True):
        show = _show_number if number else _show_text
        mark = _NUMBER if number else ""
        columns.append([f"<td{mark}>{show(value)}</td>" for value in frame[name]])
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in zip(*columns, strict=True))
    rest = f"<p class='remark'>{more} more in {of}.</p>" if more > 0 else ""
    return (
        f"<div class='wide'><div class='scroll' role='region' tabindex='0' "
        f"aria-label='{escape(caption)}'><table><caption>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{rest}</div>"
    )


def _settings(tables: Mapping[str, Any]) -> str:
    """Return nested tables, as of TOML or JSON, as one table of settings."""
    loose = {k: v for k, v in tables.items() if not isinstance(v, Mapping)}
    groups = [("", loose)] if loose else []
    groups += [(k, dict(v)) for k, v in tables.items() if isinstance(v, Mapping)]
    bodies = []
    for name, content in groups:
        rows = "".join(
            f"<tr><th scope='row'>{escape(key)}</th><td>{escape(value)}</td></tr>"
            for key, value in _flat(content)
        )
        title = f"<tr><th colspan='2' scope='rowgroup'>{escape(name)}</th></tr>"
        bodies.append(f"<tbody>{title if name else ''}{rows}</tbody>")
    return f"<div class='wide'><table class='settings'>{''.join(bodies)}</table></div>"


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            yield f"{prefix}{key}", value
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False, default=str)


_NUMBER = " class='n'"


def _readable(name: object) -> str:
    return str(name).replace("_", " ")


def _show_number(value: Any) -> str:
    if value is None or value is pd.NA or value != value:
        return ""
    number = float(value)
    return f"{number:.0f}" if number.is_integer() else f"{number:.4g}"


def _show_text(value: Any) -> str:
    return "" if value is None or value != value else escape(plain(value))


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _plural(count: int, what: str, none: str = "") -> str:
    if count == 0 and none:
        return none
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _bytes(count: float) -> str:
    if count < 1000:
        return f"{count:.0f} B"
    power = min(int(math.log10(count) / 3), 5)
    return f"{count / 1000**power:.3g} {'kMGTP'[power - 1]}B"


# ----------------------------------------------------------------------------- figures


def _figure(
    draw: Callable[[], Axes | Figure],
    prefix: str,
    words: str = "",
    caption: str = "",
    wide: bool = False,
) -> str:
    """Return a figure with its title as text; nothing where its data are missing."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from . import plots

    try:
        drawn = draw()
    except DataError:
        return ""
    title = ""
    if isinstance(drawn, Figure):
        figure = drawn
    else:
        figure = plots.figure_of(drawn)
        for axes in (drawn, *drawn.child_axes):
            if not isinstance(axes, Axes):
                continue
            title = title or axes.get_title(loc="left")
            axes.set_title("", loc="left")
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    svg = _svg(figure, prefix, words or title or "What the method recorded, by round")
    return (
        f"<figure{' class=wide' if wide else ''}>{heading}"
        f"<div class='{'drawing broad' if wide else 'drawing'}' tabindex='0' "
        f"role='group' aria-label='{escape(title or 'Figure')}'>{svg}</div>"
        f"{note}</figure>"
    )


def _svg(figure: Figure, prefix: str, words: str, fallback: bool = False) -> str:
    """Return a figure as SVG that stands in a page: small, and in the page's colours.

    Text stays text; ids are numbered anew, so that no two figures share one. The
    fallback is for a page that does not define the colours, such as a notebook.
    """
    import warnings

    import matplotlib as mpl

    out = StringIO()
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "fedweight"}
    with mpl.rc_context(settings), warnings.catch_warnings():
        # The browser has the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(
            out,
            format="svg",
            facecolor="none",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    # A style element would hold for the whole page: its content goes to the root.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: (\d+ )?([\d.]+px)[^;\"]*", _font, text)
    text = text.replace("xlink:href", "href")
    used = dict.fromkeys(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    names = {name: f"{prefix}-{number}" for number, name in enumerate(used)}
    text = re.sub(r' id="([^"]+)"', lambda m: _id(names.get(m[1])), text)
    text = re.sub(r'(href="#|url\(#)([^")]+)', lambda m: f"{m[1]}{names[m[2]]}", text)
    text = re.sub(r">\s+<", "><", text)
    for colour, role in _ROLES.items():
        instead = f"--fw-{role},{colour}" if fallback else f"--fw-{role}"
        text = text.replace(colour, f"var({instead})")
    size = re.search(r'viewBox="[^"]*"', text)
    box = size[0] if size else ""
    label = escape(words, quote=True)
    head = (
        f'<svg {box} role="img" aria-label="{label}" stroke-linejoin="round" '
        'stroke-linecap="butt" xmlns="http://www.w3.org/2000/svg">'
    )
    return head + text[text.index(">") + 1 :].strip()


def _font(match: re.Match[str]) -> str:
    weight = f"font-weight:{match[1].strip()};" if match[1] else ""
    return f"{weight}font-size:{match[2]}"


def _id(name: str | None) -> str:
    return f' id="{name}"' if name else ""


# The colours of plots.py by their role; the page's style gives each two values.
_ROLES = {
    "#1f2933": "ink",
    "#5f6b7a": "muted",
    "#e3e7ec": "grid",
    "#fffffe": "paper",
    "#dde1e6": "missing",
    "#0b6bb1": "blue",
    "#cc4e0c": "vermilion",
    "#0b8468": "green",
}

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title} – fedweight</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{title}</h1><dl class="facts">{lead}</dl></header>
{notice}
<dl class="tiles">{tiles}</dl>
{sections}
</main>
</body>
</html>
"""

_LIGHT = """
--fw-ink:#1f2933;--fw-muted:#5f6b7a;--fw-grid:#e3e7ec;--fw-paper:#fff;
--fw-missing:#dde1e6;--fw-blue:#0b6bb1;--fw-vermilion:#cc4e0c;--fw-green:#0b8468;
--page:#f4f6f8;--line:#dfe3e8;--notice:#fff4e5;
"""

_DARK = """
--fw-ink:#e8ebef;--fw-muted:#a3adba;--fw-grid:#333b46;--fw-paper:#1b2027;
--fw-missing:#3a424d;--fw-blue:#62b0f0;--fw-vermilion:#f4915a;--fw-green:#45c9a5;
--page:#12161b;--line:#333b46;--notice:#3a2c17;
"""

_STYLE = (
    f":root{{color-scheme:light dark;{_LIGHT}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    f"@media print{{:root{{color-scheme:light;{_LIGHT}--page:#fff}}}}"
    """
*{box-sizing:border-box}
html{font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;
color:var(--fw-ink);background:var(--page)}
body{margin:0}
main{max-width:1180px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:2rem;line-height:1.2;margin:0 0 8px;overflow-wrap:anywhere}
h2{font-size:1.3rem;margin:44px 0 10px}
h3{font-size:1rem;margin:0 0 6px}
dl,dd,figure,p{margin:0}
.facts{display:flex;flex-wrap:wrap;gap:2px 20px;color:var(--fw-muted)}
.facts div{display:flex;gap:6px}
.facts dd{color:var(--fw-ink);font-weight:600}
.notice{background:var(--notice);padding:10px 16px;border-radius:8px;margin-top:20px}
ul.notice{margin-bottom:0;padding-left:36px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(220px,100%),1fr));
gap:12px;margin-top:24px}
.tiles div,figure,.scroll,.settings{background:var(--fw-paper);
border:1px solid var(--line);border-radius:10px}
.tiles div{padding:12px 16px}
.tiles dt{color:var(--fw-muted);font-size:.86rem}
.tiles dd{font-size:1.6rem;font-weight:650;line-height:1.25;
font-variant-numeric:tabular-nums}
.tiles dd.remark{font-size:.82rem;font-weight:400}
.remark{color:var(--fw-muted);font-size:.86rem}
.lede{max-width:75ch;margin-bottom:14px}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr));
gap:16px;align-items:start}
.wide,details{grid-column:1/-1;min-width:0}
figure{padding:16px 18px;min-width:0}
figcaption{color:var(--fw-muted);font-size:.86rem;margin-top:6px}
.drawing{overflow-x:auto}
.drawing svg{display:block;width:100%;height:auto}
.drawing:not(.broad) svg{max-width:620px}
.drawing svg{min-width:400px}
.drawing.broad svg{min-width:680px}
.drawing text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",
sans-serif}
.scroll{max-height:440px;overflow:auto}
table{border-collapse:collapse;font-size:.86rem}
.wide+.wide{margin-top:16px}
.settings{width:100%}
caption{text-align:left;white-space:nowrap;padding:10px 14px;
font-weight:600;font-size:.93rem}
th,td{padding:5px 14px;text-align:left;vertical-align:top;overflow-wrap:anywhere}
.scroll th,.scroll .n{white-space:nowrap}
.scroll td{overflow-wrap:break-word}
.n{text-align:right!important;font-variant-numeric:tabular-nums}
thead th{position:sticky;top:0;background:var(--fw-paper);color:var(--fw-muted);
box-shadow:inset 0 -1px var(--line)}
tbody tr+tr td,.settings tr+tr th,.settings tr+tr td{border-top:1px solid var(--line)}
.settings{border-collapse:separate;border-spacing:0}
.settings th{font-weight:400;color:var(--fw-muted);width:34%}
.settings th[colspan]{font-weight:650;color:var(--fw-ink);padding-top:14px}
summary{cursor:pointer;font-weight:600;padding:6px 0}
code{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.93em}
@media print{main{padding:0;max-width:none}.scroll{max-height:none;overflow:visible}
figure,.tiles div{break-inside:avoid}h2{break-after:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
)
