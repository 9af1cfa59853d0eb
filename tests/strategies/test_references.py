"""Random rounds of every registered method against plain NumPy."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torch import nn

from fedweight.messages import keys
from fedweight.strategies import STRATEGIES, strategy_class

from .conftest import as_it_begins

_place = Path(__file__).with_name("references.py")
_spec = importlib.util.spec_from_file_location("references", _place)
plain = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain)

CLASSES, FEATURES = 3, 2
WEIGHTS = CLASSES * FEATURES
SIZE = WEIGHTS + CLASSES
TENSORS = (slice(0, WEIGHTS), slice(WEIGHTS, SIZE))
MOST_CLIENTS = 30
PROXY = SimpleNamespace(
    x=np.random.default_rng(7).normal(size=(12, FEATURES)), y=np.arange(12) % CLASSES
)

# For each registered method: its settings, and those of the plain one.
VARIANTS = {
    "fedavg": [({}, plain.FedAvg, {})],
    "fedprox": [({}, plain.FedAvg, {})],
    # What they change of it comes of exploring: see test_exploration.
    "fedlex": [({}, plain.FedAvg, {})],
    "autoflip": [({}, plain.FedAvg, {})],
    "feddisco": [
        (options, plain.FedDisco, options)
        for options in (
            {},
            {"metric": "l1", "a": 0.05},
            {"metric": "l2", "scale_with_cohort": True},
            {"metric": "cosine", "a": 0.2, "b": 0.05},
        )
    ],
    "ida": [
        (options, plain.IDA, {**options, "tensors": TENSORS})
        for options in (
            {},
            {"distance": "l2", "base": "sample", "fedavg": True},
            {"base": "previous", "intrac": True},
            {"per_tensor": True, "fedavg": True},
        )
    ],
    "afl": [
        (options, plain.AFL, options)
        for options in ({}, {"step": 0.01}, {"update": "exponentiated"})
    ],
    "fedce": [
        (options, plain.FedCE, options)
        for options in (
            {},
            {"mode": "times"},
            {"consensus": "uniform"},
            {"floor": 1e-3, "clip": "after"},
        )
    ],
    # Each client a group; groups of examples have their twin in their own tests.
    "global-group-dro": [
        (options, plain.GroupDRO, options)
        for options in ({}, {"step": 2.0}, {"adjustment": 3.0})
    ],
    # Without bases, as it begins; with some it has its twin in its own tests.
    "agnostic-fair": [({}, plain.FedAvg, {})],
    "fedbuff": [({}, plain.FedBuff, {})],
    # While exploring, as here; what it measures then has its own twin in its own tests.
    "fair-incentive": [({}, plain.FedAvg, {})],
    # In one coalition, as it begins; several are in test_several_models.
    "fedcollab": [({}, plain.FedAvg, {})],
    "fedasync": [
        (options, plain.FedAsync, options) for options in ({}, {"mixing": 0.05})
    ],
    "fedau": [({}, plain.FedAU, {}), ({"cutoff": 3}, plain.FedAU, {"cutoff": 3})],
    "fednova": [({}, plain.FedNova, {})],
    "qfedavg": [
        (options, plain.QFedAvg, options)
        for options in ({}, {"q": 0.0}, {"q": 2.5, "lipschitz": 0.7})
    ],
    "fedlaw": [
        (options, plain.FedLAW, {"x": PROXY.x, "y": PROXY.y, **options})
        for options in (
            {},
            {"form": "quad"},
            {"server_epochs": 5, "optimizer": "sgd"},
            {"server_epochs": 0},
        )
    ],
}
CASES = [(name, case) for name, cases in VARIANTS.items() for case in cases]
# 200 rounds of each method, in federations of so many.
ROUNDS, ALL_ROUNDS = 10, 200


def test_every_registered_method_has_its_plain_one():
    assert set(VARIANTS) == set(STRATEGIES.entries)


def build(name, options, dtype):
    cls = strategy_class(name)
    model = nn.Linear(FEATURES, CLASSES)
    inputs = {"model": model.double() if dtype == np.float64 else model, "proxy": PROXY}
    needed = {key: inputs[key] for key in cls.needs}
    made = cls(**needed, min_train_nodes=1, min_available_nodes=1, **options)
    return as_it_begins(made)


def draw_clients(kit, rng, start, present, empty, dtype):
    """Some clients' answers: of every size of update and of data, some none at all."""
    sent, clients = [], {}
    equal = start + rng.normal(size=SIZE)
    scales = {"usual": 1.0, "tiny": 1e-3, "huge": 1e3, "none": 0.0}
    for client in present:
        kind = rng.choice([*scales, "equal"], p=[0.5, 0.15, 0.1, 0.05, 0.2])
        model = equal
        if kind != "equal":
            model = start + scales[kind] * rng.normal(size=SIZE)
        model = model.astype(dtype).astype(np.float64)
        n = int(rng.choice([1, 7, 100, 10_000])) * (client not in empty)
        counts = (rng.integers(0, 9, CLASSES) * rng.integers(0, 2, CLASSES)).tolist()
        counts[int(rng.integers(CLASSES))] += 1
        accuracy, error = rng.uniform(size=2).tolist()
        work = 0.5 + 9 * accuracy
        loss = error * (0.0, 1e-3, 0.7, 40.0)[int(accuracy * 1e6) % 4]
        clients[client] = kit.Client(
            model,
            n,
            {
                keys.ACCURACY_AFTER: accuracy,
                keys.MINUS_ERROR: error,
                keys.LOSS_BEFORE: loss,
                keys.NORMALISER: work,
            },
            {keys.LABEL_COUNTS: counts},
            silent=bool(rng.uniform() < 0.1),
        )
        if n and not clients[client].silent:
            measured = accuracy, error, counts, loss, work
            sent.append(plain.Sent(client, model, n, *measured))
    return clients, sent


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    ("name", "case"), CASES, ids=[f"{n}-{list(c[0].values())}" for n, c in CASES]
)
def test_random_rounds(kit, name, case, dtype):
    options, reference, its_options = case
    near = {"rtol": 1e-8, "atol": 1e-9}
    if dtype == np.float32:
        near = {"rtol": 2e-3, "atol": 2e-4}
    federations = ALL_ROUNDS // ROUNDS // len(VARIANTS[name])
    for seed in range(federations):
        rng = np.random.default_rng([seed, len(name)])
        start = rng.normal(size=SIZE).astype(dtype).astype(np.float64)
        arrays = {
            "weight": start[:WEIGHTS].reshape(CLASSES, FEATURES).astype(dtype),
            "bias": start[WEIGHTS:].astype(dtype),
        }
        more = {"precision": dtype} if name == "ida" else {}
        strategy, plain_one = (
            build(name, options, dtype),
            reference(**its_options, **more),
        )
        known = rng.permutation(MOST_CLIENTS)[: int(rng.integers(1, MOST_CLIENTS + 1))]
        empty = {client for client in known.tolist() if rng.uniform() < 0.2}
        run = kit.Federation(strategy, {}, kit.record(arrays))
        known_empty = set()
        for _ in range(ROUNDS):
            some = rng.permutation(known)[: int(rng.integers(1, len(known) + 1))]
            start = run.vector  # Ours, so that rounding does not add up.
            clients, sent = draw_clients(
                kit, rng, start, sorted(some.tolist()), empty, dtype
            )
            run.clients = run.grid.clients = clients
            record = run.round()
            known_empty |= {c.client for c in record.clients if c.status == "dropped"}
            if len(sent) < plain_one.least:
                assert record.status == "failed"
                np.testing.assert_array_equal(run.vector, start)
                continue
            assert record.status == "ok", record.reason
            plain_one.number = run.number
            plain_one.population = len(set(clients) - known_empty)
            weights, model = plain_one.step(start, sent)
            good = [c for c in record.clients if c.status == "ok"]
            assert [c.client for c in good] == [one.client for one in sent]
            np.testing.assert_allclose([c.weight for c in good], weights, **near)
            scale = max(np.abs(one.model).max() for one in sent)
            np.testing.assert_allclose(
                run.vector / scale, model / scale, **near, err_msg=str(seed)
            )
