"""What a chunk of clients trained, as columns."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import overload

import numpy as np
import numpy.typing as npt
import torch

from ...core.layout import FlatModel
from ...core.model_rows import ModelRows
from ...core.module import FlatModule
from .carried import Carried, Named
from .memory import TrainedRows
from .task import LocalResult, Tasks


class Results(Sequence[LocalResult]):
    """The results of several clients; each one is made when it is asked for.

    Attributes
    ----------
    models : ModelRows
        What they trained, where they did.
    losses, accuracies : ndarray
        ``[C]``, float64: means over the examples as training met them.
    num_steps : ndarray
        ``[C]``, int64.
    """

    def __init__(
        self,
        module: FlatModule,
        start: FlatModel,
        tasks: Tasks,
        trained: TrainedRows,
    ) -> None:
        self.models = ModelRows(
            module.layout,
            trained.rows,
            trained.buffer_rows,
            {name: t.cpu().numpy() for name, t in trained.integers.items()},
            start.frozen,
        )
        seen = tasks.sizes * tasks.epochs
        sums = torch.stack([trained.losses, trained.correct]).double().cpu().numpy()
        self.losses: npt.NDArray[np.float64] = sums[0] / seen
        self.accuracies: npt.NDArray[np.float64] = sums[1] / seen
        self.num_steps = trained.num_steps
        self._sizes = tasks.sizes
        self._carried = trained.carried
        self._at = dict(enumerate(range(len(tasks))))

    def __len__(self) -> int:
        """Return C."""
        return len(self.models)

    @overload
    def __getitem__(self, k: int) -> LocalResult: ...
    @overload
    def __getitem__(self, k: slice) -> list[LocalResult]: ...
    def __getitem__(self, k: int | slice) -> LocalResult | list[LocalResult]:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        return LocalResult(
            self.models[k],
            float(self.losses[k]),
            float(self.accuracies[k]),
            int(self.num_steps[k]),
            *self.carried(k),
        )

    @cached_property
    def _brought(self) -> Carried:
        return self._carried.on_cpu()

    def carried(self, k: int) -> tuple[Named, Named]:
        """Return what a client carries, and keeps of its examples; if it trained."""
        at = self._at.get(k)
        if at is None:
            return {}, {}
        return self._brought.of_client(at, int(self._sizes[at]))

    def among(self, places: Sequence[int], begun: Sequence[FlatModel]) -> Results:
        """Return them among the results of others, who did not train.

        Parameters
        ----------
        places : Sequence[int]
            Whose they are.
        begun : Sequence[FlatModel]
            What each client of all began with, which the others still have.
        """
        found, number = copy.copy(self), len(begun)
        found.models = self.models.among(places, begun)
        found.losses = np.full(number, np.nan)
        found.accuracies, found.num_steps = found.losses.copy(), np.zeros(number, int)
        for name in ("losses", "accuracies", "num_steps"):
            getattr(found, name)[list(places)] = getattr(self, name)
        found._at = dict(zip(places, range(len(places)), strict=True))
        return found


def models_of(results: Sequence[LocalResult]) -> Sequence[FlatModel]:
    """Return the models of some results: rows of one matrix, where they are."""
    if isinstance(results, Results):
        return results.models
    return [result.model for result in results]


def carried_of(results: Sequence[LocalResult]) -> list[tuple[Named, Named]]:
    """Return what each client carries, and keeps of its examples."""
    if isinstance(results, Results):
        return [results.carried(k) for k in range(len(results))]
    return [(result.carry, result.kept) for result in results]


def columns_of(
    results: Sequence[LocalResult],
) -> tuple[list[float], list[float], list[int]]:
    """Return losses, accuracies and numbers of steps of some results."""
    if isinstance(results, Results):
        means = results.losses.tolist(), results.accuracies.tolist()
        return *means, results.num_steps.tolist()
    losses = [result.loss for result in results]
    accuracies = [result.accuracy for result in results]
    return losses, accuracies, [result.num_steps for result in results]
