"""A method that says how likely each client is drawn."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedweight.core.errors import ConfigurationError
from fedweight.strategies import Draw, FedAvg, Selection


class Likely(FedAvg):
    """Draw by chances that a test writes down."""

    given: Any = None

    def draw(self, selection: Selection) -> Any:
        given = self.given
        return given(selection) if callable(given) else given


def federation(kit: Any, draw: Any, clients: int = 4, **options: Any) -> Any:
    strategy = Likely(given=draw, min_train_nodes=1, min_available_nodes=1, **options)
    return kit.Federation(
        strategy,
        {k: kit.Client(np.ones(2)) for k in range(clients)},
        kit.record({"w": np.zeros(2)}),
    )


def drawn(record: Any) -> tuple[int, ...]:
    return tuple(c.client for c in record.clients)


CHANCES = [4.0, 1.0, 2.0, 1.0]


def test_without_being_put_back_in_proportion(kit: Any) -> None:
    """Pairs come as often as from drawing one after another by hand."""
    run = federation(kit, Draw(0.5, CHANCES))
    rounds = 1000
    pairs = [*itertools.combinations(range(4), 2)]
    seen = dict.fromkeys(pairs, 0)
    for _ in range(rounds):
        seen[drawn(run.round())] += 1
    p = np.array(CHANCES) / sum(CHANCES)
    expected = [
        rounds * (p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])) for a, b in pairs
    ]
    assert stats.chisquare([*seen.values()], expected).pvalue > 0.01


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_scale_and_kind_of_list_do_not_matter(kit: Any, scale: float) -> None:
    scaled = [scale * one for one in CHANCES]
    kinds = (
        CHANCES,
        scaled,
        np.array(scaled),
        torch.tensor(scaled, dtype=torch.float64),
    )
    runs = [federation(kit, Draw(0.5, kind), seed=3) for kind in kinds]
    for _ in range(20):
        assert len({drawn(run.round()) for run in runs}) == 1


def test_chance_0_is_never_drawn(kit: Any) -> None:
    run = federation(kit, Draw(0.75, [0.0, 1.0, 0.0, 1e-9]))
    for _ in range(5):
        assert drawn(run.round()) == (1, 3)


def test_who_is_known_to_have_nothing_is_not_drawn(kit: Any) -> None:
    seen = []

    def draw(selection: Selection) -> Draw:
        seen.append((selection.clients, selection.population))
        return Draw(0.5, [1.0] * 4)

    run = federation(kit, draw)
    run.clients[2].num_examples = 0
    rounds = [drawn(run.round()) for _ in range(30)]
    assert 2 in set().union(*rounds)
    first = next(k for k, clients in enumerate(rounds) if 2 in clients)
    assert all(2 not in clients for clients in rounds[first + 1 :])
    assert all(len(clients) == 2 for clients in rounds)
    assert seen[0] == ((0, 1, 2, 3), 4)
    assert seen[-1] == ((0, 1, 2, 3), 3)


def test_alike_it_is_the_draw_that_there_was(kit: Any) -> None:
    run = federation(kit, lambda selection: Draw(0.5), 20, seed=5)
    plain = kit.Federation(
        FedAvg(fraction_train=0.5, min_train_nodes=1, seed=5),
        run.clients,
        kit.record({"w": np.zeros(2)}),
    )
    for _ in range(5):
        assert drawn(run.round()) == drawn(plain.round())


def test_min_train_nodes_are_drawn_at_least(kit: Any) -> None:
    strategy = Likely(given=Draw(0.0, CHANCES), min_train_nodes=3)
    run = kit.Federation(
        strategy,
        {k: kit.Client(np.ones(2)) for k in range(4)},
        kit.record({"w": np.zeros(2)}),
    )
    assert len(drawn(run.round())) == 3


def test_where_nobody_trains_it_is_not_asked(kit: Any) -> None:
    run = federation(kit, "never asked", fraction_train=0.0)
    assert run.round().clients == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0.5, "must return a fedweight.strategies.Draw"),
        ((0.5, None), "must return a fedweight.strategies.Draw"),
        (Draw(1.5), r"fraction must be a number in \[0, 1\], got 1.5"),
        (Draw("all"), r"fraction must be a number in \[0, 1\]"),  # type: ignore[arg-type]
        (Draw(0.5, [1.0]), "gave 1 values for 'chances' and 4 clients"),
        (Draw(0.5, [1.0, -1.0, 1.0, 1.0]), "chances must be finite and 0 or more"),
        (Draw(0.5, [1.0, np.nan, 1.0, 1.0]), "chances must be finite"),
        (Draw(0.5, [0.0] * 4), "gave every client the chance 0"),
    ],
)
def test_what_is_no_draw_is_refused(kit: Any, given: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        federation(kit, given).round()


def test_a_schedule_that_chooses_clients_is_refused(kit: Any) -> None:
    clock = kit.Clock(kit.Script([[(0, 1)]], exponent=0.0))
    strategy = Likely(given=Draw(1.0))
    with (
        pytest.raises(ConfigurationError, match="Likely says how likely"),
        strategy.following(clock),
    ):
        raise AssertionError
