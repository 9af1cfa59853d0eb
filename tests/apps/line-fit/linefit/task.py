"""The data and the model: y = w x + b, with noise."""

import numpy as np

FEATURES = 5


def load_data(partition: int):
    """Return examples of one client; later ones have more."""
    rng = np.random.default_rng(partition)
    x = rng.normal(size=(20 + 7 * partition, FEATURES))
    y = x @ np.arange(FEATURES) + partition / 4 + rng.normal(size=len(x)) / 10
    return x, y


def loss(weights, bias, x, y) -> float:
    """Return the mean squared error."""
    return float(np.mean((x @ weights + bias - y) ** 2))


def fit(weights, bias, x, y, rate: float, steps: int):
    """Take some steps of gradient descent."""
    for _ in range(steps):
        error = x @ weights + bias - y
        weights = weights - rate * 2 * x.T @ error / len(x)
        bias = bias - rate * 2 * error.mean()
    return weights, np.asarray(bias)
