"""Local models that are added up as they come, against models that are kept."""

import pickle

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedweight.clients import TrainingApp, TrainingSettings
from fedweight.core.errors import AggregationError, EngineError
from fedweight.core.layout import FlatModel
from fedweight.core.local_models import (
    HeldModels,
    ModelSum,
    SummedModels,
    members,
    middle,
)
from fedweight.core.module import FlatModule
from fedweight.data import ClientData, Examples
from fedweight.messages import _flower
from fedweight.messages.arrays import FlatRecord
from fedweight.simulations import Plan
from fedweight.simulations.local import LocalGrid
from fedweight.strategies.fedavg import FedAvg
from fedweight.strategies.fedprox import FedProx
from fedweight.strategies.server_optimizers import ServerAdam


@pytest.fixture(autouse=True)
def _may_make_messages():
    with _flower.task_identity(1):
        yield


def network():
    """A model with buffers, integers and parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def client_data(context):
    client = int(context.node_config["partition-id"])
    stream = np.random.default_rng(client)

    def part(n):
        x = stream.normal(size=(n, 4)).astype(np.float32)
        return Examples(x, stream.integers(0, 3, n))

    return ClientData(part(0 if client == 3 else 8 + 4 * (client % 3)), part(4))


def full(context):
    """Everybody has data: Flower's wrappers divide by what a client changed."""
    data = client_data(context)
    return ClientData(data.held_out, data.train)


def linear():
    return nn.Linear(4, 3)


def broken(context):
    """Client 5 has infinite data, client 6 none at all."""
    client = int(context.node_config["partition-id"])
    if client == 6:
        raise OSError("no such file")
    data = client_data(context)
    if client == 5:
        data.train.x[0, 0] = np.inf
    return data


class Watching(LocalGrid):
    """Notes what a cohort allowed, and what became of the models."""

    summed = ()

    def send_and_receive(self, messages, *, timeout=None):
        replies = super().send_and_receive(messages, timeout=timeout)
        if messages:
            self.summed = [reply.summed for reply in replies.plain or ()]
        return replies


def run(strategy, chunk=1, data=client_data, model=network, grid=Watching):
    # At a higher rate, normalisation of four examples makes much of a last bit.
    settings = TrainingSettings(batch_size=4, learning_rate=0.01)
    app = TrainingApp(model, data, num_classes=3, settings=settings)
    grid = grid(app, 9, threads=2, plan=Plan(chunk))
    start = ArrayRecord(model().state_dict())
    told = ConfigRecord({"local-epochs": 3})
    result = strategy.start(grid, start, num_rounds=3, train_config=told)
    return result.arrays, strategy, grid


def options(**more):
    return {"fraction_evaluate": 0.0, **more}


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize(
    "make",
    [
        lambda **o: FedAvg(**options(**o)),
        lambda **o: FedAvg(**options(drop_stragglers=True, stragglers=0.4, **o)),
        lambda **o: FedProx(proximal_mu=0.1, **options(stragglers=0.4, **o)),
        lambda **o: FedAvg(**options(server_optimizer=ServerAdam(), **o)),
    ],
)
@pytest.mark.parametrize("data", [client_data, broken])
def test_the_sum_gives_what_the_kept_models_give(make, chunk, data):
    summed, ours, grid = run(make(), chunk, data)
    assert any(grid.summed)
    kept, theirs, grid = run(make(accumulate="float64"), chunk, data)
    assert not any(grid.summed)
    for name, array in kept.items():
        np.testing.assert_allclose(
            summed[name].numpy(), array.numpy(), rtol=1e-5, atol=1e-5
        )
    for one, other in zip(ours.history, theirs.history, strict=True):
        assert one.status == other.status == "ok"
        for a, b in zip(one.clients, other.clients, strict=True):
            assert (a.client, a.status) == (b.client, b.status)
            assert a.reason.split("\n")[0] == b.reason.split("\n")[0]
            assert a.weight == pytest.approx(b.weight, nan_ok=True)
            assert a.metrics == pytest.approx(b.metrics, abs=1e-4, nan_ok=True)


