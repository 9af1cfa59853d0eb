"""Clients that are probed together: what one asks of a model is measured of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from ..core.layout import FlatModel
from ..core.module import FlatModule
from ..data.examples import Examples
from ..metrics import Statistics, Sums
from .evaluation import outputs_of_each, sums_of_each, sums_of_own, within
from .probes import ClientModel, Evaluation, Part
from .samples import Kind, kind_of

if TYPE_CHECKING:
    from .probes import ClientRound

# Models that are evaluated at once, with their examples, have no more values together.
MOST_VALUES = 1 << 24

NOTHING = Evaluation(math.nan, math.nan)


class Peers:
    """Clients that received the same model, and are about to ask the same of it.

    What a probe of one asks is measured of all of them at the first question: of the
    received model, of the trained ones, and of what a function makes of each client.

    Parameters
    ----------
    module : FlatModule
        The architecture; its values are overwritten.
    received : FlatModel
        The model that all of them received.
    statistics : Statistics
        What is measured.
    score : str
        Which of it is the score.
    mixes : Callable[[Sequence[Examples]], bool], optional
        Whether clients' examples, of one kind, must not go through a model together;
        by default nothing of one client is measured beside another's.
    beside : Kind, optional
        Of which kind the inputs are where several models may be evaluated at once.
    """

    def __init__(
        self,
        module: FlatModule,
        received: FlatModel,
        statistics: Statistics,
        score: str,
        mixes: Callable[[Sequence[Examples]], bool] | None = None,
        beside: Kind | None = None,
    ) -> None:
        self.module = module
        self.received = received
        self.statistics = statistics
        self.score = score
        self.mixes = mixes
        self.beside = beside
        self.clients: list[ClientRound] = []
        self._places: dict[int, int] = {}
        self._evaluations: dict[tuple[object, Part], list[Evaluation]] = {}
        self._outputs: dict[Part, list[Tensor]] = {}

    def add(self, client: ClientRound) -> None:
        """Let one more client be one of them, before any is asked."""
        self._places[client.client] = len(self.clients)
        self.clients.append(client)

    def evaluation(
        self, client: ClientRound, model: FlatModel | ClientModel, part: Part
    ) -> Evaluation:
        """Return what a model achieves on a part of a client's data."""
        which: object
        if model is self.received:
            which = "received"
        elif not isinstance(model, FlatModel):
            which = model
        elif model is client.trained:
            which = "trained"
        else:
            return self._evaluated(self._sums([client.part(part)], model))[0]
        if (which, part) not in self._evaluations:
            parts = [one.part(part) for one in self.clients]
            if which == "received":
                found = self._of_received(parts)
            elif isinstance(model, FlatModel):
                found = self._of_own([one.trained for one in self.clients], parts)
            else:
                found = self._of_own(
                    [partial(model, one) for one in self.clients], parts
                )
            self._evaluations[which, part] = found
        return self._evaluations[which, part][self._places[client.client]]

    def outputs(self, client: ClientRound, part: Part) -> Tensor:
        """Return what the received model makes of a part of a client's examples."""
        if part not in self._outputs:
            parts = [one.part(part) for one in self.clients]
            apart = not self._together(parts)
            self._outputs[part] = outputs_of_each(
                self.module, self.received, parts, apart=apart
            )
        return self._outputs[part][self._places[client.client]]

    def _together(self, parts: Sequence[Examples]) -> bool:
        """Tell whether several clients' examples may go through a model together."""
        kinds = {kind_of(part) for part in parts if len(part)}
        return self.mixes is not None and len(kinds) == 1 and not self.mixes(parts)

    def _of_received(self, parts: Sequence[Examples]) -> list[Evaluation]:
        """Evaluate the received model on a part of each client's data."""
        if self._together(parts):
            return self._evaluated(self._sums(parts, self.received))
        each = [self._sums([part], self.received) for part in parts]
        return self._evaluated(Sums.joined(each))

    def _of_own(
        self,
        models: Sequence[FlatModel | Callable[[], FlatModel | None]],
        parts: Sequence[Examples],
    ) -> list[Evaluation]:
        """Evaluate a model of each client on a part of its data, or nothing."""
        beside = self._together(parts) and all(
            kind_of(part) == self.beside for part in parts if len(part)
        )
        size = self.module.layout.num_parameters
        most = MOST_VALUES if beside else 0  # Else one after another.
        found = [NOTHING] * len(parts)
        for some in within([size + part.x.size for part in parts], most):
            own = {k: model for k in some if (model := _made(models[k])) is not None}
            if not own:
                continue
            several = [parts[k] for k in own]
            if len(own) > 1:
                all_own = [*own.values()]
                sums = sums_of_own(self.module, all_own, several, self.statistics)
            else:
                sums = self._sums(several, *own.values())
            for k, evaluation in zip(own, self._evaluated(sums), strict=True):
                found[k] = evaluation
        return found

    def _sums(self, parts: Sequence[Examples], model: FlatModel) -> Sums:
        return sums_of_each(self.module, model, parts, self.statistics)

    def _evaluated(self, sums: Sums) -> list[Evaluation]:
        """Return what is measured of each client's sums."""
        measured = self.statistics.result(sums)
        none = [math.nan] * len(sums)
        columns = (
            measured[name].tolist() if name in measured else none
            for name in ("loss", "accuracy", self.score)
        )
        return [Evaluation(*row) for row in zip(*columns, strict=True)]


def _made(model: FlatModel | Callable[[], FlatModel | None]) -> FlatModel | None:
    return model if isinstance(model, FlatModel) else model()
