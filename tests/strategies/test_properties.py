"""What every method promises, whatever its rule is.

A method that is registered is tested. Where its law differs from "weights of 0 or
more that sum to one, applied to the clients' models", a line below says so.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedweight.clients import TrainingApp
from fedweight.clients import objective as make_objective
from fedweight.clients.objectives import OBJECTIVES
from fedweight.core.errors import ConfigurationError
from fedweight.core.module import FlatModule
from fedweight.core.rows import Rows
from fedweight.core.state import pack, unpack
from fedweight.core.updates import StackedUpdates
from fedweight.data import ClientData, Examples
from fedweight.messages import keys
from fedweight.messages.arrays import FlatRecord
from fedweight.simulations import LocalGrid
from fedweight.strategies import (
    STRATEGIES,
    Selection,
    WeightingStrategy,
    strategy_class,
)
from fedweight.strategies.checks import LARGEST_VALUE, asked_names
from fedweight.strategies.server_optimizers import ServerAdam, ServerMomentum

METHODS = sorted(STRATEGIES.entries)

# Settings under which a method's law is the common one.
CONVEX = {
    # Its shrinking factor makes another model of the same weights: see test_fedlaw.
    "fedlaw": {"server_epochs": 0},
    # Its weights are the step's length as well.
    "qfedavg": {"q": 0.0},
    "fedasync": {"mixing": 1.0},
}

# What only takes time: the promises hold after any number of steps.
QUICK = {"fedlaw": {"server_epochs": 3}}

# More settings that the bits and the bad replies are tried with.
VARIANTS = [(name, {}) for name in METHODS] + [
    ("feddisco", {"metric": "l2", "scale_with_cohort": True}),
    ("fedce", {"mode": "times", "consensus": "uniform"}),
    ("fedlaw", {"form": "quad"}),
    ("ida", {"fedavg": True, "intrac": True}),
    ("ida", {"per_tensor": True, "distance": "l2", "base": "sample"}),
]
IDS = [f"{name}-{'-'.join(map(str, o)) or 'default'}" for name, o in VARIANTS]

CLASSES, FEATURES = 3, 2
SIZE = CLASSES * FEATURES + CLASSES

every_method = pytest.mark.parametrize("name", METHODS)
every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
values = st.floats(-10, 10, width=32)


def build(name, **options):
    """Make a strategy of a registered name, with the inputs that it needs."""
    cls = strategy_class(name)
    stream = np.random.default_rng(0)
    inputs = {
        "model": nn.Linear(FEATURES, CLASSES).double(),
        "proxy": SimpleNamespace(
            x=stream.normal(size=(12, FEATURES)), y=np.arange(12) % CLASSES
        ),
    }
    needed = {key: inputs[key] for key in cls.needs}
    usual = {"min_train_nodes": 1, "min_available_nodes": 1, **QUICK.get(name, {})}
    made = cls(**needed, **{**usual, **options})
    if made.overrides(
        "prepare"
    ):  # With nothing that clients were asked before: as it begins.
        made.restore({**made.state, "prepared": True})
    return made


def client(kit, model, n=10.0, seed=0, **changes):
    """A client that has an answer to whatever a method may ask."""
    stream = np.random.default_rng(seed)
    metrics = {
        name: float(stream.uniform())
        for name in (keys.LOSS_BEFORE, keys.ACCURACY_AFTER, keys.MINUS_ERROR)
    }
    metrics[keys.NORMALISER] = 3.0  # All do the same work, for a mean of FedNova's.
    profile = {keys.LABEL_COUNTS: stream.integers(0, 20, CLASSES).tolist()}
    return kit.Client(model, n, metrics, profile, **changes)


def start(kit, dtype=np.float64):
    stream = np.random.default_rng(9)
    return kit.record(
        {
            "weight": stream.normal(size=(CLASSES, FEATURES)).astype(dtype),
            "bias": stream.normal(size=CLASSES).astype(dtype),
        }
    )


def federation(kit, strategy, models, sizes=None, **options):
    sizes = sizes or [10.0] * len(models)
    clients = {
        k: client(kit, model, n, seed=k)
        for k, (model, n) in enumerate(zip(models, sizes, strict=True))
    }
    return kit.Federation(strategy, clients, start(kit), **options)


def random_models(k, seed=0):
    return np.random.default_rng(seed).normal(size=(k, SIZE))


def fewest(name):
    return build(name).min_replies


@every_method
def test_describes_itself(name, caplog):
    strategy = build(name)
    assert isinstance(strategy, WeightingStrategy)
    assert STRATEGIES.descriptions()[name].endswith(".")
    assert type(strategy).__module__.endswith(name.replace("-", "_"))
    with caplog.at_level(logging.INFO, logger="fedweight"):
        strategy.summary()
    assert type(strategy).__name__ in caplog.text
    with pytest.raises(TypeError, match="has no option 'colour'"):
        build(name, colour="red")


@every_method
@given(data=st.data())
@settings(max_examples=30)
def test_identical_clients_give_what_each_has(kit, name, data):
    k = data.draw(st.integers(fewest(name), 5))
    model = np.array(data.draw(st.lists(values, min_size=SIZE, max_size=SIZE)))
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=k, max_size=k))
    run = federation(kit, build(name, **CONVEX.get(name, {})), [model] * k, sizes)
    assert run.round().status == "ok"
    np.testing.assert_allclose(run.vector, model, rtol=1e-12, atol=1e-12)


@every_variant
@given(data=st.data())
@settings(max_examples=30)
def test_weights_are_a_share_of_one(kit, name, options, data):
    k = data.draw(st.integers(fewest(name), 6))
    row = st.lists(values, min_size=SIZE, max_size=SIZE)
    models = data.draw(st.lists(row, min_size=k, max_size=k))
    sizes = data.draw(st.lists(st.integers(0, 50), min_size=k, max_size=k))
    run = federation(kit, build(name, **options), np.array(models), sizes)
    for _ in range(2):
        record = run.round()
        counted = [c for c, n in zip(record.clients, sizes, strict=True) if n]
        assert sum(c.status == "dropped" for c in record.clients) == sizes.count(0)
        if len(counted) < fewest(name):
            assert record.status == "failed"
            continue
        assert record.status == "ok"
        weights = np.array([c.weight for c in counted])
        assert np.isfinite(weights).all()
        assert (weights >= 0).all()
        kit.check_sum(name, weights)
        assert 1 - 1e-9 <= record.metrics["effective-clients"] <= k + 1e-9


@every_method
@given(data=st.data())
@settings(max_examples=30)
def test_the_model_is_the_weighted_sum_of_the_models(kit, name, data):
    k = data.draw(st.integers(fewest(name), 6))
    row = st.lists(values, min_size=SIZE, max_size=SIZE)
    models = np.array(data.draw(st.lists(row, min_size=k, max_size=k)))
    run = federation(kit, build(name, **CONVEX.get(name, {})), models)
    weights = [c.weight for c in run.round().clients]
    np.testing.assert_allclose(run.vector, weights @ models, rtol=1e-9, atol=1e-9)


@every_variant
@given(order=st.permutations(range(6)))
@settings(max_examples=15)
def test_who_answers_first_does_not_matter(kit, name, options, order):
    def play(arrange):
        run = federation(kit, build(name, **options), random_models(6), arrange=arrange)
        for t in range(3):
            for k, model in enumerate(random_models(6, seed=t)):
                run.clients[k].model = model
            record = run.round()
        return run.vector, [(c.client, c.weight) for c in record.clients]

    straight, weights = play(lambda replies: replies)
    mixed, mixed_weights = play(lambda replies: [replies[i] for i in order])
    np.testing.assert_array_equal(mixed, straight)
    assert mixed_weights == weights


@every_variant
def test_threads_do_not_change_a_bit(kit, name, options):
    def play(threads):
        strategy = build(name, **options, threads=threads)
        run = federation(kit, strategy, random_models(40))
        run.round()
        run.round()
        return run.vector

    np.testing.assert_array_equal(play(1), play(4))


@every_variant
def test_one_client_alone(kit, name, options):
    run = federation(kit, build(name, **options), random_models(1))
    record = run.round()
    if fewest(name) > 1:
        assert record.status == "failed"
    else:
        kit.check_sum(name, [record.clients[0].weight])


@every_variant
def test_no_client_has_data(kit, name, options, caplog):
    run = federation(kit, build(name, **options), random_models(4), [0] * 4)
    before = run.vector
    for _ in range(2):
        record = run.round()
        assert record.status == "failed"
        assert record.reason == "none of the 4 clients drawn has examples"
        assert record.count("dropped") == 4
        np.testing.assert_array_equal(run.vector, before)
    assert "none of the 4 clients drawn has examples" in caplog.text


@every_variant
def test_clients_without_examples_never_count(kit, name, options):
    """The run is that of the others alone, to the bit, in every round."""
    run = federation(kit, build(name, **options), random_models(6), [0, 5, 0, 3, 2, 0])
    others = federation(kit, build(name, **options), random_models(6), [9] * 6)
    for k, c in list(run.clients.items()):
        if c.num_examples:
            others.clients[k].num_examples = c.num_examples
        else:
            c.profile[keys.LABEL_COUNTS] = [0] * CLASSES
            c.metrics = dict.fromkeys(c.metrics, float("nan"))
            del others.clients[k]
    for number in range(3):
        for k, model in enumerate(random_models(6, seed=number)):
            for some in (run.clients, others.clients):
                if k in some:
                    some[k].model = model
        record, alone = run.round(), others.round()
        assert [c.client for c in record.clients] == list(range(6))
        for c in record.clients:
            if c.client in (0, 2, 5):
                assert (c.status, c.reason) == ("dropped", "it has no examples")
                assert np.isnan(c.weight)
                # The model, and with some strategies one number, once.
                down = {0} if number else {8 * SIZE, 8 * SIZE + 8}
                assert c.bytes_down in down
        weights = {c.client: c.weight for c in record.clients if c.status == "ok"}
        assert weights == {c.client: c.weight for c in alone.clients}
        np.testing.assert_array_equal(run.vector, others.vector)
        for name in ("method", "server-optimizers"):
            assert run.strategy.state[name] == others.strategy.state[name]
    for k in (0, 2, 5):
        assert len(run.clients[k].told) == 1  # Its first reply tells: not asked again.


@every_method
def test_where_the_sizes_are_known_nobody_without_examples_is_asked(kit, name):
    sizes = [0, 5, 4, 3]
    run = federation(kit, build(name), random_models(4), sizes)
    run.grid.sizes_of = lambda clients: [sizes[c] for c in clients]
    record = run.round()
    assert not run.clients[0].told
    assert record.clients[0].reason == "it has no examples"
    assert record.clients[0].bytes_down == 0
    assert record.count("ok") == 3


@every_method
def test_a_client_that_made_no_step_does_not_count(kit, name):
    """As where the model cannot train on what it has."""
    run = federation(kit, build(name), random_models(4))
    run.clients[1].metrics[keys.NUM_STEPS] = 0
    clean = federation(kit, build(name), random_models(4))
    clean.clients[1].silent = True
    record = run.round()
    clean.round()
    reason = "the model could not train on its 10 examples"
    assert (record.clients[1].status, record.clients[1].reason) == ("dropped", reason)
    np.testing.assert_array_equal(run.vector, clean.vector)
    run.round()
    assert len(run.clients[1].told) == 2  # It may have more the next time.


@every_method
def test_clients_that_learnt_nothing_change_nothing(kit, name):
    run = federation(kit, build(name, **CONVEX.get(name, {})), [None] * 4)
    before = run.vector
    for _ in range(2):
        assert run.round().status == "ok"
    np.testing.assert_allclose(run.vector, before, rtol=1e-15)


@every_variant
def test_one_client_learnt_nothing(kit, name, options):
    models = [*random_models(4), None]
    run = federation(kit, build(name, **options), models)
    for _ in range(2):
        record = run.round()
        assert record.status == "ok"
        kit.check_sum(name, [c.weight for c in record.clients])


def named(vector, dtype=np.float64):
    weight, bias = np.split(np.asarray(vector, dtype), [CLASSES * FEATURES])
    return {"weight": weight.reshape(CLASSES, FEATURES), "bias": bias}


def spoil(kit, how):
    """A client whose reply is unfit, and what the record says of it."""
    good = random_models(1, seed=8)[0]
    bad = good.copy()
    if how == "nan":
        bad[3] = np.nan
        return client(kit, bad), "rejected", "NaN or infinite"
    if how == "infinity":
        bad[-1] = -np.inf
        return client(kit, bad), "rejected", "NaN or infinite"
    if how == "shape":
        arrays = {**named(good), "bias": np.zeros(CLASSES + 1)}
        return client(kit, arrays), "rejected", "'bias' has shape [4]"
    if how == "missing array":
        return client(kit, {"bias": np.zeros(CLASSES)}), "rejected", "missing 'weight'"
    if how == "another array":
        arrays = {**named(good), "extra": np.zeros(1)}
        return client(kit, arrays), "rejected", "unexpected 'extra'"
    if how == "kind":
        arrays = {**named(good), "bias": np.array(["a", "b", "c"])}
        return client(kit, arrays), "rejected", "'bias' has dtype <U1"
    if how == "complex":
        arrays = {**named(good), "bias": np.zeros(CLASSES, np.complex64)}
        return client(kit, arrays), "rejected", "'bias' has dtype complex64"
    if how == "negative size":
        return client(kit, good, -1.0), "rejected", "'num-examples' must be"
    if how == "size is no number":
        return client(kit, good, float("nan")), "rejected", "'num-examples' must be"
    if how == "error":
        return client(kit, good, error="out of memory"), "failed", "out of memory"
    return client(kit, good, silent=True), "missing", "no reply in time"


SPOILT = [
    "nan",
    "infinity",
    "shape",
    "missing array",
    "another array",
    "kind",
    "complex",
    "negative size",
    "size is no number",
    "error",
    "silent",
]


@every_method
@pytest.mark.parametrize("how", SPOILT)
def test_a_bad_reply_is_recorded_and_does_no_harm(kit, name, how, caplog):
    odd, status, reason = spoil(kit, how)
    run = federation(kit, build(name), random_models(5))
    run.clients[2] = odd
    clean = federation(kit, build(name), random_models(5))
    clean.clients[2].silent = True
    with caplog.at_level(logging.WARNING, logger="fedweight"):
        record, other = run.round(), clean.round()
    assert record.status == "ok"
    assert record.clients[2].status == status
    assert reason in record.clients[2].reason
    assert "client 2" in caplog.text
    np.testing.assert_array_equal(run.vector, clean.vector)
    weights = {c.client: c.weight for c in record.clients if c.client != 2}
    assert weights == {c.client: c.weight for c in other.clients if c.client != 2}
    assert np.isnan(record.clients[2].weight)


@every_method
def test_a_client_counts_once(kit, name):
    run = federation(kit, build(name), random_models(4))
    run.clients[1].twice = True
    once = federation(kit, build(name), random_models(4))
    record = run.round()
    once.round()
    twice = [(c.status, c.reason) for c in record.clients if c.client == 1]
    assert twice == [("ok", ""), ("rejected", "it replied twice")]
    np.testing.assert_array_equal(run.vector, once.vector)


@every_method
def test_a_scalar_that_was_asked_for_must_be_one(kit, name):
    for wrong in (float("nan"), float("inf"), [0.5, 0.5]):
        run = federation(kit, build(name), random_models(4))
        selection = Selection(1, (1,), run.strategy.begin())
        [asked] = asked_names(run.strategy, selection)
        for key in run.clients[1].metrics:
            run.clients[1].metrics[key] = wrong
        record = run.round()
        scalar = any(key in run.clients[1].metrics for key in asked)
        assert record.clients[1].status == ("rejected" if scalar else "ok")


@every_method
def test_too_few_replies_keep_the_model_and_the_state(kit, name, caplog):
    run = federation(kit, build(name, min_replies=3), random_models(4))
    run.round()
    before, state = run.vector, pack(run.strategy.state)
    run.clients[0].silent = True
    run.clients[3].error = "no power"
    with caplog.at_level(logging.ERROR, logger="fedweight"):
        record = run.round()
    assert record.status == "failed"
    assert "2 good replies of 4 clients asked, min_replies is 3" in record.reason
    assert "round 2 failed, the global model is kept" in caplog.text
    assert "no power" in caplog.text
    np.testing.assert_array_equal(run.vector, before)
    assert pack(run.strategy.state) == state
    run.clients[0].silent, run.clients[3].error = False, ""
    assert run.round().status == "ok"


@every_method
def test_nobody_answers(kit, name):
    run = federation(kit, build(name), random_models(3))
    for c in run.clients.values():
        c.silent = True
    before = run.vector
    record = run.round()
    assert record.status == "failed"
    assert record.count("missing") == 3
    np.testing.assert_array_equal(run.vector, before)


@every_variant
def test_goes_on_from_its_state(kit, name, options):
    """The state is plain values: it may go through a file."""

    def play(run, rounds):
        for t in rounds:
            for k, model in enumerate(random_models(5, seed=t)):
                run.clients[k].model = model
            run.round()

    whole = federation(kit, build(name, **options), [None] * 5)
    play(whole, range(5))
    first = federation(kit, build(name, **options), [None] * 5)
    play(first, range(2))
    second = federation(kit, build(name, **options), [None] * 5)
    state = unpack(*pack(first.strategy.state))
    second.strategy.restore(state)
    second.arrays, second.number = first.arrays, first.number
    play(second, range(2, 5))
    np.testing.assert_array_equal(second.vector, whole.vector)
    assert second.strategy.state == whole.strategy.state


@every_method
def test_who_takes_part_depends_on_the_seed_alone(kit, name):
    def chosen(seed, clients):
        strategy = build(name, fraction_train=0.3, seed=seed)
        if strategy.overrides(
            "draw"
        ):  # All explore; then they are drawn, as here alike.
            state = {**strategy.begin(), "exploring": False}
            strategy.restore({**strategy.state, "method": state})
        run = federation(kit, strategy, random_models(20))
        run.clients = {k: run.clients[k] for k in clients}
        run.grid.clients = run.clients
        return [{c.client for c in run.round().clients} for _ in range(3)]

    forwards = chosen(1, range(20))
    assert forwards == chosen(1, reversed(range(20)))
    assert all(len(cohort) == 6 for cohort in forwards)
    assert forwards != chosen(2, range(20))
    assert forwards[0] != forwards[1]


def wrapped(strategy, kind):
    if kind == "server fixed":
        return DifferentialPrivacyServerSideFixedClipping(strategy, 0.1, 1.0, 4)
    if kind == "server adaptive":
        return DifferentialPrivacyServerSideAdaptiveClipping(strategy, 0.1, 4)
    if kind == "client fixed":
        return DifferentialPrivacyClientSideFixedClipping(strategy, 0.1, 1.0, 4)
    return DifferentialPrivacyClientSideAdaptiveClipping(strategy, 0.1, 4)


@every_method
@pytest.mark.parametrize("kind", ["server fixed", "server adaptive", "client fixed"])
def test_inside_flowers_differential_privacy(kit, name, kind):
    strategy = build(name)
    run = federation(kit, wrapped(strategy, kind), random_models(4) * 100)
    for _ in range(3):
        before = run.vector
        record = run.round()
        assert record.status == "ok"
        assert len(record.clients) == 4
        assert np.isfinite(run.vector).all()
        if kind == "server fixed" and name not in CONVEX:
            # Clipped to 1, and noise of 0.1 * 1 / 4 on nine values.
            assert np.linalg.norm(run.vector - before) < 1.5
    assert isinstance(run.arrays, ArrayRecord)


@every_method
def test_a_wrapper_that_gives_up_leaves_a_failed_round(kit, name):
    run = federation(kit, wrapped(build(name), "server fixed"), random_models(4))
    run.clients[0].error = "no power"
    before = run.vector
    assert run.round().status == "failed"
    np.testing.assert_array_equal(run.vector, before)
    run.clients[0].error = ""
    assert run.round().status == "ok"


@every_method
def test_float32_models_and_both_accumulators(kit, name):
    if "model" in strategy_class(name).needs:
        model = nn.Linear(FEATURES, CLASSES)
    results = []
    for accumulate in ("float64", "float32"):
        strategy = build(name, accumulate=accumulate)
        if "model" in strategy.needs:
            proxy = SimpleNamespace(x=np.eye(2, dtype=np.float32), y=np.arange(2))
            strategy = type(strategy)(model=model, proxy=proxy, accumulate=accumulate)
        run = federation(kit, strategy, random_models(5).astype(np.float32))
        run.arrays = start(kit, np.float32)
        for _ in range(2):
            assert run.round().status == "ok"
        assert {a.dtype for a in run.arrays.values()} == {"float32"}
        results.append(run.vector)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-3, atol=1e-5)


def test_the_methods_are_told_apart():
    assert len({strategy_class(name) for name in METHODS}) == len(METHODS)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        ([0.5], r"one weight for each of the 2 clients, shape \[2\].* got shape \[1\]"),
        (np.ones((2, 7)), r"got shape \[2, 7\]"),
        ("half each", r"must return numbers, got str"),
    ],
)
def test_weights_that_are_not_one_each_are_named(kit, gives, said):
    class Odd(WeightingStrategy):
        def weights(self, round):
            return gives

    odd = Odd(min_train_nodes=1, min_available_nodes=1)
    run = federation(kit, odd, random_models(2))
    with pytest.raises(ConfigurationError, match=f"Odd.weights.*{said}"):
        run.round()


def test_weights_may_be_a_list(kit):
    class Even(WeightingStrategy):
        def weights(self, round):
            return [0.25, 0.75]

    run = federation(
        kit, Even(min_train_nodes=1, min_available_nodes=1), random_models(2)
    )
    assert [c.weight for c in run.round().clients] == [0.25, 0.75]


def with_statistics(kit, name, variances, sizes):
    """A federation of models with running statistics, of which each client has own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        model = nn.Sequential(*layers).double()
    cls = strategy_class(name)
    stream = np.random.default_rng(0)
    x = stream.normal(size=(12, FEATURES))
    inputs = {"model": model, "proxy": SimpleNamespace(x=x, y=np.arange(12) % 3)}
    needed = {key: inputs[key] for key in cls.needs}
    strategy = kit.as_it_begins(cls(**needed, **QUICK.get(name, {})))
    state = {n: t.numpy() for n, t in model.state_dict().items()}
    clients = {}
    for k, n in enumerate(sizes):
        arrays = {
            name: stream.normal(size=a.shape) if "run" not in name else a
            for name, a in state.items()
        }
        arrays["1.running_var"] = np.full(4, variances[k])
        arrays["1.running_mean"] = np.full(4, -variances[k])
        arrays["1.num_batches_tracked"] = np.array(10 * k)
        clients[k] = client(kit, arrays, n, seed=k)
    return kit.Federation(strategy, clients, kit.record(state))


