import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedweight.core.errors import ConfigurationError
from fedweight.messages import keys
from fedweight.strategies.ida import IDA, inverse

CASES = range(7)


def toy_round(kit, **options):
    return kit.make_round(
        kit.toy["models"],
        num_examples=kit.toy["num_examples"],
        metrics={keys.ACCURACY_AFTER: kit.toy["training_accuracy"]},
        **options,
    )


def toy_federation(kit, strategy):
    clients = {
        k: kit.Client(model, n, {keys.ACCURACY_AFTER: accuracy})
        for k, (model, n, accuracy) in enumerate(
            zip(
                kit.toy["models"],
                kit.toy["num_examples"],
                kit.toy["training_accuracy"],
                strict=True,
            )
        )
    }
    start = {"a": np.zeros(1, np.float32), "b": np.zeros((3, 1), np.float32)}
    return kit.Federation(strategy, clients, kit.record(start))


@pytest.mark.parametrize("case", CASES)
def test_golden(kit, golden, case):
    expected = golden("ida")["case"][case]
    strategy = IDA(**expected["options"], epsilon=0)
    round = toy_round(kit)
    weights = strategy.weights(round)
    assert weights.tolist() == pytest.approx(expected["weights"], abs=1e-8)
    if "distances" in expected:
        distances = round.logged_clients["distance"].tolist()
        assert distances == pytest.approx(expected["distances"], abs=1e-8)
    if "model" in expected:
        model = strategy.aggregate(toy_round(kit)).tolist()
        assert model == pytest.approx(expected["model"], abs=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_golden_through_messages(kit, golden, case):
    expected = golden("ida")["case"][case]
    run = toy_federation(kit, IDA(**expected["options"]))
    record = run.round()
    weights = [c.weight for c in record.clients]
    assert weights == pytest.approx(expected["weights"], abs=1e-7)
    asked = run.clients[0].told[0].get(keys.REQUEST, [])
    wants = expected["options"].get("intrac", False)
    assert asked == ([keys.ACCURACY_AFTER] if wants else [])
    model = np.array(weights) @ np.array(kit.toy["models"])
    np.testing.assert_allclose(run.vector, model, rtol=1e-6)


def test_intrac_alone_is_what_equal_distances_give(kit, golden):
    """Three unit vectors are equally far from their mean."""
    round = kit.make_round(
        np.eye(3), metrics={keys.ACCURACY_AFTER: kit.toy["training_accuracy"]}
    )
    weights = IDA(intrac=True).weights(round).tolist()
    assert weights == pytest.approx(golden("ida")["intrac_alone"]["weights"], abs=1e-8)


def test_intrac_floor(kit):
    accuracy = {keys.ACCURACY_AFTER: [0.0, 0.1, 1.0]}
    round = kit.make_round(np.eye(3), metrics=accuracy)
    clients = IDA(intrac=True).weights(round)
    assert clients.tolist() == pytest.approx([3 / 7, 3 / 7, 1 / 7])
    chance = IDA(intrac=True, intrac_floor=0.1).weights(round)
    assert chance.tolist() == pytest.approx([10 / 21, 10 / 21, 1 / 21])


def test_golden_per_tensor(kit, golden):
    expected = golden("ida")["per_tensor"]
    strategy = IDA(per_tensor=True)
    round = toy_round(kit, offsets=expected["offsets"])
    weights = strategy.weights(round)
    np.testing.assert_allclose(weights, expected["weights"], atol=1e-7)
    run = toy_federation(kit, strategy)
    record = run.round()
    np.testing.assert_allclose(run.vector, expected["model"], rtol=1e-6)
    logged = [c.weight for c in record.clients]
    assert logged == pytest.approx(np.mean(expected["weights"], 1), abs=1e-7)


def test_previous_is_the_distance_from_the_global_model(kit):
    round = kit.make_round([[1, 1], [3, 1], [0, 8]], origin=np.array([0.0, 1.0]))
    weights = IDA(base="previous").weights(round)
    raw = np.array([1, 1 / 3, 1 / 7])
    assert weights.tolist() == pytest.approx(raw / raw.sum(), abs=1e-7)


@pytest.mark.parametrize("distance", ["l1", "l2"])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_two_clients_count_alike(kit, distance, per_tensor):
    strategy = IDA(distance=distance, per_tensor=per_tensor, accumulate="float32")
    round = kit.make_round(
        [[1.1, 2.3, 1e7], [1.3, -7.9, 1e7 + 1]], accumulate="float32"
    )
    assert (strategy.weights(round) == 0.5).all()


@pytest.mark.parametrize("base", ["uniform", "sample", "previous"])
@pytest.mark.parametrize("epsilon", [0, 1e-8])
def test_identical_models_count_alike(kit, base, epsilon):
    round = kit.make_round([[0.0, 0.0]] * 4, num_examples=[1, 2, 3, 4])
    weights = IDA(base=base, epsilon=epsilon).weights(round)
    assert weights.tolist() == pytest.approx([0.25] * 4, abs=1e-15)
    by_size = IDA(base=base, epsilon=epsilon, fedavg=True).weights(round)
    assert by_size.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=1e-15)


@pytest.mark.parametrize("epsilon", [0, 1e-8])
def test_a_client_at_the_mean_gets_nearly_all(kit, epsilon):
    round = kit.make_round([[0.0], [1.0], [-1.0]])
    weights = IDA(epsilon=epsilon).weights(round)
    added = 1e-8 * 2 / 3
    assert weights[1].item() == pytest.approx(added / (1 + added), rel=1e-6)
    assert weights.sum().item() == pytest.approx(1)


