"""Examples weighed by how likely their labels are right: RENT and DWS.

HeeSun Bae et al., "Dirichlet-based Per-Sample Weighting by Transition Matrix for Noisy
Label Learning", ICLR 2024: Section 3.1 (Dirichlet weights) and Section 3.2
(resampling), with the transition matrix as the authors' code estimates it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...core.errors import ConfigurationError
from ...core.layout import as_tensor
from ...core.options import MOST, checked_fields
from ...messages import keys
from ..batchable import one_hot
from .base import Batch, Facts, Loss, Model, Objective

if TYPE_CHECKING:
    from ..probes import ClientRound

# The share of the examples of a class that may be more sure of it than the one that
# its column of the transition matrix is taken from.
SURER = 0.03


def transition_matrix(likely: Tensor, labels: Tensor) -> Tensor:
    """Return how labels go wrong, ``[C, C]``: entry ``[i, c]`` is i's share of true c.

    Of the examples labelled c one of which the model is very sure that it is of class
    c, at the top 3%, gives column c: the probabilities of its classes. Of a class with
    no example labelled so the labels are taken to be right.

    Parameters
    ----------
    likely : Tensor
        ``[n, C]``: the model's probabilities.
    labels : Tensor
        ``[n]``, int64.

    Examples
    --------
    >>> likely = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8]])
    >>> transition_matrix(likely, torch.tensor([0, 0, 1]))
    tensor([[0.7000, 0.2000],
            [0.3000, 0.8000]])
    """
    classes = likely.shape[1]
    matrix = torch.eye(classes, dtype=likely.dtype)
    for c in range(classes):
        of_class = likely[labels == c]
        if len(of_class):
            order = of_class[:, c].argsort(descending=True, stable=True)
            matrix[:, c] = of_class[order[int(SURER * len(of_class))]]
    return matrix


def transition_sums(client: ClientRound) -> list[float]:
    """Return what a client adds to the transition matrix of all, ``[C * C + C]``.

    Its own matrix by :func:`transition_matrix` with the received model, each column
    times the number of examples with that label, row by row; then these numbers.
    """
    labels = as_tensor(client.data.train.y)
    counts = torch.bincount(labels, minlength=client.num_classes).double()
    if not len(labels):
        return [0.0] * (len(counts) ** 2 + len(counts))
    own = transition_matrix(client.outputs().double().softmax(1), labels)
    return torch.cat([(own * counts).flatten(), counts]).tolist()


def pooled_transition(sums: Tensor, classes: int) -> Tensor:
    """Return the transition matrix of which clients gave the sums, ``[C, C]``.

    Labels of a class that nobody has an example of are taken to be right.

    Parameters
    ----------
    sums : Tensor
        ``[C * C + C]``; those of :func:`transition_sums`, added up.
    classes : int
        C.

    Examples
    --------
    >>> pooled_transition(torch.tensor([2.7, 0.0, 0.3, 0.0, 3.0, 0.0]), 2)
    tensor([[0.9000, 0.0000],
            [0.1000, 1.0000]])
    """
    counts = sums[classes * classes :]
    columns = sums[: classes * classes].view(classes, classes)
    right = torch.eye(classes, dtype=sums.dtype, device=sums.device)
    return torch.where(counts > 0, columns / counts.clamp(min=1), right)


def label_weights(likely: Tensor, labels: Tensor, transition: Tensor) -> Tensor:
    """Return how likely a label is the true one, over how likely it is given, ``[n]``.

    ``p(y = i) / sum_c T[i, c] p(y = c)`` for the label i of each example.

    Parameters
    ----------
    likely, labels : Tensor
        ``[n, C]`` and ``[n]``.
    transition : Tensor
        ``[C, C]``, columns of sum 1; see :func:`transition_matrix`.

    Examples
    --------
    >>> likely = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    >>> transition = torch.tensor([[0.8, 0.2], [0.2, 0.8]])
    >>> label_weights(likely, torch.tensor([0, 1, 0]), transition)
    tensor([1.2162, 0.9091, 0.6250])
    """
    own = one_hot(labels, likely.shape[1], likely.dtype)
    given = (own @ transition * likely).sum(1)
    return (own * likely).sum(1) / (given + 1e-12)


def resampled(weights: Tensor, uniforms: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return how often each example is drawn, ``[n]``, in as many draws as examples.

    With replacement, in proportion to the weights, by the inverse of their
    distribution; where all are 0, alike.

    Parameters
    ----------
    weights, uniforms : Tensor
        ``[n]``: 0 or more, and in [0, 1).
    mask : Tensor, optional
        ``[n]``: 1 for an example, 0 for padding, which comes last.

    Examples
    --------
    >>> resampled(torch.tensor([3.0, 1.0]), torch.tensor([0.7, 0.8]))
    tensor([1., 1.])
    """
    real = torch.ones_like(weights) if mask is None else (mask > 0).to(weights.dtype)
    weights = torch.where(real > 0, weights, 0)
    weights = torch.where(weights.sum() > 0, weights, real)
    reached = weights.cumsum(0)
    places = uniforms.to(weights.dtype) * reached[-1]
    drawn = (reached <= places[:, None]).sum(1).clamp(max=len(weights) - 1)
    return (one_hot(drawn, len(weights), weights.dtype) * real[:, None]).sum(0)


