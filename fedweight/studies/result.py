"""A finished, or interrupted, run: its folder as frames, numbers and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from . import plots
from .summary import SummedRun, last_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

    from ..data import DataSet


class Run(SummedRun):
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

    def predictions(
        self,
        part: Literal["held-out", "train", "test"] = "held-out",
        clients: Sequence[int] | None = None,
        *,
        model: Mapping[str, Tensor] | None = None,
        dataset: DataSet | None = None,
    ) -> pd.DataFrame:
        """Return what the run's final model predicts, example by example.

        The data are loaded and divided as the run did it, from its ``config.toml``.

        Parameters
        ----------
        part : {"held-out", "train", "test"}
            Which examples: those that clients hold out, those that they train on, or
            the server's test set.
        clients : Sequence[int], optional
            Whose, by number; by default of all clients.
        model : Mapping[str, Tensor], optional
            Another model: what :meth:`best_model` or one of :meth:`models` returns.
        dataset : DataSet, optional
            The data, where they were given in Python.

        Returns
        -------
        DataFrame
            ``client`` (none for the test set), ``name`` where clients have names,
            ``row`` (the example's place among the client's), ``target`` and
            ``prediction``, and ``score_0``, ``score_1``, ..., the probability of each
            class, where there are classes.

        Raises
        ------
        DataError
            If the run has no model, or there are no such examples.
        ConfigurationError
            If the data were given in Python, and are not given again.
        """
        from .predicting import predictions

        return predictions(self, part, clients, model, dataset)

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
            done += " (stopped early)" if self.stopped else ""
        accuracy = last_of(self.accuracy)
        reached = "" if accuracy is None else f", accuracy {accuracy:.4f}"
        return f"Run({str(self.folder)!r}: {self.name}, {done}{reached})"
