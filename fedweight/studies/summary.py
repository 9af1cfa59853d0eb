"""A run in numbers."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.extras import Imported
from .columns import TESTED
from .endings import ending_of, warnings_of
from .gaps import largest_gaps
from .reader import BAD_REPLIES, RunFolder, table_of

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = Imported("pandas", "studies", "a run's folder")


class SummedRun(RunFolder):
    """A run's folder with what follows from it: numbers, and what to know first."""

    @cached_property
    def warnings(self) -> list[str]:
        """What a reader must know before trusting the run, one line each.

        Clients that failed in every round they were asked, or never took part; rounds
        in which many did; a loss that exploded, an accuracy at chance, one client that
        decided alone; and what was noticed of the data. Empty if all is well.
        """
        return warnings_of(self)

    def summary(self) -> dict[str, Any]:
        """Return the run in numbers, ready for JSON; None is what was not measured.

        Returns
        -------
        dict
            ``name``, ``strategy``, ``data``, ``seed``, ``rounds``, ``rounds_asked``,
            ``complete``, ``stopped`` (when and why, if early), ``clients``; accuracies
            in [0, 1]: ``test_accuracy`` (the last), ``mean_test_accuracy_last_10``
            (rounds; ``test_accuracies_in_mean`` says how many of them there are),
            ``validation_accuracy`` and ``validation_loss`` (the last, of what
            ``data.validation`` keeps), ``held_out_accuracy``, ``round_of_best_model``
            and ``test_accuracy_of_best_model`` (by ``run.keep-best``; none where there
            are several models); what else is measured on the test set, such as
            ``test_dice`` (the last), with ``test_loss`` where numbers are predicted,
            which have no accuracy; and over the clients in the last evaluated round
            ``client_accuracy_mean``, ``_std``, ``_worst10``, ``_best10``; where clients
            have models of their own ``personal_accuracy`` (``personal_loss`` where
            there is no accuracy), which is of these what ``held_out_accuracy`` is of
            the global model; where groups
            are measured ``accuracy_gap``, ``demographic_parity_gap``,
            ``equal_opportunity_gap`` and ``equalized_odds_gap``, the differences of
            :meth:`fedweight.Run.gaps` for the attribute that has the largest;
            ``effective_clients`` in the last round that has it, ``failed_rounds``,
            ``bad_replies``, ``bytes_down``, ``bytes_up`` and ``seconds``, the only one
            that depends on the clock; and ``warnings``.
        """
        trained = self.rounds[self.rounds["round"] > 0]
        test = self.measured("test_accuracy")
        last_ten = test[(test.index > 0) & (test.index > self.rounds_done - 10)]
        result: dict[str, Any] = {
            "name": self.name,
            "strategy": self.strategy,
            "data": self.data_set,
            "seed": _seed(self),
            "rounds": self.rounds_done,
            "rounds_asked": self.rounds_asked,
            "complete": self.complete,
            "stopped": ending_of(self),
            "clients": num_clients_of(self),
            "test_accuracy": last_of(test),
            "mean_test_accuracy_last_10": _number(last_ten.mean()),
            "test_accuracies_in_mean": len(last_ten),
            "validation_accuracy": last_of(self.measured("validation_accuracy")),
            "validation_loss": last_of(self.measured("validation_loss")),
            "held_out_accuracy": last_of(self.measured("evaluate_accuracy")),
            "round_of_best_model": self.best_round,
            "test_accuracy_of_best_model": _number(
                # Of several models, what is tested is the mean.
                np.nan if self.keeps_several else test.get(self.best_round, np.nan)
            ),
        }
        others = () if len(test) else ("test_loss",)
        for column in (*others, *TESTED):
            if column in self.rounds:
                result[column] = last_of(self.measured(column))
        for statistic in ("mean", "std", "worst10", "best10"):
            column = f"client_accuracy_{statistic}"
            result[column] = last_of(self.measured(column))
        for measure in ("accuracy", "loss"):
            if f"evaluate_personal_{measure}" in self.rounds:
                own = self.measured(f"evaluate_personal_{measure}")
                result[f"personal_{measure}"] = last_of(own)
                break
        result |= largest_gaps(self)
        result["effective_clients"] = last_of(self.measured("effective_clients"))
        failed = trained["status"] == "failed" if "status" in trained else None
        result["failed_rounds"] = int(failed.sum()) if failed is not None else 0
        result["bad_replies"] = _num_bad_replies(trained)
        for column in ("bytes_down", "bytes_up"):
            total = self.rounds[column].sum() if column in self.rounds else 0
            result[column] = int(total)
        result["seconds"] = _seconds(self)
        result["warnings"] = list(self.warnings)
        return result


def _seed(run: RunFolder) -> int | None:
    seed = table_of(run.config, "run").get("seed")
    return seed if isinstance(seed, int) else None


def num_clients_of(run: RunFolder) -> int | None:
    """Return how many clients a run has; ``None`` where that is not known."""
    # A partition that is computed lazily lists only who took part.
    known = table_of(run.environment, "data").get("clients")
    if isinstance(known, int):
        return known
    for name in ("partition", "clients"):
        if (run.folder / f"{name}.csv").is_file():
            return int(getattr(run, name)["client"].nunique())
    return None


def _num_bad_replies(rounds: pd.DataFrame) -> int:
    columns = [column for column in BAD_REPLIES if column in rounds]
    return int(rounds[columns].sum().sum()) if columns else 0


def _seconds(run: RunFolder) -> float | None:
    if not (run.folder / "timings.csv").is_file():
        return None
    timings = run.timings
    # Not the last "elapsed": a resumed run may have counted from anew.
    return _number(timings["seconds"].sum()) if "seconds" in timings else None


def _number(value: Any) -> float | None:
    number = float(value)
    return number if np.isfinite(number) else None


def last_of(values: pd.Series[float]) -> float | None:
    """Return the last value, or ``None`` where there is none or it is not finite."""
    return _number(values.iloc[-1]) if len(values) else None
