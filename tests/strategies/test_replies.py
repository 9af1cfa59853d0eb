"""Thousands of replies as a broken or lying client sends them, some to each method."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord
from torch import nn

from fedweight.messages import _flower, keys
from fedweight.strategies import STRATEGIES, strategy_class
from fedweight.strategies.checks import LARGEST_VALUE
from fedweight.studies.columns import CLIENT_COLUMNS, ROUND_COLUMNS
from fedweight.studies.folder import Table
from fedweight.studies.records import client_row, round_row

METHODS = sorted(STRATEGIES.entries)
CLASSES, FEATURES, HONEST = 3, 2, 3
REPLIES, PER_ROUND, ROUNDS = 500, 5, 25

NUMBERS = [
    *(0, 1, -1, 7, 10**6, 2**53 + 1, 2**63 - 1, -(2**63), 10**18, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -2.5, 1e-320, 1e18, 1e308, -1e308, 1e300),
    *(math.nan, math.inf, -math.inf),
]
NAMES = [
    *(keys.NUM_EXAMPLES, keys.TRAIN_LOSS, keys.TRAIN_ACCURACY, keys.NUM_STEPS),
    *(keys.LOSS, keys.ACCURACY, keys.LOSS_BEFORE, keys.ACCURACY_AFTER),
    *(keys.MINUS_ERROR, keys.LABEL_COUNTS, "weight", "round", "client", "status"),
    *("examples", "effective-clients", "evaluate-loss", "test-accuracy", "own-x"),
    *("=cmd|'/c calc'!A1", "\x1b[31m", "a,b", 'quo"te', "", "é" * 300, "\u202e"),
]
TEXTS = [
    "",
    "no power",
    "=1+1",
    "\x1b[2J",
    "line\nTraceback\nmore",
    "x" * 100_000,
    "\0",
]


def metric(rng):
    number = NUMBERS[rng.integers(len(NUMBERS))]
    if rng.uniform() < 0.15:
        return [number] * int(rng.integers(0, 4))
    return number


def some_metrics(rng, honest):
    """Some names more, fewer, or with other values."""
    metrics = dict(honest)
    for _ in range(int(rng.integers(0, 4))):
        metrics[NAMES[rng.integers(len(NAMES))]] = metric(rng)
    if rng.uniform() < 0.1:
        metrics.pop(keys.NUM_EXAMPLES, None)
    if rng.uniform() < 0.005:
        metrics |= {f"name-{n}": float(n) for n in range(5_000)}
    return MetricRecord(metrics)


def crafted(rng):
    """Bytes that begin like an array's."""
    headers = [
        b"(" * int(rng.integers(1, 9_000)),
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (%d,), }"
        % NUMBERS[rng.integers(6)],
        b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
        b"{'descr': '<f8', 'fortran_order': True, 'shape': (3, 2), }",
        rng.bytes(int(rng.integers(0, 200))),
    ]
    header = headers[rng.integers(len(headers))]
    size = len(header) if rng.uniform() < 0.9 else int(rng.integers(0, 60_000))
    version = bytes(rng.choice([1, 1, 1, 2, 3, 9], 2).astype(np.uint8))
    start = b"\x93NUMPY" + (b"\x01\x00" if rng.uniform() < 0.8 else version)
    return start + size.to_bytes(2, "little") + header + bytes(int(rng.integers(0, 90)))


def some_arrays(rng, honest):
    arrays = dict(honest)
    name = list(arrays)[rng.integers(len(arrays))]
    shape = arrays[name].numpy().shape
    kind = rng.integers(10)
    scale = 10.0 ** rng.uniform(-300, 300)
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays["more"] = Array(np.zeros(2))
    elif kind == 2:
        arrays[name] = Array(np.zeros(tuple(rng.integers(0, 4, rng.integers(1, 4)))))
    elif kind == 3:
        dtypes = (np.int8, np.uint64, np.float16, np.complex128, "U3", "S5", bool)
        arrays[name] = Array(np.ones(shape, dtypes[rng.integers(len(dtypes))]))
    elif kind == 4:
        odd = rng.choice([np.nan, np.inf, -np.inf])
        arrays[name] = Array(np.full(shape, odd))
    elif kind in (5, 6):
        arrays[name] = Array(scale * rng.normal(size=shape))
    elif kind == 7:
        arrays[name] = Array("float64", shape, "numpy.ndarray", crafted(rng))
    elif kind == 8:
        arrays[name] = Array("float64", (3, 2), "torch.tensor", rng.bytes(40))
    else:
        arrays = {f"{n}x": array for n, array in arrays.items()}
    return ArrayRecord(arrays)


def some_profile(rng):
    counts = [
        [5, 0, 2],
        [5, 2],
        [],
        [0, 0, 0],
        [1.0, math.nan, 2.0],
        [10**400, 1, 1],
        [-1, 2, 3],
        ["a", "b", "c"],
        [True, False, True],
        list(range(1000)),
        7,
        "many",
        b"\0",
    ]
    return ConfigRecord({keys.LABEL_COUNTS: counts[rng.integers(len(counts))]})


