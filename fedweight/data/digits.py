"""Handwritten digits, 8 by 8 pixels: the data set that needs no download."""

from __future__ import annotations

import gzip
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np

from ..core.extras import require
from .examples import DataSet, Examples
from .targets import Array

# The split belongs to the data set, so it does not move with the run's seed: scores
# of different seeds are measured on the same test images.
SPLIT_SEED = 0


def load() -> DataSet:
    """Handwritten digits 8x8, 10 classes, 1,797 images; ships with scikit-learn.

    Pixels are scaled to [0, 1], images have shape ``[1, 8, 8]``. One fifth of each
    class, always the same images, is the test set.

    References
    ----------
    E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
    Learning Repository, 1998.
    """
    pixels, labels = _read()
    x = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    y = labels.astype(np.int64)
    rng = np.random.Generator(np.random.PCG64(SPLIT_SEED))
    test = np.zeros(len(y), bool)
    for label in range(10):
        members = rng.permutation(np.flatnonzero(y == label))
        test[members[: round(len(members) / 5)]] = True
    examples = Examples(x, y)
    return DataSet(
        name="digits",
        train=examples.take(np.flatnonzero(~test)),
        test=examples.take(np.flatnonzero(test)),
        num_classes=10,
        class_names=tuple("0123456789"),
    )


@cache
def _read() -> tuple[Array, Array]:
    """Return the pixels ``[n, 64]``, 0 to 16, and the labels ``[n]``; read once.

    Scikit-learn is asked for the file only: nothing else of it is needed, and it takes
    long to import.
    """
    require("data 'digits'", "studies", "sklearn")
    package = importlib.util.find_spec("sklearn")
    origin = "" if package is None else package.origin or ""
    file = Path(origin).parent / "datasets" / "data" / "digits.csv.gz"
    if file.exists():
        with gzip.open(file, "rt") as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.float64)
        return table[:, :-1], table[:, -1]
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return pixels, labels
