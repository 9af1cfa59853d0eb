"""FedETF: a fixed classifier for all clients, which each fits to itself in the end.

Zexi Li et al., "No Fear of Classifier Biases: Neural Collapse Inspired Federated
Learning with Synthetic and Fixed Classifier", ICCV 2023. While clients train together,
the classifier is the vertices of a simplex, the same for all and never trained
(:class:`fedweight.models.heads.ETFHead`): ``model.head = "etf"``. They minimise the
balanced softmax with their own counts: ``objective.name = "balanced-softmax"``,
``objective.counts = "own"``. The server averages as FedAvg does. What is here comes
after the rounds: the model of each client's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ...core.options import checked_fields
from ..objectives import Part, Plain
from ..objectives.base import Objective
from .base import Personal, Phase

# As the head calls them.
CLASSIFIER, PROJECTION = "etf", "projection"

Rate = Annotated[float, Field(gt=0)]


@checked_fields
@dataclass(frozen=True)
class FedETF(Personal):
    """Personal classifiers and projections, trained in turns once the rounds are over.

    Each turn trains the classifier and then the projection before it, with the plain
    cross-entropy; the features stay the global model's.

    Parameters
    ----------
    turns : int
        How often both are trained, 1 or more.
    epochs : int
        Passes over the client's data for each of the two in each turn, 1 or more.
    classifier_rate : float
        The learning rate of the classifier, above 0.
    projection_rate : float
        The learning rate of the projection before it, above 0.
    """

    when = "end"
    layers = (CLASSIFIER, PROJECTION)
    advice = "Choose a model with such a head: model.head = 'etf'."

    turns: Annotated[int, Field(ge=1)] = 20
    epochs: Annotated[int, Field(ge=1)] = 3
    classifier_rate: Rate = 0.1
    projection_rate: Rate = 0.05

    def phases(self, local: Objective) -> Sequence[Phase]:
        """Return the turns."""
        classifier = Part(Plain(), [CLASSIFIER])
        projection = Part(Plain(), [PROJECTION])
        turn = [
            Phase(classifier, self.epochs, self.classifier_rate),
            Phase(projection, self.epochs, self.projection_rate),
        ]
        return turn * self.turns