@given(
    st.lists(st.floats(0, 1e300), min_size=1, max_size=6),
    st.sampled_from([0.0, 1e-8, 0.1]),
)
def test_inverse_is_finite_and_falls(distances, epsilon):
    values = torch.tensor(distances, dtype=torch.float64)
    result = inverse(values, epsilon)
    assert ((result > 0) & (result <= 1)).all()
    order = values.argsort()
    assert (result[order].diff() <= 0).all()
    assert result.max() == 1


@pytest.mark.parametrize("epsilon", [1e-7, 0.5, 3.0, 1e6])
@pytest.mark.parametrize("at_the_mean", [False, True])
def test_a_larger_epsilon_is_added_to_every_distance(kit, epsilon, at_the_mean):
    rows = [[0, 0], [3, 0], [0, 9]] + ([[1, 3]] if at_the_mean else [])
    round = kit.make_round(rows)
    weights = IDA(epsilon=epsilon).weights(round)
    raw = 1 / (round.logged_clients["distance"] + epsilon)
    torch.testing.assert_close(weights, raw / raw.sum())
    uniform = IDA(epsilon=1e12).weights(round)
    torch.testing.assert_close(uniform, torch.full_like(uniform, 1 / len(rows)))


@pytest.mark.parametrize("epsilon", [0, 1e-12, 1e-8])
def test_a_small_epsilon_depends_on_no_unit(kit, epsilon):
    rows = np.array([[0, 0], [3, 0], [0, 9], [1, 3]])
    expected = IDA(epsilon=epsilon).weights(kit.make_round(rows))
    for unit in (1e-3, 1e5):
        weights = IDA(epsilon=epsilon).weights(kit.make_round(unit * rows))
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-12)


def rows_of_steps(kind, steps=(1, 5, 5, 5, 9, 9), size=1000):
    """Updates as long as steps, in one direction or each in its own."""
    stream = np.random.default_rng(0)
    common = stream.normal(size=size)
    own = stream.normal(size=(len(steps), size))
    own[:] = common if kind == "alike" else own
    return np.array(steps)[:, None] * own


def test_few_steps_count_more_where_updates_have_little_in_common(kit):
    """Where they agree, it is a usual number of steps that counts."""
    apart = IDA().weights(kit.make_round(rows_of_steps("apart")))
    assert apart.argmax() == 0
    alike = IDA().weights(kit.make_round(rows_of_steps("alike")))
    assert alike.argmin() == 0
    assert set(alike.topk(3).indices.tolist()) == {1, 2, 3}


@pytest.mark.parametrize("kind", ["alike", "apart"])
def test_from_the_previous_model_few_steps_count_more_whatever_they_say(kit, kind):
    round = kit.make_round(rows_of_steps(kind))
    weights = IDA(base="previous").weights(round)
    assert weights.argmax() == 0
    assert weights[0] > IDA().weights(round)[0]


def test_sizes_count_with_fedavg_and_for_the_mean_by_size_only(kit):
    rows = [[1.0, 0], [0, 1.0], [9, 9], [1, 1]]
    honest = kit.make_round(rows, num_examples=[10] * 4)
    lying = kit.make_round(rows, num_examples=[10, 10, 10**6, 10])
    for base in ("uniform", "previous"):
        weights = IDA(base=base).weights(honest)
        assert torch.equal(weights, IDA(base=base).weights(lying))
        assert IDA(base=base, fedavg=True).weights(lying)[2] > 0.99
    # Nobody is nearer to a mean of its own.
    assert IDA(base="sample").weights(lying)[2] > 0.99


@given(st.floats(1e-3, 1e3), st.integers(0, 99))
def test_two_clients_are_told_apart_by_another_base_only(kit, scale, seed):
    rows = scale * np.random.default_rng(seed).normal(size=(2, 5))
    round = kit.make_round(rows, num_examples=[1, 3])
    assert IDA().weights(round).tolist() == [0.5, 0.5]
    by_size = IDA(base="sample").weights(round)
    assert by_size.tolist() == pytest.approx([0.25, 0.75], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_what_the_rounding_of_the_mean_explains_is_no_distance(kit, dtype, distance):
    stream = np.random.default_rng(0)
    origin = 1e3 * stream.normal(size=500)
    accumulate = "float32" if dtype == torch.float32 else "float64"
    model = (origin + 0.1).astype(accumulate)
    round = kit.make_round([model] * 5, origin=origin, accumulate=accumulate)
    IDA(distance=distance).weights(round)
    assert round.logged_clients["distance"].tolist() == [0.0] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "l3"}, "distance must be one of"),
        ({"base": "prev"}, "Did you mean 'previous'"),
        ({"epsilon": -1}, "epsilon must be in"),
        ({"intrac_floor": 0}, "intrac_floor must be in"),
        ({"intrac_floor": "client"}, "Did you mean 'clients'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigurationError, match=message):
        IDA(**options)


def test_an_accuracy_outside_zero_and_one_is_rejected(kit):
    run = toy_federation(kit, IDA(intrac=True))
    run.clients[1].metrics[keys.ACCURACY_AFTER] = 60.0
    record = run.round()
    assert "'accuracy-after' must be in [0, 1]" in record.clients[1].reason
