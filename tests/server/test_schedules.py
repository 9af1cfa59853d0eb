"""Schedules against a plain simulation of events, and at their limits."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from fedweight.clients import TrainingApp, TrainingSettings
from fedweight.core.errors import ConfigurationError
from fedweight.core.layout import FlatModel, Layout
from fedweight.core.module import FlatModule
from fedweight.core.state import pack, unpack
from fedweight.data import ClientData, Examples
from fedweight.messages import _flower, keys
from fedweight.messages.arrays import FlatRecord
from fedweight.server import schedules
from fedweight.server.loop import ServerState, federate
from fedweight.server.schedules import (
    MOST_SPREAD,
    Arrival,
    Buffered,
    Deadline,
    Idle,
    Moment,
    Speeds,
    make_schedule,
)
from fedweight.simulations import LocalGrid, Plan
from fedweight.strategies import FedAvg, FedBuff

LAYOUT = Layout.of({"w": ((2,), "float32")}, ())


def version(number: float) -> FlatModel:
    return FlatModel(LAYOUT, torch.full((2,), float(number)), torch.zeros(0))


def moment(number: int, sizes: Any, epochs: int = 1) -> Moment:
    known = np.asarray(sizes)
    return Moment(
        number, version(number), epochs, len(known), lambda some: known[some].tolist()
    )


def plan(
    schedule: Any,
    sizes: Any,
    rounds: int,
    epochs: int = 1,
    stop: int = 0,
    packed: bool = False,
) -> list[tuple[tuple[Arrival, ...], float]]:
    """Return the rounds' arrivals, and how long each takes."""
    state, found = None, []
    for number in range(1, rounds + 1):
        timetable, state = schedule.next(
            moment(number, sizes, epochs), unpack(*pack(state)) if packed else state
        )
        assert timetable.arrivals is not None
        assert not timetable.late({})
        found.append((timetable.arrivals, timetable.seconds({})))
    return found


class Events:
    """The buffered schedule as a list of events, one after another."""

    def __init__(self, schedule: Buffered, sizes: Any, epochs: int) -> None:
        self.schedule, self.sizes = schedule, sizes
        options = schedule.seed, schedule.speed_spread
        everybody = range(len(sizes))
        alike = Speeds(*options, lambda c: [1000] * len(c))
        expected = [epochs * 1e-3 * sizes[c] * alike.seconds(c) for c in everybody]
        own = Speeds(*options, lambda some: [sizes[c] for c in some])
        # To the bit, as sums of the same times may tie, and rounding would decide.
        self.took = [epochs * own.seconds(client) for client in everybody]
        assert self.took == pytest.approx(expected)
        self.events: list[tuple[float, int, int]] = []  # end, client, began
        self.now = 0.0
        self.had: dict[int, int] = {}  # the newest version that each client had

    def free(self, version: int) -> set[int]:
        training = {client for _, client, _ in self.events}
        return {
            client
            for client, size in enumerate(self.sizes)
            if size and client not in training and self.had.get(client) != version
        }

    def round(self, version: int, draws: list[int | None]) -> list[tuple[int, int]]:
        """Make a round in which these begin; ``None`` says that nobody could."""
        buffer: list[tuple[int, int]] = []
        while len(buffer) < self.schedule.buffer_size:
            while len(self.events) < self.schedule.concurrency:
                client = draws.pop(0)
                free = self.free(version)
                if client is None:
                    assert not free
                    break
                assert client in free
                self.had[client] = version
                end = self.now + self.took[client]
                self.events.append((end, client, version))
            if not self.events:
                break
            self.events.sort()
            self.now, client, began = self.events.pop(0)
            self.had[client] = version  # It begins again with the next one.
            buffer.append((client, began))
        assert not draws
        return sorted(buffer)


@st.composite
def settings(draw: Any) -> tuple[Buffered, list[int], int]:
    n = draw(st.integers(1, 12))
    sizes = draw(st.lists(st.integers(0, 5), min_size=n, max_size=n).filter(any))
    schedule = Buffered(
        buffer_size=draw(st.integers(1, n)),
        concurrency=draw(st.integers(1, n + 3)),
        speed_spread=draw(st.sampled_from([0.0, 0.5, 3.0])),
        discount=draw(st.sampled_from(["polynomial", "hinge", "constant"])),
        threshold=draw(st.sampled_from([0.0, 1.5])),
        seed=draw(st.integers(0, 5)),
    )
    return schedule, sizes, draw(st.integers(1, 3))


