"""The local grid: every client in this process, one after another or in threads.

No Ray, no daemon, no start-up: a debugger stops where it should.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from ..core.errors import check_range
from ..core.threads import as_in_a_new_thread, num_cores, one_thread
from ..messages import keys
from ..messages.dispatch import Answers, Cohort, Gathered, Replies, Reply
from .allocator import keep_freed_memory
from .grid import (
    Addressed,
    Nodes,
    RunConfig,
    SimulationGrid,
    answers_cohort,
    execute,
    is_stranger,
    usable_plan,
)
from .plan import Plan

T = TypeVar("T")

# A step that takes longer than this many seconds is taken to release the interpreter
# for long enough at a time that a second thread gains.
WORTH_A_THREAD = 0.0015

# With contexts of more clients than this, those without state are let go.
IDLE_CONTEXTS = 10_000

# What a client of an app that is not ours is taken to do.
STEPS_OF_A_CLIENT = 32


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
        How many clients train at once, for apps that say they are ``thread_safe``, as
        ours do where they are. By default as many as there are cores where clients
        take long enough to gain from it, else one. It never changes the result.
    plan : Plan, optional
        How our own app trains clients; one after another by default.
    **nodes
        The other parameters of :class:`~fedweight.simulations.grid.Nodes`.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_clients: int,
        run_config: RunConfig | None = None,
        *,
        threads: int | None = None,
        plan: Plan | None = None,
        **nodes: Any,
    ) -> None:
        super().__init__(Nodes(num_clients, dict(run_config or {}), **nodes))
        if threads is not None:
            check_range("threads", threads, 1)
        self.client_app = client_app
        self._stranger = self.seen.wanted = is_stranger(client_app)
        self.threads = threads if self._safe else 1
        self.plan = plan or Plan()
        self.contexts: dict[int, Context] = {}
        self._lent = self.store if any(self.kept_tables.values()) else None
        self._replies: dict[str, Message] = {}
        self._pool: ThreadPoolExecutor | None = None
        # What has not said that it may run in threads runs alone, whoever calls.
        self._alone = threading.Lock()
        keep_freed_memory()
        # What a trial takes is not taken from the first cohort's time.
        usable_plan(self.plan, client_app, num_clients, self.run_config)

    def context(self, client: int) -> Context:
        """Return a client's context, which keeps its state between messages."""
        if client not in self.contexts:
            self.contexts[client] = self.nodes.context(client, self._lent)
        return self.contexts[client]

    def client_states(self) -> dict[int, RecordDict]:  # noqa: D102
        return {k: c.state for k, c in self.contexts.items() if len(c.state)}

    def restore_clients(self, states: Mapping[int, RecordDict]) -> None:  # noqa: D102
        for client, state in states.items():
            self.context(client).state = state

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let the clients handle the messages, now; return the messages' ids."""
        batch = self._addressed(messages)
        ids = [message.metadata.message_id for message, _ in batch]
        self._replies |= zip(ids, self._handle(batch, None), strict=True)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to some messages, each once."""
        known = [i for i in message_ids if i in self._replies]
        replies = [self._replies.pop(i) for i in known]
        self.seen.replied(replies)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Let the clients handle the messages; return the replies in their order.

        No client begins after ``timeout`` seconds; those that did not are missing.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if answers_cohort(messages, self.client_app):
            answers = [self._answer(part, deadline) for part in messages.parts()]
            return Replies.joined(messages, answers)
        replies = list(self._handle(self._addressed(messages), deadline))
        self.seen.replied(replies)
        return replies

    def _answer(self, cohort: Cohort, deadline: float | None) -> Replies:
        """Let our own app handle a cohort, a list of clients at a time."""
        clients = [self._checked_client(node) for node in cohort.nodes]
        plan = self._usable_plan()
        lists = plan.cut(cohort, self.sizes_of(clients))
        gathered = Gathered(cohort, lists)
        before, todo, why = self.plan, [*lists], ""
        while todo:
            too_many: list[int] = []
            for answers in self._answers_to(cohort, todo, plan, deadline):
                if answers.were_too_many:
                    why = answers.were_too_many
                    too_many += [reply.node for reply in answers.replies]
                else:
                    gathered.add(answers)
                    self.store.relieve()
            if too_many:
                gathered.make_room()
            todo = self._cut_smaller(cohort, lists, too_many)
            plan = self.plan
        self._tell_halved(before, why)
        if len(self.contexts) > IDLE_CONTEXTS:
            kept = {k: c for k, c in self.contexts.items() if len(c.state)}
            self.contexts = kept
        return gathered.replies()

    def _answers_to(
        self,
        cohort: Cohort,
        lists: Sequence[Sequence[int]],
        plan: Plan,
        deadline: float | None,
    ) -> Iterator[Answers]:
        """Yield what our own app answers, a list of clients at a time.

        Once there is no room for a list, the others are not tried.
        """
        app: Any = self.client_app
        full: list[str] = []

        def answer(nodes: Sequence[int]) -> Answers:
            if full:
                return Answers.too_many(nodes, full[0])
            answers: Answers = app.answer(
                cohort,
                nodes,
                self._context_of,
                batched=plan.chunk > 1,
                number_of=self.nodes.number_of,
            )
            if answers.were_too_many:
                full.append(answers.were_too_many)
            return answers

        jobs = [partial(answer, nodes) for nodes in lists]
        if self.threads is None and cohort.message_type == "train" and jobs:
            began = time.monotonic()
            for answers in self._do([jobs.pop(0)], deadline):
                seconds = time.monotonic() - began
                if not full:
                    chosen = self._choose_threads(plan, answers.replies, seconds)
                    self.threads = chosen
                yield answers
        yield from self._do(jobs, deadline)

    def _choose_threads(
        self, plan: Plan, replies: Sequence[Reply], seconds: float
    ) -> int:
        """Decide whether threads pay, from how long some clients' steps took.

        Many clients at once keep PyTorch busy outside the interpreter anyway.
        """
        steps = sum(int(r.metrics.get(keys.NUM_STEPS, 0)) for r in replies)
        pays = plan.chunk > 1 or seconds > steps * WORTH_A_THREAD > 0
        return num_cores() if self._safe and pays else 1

    def _handle(
        self, batch: Sequence[Addressed], deadline: float | None
    ) -> Iterator[Message]:
        """Let any app handle messages, one after another; yield the replies."""
        if self._stranger:
            # No time limit: a debugger may stop in any of them.
            for addressed in batch:
                with self._alone, as_in_a_new_thread(), one_thread():
                    reply = self._execute(*addressed)
                yield reply
            return
        jobs = [partial(self._execute, *addressed) for addressed in batch]
        if self.threads is None and jobs and not _is_over(deadline):
            began = time.monotonic()
            yield from self._do([jobs.pop(0)], deadline)
            slow = time.monotonic() - began > WORTH_A_THREAD * STEPS_OF_A_CLIENT
            self.threads = num_cores() if self._safe and slow else 1
        different = len({m.metadata.dst_node_id for m, _ in batch}) == len(batch)
        # A client's state allows one message at a time.
        for reply in self._do(jobs, deadline, threads=None if different else 1):
            yield reply
            self.store.relieve()

    def _execute(self, message: Message, nth: int) -> Message:
        context = self._context_of(message.metadata.dst_node_id)
        begin = (self.nodes.seed, nth) if self._stranger else None
        return execute(self.client_app, message, context, begin)

    def _context_of(self, node: int) -> Context:
        return self.context(self.client_of(node))

    def _do(
        self,
        jobs: Sequence[Callable[[], T]],
        deadline: float | None,
        threads: int | None = None,
    ) -> Iterator[T]:
        """Yield the jobs' results, in order; those that begin too late have none."""
        if not jobs:
            return
        with as_in_a_new_thread(), one_thread():
            if (threads or self.threads or 1) > 1:
                yield from self._in_threads(jobs, deadline)
                return
            for job in jobs:
                if _is_over(deadline):
                    return
                yield job()

    def _in_threads(
        self, jobs: Sequence[Callable[[], T]], deadline: float | None
    ) -> Iterator[T]:
        def unless_late(job: Callable[[], T]) -> T | None:
            return None if _is_over(deadline) else job()

        # The threads stay: each keeps buffers for its next clients.
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads)
        try:
            for result in self._pool.map(unless_late, jobs):
                if result is not None:
                    yield result
        except BaseException:
            self._pool.shutdown(wait=False, cancel_futures=True)
            cancel = getattr(self.client_app, "cancel", None)
            if cancel is not None:
                cancel()
            self.close()
            raise

    def close(self) -> None:
        """End the threads; the next message would start new ones."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    @property
    def _safe(self) -> bool:
        return bool(getattr(self.client_app, "thread_safe", False))


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline
