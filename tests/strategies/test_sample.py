"""Who takes part: the same clients from a range of a million as from any list."""

from __future__ import annotations

import inspect
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg

from fedweight.core.options import options_of
from fedweight.core.rng import Purpose, generator
from fedweight.messages import _flower
from fedweight.simulations.grid import FIRST_NODE
from fedweight.simulations.local import LocalGrid
from fedweight.strategies.asking import drawn
from fedweight.strategies.fedavg import FedAvg


class Listed(LocalGrid):
    """The same clients, given as a list in another order."""

    def get_node_ids(self):
        return list(super().get_node_ids())[::-1]


def sampled(grid, fraction, least=1, round=3, seed=5):
    strategy = FedAvg(seed=seed, min_available_nodes=1)
    now = strategy._now
    return drawn(strategy, now, grid, fraction, least, Purpose.SAMPLING, round)


@pytest.mark.parametrize("clients", [1, 2, 7, 1000, 30_000])
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.01])
def test_a_range_and_a_list_give_the_same_clients(clients, fraction):
    pairs = sampled(LocalGrid(ClientApp(), clients), fraction)
    assert pairs == sampled(Listed(ClientApp(), clients), fraction)
    assert pairs == sorted(pairs)
    assert all(node == FIRST_NODE + client for client, node in pairs)
    assert all(type(number) is int for pair in pairs for number in pair)
    if len(pairs) < clients:
        stream = generator(5, Purpose.SAMPLING, 3)
        chosen = np.sort(stream.choice(clients, len(pairs), replace=False))
        assert [client for client, _ in pairs] == chosen.tolist()


def test_a_grid_that_is_not_complete_is_put_in_order():
    class Mirrored(LocalGrid):
        complete = False

        @staticmethod
        def client_of(node_id):
            return FIRST_NODE + 4 - node_id

    assert [client for client, _ in sampled(Mirrored(ClientApp(), 5), 1.0)] == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_idle_clients_cost_no_memory():
    grid = LocalGrid(ClientApp(), 1_000_000)
    sampled(grid, 0.001)
    tracemalloc.start()
    assert len(sampled(grid, 0.001)) == 1000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


def test_there_may_be_any_number_of_clients():
    grid = LocalGrid(ClientApp(), 10**12)
    tracemalloc.start()
    pairs = sampled(grid, 1e-10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pairs) == 100
    assert pairs == sorted(set(pairs))
    assert pairs[-1][0] > 10**11
    assert peak < 1e6


def test_every_client_takes_part_equally_often():
    """Uniformly, whatever its data: sizes count in the weights alone."""
    grid = LocalGrid(ClientApp(), 20)
    counts = np.zeros(20)
    for round in range(1, 2001):
        for client, _ in sampled(grid, 0.25, round=round):
            counts[client] += 1
    # Of 2,000 rounds a client takes part in 500; standard deviation 19.4.
    assert np.abs(counts - 500).max() < 4.5 * 19.4


COMMON = list(options_of(FedAvg))[:10]


def test_the_arguments_of_flowers_fedavg_have_its_names_and_defaults():
    theirs = inspect.signature(FlowersFedAvg).parameters
    assert list(theirs) == COMMON
    ours = FedAvg()
    for name, parameter in theirs.items():
        assert getattr(ours, name) == parameter.default


@pytest.mark.parametrize("clients", [2, 3, 10, 101])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("least", [1, 2])
def test_as_many_clients_take_part_as_flower_would_ask(clients, fraction, least):
    options = {
        **dict.fromkeys(COMMON[:2], fraction),
        **dict.fromkeys(COMMON[2:4], least),
        "min_available_nodes": 1,
    }
    with _flower.task_identity(1):
        asked = []
        for strategy in (FedAvg(**options), FlowersFedAvg(**options)):
            arrays = ArrayRecord({"w": Array(np.zeros(1))})
            for configure in (strategy.configure_train, strategy.configure_evaluate):
                grid = LocalGrid(ClientApp(), clients)
                messages = configure(1, arrays, ConfigRecord(), grid)
                asked.append(len(list(messages)))
    assert asked[:2] == asked[2:]


class Counting(FedAvg):
    """Remembers how many clients there are, as it selects and as it weighs."""

    def begin(self):
        return []

    def tell(self, selection):
        self.selected.append(selection.population)
        return {}

    def weights(self, round):
        return super().weights(round), [*round.state, round.population]


def populations(kit, sizes, rounds=2, change=None, **options):
    """How many clients each round counts, as they are selected and weighed."""
    strategy = Counting(min_train_nodes=1, min_available_nodes=1, **options)
    object.__setattr__(strategy, "selected", [])
    clients = {k: kit.Client(np.ones(1), n) for k, n in enumerate(sizes)}
    run = kit.Federation(strategy, clients, kit.record({"w": np.zeros(1)}))
    for number in range(rounds):
        if change:
            change(run, number)
        assert run.round().status == "ok"
    return strategy.selected, strategy.state["method"]


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.2])
def test_the_population_counts_those_that_are_not_drawn(kit, fraction):
    found = populations(kit, [5] * 10, fraction_train=fraction)
    assert found == ([10, 10], [10, 10])


def test_the_population_is_without_clients_that_have_no_examples(kit):
    """From the round on in which they say so, or in which the grid knows."""
    assert populations(kit, [5, 0, 5, 0, 5]) == ([5, 3], [3, 3])

    def known(run, number):
        run.grid.sizes_of = lambda clients: [[5, 0, 5, 0, 5][c] for c in clients]

    assert populations(kit, [5, 0, 5, 0, 5], change=known) == ([3, 3], [3, 3])


def test_the_population_is_that_of_the_connected(kit):
    """Who left is not counted, whether it had examples or not."""

    def leave(run, number):
        if number == 1:
            del run.clients[1], run.clients[2]

    assert populations(kit, [5, 0, 5, 0, 5], 3, leave)[1] == [3, 2, 2]


def test_the_population_of_a_range_is_not_counted_one_by_one():
    strategy = FedAvg(min_available_nodes=1)
    grid = LocalGrid(ClientApp(), 10**12)
    strategy._now.without_examples = {3, 10**11}
    drawn(strategy, strategy._now, grid, 1e-10, 1, Purpose.SAMPLING, 1)
    assert strategy._now.population == 10**12 - 2


def test_a_round_made_by_hand_counts_at_least_its_clients(kit):
    assert kit.make_round(np.zeros((3, 1))).population == 3
