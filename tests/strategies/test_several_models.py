"""Methods that ask clients before the rounds and keep several global models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedweight.core.errors import ConfigurationError
from fedweight.messages import keys
from fedweight.strategies import Selection, WeightingStrategy
from fedweight.strategies.server_optimizers import ServerMomentum


class Odd(WeightingStrategy):
    """Train one model for even clients, one for odd ones; count the rounds of each."""

    def begin(self) -> dict[str, int]:
        return {"rounds": 0}

    def assign(self, selection: Selection) -> list[int]:
        return [client % 2 for client in selection.clients]

    def weights(self, round: Any) -> Any:
        round.log("clients", float(round.num_clients))
        state = {"rounds": round.state["rounds"] + 1}
        return round.size_weights, state


def federation(kit: Any, strategy: Any, models: Any, **options: Any) -> Any:
    clients = {k: kit.Client(np.array(m, float)) for k, m in enumerate(models)}
    made = kit.Federation(strategy, clients, kit.record({"w": np.zeros(2)}), **options)
    strategy._now.outermost = True  # As in Strategy.start and in our loop.
    return made


def vectors(strategy: Any) -> list[list[float]]:
    return [model.parameters.tolist() for model in strategy.models]


def test_each_model_is_the_mean_of_its_own_clients(kit: Any) -> None:
    strategy = Odd()
    run = federation(kit, strategy, [[1, 0], [0, 4], [3, 0], [0, 8]])
    record = run.round()
    assert vectors(strategy) == [[2, 0], [0, 6]]
    assert run.vector.tolist() == [1, 3]  # Their mean, by data size.
    assert [c.weight for c in record.clients] == [0.5] * 4
    assert [c.metrics["model"] for c in record.clients] == [0, 1, 0, 1]
    assert record.metrics["clients-model-0"] == record.metrics["clients-model-1"] == 2
    assert strategy.state["method"] == {"rounds": 2}


def test_a_model_that_nobody_trained_stays(kit: Any) -> None:
    strategy = Odd()
    run = federation(kit, strategy, [[1, 0], [0, 4], [3, 0], [0, 8]])
    run.round()
    for client in (1, 3):
        run.clients[client].error = "no power"
    run.round()
    assert vectors(strategy)[1] == [0, 6]
    assert strategy.state["models"][1]["examples"] == 20


def test_a_failed_round_leaves_all_models(kit: Any) -> None:
    strategy = Odd(min_replies=4)
    run = federation(kit, strategy, [[1, 0], [0, 4], [3, 0], [0, 8]])
    run.round()
    before = vectors(strategy)
    run.clients[0].error = "no power"
    assert run.round().status == "failed"
    assert vectors(strategy) == before
    assert strategy.state["method"] == {"rounds": 2}


def test_each_model_has_a_server_optimizer_of_its_own(kit: Any) -> None:
    strategy = Odd(server_optimizer=ServerMomentum(beta=0.5))
    run = federation(kit, strategy, [[1, 0], [0, 4]])
    run.round()
    run.round()
    # w1 = m; v2 = 0.5 v1 + (m - w1) = 0.5 m; w2 = 1.5 m.
    assert vectors(strategy) == [[1.5, 0], [0, 6]]


def test_goes_on_from_its_state(kit: Any) -> None:
    models = [[1, 0], [0, 4], [3, 0], [0, 8]]
    one, other = (Odd(server_optimizer=ServerMomentum(beta=0.5)) for _ in range(2))
    run = federation(kit, one, models)
    run.round()
    again = federation(kit, other, models)
    again.number, again.arrays = run.number, run.arrays
    other.restore(one.state)
    run.round()
    again.round()
    assert vectors(one) == vectors(other)


def test_clients_receive_and_evaluate_their_own_model(kit: Any) -> None:
    strategy = Odd()
    run = federation(kit, strategy, [[1, 0], [0, 4], [3, 0], [0, 8]])
    run.round()
    cohort = strategy.configure_evaluate(1, run.arrays, run.config, run.grid)
    sent = [
        torch.cat([torch.from_numpy(a.numpy()) for a in m.content["arrays"].values()])
        for m in cohort
    ]
    assert [v.tolist() for v in sent] == [[2, 0], [0, 6], [2, 0], [0, 6]]
    cohort = strategy.configure_train(2, run.arrays, run.config, run.grid)
    assert [len(part.nodes) for part in cohort.parts()] == [2, 2]


@pytest.mark.parametrize("given", [[0], [0, -1, 0, 0], [0.5] * 4, [0, 10**6, 0, 0]])
def test_what_is_no_assignment_is_refused(kit: Any, given: Any) -> None:
    class Wrong(Odd):
        """Assign whatever."""

        def assign(self, selection: Selection) -> list[int]:
            return given

    run = federation(kit, Wrong(), [[1, 0]] * 4)
    with pytest.raises(ConfigurationError, match=r"Wrong\.assign"):
        run.round()


class Late(Odd):
    """Let odd clients train a model of their own from the second round on."""

    def assign(self, selection: Selection) -> list[int]:
        if selection.number == 1:
            return [0] * len(selection.clients)
        return [client % 2 for client in selection.clients]


def test_evaluation_does_not_change_what_was_trained(kit: Any) -> None:
    class Low(Odd):
        """Draw none of the second model's clients at first."""

        def assign(self, selection: Selection) -> list[int]:
            return [int(client >= 2) for client in selection.clients]

    models = [[1, 0], [3, 0], [0, 4], [0, 8]]
    trained = []
    for evaluates in (True, False):
        strategy = Low()
        run = federation(kit, strategy, models)
        for client in (2, 3):
            run.clients[client].error = "no power"
        run.round()
        if evaluates:
            strategy.configure_evaluate(1, run.arrays, run.config, run.grid)
        run.round()
        trained.append(vectors(strategy))
    assert trained[0] == trained[1]
    assert trained[0][0] == [2, 0]


