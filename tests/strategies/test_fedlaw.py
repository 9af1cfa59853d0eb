from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedweight.core.device_updates import DeviceUpdates
from fedweight.core.errors import ConfigurationError
from fedweight.core.module import FlatModule
from fedweight.core.updates import StackedUpdates
from fedweight.strategies.fedavg import FedAvg
from fedweight.strategies.fedlaw import FedLAW, chain, coherence, split, start

from ..elsewhere import DEVICE, Elsewhere
from ..waits import Waits


def examples(x, y):
    return SimpleNamespace(x=np.asarray(x, np.float64), y=np.asarray(y))


def linear():
    return nn.Linear(2, 2, bias=False).double()


@pytest.fixture
def toy(golden):
    return golden("fedlaw")


def strategy_of(toy, **options):
    return FedLAW(
        model=linear(), proxy=examples(toy["proxy_x"], toy["proxy_y"]), **options
    )


def federation(kit, toy, **options):
    clients = {
        k: kit.Client(model, n)
        for k, (model, n) in enumerate(
            zip(toy["models"], toy["num_examples"], strict=True)
        )
    }
    arrays = kit.record({"weight": np.full((2, 2), 0.3)})
    return kit.Federation(strategy_of(toy, **options), clients, arrays)


def loss_at(toy, x, form):
    """The objective as it is written down, for autograd."""
    weights, gamma = split(x, form)
    models = torch.tensor(toy["models"], dtype=torch.float64)
    w = (gamma * (weights @ models)).reshape(2, 2)
    scores = torch.tensor(toy["proxy_x"], dtype=torch.float64) @ w.T
    return nn.functional.cross_entropy(scores, torch.tensor(toy["proxy_y"]))


@pytest.mark.parametrize("form", ["exp", "quad"])
def test_golden_gradient(kit, toy, form):
    """From any global model: only w_k - v counts."""
    run = federation(kit, toy, form=form, server_epochs=0, coherence=False)
    run.round()  # makes the strategy load the model
    strategy = run.strategy
    for origin in (np.zeros(4), np.arange(4.0)):
        round = kit.make_round(
            toy["models"], origin=origin, num_examples=toy["num_examples"]
        )
        x = start(round.size_weights, form)
        gradient = strategy._gradient(round, x, torch.arange(2))
        assert gradient.tolist() == pytest.approx(toy[form]["gradient"], abs=1e-8)
        free = x.clone().requires_grad_()
        loss = loss_at(toy, free, form)
        loss.backward()
        assert loss.item() == pytest.approx(toy[form]["loss"], abs=1e-8)
        assert gradient.tolist() == pytest.approx(free.grad.tolist(), abs=1e-12)


@pytest.mark.parametrize("options", [{}, {"form": "quad"}, {"swa": True}])
def test_with_the_proxy_set_on_the_device_of_the_rows_it_learns_there(kit, options):
    layers = nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)
    stream = np.random.default_rng(0)
    model, begun = nn.Sequential(*layers), FlatModule(nn.Sequential(*layers)).save()
    proxy = examples(stream.normal(size=(40, 3)), stream.integers(0, 2, 40))
    moved = stream.normal(size=(9, len(begun.parameters))).astype(np.float32)
    models = begun.parameters + 0.3 * torch.from_numpy(moved)

    def learned(device, epochs):
        strategy = FedLAW(
            model=model, proxy=proxy, server_epochs=epochs, device=device, **options
        )
        where = begun.parameters, begun.layout.offsets
        rows = models.to(device)
        kind = StackedUpdates if rows.is_cpu else DeviceUpdates
        updates = kind(rows.unbind(), *where)
        round = replace(kit.make_round(models), model=begun, updates=updates)
        return strategy.aggregate(round), round

    expected, here = learned("cpu", 4)
    copies = []
    for epochs in (1, 4):
        with Elsewhere() as mode:
            found, there = learned(str(DEVICE), epochs)
        copies.append((mode.seen["down"], mode.seen["read"]))
    assert copies[0] == copies[1]
    near = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **near)
    for name, values in here.logged_clients.items():
        torch.testing.assert_close(there.logged_clients[name], values, **near)


