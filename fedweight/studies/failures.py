"""What failed in a run, in one line: what was raised, where, and in which rounds."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

from ..core.errors import DataError, FedweightError
from ..core.own_code import where_raised, where_told
from ..core.texts import cause, plain, rounds_listed
from .folder import ERRORS
from .reader import RunFolder

# Clients that raised an error or did not answer: of neither a method is the reason, as
# it is of updates that are rejected since they are not finite.
_NO_FAULT_OF_METHODS = ("failed", "missing")


def why_it_stopped(error: Exception, folder: Path) -> str:
    """Return why a run came to no end: the error, its place, and the round.

    Parameters
    ----------
    error : Exception
        What it ended with. This library's own say all that there is to know.
    folder : Path
        The run's. Where it has been made, its :data:`ERRORS` have the traceback.
    """
    if isinstance(error, FedweightError):
        return plain(str(error))
    what = plain(f"{type(error).__name__}: {error}".rstrip(": "))
    return f"{what} ({where_raised(error)}){_in_round(folder)}"


def _in_round(folder: Path) -> str:
    try:
        run = RunFolder(folder)
        return f", in round {run.rounds_done + 1}" if len(run.rounds) else ""
    except DataError:  # It had not begun.
        return ""


def in_full(error: Exception) -> str:
    """Return the traceback of what a run ended with."""
    return "".join(traceback.format_exception(error))


def failed_rounds_of(run: RunFolder) -> tuple[str, bool]:
    """Return which rounds of a run failed, and why; and if it has no last model.

    Returns
    -------
    tuple
        A line, empty where none failed; and whether the last round failed by what is
        no method's fault, so that the model is not that of all the rounds.
    """
    if "status" not in run.rounds:
        return "", False
    rounds = run.rounds[run.rounds["round"] > 0]
    failed = rounds.loc[rounds["status"] == "failed", "round"].tolist()
    if not failed:
        return "", False
    last = run.rounds_done
    clients = run.clients if (run.folder / "clients.csv").is_file() else None
    blameless = False
    if failed[-1] == last and clients is not None:
        statuses = clients.loc[clients["round"] == last, "status"]
        blameless = bool(statuses.isin(_NO_FAULT_OF_METHODS).any())
    said = f"{rounds_listed(failed)} of {last} failed"
    return f"{said}: {_first_error(run, failed[0])}", blameless


def _first_error(run: RunFolder, number: int) -> str:
    """Return what went wrong in a round, with its place where that is known."""
    reasons = []
    if (run.folder / "clients.csv").is_file() and "reason" in run.clients:
        rows = run.clients[run.clients["round"] == number]
        rows = rows[rows["status"].isin(_NO_FAULT_OF_METHODS)]
        reasons = [cause(why) for why in rows["reason"] if isinstance(why, str) and why]
    if not reasons:
        rows = run.rounds[run.rounds["round"] == number]
        reason = rows["reason"].iloc[0] if "reason" in rows else ""
        return plain(reason or "no reason was recorded")
    first = max(reasons, key=reasons.count)
    where = _where_in_log(run.folder / ERRORS)
    return f"{first} ({where})" if where else first


def _where_in_log(path: Path) -> str:
    """Return where the first error of a log was raised; empty if it does not say."""
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError):
        return ""
    first = _ERROR.split(text)[1:2]
    return where_told(first[0]) if first else ""


_ERROR = re.compile(r"^\d+ x, ", re.MULTILINE | re.ASCII)
