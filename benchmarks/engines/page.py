"""What the README says of a GPU, from the rows of ``gpu.py``."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .cases import Case, all_cases, rounds
from .results import Row

# The columns of the table of whole rounds; where several cases are of one, the best.
ENGINES: dict[str, Callable[[Case], bool]] = {
    "loop of PyTorch": lambda case: case.engine == "floor",
    "Flower": lambda case: case.engine == "flwr",
    "pfl": lambda case: case.engine == "pfl",
    "JAX by hand": lambda case: case.engine == "jax",
    "local, auto": lambda case: case.engine == "local" and case.plan == "auto",
    "local, by hand": lambda case: case.engine == "local" and case.plan != "auto",
    "Ray": lambda case: case.engine == "ray",
}

BOUNDS = ("launches", "memory", "arithmetic")


def section(content: Mapping[str, Any]) -> list[str]:
    """Return the README's lines on what was measured."""
    rows = {row["row"]: row for row in content["rows"]}
    days = ", ".join(sorted({row["date"] for row in rows.values()}))
    caption = (
        f"On {content['device'].removeprefix('cuda, ')} and {content['machine']}, "
        f"client updates a second, {days}, by `python benchmarks/gpu.py`:"
    )
    lines = [textwrap.fill(caption, 88, break_on_hyphens=False), ""]
    lines += speeds(rows)
    times = quick_starts(rows)
    if times:
        lines += ["", "Seconds of the quick start's ten rounds:", "", *times]
    facts = [
        textwrap.fill(f"* {fact}", 88, subsequent_indent="  ") for fact in said(rows)
    ]
    return [*lines, *(["", *facts] if facts else [])]


def speeds(rows: Mapping[str, Row]) -> list[str]:
    """Return the table of whole rounds: a line for each work."""
    lines = ["| | " + " | ".join(ENGINES) + " |", "| --- " * (len(ENGINES) + 1) + "|"]
    whole = [
        case
        for case in all_cases()
        if (case.kind, case.strategy, case.device) == ("rounds", "fedavg", "card")
    ]
    works = {case.work for case in whole}
    for work in sorted(
        works, key=lambda name: ("SMGL".index(name[0]), len(name), name)
    ):
        cells = []
        for wanted in ENGINES.values():
            names = [c.name for c in whole if c.work == work and wanted(c)]
            found = [rows.get(name, {}).get("updates_per_second") for name in names]
            best = max(filter(None, found), default=None)
            cells.append(
                "–" if best is None else f"{best:,.{0 if best >= 100 else 1}f}"
            )
        if set(cells) != {"–"}:
            lines.append(f"| {work} | " + " | ".join(cells) + " |")
    return lines


def quick_starts(rows: Mapping[str, Row]) -> list[str]:
    """Return the table of the quick start: a line for each strategy."""
    heads = {"auto": "device = auto", "card": "batched-20 on the card", "cpu": "CPU"}
    lines = ["| | " + " | ".join(heads.values()) + " |", "| --- " * 4 + "|"]
    cases = [case for case in all_cases() if case.kind == "quick start"]
    for strategy in dict.fromkeys(case.work for case in cases):
        found = {
            case.device: rows.get(case.name, {}).get("seconds")
            for case in cases
            if case.work == strategy
        }
        if any(found.values()):
            cells = ["–" if found[d] is None else f"{found[d]:.1f}" for d in heads]
            lines.append(f"| {strategy} | " + " | ".join(cells) + " |")
    return lines if len(lines) > 2 else []


def said(rows: Mapping[str, Row]) -> Iterator[str]:
    """Yield a sentence for each thing that is in no table."""
    measured = [row for row in rows.values() if row.get("updates_per_second")]
    yield from (_of_trainer(row) for row in measured if row["kind"] == "trainer")
    base = rows.get(rounds("S1000", "local batched-1000")[0].name, {})
    for row in measured:
        if row["strategy"] != "fedavg" and row["device"] == "card":
            ratio = row["updates_per_second"] / base.get("updates_per_second", math.nan)
            yield f"{row['strategy']}, S1000: {ratio:.2f} of what FedAvg makes."
    for work in ("S10000", "M1000"):
        ours = [row for row in measured if row["work"] == work]
        sizes = [row.get("card_mb") for row in ours if row["engine"] == "local"]
        most = max(filter(None, sizes), default=None)
        if most is not None:
            yield f"{work} takes {most / 1000:.1f} GB of the card."
    if base.get("host_us"):
        yield f"The host takes {base['host_us']:.0f} microseconds an update of S1000."
    agreeing = [row["difference"] for row in measured if row.get("agrees")]
    apart = [row["row"] for row in measured if row.get("agrees") is False]
    if agreeing:
        but = f", but for {'; '.join(apart)}." if apart else "."
        yield f"Final weights agree with the plain loop's to {max(agreeing):.1g}{but}"
    chosen = [
        f"{row['work']} {row['ratio_to_best']:.2f} ({row['plan']})"
        for row in rows.values()
        if row.get("ratio_to_best")
    ]
    if chosen:
        yield f"What auto chooses, in times of the best by hand: {', '.join(chosen)}."
    tests = rows.get("tests", {})
    if tests.get("passed") or tests.get("failed"):
        failed = tests.get("failed", 0) + tests.get("error", 0)
        yield f"`pytest -m gpu`: {tests.get('passed', 0)} passed, {failed} failed."
    noted = [f"{row['row']} ({row['note']})" for row in rows.values() if row["note"]]
    if noted:
        yield f"Not measured, or not as told: {'; '.join(noted)}."


def _of_trainer(row: Row) -> str:
    speed = f"{row['updates_per_second']:,.0f}"
    over = [f"{row[f'over_{b}']:.3g} of {b}" for b in BOUNDS if f"over_{b}" in row]
    bounds = f"; in times of its bounds: {', '.join(over)}" if over else ""
    at_once = f"{row.get('chunk', row['work'][1:])} at once"
    precision = row["row"].split(", ")[-1]
    whose = f", in Triton by hand, {precision}" if row["engine"] == "triton" else ""
    return f"The trainer alone, {row['work'][0]}, {at_once}{whose}: {speed}{bounds}."
