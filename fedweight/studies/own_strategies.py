"""A user's own strategy, tried before the first round on updates that are made up."""

from __future__ import annotations

import numpy as np
import torch
from flwr.serverapp.strategy import Strategy

from ..clients.noise import seeded
from ..clients.probes import REPORTED, SCORES
from ..core.errors import ConfigurationError, FedweightError
from ..core.layout import FlatModel
from ..core.own_code import where_raised
from ..core.texts import plain
from ..core.threads import one_thread
from ..core.updates import StackedUpdates
from ..messages import keys
from ..strategies import WeightingStrategy
from ..strategies.round import Round
from .components import Components

# So many numbers are made up at most: more would be felt.
MOST_NUMBERS = 5 * 10**6

# A method with other hooks expects of a round what nobody could make up.
_HOOKS = ("prepare", "mask", "assign", "draw", "tell", "ask", "admit", "screen")
_OTHERS = ("aggregate_buffers", "aggregate_train", "configure_train", "start")


def try_own(components: Components, strategy: Strategy, model: FlatModel) -> None:
    """Have a user's strategy weigh updates that are made up, if that costs little.

    Parameters
    ----------
    components : Components
        What is to be run. A strategy of its own is made for it: nothing is left behind.
    strategy : Strategy
        What was made; others than a user's :class:`WeightingStrategy` that only weighs
        or aggregates are not tried.
    model : FlatModel
        The initial one.

    Raises
    ------
    ConfigurationError
        If it raises what is no error of this library: it would do so in the first
        round.
    """
    if not isinstance(strategy, WeightingStrategy) or not _only_weighs(strategy):
        return
    sizes = components.known_sizes
    clients = np.flatnonzero(sizes)[: components.cohort()].tolist()
    if not clients or len(clients) * model.parameters.numel() > MOST_NUMBERS:
        return
    seed = components.configuration["run"]["seed"]
    try:
        with one_thread(), seeded(seed, torch.device("cpu")):
            tried = components.strategy()
            assert isinstance(tried, WeightingStrategy)
            rows = [model.parameters + _noise(model) for _ in clients]
            metrics = {**dict.fromkeys((*REPORTED, *strategy.request), 0.5)}
            tried.aggregate(
                Round(
                    number=1,
                    clients=tuple(clients),
                    model=model,
                    updates=StackedUpdates(
                        rows,
                        model.parameters,
                        model.layout.offsets,
                        accumulate=tried.accumulate,
                        threads=tried.threads,
                    ),
                    num_examples=torch.tensor(sizes[clients], dtype=torch.float64),
                    metrics=tuple(
                        {
                            **metrics,
                            keys.NUM_EXAMPLES: int(sizes[client]),
                            keys.NUM_STEPS: 1,
                            keys.TRAIN_LOSS: 0.5 + 0.5 / (1 + k),
                        }
                        for k, client in enumerate(clients)
                    ),
                    profiles=({},) * len(clients),
                    state=tried.begin(),
                    population=int(np.count_nonzero(sizes)),
                )
            )
    except FedweightError:
        return  # Of numbers that are made up; a round that fails says so.
    except Exception as error:
        name = components.configuration["strategy"]["name"]
        raise ConfigurationError(
            f"strategy.name: '{name}' was tried on updates that were made up, and "
            f"raised {plain(f'{type(error).__name__}: {error}')} "
            f"({where_raised(error)})."
        ) from error


def _only_weighs(strategy: WeightingStrategy) -> bool:
    if type(strategy).__module__.partition(".")[0] == __name__.partition(".")[0]:
        return False
    if strategy.probes or strategy.queries or not {*strategy.request} <= SCORES:
        return False
    return not any(strategy.overrides(name) for name in (*_HOOKS, *_OTHERS))


def _noise(model: FlatModel) -> torch.Tensor:
    return 0.01 * torch.randn_like(model.parameters)
