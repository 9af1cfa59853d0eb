"""Which clients take part in a round, and for how long."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence, Set
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord
from flwr.serverapp import Grid
from torch import Tensor

from ..core.errors import ConfigurationError
from ..core.rng import Purpose, generator
from ..messages import keys
from ..messages.grids import is_complete, number_of, sizes_of

log = logging.getLogger("fedweight")


class Draw(NamedTuple):
    """Who may be drawn next, and how many of them.

    Attributes
    ----------
    fraction : float
        Share of the clients that are drawn, in [0, 1], rounded down;
        ``min_train_nodes`` are drawn at least.
    chances : Sequence[float] or array or Tensor, optional
        For each client, in the order of their numbers, 0 or more and finite, and for
        one of them above 0; their scale does not matter. Clients are drawn one after
        another without being put back, each time in proportion to the chances of those
        that are left. One of chance 0 is never drawn, also where fewer are left then.
        By default all have the same.
    """

    fraction: float
    chances: Sequence[float] | npt.NDArray[np.float64] | Tensor | None = None


# What says so, of all clients' numbers and of how many of them may have examples.
Drawing = Callable[[tuple[int, ...], int], Draw]


def sample(
    grid: Grid,
    stream: Callable[[], np.random.Generator],
    fraction: float,
    least: int,
    available: int,
    empty: Set[int] = frozenset(),
    drawing: Drawing | None = None,
) -> tuple[list[tuple[int, int]], int]:
    """Draw ``(client, node)`` pairs, in the order of the clients' numbers.

    ``drawing`` may say another ``fraction``, and how likely each of them is.

    With them comes how many clients there are in all, drawn or not, those known to be
    ``empty`` not counted.
    """
    if fraction == 0:
        return [], 0
    number = number_of(grid)
    nodes = nodes_there(grid, max(available, least))
    population = _count(nodes, number, empty)
    if isinstance(nodes, list):
        nodes.sort(key=number)
    chances = None
    if drawing is not None:
        clients = tuple(map(number, nodes))
        fraction, chances = drawing(clients, population)
    size = max(int(len(nodes) * fraction), least)
    if chances is not None:
        likely = np.asarray(chances, np.float64).copy()
        likely[[client in empty for client in clients]] = 0.0
        nodes = [nodes[i] for i in _likely(stream(), likely, size)]
    elif size < len(nodes):
        chosen = np.sort(stream().choice(len(nodes), size, replace=False))
        nodes = [nodes[i] for i in chosen.tolist()]
    return [(number(node), node) for node in nodes], population


def _likely(
    stream: np.random.Generator, chances: npt.NDArray[np.float64], size: int
) -> list[int]:
    """Draw places without putting them back, in proportion to their chances.

    Those with the largest ``log(chance) + Gumbel noise``, a number of the stream for
    each place: the law of drawing one after another (J. Yellott, "The Relationship
    between Luce's Choice Axiom, Thurstone's Theory of Comparative Judgment, and the
    Double Exponential Distribution", Journal of Mathematical Psychology 1977), with
    which no chance is too small.
    """
    noise = stream.gumbel(size=len(chances))
    possible = np.flatnonzero(chances)
    rank = np.log(chances[possible]) + noise[possible]
    first = np.argsort(-rank, kind="stable")[:size]
    return [int(place) for place in np.sort(possible[first])]


def nodes_there(grid: Grid, least: int) -> Sequence[int]:
    """Return the nodes, once there are so many: a simulation's range, or a list.

    Raises
    ------
    ConfigurationError
        If there never will be.
    """
    complete = is_complete(grid)
    nodes = grid.get_node_ids()
    # A simulation's range is in the clients' order, and is not written out.
    if complete and isinstance(nodes, range):
        there: Sequence[int] = nodes
    else:
        there = list(nodes)
    while len(there) < least:
        if complete:
            raise ConfigurationError(
                f"the strategy waits for {least} clients (min_train_nodes, "
                "min_evaluate_nodes, min_available_nodes), but the simulation "
                f"has {len(there)}. Lower those or simulate more clients."
            )
        log.info("waiting for clients: %d connected", len(there))
        time.sleep(1)  # Flower's Grid offers no event for a node that connects.
        there = list(grid.get_node_ids())
    return there


def _count(nodes: Sequence[int], number: Callable[[int], int], empty: Set[int]) -> int:
    if isinstance(nodes, range):
        return len(nodes) - len(empty)  # Nobody leaves a simulation.
    return sum(number(node) not in empty for node in nodes)


def count(grid: Grid, empty: Set[int]) -> int:
    """Return how many clients there are in all; ``empty`` ones are not counted."""
    nodes, number = grid.get_node_ids(), number_of(grid)
    return _count(nodes if isinstance(nodes, range) else list(nodes), number, empty)


def _by_number(grid: Grid) -> dict[int, int]:
    number = number_of(grid)
    return {number(node): node for node in grid.get_node_ids()}


def nodes_of(grid: Grid, clients: Sequence[int]) -> list[tuple[int, int]]:
    """Return ``(client, node)`` pairs of some clients."""
    nodes = grid.get_node_ids()
    if isinstance(nodes, range):  # In the clients' order.
        return [(client, nodes[client]) for client in clients]
    known = _by_number(grid)
    return [(client, known[client]) for client in clients]


def numbered(grid: Grid) -> dict[int, int]:
    """Return the node of every client that may have examples, by its number."""
    known = _by_number(grid)
    empty = known_empty(grid, list(known), frozenset())
    return {client: known[client] for client in sorted(known) if client not in empty}


def known_empty(grid: Grid, clients: Sequence[int], said: Set[int]) -> set[int]:
    """Return which clients are known to have no examples.

    A simulation knows; of others, those whose reply has said so.
    """
    sizes = sizes_of(grid, clients)
    empty = {client for client in clients if client in said}
    if sizes is not None:
        empty |= {c for c, size in zip(clients, sizes, strict=True) if size == 0}
    return empty


def straggler_epochs(
    seed: int, round: int, share: float, cohort: int, config: ConfigRecord
) -> list[int | None]:
    """Return the epochs of each straggler, ``None`` for all other clients.

    Tian Li et al., "Federated Optimization in Heterogeneous Networks", MLSys
    2020: all but ``round(K * (1 - share))`` clients do U{1, ..., E - 1} epochs.
    """
    epochs: list[int | None] = [None] * cohort
    if share == 0:
        return epochs
    full = config.get(keys.LOCAL_EPOCHS)
    if not isinstance(full, int) or full < 2:
        raise ConfigurationError(
            f"stragglers = {share:g} needs local epochs of 2 or more "
            f"(the train config's '{keys.LOCAL_EPOCHS}'), got {full!r}: a "
            "straggler does fewer epochs than the others, but at least one."
        )
    stream = generator(seed, Purpose.STRAGGLERS, round)
    slow = cohort - math.floor(cohort * (1 - share) + 0.5)
    for k in stream.choice(cohort, slow, replace=False):
        epochs[k] = int(stream.integers(1, full))
    return epochs
