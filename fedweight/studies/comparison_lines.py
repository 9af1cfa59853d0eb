"""What failed in a comparison, and what its runs warn of, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..core.texts import listed, one_of, plain, without_numbers
from .folder import ERRORS
from .reader import table_of
from .result import Run
from .summarizing import Row

if TYPE_CHECKING:
    import pandas as pd

    from .comparison import Comparison


# Packages by whose version the bits of a run may differ.
COMPUTES = ("fedweight", "flwr", "torch", "numpy")


def warning_lines(found: Comparison, told: pd.DataFrame | None) -> list[str]:
    """Return :attr:`Comparison.warnings`, of ``warnings.csv`` if there is one."""
    lines = []
    for strategy in found.strategies:
        own = found.cells[found.cells["strategy"] == strategy]
        bad = own[own["failed_rounds"] > 0]
        if len(bad):
            lines.append(
                f"{strategy}: {bad['failed_rounds'].sum():.0f} rounds failed in "
                f"{len(bad)} of {len(own)} runs, and left the model as it was: "
                f"{one_of(bad['reason'].tolist())}"
            )
    if told is not None:
        kinds = told["warning"].map(without_numbers)
        for _, alike in told.groupby(kinds, sort=False):
            said = one_of(alike["warning"].tolist())
            lines.append(f"{_whose(found, alike)}: {said}")
    return lines


def _whose(found: Comparison, rows: pd.DataFrame) -> str:
    """Return in which runs something is so, in words."""
    named = []
    for strategy in found.strategies:
        own = rows[rows["strategy"] == strategy]
        if own.empty:
            continue
        seeds = sorted({int(seed) for seed in own["seed"]})
        on = [data for data in found.data_sets if (own["data"] == data).any()]
        where = f"{listed(on)}; " if len(on) < len(found.data_sets) else ""
        named.append((strategy, f" ({where}{_seeds(seeds, len(found.seeds))})"))
    how = {where for _, where in named}
    if len(how) == 1:
        every = len(named) == len(found.strategies) > 1
        names = "all strategies" if every else listed([name for name, _ in named])
        return f"{names}{how.pop()}"
    return listed([f"{name}{where}" for name, where in named])


def failure_lines(found: Comparison) -> Iterable[str]:
    """Return what failed, where it is told in full, and how to run it again."""
    cells = found.cells
    failed = cells[cells["status"] == "failed"]
    kinds = failed["strategy"] + ": " + failed["reason"].map(without_numbers)
    for _, alike in failed.groupby(kinds, sort=False):
        names, reasons = alike["folder"].tolist(), alike["reason"].tolist()
        yield f"failed: {listed(names, 6)}: {one_of(reasons)}"
    odd = cells.loc[(cells["failed_rounds"] > 0) | (cells["status"] == "failed")]
    logs = [n for n in odd["folder"] if (found.folder / n / ERRORS).is_file()]
    if logs:
        yield f"{ERRORS} of {listed(logs, 6)} has it in full."
    if ((cells["status"] == "failed") & (cells["failed_rounds"] == 0)).any():
        yield "The same command runs again what ended before its time."
    ended = cells.loc[cells["failed_rounds"] > 0, "folder"].tolist()
    if ended:
        yield (
            f"What came to its end is not run again: delete {listed(ended, 20)} in "
            f"{found.folder}, and give the same command."
        )


def version_lines(found: Comparison) -> Iterable[str]:
    """Return what the runs were made with, where that is not the same for all."""
    known: dict[str, set[str]] = {}
    compared = (found.cells["status"] == "complete") & (found.cells["chosen"] == 1)
    folders = [found.folder / name for name in found.cells.loc[compared, "folder"]]
    for run in (Run(folder) for folder in folders if folder.is_dir()):
        versions = table_of(run.environment, "versions")
        for package in COMPUTES:
            if package in versions:
                known.setdefault(package, set()).add(plain(versions[package]))
    several = [
        f"{package} {listed(sorted(those))}"
        for package, those in known.items()
        if len(those) > 1
    ]
    if several:
        yield (
            "Runs were made with different versions, with which the same seed may give "
            f"other bits: {'; '.join(several)}."
        )


def _seeds(seeds: Sequence[int], of: int) -> str:
    if len(seeds) == of > 1:
        return "all seeds"
    return f"seed{'s' * (len(seeds) > 1)} {listed(map(str, seeds), 6)}"


def rows_of(frame: pd.DataFrame) -> list[Row]:
    """Return the rows of a frame by their columns."""
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]
