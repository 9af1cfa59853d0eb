"""Groups of a comparison: which does worse, by strategy, over the seeds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import DataError
from ..core.extras import Imported
from .comparison_lines import rows_of
from .plots.groups import RATES
from .result import Run
from .statistics import t_interval

if TYPE_CHECKING:
    import pandas as pd

    from .comparison import Comparison
else:
    pd = Imported("pandas", "studies", "a run's folder")

COLUMNS = (
    *("data", "attribute", "rate", "strategy", "group"),
    *("n", "mean", "low", "high", "worst"),
)
# Of which rates the largest is the worst.
LESS_IS_BETTER = ("fpr", "loss")


def group_rates(found: Comparison) -> pd.DataFrame:
    """Return what :attr:`fedweight.Comparison.groups` returns.

    Raises
    ------
    DataError
        No run measured groups.
    """
    frames = [*_last_of_runs(found)]
    if not frames:
        raise DataError(
            f"no run of {found.folder} measured groups: data.sensitive or "
            "groups.attributes names sensitive attributes."
        )
    every = pd.concat(frames, ignore_index=True)
    rows: list[dict[str, Any]] = []
    for (data, attribute), own in every.groupby(["data", "attribute"], sort=False):
        for rate in (rate for rate in RATES if rate in own and own[rate].notna().any()):
            among = own.dropna(subset=[rate])
            by_run = among.groupby(["strategy", "seed"])[rate]
            worst = by_run.transform("max" if rate in LESS_IS_BETTER else "min")
            # Where all are alike none is worse off.
            unlike = by_run.transform("max") > by_run.transform("min")
            among = among.assign(worst=(among[rate] == worst) & unlike)
            base = {"data": data, "attribute": attribute, "rate": rate}
            for (strategy, group), several in among.groupby(
                ["strategy", "group"], sort=False
            ):
                values = several[rate].to_numpy(np.float64)
                low, high = t_interval(values)
                rows.append(
                    {**base, "strategy": strategy, "group": group, "n": len(values)}
                    | {"mean": float(values.mean()), "low": low, "high": high}
                    | {"worst": int(several["worst"].sum())}
                )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _last_of_runs(found: Comparison) -> Iterator[pd.DataFrame]:
    """Yield the groups that each run measured last, on the test set if there."""
    cells = found.cells
    for row in rows_of(cells[(cells["status"] == "complete") & (cells["chosen"] == 1)]):
        with suppress(DataError):
            groups = Run(found.folder / row["folder"]).groups
            groups = groups[groups["client"].isna()]
            tested = groups[groups["part"] == "test"]
            groups = tested if len(tested) else groups
            last = groups[groups["round"] == groups["round"].max()]
            yield last.assign(**{key: row[key] for key in ("data", "strategy", "seed")})
