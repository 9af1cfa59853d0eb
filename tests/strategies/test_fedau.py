import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedweight import run as run_simulation
from fedweight.core.errors import ConfigurationError
from fedweight.core.state import pack, unpack
from fedweight.strategies.fedau import FedAU

CASES = range(2)

plans = st.lists(
    st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=40
)


def build(**options):
    return FedAU(min_train_nodes=1, min_available_nodes=1, **options)


def federation(kit, strategy, models=None):
    models = np.eye(3) if models is None else models
    clients = {k: kit.Client(model) for k, model in enumerate(models)}
    return kit.Federation(
        strategy, clients, kit.record({"w": np.zeros(len(models[0]))})
    )


def round_by_round(participation, cutoff):
    """The omega in use in every round, as the paper's algorithm counts it."""
    used, s, m, omega = [], 0, 0, 1.0
    for there in participation:
        used.append(omega)
        s += 1
        if there or (cutoff is not None and s >= cutoff):
            omega = (m * omega + s) / (m + 1) if m else float(s)
            m, s = m + 1, 0
    return used, (omega, m)


def play(kit, participation, cutoff):
    """The omegas in use where the first of three clients follows a plan."""
    run = federation(kit, build(cutoff=cutoff))
    used = []
    for there in participation:
        run.clients[0].silent = not there
        record = run.round()
        used.append(3 * record.clients[0].weight)
    return used, run.strategy.state["method"][0]


@pytest.mark.parametrize("case", CASES)
def test_golden(kit, golden, case):
    """In the rounds in which it is away no weight is in use."""
    table = golden("fedau")
    expected = table["case"][case]
    there = np.array(table["participation"], bool)
    used, state = play(kit, there, expected.get("cutoff"))
    assert np.isnan(np.array(used)[~there]).all()
    np.testing.assert_allclose(
        np.array(used)[there], np.array(expected["omega"])[there]
    )
    intervals = expected["intervals"]
    assert state == [len(there), len(intervals), pytest.approx(np.mean(intervals))]


@pytest.mark.parametrize("case", CASES)
def test_golden_of_every_round(kit, golden, case):
    """Had it been there in a round, this would have been its weight."""
    table = golden("fedau")
    expected = table["case"][case]
    cutoff = expected.get("cutoff")
    run = federation(kit, build(cutoff=cutoff))
    for there, omega in zip(table["participation"], expected["omega"], strict=True):
        state, number = run.strategy.state["method"], run.number + 1
        given = kit.make_round(np.eye(3), number=number, state=state)
        assert 3 * float(run.strategy.weights(given)[0][0]) == pytest.approx(omega)
        run.clients[0].silent = not there
        run.round()


def test_golden_step(kit, golden):
    expected = golden("fedau")["step"]
    run = federation(kit, build(), kit.toy["models"])
    state = {k: [0, 1, omega] for k, omega in enumerate(expected["omega"])}
    run.strategy.restore({**run.strategy.state, "method": state})
    for client, there in zip(
        run.clients.values(), expected["participation"], strict=True
    ):
        client.silent = not there
    run.round()
    np.testing.assert_allclose(run.vector, expected["model"], atol=1e-8)


@given(plan=plans, cutoff=st.one_of(st.none(), st.integers(1, 6)))
def test_lazily_it_is_what_counting_every_round_gives(kit, plan, cutoff):
    strategy = build(cutoff=cutoff)
    state = strategy.begin()
    for number, cohort in enumerate(plan, 1):
        there = [k for k in range(3) if cohort[k]]
        if there:
            given = kit.make_round(
                np.eye(3)[there], clients=there, number=number, state=state
            )
            used, state = strategy.weights(given)
            for k, weight in zip(there, used.tolist(), strict=True):
                past = [row[k] for row in plan[:number]]
                expected = round_by_round(past, cutoff)[0][-1]
                assert weight * given.population == pytest.approx(expected)
                assert cutoff is None or weight * given.population <= cutoff + 1e-9
    assert set(state) == {k for row in plan for k in range(3) if row[k]}


@given(k=st.integers(1, 6), rounds=st.integers(1, 5))
def test_where_all_take_part_it_is_the_plain_mean(kit, k, rounds):
    strategy, sizes = build(), list(range(1, k + 1))
    state = strategy.begin()
    for number in range(1, rounds + 1):
        given = kit.make_round(np.eye(k), None, sizes, number=number, state=state)
        weights, state = strategy.weights(given)
        np.testing.assert_array_equal(weights, 1 / k)


def test_a_cutoff_of_1_gives_all_the_same_weight(kit):
    rng = np.random.default_rng(0)
    used, _ = play(kit, rng.uniform(size=40) < 0.2, 1)
    assert set(np.array(used)[~np.isnan(used)] / 3) == {1 / 3}


def test_it_finds_the_inverse_of_how_often_a_client_takes_part(kit):
    """And so, over many rounds, all clients count alike."""
    chances, rounds = np.array([0.1, 0.5, 0.9]), 4000
    there = np.random.default_rng(0).uniform(size=(rounds, 3)) < chances
    strategy = build()
    state, sums = strategy.begin(), np.zeros(3)
    for number, row in enumerate(there, 1):
        [cohort] = np.nonzero(row)
        if len(cohort):
            given = kit.make_round(
                np.eye(3)[cohort], clients=cohort.tolist(), number=number, state=state
            )
            weights, state = strategy.weights(given)
            sums[cohort] += weights.numpy() * given.population
    omega = [state[k][2] for k in range(3)]
    np.testing.assert_allclose(omega, 1 / chances, rtol=0.1)
    np.testing.assert_allclose(sums / rounds, 1.0, atol=0.1)


def test_those_that_are_not_drawn_are_among_the_n(kit):
    clients = {k: kit.Client(np.ones(1)) for k in range(20)}
    strategy = build(fraction_train=0.25)
    run = kit.Federation(strategy, clients, kit.record({"w": np.zeros(1)}))
    assert [c.weight for c in run.round().clients] == [1 / 20] * 5
    sums = [sum(c.weight for c in run.round().clients) for _ in range(400)]
    assert np.mean(sums[100:]) == pytest.approx(1, abs=0.15)


def test_a_failed_round_is_one_in_which_nobody_took_part(kit):
    run = federation(kit, build(min_replies=3))
    run.round()
    run.clients[0].silent = True
    assert run.round().status == "failed"
    run.clients[0].silent = False
    assert [c.weight for c in run.round().clients] == [1 / 3] * 3
    state = unpack(*pack(run.strategy.state))["method"]
    assert state == {k: [3, 2, 1.5] for k in range(3)}


def test_started_again_it_goes_on(kit):
    run = federation(kit, build(cutoff=4))
    for _ in range(6):
        run.round()
    run.number = 0
    for _ in range(3):
        assert [c.weight for c in run.round().clients] == [1 / 3] * 3


def test_bad_options():
    with pytest.raises(ConfigurationError, match="cutoff must be"):
        FedAU(cutoff=0)


def test_a_run_in_which_a_third_takes_part(tmp_path):
    settings = {
        "run.rounds": 12,
        "strategy.name": "fedau",
        "strategy.fraction-train": 0.3,
        "strategy.cutoff": 50,
    }
    made = run_simulation(settings=settings, out=tmp_path / "run", report=False)
    assert made.summary()["failed_rounds"] == 0
    assert made.rounds["test_accuracy"].iloc[-1] > 0.6
    assert made.clients["mean_interval"].max() > 2
