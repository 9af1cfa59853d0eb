import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedweight.core.errors import ConfigurationError
from fedweight.strategies import FedBuff, WeightingStrategy
from fedweight.strategies.feddisco import FedDisco
from fedweight.strategies.fedlaw import FedLAW
from fedweight.strategies.server_optimizers import ServerMomentum

# So many clients begin in round 1; they arrive in rounds 1 and 2.
EARLY = [[(0, 1), (1, 1)], [(2, 1), (3, 2)]]


def build(**options):
    return FedBuff(min_train_nodes=1, min_available_nodes=1, **options)


def federation(kit, strategy, models, start, rounds=EARLY, **options):
    """Client k sends the k-th model."""
    return kit.Scheduled(
        strategy,
        {k: kit.Client(model) for k, model in enumerate(models)},
        kit.record({"w": np.array(start, np.float64)}),
        schedule=kit.Script(rounds, **options),
    )


def by_golden(kit, strategy, table):
    """Return a federation that does what a golden table says, a client an arrival."""
    models = [model for row in table["round"] for model in row["models"]]
    numbers = iter(range(len(models)))
    rounds = [[(next(numbers), r) for r in row["began"]] for row in table["round"]]
    return federation(kit, strategy, models, table["start"], rounds)


def test_golden(kit, golden):
    table = golden("fedbuff")
    run = by_golden(kit, build(), table)
    for number, row in enumerate(table["round"], 1):
        record = run.round()
        staleness = [c.metrics["staleness"] for c in record.clients]
        assert staleness == [number - began for began in row["began"]]
        expected = [0.5 * (1 + tau) ** -0.5 for tau in staleness]
        assert [c.weight for c in record.clients] == expected
        assert record.metrics["round-seconds"] == 1
        np.testing.assert_allclose(run.vector, row["model"], rtol=0, atol=1e-15)


def test_a_client_is_sent_and_told_what_it_began_with(kit):
    run = federation(kit, build(), np.eye(4, 2) + 1, [0.0, 0.0])
    sent, told = [], []
    whole = run.grid.send_and_receive

    def send_and_receive(messages, **named):
        contents = [message.content for message in messages]
        sent.append([c.array_records["arrays"]["w"].numpy().tolist() for c in contents])
        told.append([c.config_records["config"]["server-round"] for c in contents])
        return whole(messages, **named)

    run.grid.send_and_receive = send_and_receive
    run.round()
    after = run.vector.tolist()
    run.round()
    assert sent == [[[0.0, 0.0]] * 2, [[0.0, 0.0], after]]
    assert told == [[1, 1], [1, 2]]


@given(
    k=st.integers(1, 5),
    exponent=st.sampled_from([0.0, 0.5, 2.0]),
    seed=st.integers(0, 99),
)
def test_it_is_the_sum_of_discounted_updates(kit, k, exponent, seed):
    """With clients of all ages, against the equation."""
    rng = np.random.default_rng(seed)
    rounds, number = [], 0
    for r in range(1, 5):
        rounds.append([(number + i, int(rng.integers(1, r + 1))) for i in range(k)])
        number += k
    models = rng.normal(size=(number, 3))
    run = federation(kit, build(), models, [0.5, -1, 2], rounds, exponent=exponent)
    versions = [run.vector]
    for r, row in enumerate(rounds, 1):
        run.round()
        steps = [
            (1 + r - began) ** -exponent * (models[c] - versions[began - 1])
            for c, began in row
        ]
        versions.append(versions[-1] + np.mean(steps, axis=0))
        np.testing.assert_allclose(run.vector, versions[-1], rtol=0, atol=1e-13)


def test_synchronously_it_is_the_plain_mean(kit):
    models = [[1.0, 2.0], [3.0, -1.0], [0.0, 0.0]]
    clients = {k: kit.Client(m, num_examples=k + 1) for k, m in enumerate(models)}
    run = kit.Federation(build(), clients, kit.record({"w": np.zeros(2)}))
    assert [c.weight for c in run.round().clients] == [1 / 3] * 3
    np.testing.assert_allclose(run.vector, np.mean(models, axis=0), atol=1e-15)


def test_a_failed_round_keeps_the_model_and_counts_as_one(kit):
    models = np.arange(12.0).reshape(6, 2)
    rounds = [[(0, 1), (1, 1)], [(2, 1), (3, 1)], [(4, 1), (5, 2)]]
    run = federation(kit, build(), models, [0.0, 0.0], rounds)
    run.clients[2].error = run.clients[3].error = "no power"
    run.round()
    before = run.vector
    record = run.round()
    assert record.status == "failed"
    assert record.metrics["round-seconds"] == 1
    np.testing.assert_array_equal(run.vector, before)
    assert [c.metrics["staleness"] for c in run.round().clients] == [2, 1]
    steps = models[4] / 3**0.5, (models[5] - before) / 2**0.5
    np.testing.assert_allclose(run.vector, before + np.mean(steps, axis=0))


