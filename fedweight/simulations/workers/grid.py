"""Grids whose clients are in worker processes, and the one on this machine alone."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from ...core.errors import check_range
from ...core.threads import num_cores
from ..grid import Nodes, RunConfig, SimulationGrid, is_stranger
from .pool import Pool
from .processes import Processes


class PooledGrid(SimulationGrid):
    """A grid with a pool of workers; whose they are says the grid that derives from it.

    Parameters
    ----------
    pool : Pool
        The workers.
    client_app : ClientApp
        What every client runs.
    nodes : Nodes
        The simulated nodes.
    """

    _pool: Pool

    @property
    def workers(self) -> int:
        """How many worker processes there are."""
        return len(self._pool.crew.handles)

    def load(
        self,
        client_app: ClientApp,
        num_clients: int,
        run_config: RunConfig | None = None,
        **nodes: Any,
    ) -> None:
        """Begin anew with another app on the same workers, as a new grid would.

        Clients that are being handled are waited for, their replies and all clients'
        states are forgotten.
        """
        self._load(client_app, Nodes(num_clients, dict(run_config or {}), **nodes))

    def _load(self, client_app: ClientApp, nodes: Nodes) -> None:
        self._begin(nodes)
        self.seen.wanted = is_stranger(client_app)
        self.client_app = client_app
        self._pool.load(client_app, nodes, self.store, self.kept_tables)

    def client_states(self) -> dict[int, RecordDict]:  # noqa: D102
        return self._pool.client_states()

    def restore_clients(self, states: Mapping[int, RecordDict]) -> None:  # noqa: D102
        self._pool.restore_clients(states)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages to the clients; return the messages' ids at once."""
        batch = self._addressed(messages)
        self._pool.push(batch)
        return [message.metadata.message_id for message, _ in batch]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to some messages that are there by now, each once."""
        replies = self._pool.pull(message_ids)
        self.seen.replied(replies)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Let the clients handle the messages; return the replies in their order.

        What is not there after ``timeout`` seconds is missing. Clients that have not
        begun by then never do; what the others reply is dropped, but their states
        are kept.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        batch = self._addressed(messages)
        pushed = self._pool.push(batch)
        try:
            self._pool.wait(pushed, deadline)
        finally:
            replies = self._pool.finish(pushed, batch)
        self.store.relieve()
        self.seen.replied(replies)
        return replies


class ProcessGrid(PooledGrid):
    """Simulated clients in processes of this machine, for apps that are not ours.

    Each handles one client at a time; what a client does to its process is undone
    (:mod:`fedweight.simulations.isolation`). The processes see no GPU, as Flower's do
    unless they are given a share of one.

    Parameters
    ----------
    client_app : ClientApp
        What every client runs. It is sent to the processes once, with all it refers to.
    num_clients : int
        N, 1 or more.
    run_config : Mapping
        The run's settings, as the app reads them from its context.
    workers : int, optional
        How many processes; by default one for each core, and none without a client.
    **nodes
        The other parameters of :class:`~fedweight.simulations.grid.Nodes`.

    Raises
    ------
    EngineError
        If the app cannot be sent to the processes.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_clients: int,
        run_config: RunConfig | None = None,
        *,
        workers: int | None = None,
        **nodes: Any,
    ) -> None:
        if workers is not None:
            check_range("workers", workers, 1)
        of_run = Nodes(num_clients, dict(run_config or {}), **nodes)
        self._pool = Pool(Processes(workers or min(num_cores(), num_clients)))
        self._guard = weakref.finalize(self, self._pool.close)
        try:
            self._load(client_app, of_run)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes, whatever they do."""
        self._guard()