@given(made=settings(), rounds=st.integers(1, 8))
@example(
    made=(
        Buffered(buffer_size=2, concurrency=5, speed_spread=3.0, seed=4),
        [0, 1, 1, 1, 3, 3, 1],
        3,
    ),
    rounds=3,
)
def test_it_is_a_plain_simulation_of_events(made: Any, rounds: int) -> None:
    schedule, sizes, epochs = made
    draws: list[int | None] = []
    drawn = Idle.draw

    def noted(idle: Idle, number: int) -> int | None:
        draws.append(drawn(idle, number))
        return draws[-1]

    events, state = Events(schedule, sizes, epochs), None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Idle, "draw", noted)
        for number in range(1, rounds + 1):
            before = events.now
            timetable, state = schedule.next(moment(number, sizes, epochs), state)
            expected = events.round(number, draws)
            arrivals = timetable.arrivals
            assert arrivals is not None
            assert [(a.client, a.round) for a in arrivals] == expected
            assert timetable.seconds({}) == pytest.approx(events.now - before)
            assert len({a.client for a in arrivals}) == len(arrivals)
            for arrival in arrivals:
                assert torch.equal(
                    arrival.start.parameters, version(arrival.round).parameters
                )
                late = number - arrival.round
                assert arrival.discount == schedule.staleness_discount(late)
            # Older models are kept as long as somebody trains from them.
            assert state["models"].keys() == {since for _, _, since in events.events}


@given(made=settings())
def test_its_state_can_be_written_down(made: Any) -> None:
    schedule, sizes, epochs = made

    def plain(found: Any) -> Any:
        return [
            ([(a.client, a.round, a.discount) for a in arrivals], seconds)
            for arrivals, seconds in found
        ]

    once = plan(schedule, sizes, 6, epochs)
    again = plan(schedule, sizes, 6, epochs, packed=True)
    assert plain(once) == plain(again)
    for (one, _), (other, _) in zip(once, again, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.start.parameters, b.start.parameters)


