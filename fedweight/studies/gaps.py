"""Gaps between the groups of a sensitive attribute, as fairlearn's, with intervals."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ..core.errors import ConfigurationError, DataError, check_choice, check_range
from ..core.extras import Imported
from ..core.rng import Purpose, generator
from ..core.texts import listed, plain, shown
from ..data.notes import nobody_is_of
from ..metrics.groups import AND
from .reader import RunFolder, table_of

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = Imported("pandas", "studies", "gaps between groups")

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Part = Literal["held-out", "test"]
Shares = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
Method = Literal["between_groups", "to_overall"]
Aggregation = Literal["worst_case", "mean"]

# What a positive class has, and of which rates each gap is one.
RATES: dict[str, tuple[str, ...]] = {
    "demographic_parity": ("selection_rate",),
    "equal_opportunity": ("tpr",),
    "equalized_odds": ("tpr", "fpr"),
}

# Each rate as shares of counts, see _accuracies and _confusion: which are counted, and
# of which.
ACCURACY: Shares = {"accuracy": ((1, 0), (1, 1))}
CONFUSION: Shares = {
    "selection_rate": ((1, 0, 1, 0), (1, 1, 1, 1)),
    "tpr": ((1, 0, 0, 0), (1, 1, 0, 0)),
    "fpr": ((0, 0, 1, 0), (0, 0, 1, 1)),
}
KINDS = ("difference", "ratio")
GAPS = ("accuracy", *RATES)
# Of which examples two groups must have some, and what there is no gap in otherwise.
NEEDED = {
    "": "",
    "positive ": "equal opportunity and equalised odds",
    "negative ": "equalised odds",
}
NEEDS_TWO = "a gap needs two groups"
# Stands between a gap and its attribute.
OF = " of "
PLACES = {"test": "on the test set", "held-out": "in the held-out data"}


def group_gaps(
    run: RunFolder,
    attribute: str | Sequence[str],
    part: Part | None,
    round: int | None,
    client: int | str | None,
    method: Method,
    agg: Aggregation,
    control_features: str | None,
    resamples: int,
    confidence: float,
    seed: int,
) -> pd.DataFrame:
    """Return what :meth:`fedweight.Run.gaps` returns."""
    check_choice("method", method, ("between_groups", "to_overall"))
    check_choice("agg", agg, ("worst_case", "mean"))
    check_range("resamples", resamples, 0)
    check_range("confidence", confidence, 0, 1, low_open=True, high_open=True)
    rows = _rows(run, part, round, client)
    names = [attribute] if isinstance(attribute, str) else list(attribute)
    table = _table(run, rows, names, control_features)
    place = PLACES[str(rows["part"].iloc[0])]
    if client is not None:
        who = client if isinstance(client, str) else run.name_of(client)
        place = f"at client {plain(who)}"
    called = AND.join(names)
    if reason := _too_few(table).get(""):
        raise DataError(f"{run.folder}: {called}: {reason} {place}; {NEEDS_TWO}.")
    for control, own in table.groupby("control", sort=False):
        within = f" within {control_features} {control}" if control_features else ""
        if lines := why_no_gap(own, place):
            log.warning("%s%s: %s; %s", called, within, "; ".join(lines), NEEDS_TWO)
    return _measured_gaps(table, method, agg, resamples, confidence, seed)


def why_no_gap(table: pd.DataFrame, place: str) -> list[str]:
    """Return who alone has the examples that a gap needs of two groups.

    Parameters
    ----------
    table : DataFrame
        Rows of ``groups.csv``: the groups of an attribute, once each.
    place : str
        Where they were measured, in words.
    """
    few = _too_few(table)
    if "" in few:  # Of the others there is nothing more to say.
        return [f"{few['']} {place}"]
    return [
        f"{reason} {place}, so there is no gap in {NEEDED[kind]}"
        for kind, reason in few.items()
    ]


def lost_groups(run: RunFolder, asked: Any, notes: Sequence[str]) -> Iterator[str]:
    """Yield a line for each attribute of whose groups something was not measured.

    Parameters
    ----------
    run : RunFolder
        Finished or not.
    asked : list of str, or anything
        By which attributes it was to measure, as far as is known.
    notes : sequence of str
        What is said of its data; a group that nobody has is not said again.
    """
    if not (run.folder / "groups.csv").is_file():
        attributes = asked if isinstance(asked, list) and run.rounds_done else []
        yield from (
            f"{plain(a)}: no group was measured in any round" for a in attributes
        )
        return
    groups = run.groups[run.groups["client"].isna()]
    for attribute in groups["attribute"].unique():
        if AND not in attribute:
            known = any(note.startswith(nobody_is_of(attribute)) for note in notes)
            own = groups[groups["attribute"] == attribute]
            if line := _lost(own, _least(run), known):
                yield f"{plain(attribute)}: {line}"


def _least(run: RunFolder) -> int:
    least = table_of(run.config, "groups").get("min-size")
    return least if isinstance(least, int) else 1


def _lost(groups: pd.DataFrame, least: int, known: bool) -> str:
    """Return what was not measured of an attribute in its last round, if anything.

    ``least`` is how many examples of a group a client tells of, and ``known`` whether
    it is known already which groups nobody has.
    """
    lines, gaps, hidden = list[str](), False, False
    parts = [part for part in PLACES if (groups["part"] == part).any()]
    for part in parts:
        rows = groups[groups["part"] == part]
        rows = rows[rows["round"] == rows["round"].max()]
        none = rows.loc[~(rows["examples"] > 0), "group"].tolist()
        hides = part == "held-out" and least > 1 and bool(none)
        if len(none) == len(rows) and part != parts[0] and not hides:
            continue  # Clients hold nothing out, and the test data are measured.
        hidden |= hides
        found = why_no_gap(rows, PLACES[part])
        gaps |= bool(found)
        if not found and none and not known:
            found = [
                f"no example of {listed(map(plain, none), 5)} {PLACES[part]}, so that "
                "gaps there are between the other groups"
            ]
        lines += found
    ends = [NEEDS_TWO] if gaps else []
    if hidden:
        ends.append(f"clients tell of no group below groups.min-size = {least}")
    return "; ".join([*lines, *ends]) if lines else ""


def _too_few(table: pd.DataFrame) -> dict[str, str]:
    """Return of which examples fewer than two groups have any, and who has."""
    n = table["examples"]
    of = {"": n}
    if "positives" in table:
        of |= {"positive ": table["positives"], "negative ": n - table["positives"]}
    found = {}
    for kind, counts in of.items():
        have = table.loc[counts > 0, "group"].unique().tolist()
        if len(have) < 2:
            who = f"only {plain(have[0])} has" if have else "no group has"
            found[kind] = f"{who} {kind}examples"
    return found


def _measured_gaps(
    table: pd.DataFrame,
    method: Method,
    agg: Aggregation,
    resamples: int,
    confidence: float,
    seed: int,
) -> pd.DataFrame:
    """Return the gaps of a table of groups, two of which have examples or more."""
    n = table["examples"].to_numpy(np.float64)
    counted = [(_accuracies(table, n), ACCURACY)]
    names_of: dict[str, tuple[str, ...]] = {"accuracy": ("accuracy",)}
    if "selection_rate" in table:
        counted.append((_confusion(table, n), CONFUSION))
        names_of |= RATES
    stream = generator(seed, Purpose.BOOTSTRAP)
    several = [(_resampled(cells, resamples, stream), of) for cells, of in counted]
    controls = table["control"].to_numpy(str)
    within = {}
    for control in np.unique(controls).tolist():
        own = controls == control
        found: dict[str, dict[str, Array]] = {}
        for counts, shares in several:
            for rate, (some, every) in shares.items():
                among = counts[:, own]
                found[rate] = _apart(
                    among @ np.array(some), among @ np.array(every), method
                )
        within[control] = found
    return _summed_up(within, names_of, agg, confidence, resamples)


def gaps_by_attribute(run: RunFolder) -> dict[str, dict[str, float | None]]:
    """Return the last difference of each kind, by sensitive attribute.

    By name, ``accuracy_gap`` and so on, or ``None`` where there is no such gap; nothing
    where no groups are measured. Attributes that are crossed are left out.
    """
    if not (run.folder / "groups.csv").is_file():
        return {}
    found: dict[str, dict[str, float | None]] = {}
    for attribute in run.groups["attribute"].unique():
        if AND in attribute:
            continue
        gaps: pd.Series[float] = pd.Series(dtype=float)
        with suppress(DataError):  # No rates.
            rows = _rows(run, None, None, None)
            table = _table(run, rows, [attribute], None)
            if "" not in _too_few(table):
                gaps = _measured_gaps(
                    table, "between_groups", "worst_case", 0, 0.95, 0
                )["value"]
        values = {n: float(gaps.get(f"{n}_difference", math.nan)) for n in GAPS}
        found[str(attribute)] = {
            gap_named(n): None if math.isnan(v) else v for n, v in values.items()
        }
    return found


def largest_gaps(run: RunFolder) -> dict[str, float | None]:
    """Return the same of the attribute that has the largest, gap by gap."""
    several = gaps_by_attribute(run).values()
    found: dict[str, float | None] = {}
    for name in map(gap_named, GAPS) if several else ():
        known = [value for own in several if (value := own[name]) is not None]
        found[name] = max(known, default=None)
    return found


def gap_named(name: str, attribute: str = "") -> str:
    """Return what a table calls a gap, of an attribute where there are several.

    Examples
    --------
    >>> gap_named("accuracy"), gap_named("accuracy", "sex")
    ('accuracy_gap', 'accuracy_gap of sex')
    """
    return f"{name}_gap{OF * bool(attribute)}{attribute}"


def _rows(
    run: RunFolder, part: Part | None, round: int | None, client: int | str | None
) -> pd.DataFrame:
    """Return a round's rows, of all clients together, of one, or of the test data."""
    groups = run.groups
    if client is None:
        groups = groups[groups["client"].isna()]
    else:
        if part == "test":
            raise ConfigurationError(
                "part must be 'held-out' where a client is named: the test data are "
                "the server's. Leave one of them out."
            )
        groups, part = _of_client(groups, client), "held-out"
        if not len(groups):
            raise DataError(
                f"{run.folder}: no groups of client {shown(client)} were measured. It "
                "holds nothing out, was never asked, or is none of this run."
            )
    if part is None:
        part = "test" if (groups["part"] == "test").any() else "held-out"
    check_choice("part", part, ("held-out", "test"))
    groups = groups[groups["part"] == part]
    if not len(groups):
        raise DataError(f"{run.folder}: no groups of the part '{part}' were measured.")
    measured = groups["round"].unique().tolist()
    round = measured[-1] if round is None else round
    if round not in measured:
        raise ConfigurationError(
            f"round must be one of those in which groups were measured, "
            f"{listed(measured, most=12)}, got {shown(round)}."
        )
    return groups[groups["round"] == round]


