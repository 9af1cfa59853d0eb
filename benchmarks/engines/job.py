"""Models, data and the order of examples, written once and read by every engine.

Imports no more of fedweight than its models and random streams, which need PyTorch
and NumPy only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .card import name_of
from .work import CLASSES, INPUT_SHAPES, SAMPLES, SEED, TOKENS, Work

# Orders of the examples are written for so many rounds; peers that run longer begin
# again with the first. Results are compared within them.
ROUNDS_WITH_ORDERS = 4

# So many clients have examples of their own; further ones have copies, which are
# quicker to write, and take as much memory.
DISTINCT = 1024

# On a GPU convolutions would round to TF32, and engines that do the same in another
# way would not agree. Here, because every process that trains imports this module.
torch.backends.cudnn.allow_tf32 = False


class SmallCNN(nn.Module):
    """Two 5 by 5 convolutions without padding, 582,026 parameters."""

    channels_last = True

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(1024, 512),
            nn.ReLU(),
            nn.Linear(512, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[n, 10]``."""
        logits: Tensor = self.layers(x)
        return logits


def _mlp() -> nn.Module:
    from fedweight.models import build

    return build("mlp", INPUT_SHAPES["S"], CLASSES, hidden=64)


def _resnet() -> nn.Module:
    from fedweight.models import build

    return build("resnet18-gn", INPUT_SHAPES["L"], CLASSES)


def _gru() -> nn.Module:
    from fedweight.models import build

    return build("char-gru", INPUT_SHAPES["G"], CLASSES, vocabulary=TOKENS)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "S": _mlp,
    "M": SmallCNN,
    "G": _gru,
    "L": _resnet,
}


def draw(
    rng: np.random.Generator, model: str, n: int
) -> tuple[npt.NDArray[np.float32 | np.int64], npt.NDArray[np.int64]]:
    """Return so many examples that say nothing, and their classes."""
    shape = (n, *INPUT_SHAPES[model])
    if model == "G":
        return rng.integers(0, TOKENS, shape), rng.integers(0, CLASSES, n)
    return rng.standard_normal(shape, dtype=np.float32), rng.integers(0, CLASSES, n)


def write(work: Work, folder: Path) -> None:
    """Write a job's files; see :meth:`engines.work.Work.write`."""
    distinct = min(work.cohort, DISTINCT) * SAMPLES
    drawn = draw(np.random.default_rng(SEED), work.model, distinct)
    for name, part in zip(("x", "y"), drawn, strict=True):
        shape = (work.cohort * SAMPLES, *part.shape[1:])
        file = np.lib.format.open_memmap(
            folder / f"{name}.npy", "w+", dtype=part.dtype, shape=shape
        )
        for start in range(0, len(file), distinct):
            file[start : start + distinct] = part[: len(file) - start]
    orders = [orders_of(r, work.cohort) for r in range(1, ROUNDS_WITH_ORDERS + 1)]
    np.save(folder / "orders.npy", np.stack(orders))
    torch.manual_seed(SEED)
    torch.save(MODELS[work.model]().state_dict(), folder / "start.pt")


def orders_of(round: int, clients: int) -> npt.NDArray[np.int64]:
    """Return the orders in which fedweight's clients meet their examples in a round.

    The one place that knows how fedweight draws them.
    """
    from fedweight.core.rng import Purpose, keys, permutation

    drawn = keys(SEED, Purpose.SHUFFLE, round, range(clients))
    return np.stack([permutation(key, 0, SAMPLES) for key in drawn])


class Job:
    """The work as an engine reads it.

    Attributes
    ----------
    work : Work
        Which work it is.
    workers : int
        How many processes or threads may be used.
    plan : str
        How fedweight is to train clients.
    device : str
        Where clients train.
    strategy : str
        How fedweight is to weigh them.
    x, y : ndarray
        ``[K * 128, ...]`` and ``[K * 128]``: the clients' examples, one client after
        the other. Mapped from the file, so that processes share them.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        job = json.loads((self.folder / "job.json").read_text())
        self.workers: int = job.pop("workers")
        self.plan: str = job.pop("plan")
        self.device: str = job.pop("device")
        self.strategy: str = job.pop("strategy")
        self.work = Work(**job)
        # "c": changes would stay in memory, so PyTorch accepts the arrays.
        self.x = np.asarray(np.load(self.folder / "x.npy", mmap_mode="c"))
        self.y = np.asarray(np.load(self.folder / "y.npy", mmap_mode="c"))

    @property
    def cohort(self) -> int:
        """K."""
        return self.work.cohort

    @property
    def threads(self) -> int:
        """Intra-op threads for an engine of one process.

        More than one only slows the small model down, so each gets the better.
        """
        return 1 if self.work.model == "S" else self.workers

    @property
    def gpu_share(self) -> float:
        """The share of a card that each worker process asks Ray for; 0 on a CPU.

        All workers fit on one card. Ray counts in steps of 1/10,000.
        """
        return 0.0 if self.device == "cpu" else 10_000 // self.workers / 10_000

    def model(self) -> nn.Module:
        """Return the model with the weights that all start from, on the CPU."""
        module = MODELS[self.work.model]()
        module.load_state_dict(torch.load(self.folder / "start.pt", weights_only=True))
        return module

    @cached_property
    def _examples(self) -> tuple[Tensor, Tensor]:
        """All examples on the device, where they are put once."""
        x, y = torch.from_numpy(self.x), torch.from_numpy(self.y)
        return x.to(self.device), y.to(self.device)

    @cached_property
    def _orders(self) -> Tensor:
        orders = torch.from_numpy(np.load(self.folder / "orders.npy"))
        return orders.to(self.device)

    def client(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the examples of client ``k``, from 0, as stored, on the device."""
        x, y = self._examples
        part = slice(k * SAMPLES, (k + 1) * SAMPLES)
        return x[part], y[part]

    def order(self, round: int, k: int) -> Tensor:
        """Return the order of client ``k``'s examples in a round, from 1."""
        return self._orders[(round - 1) % ROUNDS_WITH_ORDERS][k]

    def shuffled(self, round: int, k: int) -> tuple[Tensor, Tensor]:
        """Return the examples of client ``k`` in the order of a round."""
        x, y = self.client(k)
        order = self.order(round, k)
        return x[order], y[order]


def flat(tensors: Sequence[Any]) -> npt.NDArray[np.float32]:
    """Return tensors or arrays as one vector, to be compared."""
    return np.concatenate([np.asarray(t, np.float32).ravel() for t in tensors])


def flat_module(module: nn.Module) -> npt.NDArray[np.float32]:
    """Return a module's weights as one vector."""
    return flat([p.detach().cpu() for p in module.state_dict().values()])


if __name__ == "__main__":
    name, folder, device = sys.argv[1:]
    print(name_of(device))  # First: without the device nothing is written.
    write(Work.parse(name), Path(folder))