class Uniform(FedAvg):
    """Another rule on top of FedAvg."""

    def weights(self, round):
        return torch.full((round.num_clients,), 1 / round.num_clients)


class Careful(FedAvg):
    """Rejects what it does not like."""

    def admit(self, report):
        if report.client == 2:
            raise AggregationError("not this one")


class Asking(FedAvg):
    """Asks for what a client without data cannot tell."""

    request = ("loss-before",)


def wrapped(strategy):
    return DifferentialPrivacyServerSideFixedClipping(strategy, 0.0, 1.0, 9)


@pytest.mark.parametrize(
    "make",
    [
        *(Uniform, Careful, Asking, lambda **o: wrapped(FedAvg(**o))),
        lambda **o: FedAvg(**o, max_share=0.5),
        lambda **o: FedProx(**o, max_update_norm=1e3),
        lambda **o: FedAvg(**o, accumulate="float64"),
    ],
)
def test_whoever_may_need_each_model_gets_it(make):
    _, _, grid = run(make(**options()), model=linear, data=full)
    assert not any(grid.summed)


def test_a_metric_that_nobody_reports_is_the_reason_of_every_rejection():
    _, strategy, _ = run(FedAvg(**options(weighted_by_key="examples")))
    for record in strategy.history:
        assert record.status == "failed"
        assert {client.status for client in record.clients} == {"rejected"}
        assert "'examples'" in record.clients[0].reason


def test_models_whose_sum_is_too_large_still_have_a_mean():
    large = model_of([3e38, 1.0, -3e38])
    total = ModelSum.of({5: (large, 10.0), 7: (large, 20.0)})
    assert not total.is_finite()
    total = ModelSum.of({5: (large, 10.0), 7: (large, 20.0)}, torch.float64)
    updates = SummedModels(total).updates([5, 7], START)
    weights = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    assert updates.combine(weights).isfinite().all()


def test_a_grid_that_is_not_ours_keeps_the_models():
    class Foreign(Watching):
        sums_models = False

    _, _, grid = run(FedAvg(**options()), grid=Foreign)
    assert not any(grid.summed)


def test_a_model_that_was_added_up_cannot_be_looked_at():
    class Looking(LocalGrid):
        def send_and_receive(self, messages, *, timeout=None):
            return list(super().send_and_receive(messages, timeout=timeout))

    with pytest.raises(EngineError, match="'accumulate'"):
        run(FedAvg(**options()), grid=Looking)


def model_of(values):
    model = FlatModule(nn.Linear(len(values) - 1, 1)).save()
    return model.with_parameters(torch.tensor(values))


START = model_of([0.5, -1.0, 2.0])
MODELS = {7: model_of([1.0, 2.0, 3.0]), 5: model_of([3.0, 0.0, -1.0])}


def total():
    parts = [ModelSum.of({node: (MODELS[node], c)}) for node, c in ((7, 1.0), (5, 3.0))]
    whole = ModelSum()
    for part in parts:
        whole.join(part)
    return whole


def test_the_sum_knows_one_weighted_mean():
    updates = SummedModels(total()).updates([5, 7], START)
    mean = torch.tensor([2.5, 0.5, 0.0]) - START.parameters
    for scale, dtype in ((1.0, torch.float64), (4.0, torch.float32)):
        weights = torch.tensor([0.75, 0.25], dtype=dtype) * scale
        torch.testing.assert_close(updates.combine(weights), mean * scale)


def sums(rows):
    """Add up rows as they lie, and as copies that lie apart, with what is right."""
    coefficients = [1.0 + k % 3 for k in range(len(rows))]
    found = []
    for some in (rows, [row.clone() for row in rows]):
        models = {
            k: (FlatModel(START.layout, row, row[:0]), c)
            for k, (row, c) in enumerate(zip(some, coefficients, strict=True))
        }
        found.append(ModelSum.of(models).parameters)
    exact = sum(c * row.double() for c, row in zip(coefficients, rows, strict=True))
    return [*found, exact]


