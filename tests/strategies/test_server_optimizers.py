"""The server's optimisers at the limits that their docstrings name."""

import numpy as np
import pytest
import torch

from fedweight.core.state import pack, unpack
from fedweight.strategies.server_optimizers import (
    ServerAdam,
    ServerMomentum,
    no_optimizer,
    server_optimizer,
)

UPDATES = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 5)))


def steps(optimizer):
    found, state = [], None
    for update in UPDATES:
        step, state = optimizer.step(update, state)
        found.append(step)
    return torch.stack(found)


def test_momentum_of_nothing_is_plain_averaging():
    torch.testing.assert_close(steps(ServerMomentum(1.0, beta=0.0)), UPDATES)


def test_momentum_damped_by_itself_starts_small():
    assert torch.equal(
        steps(ServerMomentum(beta=0.9, dampening=0.9))[0], (1 - 0.9) * UPDATES[0]
    )
    plain = steps(ServerMomentum(beta=0.9))
    torch.testing.assert_close(plain[1], 0.9 * UPDATES[0] + UPDATES[1])


@pytest.mark.parametrize("beta_2", [0.5, 0.99])
def test_with_a_large_tau_adam_is_momentum_at_a_smaller_rate(beta_2):
    tau = 1e6
    found = steps(ServerAdam(0.1, beta_1=0.9, beta_2=beta_2, tau=tau))
    momentum = torch.zeros(5, dtype=torch.float64)
    for t, update in enumerate(UPDATES, 1):
        momentum = 0.9 * momentum + 0.1 * update
        expected = 0.1 / tau / (1 + beta_2 ** (t / 2)) * momentum
        torch.testing.assert_close(found[t - 1], expected, rtol=1e-6, atol=0)


def test_adam_by_hand():
    """Two steps on one coordinate."""
    adam = ServerAdam(learning_rate=1.0, beta_1=0.5, beta_2=0.5, tau=0.1)
    first = 0.5 * 2.0
    second = 0.5 * 0.01 + 0.5 * 4.0
    step, state = adam.step(torch.tensor([2.0]), None)
    assert float(step) == pytest.approx(first / (second**0.5 + 0.1))
    first, second = 0.5 * first - 0.5, 0.5 * second + 0.5
    step, _ = adam.step(torch.tensor([-1.0]), state)
    assert float(step) == pytest.approx(first / (second**0.5 + 0.1))


def test_an_optimizer_goes_on_from_its_state():
    for make in (ServerAdam, ServerMomentum):
        expected = steps(make())[-1]
        state = None
        for update in UPDATES:
            found, state = make().step(update, unpack(*pack(state)))
        assert torch.equal(found, expected)


def test_none_is_none():
    assert no_optimizer() is None
    assert server_optimizer("none") is None
