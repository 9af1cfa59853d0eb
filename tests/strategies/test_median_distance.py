from pathlib import Path

import numpy as np
import pytest
import torch

from fedweight.core.errors import ConfigurationError
from fedweight.strategies import strategy_class

NAME = "strategies.median_distance:MedianDistance"


@pytest.fixture
def cls(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    return strategy_class(NAME)


@pytest.mark.parametrize("far", [1e2, 1e6])
def test_far_clients_count_little_however_far_they_are(kit, cls, far):
    """The corners of a unit square, and two clients who went elsewhere."""
    near = [[1, 0], [0, 1], [1, 1], [0, 0]]
    round = kit.make_round([*near, [far, far], [far, -far]])
    weights = cls().weights(round)
    assert weights[4:].max() < 0.01 * weights[:4].min()
    assert weights[:4].tolist() == pytest.approx([weights[0].item()] * 4)
    assert weights.sum().item() == pytest.approx(1)


def test_the_usual_distance_costs_half_at_tolerance_one(kit, cls):
    round = kit.make_round([[0], [1], [2], [4], [1000]])
    weights = cls(tolerance=1.0).weights(round)
    distances = round.logged_clients["distance"]
    assert distances.tolist() == [2, 1, 2, 3, 998]
    raw = 1 / (1 + (distances / 2) ** 2)
    np.testing.assert_allclose(weights, raw / raw.sum())


@pytest.mark.parametrize("count", [4, 5, 6, 7])
def test_up_to_half_of_the_clients_cannot_move_how_far_off_one_lies(kit, cls, count):
    stream = np.random.default_rng(0)
    honest = stream.normal(size=(count, 3))
    widest = np.linalg.norm(honest[:, None] - honest[None], axis=2).max()
    for lying in range(count // 2 + 1):
        rows = honest.copy()
        rows[count - lying :] = 1e6 * stream.normal(size=(lying, 3))
        round = kit.make_round(rows)
        cls().weights(round)
        distances = round.logged_clients["distance"]
        assert (distances[: count - lying] <= widest).all()
    more = honest.copy()
    more[count - count // 2 - 1 :] = 1e6
    round = kit.make_round(more)
    cls().weights(round)
    assert round.logged_clients["distance"][0] > 1e5


def test_a_small_tolerance_weighs_by_the_squared_distance(kit, cls):
    """The most central clients count most, and not alone."""
    round = kit.make_round([[0], [1], [2], [4], [1000]], num_examples=[1, 2, 3, 4, 5])
    weights = cls(tolerance=1e-6).weights(round)
    raw = round.num_examples / round.logged_clients["distance"] ** 2
    torch.testing.assert_close(weights, raw / raw.sum())


def test_a_large_tolerance_is_fedavg(kit, cls):
    round = kit.make_round(kit.toy["models"], num_examples=kit.toy["num_examples"])
    weights = cls(tolerance=1e9).weights(round)
    assert weights.tolist() == [0.5, 0.25, 0.25]


@pytest.mark.parametrize("models", [[[0, 0]] * 3, [[1, 2], [3, 4]], [[5, 5]]])
def test_where_no_client_stands_out_they_count_by_size(kit, cls, models):
    sizes = [1, 1, 2][: len(models)]
    round = kit.make_round(models, num_examples=sizes)
    assert cls().weights(round).tolist() == [n / sum(sizes) for n in sizes]


def test_runs_through_messages(kit, cls):
    clients = {k: kit.Client(np.full(3, k)) for k in range(4)}
    start = kit.record({"w": np.zeros(3, np.float32)})
    run = kit.Federation(cls(), clients, start)
    assert [run.round().status for _ in range(2)] == ["ok", "ok"]


def test_tolerance_out_of_range(cls):
    with pytest.raises(ConfigurationError, match="tolerance must be in"):
        cls(tolerance=0)
