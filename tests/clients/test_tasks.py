"""Clients that predict numbers: trained alone and at once, and evaluated."""

import numpy as np
import pytest
import torch
from torch import nn

from fedweight.clients import Objective, TrainingApp, TrainingSettings
from fedweight.clients.evaluation import evaluate, sums_of_each
from fedweight.clients.objectives import SAM, Focal, Plain, Proximal
from fedweight.clients.steps.batched import BatchedTrainer
from fedweight.clients.steps.loop import train
from fedweight.clients.steps.task import Task
from fedweight.clients.task_objectives import TaskLoss, for_task
from fedweight.core.errors import ConfigurationError, DataError
from fedweight.core.module import FlatModule
from fedweight.data import ClientData, Examples
from fedweight.messages import keys
from fedweight.messages.dispatch import Cohort
from fedweight.metrics import Statistics, task_named

REGRESSION = task_named("regression")

OPTIMIZERS = {
    "sgd": {"learning_rate": 0.05},
    "momentum": {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
    "adam": {"optimizer": "adam", "learning_rate": 0.01},
}


def line(n, seed=0, dtype=np.float64):
    """Numbers that follow from inputs, below 0 and above."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4))
    y = x @ np.array([1.0, -2.0, 0.5, 0.0]) - 3 + 0.1 * rng.normal(size=n)
    return Examples(x.astype(dtype), y.astype(dtype))


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "objective", [Plain(), Proximal(0.5), SAM(0.1)], ids=["plain", "proximal", "sam"]
)
@pytest.mark.parametrize("sizes", [[12, 12, 12], [3, 17, 8, 1]], ids=["same", "ragged"])
def test_at_once_is_alone(name, objective, sizes):
    objective = for_task(objective, REGRESSION)
    settings = TrainingSettings(batch_size=4, **OPTIMIZERS[name])
    module = FlatModule(net())
    start = module.save()
    whole = line(sum(sizes))
    ends = np.cumsum(sizes)
    parts = [whole.take(slice(e - n, e)) for n, e in zip(sizes, ends, strict=True)]
    tasks = [Task(part, 3, key) for key, part in enumerate(parts)]
    rate = settings.learning_rate
    at_once = BatchedTrainer(FlatModule(net()), objective, settings).train(
        start, tasks, learning_rate=rate
    )
    for task, found in zip(tasks, at_once, strict=True):
        alone = train(module, start, task, objective, settings, learning_rate=rate)
        np.testing.assert_allclose(
            found.model.parameters, alone.model.parameters, rtol=0, atol=1e-9
        )
        assert found.loss == pytest.approx(alone.loss, rel=1e-5)  # Counted in float32.
        assert not torch.equal(found.model.parameters, start.parameters)


def test_a_step_is_what_pytorch_makes_of_the_squared_error():
    module, data = FlatModule(net()), line(6)
    start = module.save()
    task = Task(data, 1, 0)
    settings = TrainingSettings(batch_size=6)
    found = train(
        module, start, task, for_task(Plain(), REGRESSION), settings, learning_rate=0.05
    )
    model = net()
    loss = nn.functional.mse_loss(
        model(torch.from_numpy(data.x))[:, 0], torch.from_numpy(data.y)
    )
    loss.backward()
    with torch.no_grad():
        wanted = [p - 0.05 * p.grad for p in model.parameters()]
    flat = torch.cat([p.flatten() for p in wanted])
    np.testing.assert_allclose(found.model.parameters, flat, rtol=0, atol=1e-14)
    assert found.loss == pytest.approx(loss.item(), rel=1e-12)


def test_what_an_objective_becomes():
    assert for_task(Plain(), task_named("classification")).__class__ is Plain
    assert isinstance(for_task(Plain(), REGRESSION), TaskLoss)
    outer = Proximal(0.5, SAM(0.1))
    changed = for_task(outer, REGRESSION)
    assert (changed.mu, changed.inner.rho) == (0.5, 0.1)
    assert isinstance(changed.inner.inner, TaskLoss)
    assert isinstance(outer.inner.inner, Plain)  # Others keep theirs.

    class Own(Objective):
        def example_losses(self, outputs, batch, facts):
            return (outputs[:, 0] - batch.y).abs()

    own = Own()
    assert for_task(own, REGRESSION) is own
    with pytest.raises(ConfigurationError, match="'focal' is for examples that have a"):
        for_task(SAM(0.1, Focal()), REGRESSION)


def regressing(data=None, **options):
    def client_of(context):
        k = int(context.node_config["partition-id"])
        return ClientData(line(12 + k, k, np.float32), line(k, 100 + k, np.float32))

    def model():
        return net().float()

    options.setdefault("settings", TrainingSettings(epochs=2, batch_size=5))
    return TrainingApp(model, data or client_of, task="regression", **options)


def cohort_of(kit, kind, start):
    messages = [kit.message(start, kind=kind, client=k) for k in range(3)]
    return Cohort(
        messages[0].content, [1000 + k for k in range(3)], kind, config_key="config"
    )


@pytest.mark.parametrize("batched", [False, True])
def test_clients_report_a_loss_and_no_accuracy(kit, batched):
    start = kit.start(lambda: net().float())
    answers = regressing().answer(
        cohort_of(kit, "train", start),
        [1000, 1001, 1002],
        lambda node: kit.context(node - 1000),
        batched=batched,
    )
    for k, reply in enumerate(answers.replies):
        assert reply.error is None, reply.error
        assert reply.metrics.keys() == {"num-examples", "train-loss", "num-steps"}
        assert reply.metrics["num-examples"] == 12 + k
        assert 0 < reply.metrics["train-loss"] < 100


def test_clients_report_sums_that_say_what_numpy_says(kit):
    start = kit.start(lambda: net().float())
    answers = regressing().answer(
        cohort_of(kit, "evaluate", start),
        [1000, 1001, 1002],
        lambda node: kit.context(node - 1000),
    )
    statistics = Statistics(REGRESSION)
    sums, odd = statistics.read([r.metrics[keys.STATISTICS] for r in answers.replies])
    assert not odd
    found = statistics.result(sums)
    assert np.isnan(found["rmse"][0])  # Nothing is held out.
    for k, reply in enumerate(answers.replies):
        assert reply.metrics.keys() == {"num-examples", "loss", "statistics"}
        data = line(k, 100 + k, np.float32)
        with torch.no_grad():
            guess = net().float()(torch.from_numpy(data.x))[:, 0].numpy()
        if k:
            error = np.mean((guess.astype(float) - data.y) ** 2)
            assert found["rmse"][k] == pytest.approx(np.sqrt(error), rel=1e-6)
            assert reply.metrics["loss"] == pytest.approx(error, rel=1e-5)


def test_probes_measure_the_loss(kit):
    message = kit.message(
        kit.start(lambda: net().float()),
        request=["loss-before", "loss-after", "held-out-loss-after"],
    )
    reply = regressing()(message, kit.context(3))
    metrics = reply.content["metrics"]
    assert metrics["loss-after"] < metrics["loss-before"]
    assert metrics["held-out-loss-after"] > 0


def test_an_app_takes_whole_numbers_and_refuses_what_is_none(kit):
    whole = Examples(np.ones((5, 4), np.float32), np.arange(-2, 3))
    app = regressing(lambda context: ClientData(whole, whole))
    reply = app(kit.message(kit.start(lambda: net().float())), kit.context())
    assert reply.content["metrics"]["num-examples"] == 5
    bad = Examples(np.ones((2, 4), np.float32), np.array([1.0, np.nan]))
    app = regressing(lambda context: ClientData(bad, bad))
    with pytest.raises(DataError, match="client 0: targets are float64, and hold nan"):
        app(kit.message(kit.start(lambda: net().float())), kit.context())


def test_each_part_is_evaluated_as_alone():
    module = FlatModule(net())
    model, statistics = module.save(), Statistics(REGRESSION)
    parts = [line(n, n) for n in (3, 0, 1500, 7)]
    found = statistics.result(sums_of_each(module, model, parts, statistics))
    for k, part in enumerate(parts):
        alone = evaluate(module, model, part, statistics)
        assert alone.keys() == {"loss", "rmse", "r2"}
        for name, value in alone.items():
            np.testing.assert_allclose(found[name][k], value, rtol=1e-9)