@every_method
def test_statistics_are_averaged_by_size_and_no_weight_sees_them(kit, name):
    sizes = [10.0, 20.0, 30.0, 40.0]
    run = with_statistics(kit, name, [1.0, 2.0, 3.0, 4.0], sizes)
    weights = [c.weight for c in run.round().clients]
    arrays = {n: a.numpy() for n, a in run.arrays.items()}
    np.testing.assert_allclose(arrays["1.running_var"], 3.0, rtol=1e-12)
    np.testing.assert_allclose(arrays["1.running_mean"], -3.0, rtol=1e-12)
    assert arrays["1.num_batches_tracked"] == 10  # The lower of two in the middle.
    odd = with_statistics(kit, name, [1e3, 0.0, 7e4, 1e6], sizes)
    assert [c.weight for c in odd.round().clients] == weights


OF_CLASSES = [
    name
    for name in sorted(OBJECTIVES.entries)
    if "classification" in (OBJECTIVES.resolve(name).tasks or ["classification"])
]


@every_method
@pytest.mark.parametrize(
    ("objective", "optimizer"),
    [
        *((objective, None) for objective in OF_CLASSES),
        ("proximal", ServerMomentum),
        ("aldr", ServerAdam),
    ],
)
def test_any_combines_with_any_objective_and_server_optimizer(
    name, objective, optimizer
):
    def data(context):
        stream = np.random.default_rng(context.node_config["partition-id"])
        part = Examples(
            stream.normal(size=(8, FEATURES)),
            stream.integers(0, 3, 8),
            {"": stream.integers(0, 2, 8)},
        )
        return ClientData(part, part)

    def model():
        return nn.Linear(FEATURES, CLASSES).double()

    app = TrainingApp(
        model,
        data,
        num_classes=CLASSES,
        num_groups={"": 2},
        objective=make_objective(objective),
    )
    strategy = build(
        name, server_optimizer=optimizer and optimizer(), class_totals=True
    )
    if strategy.overrides("prepare"):  # The kit's has asked already, for nothing.
        strategy.restore({**strategy.state, "class-totals": [8] * CLASSES})
    start = FlatRecord(FlatModule(model()).save())
    result = strategy.start(LocalGrid(app, 3), start, num_rounds=2)
    assert [record.status for record in strategy.history] == ["ok", "ok"]
    for array in result.arrays.values():
        assert np.isfinite(array.numpy()).all()


