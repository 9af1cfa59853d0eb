"""What is said at the end of a run: whatever a reader must know before trusting it.

Each function looks for one kind of thing in a run's folder and yields a line for it.
Nothing else is read, so the same lines come from a run that just ended and from one
of last year.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..core.extras import Imported
from ..core.texts import cause, plain, rounds_listed, without_numbers
from ..data.tasks import CLASSIFICATION, TASKS
from ..messages import keys
from .folder import ERRORS
from .gaps import lost_groups
from .reader import BAD_REPLIES, RunFolder, table_of

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = Imported("pandas", "studies", "a run's folder")

LINE_LENGTH = 400  # characters of a line
MOST_REASONS = 3  # lines for clients that always failed, each with its reason

FAILED = "failed, and the global model was kept"

MANY = 0.1  # share of a cohort whose failing is worth a line
EXPLODED = 1000  # times the lowest loss so far
NOT_SMALL = 0.1  # of the first loss: what is less is no explosion, whatever came before
ROUNDS_TO_LEARN = 10  # after so many an accuracy should be above chance
FAR_FROM_ONE = 2  # times too large or too small is worth a line
DOMINANT = 0.5  # share of a round's weight
DOMINANT_ROUNDS = 3  # in so many rounds
DOMINANT_AMONG = 3  # of so many clients or more


def warnings_of(run: RunFolder) -> list[str]:
    """Return the lines that the end of a run shows; none if all is well.

    Parameters
    ----------
    run : RunFolder
        Finished or not.
    """
    lines = [*_failed_rounds(run), *_losses(run), *_chance(run)]
    if (run.folder / "clients.csv").is_file() and len(run.clients):
        asked = _asked(run)
        lines += [
            *_not_answered(run),
            *_always_failed(run, asked),
            *_never_evaluated(run),
            *_never_asked(run, asked),
            *_many_failed(asked),
            *_clients_losses(run, asked),
            *_diverged(run, asked),
            *_empty_sites(run),
            *_odd_weights(run, asked),
            *_dominant(run, asked),
            *_huge_updates(run, asked),
        ]
    lines += [*lost_groups_of(run), *_notes(run)]
    if (run.folder / ERRORS).is_file():
        lines.append(f"{ERRORS}, in the run's folder, has the errors in full")
    return [plain(line, LINE_LENGTH) for line in lines]


def lost_groups_of(run: RunFolder) -> list[str]:
    """Return the lines of :func:`warnings_of` on groups that were not measured."""
    return [*lost_groups(run, _data(run).get("grouped_by"), _notes(run))]


def ending_of(run: RunFolder) -> str | None:
    """Return when and why a run was over before all of its rounds, if it was."""
    if run.stopped is None:
        return None
    of = "" if run.rounds_asked is None else f" of {run.rounds_asked}"
    return plain(f"after round {run.rounds_done}{of}: {run.stopped}", LINE_LENGTH)


# ------------------------------------------------------------------ clients that fail


def _asked(run: RunFolder) -> pd.DataFrame:
    """Return the rows of clients that were asked to train, in the rounds' order.

    In round 0, before the first, nobody is.

    ``lost`` says which of them are not in the model though they have data and time,
    and ``why`` what went wrong.
    """
    rows = run.clients[run.clients["status"] != "evaluated"]
    rows = rows[rows["round"] > 0].sort_values("round", kind="stable")
    reasons = rows["reason"] if "reason" in rows else pd.Series("", rows.index)
    dropped = (rows["status"] == "dropped") & ~reasons.isin(
        [keys.NO_EXAMPLES, keys.STRAGGLER]
    )
    pairs = zip(rows["status"], reasons, strict=True)
    return rows.assign(
        lost=rows["status"].isin(BAD_REPLIES) | dropped,
        why=[_why(status, reason) for status, reason in pairs],
    )


@lru_cache(maxsize=1024)
def _why(status: str, reason: str) -> str:
    """Return what went wrong with a client, as one line."""
    reason = cause(reason)
    if not reason or status in ("failed", "missing"):
        return reason or status
    return f"{status}, {reason}"


def _sizes(run: RunFolder) -> Mapping[int, int]:
    """Return how much each client trains on, as far as the partition tells."""
    if not (run.folder / "partition.csv").is_file():
        return {}
    if "train_examples" not in run.partition:
        return {}
    known = run.partition.dropna(subset=["train_examples"])
    clients, sizes = known["client"].tolist(), known["train_examples"].tolist()
    return dict(zip(clients, sizes, strict=True))


def _always_failed(run: RunFolder, asked: pd.DataFrame) -> Iterator[str]:
    """Name clients that failed in every round they were asked, by what went wrong."""
    rows = asked[asked.groupby("client")["lost"].transform("all")]
    if rows.empty:
        return
    times = rows.groupby("client").size()
    groups = _by_reason(rows.drop_duplicates("client", keep="last"))
    for group in groups[:MOST_REASONS]:
        clients = group["client"].tolist()
        few, many = times[clients].min(), times[clients].max()
        count = f"{many}" if few == many else f"{few} to {many}"
        yield (
            f"{run.called(clients)} failed in every round {_they(clients)} asked "
            f"({count} round{'s' if many > 1 else ''}): {group['why'].iloc[-1]}"
        )
    others = [c for group in groups[MOST_REASONS:] for c in group["client"].tolist()]
    if others:
        yield (
            f"{run.called(others)} failed in every round {_they(others)} asked, for "
            "other reasons; clients.csv has them"
        )


def _not_answered(run: RunFolder) -> Iterator[str]:
    """Name clients that did not answer what they were asked before the first round."""
    rows = run.clients[run.clients["round"] == 0]
    rows = rows[rows["status"].isin(BAD_REPLIES)]
    if rows.empty:
        return
    groups = _by_reason(rows.assign(why=rows["reason"].map(cause)))
    for group in groups[:MOST_REASONS]:
        yield (
            f"{run.called(sorted(set(group['client'])))} did not answer before the "
            f"first round: {group['why'].iloc[-1]}"
        )
    others = {c for group in groups[MOST_REASONS:] for c in group["client"].tolist()}
    if others:
        yield (
            f"{run.called(sorted(others))} did not answer before the first round, for "
            "other reasons; clients.csv has them"
        )


def _by_reason(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """Return rows by what went wrong, but for its numbers; the most first."""
    kinds = rows["why"].map(without_numbers)
    groups = [group for _, group in rows.groupby(kinds, sort=False)]
    return sorted(groups, key=len, reverse=True)


def _never_evaluated(run: RunFolder) -> Iterator[str]:
    """Name clients whose every evaluation failed."""
    if not {"reason", "accuracy"} <= set(run.clients):
        return
    rows = run.clients[["client", "reason", "accuracy"]]
    rows = rows.assign(failed=rows["reason"].str.contains(_EVALUATION, na=False))
    by_client = rows.groupby("client")
    never = by_client["failed"].any() & (by_client["accuracy"].count() == 0)
    clients = never[never].index.tolist()
    if clients:
        failed = rows[rows["failed"] & rows["client"].isin(clients)]
        reason = _EVALUATION.split(failed["reason"].iloc[-1])[-1]
        yield f"every evaluation of {run.called(clients)} failed: {cause(reason)}"


_EVALUATION = re.compile("evaluation failed: ")


def _never_asked(run: RunFolder, asked: pd.DataFrame) -> Iterator[str]:
    """Name clients that were there and took no part, unless sampling is the reason."""
    strategy = run.config.get("strategy")
    share = strategy.get("fraction-train") if isinstance(strategy, Mapping) else None
    if asked.empty or (isinstance(share, int | float) and share < 1):
        return
    took_part = set(asked["client"].tolist())
    connected = _data(run).get("connected")
    if isinstance(connected, list):
        there = [client for client in connected if isinstance(client, int)]
        what = "connected"
    elif set(asked.groupby("round").size()) == {len(took_part)}:
        there = [client for client, size in _sizes(run).items() if size > 0]
        what = "there"
    else:
        return  # The strategy chooses: who was not asked yet may be asked later.
    never = sorted(set(there) - took_part)
    if never:
        yield f"{run.called(never)} never took part: {what}, but asked in no round"


def _many_failed(asked: pd.DataFrame) -> Iterator[str]:
    """Tell in how many rounds a large part of the clients failed."""
    lost = asked[asked["status"].isin(BAD_REPLIES)]
    sizes = asked.groupby("round").size()
    counts = lost.groupby("round").size().reindex(sizes.index, fill_value=0)
    bad = counts[counts >= MANY * sizes]
    if bad.empty:
        return
    of = sizes.reindex(bad.index)
    worst = int((bad / of).to_numpy().argmax())
    kinds = lost["why"].map(without_numbers)
    common = lost["why"][kinds == kinds.value_counts().index[0]].iloc[0]
    yield (
        f"a tenth or more of the clients failed in {len(bad)} of {len(sizes)} rounds "
        f"({rounds_listed(bad.index.tolist())}), at worst {bad.iloc[worst]} of "
        f"{of.iloc[worst]} in round {bad.index[worst]}; most often: {common}"
    )


def _failed_rounds(run: RunFolder) -> Iterator[str]:
    """Tell which rounds have left the global model as it was."""
    if "status" not in run.rounds:
        return
    failed = run.rounds[run.rounds["status"] == "failed"]
    if len(failed):
        reason = plain(failed.iloc[-1].get("reason") or "no reason was recorded")
        yield f"{rounds_listed(failed['round'].tolist())} {FAILED}: {reason}"


# --------------------------------------------------------------- losses and accuracies


def _losses(run: RunFolder) -> Iterator[str]:
    """Tell of a training loss that exploded, or became NaN."""
    rounds = run.rounds
    if "train_loss" not in rounds:
        return
    rounds = rounds[rounds["round"] > 0]
    if "status" in rounds:
        rounds = rounds[rounds["status"] == "ok"]
    if "ok" in rounds:
        rounds = rounds[rounds["ok"].fillna(1) > 0]
    one = rounds.assign(client=0)
    grown = _exploded(one, 0.0)
    if len(grown):
        yield f"the training loss {_growth(grown)}"
    lost = _became_nan(one)
    if len(lost):
        yield f"the training loss became NaN in {rounds_listed(lost['round'].tolist())}"


def _clients_losses(run: RunFolder, asked: pd.DataFrame) -> Iterator[str]:
    """Name clients whose own training loss exploded, became NaN or always was."""
    rows = _trained(asked)
    first = rows.loc[rows["round"] == rows["round"].min(), "train_loss"]
    grown = _exploded(rows, float(first.fillna(0.0).mean()))
    if len(grown):
        clients = sorted(set(grown["client"].tolist()))
        whose = run.called([int(_worst(grown)["client"])]) if clients[1:] else ""
        yield (
            f"the training loss of {run.called(clients)} {_growth(grown)}"
            f"{f'; that was {whose}' if whose else ''}"
        )
    lost = _became_nan(rows)
    for how, no_loss in (("became", lost), ("was", _always_nan(run, asked))):
        if len(no_loss):
            clients = sorted(set(no_loss["client"].tolist()))
            yield (
                f"the training loss of {run.called(clients)} {how} NaN in "
                f"{rounds_listed(no_loss['round'].tolist())}"
            )


def _diverged(run: RunFolder, asked: pd.DataFrame) -> Iterator[str]:
    """Say what may help where training diverged, in whatever way that shows."""
    reasons = [*asked["why"].unique(), *run.rounds.get("reason", pd.Series()).unique()]
    found = any(keys.NOT_FINITE in str(reason) for reason in reasons)
    if found or len(_always_nan(run, asked)) or len(_became_nan(_trained(asked))):
        rate = table_of(run.config, "training").get("learning-rate")
        now = "" if rate is None else f", which is {rate:g}"
        yield (
            f"training diverged: try a smaller training.learning-rate{now}, or limit "
            "gradients by training.clip-norm; and look for NaN and for very large "
            "numbers in these clients' data"
        )


def _trained(asked: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of clients in the model that made a step, with their losses."""
    rows = asked[asked["status"] == "ok"]
    if "train_loss" not in rows:
        return rows.assign(train_loss=math.nan)
    return rows[rows["steps"].fillna(1) > 0] if "steps" in rows else rows