def test_a_client_that_fails_leaves_the_others_their_starts(kit):
    run = federation(kit, build(), np.arange(8.0).reshape(4, 2), [0.0, 0.0])
    run.round()
    before = run.vector
    run.clients[3].silent = True
    record = run.round()
    assert [c.status for c in record.clients] == ["ok", "missing"]
    np.testing.assert_allclose(run.vector, before + run.clients[2].model / 2**0.5)


def test_older_models_are_let_go_after_the_round(kit):
    run = federation(kit, build(), np.eye(4, 2), [0.0, 0.0])
    run.round()
    run.round()
    assert not run.strategy._now.sent
    assert run.strategy._now.clock is None


def test_the_length_of_an_update_is_counted_from_where_it_began(kit):
    """The late client moved by 1, and is 100 away from the model of now."""
    rounds = [[(0, 1)], [(1, 1), (2, 2)]]
    models = [[100.0], [1.0], [102.0]]
    run = federation(kit, build(max_update_norm=100.0), models, [0.0], rounds)
    run.round()
    assert [c.status for c in run.round().clients] == ["ok", "ok"]
    run = federation(kit, build(max_update_norm=100.0), models, [0.0], rounds)
    run.clients[1].model = [100.5]
    run.round()
    record = run.round()
    assert [c.status for c in record.clients] == ["rejected", "ok"]
    assert "has norm 100.5" in record.clients[0].reason
    assert run.vector.tolist() == [102.0]


def test_max_share_holds_for_discounted_weights(kit):
    rounds = [[(0, 1)], [(1, 1)], [(2, 1), (3, 1), (4, 3)]]
    run = federation(
        kit, build(max_share=0.4), np.arange(5.0)[:, None], [0.0], rounds, exponent=3
    )
    for _ in rounds:
        record = run.round()
    weights = np.array([c.weight for c in record.clients])
    assert weights.sum() == pytest.approx((2 / 27 + 1) / 3)
    np.testing.assert_allclose(weights / weights.sum(), [0.3, 0.3, 0.4])


def test_the_servers_momentum_goes_on(kit):
    """Its step is the discounted one, and it is not forgotten between the rounds."""
    momentum = ServerMomentum(learning_rate=0.5, beta=0.9)
    models = [[1.0, 0.0], [0.0, 2.0], [2.0, 2.0], [1.0, 1.0]]
    run = federation(kit, build(server_optimizer=momentum), models, [0.0, 0.0])
    run.round()
    first = np.array([0.5, 1.0])
    np.testing.assert_allclose(run.vector, 0.5 * first)
    steps = np.array(models[2]) / 2**0.5, models[3] - 0.5 * first
    second = 0.9 * first + np.mean(steps, axis=0)
    run.round()
    np.testing.assert_allclose(run.vector, 0.5 * first + 0.5 * second)


def test_statistics_are_means_of_the_clients_and_still_tensors_keep_their_bits(kit):
    """A difference added to another model could make a variance negative."""
    start = {
        "w": np.array([0.1, 0.2], np.float32),
        "still": np.array([0.1, 1 / 3], np.float32),
        "norm.running_var": np.array([1.0], np.float32),
        "norm.num_batches_tracked": np.array(0),
    }

    def model(w, variance, batches):
        return {
            "w": np.array(w, np.float32),
            "still": start["still"],
            "norm.running_var": np.array([variance], np.float32),
            "norm.num_batches_tracked": np.array(batches),
        }

    sent = [model([1, 0], 0.1, 3), model([0, 1], 0.3, 5)]
    sent += [model([0.3, 0.3], 0.05, 4), model([0.5, 0.5], 0.07, 9)]
    clients = {k: kit.Client(m) for k, m in enumerate(sent)}
    clients[3].num_examples = 30
    run = kit.Scheduled(build(), clients, kit.record(start), schedule=kit.Script(EARLY))
    run.round()
    run.round()
    made = {name: array.numpy() for name, array in run.arrays.items()}
    np.testing.assert_array_equal(made["still"], start["still"])
    np.testing.assert_allclose(made["norm.running_var"], [0.065], rtol=1e-6)
    assert made["norm.num_batches_tracked"] == 4
    w = np.array([0.5, 0.5])
    stale = (np.array([0.3, 0.3]) - [0.1, 0.2]) / 2**0.5
    fresh = np.array([0.5, 0.5]) - w
    np.testing.assert_allclose(made["w"], w + (stale + fresh) / 2, rtol=1e-6)


