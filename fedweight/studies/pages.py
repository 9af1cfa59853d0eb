"""Pages of HTML that need nothing but themselves: from templates, with live figures.

A page holds what it shows as data and one script that draws it; it asks for nothing
from anywhere, and its policy lets no other script run. Its figures take their colours
from the page, so they follow the reader's light or dark mode. The same content gives
the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..core.errors import ConfigurationError, DataError, OutputError
from ..core.extras import Imported, require
from ..core.paths import cache_folder
from ..core.texts import plain
from ..core.writing import write_whole
from .plots import style

if TYPE_CHECKING:
    import jinja2
    import pandas as pd
    import vl_convert
else:
    jinja2 = Imported("jinja2", "studies", "a report")
    vl_convert = Imported("vl_convert", "studies", "a report")
    pd = Imported("pandas", "studies", "a run's folder")

Part = dict[str, Any]

log = logging.getLogger("fedweight")

NEEDED = ("altair", "jinja2", "vl_convert")

# The colours of figures by their role; the page's style gives each two values.
ROLES = {
    style.INK: "ink",
    style.MUTED: "muted",
    style.GRID: "grid",
    style.PAPER: "paper",
    style.BLUE: "blue",
    style.VERMILION: "vermilion",
    style.GREEN: "green",
    style.VIOLET: "violet",
    style.OCHRE: "ochre",
}


def page(
    template: str,
    title: str,
    facts: Iterable[tuple[str, Any]],
    sections: Iterable[Part],
    **more: Any,
) -> str:
    """Return a page as one HTML document.

    Parameters
    ----------
    template : str
        Its file among the templates.
    title : str
        The page's.
    facts : iterable of (str, object)
        What stands below the title; what is empty is left out.
    sections : iterable of dict
        What :func:`section` returns, best made as they are asked for; those without
        parts are left out.
    **more
        What the template takes besides.

    Raises
    ------
    ConfigurationError
        A package is missing that writes reports.
    """
    templates = check_pages()
    with _unchecked():
        shown = [part for part in sections if part["parts"]]
    figures = any(p["kind"] == "figure" for s in shown for p in s["parts"])
    scripts = [_runtime()] if figures else []
    scripts.append((templates / "report.js").read_text("utf-8"))
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    return (
        _environment(templates)
        .get_template(template)
        .render(
            title=title,
            facts=[(name, value) for name, value in facts if value not in (None, "")],
            sections=shown,
            has_figures=figures,
            scripts=scripts,
            policy=f"default-src 'none'; script-src {hashes}; "
            "style-src 'unsafe-inline'; img-src data:",
            **more,
        )
    )


def fragment(template: str, **content: Any) -> str:
    """Return what a template makes, for a notebook."""
    return _environment(check_pages()).get_template(template).render(**content)


class Reported(Protocol):
    """What has a report: a run, or a comparison."""

    def report(self) -> Path:
        """Write it."""


def report_or_say(found: Reported) -> bool:
    """Write the report at an end; without what it needs say so, and go without.

    Returns
    -------
    bool
        Whether it was written.
    """
    try:
        check_pages()
    except ConfigurationError as missing:
        log.warning("no report.html is written: %s", missing)
        return False
    found.report()
    return True


def check_pages() -> Path:
    """Return the folder of the templates.

    Raises
    ------
    ConfigurationError
        What a page needs is not installed.
    """
    require("a report", "studies", *NEEDED)
    # What Flower ships of an app holds no templates; the package installed beside does.
    beside = [Path(place, "fedweight", "studies") for place in sys.path]
    for place in (Path(__file__).parent, *beside):
        if (place / "templates" / "base.html").is_file():
            return place / "templates"
    raise ConfigurationError(
        "a report needs its templates, which are not in what Flower ships of an app. "
        "Install fedweight[studies] on this machine."
    )


def _unchecked() -> AbstractContextManager[None]:
    """Let Altair make charts without holding each part of them to its schema.

    That takes a third of a report's time, and the tests do it.
    """
    from altair.utils.schemapi import debug_mode

    return debug_mode(False)


@cache
def _environment(templates: Path) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["breakable"] = _breakable
    environment.policies["json.dumps_kwargs"] = {
        **{"separators": (",", ":"), "ensure_ascii": False, "allow_nan": False},
    }
    return environment


def _breakable(text: str) -> str:
    """Return a text that a narrow column breaks where a name's parts meet."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([:+=])", r"\1<wbr>", str(escape(text))))