def test_a_model_that_comes_later_begins_as_the_first(kit: Any) -> None:
    strategy = Late()
    run = federation(kit, strategy, [[2, 0], [4, 4]])
    run.round()
    assert vectors(strategy) == [[3, 2]]
    cohort = strategy.configure_train(2, run.arrays, run.config, run.grid)
    sent = [m.content["arrays"]["w"].numpy().tolist() for m in cohort]
    assert sent == [[3, 2], [0, 0]]


def test_sizes_too_large_to_add_up(kit: Any) -> None:
    strategy = Odd(weighted_by_key=keys.LOSS)  # Nobody has so many examples.
    run = federation(kit, strategy, [[1, 0], [0, 4], [3, 0], [0, 8]])
    for client in run.clients.values():
        client.metrics = {keys.LOSS: 1.7e308}
    run.round()
    assert run.vector.tolist() == [1, 3]


def test_names_that_are_taken_are_refused() -> None:
    for own, said in (
        ({"probes": {"train-loss": len}}, "a metric of this name"),
        ({"probes": {"loss-before": len}}, "probe 'loss-before' already"),
        ({"probes": {"gain": 3}}, "must be functions by name, got 3"),
        ({"queries": (len,)}, "queries must be a dictionary"),
        ({"__annotations__": {"state": int}, "state": 1}, "cannot be called 'state'"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            type("Own", (Odd,), {"__module__": __name__, **own})


@pytest.mark.parametrize("given", [{0: 1}, "ab", 3])
def test_what_is_no_list_is_refused(kit: Any, given: Any) -> None:
    class Wrong(Odd):
        """Assign whatever."""

        def assign(self, selection: Selection) -> list[int]:
            return given

    with pytest.raises(ConfigurationError, match=r"Wrong\.assign must give a list"):
        federation(kit, Wrong(), [[1, 0]] * 2).round()