@pytest.mark.parametrize("form", ["exp", "quad"])
def test_a_step_where_the_rows_are_waits_for_nothing(kit, toy, form):
    run = federation(kit, toy, form=form, server_epochs=0, coherence=False)
    run.round()  # makes the strategy load the model
    sizes = {"num_examples": toy["num_examples"]}
    here = kit.make_round(toy["models"], origin=np.arange(4.0), **sizes)
    updates = DeviceUpdates(here.updates.models, here.model.parameters)
    there = replace(here, updates=updates)
    given = start(here.size_weights, form), torch.arange(2)
    run.strategy._gradient(there, *given)  # What no later step makes again.
    with Waits() as waits:
        found = run.strategy._gradient(there, *given)
    assert not waits.seen
    expected = run.strategy._gradient(here, *given)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("form", ["exp", "quad"])
@pytest.mark.parametrize("seed", range(5))
def test_closed_form_equals_autograd(form, seed):
    """A small network, random clients, anywhere in the space of x."""
    stream = np.random.default_rng(seed)
    torch_stream = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    size = sum(p.numel() for p in net.parameters())
    models = torch.randn(6, size, generator=torch_stream, dtype=torch.float64)
    origin = torch.randn(size, generator=torch_stream, dtype=torch.float64)
    inputs = torch.randn(9, 3, generator=torch_stream, dtype=torch.float64)
    labels = torch.from_numpy(stream.integers(0, 4, 9))
    x = torch.from_numpy(stream.normal(size=7)).requires_grad_()

    def loss_of(vector):
        parts, place = {}, 0
        for name, p in net.named_parameters():
            parts[name] = vector[place : place + p.numel()].view_as(p)
            place += p.numel()
        scores = torch.func.functional_call(net, parts, (inputs,))
        return nn.functional.cross_entropy(scores, labels)

    weights, gamma = split(x, form)
    loss_of(gamma * (weights @ models)).backward()

    weights, gamma = (t.detach() for t in split(x, form))
    v = weights @ models
    point = (gamma * v).requires_grad_()
    (g,) = torch.autograd.grad(loss_of(point), point)
    updates = StackedUpdates(list(models), origin)
    gradient = chain(x.detach(), form, updates.dot(g), g @ v)
    np.testing.assert_allclose(gradient, x.grad, rtol=1e-9, atol=1e-12)
    if form == "exp":
        assert gradient[:-1].sum().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("row", ["adam_1", "adam_40"])
def test_golden_run(kit, toy, row):
    expected = toy["exp"][row]
    run = federation(kit, toy, server_epochs=expected["steps"])
    record = run.round()
    weights = [c.weight for c in record.clients]
    assert weights == pytest.approx(expected["weights"], abs=1e-7)
    assert record.metrics["gamma"] == pytest.approx(expected["gamma"], abs=1e-7)
    after = record.metrics["proxy-loss-after"]
    assert after == pytest.approx(expected["loss"], abs=1e-7)
    before = record.metrics["proxy-loss-before"]
    assert before == pytest.approx(toy["exp"]["loss"], abs=1e-8)
    model = expected["gamma"] * np.array(expected["weights"]) @ toy["models"]
    np.testing.assert_allclose(run.vector, model, atol=1e-6)


def test_the_loss_never_rises_on_a_convex_model(kit, toy):
    losses = []
    for steps in range(0, 41, 5):
        run = federation(kit, toy, server_epochs=steps)
        losses.append(run.round().metrics["proxy-loss-after"])
    assert (np.diff(losses) < 0).all()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("form", ["exp", "quad"])
@pytest.mark.parametrize("swa", [False, True])
def test_every_variant_lowers_the_loss(kit, toy, optimizer, form, swa):
    run = federation(kit, toy, optimizer=optimizer, form=form, swa=swa)
    run.clients[1].num_examples = 75  # "quad" starts at uniform weights
    record = run.round()
    assert record.metrics["reverted"] == 0
    assert record.metrics["proxy-loss-after"] < record.metrics["proxy-loss-before"]
    assert sum(c.weight for c in record.clients) == pytest.approx(1)


def test_no_epochs_is_fedavg(kit, toy):
    run = federation(kit, toy, server_epochs=0)
    record = run.round()
    assert [c.weight for c in record.clients] == pytest.approx([0.75, 0.25])
    assert record.metrics["gamma"] == 1
    mean = np.array([0.75, 0.25]) @ np.array(toy["models"])
    np.testing.assert_allclose(run.vector, mean, rtol=1e-12)


