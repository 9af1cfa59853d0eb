"""Quick runs: a few clients, a round or two, a small model."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedweight import Run, run
from fedweight.data import DataSet, Examples

QUICK: dict[str, Any] = {
    "run.rounds": 2,
    "partition.clients": 4,
    "training.epochs": 1,
    "model.name": "softmax",
    "engine.name": "local",
}


def small_data(n: int = 120, clients: int | None = None) -> DataSet:
    """Three classes of points in the plane."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % 3
    x = (rng.normal(size=(n, 2)) + 3 * np.eye(3)[y, :2]).astype(np.float32)
    train, test = Examples(x[:-30], y[:-30]), Examples(x[-30:], y[-30:])
    natural = None if clients is None else np.arange(len(train)) % clients
    return DataSet("points", train, test, 3, natural, ("a", "b", "c"))


@pytest.fixture(scope="session")
def points() -> Callable[..., DataSet]:
    return small_data


@pytest.fixture
def quick(tmp_path: Path) -> Callable[..., Run]:
    """Run, quickly, into ``tmp_path / out``."""

    def start(out: str = "run", **arguments: Any) -> Run:
        basis = {} if "file" in arguments else QUICK
        settings = {**basis, **arguments.pop("settings", {})}
        arguments.setdefault("dataset", small_data())
        arguments.setdefault("report", False)
        return run(settings=settings, out=tmp_path / out, **arguments)

    return start


@pytest.fixture(scope="session")
def rows() -> Callable[[Path], list[dict[str, str]]]:
    """Read a CSV file."""

    def read(path: Path) -> list[dict[str, str]]:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    return read


@pytest.fixture
def own_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's, found in the working directory."""
    import sys

    folder = tmp_path / "here"
    folder.mkdir()
    name = f"own_{abs(hash(str(tmp_path)))}"
    (folder / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(folder)
    yield name
    sys.modules.pop(name, None)
    if str(folder) in sys.path:
        sys.path.remove(str(folder))


OWN = '''
import math
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from fedweight.clients import Objective
from fedweight.data import DataSet, Examples
from fedweight.strategies.base import WeightingStrategy


def load(seed, *, n=60):
    y = np.arange(n) % 2
    x = np.stack([y, 1 - y], 1).astype(np.float32)
    return DataSet("own", Examples(x, y), Examples(x, y), 2)


def split(dataset, num_clients, rng, *, first=5):
    rows = rng.permutation(len(dataset.train))
    return [rows[:first], *np.array_split(rows[first:], num_clients - 1)]


def net(input_shape, num_classes, activation=nn.ReLU, width=4):
    size = math.prod(input_shape)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(size, width), activation(), nn.Linear(width, num_classes)
    )


class Scaled(Objective):
    def __init__(self, factor=2.0):
        self.factor = factor

    def loss(self, outputs, batch):
        return self.factor * F.cross_entropy(outputs, batch.y)


class First(WeightingStrategy):
    """Only the first client counts, by a share."""

    def __init__(self, share: float = 1.0, **arguments):
        super().__init__(**arguments)
        self.share = share

    def weights(self, round):
        weights = torch.zeros(round.num_clients, dtype=torch.float64)
        weights[0] = self.share
        return weights


class Sometimes(Objective):
    """Breaks for a client with a certain number of examples of class 0, or for all."""

    def __init__(self, how="raise", everybody=False):
        self.how, self.everybody = how, everybody

    def loss(self, outputs, batch):
        loss = F.cross_entropy(outputs, batch.y)
        if not self.everybody and int((batch.y == 0).sum()) != len(batch.y):
            return loss
        if self.how == "raise":
            raise ValueError('it has, as they say, "no way",\\nand no second line')
        return loss * math.nan
'''
