"""The clients' personal models: trained, kept and evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from torch import nn

from ..core.errors import ConfigurationError
from ..core.layout import FlatModel, Layout
from ..core.module import FlatModule
from ..core.texts import listed
from ..messages import keys
from ..messages.shared import Long
from ..metrics import Statistics
from .client_state import read_models, write_results
from .client_tasks import ClientTask
from .cohort_trainer import CohortTrainer
from .evaluation import EVALUATION_TARGETS, sums_of_each, sums_of_own
from .modules import Modules
from .objectives import Objective
from .objectives.part import is_of
from .personal.base import Personal, phases_of
from .samples import kind_of
from .steps.task import LocalResult

# What is reported of a personal model, by what it is called of the global one.
PERSONAL = {
    keys.LOSS: keys.PERSONAL_LOSS,
    keys.ACCURACY: keys.PERSONAL_ACCURACY,
}

# Models that are evaluated at once have no more than so many values together.
MOST_VALUES = 1 << 24

# Makes a trainer of an objective, with modules.
MakeTrainer = Callable[[Modules, Objective], CohortTrainer]


class PersonalModels:
    """Trains what clients keep of their own, in every round or after the last.

    Parameters
    ----------
    method : Personal
        What is minimised, and from where on.
    local : Objective
        What local training minimises.
    modules : Modules
        The global model's.
    make_trainer : Callable[[Modules, Objective], CohortTrainer]
        Makes what trains with an objective, and with streams of its own.
    statistics : Statistics
        What is measured of them.
    """

    def __init__(
        self,
        method: Personal,
        local: Objective,
        modules: Modules,
        make_trainer: MakeTrainer,
        statistics: Statistics,
    ) -> None:
        self.method = method
        self.statistics = statistics
        self.modules: Modules | None = None
        if method.layers:
            make = partial(own_layers, modules.architecture, method)
            modules = self.modules = Modules(make, modules.device, modules.precision)
        phases, trainers = phases_of(method, local), dict[int, CohortTrainer]()
        for phase in phases:
            goal = phase.objective
            if id(goal) not in trainers:
                trainers[id(goal)] = make_trainer(modules, goal)
        self.phases = [(trainers[id(phase.objective)], phase) for phase in phases]

    @property
    def in_rounds(self) -> bool:
        """Whether they are trained in every round."""
        return self.method.when == "rounds"

    def train(
        self,
        module: FlatModule,
        start: FlatModel,
        clients: Sequence[ClientTask],
        shared: Mapping[str, Long],
        trained: Sequence[LocalResult] | None = None,
        *,
        batched: bool,
        cancelled: Callable[[], bool],
    ) -> Sequence[LocalResult]:
        """Train the personal models of some clients.

        Parameters
        ----------
        module : FlatModule
            What is trained where they train one after another.
        start : FlatModel
            The global model that they received.
        clients : Sequence[ClientTask]
            Whom to train.
        shared : Mapping[str, list of float]
            What the server tells all of them alike, but for values of parameters.
        trained : Sequence[LocalResult], optional
            What their local training made; there is none after the rounds, when all
            begin with the global model.
        batched : bool
            Whether to train them at once, where that is the same.
        cancelled : Callable[[], bool]
            Tells whether to stop.
        """
        results: Sequence[LocalResult] = []
        with self._lent(module) as own_module:
            layout = own_module.layout
            start = start.laid_out(layout)
            own: list[FlatModel] | None = None
            if trained is not None and self.method.start == "personal":
                kept = read_models(clients, layout, start.frozen)
                own = [kept.get(client.number, start) for client in clients]
            elif trained is not None:
                own = [result.model.laid_out(layout) for result in trained]
            for part, (trainer, phase) in enumerate(self.phases):
                # Most clients share their instructions.
                alike = {id(c.instructions): c.instructions for c in clients}
                told = {
                    key: replace(
                        one,
                        epochs=phase.epochs,
                        mu=None,
                        learning_rate=(
                            one.learning_rate
                            if phase.learning_rate is None
                            else phase.learning_rate
                        ),
                    )
                    for key, one in alike.items()
                }
                results = trainer.train(
                    own_module,
                    start,
                    [
                        c._replace(instructions=told[id(c.instructions)])
                        for c in clients
                    ],
                    shared,
                    batched=batched,
                    cancelled=cancelled,
                    own=own,
                    part=part,
                )
                own = [result.model for result in results]
        return results

    def keep(
        self, clients: Sequence[ClientTask], results: Sequence[LocalResult]
    ) -> None:
        """Let clients take their personal models along."""
        write_results(clients, results, "personal", models=True)

    def evaluate(
        self,
        module: FlatModule,
        received: FlatModel,
        clients: Sequence[ClientTask],
        *,
        batched: bool,
    ) -> list[dict[str, float]]:
        """Return loss and accuracy of personal models on the clients' held-out data.

        Nothing for a client that has none.

        Parameters
        ----------
        module : FlatModule
            What evaluates them where that is done one after another.
        received : FlatModel
            The global model.
        clients : Sequence[ClientTask]
            Whose.
        batched : bool
            Whether to evaluate several at once, where they train so.
        """
        found: list[dict[str, float]] = [{} for _ in clients]
        with self._lent(module) as own_module:
            layout = own_module.layout
            models = read_models(clients, layout, received.laid_out(layout).frozen)
            having = [k for k, c in enumerate(clients) if c.number in models]
            for some in self._together(having, clients, layout, batched=batched):
                own = [models[clients[k].number] for k in some]
                parts = [clients[k].data.held_out for k in some]
                if len(some) > 1:
                    sums = sums_of_own(own_module, own, parts, self.statistics)
                else:
                    sums = sums_of_each(own_module, own[0], parts, self.statistics)
                measured = self.statistics.result(sums)
                for name, key in PERSONAL.items():
                    if name in measured:
                        for k, value in zip(some, measured[name].tolist(), strict=True):
                            found[k][key] = value
        return found

    def _together(
        self,
        having: Sequence[int],
        clients: Sequence[ClientTask],
        layout: Layout,
        *,
        batched: bool,
    ) -> list[list[int]]:
        """Return which clients' models are evaluated at once."""
        parts = [clients[k].data.held_out for k in having]
        kinds = {kind_of(part) for part in parts}
        # What models say of pixels is too much to be held of all.
        small = sum(part.y.size for part in parts) <= EVALUATION_TARGETS
        if batched and small and len(having) > 1 and len(kinds) == 1:
            trainer, _ = self.phases[-1]
            if trainer.kind_if_batched([clients[k] for k in having]) in kinds:
                most = max(1, MOST_VALUES // max(1, layout.num_parameters))
                cuts = range(0, len(having), most)
                return [list(having[k : k + most]) for k in cuts]
        return [[k] for k in having]

    @contextmanager
    def _lent(self, module: FlatModule) -> Iterator[FlatModule]:
        """Lend a module in which what is trained is the client's own."""
        if self.modules is None:
            yield module
        else:
            with self.modules.lend() as own:
                yield own


def own_layers(make: Callable[[], nn.Module], method: Personal) -> nn.Module:
    """Build a model in which nothing is trained but what is a client's own.

    Raises
    ------
    ConfigurationError
        If the model has no such layers.
    """
    module = make()
    names = [name for name, _ in module.named_parameters()]
    odd = [one for one in method.layers if not any(is_of(n, [one]) for n in names)]
    if odd:
        raise ConfigurationError(
            f"personal {type(method).__name__}: the model has no layer '{odd[0]}'. It "
            f"has {listed(names)}. {method.advice or 'Name others in `layers`.'}"
        )
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(is_of(name, method.layers))
    return module