def test_shrink_is_a_fixed_gamma(kit, toy):
    run = federation(kit, toy, shrink=0.9)
    record = run.round()
    assert [c.weight for c in record.clients] == [0.75, 0.25]
    mean = np.array([0.75, 0.25]) @ np.array(toy["models"])
    np.testing.assert_allclose(run.vector, 0.9 * mean, rtol=1e-12)
    # It is worse on the proxy set, and stays: that is what is being analysed.
    assert record.metrics["proxy-loss-after"] > record.metrics["proxy-loss-before"]


def test_gamma_stays_within_its_bounds(kit, toy):
    for form in ("exp", "quad"):
        run = federation(kit, toy, form=form, server_epochs=100, max_log_shrink=0.1)
        gamma = run.round().metrics["gamma"]
        assert gamma == pytest.approx(np.exp(0.1))


def test_one_client_learns_only_gamma(kit, toy):
    run = federation(kit, toy, min_train_nodes=1, min_available_nodes=1)
    del run.clients[1]
    record = run.round()
    assert record.clients[0].weight == 1
    assert record.metrics["gamma"] > 1
    assert record.clients[0].metrics["coherence"] == 0


def test_a_worse_model_is_not_used(kit, toy):
    """One step from uniform weights, which are worse here than data size."""
    run = federation(kit, toy, form="quad", server_epochs=1)
    record = run.round()
    assert record.metrics["reverted"] == 1
    assert record.metrics["proxy-loss-after"] > record.metrics["proxy-loss-before"]
    assert [c.weight for c in record.clients] == [0.75, 0.25]
    mean = np.array([0.75, 0.25]) @ np.array(toy["models"])
    np.testing.assert_allclose(run.vector, mean)
    run = federation(kit, toy, form="quad", server_epochs=1, revert_if_worse=False)
    record = run.round()
    assert record.metrics["reverted"] == 0
    assert record.clients[0].weight == pytest.approx(0.5, abs=0.02)


def test_coherence_by_hand():
    rows = [torch.tensor(r) for r in ([1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 0.0])]
    updates = StackedUpdates(rows, torch.zeros(2))
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    assert coherence(updates, p).tolist() == pytest.approx([-0.3, 0.0, -0.1, 0.0])


def test_the_model_that_was_given_stays_as_it_was(kit, toy):
    model = linear()
    before = model.weight.detach().clone()
    data = examples(toy["proxy_x"], toy["proxy_y"])
    run = federation(kit, toy)
    run.strategy = FedLAW(model=model, proxy=data)
    run.round()
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None
    model.weight.data.fill_(7.0)
    run.round()
    assert (model.weight == 7).all()


def noisy_net():
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)
    )


def noisy_federation(kit, k=4, **options):
    stream = np.random.default_rng(5)
    proxy = SimpleNamespace(
        x=stream.normal(size=(33, 4)).astype(np.float32),
        y=stream.integers(0, 3, 33),
    )
    strategy = FedLAW(model=noisy_net(), proxy=proxy, batch_size=8, **options)
    shapes = {n: t.numpy() for n, t in noisy_net().state_dict().items()}
    clients = {}
    for c in range(k):
        model = {}
        for name, a in shapes.items():
            if a.dtype == np.int64:
                model[name] = np.array(7 + c)
            else:
                draw = stream.normal(size=a.shape).astype(a.dtype)
                model[name] = np.abs(draw) if "var" in name else draw
        clients[c] = kit.Client(model)
    zeros = {n: np.zeros_like(a) for n, a in shapes.items()}
    return kit.Federation(strategy, clients, kit.record(zeros))