@pytest.mark.parametrize("spread", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("concurrency", [7, 50])
def test_a_buffer_for_all_who_all_train_is_a_synchronous_round(
    spread: float, concurrency: int
) -> None:
    schedule = Buffered(buffer_size=7, concurrency=concurrency, speed_spread=spread)
    for number, (arrivals, _) in enumerate(plan(schedule, [5] * 7, 5), 1):
        assert [(a.client, a.round) for a in arrivals] == [
            (client, number) for client in range(7)
        ]
        assert {a.discount for a in arrivals} == {1.0}


def test_a_buffer_of_one_makes_a_round_of_every_arrival() -> None:
    found = plan(Buffered(buffer_size=1, concurrency=4), [9] * 10, 60)
    assert {len(arrivals) for arrivals, _ in found} == {1}
    late = [n - a.round for n, ([a], _) in enumerate(found, 1)]
    assert max(late) >= 3
    # Four train at a time: on average three models are made meanwhile.
    assert np.mean(late[10:]) == pytest.approx(3, abs=0.5)


def test_one_at_a_time_is_never_late() -> None:
    found = plan(Buffered(buffer_size=1, concurrency=1), [9] * 5, 20)
    assert {n - a.round for n, ([a], _) in enumerate(found, 1)} == {0}
    assert {a.discount for [a], _ in found} == {1.0}


def test_ties_are_broken_by_the_clients_numbers() -> None:
    """All take the same time, so those that began together arrive in that order."""
    schedule = Buffered(buffer_size=2, concurrency=6, speed_spread=0.0)
    found = plan(schedule, [5] * 6, 3)
    assert [[a.client for a in arrivals] for arrivals, _ in found] == [
        [0, 1],
        [2, 3],
        [4, 5],
    ]
    assert [seconds for _, seconds in found] == [0.005, 0, 0]


def test_clients_without_examples_never_begin() -> None:
    sizes = [0, 4] * 6
    found = plan(Buffered(buffer_size=5, concurrency=9), sizes, 20)
    counts = Counter(a.client for arrivals, _ in found for a in arrivals)
    assert counts.keys() == {1, 3, 5, 7, 9, 11}
    # There are fewer than would fill it: then all of them make the round.
    [(arrivals, _)] = plan(Buffered(buffer_size=12, concurrency=3), sizes, 1)
    assert len(arrivals) == 6
    with pytest.raises(ConfigurationError, match="no client has examples"):
        plan(Buffered(), [0, 0], 1)


def test_fewer_clients_than_may_train_at_a_time() -> None:
    found = plan(Buffered(buffer_size=2, concurrency=20), [3] * 3, 30)
    assert {len(arrivals) for arrivals, _ in found} == {2}
    assert {a.client for arrivals, _ in found for a in arrivals} == {0, 1, 2}


def test_faster_clients_come_more_often() -> None:
    schedule = Buffered(buffer_size=1, concurrency=8, speed_spread=1.0)
    found = plan(schedule, [10] * 8, 400)
    counts = Counter(a.client for arrivals, _ in found for a in arrivals)
    speeds = Speeds(0, 1.0, lambda clients: [10] * len(clients))
    fastest = sorted(range(8), key=speeds.seconds)
    assert [client for client, _ in counts.most_common()][:3] == fastest[:3]


@pytest.mark.parametrize("busy", [0, 3, 7])
def test_who_begins_is_drawn_uniformly(busy: int) -> None:
    """Whether those who may are listed or not."""
    counts: Counter[int | None] = Counter()
    for number in range(4000):
        idle = Idle(0, 10, lambda clients: [1] * len(clients), range(busy))
        counts[idle.draw(number)] += 1
    assert counts.keys() == set(range(busy, 10))
    expected = 4000 / (10 - busy)
    assert max(abs(n - expected) for n in counts.values()) < 5 * expected**0.5


@pytest.mark.parametrize(
    ("concurrency", "empty"), [(20, False), (1000, True), (60_000, False)]
)
def test_a_million_clients_are_quick(concurrency: int, empty: bool) -> None:
    sizes = np.full(10**6, 10)
    if empty:
        sizes[::2] = 0
    schedule = Buffered(buffer_size=100, concurrency=concurrency)
    state = None
    began = time.monotonic()
    for number in range(1, 4):
        _, state = schedule.next(moment(number, sizes), state)
    assert time.monotonic() - began < 30
    assert len(state["training"]) >= concurrency - 1


def test_everybody_of_many_may_train() -> None:
    sizes = np.full(20_000, 10)
    sizes[5000:] = 0
    schedule = Buffered(buffer_size=3, concurrency=20_000)
    began = time.monotonic()
    timetable, state = schedule.next(moment(1, sizes), None)
    assert time.monotonic() - began < 20
    assert len(timetable.arrivals) + len(state["training"]) == 5000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 2**-0.5, 3**-0.5, 0.5]),
        ({"exponent": 1.0}, [1, 1 / 2, 1 / 3, 1 / 4]),
        ({"discount": "constant"}, [1, 1, 1, 1]),
        ({"discount": "hinge", "threshold": 1.0}, [1, 1, 1 / 1.5, 1 / 2]),
        (
            {"discount": "hinge", "threshold": 0.0, "exponent": 10.0},
            [1, 1 / 11, 1 / 21, 1 / 31],
        ),
    ],
)
def test_discounts(options: dict[str, Any], expected: list[float]) -> None:
    schedule = Buffered(**options)
    found = [schedule.staleness_discount(tau) for tau in range(4)]
    assert found == pytest.approx(expected, rel=1e-15)
    assert schedule.discounts == (options.get("discount") != "constant")


