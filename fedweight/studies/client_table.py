"""Tables of clients: how much each counts, why, and how it fares."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..core.extras import Imported
from ..metrics.measures import MEASURES
from .columns import CLIENT_COLUMNS
from .pages import Part, live_table, more, table
from .plots.over_rounds import PERSONAL, own_columns
from .plots.weights import data_shares
from .reader import BAD_REPLIES, RunFolder

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = Imported("pandas", "studies", "a run's folder")

MOST_CLIENTS = 5000

# What explains a weight stands beside it; what a client measured comes last.
_APART = {
    *("round", "client", "name", "status", "reason", "weight"),
    *("bytes_down", "bytes_up"),
}
_FIRST = (
    *(name.replace("-", "_") for name in MEASURES if name != "loss"),
    *("loss", *PERSONAL),
)


def all_clients(run: RunFolder) -> Part | None:
    """Return a row a client: how much it counted, why, and how it fares.

    A client's weight, and what the method recorded of it, are those of the last round
    in which it counted.
    """
    if not (run.folder / "clients.csv").is_file() or run.clients.empty:
        return None
    rows = run.clients.sort_values("round", kind="stable")
    groups = rows.groupby("client", sort=True)
    frame = pd.DataFrame(index=groups.size().index)
    frame["status"] = groups["status"].last()
    counted = (
        rows[(rows["status"] == "ok") & rows["weight"].notna()]
        if ("weight" in rows)
        else rows.iloc[:0]
    )
    if len(counted):
        told = _weights(run, counted)
        last = told.drop_duplicates("client", keep="last").set_index("client")
        newest = last["round"].nunique() > 1
        names = [*(["round"] if newest else []), *_WEIGHTS]
        frame = frame.join(last[names])
    # The last that is known of each client, column by column.
    own = own_columns(rows, CLIENT_COLUMNS)
    named = [name for name in _FIRST if name in rows]
    first = [*own, *named]
    others = [name for name in rows if name not in _APART | {*first}]
    frame = frame.join(groups[[*first, *others]].last())
    if (run.folder / "personal.csv").is_file():
        after = run.personal.set_index("client")
        frame = frame.join(
            after[[name for name in PERSONAL if name in after and name not in frame]]
        )
    if len(counted):
        frame["rounds counted"] = counted.groupby("client").size()
    bad = rows[rows["status"].isin(BAD_REPLIES)]
    if len(bad):
        frame["bad replies"] = bad.groupby("client").size()
        if "reason" in bad:
            frame["last reason"] = bad.groupby("client")["reason"].last().astype(object)
    frame = frame.dropna(axis=1, how="all").reset_index()
    shown = frame.head(MOST_CLIENTS)
    return live_table(
        "Each client as it counted last, and as it was evaluated last",
        _called(run, shown),
        more(len(frame) - MOST_CLIENTS, "clients.csv"),
    )


_WEIGHTS = ("weight", "÷ uniform", "share of data", "÷ share")


def _weights(run: RunFolder, counted: pd.DataFrame) -> pd.DataFrame:
    """Return weights with what they are held against, round by round."""
    number = counted.groupby("round")["client"].transform("size")
    sizes = pd.Series(float("nan"), index=counted.index)
    if "examples" in counted:
        sizes = counted["examples"].astype(float)
    if sizes.isna().any() and (run.folder / "partition.csv").is_file():
        known = run.partition.set_index("client").get("train_examples")
        if known is not None:
            sizes = sizes.fillna(counted["client"].map(known).astype(float))
    whole = sizes.groupby(counted["round"]).transform(lambda s: s.sum(skipna=False))
    share = sizes / whole.where(whole > 0)
    return counted[["round", "client", "weight"]].assign(
        **{
            "÷ uniform": counted["weight"] * number,
            "share of data": share,
            "÷ share": counted["weight"] / share.where(share > 0),
        }
    )


def _called(run: RunFolder, frame: pd.DataFrame) -> pd.DataFrame:
    """Put names first where clients have them, and numbers beside them."""
    if not run.names:
        return frame
    names = [_name(run, client) for client in frame["client"]]
    frame = frame.rename(columns={"client": "number"})
    frame.insert(0, "client", pd.Series(names, index=frame.index, dtype=object))
    return frame


def _name(run: RunFolder, client: Any) -> Any:
    """Return a client's name; its number where no client has any."""
    return run.name_of(int(client)) if run.names else client


def extremes(run: RunFolder) -> Iterable[Part]:
    """Return tables of the clients that count most and least in the last round."""
    if not (run.folder / "clients.csv").is_file() or run.weights_by_number.empty:
        return
    number = int(run.weights_by_number.index.max())
    row: Any = pd.Series(run.weights_by_number.loc[number]).dropna()
    row = row.sort_values(ascending=False, kind="stable")
    shares = pd.Series(data_shares(run, number, row.index), index=row.index)
    frame = pd.DataFrame(
        {
            "client": row.index,
            "weight": row.to_numpy(),
            "÷ uniform": row.to_numpy() * len(row),
            "share of data": shares.to_numpy(),
            "÷ share": (row / shares.where(shares > 0)).to_numpy(),
        }
    )
    frame["client"] = [_name(run, client) for client in frame["client"]]
    if len(frame) <= 10:
        yield table(f"Weights in round {number}", frame)
    else:
        most, least = frame.head(5), frame.tail(5)
        yield table(f"The five that count most, round {number}", most)
        yield table(f"The five that count least, round {number}", least)


def with_names(run: RunFolder, rows: pd.DataFrame) -> pd.DataFrame:
    """Put the clients' names beside their numbers, where they have names."""
    rows = rows.drop(columns="name", errors="ignore")
    if run.names:
        names = [run.names.get(int(client), "") for client in rows["client"]]
        rows.insert(list(rows.columns).index("client") + 1, "name", names)
    return rows