def test_batch_norm_and_dropout_leave_no_trace_but_the_result(kit):
    """33 examples in eights: the last batch would have been one example."""
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first, second = noisy_federation(kit), noisy_federation(kit)
    first.round()
    torch.manual_seed(2)
    second.round()
    np.testing.assert_array_equal(first.vector, second.vector)
    third = noisy_federation(kit)
    torch.manual_seed(1)
    third.round()
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("model", "sizes"), [(noisy_net, [8, 9]), (linear, [8, 8, 1])])
def test_a_lone_proxy_example_joins_a_batch_where_the_model_needs_it(model, sizes):
    width = 2 if model is linear else 4
    proxy = examples(np.eye(17, width), np.arange(17) % 2)
    net, state = model(), torch.random.get_rng_state()
    strategy = FedLAW(model=net, proxy=proxy, batch_size=8)
    met = list(strategy._batches(1, 0))
    assert [len(batch) for batch in met] == sizes
    assert torch.equal(torch.cat(met).sort().values, torch.arange(17))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_one_proxy_example_does_not_do_for_batch_norm():
    with pytest.raises(ConfigurationError, match="proxy has 1 example, and this model"):
        FedLAW(model=noisy_net(), proxy=examples(np.zeros((1, 4)), [0]))
    FedLAW(model=linear(), proxy=examples(np.zeros((1, 2)), [0]))


def test_running_statistics_are_the_clients_mean_or_the_proxys(kit):
    run = noisy_federation(kit)
    run.round()
    means = [c.model["1.running_mean"] for c in run.clients.values()]
    arrays = {n: a.numpy() for n, a in run.arrays.items()}
    np.testing.assert_allclose(
        arrays["1.running_mean"], np.mean(means, 0), rtol=1e-5, atol=1e-7
    )
    assert arrays["1.num_batches_tracked"] == 8  # in the middle of 7, 8, 9, 10
    own = noisy_federation(kit, proxy_statistics=True)
    own.round()
    other = own.arrays["1.running_mean"].numpy()
    assert not np.allclose(other, np.mean(means, 0), atol=1e-3)
    assert np.isfinite(other).all()


def test_read_only_proxy_and_tensors(kit, toy):
    data = examples(toy["proxy_x"], toy["proxy_y"])
    data.x.flags.writeable = data.y.flags.writeable = False
    FedLAW(model=linear(), proxy=data)
    FedLAW(model=linear(), proxy=SimpleNamespace(x=torch.zeros(3, 2), y=torch.zeros(3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "cubic"}, "form must be one of"),
        ({"server_epochs": -1}, "server_epochs must be in"),
        ({"batch_size": 0}, "batch_size must be in"),
        ({"optimizer": "adamw"}, "Did you mean 'adam'"),
        ({"learning_rate": 0}, "learning_rate must be in"),
        ({"shrink": 0}, "shrink must be in"),
        ({"max_log_shrink": 0}, "max_log_shrink must be in"),
    ],
)
def test_bad_options(toy, options, message):
    with pytest.raises(ConfigurationError, match=message):
        strategy_of(toy, **options)


def test_a_proxy_set_is_needed(toy):
    with pytest.raises(ConfigurationError, match="use fedavg"):
        FedLAW(model=linear(), proxy=examples(np.zeros((0, 2)), np.zeros(0, np.int64)))
    with pytest.raises(ConfigurationError, match="2 inputs and 1 labels"):
        FedLAW(model=linear(), proxy=examples(np.zeros((2, 2)), [0]))


def test_another_model_than_the_clients_is_an_error(kit, toy):
    run = federation(kit, toy)
    run.strategy = FedLAW(
        model=nn.Linear(2, 3, bias=False).double(),
        proxy=examples(toy["proxy_x"], toy["proxy_y"]),
    )
    with pytest.raises(ConfigurationError, match=r"'weight' \[3, 2\] float64 where"):
        run.round()


@pytest.mark.parametrize(
    ("depth", "reached"), [(1, 1.53), (3, 1.67), (10, 2.25), (14, 2.28)]
)
def test_only_its_bound_bounds_gamma(kit, depth, reached):
    """Steps of Adam grow with the gradient, the more the deeper the network is."""
    layers = [nn.Linear(2, 2, bias=False) for _ in range(depth)]
    model = nn.Sequential(*layers).double()
    arrays = {n: 0.5 * np.eye(2) for n in model.state_dict()}
    stream = np.random.default_rng(0)
    y = stream.integers(0, 2, 200)
    x = np.eye(2)[y] + 0.1 * stream.normal(size=(200, 2))

    def gamma(**options):
        strategy = FedLAW(model=model, proxy=SimpleNamespace(x=x, y=y), **options)
        clients = {k: kit.Client(arrays) for k in range(2)}
        zeros = {n: np.zeros((2, 2)) for n in arrays}
        return (
            kit.Federation(strategy, clients, kit.record(zeros))
            .round()
            .metrics["gamma"]
        )

    assert gamma() == pytest.approx(reached, abs=0.01)
    assert gamma(max_log_shrink=0.2) == pytest.approx(np.exp(0.2))


