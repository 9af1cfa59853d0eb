"""Models of clients' own, evaluated at once: as each alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fedweight
from fedweight import models
from fedweight.clients import evaluation
from fedweight.clients.evaluation import sums_of_each, sums_of_own
from fedweight.clients.steps.predictions import predictions
from fedweight.clients.trying import mixes_examples
from fedweight.core.module import FlatModule
from fedweight.data import DataSet, Examples
from fedweight.metrics import TASKS, Statistics

from ..waits import Waits


def normed():
    return nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 3)
    )


ARCHITECTURES = {
    "mlp": lambda: models.build("mlp", (6,), 3, hidden=4),
    "etf": lambda: models.build("mlp", (6,), 3, hidden=4, head="etf"),
    "cnn": lambda: models.build("cnn", (1, 4, 4), 3, channels=(2, 2), hidden=4),
    "char-gru": lambda: models.build("char-gru", (6,), 3, hidden=4),
    "char-transformer": lambda: models.build(
        "char-transformer", (6,), 3, width=4, heads=2, depth=1
    ),
    "normed": normed,
}
SIZES = (5, 0, 9, 1, 4)


def inputs(name, n, rng):
    if name.startswith("char"):
        return rng.integers(0, 3, (n, 6))
    shape = (n, 1, 4, 4) if name == "cnn" else (n, 6)
    return rng.normal(size=shape).astype(np.float32)


def a_client(name, k):
    torch.manual_seed(k)
    module = ARCHITECTURES[name]()
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.data = torch.rand_like(buffer) + 0.5
    return FlatModule(module).save()


@pytest.mark.parametrize("at_once", [3, 4096])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_at_once_is_as_alone(monkeypatch, name, at_once):
    monkeypatch.setattr(evaluation, "AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    parts = [Examples(inputs(name, n, rng), rng.integers(0, 3, n)) for n in SIZES]
    module = FlatModule(ARCHITECTURES[name]())
    own = [a_client(name, k) for k in range(len(SIZES))]
    for one in own:
        one.frozen = own[0].frozen
    statistics = Statistics(TASKS["classification"], 3, ["macro-f1"])
    together = statistics.result(sums_of_own(module, own, parts, statistics))
    alone = [
        statistics.result(sums_of_each(module, m, [p], statistics))
        for m, p in zip(own, parts, strict=True)
    ]
    for measure, values in together.items():
        expected = np.concatenate([one[measure] for one in alone])
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-7)
    assert np.isnan(together["loss"]).tolist() == [n == 0 for n in SIZES]


def test_no_client_is_waited_for():
    rng = np.random.default_rng(0)
    parts = [Examples(inputs("", n, rng), rng.integers(0, 3, n)) for n in SIZES]
    module = FlatModule(ARCHITECTURES["mlp"]())
    own = [a_client("mlp", k) for k in range(len(SIZES))]
    with Waits() as waits:
        sums_of_each(module, own[0], parts)
        sums_of_own(module, own, parts)
    assert not waits.seen


class Changes(nn.Linear):
    """A model that changes its inputs, as one that begins with an in-place ReLU."""

    def forward(self, x):
        return super().forward(x.mul_(0.5))


def test_a_model_that_changes_its_inputs_does_not_change_the_data():
    rng = np.random.default_rng(0)
    examples = Examples(inputs("", 9, rng), rng.integers(0, 3, 9))
    before = examples.x.copy()
    module = FlatModule(Changes(6, 3))
    start = module.save()
    for measure in (
        lambda: evaluation.evaluate(module, start, examples),
        lambda: evaluation.predicted(module, start, examples),
        lambda: predictions(module, start, examples),
        lambda: mixes_examples(lambda: Changes(6, 3), examples, "cpu"),
    ):
        measure()
        assert np.array_equal(examples.x, before)
    assert not mixes_examples(lambda: Changes(6, 3), examples, "cpu")


def test_nor_does_a_run_with_it(tmp_path):
    rng = np.random.default_rng(0)
    x, y = inputs("", 60, rng), rng.integers(0, 3, 60)
    part = Examples(x[:40], y[:40]), Examples(x[40:], y[40:])
    settings = {
        "model": changing,
        "partition": {"name": "iid", "clients": 1},
        "run.rounds": 2,
        "engine.plan": "loop",
    }
    fedweight.run(
        dataset=DataSet("own", *part, 3), settings=settings, out=tmp_path / "run"
    )
    assert np.array_equal(x, inputs("", 60, np.random.default_rng(0)))


def changing(input_shape, num_classes):
    return Changes(*input_shape, num_classes)