def _always_nan(run: RunFolder, asked: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of clients that trained and never had a loss that is a number.

    Clients of an app that is not ours may report none.
    """
    rows = _trained(asked)
    if "steps" not in rows or not table_of(run.config, "training"):
        return rows.iloc[:0]
    never = rows["train_loss"].isna().groupby(rows["client"]).transform("all")
    return rows[never & (rows["steps"] > 0)]


def _exploded(rows: pd.DataFrame, first: float) -> pd.DataFrame:
    """Return the rows whose loss is a thousandfold of their client's lowest so far.

    What is still small beside where losses began has not exploded: a loss that falls
    to 1e-6 may well be 1e-2 in a later round. ``first`` is where all clients' began.
    """
    known = rows[rows["train_loss"] >= 0]
    loss = known["train_loss"].groupby(known["client"])
    lowest, began = loss.cummin(), loss.transform("first").clip(lower=first)
    known = known.assign(lowest=lowest)
    large = known["train_loss"] > NOT_SMALL * began
    return known[large & (known["train_loss"] > EXPLODED * lowest)]


def _worst(grown: pd.DataFrame) -> Mapping[Any, Any]:
    return grown.nlargest(1, "train_loss").to_dict("records")[0]


def _growth(grown: pd.DataFrame) -> str:
    worst = _worst(grown)
    return (
        f"grew to {worst['train_loss']:.4g} in round {worst['round']}, from "
        f"{worst['lowest']:.4g} before"
    )


def _became_nan(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows without a loss of clients that have had one before."""
    known = rows["train_loss"].notna()
    before = known.groupby(rows["client"]).cummax()
    return rows[before & ~known]


def _chance(run: RunFolder) -> Iterator[str]:
    """Tell of an accuracy that guessing gives, after enough rounds to learn.

    Chance is the share of the test set's most frequent class, which naming that class
    always gives; within one standard error of it counts as chance. Where it is not
    known it is one over the number of classes.
    """
    accuracy = run.accuracy
    if accuracy.empty or int(accuracy.index[-1]) < ROUNDS_TO_LEARN:
        return
    data = _data(run)
    share, size = data.get("largest_test_class"), data.get("test_examples")
    classes = data.get("classes")
    task = TASKS.get(str(data.get("task", CLASSIFICATION)))
    one_each = task is None or task.has_classes
    error = 0.0
    if accuracy.name == "test_accuracy" and isinstance(share, float):
        if isinstance(size, int) and size > 0:
            error = math.sqrt(max(share * (1 - share), 0) / size)
        always = "naming the test set's most frequent class"
        if not one_each:
            always = "deciding on what is most frequent in the test set"
        what = f"always {always} gives {share:.3g}"
    elif isinstance(classes, int) and classes > 1 and one_each:
        share = 1 / classes
        what = f"guessing among {classes} classes gives {share:.3g}"
    else:
        return
    value, number = float(accuracy.iloc[-1]), int(accuracy.index[-1])
    if share < 1 and value <= share + error:
        yield f"the accuracy after round {number}, {value:.3g}, is chance: {what}"


# ------------------------------------------------------- clients that count, or do not


def _empty_sites(run: RunFolder) -> Iterator[str]:
    """Name clients with a name that have nothing to train on; others are drawn so."""
    empty = [c for c, size in _sizes(run).items() if size == 0 and c in run.names]
    if empty:
        have = "have" if len(empty) > 1 else "has"
        yield f"{run.called(empty)} {have} no examples to train on, and did not count"


def _odd_weights(run: RunFolder, asked: pd.DataFrame) -> Iterator[str]:
    """Tell of weights that are negative, or whose sum is far from one."""
    if "weight" not in asked:
        return
    rows = asked[(asked["status"] == "ok") & asked["weight"].notna()]
    negative = rows[rows["weight"] < 0]
    if len(negative):
        clients = sorted(set(negative["client"].tolist()))
        yield (
            f"{run.called(clients)} had a negative weight "
            f"({rounds_listed(negative['round'].tolist())})"
        )
    if "staleness" in rows:  # A schedule had them count less, as it was told.
        rows = rows[rows.groupby("round")["staleness"].transform("max") == 0]
    # Where there are several global models, those of each sum to 1.
    of = [rows[name] for name in ("round", "model") if name in rows]
    sums = rows["weight"].groupby(of, dropna=False).sum()
    odd = sums[(sums < 1 / FAR_FROM_ONE) | (sums > FAR_FROM_ONE)]
    odd = odd[odd != 0]  # With weights of 0 a round has failed, and says so.
    if len(odd):
        rounds = odd.index.get_level_values("round").unique().tolist()
        yield (
            f"the weights summed to {odd.iloc[-1]:.4g} and not to 1 "
            f"({rounds_listed(rounds)}); the global model's step is scaled by it"
        )


def _dominant(run: RunFolder, asked: pd.DataFrame) -> Iterator[str]:
    """Name clients that had more than half of the weight, round after round."""
    if "weight" not in asked:
        return
    rows = asked[(asked["status"] == "ok") & asked["weight"].notna()]
    weight = rows["weight"].abs()
    by_round = weight.groupby(rows["round"])
    rows = rows.assign(share=weight / by_round.transform("sum"))
    rows = rows[by_round.transform("size") >= DOMINANT_AMONG]
    ruled = rows[rows["share"] > DOMINANT]
    for client in sorted(set(ruled["client"].tolist())):
        theirs = ruled[ruled["client"] == client]
        if len(theirs) >= DOMINANT_ROUNDS:
            yield (
                f"{run.called([client])} had more than half of the weight in "
                f"{len(theirs)} of {rows['round'].nunique()} rounds, up to "
                f"{theirs['share'].max():.0%}"
            )


def _huge_updates(run: RunFolder, asked: pd.DataFrame) -> Iterator[str]:
    """Name clients whose update was a thousand times as long as the median."""
    if "update_times_median" not in asked:
        return
    huge = asked.dropna(subset=["update_times_median"])
    if len(huge):
        yield (
            f"the update of {run.called(sorted(set(huge['client'].tolist())))} was up "
            f"to {huge['update_times_median'].max():,.0f} times as long as the median "
            f"({rounds_listed(huge['round'].tolist())})"
        )


# ---------------------------------------------------------------------------- the rest


def _notes(run: RunFolder) -> list[str]:
    """Return what was noticed of the data before the run."""
    notes = _data(run).get("notes")
    return [str(note) for note in notes] if isinstance(notes, list) else []


def _data(run: RunFolder) -> Mapping[str, Any]:
    data = run.environment.get("data")
    return data if isinstance(data, Mapping) else {}


def _they(clients: list[int]) -> str:
    return "they were" if len(clients) > 1 else "it was"