def test_a_gamma_that_is_told_has_no_bound(kit, toy):
    record = federation(kit, toy, shrink=5.0, max_log_shrink=0.1).round()
    assert record.metrics["gamma"] == 5


@pytest.mark.parametrize("options", [{"shrink": 1.0}, {"server_epochs": 0}])
def test_a_shrink_of_1_gives_fedavgs_bits_and_no_epochs_nearly(kit, toy, options):
    run, plain = federation(kit, toy, **options), federation(kit, toy)
    plain.strategy = FedAvg()
    run.round()
    plain.round()
    np.testing.assert_allclose(run.vector, plain.vector, rtol=1e-14)
    if "shrink" in options:
        np.testing.assert_array_equal(run.vector, plain.vector)


def test_quad_starts_at_uniform_weights_and_exp_at_data_size(kit, toy):
    for form, expected in (("quad", [0.5, 0.5]), ("exp", [0.75, 0.25])):
        run = federation(kit, toy, form=form, server_epochs=0, revert_if_worse=False)
        record = run.round()
        assert [c.weight for c in record.clients] == pytest.approx(expected)
        assert record.metrics["gamma"] == 1


def test_passes_over_the_proxy_set_and_over_the_updates(kit, monkeypatch):
    """By default and with 256 proxy examples 40 steps, each reading updates twice."""
    calls = Counter()
    model = nn.Linear(2, 3, bias=False).double()
    stream = np.random.default_rng(0)
    proxy = SimpleNamespace(x=stream.normal(size=(256, 2)), y=np.arange(256) % 3)
    strategy = FedLAW(model=model, proxy=proxy, coherence=False)
    strategy._held.module.module.register_forward_hook(
        lambda *_: calls.update(["forward", "backward"][: 1 + torch.is_grad_enabled()])
    )

    def counted(name):
        method = getattr(StackedUpdates, name)

        def count(self, *arguments, **named):
            calls[name] += 1
            return method(self, *arguments, **named)

        monkeypatch.setattr(StackedUpdates, name, count)

    counted("combine")
    counted("dot")
    clients = {k: kit.Client(stream.normal(size=6)) for k in range(3)}
    start = kit.record({"weight": np.zeros((3, 2))})
    assert kit.Federation(strategy, clients, start).round().status == "ok"
    # Besides the steps: the loss of FedAvg's model and of the learned one.
    expected = {"forward": 40 + 4, "backward": 40, "combine": 40 + 2, "dot": 40}
    assert calls == expected


def test_two_stages_learn_the_weights_and_then_gamma(kit, toy, monkeypatch):
    met = []
    gradient = FedLAW._gradient

    def noted(self, round, x, batch):
        met.append(x.clone())
        return gradient(self, round, x, batch)

    monkeypatch.setattr(FedLAW, "_gradient", noted)
    federation(kit, toy, swa=True, server_epochs=7).round()
    first, second = torch.stack(met[:3]), torch.stack(met[3:])
    assert (first[:, 2] == 0).all()
    assert (first[:, :2].diff(dim=0) != 0).any()
    assert (second[:, :2] == second[0, :2]).all()
    assert (second[:, 2].diff() != 0).all()


def weight_of_who_went_the_opposite_way(kit, claims=10, **options):
    """One of ten clients; the others went the way that the proxy set wants."""
    stream = np.random.default_rng(0)
    model = nn.Linear(2, 3, bias=False).double()
    x = stream.normal(size=(256, 2))
    direction = np.array([3.0, 0, -3, 3, 0, -3])
    proxy = SimpleNamespace(x=x, y=(x @ direction.reshape(3, 2).T).argmax(1))
    rows = [direction + 0.3 * stream.normal(size=6) for _ in range(9)]
    clients = {k: kit.Client(row) for k, row in enumerate([*rows, -direction])}
    clients[9].num_examples = claims
    strategy = FedLAW(model=model, proxy=proxy, coherence=False, **options)
    run = kit.Federation(strategy, clients, kit.record({"weight": np.zeros((3, 2))}))
    return run.round().clients[9].weight