@pytest.mark.parametrize(
    "options",
    [
        {"buffer_size": 0},
        {"concurrency": 0},
        {"speed_spread": -0.1},
        {"speed_spread": 50.1},
        {"speed_spread": float("inf")},
        {"discount": "none"},
        {"exponent": 0.0},
        {"threshold": -1.0},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    [name] = options
    with pytest.raises(ConfigurationError, match=name):
        Buffered(**options)


def test_made_by_name() -> None:
    assert make_schedule("synchronous") is None
    assert isinstance(make_schedule("deadline", seconds=3.0), Deadline)
    with pytest.raises(ConfigurationError, match="bufered"):
        make_schedule("bufered")
    with pytest.raises(ConfigurationError, match="is not derived from"):
        make_schedule("collections:OrderedDict")


# Whole runs, on virtual time.

CLIENTS = 8
SPEEDS = Speeds(0, 0.5, lambda clients: [10 + c for c in clients])


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def data(context: Any) -> ClientData:
    client = int(context.node_config["partition-id"])
    stream = np.random.default_rng(client)
    x = stream.normal(size=(10 + client, 4)).astype(np.float32)
    part = Examples(x, stream.integers(0, 3, len(x)))
    return ClientData(part, part)


def grid(plan: Plan | None = None, threads: int | None = None, **named: Any) -> Any:
    settings = TrainingSettings(batch_size=4, learning_rate_decay=0.8, **named)
    app = TrainingApp(
        network,
        data,
        num_classes=3,
        settings=settings,
        sizes=np.arange(10, 10 + CLIENTS),
    )
    return LocalGrid(app, CLIENTS, plan=plan, threads=threads)


def begin() -> ServerState:
    initial = FlatRecord(FlatModule(network()).save())
    return ServerState(initial, train_config=ConfigRecord({keys.LOCAL_EPOCHS: 2}))


def bits(state: ServerState) -> Any:
    return np.concatenate([a.numpy().ravel() for a in state.arrays.values()])


@pytest.fixture(autouse=True)
def _may_make_messages() -> Any:
    with _flower.task_identity(1):
        yield


@pytest.mark.parametrize("strategy", [FedBuff, FedAvg])
@pytest.mark.parametrize(
    "schedule",
    [
        Buffered(buffer_size=CLIENTS, concurrency=CLIENTS, speed_spread=0.0),
        Buffered(buffer_size=CLIENTS, concurrency=50, speed_spread=1.0),
        Deadline(seconds=10.0),
    ],
)
def test_at_its_limit_a_run_has_the_bits_of_the_synchronous_one(
    strategy: Any, schedule: Any
) -> None:
    plain = federate(strategy(), grid(), begin(), until=4)
    ended = federate(strategy(), grid(), begin(), until=4, schedule=schedule)
    np.testing.assert_array_equal(bits(ended), bits(plain))


@pytest.mark.parametrize("strategy", [FedBuff, FedAvg])
def test_replies_that_somebody_looks_at_have_the_same_bits(strategy: Any) -> None:
    """A grid that makes messages, as one of somebody else's would."""

    class Looks(LocalGrid):
        def send_and_receive(self, messages: Any, *, timeout: Any = None) -> Any:
            return super().send_and_receive(list(messages), timeout=timeout)

    schedule = Buffered(buffer_size=3, concurrency=6)
    plain = grid(Plan())
    looks = Looks(plain.client_app, CLIENTS)
    ended = federate(strategy(), plain, begin(), until=6, schedule=schedule)
    other = federate(strategy(), looks, begin(), until=6, schedule=schedule)
    np.testing.assert_allclose(bits(other), bits(ended), rtol=0, atol=1e-6)


def test_clients_train_as_of_the_round_in_which_they_began() -> None:
    """Their learning rate and the order of their examples are that round's."""
    schedule = Buffered(buffer_size=3, concurrency=6)
    state, clients = begin(), grid()
    versions = [bits(state)]
    starts = [state.arrays]

    def watch(state: ServerState) -> None:
        versions.append(bits(state))
        starts.append(state.arrays)

    strategy = FedBuff()
    federate(strategy, clients, state, until=4, schedule=schedule, callbacks=[watch])
    planned = plan(schedule, range(10, 10 + CLIENTS), 4, epochs=2)
    assert len({arrival.round for arrival in planned[3][0]}) > 1
    # The same by hand: each arrival alone, in a round of its own number.
    steps = []
    for arrival in planned[3][0]:
        start = starts[arrival.round - 1]

        class Only(FedBuff):
            pick = arrival.client

            def keeps(self, round: int, client: int, straggler: bool) -> bool:
                return client == self.pick

        alone = federate(
            Only(),
            grid(),
            ServerState(start, arrival.round - 1, train_config=begin().train_config),
            until=arrival.round,
        )
        steps.append(arrival.discount * (bits(alone) - bits(ServerState(start))))
    expected = versions[3] + np.mean(steps, axis=0)
    trained = dict(network().named_parameters())
    ends = np.cumsum([array.numpy().size for array in starts[3].values()]).tolist()
    for name, end in zip(starts[3], ends, strict=True):
        here = slice(end - starts[3][name].numpy().size, end)
        if name in trained:
            np.testing.assert_allclose(
                versions[4][here], expected[here], rtol=0, atol=2e-6
            )


@pytest.mark.parametrize("stop", [1, 4])
def test_a_run_goes_on_from_its_values(stop: int) -> None:
    schedule = Buffered(buffer_size=2, concurrency=5)
    whole = federate(FedBuff(), grid(), begin(), until=7, schedule=schedule)
    first = FedBuff()
    half = federate(first, grid(), begin(), until=stop, schedule=schedule)
    second = FedBuff()
    second.restore(unpack(*pack(first.state)))
    state = ServerState(
        half.arrays,
        half.round,
        half.train_config,
        half.evaluate_config,
        schedule=unpack(*pack(half.schedule)),
    )
    ended = federate(second, grid(), state, until=7, schedule=schedule)
    np.testing.assert_array_equal(bits(ended), bits(whole))


def test_who_is_late_is_dropped_and_never_trains() -> None:
    needs = {c: 2 * SPEEDS.seconds(c) for c in range(CLIENTS)}
    deadline = float(np.median([*needs.values()]))
    asked = []

    class Watched(LocalGrid):
        def send_and_receive(self, messages: Any, *, timeout: Any = None) -> Any:
            nodes = getattr(messages, "nodes", [])
            asked.append([self.client_of(node) for node in nodes])
            return super().send_and_receive(messages, timeout=timeout)

    strategy = FedAvg(fraction_evaluate=0.0)
    clients = Watched(grid().client_app, CLIENTS)
    federate(strategy, clients, begin(), until=1, schedule=Deadline(seconds=deadline))
    in_time = [client for client, own in needs.items() if own <= deadline]
    assert asked[0] == in_time
    [record] = strategy.history
    assert record.metrics["round-seconds"] == deadline
    for entry in record.clients:
        late = entry.client not in in_time
        assert entry.status == ("dropped" if late else "ok")
        assert entry.reason == (
            f"it needs {needs[entry.client]:.4g} s, the deadline is {deadline:g} s"
            if late
            else ""
        )
        assert (entry.bytes_down == 0) == late


def test_a_straggler_that_trains_less_is_done_earlier() -> None:
    """With one pass of the many it is in time for a deadline that others miss."""
    state = begin()
    state.train_config[keys.LOCAL_EPOCHS] = 50
    seconds = max(SPEEDS.seconds(c) for c in range(CLIENTS)) * 50 / 2
    strategy = FedAvg(stragglers=0.5, min_replies=1)
    federate(strategy, grid(), state, until=1, schedule=Deadline(seconds=seconds))
    plain = FedAvg(min_replies=1)
    federate(plain, grid(), state, until=1, schedule=Deadline(seconds=seconds))
    trained = [
        {c.client for c in one.history[-1].clients if c.status == "ok"}
        for one in (plain, strategy)
    ]
    assert trained[0] < trained[1]


def test_where_all_are_late_the_round_fails_and_the_model_stays() -> None:
    strategy = FedAvg()
    before = begin()
    ended = federate(strategy, grid(), before, until=2, schedule=Deadline(seconds=1e-9))
    np.testing.assert_array_equal(bits(ended), bits(before))
    record = strategy.history[-1]
    assert record.status == "failed"
    assert record.metrics["round-seconds"] == 1e-9
    assert {c.status for c in record.clients} == {"dropped"}


def test_a_schedule_needs_a_strategy_of_ours_and_none_around_it() -> None:
    from flwr.serverapp.strategy import (
        DifferentialPrivacyServerSideFixedClipping as Private,
    )
    from flwr.serverapp.strategy import FedAvg as FlowersFedAvg

    for strategy in (FlowersFedAvg(), Private(FedBuff(), 0.1, 1.0, 4)):
        with pytest.raises(ConfigurationError, match="schedule: Buffered needs"):
            federate(strategy, grid(), begin(), until=1, schedule=Buffered())


def test_the_names_of_the_registry_are_classes() -> None:
    for name in schedules.SCHEDULES.entries:
        assert isinstance(schedules.SCHEDULES.resolve(name), type)


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_spread_gives_times(seed: int) -> None:
    speeds = Speeds(seed, MOST_SPREAD, lambda clients: [10**7] * len(clients))
    seconds = [1e6 * speeds.seconds(client) for client in range(2000)]
    assert all(0 < one < math.inf for one in seconds)
    assert max(seconds) > 1e50