def _of_client(groups: pd.DataFrame, client: int | str) -> pd.DataFrame:
    """Return the rows of a client, by its number or its name."""
    if isinstance(client, str) and "name" in groups:
        return groups[groups["client"].notna() & (groups["name"] == client)]
    return groups[groups["client"] == client]


def _table(
    run: RunFolder, rows: pd.DataFrame, names: list[str], control: str | None
) -> pd.DataFrame:
    """Return the groups between which gaps are, and their control groups if any."""
    if "accuracy" not in rows or not _whole(rows):
        raise DataError(
            f"{run.folder}: gaps are of accuracies and rates of classes, which this "
            "task has not. Run.groups has the loss of each group."
        )
    known = rows["attribute"].unique().tolist()
    wanted = names if control is None else [*names, control]
    table = next(
        (a for a in known if sorted(a.split(AND)) == sorted(wanted)), AND.join(wanted)
    )
    if table in known and control is None:
        return rows[rows["attribute"] == table].assign(control="")
    if table not in known or len(wanted) != 2:
        crossed = " They are crossed with groups.intersections = true."
        raise ConfigurationError(
            f"the groups of {' and '.join(map(repr, wanted))} were not measured in "
            f"{run.folder}; those of {listed(list(map(repr, known)), most=9)} were."
            f"{crossed if len(wanted) == 2 else ''}"
        )
    # In the order of the product of both, whatever their names hold.
    first, second = table.split(AND)
    pairs = [
        {first: a, second: b}
        for a in rows[rows["attribute"] == first]["group"]
        for b in rows[rows["attribute"] == second]["group"]
    ]
    found = rows[rows["attribute"] == table]
    if len(found) < len(pairs):  # One client has no row of those that it lacks.
        there = set(found["group"])
        pairs = [pair for pair in pairs if AND.join(pair.values()) in there]
    return found.assign(
        group=[pair[names[0]] for pair in pairs],
        control=[pair[str(control)] for pair in pairs],
    )