def test_the_weight_of_a_client_that_harms_falls_step_by_step(kit):
    weights = [
        weight_of_who_went_the_opposite_way(kit, server_epochs=epochs)
        for epochs in (0, 5, 10, 20, 400)
    ]
    assert (np.diff(weights) < 0).all()
    assert weights[0] == pytest.approx(0.1)
    assert weights[3] == pytest.approx(0.06, abs=0.005)
    assert weights[4] == pytest.approx(0.004, abs=0.0005)
    quad = weight_of_who_went_the_opposite_way(kit, form="quad")
    assert quad == pytest.approx(0.01, abs=0.005)


def test_a_claim_of_many_examples_is_where_exp_starts_and_quad_does_not(kit):
    claimed = 10_000 / (10_000 + 90)
    exp = weight_of_who_went_the_opposite_way(kit, claims=10_000)
    assert 0.8 < exp < claimed
    quad = [
        weight_of_who_went_the_opposite_way(kit, claims=claims, form="quad")
        for claims in (10, 10_000)
    ]
    assert quad[0] == quad[1]


@pytest.mark.parametrize("normalised", [True, False])
def test_batch_statistics_cancel_the_gamma_of_the_layer_before(kit, normalised):
    """The proxy loss of a model does not change with a factor on it; else it does."""
    between = nn.BatchNorm1d(6, affine=False) if normalised else nn.Identity()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), between, nn.Linear(6, 3)).double()
    model[2].requires_grad_(False)
    stream = np.random.default_rng(5)
    proxy = SimpleNamespace(x=stream.normal(size=(64, 4)), y=stream.integers(0, 3, 64))
    strategy = FedLAW(model=model, proxy=proxy, shrink=2.0, coherence=False)
    state = {n: t.numpy() for n, t in model.state_dict().items()}
    moved = {**state, **{n: state[n] + 0.1 for n in ("0.weight", "0.bias")}}
    clients = {k: kit.Client(moved) for k in range(2)}
    metrics = kit.Federation(strategy, clients, kit.record(state)).round().metrics
    before, after = metrics["proxy-loss-before"], metrics["proxy-loss-after"]
    assert (abs(after - before) < 1e-4) == normalised


def test_what_the_record_of_a_round_has(kit, toy):
    for coherence_too in (True, False):
        record = federation(kit, toy, coherence=coherence_too).round()
        names = {"gamma", "proxy-loss-before", "proxy-loss-after", "reverted"}
        assert names == record.metrics.keys() - {"effective-clients"}
        has = ["coherence" in c.metrics for c in record.clients]
        assert has == [coherence_too] * 2


@given(st.integers(1, 6), st.integers(0, 99))
def test_coherence_lies_between_its_limits(k, seed):
    stream = np.random.default_rng(seed)
    rows = torch.from_numpy(stream.integers(-2, 3, (k, 3)).astype(np.float64))
    p = torch.from_numpy(stream.dirichlet(np.ones(k)))
    found = coherence(StackedUpdates(rows, torch.zeros(3, dtype=torch.float64)), p)
    assert (found.abs() <= 1 - p + 1e-12).all()


@pytest.mark.parametrize("k", [2, 40])
def test_coherence_is_the_mean_cosine_whatever_the_lengths(k):
    stream = np.random.default_rng(k)
    origin = stream.normal(size=20_000).astype(np.float32)
    lengths = 10.0 ** stream.uniform(-4, 2, (k, 1))
    moves = stream.normal(size=(k, len(origin))) + stream.normal(size=len(origin))
    models = (origin + lengths * moves).astype(np.float32)
    rows = models.astype(np.float64) - origin
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    p = stream.dirichlet(np.ones(k))
    cosines = rows @ rows.T - np.eye(k)
    updates = StackedUpdates(torch.from_numpy(models), torch.from_numpy(origin))
    found = coherence(updates, torch.from_numpy(p))
    np.testing.assert_allclose(found, cosines @ p, atol=2e-6)
