import numpy as np
import pytest
import torch

from fedweight.strategies import WeightingStrategy
from fedweight.strategies.fedavg import FedAvg
from fedweight.strategies.server_optimizers import ServerAdam, ServerMomentum


def test_golden(kit, golden):
    expected = golden("fedavg")
    round = kit.make_round(kit.toy["models"], num_examples=kit.toy["num_examples"])
    strategy = FedAvg()
    assert strategy.weights(round).tolist() == expected["weights"]
    assert strategy.aggregate(round).tolist() == expected["model"]


def test_golden_through_messages(kit, golden):
    clients = {
        i: kit.Client(model, n)
        for i, (model, n) in enumerate(
            zip(kit.toy["models"], kit.toy["num_examples"], strict=True)
        )
    }
    start = kit.record({"w": np.zeros(4, np.float32)})
    federation = kit.Federation(FedAvg(), clients, start)
    record = federation.round()
    assert record.status == "ok"
    assert [c.weight for c in record.clients] == golden("fedavg")["weights"]
    np.testing.assert_array_equal(federation.vector, golden("fedavg")["model"])


def test_damped_momentum(kit, golden):
    expected = golden("fedavg")["damped_momentum"]
    beta = expected["beta"]
    optimizer = ServerMomentum(beta=beta, dampening=beta)
    update = torch.tensor(expected["update"], dtype=torch.float64)
    model = torch.zeros(1, dtype=torch.float64)
    reached, state = [], None
    for d in update:
        step, state = optimizer.step(d[None], state)
        model = model + step
        reached.append(float(model))
    assert reached == pytest.approx(expected["model"], abs=1e-12)


@pytest.mark.parametrize("make", [ServerMomentum, ServerAdam])
def test_server_optimizer_goes_on_from_its_state(kit, make):
    def federation():
        clients = {i: kit.Client(np.arange(4.0) * (i + 1)) for i in range(3)}
        start = kit.record({"w": np.zeros(4, np.float32)})
        return kit.Federation(FedAvg(server_optimizer=make()), clients, start)

    whole = federation()
    for _ in range(4):
        whole.round()
    first = federation()
    first.round()
    first.round()
    second = federation()
    second.strategy.restore(first.strategy.state)
    second.arrays, second.number = first.arrays, first.number
    second.round()
    second.round()
    np.testing.assert_array_equal(second.vector, whole.vector)


def test_one_local_step_is_the_step_on_all_data_together(kit):
    stream = torch.Generator().manual_seed(0)
    start = torch.randn(3, generator=stream, dtype=torch.float64)
    x = torch.randn(20, 3, generator=stream, dtype=torch.float64)
    y = torch.randn(20, generator=stream, dtype=torch.float64)

    def after_a_step(rows):
        w = start.clone().requires_grad_()
        (x[rows] @ w - y[rows]).square().mean().backward()
        return start - 0.1 * w.grad

    parts = [slice(0, 3), slice(3, 4), slice(4, 20)]
    models = [after_a_step(rows) for rows in parts]
    round = kit.make_round(models, origin=start, num_examples=[3, 1, 16])
    together = after_a_step(slice(0, 20))
    torch.testing.assert_close(FedAvg().aggregate(round), together, rtol=1e-12, atol=0)


def test_weights_that_sum_to_less_make_a_shorter_step(kit):
    class Half(WeightingStrategy):
        def weights(self, round):
            return torch.tensor([0.25, 0.25])

    origin = np.array([1.0, 2.0])
    round = kit.make_round([[3.0, 2.0], [1.0, 6.0]], origin=origin)
    assert Half().aggregate(round).tolist() == [1.5, 3.0]