class Counted(StackedUpdates):
    """Updates that count how often all rows are read, in one place or in two."""

    def __init__(self, updates, places):
        super().__init__(updates.models, updates.origin, updates.offsets)
        self.passes = 0.0
        self.rows_apart = None
        if places > 1:
            order = [*range(self.num_clients)]
            self.members = [torch.tensor(order[k::places]) for k in range(places)]
            self.rows_apart = [
                Rows([self.models[k] for k in rows]) for rows in self.members
            ]

    def _ask(self, method, arguments):
        if method != "changed":
            blocks = next(a for a in arguments[0] if isinstance(a, list))
            self.passes += (blocks[-1].stop - blocks[0].start) / self.num_parameters
        if self.rows_apart is None:
            yield from super()._ask(method, arguments)
            return
        for rows, own in zip(self.rows_apart, arguments, strict=True):
            yield getattr(rows, method)(*own)


@pytest.mark.parametrize(
    ("name", "options", "apart"),
    [
        *(("fedavg", {}, 1), ("fedprox", {}, 1), ("feddisco", {}, 1)),
        *(("afl", {}, 1), ("fedau", {}, 1), ("fednova", {}, 1), ("qfedavg", {}, 2)),
        *(("fedbuff", {}, 1), ("fedasync", {}, 1), ("fedcollab", {}, 1)),
        *(("fedce", {}, 3), ("ida", {}, 3), ("ida", {"base": "previous"}, 2)),
        ("ida", {"per_tensor": True, "fedavg": True, "intrac": True}, 3),
    ],
)
def test_how_often_the_updates_are_read(kit, name, options, apart):
    """In one place as the table of strategies says; of FedLAW see test_fedlaw."""
    page = (Path(__file__).parents[2] / "strategies" / "README.md").read_text("utf-8")
    [here] = re.findall(rf"^\| \[`{name}`\].*\| (\d)[^|]*\|$", page, re.MULTILINE)
    asked = (keys.MINUS_ERROR, keys.ACCURACY_AFTER, keys.LOSS_BEFORE, keys.NORMALISER)
    metrics = {name: [0.5] * 4 for name in asked}
    for places, passes in ((1, int(here)), (2, apart)):
        strategy = build(name, **options)
        state = strategy.begin()
        if name == "feddisco":
            state = {k: [1.0, 2.0, 3.0] for k in range(4)}
        given = kit.make_round(random_models(4), metrics=metrics, state=state)
        updates = Counted(given.updates, places)
        strategy.aggregate(replace(given, updates=updates))
        assert updates.passes == passes