def _whole(rows: pd.DataFrame) -> bool:
    """Tell whether each prediction is right or wrong, and nothing between."""
    right = (rows["accuracy"] * rows["examples"].astype(float)).dropna()
    return bool((abs(right - right.round()) < 1e-6).all())


def _accuracies(table: pd.DataFrame, n: Array) -> Array:
    """Return how many examples are right, and wrong: ``[G, 2]``."""
    right = np.rint(np.nan_to_num(table["accuracy"].to_numpy(np.float64)) * n)
    return np.stack([right, n - right], 1)


def _confusion(table: pd.DataFrame, n: Array) -> Array:
    """Return how many examples are truly positive, and selected: ``[G, 4]``.

    Both, the first alone, the second alone, neither.
    """
    positives = table["positives"].to_numpy(np.float64)
    columns = [table[c].to_numpy(np.float64) for c in ("selection_rate", "tpr")]
    selection, tpr = np.nan_to_num(columns)
    both = np.rint(tpr * positives)
    selected = np.rint(selection * n)
    alone = selected - both
    return np.stack([both, positives - both, alone, n - positives - alone], 1)


def _resampled(counts: Array, resamples: int, stream: np.random.Generator) -> Array:
    """Return counts ``[G, m]``, and such of as many examples drawn anew: ``[1 + B]``.

    Drawing examples with replacement and counting them is one multinomial draw.
    """
    total = int(counts.sum())
    drawn = stream.multinomial(total, (counts / total).ravel(), size=resamples)
    return np.concatenate([counts[None], drawn.reshape(resamples, *counts.shape)])


