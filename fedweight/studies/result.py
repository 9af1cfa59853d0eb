"""A finished, or interrupted, run: its folder as frames, numbers and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..core.errors import DataError, check_choice
from . import plots
from .summary import SummedRun, last_of

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from ..data import DataSet
    from .kept import PerClient
    from .plots import Chart


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

    def plot_accuracy(self) -> Chart:
        """Draw the accuracy over rounds."""
        return plots.over_rounds(self, "accuracy")

    def plot_loss(self) -> Chart:
        """Draw the loss over rounds."""
        return plots.over_rounds(self, "loss")

    def plot_measure(self, measure: str) -> Chart:
        """Draw another measure of the model over rounds, such as ``"rmse"``.

        Parameters
        ----------
        measure : str
            As in the columns ``test_rmse`` and ``evaluate_rmse`` of ``rounds``.
        """
        return plots.over_rounds(self, measure)

    def plot_weights(self, order: str = "number") -> Chart:
        """Draw how much each client counted in each round.

        Parameters
        ----------
        order : {"number", "size"}
            Clients by number, or those with most data first.
        """
        return plots.heatmap(self, order)

    def plot_weight_vs_size(self, round: int | None = None) -> Chart:
        """Draw the clients' weights against their shares of the data.

        Parameters
        ----------
        round : int, optional
            By default the last round with weights.
        """
        return plots.against_data(self, round)

    def plot_client_accuracies(self, measure: str = "accuracy") -> Chart:
        """Draw every client's accuracy in the last evaluated round.

        Parameters
        ----------
        measure : str
            Another column of ``clients``, such as ``"rmse"``.
        """
        return plots.ranked(self, measure)

    def plot_client_accuracies_by_round(self, measure: str = "accuracy") -> Chart:
        """Draw how the clients' accuracies spread, round by round.

        Parameters
        ----------
        measure : str
            Another column of ``clients``, such as ``"rmse"``.
        """
        return plots.clients_by_round(self, measure)

    def plot_personal(self) -> Chart:
        """Draw what each client's own model reaches against the global one."""
        return plots.own_models(self)

    def plot_labels(self, order: str = "number") -> Chart:
        """Draw which classes each client holds.

        Parameters
        ----------
        order : {"number", "size"}
            Clients by number, or those with most data first.
        """
        return plots.labels(self, order)

    def plot_recorded(self, name: str = "") -> Chart:
        """Draw a number that the method itself recorded of each round.

        Parameters
        ----------
        name : str
            Which column of ``rounds`` or ``clients``; by default the first.
        """
        return plots.recorded(self, name)

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

    def personal_models(self) -> PerClient:
        """Return the clients' personal models, by the client's number or name.

        Each is a whole model as :meth:`model` returns it, and is read when it is asked
        for; what is not a client's own is the global model's.

        Returns
        -------
        Mapping[int | str, dict[str, Tensor]]
            Of those clients that have one.

        Raises
        ------
        DataError
            There are none: the run did not end, clients have none, were devices that
            keep their own, or ``run.keep-clients`` was off.

        Examples
        --------
        >>> run.personal_models()[3]  # doctest: +SKIP
        >>> run.predictions(
        ...     model=run.personal_models()["site-a"], clients=[3]
        ... )  # doctest: +SKIP
        """
        return self._kept("personal", self.model)

    def client_states(
        self, owner: Literal["objective", "personal"] = "objective"
    ) -> PerClient:
        """Return what an objective carries with each client, by its number or name.

        ``"carry ..."`` is the client's, ``"kept ..."`` has a value for each of its
        training examples.

        Parameters
        ----------
        owner : {"objective", "personal"}
            Whose: that of the local training, or of the personal models.

        Returns
        -------
        Mapping[int | str, dict[str, Tensor]]
            Of those clients that took part.

        Raises
        ------
        DataError
            There is nothing; as for :meth:`personal_models`.
        """
        check_choice("owner", owner, ("objective", "personal"))
        return self._kept(owner)

    def _kept(
        self, table: str, others: Callable[[], Mapping[str, Tensor]] | None = None
    ) -> PerClient:
        from .kept import FILES, PerClient

        path = self.folder / FILES[table]
        if not path.is_file():
            raise DataError(
                f"{path} is missing: it is written at the end of a simulation in which "
                "clients keep something, unless run.keep-clients = false."
            )
        return PerClient(path, self.name_of, others)

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