@cache
def _runtime() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script.

    Putting it together takes a second or two, so this machine keeps it.
    """
    kept = cache_folder() / f"vega-{version('vl-convert-python')}.js"
    with suppress(OSError, ValueError):
        digest, _, script = kept.read_text("utf-8").partition("\n")
        if digest == _sha256(script):
            return script
    script = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    # Within a script's element these would end it, or begin a comment.
    script = script.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    with suppress(OSError, OutputError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, f"{_sha256(script)}\n{script}", shared=True)
    return script


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# ------------------------------------------------------------------------------- parts


def section(
    title: str, *parts: Part | None, text: str = "", narrow: bool = False
) -> Part:
    """Return a section of a page; parts that are not there are left out.

    Parameters
    ----------
    title, text : str
        Its heading, and a sentence or two below.
    *parts : dict, optional
        What it shows.
    narrow : bool
        Whether three stand side by side, not two.
    """
    shown = [part for part in parts if part is not None]
    return {"title": title, "text": text, "parts": shown, "narrow": narrow}


def stacked(*parts: Part) -> Part | None:
    """Return parts that stand one below the other, beside a figure."""
    return {"kind": "column", "parts": parts} if parts else None


def figure(chart: Any, words: str = "", wide: bool = False) -> Part | None:
    """Return a chart as a part of a page; ``None`` where its data are missing.

    Parameters
    ----------
    chart : Chart or partial
        A figure, or what returns it, or raises ``DataError``.
    words : str
        What it shows, for those who cannot see it; by default its title.
    wide : bool
        Whether it takes the page's whole width.
    """
    try:
        chart = chart() if isinstance(chart, partial) else chart
    except DataError:
        return None
    spec = chart.to_dict(validate=False)
    title = spec.pop("title")
    data = spec.pop("datasets", {})
    spec.pop("$schema")
    spec.pop("background")
    views = spec.get("vconcat", [spec])
    return {
        "kind": "figure",
        "title": title["text"],
        "note": title.get("subtitle", ""),
        "words": words or title["text"],
        "wide": wide,
        "height": sum(view["height"] for view in views) + 60,
        "spec": {**_by_role(spec), "datasets": data},
    }


class Drawn(Protocol):
    """What draws itself, such as a ranking."""

    @property
    def note(self) -> str:
        """What a reader must know."""

    def svg(self) -> str:
        """Return it as SVG, in the colour of the text around."""


def diagram(title: str, drawn: Drawn) -> Part:
    """Return what draws itself as a part of a page; it needs no script."""
    return {"kind": "diagram", "title": title, "svg": drawn.svg(), "note": drawn.note}


def _by_role(value: Any) -> Any:
    """Return a specification with the page's colours in place of its own."""
    if isinstance(value, str):
        return f"var(--fw-{ROLES[value]})" if value in ROLES else value
    if isinstance(value, Mapping):
        return {key: _by_role(inner) for key, inner in value.items()}
    return [_by_role(inner) for inner in value] if isinstance(value, list) else value


def table(
    caption: str,
    frame: pd.DataFrame,
    rest: str = "",
    closed: str = "",
    folders: str | None = None,
    *,
    widths: Sequence[float] = (),
    right: Collection[str] = (),
) -> Part:
    """Return a frame as a table in a box that scrolls.

    Parameters
    ----------
    caption : str
        What it holds.
    frame : DataFrame
        Its columns' names and values.
    rest : str
        What is left out.
    closed : str
        What to click to see it; empty: it is open.
    folders : str, optional
        The column that names folders beside the page, which become links.
    widths : sequence of float
        Of the columns in percent, so that several tables have theirs at the same
        places; the first then stays where others are scrolled. By default as wide as
        what they hold.
    right : collection of str
        Columns of texts that are numbers, and stand as these do.
    """
    columns, values = _columns(frame, right)
    columns = [
        {**one, "number": one["number"] or name in right, "folder": name == folders}
        for one, name in zip(columns, map(str, frame), strict=True)
    ]
    texts = [["" if value is None else _told(value) for value in row] for row in values]
    return {
        **{"kind": "table", "caption": caption, "rest": rest, "closed": closed},
        **{"columns": columns, "rows": texts, "live": False, "widths": widths},
    }


def listing(title: str, lines: Sequence[str]) -> Part | None:
    """Return lines that say how something is to be read."""
    return {"kind": "listing", "title": title, "lines": lines} if lines else None


def live_table(caption: str, frame: pd.DataFrame, rest: str = "") -> Part:
    """Return a frame as a table that a reader sorts and searches."""
    columns, values = _columns(frame)
    return {
        **{"kind": "table", "caption": caption, "rest": rest, "closed": ""},
        **{"columns": columns, "rows": values, "live": True, "widths": ()},
    }


def _columns(
    frame: pd.DataFrame, right: Collection[str] = ()
) -> tuple[list[Part], list[list[Any]]]:
    columns, values = [], []
    for name, kind in frame.dtypes.items():
        is_number = pd.api.types.is_numeric_dtype(kind)
        called = str(name).replace("_", " ").strip()
        columns.append({"name": called, "number": is_number})
        # A number's own sign is nothing that a spreadsheet would compute.
        show = _number if is_number else str if name in right else _text
        values.append([show(value) for value in frame[name]])
    return columns, [list(row) for row in zip(*values, strict=True)]


def _number(value: Any) -> Any:
    if value is pd.NA or value is None or value != value:
        return None
    if isinstance(value, int | float) and abs(value) < 2**53:
        return style.short(value, 4)
    return _number(value.item()) if hasattr(value, "item") else str(value)


def _text(value: Any) -> str:
    return "" if value is None or value != value else plain(value)


def _told(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def settings(tables: Mapping[str, Any], closed: str = "") -> Part | None:
    """Return nested tables, as of TOML or JSON, as one table of settings."""
    loose = {k: v for k, v in tables.items() if not isinstance(v, Mapping)}
    groups = [("", list(_flat(loose)))] if loose else []
    groups += [(k, list(_flat(v))) for k, v in tables.items() if isinstance(v, Mapping)]
    return {"kind": "settings", "groups": groups, "closed": closed} if groups else None


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            yield f"{prefix}{key}", value
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False, default=str)


def plural(count: int, what: str, none: str = "") -> str:
    """Return how many there are of something, in words.

    Examples
    --------
    >>> plural(1, "round"), plural(2, "round"), plural(0, "round", "no round")
    ('1 round', '2 rounds', 'no round')
    """
    if count == 0 and none:
        return none
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def more(count: int, where: str) -> str:
    """Say where the rest of a table is, if there is one."""
    return f"{count} more in {where}." if count > 0 else ""
