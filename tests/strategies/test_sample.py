"""Who takes part: the same clients from a range of a million as from any list."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from fedweight.rng import Purpose, generator
from fedweight.simulations.grid import FIRST_NODE
from fedweight.simulations.local import LocalGrid
from fedweight.strategies.fedavg import FedAvg


class Listed(LocalGrid):
    """The same clients, given as a list in another order."""

    def get_node_ids(self):
        return list(super().get_node_ids())[::-1]


def sampled(grid, fraction, least=1, round=3, seed=5):
    strategy = FedAvg(seed=seed, min_available_nodes=1)
    return strategy._sample(grid, fraction, least, Purpose.SAMPLING, round)


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
