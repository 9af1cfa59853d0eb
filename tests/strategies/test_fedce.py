import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedweight.core.errors import ConfigurationError
from fedweight.core.state import pack, unpack
from fedweight.messages import keys
from fedweight.strategies.fedce import FedCE, minus_cosines
from fedweight.strategies.weights import effective_clients

CASES = range(4)


def federation(kit, strategy, clients=3, size=2):
    return kit.Federation(
        strategy,
        {k: kit.Client(metrics={keys.MINUS_ERROR: 1.0}) for k in range(clients)},
        kit.record({"w": np.zeros(size, np.float64)}),
    )


def play(run, updates, errors):
    """Run one round in which the clients add these updates to the global model."""
    for client, update, error in zip(
        run.clients.values(), updates, errors, strict=True
    ):
        client.model = run.vector + np.array(update)
        client.metrics[keys.MINUS_ERROR] = error
    before = run.vector
    record = run.round()
    return record, run.vector - before


@pytest.mark.parametrize("case", CASES)
def test_golden(kit, golden, case):
    table = golden("fedce")
    expected = table["case"][case]
    options = {k: expected[k] for k in ("mode", "consensus", "floor", "clip")}
    run = federation(kit, FedCE(**options))
    for t in range(2):
        record, step = play(run, table["updates"][t], table["errors"][t])
        cosines = [c.metrics["cosine"] for c in record.clients]
        weights = [c.weight for c in record.clients]
        assert cosines == pytest.approx(expected["cosines"][t], abs=1e-7)
        assert weights == pytest.approx(expected["coefficients"][t], abs=1e-7)
        np.testing.assert_allclose(step, expected["steps"][t], atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_golden_of_round_objects(kit, golden, case):
    table = golden("fedce")
    expected = table["case"][case]
    options = {k: expected[k] for k in ("mode", "consensus", "floor", "clip")}
    strategy = FedCE(**options)
    state = strategy.begin()
    for t in range(2):
        round = kit.make_round(
            table["updates"][t],
            metrics={keys.MINUS_ERROR: table["errors"][t]},
            number=t + 1,
            state=state,
        )
        weights, state = strategy.weights(round)
        assert weights.tolist() == pytest.approx(expected["coefficients"][t], abs=1e-7)


def test_the_cosine_formula_is_the_one_of_the_differences(kit):
    stream = np.random.default_rng(0)
    updates = stream.normal(size=(7, 30))
    updates[3] = 0
    c = torch.tensor(stream.dirichlet(np.ones(7)))
    cosines = minus_cosines(kit.make_round(updates), c)
    total = c.numpy() @ updates
    for k in range(7):
        rest = total - c[k].item() * updates[k]
        length = np.linalg.norm(updates[k]) * np.linalg.norm(rest)
        expected = updates[k] @ rest / length if length else 0.0
        assert cosines[k].item() == pytest.approx(expected, abs=1e-12)


def test_a_cosine_with_nothing_is_zero(kit):
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    for lone in ([1.0, 2.0], [1e-20, 3e-20], [1e15, 1.0]):
        cosines = minus_cosines(kit.make_round([lone, [0, 0], [0, 0]]), uniform)
        assert cosines.tolist() == [0.0, 0.0, 0.0]


def test_clients_are_told_their_coefficient_after_the_first_round(kit, golden):
    table = golden("fedce")
    run = federation(kit, FedCE())
    record, _ = play(run, table["updates"][0], table["errors"][0])
    assert keys.COEFFICIENT not in run.clients[0].told[0]
    play(run, table["updates"][1], table["errors"][1])
    for entry in record.clients:
        told = run.clients[entry.client].told[1]
        assert told[keys.COEFFICIENT] == entry.weight


def test_absent_clients_keep_theirs_and_new_ones_have_a_prior(kit):
    run = federation(kit, FedCE())
    play(run, [[1, 0], [0, 1], [1, 2]], [1, 1, 1])
    strategy = run.strategy
    kept = strategy.state["method"]["coefficients"]
    run.clients[2].silent = True
    run.clients[3] = kit.Client(metrics={keys.MINUS_ERROR: 1.0})
    record, _ = play(run, [[1, 0], [0, 1], [1, 2], [1, 1]], [0.5, 0.6, 1, 1])
    state = strategy.state["method"]
    assert state["coefficients"][2] == kept[2]
    assert state["rounds"] == {0: 2, 1: 2, 2: 1, 3: 1}
    assert sum(c.weight for c in record.clients if c.status == "ok") == pytest.approx(1)
    consensus = strategy._consensus(
        kit.make_round([[1, 0], [0, 1]], clients=(0, 9), state=state)
    ).tolist()
    assert consensus == [state["coefficients"][0], 1 / 5]


def test_one_client_is_not_enough(kit):
    with pytest.raises(ConfigurationError, match="min_replies must be in"):
        FedCE(min_replies=1)
    run = federation(kit, FedCE())
    play(run, [[1, 0], [0, 1], [1, 2]], [1, 1, 1])
    state, model = pack(run.strategy.state), run.vector
    run.clients[0].silent = True
    run.clients[1].error = "out of memory"
    record = run.round()
    assert record.status == "failed"
    assert "min_replies is 2" in record.reason
    assert pack(run.strategy.state) == state
    np.testing.assert_array_equal(run.vector, model)


@pytest.mark.parametrize("error", [-0.1, 1.5])
def test_an_error_outside_zero_and_one_is_rejected(kit, error):
    run = federation(kit, FedCE())
    record, _ = play(run, [[1, 0], [0, 1], [1, 2]], [1, error, 1])
    assert record.clients[1].status == "rejected"
    assert "'minus-error' must be in [0, 1]" in record.clients[1].reason


def test_legacy_weights_may_exceed_one(kit):
    """A floor after the sum: three clients at the floor add up to 3 floors."""
    strategy = FedCE(floor=0.2, clip="after", mode="times")
    updates = [[1, 0], [1, 0], [0, 1]]
    weights = weights_of(kit, strategy, updates, [0, 0, 1])
    assert float(weights.sum()) > 1
    assert float(weights.sum()) <= 1 + 3 * 0.2
    assert float(weights.min()) >= 0.2


def test_goes_on_through_json(kit):
    stream = np.random.default_rng(1)
    updates = stream.normal(size=(5, 3, 2))
    errors = stream.uniform(size=(5, 3))
    whole = federation(kit, FedCE())
    for t in range(5):
        play(whole, updates[t], errors[t])
    first, second = federation(kit, FedCE()), federation(kit, FedCE())
    for t in range(2):
        play(first, updates[t], errors[t])
    second.strategy.restore(unpack(*pack(first.strategy.state)))
    second.arrays, second.number = first.arrays, first.number
    for t in range(2, 5):
        play(second, updates[t], errors[t])
    np.testing.assert_array_equal(second.vector, whole.vector)


def weights_of(kit, strategy, updates, errors):
    round = kit.make_round(
        updates, metrics={keys.MINUS_ERROR: errors}, state=strategy.begin()
    )
    return strategy.weights(round)[0]


rounds = st.integers(2, 6).flatmap(
    lambda k: st.tuples(
        st.lists(
            st.lists(st.integers(-3, 3), min_size=3, max_size=3),
            min_size=k,
            max_size=k,
        ),
        st.lists(st.floats(0, 1), min_size=k, max_size=k),
    )
)


@given(
    rounds,
    st.sampled_from(["plus", "times"]),
    st.sampled_from([1e-6, 1e-3, 0.2]),
    st.sampled_from(["before", "after"]),
)
def test_with_a_floor_nobody_is_shut_out(kit, round, mode, floor, clip):
    strategy = FedCE(mode=mode, floor=floor, clip=clip)
    weights = weights_of(kit, strategy, *round)
    assert (weights > 0).all()
    if clip == "after":
        assert (weights >= floor).all()
        assert float(weights.sum()) <= 1 + len(weights) * floor + 1e-12
    else:
        assert float(weights.sum()) == pytest.approx(1)


def test_without_a_floor_somebody_may_be(kit):
    """Who points where the others do, and serves as well without itself."""
    updates, errors = [[1, 0], [1, 0], [-1, 0]], [0.0, 0.0, 0.5]
    assert weights_of(kit, FedCE(mode="times", floor=0.0), updates, errors)[0] == 0
    for floor in (1e-6, 0.1):
        strategy = FedCE(mode="times", floor=floor)
        assert (weights_of(kit, strategy, updates, errors) > 0).all()


@given(rounds, st.data())
def test_a_larger_error_and_a_direction_of_ones_own_raise_a_weight(kit, round, data):
    updates, errors = round
    who = data.draw(st.integers(0, len(errors) - 1))
    for mode in ("plus", "times"):
        raised = [*errors]
        raised[who] = (1 + errors[who]) / 2
        low, high = (
            weights_of(kit, FedCE(mode=mode), updates, e)[who] for e in (errors, raised)
        )
        assert high >= low - 1e-12
    alike = [[1, 0.1], [1, -0.1], [1, 0.2]]
    found = weights_of(kit, FedCE(), [*alike, [0, 1]], [0.5] * 4)
    assert found.argmax() == 3


@given(rounds)
def test_times_spreads_weights_more_where_the_estimates_agree(kit, round):
    updates, errors = round
    spread = {}
    for mode in ("plus", "times"):
        strategy = FedCE(mode=mode)
        given = {
            "metrics": {keys.MINUS_ERROR: sorted(errors)},
            "state": strategy.begin(),
        }
        one = kit.make_round(updates, **given)
        strategy.weights(one)
        gradient = one.logged_clients["gradient-contribution"]
        in_order = [updates[k] for k in gradient.argsort(stable=True).tolist()]
        one = kit.make_round(in_order, **given)
        weights, _ = FedCE(mode=mode).weights(one)
        assert (one.logged_clients["gradient-contribution"].diff() >= -1e-12).all()
        spread[mode] = effective_clients(weights)
    assert spread["times"] <= spread["plus"] + 1e-9


def test_where_they_disagree_it_need_not():
    """Shares of 0.5, 0.3, 0.2 and of 0.2, 0.3, 0.5."""
    gradient = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    plus, times = gradient + gradient.flip(0), gradient * gradient.flip(0)
    assert effective_clients(times) > effective_clients(plus)


def test_it_keeps_three_numbers_a_client(kit):
    run = federation(kit, FedCE())
    play(run, [[1, 0], [0, 1], [1, 2]], [1, 1, 1])
    state = run.strategy.state["method"]
    assert state.keys() == {"coefficients", "cosines", "rounds"}
    for name in state:
        assert len(state[name]) == 3
