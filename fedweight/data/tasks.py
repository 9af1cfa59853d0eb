"""Tasks: what is predicted of examples, minimised and measured, said in one place.

PyTorch is imported where a loss needs it: a look at data should not wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from ..core.errors import ConfigurationError, DataError, check_range, closest
from ..core.texts import shown
from .targets import Array, Indices, as_flags, as_labels, as_masks, as_numbers

if TYPE_CHECKING:
    from torch import Tensor


class LearningTask:
    """What a model learns to predict.

    Attributes
    ----------
    name : str
        As data and files call it.
    targets : str
        What a message calls the targets.
    whole : bool
        Whether targets are codes of classes, int64, and not of the model's type.
    ndim : int
        How many axes they have, the examples' included.
    least_classes : int
        How few classes or labels there may be; 0 where there are none at all.
    has_classes : bool
        Whether each example is of one of C classes, which methods may count.
    instead, outputs : str
        What a message says of examples that have no class of their own, and of what a
        model gives.
    counts_hits : bool
        Whether a prediction is right or wrong, so that there is an accuracy.
    metrics : tuple of str
        What is measured besides the loss and the accuracy, unless told otherwise.
    offered : tuple of str
        What may be measured besides these.
    of_pixels : bool
        Whether each pixel of an image has a target.
    score : str
        The measure in [0, 1], 1 at best, that methods go by which ask clients how well
        a model does; empty where there is none.
    """

    name: ClassVar[str]
    targets: ClassVar[str] = "labels"
    whole: ClassVar[bool] = True
    ndim: ClassVar[int] = 1
    least_classes: ClassVar[int] = 1
    has_classes: ClassVar[bool] = False
    instead: ClassVar[str] = "have none"
    outputs: ClassVar[str] = "a logit for each class"
    counts_hits: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ()
    offered: ClassVar[tuple[str, ...]] = ()
    of_pixels: ClassVar[bool] = False
    score: ClassVar[str] = "accuracy"

    # What examples have.

    def cast(self, where: str, y: Array, dtype: npt.DTypeLike = np.float32) -> Array:
        """Return targets in the form that training takes, or say what to give.

        Parameters
        ----------
        where : str
            How a message begins, such as ``"own.npz: 'y' is"``.
        y : ndarray
            What is given, ``[n, ...]``.
        dtype : dtype
            What targets that are no codes become.

        Raises
        ------
        DataError
            If it is not certain what is meant.
        """
        raise NotImplementedError

    def check(self, what: str, x: Array, y: Array, num_classes: int) -> None:
        """Raise a DataError unless cast targets fit the inputs and the classes."""
        if len(y) and not (y.min() >= 0 and y.max() < num_classes):
            raise DataError(
                f"{what}: labels reach from {y.min()} to {y.max()}, "
                f"but {num_classes} classes allow 0 to {num_classes - 1}."
            )

    def class_counts(self, y: Array, num_classes: int) -> Indices:
        """Return how many examples are of each class, or have each label, ``[C]``."""
        return np.bincount(y, minlength=num_classes)

    def guessed(self, y: Array) -> float | None:
        """Return the accuracy of always deciding on what is most frequent in targets.

        ``None`` where there is no accuracy, or no target.
        """
        if not self.counts_hits or not y.size:
            return None
        return float(np.unique(y, return_counts=True)[1].max() / y.size)

    # What a model gives.

    def width(self, num_classes: int) -> int:
        """Return how many numbers a model gives for what it predicts, from C."""
        check_range("num_classes", num_classes, 2)
        return num_classes

    def output_shape(
        self, num_classes: int, target_shape: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Return the shape of a model's outputs for targets of some shape."""
        return target_shape[0], self.width(num_classes)

    def example_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each example, ``[n]``: what is minimised by default.

        Autograd can follow it, and ``torch.vmap`` can batch it.
        """
        raise NotImplementedError

    def decided(self, outputs: Tensor) -> Tensor:
        """Return what a model decides on: the classes of the targets' shape."""
        raise NotImplementedError

    def scores(self, outputs: Tensor) -> Tensor | None:
        """Return the probability of each class, ``[n, C]``, where there are any."""
        return None

    def example_hits(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return which share of each example's decisions is right, ``[n]``."""
        right = self.decided(outputs) == targets
        return right if right.ndim == 1 else right.flatten(1).double().mean(1)


class Classification(LearningTask):
    """One of C classes for each example: logits ``[n, C]``, labels ``[n]``."""

    name = "classification"
    has_classes = True
    offered: ClassVar[tuple[str, ...]] = ("macro-f1", "auc", "confusion")

    def cast(self, where: str, y: Array, dtype: npt.DTypeLike = np.float32) -> Array:
        """Return int64 ``[n]``."""
        return as_labels(where, y)

    def example_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy, ``-log softmax(outputs)[y]``."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs, targets, reduction="none")

    def decided(self, outputs: Tensor) -> Tensor:
        """Return the class with the largest logit; of equal ones the first."""
        return outputs.argmax(1)

    def scores(self, outputs: Tensor) -> Tensor:
        """Return the softmax of the logits."""
        return outputs.softmax(1)


class NextToken(Classification):
    """The token that follows a text: logits ``[n, V]``, tokens ``[n]``."""

    name = "next-token"
    offered = ("perplexity", "macro-f1", "auc", "confusion")


class MultiLabel(LearningTask):
    """Any of L labels for each example: logits and targets of 0 and 1, ``[n, L]``."""

    name = "multi-label"
    whole = False
    ndim = 2
    instead = "have any number of labels each"
    outputs = "a logit for each label"
    metrics = ("macro-f1",)
    offered = ("macro-f1", "auc")

    def cast(self, where: str, y: Array, dtype: npt.DTypeLike = np.float32) -> Array:
        """Return 0 and 1 as ``dtype``, ``[n, L]``."""
        return as_flags(where, y, dtype)

    def check(self, what: str, x: Array, y: Array, num_classes: int) -> None:
        """Raise unless there are L labels of 0 and 1."""
        if y.shape[1] != num_classes:
            raise DataError(
                f"{what}: labels have shape {list(y.shape)}, but num_classes is "
                f"{num_classes}. Give a column for each label."
            )
        as_flags(f"{what}: labels are", y, y.dtype)

    def class_counts(self, y: Array, num_classes: int) -> Indices:
        """Return how many examples have each label, ``[L]``."""
        counts: Indices = y.astype(np.int64).sum(0)
        return counts

    def guessed(self, y: Array) -> float | None:
        """Return the accuracy of the more frequent decision on each label."""
        share = y.mean(0, dtype=np.float64) if y.size else np.empty(0)
        return float(np.maximum(share, 1 - share).mean()) if y.size else None

    def width(self, num_classes: int) -> int:
        """Return L, which may be 1."""
        check_range("num_classes", num_classes, 1)
        return num_classes

    def example_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the binary cross-entropy, the mean over the labels."""
        from torch.nn.functional import softplus

        losses = softplus(outputs) - outputs * targets.to(outputs.dtype)
        return losses.mean(1)

    def decided(self, outputs: Tensor) -> Tensor:
        """Return 1 where a logit is above 0, a probability above a half."""
        return (outputs > 0).to(outputs.dtype)

    def scores(self, outputs: Tensor) -> Tensor:
        """Return the sigmoid of the logits."""
        return outputs.sigmoid()


class Regression(LearningTask):
    """A number for each example: outputs ``[n, 1]``, targets ``[n]``."""

    name = "regression"
    targets = "targets"
    whole = False
    least_classes = 0
    outputs = "a number"
    counts_hits = False
    metrics = ("rmse", "r2")
    offered = ("rmse", "r2")
    score = ""

    def cast(self, where: str, y: Array, dtype: npt.DTypeLike = np.float32) -> Array:
        """Return finite numbers as ``dtype``, ``[n]``."""
        return as_numbers(where, y, dtype)

    def check(self, what: str, x: Array, y: Array, num_classes: int) -> None:
        """Take any numbers."""

    def class_counts(self, y: Array, num_classes: int) -> Indices:
        """Return nothing, ``[0]``."""
        return np.empty(0, np.int64)

    def width(self, num_classes: int) -> int:
        """Return 1."""
        return 1

    def example_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the squared error."""
        return (outputs[:, 0] - targets.to(outputs.dtype)) ** 2

    def decided(self, outputs: Tensor) -> Tensor:
        """Return the number itself."""
        return outputs[:, 0]


class Segmentation(LearningTask):
    """One of C classes for each pixel: logits ``[n, C, h, w]``, labels ``[n, h, w]``.

    Class 0 is the background, which ``dice`` leaves out.
    """

    name = "segmentation"
    ndim = 3
    least_classes = 2
    instead = "have one for each pixel"
    outputs = "a logit for each class and pixel"
    metrics = ("dice",)
    offered = ("dice", "macro-f1", "confusion")
    of_pixels = True
    score = "dice"

    def cast(self, where: str, y: Array, dtype: npt.DTypeLike = np.float32) -> Array:
        """Return int64 ``[n, h, w]``."""
        return as_masks(where, y)

    def check(self, what: str, x: Array, y: Array, num_classes: int) -> None:
        """Raise unless each image has a mask of its size, with C classes."""
        if x.ndim != 4 or x.shape[2:] != y.shape[1:]:
            raise DataError(
                f"{what}: images of shape {list(x.shape[1:])} have masks of shape "
                f"{list(y.shape[1:])}. Give images [n, c, h, w], and masks [n, h, w] "
                "of the same height and width."
            )
        super().check(what, x, y, num_classes)

    def class_counts(self, y: Array, num_classes: int) -> Indices:
        """Return how many images have a pixel of each class, ``[C]``."""
        pixels = y.reshape(len(y), math.prod(y.shape[1:]))
        there = [(pixels == c).any(1).sum() for c in range(num_classes)]
        return np.array(there, np.int64)

    def output_shape(
        self, num_classes: int, target_shape: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Return ``(n, C, h, w)``."""
        n, *pixels = target_shape
        return n, self.width(num_classes), *pixels

    def example_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy, the mean over the pixels."""
        log_p = outputs.log_softmax(1)
        return -log_p.gather(1, targets[:, None]).flatten(1).mean(1)

    def decided(self, outputs: Tensor) -> Tensor:
        """Return the class with the largest logit at each pixel."""
        return outputs.argmax(1)


TASKS: Mapping[str, LearningTask] = {
    one.name: one
    for one in (
        Classification(),
        MultiLabel(),
        NextToken(),
        Regression(),
        Segmentation(),
    )
}

CLASSIFICATION = Classification.name


def task_named(name: str) -> LearningTask:
    """Return a task by its name.

    Examples
    --------
    >>> task_named("regression").metrics
    ('rmse', 'r2')
    """
    if name not in TASKS:
        raise ConfigurationError(
            f"there is no task {shown(name)}.{closest(str(name), TASKS)} There are "
            f"{', '.join(TASKS)}."
        )
    return TASKS[name]