@pytest.mark.parametrize("count", [1, 2, 32, 33, 100])
@pytest.mark.parametrize("size", [0, 1, 50])
def test_models_that_lie_together_have_the_sum_of_others(count, size):
    matrix = torch.randn(count, size, generator=torch.Generator().manual_seed(0))
    for rows in (matrix.unbind(), matrix[count // 2 :].unbind()):
        together, apart, exact = sums(rows)
        assert together.dtype == apart.dtype
        for found in (together, apart):
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_models_that_only_seem_to_lie_together_are_summed_one_by_one():
    # Two tensors over neighbouring memory of one array: no tensor holds both.
    array = np.arange(6, dtype=np.float32)
    rows = [torch.from_numpy(array[:3]), torch.from_numpy(array[3:])]
    assert rows[1].data_ptr() == rows[0].data_ptr() + 12
    matrix = torch.arange(12.0).reshape(4, 3)
    for some in (rows, list(matrix[[0, 2, 1]].unbind()), [matrix[2], matrix[0]]):
        together, apart, _ = sums(some)
        assert torch.equal(together, apart)
    gap = [matrix[0], matrix[2], matrix[3]]
    together, apart, _ = sums(gap)
    assert torch.equal(together, apart)


def test_the_sum_knows_nothing_else():
    updates = SummedModels(total()).updates([5, 7], START)
    with pytest.raises(AggregationError, match="weights other than"):
        updates.combine(torch.tensor([0.5, 0.5], dtype=torch.float64))
    with pytest.raises(AggregationError, match="does not allow"):
        updates.norms()
    with pytest.raises(AggregationError, match="not those in the sum"):
        SummedModels(total()).updates([5], START)


def test_without_data_the_global_model_stays():
    nothing = ModelSum()
    nothing.join(ModelSum.of({5: (START, 0.0)}))
    updates = SummedModels(nothing).updates([5], START)
    assert not updates.combine(torch.ones(1, dtype=torch.float64)).any()


@given(st.permutations(range(9)), st.lists(st.integers(1, 8), max_size=4))
@settings(max_examples=50)
def test_every_node_is_a_member_of_one_part(order, cuts):
    parts = [part.tolist() for part in np.split(np.array(order), sorted(cuts))]
    nodes = [n for n in range(12) if n % 4]
    found = members(parts, nodes)
    assert sorted(k for part in found for k in part) == list(range(len(nodes)))
    assert all(part == sorted(part) for part in found)


def test_parts_change_only_the_order_of_sums():
    models = {n: model_of([float(n), 1.0, 2.0]) for n in range(6)}
    weights = torch.full((6,), 1 / 6, dtype=torch.float64)
    steps = [
        HeldModels(models, parts).updates(range(6), START).combine(weights)
        for parts in (None, [[0, 5], [3, 1, 2, 4]], [[2]])
    ]
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0])


def test_the_integers_in_the_middle_stand_for_all():
    """A single client does not decide, whatever it sends."""
    counted = FlatRecord(FlatModule(network()).save()).flat
    models = {}
    for node, number in ((8, 8), (4, 4), (6, 900)):
        models[node] = counted.with_parameters(counted.parameters)
        models[node].integers = {"1.num_batches_tracked": np.array(number)}
    parts = [ModelSum.of({node: (models[node], 1.0)}) for node in models]
    whole = ModelSum()
    for part in parts:
        whole.join(part)
    for kept in (SummedModels(whole), HeldModels(models)):
        assert middle(kept.integers([4, 6, 8])) == {"1.num_batches_tracked": 8}
        assert middle(kept.integers([6, 4])) == {"1.num_batches_tracked": 4}


@pytest.mark.filterwarnings("error")
def test_a_sum_that_came_in_shared_memory_is_read_without_a_warning():
    start = FlatModule(nn.Linear(2, 1)).save()
    total = ModelSum.of({1: (start, 2.0)})
    total.changed = np.array([True, False])
    apart = []
    sent = pickle.dumps(total, protocol=5, buffer_callback=apart.append)
    shared = [bytes(part.raw()) for part in apart]  # As Ray's: nobody may write to it.
    gathered = ModelSum()
    gathered.join(pickle.loads(sent, buffers=shared))
    updates = SummedModels(gathered).updates([1], start)
    assert updates.changed.tolist() == [True, False]
