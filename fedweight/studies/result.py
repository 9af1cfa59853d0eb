"""A finished, or interrupted, run: its folder as frames, numbers and figures."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plots
from .endings import warnings_of
from .reader import RunFolder
from .summary import last_of, summary_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Run(RunFolder):
    """A run's folder as frames, numbers, figures and a report.

    Everything is read when it is asked for and then kept. An interrupted run can be
    read like a finished one: it has fewer rounds and perhaps no model. To see rounds
    that were written later, make a new ``Run``.

    Parameters
    ----------
    folder : str or Path
        What ``fedweight run`` wrote. It needs ``config.toml`` and ``rounds.csv``.

    Raises
    ------
    DataError
        The folder is not a run's; the message names the file that is missing.
    """

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
            ``complete``, ``clients``; accuracies in [0, 1]: ``test_accuracy`` (the
            last),
            ``mean_test_accuracy_last_10`` (rounds; ``test_accuracies_in_mean`` says how
            many of them there are), ``held_out_accuracy``, and over
            the clients in the last evaluated round ``client_accuracy_mean``,
            ``_std``, ``_worst10``, ``_best10``; ``effective_clients`` in the last
            round that has it, ``failed_rounds``, ``bad_replies``, ``bytes_down``,
            ``bytes_up`` and ``seconds``, the only one that depends on the clock; and
            ``warnings``.
        """
        return summary_of(self)

    # ------------------------------------------------------------------- figures

    def plot_accuracy(self) -> Figure:
        """Draw the accuracy over rounds."""
        return plots.figure_of(plots.accuracy(self))

    def plot_loss(self) -> Figure:
        """Draw the loss over rounds."""
        return plots.figure_of(plots.loss(self))

    def plot_weights(self, order: str = "number") -> Figure:
        """Draw how much each client counted in each round.

        Parameters
        ----------
        order : {"number", "size"}
            Clients by number, or those with most data first.
        """
        return plots.figure_of(plots.weights_heatmap(self, order=order))

    def plot_weight_vs_size(self, round: int | None = None) -> Figure:
        """Draw the clients' weights against their shares of the data.

        Parameters
        ----------
        round : int, optional
            By default the last round with weights.
        """
        return plots.figure_of(plots.weight_vs_size(self, round=round))

    def plot_client_accuracies(self) -> Figure:
        """Draw every client's accuracy in the last evaluated round."""
        return plots.figure_of(plots.client_accuracies(self))

    def plot_client_accuracies_by_round(self) -> Figure:
        """Draw how the clients' accuracies spread, round by round."""
        return plots.figure_of(plots.client_accuracies_by_round(self))

    def plot_labels(self, order: str = "number") -> Figure:
        """Draw which classes each client holds.

        Parameters
        ----------
        order : {"number", "size"}
            Clients by number, or those with most data first.
        """
        return plots.figure_of(plots.labels(self, order=order))

    def plot_recorded(self) -> Figure:
        """Draw what the method itself recorded of each round."""
        return plots.recorded(self)

    def report(self) -> Path:
        """Write ``report.html`` anew and return its path."""
        from .report import write_report

        return write_report(self)

    def _repr_html_(self) -> str:
        from .report import notebook_summary

        return notebook_summary(self)

    def __repr__(self) -> str:
        done = f"{self.rounds_done} rounds"
        if self.rounds_asked is not None and self.rounds_done < self.rounds_asked:
            done = f"{self.rounds_done} of {self.rounds_asked} rounds"
        accuracy = last_of(self.accuracy)
        reached = "" if accuracy is None else f", accuracy {accuracy:.4f}"
        return f"Run({str(self.folder)!r}: {self.name}, {done}{reached})"
