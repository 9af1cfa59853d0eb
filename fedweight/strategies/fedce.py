"""FedCE: a client counts by what the others would lose without it.

Meirui Jiang et al., "Fair Federated Medical Image Segmentation via Client
Contribution Estimation", CVPR 2023. Contribution is estimated in gradient space (how
little a client's update points where everybody else's goes) and in data space (how
badly a model made without the client does on the client's own data).

The authors' research code never stored the new coefficients on the server; the FedCE
of NVIDIA FLARE 2.9 does. That differs from the second round on: ``consensus``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..clients.probes import ClientRound, Part
from ..core.layout import FlatModel
from ..messages import keys
from ..server.admission import check_fraction
from .base import Told, WeightingStrategy
from .round import Report, Round, Selection

# What the minus model's error is measured on.
MEASURED: Part = "held-out or train"


class FedCE(WeightingStrategy):
    """Weigh clients by their estimated contribution.

    Each round, with the coefficients ``c`` of the last one (``1 / K`` at first):

    1. ``s_k = cos(update_k, sum_{j != k} c_j update_j)``, averaged over all rounds;
    2. ``g`` proportional to ``1 - mean s``, ``h`` to the minus model's error ``e``;
    3. ``c`` proportional to ``g + h`` (``plus``) or ``g * h`` (``times``).

    Each client is told its ``c_k``. From its second round on it evaluates the minus
    model ``(w - c_k w_k) / (1 - c_k)``, with ``w_k`` the model it sent last, on its
    held-out data, and reports the error in [0, 1], averaged over its rounds. The minus
    model's buffers, such as running statistics, are those of ``w``.

    Parameters
    ----------
    mode : {"plus", "times"}
        How the two estimates are joined.
    consensus : {"evolving", "uniform"}
        Whether step 1 uses the last coefficients or, as the research code does by
        accident, always ``1 / K``.
    floor : float
        In [0, 1); estimates below it count as it, so above 0 nobody is shut out. 1e-6
        in NVIDIA FLARE, 1e-3 in the research code.
    clip : {"before", "after"}
        Whether the floor applies before estimates and weights are made to sum to one,
        or after it as in the research code: then no weight is below the floor, and
        they may sum to up to ``1 + K * floor``.
    min_replies : int
        2 or more: one client has no others to be compared with.

    Notes
    -----
    The method assumes that all clients take part in every round. Where they do not,
    who is away keeps coefficient and mean, and who is new enters with
    ``1 / (clients known + 1)``; that is this library's choice. The method *raises* the
    weight of dissimilar and badly served clients, which includes broken ones.
    """

    request = (keys.MINUS_ERROR,)

    min_replies: Annotated[int, Field(ge=2)] = 2
    mode: Literal["plus", "times"] = "plus"
    consensus: Literal["evolving", "uniform"] = "evolving"
    floor: Annotated[float, Field(ge=0, lt=1)] = 1e-6
    clip: Literal["before", "after"] = "before"

    def begin(self) -> dict[str, dict[int, float]]:
        """Know nobody: no coefficient, mean cosine and number of rounds by client."""
        return {"coefficients": {}, "cosines": {}, "rounds": {}}

    def tell(self, selection: Selection) -> Mapping[str, Told]:
        """Tell a client its coefficient; nothing before its first round is over."""
        known = selection.state["coefficients"]
        return {keys.COEFFICIENT: [known.get(client) for client in selection.clients]}

    def admit(self, report: Report) -> None:
        """Reject an error outside [0, 1]."""
        check_fraction(report.metrics, keys.MINUS_ERROR)

    def weights(self, round: Round) -> tuple[Tensor, dict[str, dict[int, float]]]:
        """Return the new coefficients, which are remembered."""
        known, clients = round.state, round.clients
        cosines = minus_cosines(round, self._consensus(round))
        rounds = [known["rounds"].get(client, 0) + 1 for client in clients]
        before = [known["cosines"].get(client, 0.0) for client in clients]
        mean = torch.tensor(before, dtype=torch.float64)
        mean += (cosines - mean) / torch.tensor(rounds, dtype=torch.float64)
        error = round.metric(keys.MINUS_ERROR)
        gradient, data = self._share(1 - mean), self._share(error)
        joined = gradient + data if self.mode == "plus" else gradient * data
        coefficients = self._share(joined)
        round.log("cosine", cosines)
        round.log("gradient-contribution", gradient)
        round.log("data-contribution", data)
        new = {
            "coefficients": coefficients.tolist(),
            "cosines": mean.tolist(),
            "rounds": rounds,
        }
        return coefficients, {
            name: {**known[name], **dict(zip(clients, values, strict=True))}
            for name, values in new.items()
        }

    def _consensus(self, round: Round) -> Tensor:
        """Return what each client counts in the consensus that it is held against."""
        known = round.state["coefficients"]
        uniform = 1 / round.num_clients
        if self.consensus == "uniform" or not known:
            return torch.full((round.num_clients,), uniform, dtype=torch.float64)
        new = 1 / (len(known) + 1)
        return torch.tensor(
            [known.get(client, new) for client in round.clients], dtype=torch.float64
        )

    def _share(self, raw: Tensor) -> Tensor:
        """Return values as shares of their sum, with the floor before or after."""
        raw = raw.clamp(min=self.floor if self.clip == "before" else 0.0)
        total = raw.sum()
        shares = raw / total if total > 0 else torch.full_like(raw, 1 / len(raw))
        return shares if self.clip == "before" else shares.clamp(min=self.floor)


def minus_error(client: ClientRound) -> float:
    """Return the error of all rounds' models without this client, on average.

    The client's half of the method, in [0, 1]. The minus model is ``(w - c w_own) / (1
    - c)`` with the model that the client sent last; its score (the accuracy, or Dice of
    masks) is measured on the held-out part, or on the training data where there is
    none. Dice is 1 where there is nothing to find, and nothing was found. A first round
    counts as score 0, and stays in the mean. It is one where the server tells no
    coefficient: it has none of this client.
    """
    scores = [0.0]
    if _last(client) is not None:
        past = client.kept_numbers("minus-error-accuracies")
        score = client.evaluate(minus_model, MEASURED).score
        if math.isnan(score) and len(client.part(MEASURED)):
            score = 1.0  # There is nothing to find, and nothing was found.
        scores = [*past, score]
    client.keep("minus-error-model", client.trained)
    client.keep("minus-error-accuracies", scores)
    return 1 - sum(scores) / len(scores)


def minus_model(client: ClientRound) -> FlatModel | None:
    """Return all rounds' models without the client's last one, if it has one."""
    last = _last(client)
    if last is None:
        return None
    (own, c), w = last, client.received
    # Buffers stay the global model's: they were averaged by data size, and what
    # is left of a variance without another share of it may be negative.
    parameters = own.parameters * c
    torch.sub(w.parameters, parameters, out=parameters).div_(1 - c)
    return w.with_parameters(parameters)


def _last(client: ClientRound) -> tuple[FlatModel, float] | None:
    """Return the model that a client sent last, and what it counted; if it has both."""
    own = client.kept_model("minus-error-model")
    told = client.told.get(keys.COEFFICIENT)
    return None if own is None or told is None else (own, min(float(told), 0.999))


def minus_cosines(round: Round, coefficients: Tensor) -> Tensor:
    """Return ``cos(update_k, G - c_k update_k)``, ``G = sum_j c_j update_j``: ``[K]``.

    The difference is formed before it is measured: in the digits of ``|G|^2`` it is
    lost where one update is far longer than the others. The cosine is 0 where either
    vector is, up to rounding.
    """
    updates, start = round.updates, round.model.parameters
    inner, norms, rest = updates.dot_rest(weights=coefficients, own=coefficients)
    # G is summed from the models, so that its digits end where theirs do.
    last_digits = torch.finfo(updates.dtype).eps * (
        torch.linalg.vector_norm(start.double()) + coefficients * norms
    )
    product = norms * torch.where(rest > 4 * last_digits, rest, 0.0)
    cosines = inner / product.clamp(min=1e-300)
    return torch.where(product > 0, cosines.clamp(-1, 1), 0.0)
