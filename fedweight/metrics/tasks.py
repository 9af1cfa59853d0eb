"""Tasks: what a model's outputs mean, and what is minimised and measured of them."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..core.errors import ConfigurationError, check_range, closest
from ..core.texts import shown


class LearningTask:
    """What a model learns to predict.

    Attributes
    ----------
    name : str
        As data and files call it.
    has_classes : bool
        Whether each example is of one of C classes, which methods may count.
    counts_hits : bool
        Whether a prediction is right or wrong, so that there is an accuracy.
    metrics : tuple of str
        What is measured besides the loss and the accuracy, unless told otherwise.
    offered : tuple of str
        What may be measured besides these.
    """

    name: ClassVar[str]
    has_classes: ClassVar[bool] = False
    counts_hits: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ()
    offered: ClassVar[tuple[str, ...]] = ()

    def width(self, num_classes: int) -> int:
        """Return how many numbers a model gives for what it predicts, from C."""
        check_range("num_classes", num_classes, 2)
        return num_classes

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

    def example_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy, ``-log softmax(outputs)[y]``."""
        return F.cross_entropy(outputs, targets, reduction="none")

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
    metrics = ("macro-f1",)
    offered = ("macro-f1", "auc")

    def width(self, num_classes: int) -> int:
        """Return L, which may be 1."""
        check_range("num_classes", num_classes, 1)
        return num_classes

    def example_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the binary cross-entropy, the mean over the labels."""
        losses = F.softplus(outputs) - outputs * targets.to(outputs.dtype)
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
    counts_hits = False
    metrics = ("rmse", "r2")
    offered = ("rmse", "r2")

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
    metrics = ("dice",)
    offered = ("dice", "macro-f1", "confusion")

    def example_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy, the mean over the pixels."""
        log_p = outputs.log_softmax(1)
        return -log_p.gather(1, targets[:, None]).flatten(1).mean(1)

    def decided(self, outputs: Tensor) -> Tensor:
        """Return the class with the largest logit at each pixel."""
        return outputs.argmax(1)


TASKS: dict[str, LearningTask] = {
    one.name: one
    for one in (
        Classification(),
        MultiLabel(),
        NextToken(),
        Regression(),
        Segmentation(),
    )
}


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
