"""Random numbers inside a model: what they are a function of, and what they do."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedweight.clients.noise import LocalTraining, uniform


def noise(seed=1, step=0, layer=1, shape=(1000,)):
    return uniform(torch.tensor(seed), torch.tensor(step), layer, torch.Size(shape))


def within(model, x, seed=1, step=0):
    with LocalTraining(torch.tensor(seed), step):
        return model(x)


def test_noise_is_uniform():
    values = noise(shape=(400, 500)).double()
    assert values.min() >= 0
    assert values.max() < 1
    # Four standard errors of 200,000 independent numbers.
    assert float(values.mean()) == pytest.approx(0.5, abs=4 * 12**-0.5 / 447)
    assert float(values.var()) == pytest.approx(1 / 12, abs=4 * 180**-0.5 / 447)
    counts = torch.histc(values, 20, 0, 1)
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 50  # chi2(19): p < 2e-4
    neighbours = np.corrcoef(values[:, :-1].flatten(), values[:, 1:].flatten())[0, 1]
    assert abs(neighbours) < 4 / 447


def test_noise_is_a_function_of_client_step_and_layer():
    assert torch.equal(noise(), noise())
    names = [(1, 0, 1), (2, 0, 1), (1, 1, 1), (1, 0, 2), (2**63 - 1, 0, 1), (0, 0, 0)]
    draws = [noise(*name) for name in names]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.15
            assert not torch.isin(a, b).double().mean() > 0.01


def test_a_step_may_be_a_number_or_a_tensor():
    shape = torch.Size([5])
    numbers = [
        uniform(torch.tensor(3), step, 1, shape) for step in (4, torch.tensor(4))
    ]
    assert torch.equal(*numbers)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d])
def test_dropout_keeps_its_share_and_the_expectation(kind, p):
    dims = {nn.Dropout: 0, nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}[kind]
    x = torch.ones(200, 100, *([2] * dims))
    result = within(kind(p), x)
    kept = result != 0
    assert float(kept.double().mean()) == pytest.approx(1 - p, abs=0.015)
    assert torch.allclose(result[kept], torch.tensor(1 / (1 - p)))
    if dims:  # whole channels
        by_channel = kept.flatten(2).double().mean(2)
        assert set(by_channel.unique().tolist()) == {0.0, 1.0}


def test_each_layer_draws_its_own():
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    first = within(nn.Dropout(0.5), torch.ones(100, 100))
    both = within(model, torch.ones(100, 100))
    assert float((both != 0).double().mean()) == pytest.approx(0.25, abs=0.02)
    assert torch.equal((first != 0) & (both != 0), both != 0)


def test_evaluation_and_p_of_0_pass_through():
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(within(nn.Dropout(0.5).eval(), x), x)
    assert torch.equal(within(nn.Dropout(0.0), x), x)
    assert not within(nn.Dropout(1.0), x).any()


def test_pytorchs_own_stream_is_left_alone():
    before = torch.get_rng_state()
    within(nn.Dropout(0.5), torch.ones(100))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_layers_that_drew_are_counted():
    class Calls(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training)

    x = torch.ones(4, 4)
    for model, count in (
        (Calls(), 1),
        (Calls().eval(), 0),
        (nn.Linear(4, 4), 0),
        (nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 4), Calls()), 2),
    ):
        with LocalTraining(torch.tensor(0), 0) as mode:
            model(x)
        assert mode.layers == count


def test_statistics_leave_padding_out():
    x = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([1.0, 1, 1, 1, 0, 0])
    ours, theirs = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    x[4:] = 1e4
    with LocalTraining(torch.tensor(0), 0, mask):
        output = ours(x)
    expected = theirs(x[:4])
    torch.testing.assert_close(output[:4], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    with LocalTraining(torch.tensor(0), 0, mask):
        torch.testing.assert_close(ours(x), theirs(x))