def _apart(some: Array, every: Array, method: Method) -> dict[str, Array]:
    """Return how far groups are apart in a rate, ``[B]`` each, by kind.

    Parameters
    ----------
    some, every : ndarray
        ``[B, G]``: the rate's counts by group, and of how many examples.
    method : str
        Between two groups, or between a group and all together.

    Returns
    -------
    dict
        A group without such examples is left out, and with fewer than two there is
        none: NaN. So is a ratio of 0 to 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        rates = some / every
        if method == "between_groups":
            least, most = np.fmin.reduce(rates, axis=1), np.fmax.reduce(rates, axis=1)
            difference, ratio = most - least, least / most
        else:
            overall = (some.sum(axis=1) / every.sum(axis=1))[:, None]
            difference = np.fmax.reduce(np.abs(rates - overall), axis=1)
            ratios = rates / overall
            ratios = np.where(ratios > 1, 1 / ratios, ratios)
            ratio = np.fmin.reduce(ratios, axis=1)
    two = np.count_nonzero(every, axis=1) > 1
    return {
        "difference": np.where(two, difference, math.nan),
        "ratio": np.where(two, ratio, math.nan),
    }


def _summed_up(
    within: dict[str, dict[str, dict[str, Array]]],
    names: dict[str, tuple[str, ...]],
    agg: Aggregation,
    confidence: float,
    resamples: int,
) -> pd.DataFrame:
    """Return a row a gap and control group, of gaps by control group, rate and kind."""
    rows: list[dict[str, Any]] = []
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    for kind in KINDS:
        for name, rates in names.items():
            for control, found in within.items():
                each = np.stack([found[rate][kind] for rate in rates])
                # Two rates have a gap where each has; a ratio of 0 to 0 is left out.
                apart = np.stack([found[rate]["difference"] for rate in rates])
                whole = np.isfinite(apart).all(axis=0)
                values = np.where(whole, _together(each, kind, agg), math.nan)
                known = values[1:][np.isfinite(values[1:])]
                # Where half of the resamples have no gap, nothing is known of it.
                enough = 2 * len(known) > resamples
                low, high = np.quantile(known, tails) if enough else (math.nan,) * 2
                row = {"gap": f"{name}_{kind}", "control": control}
                rows.append({**row, "value": values[0], "low": low, "high": high})
    frame = pd.DataFrame(rows)
    if (frame["control"] == "").all():
        return frame.drop(columns="control").set_index("gap")
    return frame.set_index(["gap", "control"])


def _together(each: Array, kind: str, agg: Aggregation) -> Array:
    """Return one gap of several rates' ``[R, B]``; those that are NaN are left out."""
    if agg == "mean":
        known = np.isfinite(each)
        with np.errstate(invalid="ignore"):
            return np.asarray(
                np.where(known, each, 0.0).sum(axis=0) / known.sum(axis=0)
            )
    worst = np.fmax if kind == "difference" else np.fmin
    return np.asarray(worst.reduce(each, axis=0))
