from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fedweight.errors import ConfigurationError
from fedweight.strategies.fedlaw import FedLAW, chain, coherence, split, start
from fedweight.updates import StackedUpdates


def examples(x, y):
    return SimpleNamespace(x=np.asarray(x, np.float64), y=np.asarray(y))


def linear():
    return nn.Linear(2, 2, bias=False).double()


@pytest.fixture
def toy(golden):
    return golden("fedlaw")


def strategy_of(toy, **options):
    return FedLAW(linear(), examples(toy["proxy_x"], toy["proxy_y"]), **options)


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
    gradient = chain(x.detach(), form, updates.project(g), g @ v)
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
    run.strategy = FedLAW(model, data)
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
    strategy = FedLAW(noisy_net(), proxy, batch_size=8, **options)
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
    FedLAW(linear(), data)
    FedLAW(linear(), SimpleNamespace(x=torch.zeros(3, 2), y=torch.zeros(3)))


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
        FedLAW(linear(), examples(np.zeros((0, 2)), np.zeros(0, np.int64)))
    with pytest.raises(ConfigurationError, match="2 inputs and 1 labels"):
        FedLAW(linear(), examples(np.zeros((2, 2)), [0]))


def test_another_model_than_the_clients_is_an_error(kit, toy):
    run = federation(kit, toy)
    run.strategy = FedLAW(
        nn.Linear(2, 3, bias=False).double(),
        examples(toy["proxy_x"], toy["proxy_y"]),
    )
    with pytest.raises(ConfigurationError, match=r"'weight' \[3, 2\] float64 where"):
        run.round()


@pytest.mark.parametrize(
    ("depth", "scale", "reached"), [(1, 1.0, 1.49), (10, 0.5, 2.0)]
)
def test_only_its_bound_bounds_gamma(kit, depth, scale, reached):
    """Steps of Adam grow with the gradient, the more the deeper the network is."""
    layers = [nn.Linear(2, 2, bias=False) for _ in range(depth)]
    model = nn.Sequential(*layers).double()
    arrays = {n: scale * np.eye(2) for n in model.state_dict()}
    stream = np.random.default_rng(0)
    y = stream.integers(0, 2, 200)
    x = np.eye(2)[y] + 0.1 * stream.normal(size=(200, 2))

    def gamma(**options):
        strategy = FedLAW(model, SimpleNamespace(x=x, y=y), **options)
        clients = {k: kit.Client(arrays) for k in range(2)}
        zeros = {n: np.zeros((2, 2)) for n in arrays}
        return (
            kit.Federation(strategy, clients, kit.record(zeros))
            .round()
            .metrics["gamma"]
        )

    assert reached < gamma() < np.exp(1)
    assert gamma(max_log_shrink=0.2) == pytest.approx(np.exp(0.2))
