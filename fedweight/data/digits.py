"""Handwritten digits, 8 by 8 pixels: the data set that needs no download."""

from __future__ import annotations

import numpy as np

from ..errors import DataError
from .examples import DataSet, Examples

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
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise DataError(
            "data 'digits' comes with scikit-learn, which is not installed. "
            "Run: pip install scikit-learn"
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    x = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    y = labels.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(y)), test_size=0.2, stratify=y, random_state=SPLIT_SEED
    )
    examples = Examples(x, y)
    return DataSet(
        name="digits",
        train=examples.take(np.sort(train)),
        test=examples.take(np.sort(test)),
        num_classes=10,
        class_names=tuple("0123456789"),
    )