def spoil(rng, reply, message):
    """Return a reply with something in it that is not as a client of ours sends it."""
    content = reply.content
    kind = rng.integers(10)
    if kind <= 3:
        content["metrics"] = some_metrics(rng, content["metrics"])
    elif kind <= 6 and "arrays" in content:
        content["arrays"] = some_arrays(rng, content["arrays"])
    elif kind == 7:
        content["profile"] = some_profile(rng)
    elif kind == 8:
        if rng.uniform() < 0.5:
            content["second"] = MetricRecord({"num-examples": 1})
        else:
            for name in list(content):
                if rng.uniform() < 0.5:
                    del content[name]
    else:
        code = int(rng.choice([0, 1, 2, 3, 4, 5, 99]))
        text = TEXTS[rng.integers(len(TEXTS))]
        return Message(Error(code=code, reason=text), reply_to=message)
    return reply


def build(name):
    cls = strategy_class(name)
    rng = np.random.default_rng(0)
    inputs = {
        "model": nn.Linear(FEATURES, CLASSES).double(),
        "proxy": SimpleNamespace(
            x=rng.normal(size=(6, FEATURES)), y=np.arange(6) % CLASSES
        ),
    }
    needed = {key: inputs[key] for key in cls.needs}
    quick = {
        "fedlaw": {"server_epochs": 2},
        "ida": {"intrac": True},
        # So that all are drawn once exploring has ended, too.
        "fair-incentive": {"fraction_train": 1.0},
    }
    return cls(
        **needed, **quick.get(name, {}), min_train_nodes=1, min_available_nodes=1
    )


def honest(kit, rng, k):
    asked = (keys.LOSS_BEFORE, keys.ACCURACY_AFTER, keys.MINUS_ERROR)
    metrics = {name: float(rng.uniform()) for name in asked}
    metrics[keys.NORMALISER] = float(rng.integers(1, 9))
    counts = {keys.LABEL_COUNTS: rng.integers(1, 20, CLASSES).tolist()}
    size = CLASSES * (FEATURES + 1)
    return kit.Client(rng.normal(size=size), float(10 + k), metrics, counts)


def check(kit, name, record, run, before):
    """Everything is excluded with a reason, or a number that can be worked with."""
    assert record.status in ("ok", "failed")
    assert record.status == "ok" or record.reason
    for entry in record.clients:
        assert entry.status == "ok" or entry.reason
        if entry.status == "ok" and record.status == "ok":
            assert math.isfinite(entry.weight)
            assert entry.weight >= 0
        assert len(entry.reason) <= 20_000
    vector = run.vector
    assert np.isfinite(vector).all()
    assert np.abs(vector).max() <= LARGEST_VALUE
    if record.status == "failed":
        np.testing.assert_array_equal(vector, before)
    else:
        weights = [c.weight for c in record.clients if c.status == "ok"]
        kit.check_sum(name, weights)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", METHODS)
def test_no_reply_ends_a_run(kit, name, tmp_path):
    """Rounds of one bad client to only bad ones; strategies keep what they learn."""
    rng = np.random.default_rng([*name.encode()])  # Others for each method.
    rounds = Table(tmp_path / "rounds.csv", ROUND_COLUMNS)
    clients = Table(tmp_path / "clients.csv", CLIENT_COLUMNS)
    excluded = 0
    for number in range(REPLIES // PER_ROUND):
        if number % ROUNDS == 0:
            start = kit.record(
                {
                    "weight": rng.normal(size=(CLASSES, FEATURES)),
                    "bias": rng.normal(size=CLASSES),
                }
            )
            some = {k: honest(kit, rng, k) for k in range(HONEST + PER_ROUND)}
            run = kit.Federation(kit.as_it_begins(build(name)), some, start)
        bad = set(rng.permutation(len(some))[:PER_ROUND].tolist())

        def arrange(replies, bad=bad):
            found = []
            for reply in replies:
                node = reply.metadata.src_node_id
                if node - 100 in bad:
                    asked = Message(reply.content, node, "train")
                    _flower.set_message_id(asked, f"message-{node}")
                    reply = spoil(rng, reply, asked)
                    found += [reply] * int(rng.uniform() < 0.05)
                found.append(reply)
            return found

        run.grid.arrange = arrange
        before = run.vector
        record = run.round()
        check(kit, name, record, run, before)
        # Where most clients lie about the classes, FedDisco cannot know who does.
        if name != "feddisco":
            others = [c.status for c in record.clients if c.client not in bad]
            assert set(others) == {"ok"}
        excluded += sum(c.status != "ok" for c in record.clients)
        evaluated = run.strategy.configure_evaluate(
            run.number, run.arrays, run.config, run.grid
        )
        run.strategy.aggregate_evaluate(
            run.number, run.grid.send_and_receive(evaluated)
        )
        for client in bad:  # It may know better the next time.
            run.strategy._now.without_examples.discard(client)
        rounds.append([round_row(record, {})])
        clients.append(client_row(number, entry) for entry in record.clients)
    assert excluded > REPLIES / 10
    rounds.write()
    clients.write()
    assert len(clients.columns) < 200
