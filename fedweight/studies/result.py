"""A finished, or interrupted, run: its folder as frames, numbers and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..core.errors import DataError, check_choice
from ..core.extras import Imported
from ..metrics import spread_measures
from . import plots
from .summary import SummedRun, last_of

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from ..data import DataSet, FederatedData
    from .kept import PerClient
    from .plots import Chart
else:
    pd = Imported("pandas", "studies", "a run's folder")


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
        clients: Sequence[int | str] | None = None,
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
        clients : Sequence[int or str], optional
            Whose, by number or name; by default of all clients.
        model : Mapping[str, Tensor], optional
            Another model: what :meth:`best_model` or one of :meth:`models` returns.
        dataset : DataSet, optional
            The data, where they were given in Python.

        Returns
        -------
        DataFrame
            ``client`` (none for the test set), ``name`` where clients have names,
            ``row`` (the example's place, from 0, among those of the client, or of the
            test set), ``file_row`` where the data are a file's (which of its rows below
            the header it is, from 0, as ``pandas.read_csv(path).iloc`` counts; of test
            data in a file of their own, of that one), ``target`` and ``prediction``,
            and ``score_0``, ``score_1``, ..., the probability of each class, where
            there are classes; and the examples' attributes, each by its name, as
            fairlearn's ``MetricFrame`` takes them: ``sensitive_features =
            frame["sex"]``. One called as another column is has ``attribute_`` before
            its name.

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
        ...     model=run.personal_models()["site-a"], clients=["site-a"]
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

    def data(self, dataset: DataSet | None = None) -> FederatedData:
        """Return the run's data, divided as the run did it, from its ``config.toml``.

        ``run.data().test`` and ``run.data().client(3).held_out`` have inputs ``x``,
        targets ``y`` and ``attributes``, by name; what codes of attributes stand for is
        in ``run.data().attribute_names``.

        Parameters
        ----------
        dataset : DataSet, optional
            The data, where they were given in Python.

        Raises
        ------
        ConfigurationError
            If the data were given in Python, and are not given again.
        """
        from .predicting import components_of

        return components_of(self, dataset).data

    def spread(self, column: str = "accuracy") -> pd.DataFrame:
        """Return how a measure is spread over the clients, round by round.

        Parameters
        ----------
        column : str
            One of ``clients.csv`` of which more is better.

        Returns
        -------
        DataFrame
            A row for each round in which a client has it: what
            :func:`fedweight.metrics.spread_measures` returns, weighted by the numbers
            of held-out examples where they are recorded.
        """
        values = self.by_number(column)
        sizes = self.by_number("held_out_examples").reindex(columns=values.columns)
        sizes = sizes.reindex(index=values.index)
        rows = {}
        for number in values.index.tolist():
            own = sizes.loc[number]
            known = own.fillna(0) if own.notna().any() else None
            rows[number] = spread_measures(values.loc[number], known)
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("round")

    def gaps(
        self,
        attribute: str | Sequence[str],
        *,
        part: Literal["held-out", "test"] | None = None,
        round: int | None = None,
        client: int | str | None = None,
        method: Literal["between_groups", "to_overall"] = "between_groups",
        agg: Literal["worst_case", "mean"] = "worst_case",
        control_features: str | None = None,
        resamples: int = 1000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Return gaps between the groups of a sensitive attribute, with intervals.

        They are defined as fairlearn's, of the rates that :attr:`groups` has.
        ``difference`` lies in [0, 1] and is 0 where all groups have the same; ``ratio``
        lies in [0, 1] and is 1 where they have. A rate that is not defined for a group,
        such as the true positive rate of one without a positive example, leaves that
        group out; a gap is NaN, and a warning says why, where fewer than two groups
        have its rate, or one of its two rates.

        Parameters
        ----------
        attribute : str or sequence of str
            The attribute, such as ``"sex"``; or two of them, whose groups were crossed
            (``groups.intersections``).
        part : {"held-out", "test"}, optional
            Of all clients' held-out examples together, or of the server's test set; by
            default the latter if there is one.
        round : int, optional
            By default the last one that was measured.
        client : int or str, optional
            One client, by number or name, and its held-out examples; groups that it
            lacks are left out.
        method : {"between_groups", "to_overall"}
            The largest gap between two groups, or between a group and everybody.
        agg : {"worst_case", "mean"}
            How equalised odds are one number: the larger one of the gaps in true and in
            false positive rates (of ratios the smaller), or their mean.
        control_features : str, optional
            Another attribute, within each of whose groups gaps are taken.
        resamples : int
            How often the examples are drawn anew for the intervals; 0 has none.
        confidence : float
            In (0, 1): the share of resamples that an interval holds, half of the others
            on each side of it. It tells how much the gap of this model depends on which
            examples were measured, and not how much the model depends on the seed.
        seed : int
            Draws them.

        Returns
        -------
        DataFrame
            ``value``, ``low`` and ``high`` by gap: ``accuracy_difference``;
            ``demographic_parity_difference``, of the selection rates;
            ``equal_opportunity_difference``, of the true positive rates;
            ``equalized_odds_difference``, of both rates; and ``..._ratio`` of each. The
            index has the control group besides, if any. Without a positive class (see
            ``groups.positive``) there are only those of the accuracy.

        Raises
        ------
        DataError
            If no groups were measured (of that client), or only one has examples.
        ConfigurationError
            If those groups or that round were not measured.

        References
        ----------
        S. Bird et al., "Fairlearn: A toolkit for assessing and improving fairness in
        AI", Microsoft MSR-TR-2020-32, 2020. Equalised odds and equal opportunity:
        M. Hardt, E. Price, N. Srebro, "Equality of Opportunity in Supervised Learning",
        NeurIPS 2016. The percentile bootstrap: B. Efron, R. Tibshirani, "An
        Introduction to the Bootstrap", 1993, chapter 13.
        """
        from .gaps import group_gaps

        return group_gaps(
            self,
            attribute,
            part,
            round,
            client,
            method,
            agg,
            control_features,
            resamples,
            confidence,
            seed,
        )

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