def test_clients_are_looked_at_in_the_order_of_their_numbers(kit):
    met = []

    class Watching(strategy_class("fedavg")):
        def admit(self, report):
            met.append(report.client)

    run = federation(
        kit, Watching(), random_models(5), arrange=lambda replies: replies[::-1]
    )
    run.round()
    assert met == [0, 1, 2, 3, 4]


@every_method
def test_nobody_is_asked_to_train_at_a_fraction_of_0(kit, name):
    run = federation(kit, build(name, fraction_train=0.0), random_models(3))
    before = run.vector
    record = run.round()
    assert record.status == "ok"
    assert not record.clients
    assert not any(c.told for c in run.clients.values())
    np.testing.assert_array_equal(run.vector, before)


def test_the_largest_value_of_a_model_leaves_float32_in_four_layers():
    layers = torch.full((4,), LARGEST_VALUE, dtype=torch.float32)
    assert layers[:3].prod().isfinite()
    assert layers.prod().isinf()


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([[1.0, 2.0], [3.0, 0.5], [0.0, 4.0]], [4.0, 6.5]),
        ([[1.0, 2.0], [3.0, -0.5], [0.0, 11.0]], [1.0, 2.0]),
        ([[1.0, 2.0], [3.0], [0.0, 4.0]], [1.0, 6.0]),
        ([[-1.0], [99.0], [-1.0]], None),
    ],
)
def test_sums_are_asked_for_until_some_have_answered(kit, answers, expected):
    """And clients whose sums cannot be take part all the same, but for that."""
    name = keys.TRANSITION_SUMS
    strategy = build("fedavg", pools={name: 2})
    run = federation(kit, strategy, random_models(3))
    for k, own in enumerate(answers):
        run.clients[k].profile = {name: own}
    for _ in range(3):
        assert run.round().status == "ok"
    told = run.clients[0].told
    assert keys.REQUEST not in told[0]
    assert told[1][keys.REQUEST] == [name]
    assert name not in told[1]
    assert (keys.REQUEST in told[2]) == (expected is None)
    assert told[2].get(name) == expected
    # Who trains a model of its own after the rounds hears them, too; who evaluates not.
    last = run.strategy.configure_last(3, run.arrays, run.config, run.grid)
    [*run.grid.send_and_receive(last)]
    assert told[-1].get(name) == expected
    usual = run.strategy.configure_evaluate(3, run.arrays, run.config, run.grid)
    [*run.grid.send_and_receive(usual)]
    assert name not in told[-1]
    again = build("fedavg", pools={name: 2})
    again.restore(unpack(*pack(strategy.state)))
    assert again.state["pooled"] == ({} if expected is None else {name: expected})