@checked_fields
@dataclass(frozen=True, eq=False)
class RENT(Objective):
    """Cross-entropy of a batch drawn anew, by how likely each label is right.

    As many examples as the batch has are drawn from it with replacement, in proportion
    to ``p(y = i) / sum_c T[i, c] p(y = c)`` for an example labelled i. ``T[i, c]`` is
    how often examples of class c are labelled i. Every batch's weights have a mean of
    1; they are no part of the gradient.

    Parameters
    ----------
    start : int
        1 or more: the round from which this is done; before, it is the cross-entropy,
        from which the model learns what the right labels look like.
    flip : float, optional
        In [0, 1): the share of labels that are wrong, each other class alike, where
        that is known. By default ``T`` is estimated.
    estimate : {"own", "pooled"}
        Whose examples that is with. ``own``: every client's own, in its first round
        from ``start`` on, with the model that it receives, and it keeps the estimate.
        ``pooled``: those of all clients of the round before ``start`` together: each
        estimates, the strategy adds the columns up by the number of examples with each
        label, and tells all clients the sums.

    Notes
    -----
    A client that has few examples of a class estimates that column badly, and takes
    the labels of a class that it has not for right; pooled, a client with few of them
    counts little for their column. Pooled with ``start = 1`` it begins in round 2.
    """

    start: Annotated[int, Field(ge=1, le=MOST)] = 10
    flip: Annotated[float, Field(ge=0, lt=1)] | None = None
    estimate: Literal["own", "pooled"] = "own"

    wants = frozenset({"class-counts", "round"})

    def __post_init__(self) -> None:
        """Refuse to estimate what is known."""
        if self.estimate == "pooled" and self.flip is not None:
            raise ConfigurationError(
                f"objective.flip is {self.flip:g}, so that nothing is estimated: leave "
                "it out, or leave out objective.estimate."
            )

    @property
    def pools(self) -> Mapping[str, int]:  # type: ignore[override]
        """The sums of the clients' matrices, where they are pooled."""
        pooled = self.estimate == "pooled"
        return {keys.TRANSITION_SUMS: max(self.start - 1, 1)} if pooled else {}

    @property
    def hears(self) -> tuple[str, ...]:  # type: ignore[override]
        """The same."""
        return tuple(self.pools)

    def unheard(self, x: Tensor, facts: Facts) -> Mapping[str, Tensor]:
        """Return sums of nobody's examples."""
        classes = len(facts.class_counts)
        none = torch.zeros(classes * classes + classes)
        return dict.fromkeys(self.pools, none)

    def begin(self, facts: Facts) -> Mapping[str, Tensor]:
        """Return what is known of the transition matrix: nothing, or all."""
        if self.estimate == "pooled":
            return {}
        counts = facts.class_counts
        right = torch.eye(len(counts), dtype=counts.dtype)
        if self.flip is None:
            return {"transition": right, "estimated": torch.zeros_like(counts[0])}
        others = (1 - right) * self.flip / max(len(counts) - 1, 1)
        transition = (1 - self.flip) * right + others
        return {"transition": transition, "estimated": torch.ones_like(counts[0])}

    def look(
        self, predict: Callable[[], Tensor], labels: Tensor, facts: Facts
    ) -> Mapping[str, Tensor]:
        """Estimate the transition matrix, once."""
        if (
            self.estimate == "pooled"
            or facts.carry["estimated"] > 0
            or facts.round < self.start
        ):
            return {}
        likely = predict().softmax(1)
        done = torch.ones_like(facts.carry["estimated"])
        return {"transition": transition_matrix(likely, labels), "estimated": done}

    def loss(self, model: Model, batch: Batch, facts: Facts) -> Loss:
        """Return the mean loss, weighed from a round on."""
        outputs = model(batch.x)
        losses = F.cross_entropy(outputs, batch.y, reduction="none")
        likely = outputs.detach().softmax(1)
        begun = facts.round >= self.start
        if self.estimate == "pooled":
            sums, classes = facts.told(keys.TRANSITION_SUMS), outputs.shape[1]
            transition = pooled_transition(sums, classes)
            begun = begun & (sums[classes * classes :].sum() > 0)
        else:
            transition = facts.carry["transition"]
        right = label_weights(likely, batch.y, transition)
        weights = self.weights(right, batch)
        return Loss(batch.mean(losses, torch.where(begun, weights, 1)), outputs)

    def weights(self, right: Tensor, batch: Batch) -> Tensor:
        """Return how much each example counts, ``[n]``, by how likely it is right."""
        return resampled(right, batch.uniform(len(right)), batch.mask)


@checked_fields
@dataclass(frozen=True, eq=False)
class DWS(RENT):
    """Cross-entropy with random weights whose means are how likely labels are right.

    The weights of a batch are drawn from a Dirichlet distribution whose parameters are
    in proportion to RENT's and sum to ``concentration``; the others of its options are
    RENT's.

    Parameters
    ----------
    concentration : float
        Above 0. Towards infinity the weights are their means; the smaller, the fewer
        examples of a batch count at all.

    Notes
    -----
    The authors' repository has this in two versions; this is the one that scales the
    weights to a sum before they are multiplied by the concentration.
    """

    concentration: Annotated[float, Field(gt=0)] = 10.0

    def weights(self, right: Tensor, batch: Batch) -> Tensor:
        """Return random weights, ``[n]``, of sum 1."""
        if batch.mask is not None:
            right = torch.where(batch.mask > 0, right, 0)
        # Where no label is right at all, every one counts alike.
        alike = torch.ones_like(right) if batch.mask is None else batch.mask
        share = torch.where(right.sum() > 0, right, alike.to(right.dtype))
        total = share.sum()
        share = share / torch.where(total > 0, total, 1)
        return batch.log_gamma(self.concentration * share).softmax(0)
