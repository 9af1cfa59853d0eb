"""The local grid: every client in this process, one after another or in threads.

No Ray, no daemon, no start-up: a debugger stops where it should.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from ..errors import check_range
from .grid import RunConfig, SimulationGrid, execute, make_context

# A client whose training takes longer than this releases the interpreter for long
# enough at a time that a second thread gains (measured: benchmarks/).
WORTH_A_THREAD = 0.05


class LocalGrid(SimulationGrid):
    """Simulated clients in this process.

    Parameters
    ----------
    client_app : ClientApp
        What every client runs.
    num_clients : int
        N, 1 or more.
    run_config : Mapping
        The run's settings, as the app reads them from its context.
    threads : int, optional
        How many clients train at once, for apps that say they are ``thread_safe``
        (ours are). By default as many as there are cores where clients take long
        enough to gain from it, else one. It never changes the result.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_clients: int,
        run_config: RunConfig | None = None,
        *,
        threads: int | None = None,
    ) -> None:
        super().__init__(num_clients)
        if threads is not None:
            check_range("threads", threads, 1)
        self.client_app = client_app
        self.run_config = dict(run_config or {})
        self._threads = threads
        self.contexts: dict[int, Context] = {}
        self._replies: dict[str, Message] = {}

    def context(self, client: int) -> Context:
        """Return a client's context, which keeps its state between messages."""
        if client not in self.contexts:
            self.contexts[client] = make_context(
                client, self.num_clients, self.run_config
            )
        return self.contexts[client]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let the clients handle the messages, now; return the messages' ids."""
        batch = self._addressed(messages)
        for message, reply in self._handle(batch, None):
            self._replies[message.metadata.message_id] = reply
        return [message.metadata.message_id for message in batch]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to some messages, each once."""
        known = [i for i in message_ids if i in self._replies]
        return [self._replies.pop(i) for i in known]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Let the clients handle the messages; return the replies in their order.

        No client begins after ``timeout`` seconds; those that did not are missing.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        batch = self._addressed(messages)
        return [reply for _, reply in self._handle(batch, deadline)]

    def _handle(
        self, messages: Sequence[Message], deadline: float | None
    ) -> Iterator[tuple[Message, Message]]:
        """Yield each message with its reply, in order, until the deadline."""
        intra_op = torch.get_num_threads()
        torch.set_num_threads(1)  # More would change the last bits of the results.
        try:
            rest = list(messages)
            if rest and self._threads is None:
                began = time.monotonic()
                yield rest[0], self._execute(rest.pop(0))
                self._threads = self._choose_threads(time.monotonic() - began)
            if (self._threads or 1) > 1 and _all_different(rest):
                yield from self._in_threads(rest, deadline)
                return
            for message in rest:
                if deadline is not None and time.monotonic() > deadline:
                    return
                yield message, self._execute(message)
        finally:
            torch.set_num_threads(intra_op)

    def _in_threads(
        self, messages: Sequence[Message], deadline: float | None
    ) -> Iterator[tuple[Message, Message]]:
        def unless_late(message: Message) -> Message | None:
            if deadline is not None and time.monotonic() > deadline:
                return None
            return self._execute(message)

        pool = ThreadPoolExecutor(self._threads)
        try:
            for message, reply in zip(
                messages, pool.map(unless_late, messages), strict=True
            ):
                if reply is not None:
                    yield message, reply
        except BaseException:
            cancel = getattr(self.client_app, "cancel", None)
            if cancel is not None:
                cancel()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _execute(self, message: Message) -> Message:
        client = self.client_of(message.metadata.dst_node_id)
        return execute(self.client_app, message, self.context(client))

    def _choose_threads(self, seconds: float) -> int:
        """Decide, from how long the first client took, whether threads pay."""
        safe = getattr(self.client_app, "thread_safe", False)
        return (os.cpu_count() or 1) if safe and seconds > WORTH_A_THREAD else 1


def _all_different(messages: Sequence[Message]) -> bool:
    """Tell whether no client is addressed twice: its state allows one at a time."""
    return len({m.metadata.dst_node_id for m in messages}) == len(messages)