@pytest.mark.parametrize("accumulate", ["float32", "float64"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_precision_goes_with_it(kit, dtype, accumulate):
    rng = np.random.default_rng(0)
    models = rng.normal(size=(4, 50)).astype(dtype)
    run = kit.Scheduled(
        build(accumulate=accumulate, max_update_norm=1e3),
        {k: kit.Client(m) for k, m in enumerate(models)},
        kit.record({"w": np.zeros(50, dtype)}),
        schedule=kit.Script(EARLY),
    )
    run.round()
    first = models[:2].mean(0)
    run.round()
    steps = models[2] / 2**0.5, models[3] - first
    np.testing.assert_allclose(
        run.vector, first + np.mean(steps, axis=0), rtol=0, atol=1e-6
    )


def test_weights_per_tensor_are_discounted(kit):
    class PerTensor(WeightingStrategy):
        def weights(self, round):
            return torch.full((round.num_clients, 1), 0.5, dtype=torch.float64)

    strategy = PerTensor(min_train_nodes=1, min_available_nodes=1)
    run = federation(kit, strategy, np.eye(4, 2), [0.0, 0.0])
    run.round()
    weights = [c.weight for c in run.round().clients]
    assert weights == pytest.approx([0.5 / 2**0.5, 0.5])


def test_another_rule_may_weigh_the_buffer(kit):
    """FedDisco sees the buffer as its cohort; its weights are discounted."""
    counts = [[9, 1], [5, 5], [10, 0], [4, 6]]
    clients = {
        k: kit.Client(row, profile={"label-counts": counts[k]})
        for k, row in enumerate(np.eye(4, 2))
    }
    names = {"min_train_nodes": 1, "min_available_nodes": 1, "num_classes": 2}
    run = kit.Scheduled(
        FedDisco(**names),
        clients,
        kit.record({"w": np.zeros(2)}),
        schedule=kit.Script(EARLY),
    )
    run.round()
    found = [c.weight for c in run.round().clients]
    # Each client is new: what it weighs depends on the cohort alone.
    late = {k - 2: kit.Client(c.model, profile=c.profile) for k, c in clients.items()}
    plain = kit.Federation(
        FedDisco(**names),
        {k: late[k] for k in (0, 1)},
        kit.record({"w": np.zeros(2)}),
    )
    alone = [c.weight for c in plain.round().clients]
    assert found == pytest.approx([alone[0] / 2**0.5, alone[1]])


def test_a_method_that_makes_the_model_itself_needs_a_constant_discount(kit):
    proxy = type("Proxy", (), {"x": np.ones((2, 1), np.float32), "y": np.arange(2)})
    strategy = FedLAW(model=torch.nn.Linear(1, 2), proxy=proxy)
    said = r"schedule\.discount: FedLAW makes the model .* Choose 'constant'"
    with pytest.raises(ConfigurationError, match=said):
        federation(kit, strategy, np.eye(4, 2), [0.0, 0.0]).round()
    with strategy.following(kit.Clock(kit.Script(EARLY, exponent=0.0))):
        pass


def test_several_global_models_are_refused(kit):
    class Several(FedBuff):
        def assign(self, selection):
            return [0] * len(selection.clients)

    with pytest.raises(ConfigurationError, match="keeps several global models"):
        federation(kit, Several(), np.eye(4, 2), [0.0, 0.0]).round()


def test_a_grid_whose_clients_come_and_go_is_refused(kit):
    run = federation(kit, build(), np.eye(4, 2), [0.0, 0.0])
    run.grid.complete = False
    with pytest.raises(ConfigurationError, match="needs simulated clients"):
        run.round()


def test_clients_that_are_not_numbered_from_0_are_refused(kit):
    run = federation(kit, build(), np.eye(4, 2), [0.0, 0.0])
    run.clients[7] = run.clients.pop(0)
    with pytest.raises(ConfigurationError, match="numbered from 0 on"):
        run.round()


def test_clients_without_examples_are_known_to_the_schedule(kit):
    """Where the app does not know, their replies have said so."""
    seen = []

    class Looks(kit.Script):
        def next(self, moment, state):
            seen.append(moment.sizes_of([0, 1, 2]))
            return super().next(moment, state)

    run = federation(kit, build(), np.eye(4, 2), [0.0, 0.0])
    run.schedule = Looks(EARLY)
    run.clients[1].num_examples = 0
    record = run.round()
    assert [c.status for c in record.clients] == ["ok", "dropped"]
    run.round()
    assert seen == [None, [1, 0, 1]]
