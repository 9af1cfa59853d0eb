"""FedCollab: clients form coalitions before training; each trains a model of its own.

Wenxuan Bao et al., "Optimizing the Collaboration Structure in Cross-Silo Federated
Learning", ICML 2023. How far two clients' data are apart is how well a small
discriminator, trained by the two together, tells whose an example is. The coalitions
make a bound on every client's error small: large ones have much data, alike ones little
distance. Choices that the authors' code shows and the abstract does not are in the
card.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..clients.queries import Answer, ClientQuery
from ..core.errors import ClientError, ConfigurationError
from ..core.rng import Purpose, generator
from ..core.texts import clients_called
from ..messages import keys
from ..server.phase import Given, Population, Question
from ..server.reported import is_count
from .base import WeightingStrategy
from .checks import LARGEST_VALUE
from .round import Round, Selection

log = logging.getLogger("fedweight")

# A client whose examples have more values than this is not believed: a discriminator
# has as many weights for each hidden unit.
MOST_INPUTS = 1e8

Matrix = npt.NDArray[np.float64]
Pair = tuple[int, int]


class FedCollab(WeightingStrategy):
    """Find coalitions of clients first; then FedAvg in each coalition.

    Parameters
    ----------
    trade_off : float
        0 or more, C in the paper: how much a larger coalition is worth. At 0 every
        client that differs from all others stays alone; with a very large one all are
        together.
    divergence : {"inputs", "joint"}
        What discriminators see: inputs, or inputs and labels, which tells clients apart
        that label the same inputs differently.
    discriminator_rounds : int
        1 or more; steps of the discriminators, one a round.
    discriminator_rate : float
        Above 0; the learning rate of their plain SGD.
    hidden : int
        1 or more; hidden units of a discriminator.
    examples : int
        1 or more; a client's examples in a step.
    evaluate_every : int
        1 or more; rounds from one evaluation on held-out data to the next.
    patience : int
        1 or more; a pair is done after so many evaluations without a better one.

    Notes
    -----
    N clients train ``N (N - 1) / 2`` discriminators, of the same number of examples
    from both sides. A pair of which one never answers counts as fully apart. A client
    that joins later goes to the first coalition.
    """

    trade_off: Annotated[float, Field(ge=0)] = 10.0
    divergence: Literal["inputs", "joint"] = "inputs"
    discriminator_rounds: Annotated[int, Field(ge=1)] = 2000
    discriminator_rate: Annotated[float, Field(gt=0)] = 0.01
    hidden: Annotated[int, Field(ge=1)] = 200
    examples: Annotated[int, Field(ge=1)] = 64
    evaluate_every: Annotated[int, Field(ge=1)] = 10
    patience: Annotated[int, Field(ge=1)] = 10

    @property
    def of_classes(self) -> bool:
        """True: clients are told apart by their examples' classes."""
        return True

    def begin(self) -> dict[str, Any]:
        """Know no coalition: then all are together."""
        return {"coalitions": {}, "distances": None}

    def prepare(self, population: Population) -> dict[str, Any]:
        """Measure distances and choose the coalitions."""
        clients = population.clients
        told = {"divergence": self.divergence}
        first = population.ask("discriminate", dict.fromkeys(clients, Question(told)))
        widths = {
            client: answer.metrics["inputs"]
            for client, answer in first.items()
            if is_count(answer.metrics.get(keys.NUM_EXAMPLES))
            and is_count(answer.metrics.get("inputs"), MOST_INPUTS)
        }
        if not widths:
            raise ConfigurationError(
                "FedCollab: no client answered how much data it has; the log says why."
            )
        [(usual, _)] = Counter(widths.values()).most_common(1)
        sizes = {
            client: int(first[client].metrics[keys.NUM_EXAMPLES])
            for client, width in widths.items()
            if width == usual and first[client].metrics[keys.NUM_EXAMPLES] > 0
        }
        odd = [client for client in widths if client not in sizes]
        if odd:
            log.warning(
                "FedCollab leaves out %s: no examples, or inputs that are not of %s "
                "values as most clients'",
                clients_called(odd),
                usual,
            )
        distances = self._distances(population, sizes, usual)
        which = coalitions(distances, list(sizes.values()), self.trade_off, self.seed)
        found = dict(zip(sizes, which, strict=True))
        for one in sorted(set(which)):
            some = [client for client in sizes if found[client] == one]
            log.info("coalition %d: %s", one, clients_called(some))
        return {"coalitions": found, "distances": distances}

    def assign(self, selection: Selection) -> list[int]:
        """Let every client train the model of its coalition."""
        known = selection.state["coalitions"]
        return [known.get(client, 0) for client in selection.clients]

    def weights(self, round: Round) -> Tensor:
        """Return the shares of the coalition's data."""
        return round.size_weights

    def _distances(
        self, population: Population, sizes: Mapping[int, int], inputs: int
    ) -> Matrix:
        """Train a discriminator for each pair; return how far the pairs are apart."""
        clients = list(sizes)
        start = first_discriminator(inputs, self.hidden, self.seed)
        models: dict[Pair, npt.NDArray[np.float32]] = dict.fromkeys(
            combinations(clients, 2), start
        )
        best = dict.fromkeys(models, 0.0)
        waited = dict.fromkeys(models, 0)
        answered: set[Pair] = set()
        for step in range(1, self.discriminator_rounds + 1):
            active = [pair for pair in models if waited[pair] < self.patience]
            if not active:
                break
            last = step == self.discriminator_rounds
            measures = step % self.evaluate_every == 0 or last
            pairs_of = {c: [pair for pair in active if c in pair] for c in clients}
            questions = {
                client: self._question(client, pairs, models, sizes, step, measures)
                for client, pairs in pairs_of.items()
                if pairs
            }
            given = {
                client: answer
                for client, answer in population.ask("discriminate", questions).items()
                if _fits(answer, questions[client])
            }
            for pair in active:
                both = [
                    (given[client], pairs_of[client].index(pair))
                    for client in pair
                    if client in given
                ]
                if len(both) < 2:
                    continue
                answered.add(pair)
                if measures:
                    found = sum(one.metrics["accuracy"][k] for one, k in both) - 1
                    waited[pair] = 0 if found > best[pair] else waited[pair] + 1
                    best[pair] = max(best[pair], min(found, 1.0))
                models[pair] = _mean_of(both)
        matrix = np.zeros((len(clients), len(clients)))
        place = {client: k for k, client in enumerate(clients)}
        for (one, other), found in best.items():
            apart = found if (one, other) in answered else 1.0
            matrix[place[one], place[other]] = matrix[place[other], place[one]] = apart
        return matrix

    def _question(
        self,
        client: int,
        pairs: Sequence[Pair],
        models: Mapping[Pair, npt.NDArray[np.float32]],
        sizes: Mapping[int, int],
        step: int,
        measures: bool,
    ) -> Question:
        told = {
            "divergence": self.divergence,
            "step": step,
            "hidden": self.hidden,
            "examples": self.examples,
            "learning-rate": self.discriminator_rate,
            "measures": measures,
        }
        arrays = {
            "models": np.stack([models[pair] for pair in pairs]),
            "labels": np.array([float(client == pair[1]) for pair in pairs]),
            "sizes": np.array([min(sizes[c] for c in pair) for pair in pairs]),
        }
        return Question(told, arrays)


def _mean_of(both: Sequence[tuple[Given, int]]) -> npt.NDArray[np.float32]:
    """Return the mean of the discriminators that two clients have trained."""
    one, other = (given.arrays["models"][k] for given, k in both)
    return np.asarray((one + other) / 2, np.float32)


def _fits(given: Given, asked: Question) -> bool:
    """Tell whether an answer is one to its question: it may be anything."""
    models, accuracy = given.arrays.get("models"), given.metrics.get("accuracy")
    expected = asked.arrays["models"].shape
    if models is None or models.shape != expected or models.dtype != np.float32:
        return False
    if not (np.abs(models) <= LARGEST_VALUE).all():  # NaN is not, either.
        return False
    if not asked.told["measures"]:
        return True
    if not isinstance(accuracy, list) or len(accuracy) != len(models):
        return False
    return all(0 <= one <= 1 for one in accuracy)


def coalitions(
    distances: Matrix, sizes: Sequence[int], trade_off: float, seed: int = 0
) -> list[int]:
    """Return the coalition of each client, numbered in the clients' order.

    Parameters
    ----------
    distances : ndarray
        ``[N, N]``, symmetric, in [0, 1].
    sizes : Sequence[int]
        N numbers of examples above 0.
    trade_off : float
        C.
    seed : int
        Of the order in which clients are looked at.

    Examples
    --------
    >>> apart = np.array([[0, 0.1, 1], [0.1, 0, 1], [1, 1, 0]])
    >>> coalitions(apart, [100, 100, 100], 10.0)
    [0, 0, 1]
    """
    count = len(sizes)
    found = list(range(count))
    for sweep in range(100):
        before = list(found)
        stream = generator(seed, Purpose.PHASE, sweep)
        for client in stream.permutation(count).tolist():
            others = found[:client] + found[client + 1 :]
            new = min(set(range(count)) - set(others), default=found[client])
            choices = [found[client], *sorted({*others, new} - {found[client]})]
            bounds = []
            for choice in choices:
                found[client] = choice
                bounds.append(error_bound(found, distances, sizes, trade_off))
            found[client] = choices[int(np.argmin(bounds))]
        if found == before:
            break
    names = {one: k for k, one in enumerate(dict.fromkeys(found))}
    return [names[one] for one in found]


def error_bound(
    found: Sequence[int], distances: Matrix, sizes: Sequence[int], trade_off: float
) -> float:
    """Return the mean of the clients' bounds, which coalitions are to make small.

    ``mean_k C sqrt(sum_j a_kj^2 / beta_j / m) + sum_j a_kj D_kj``, with ``m`` examples
    in all, ``beta_j`` a client's share of them, and ``a_kj`` its share in the coalition
    of client k.
    """
    which, n = np.asarray(found), np.asarray(sizes, np.float64)
    together = which[:, None] == which[None, :]
    shares = together * n
    shares /= shares.sum(1, keepdims=True)
    spread = np.sqrt((shares**2 / n).sum(1))  # beta_j m = n_j
    return float((trade_off * spread + (shares * distances).sum(1)).mean())


# The client's half.


def discriminate(asked: ClientQuery) -> Answer:
    """Make one step of the discriminators of a client's pairs.

    Without models in the message, answer how much data there is. Otherwise return the
    models after a step, and with ``measures`` how accurate the received ones are on
    held-out data: whether they take this client's examples for its own.
    """
    told: Any = asked.told
    train = _seen(asked, "train", told["divergence"])
    if "models" not in asked.arrays:
        return Answer({keys.NUM_EXAMPLES: len(train), "inputs": train.shape[1]})
    models = torch.from_numpy(asked.arrays["models"].copy()).requires_grad_()
    labels = torch.from_numpy(asked.arrays["labels"]).float()[:, None]
    sizes = asked.arrays["sizes"]
    order = generator(asked.seed, Purpose.PHASE, 0, asked.client).permutation(
        len(train)
    )
    stream = generator(asked.seed, Purpose.PHASE, told["step"], asked.client)
    drawn = (stream.random((len(sizes), told["examples"])) * sizes[:, None]).astype(int)
    x = train[torch.from_numpy(order[drawn])]  # [pairs, examples, inputs]
    logits = discriminator_logits(models, x, told["hidden"])
    loss = F.binary_cross_entropy_with_logits(
        logits, labels.expand_as(logits), reduction="none"
    )
    (gradient,) = torch.autograd.grad(loss.mean(1).sum(), models)
    metrics: dict[str, Any] = {keys.NUM_EXAMPLES: len(train)}
    with torch.no_grad():
        if told["measures"]:
            part = "held-out" if len(asked.data.held_out) else "train"
            x = _seen(asked, part, told["divergence"])
            logits = discriminator_logits(
                models, x.expand(len(models), *x.shape), told["hidden"]
            )
            right = (logits >= 0) == (labels > 0)
            metrics["accuracy"] = right.double().mean(1).tolist()
        stepped = models - told["learning-rate"] * gradient
    return Answer(metrics, {"models": stepped.numpy()})


def _seen(asked: ClientQuery, part: str, divergence: str) -> Tensor:
    """Return what discriminators see of a part of the data: ``[n, inputs]``."""
    examples = asked.data.train if part == "train" else asked.data.held_out
    if not np.issubdtype(examples.x.dtype, np.floating):
        raise ClientError(
            f"FedCollab's discriminators take numbers, and not {examples.x.dtype}, "
            "which are tokens."
        )
    x = torch.from_numpy(np.array(examples.x, np.float32)).flatten(1)
    if divergence == "joint":
        labels = F.one_hot(torch.from_numpy(np.array(examples.y)), asked.num_classes)
        x = torch.cat([x, labels.float()], 1)
    return x


def first_discriminator(inputs: int, hidden: int, seed: int) -> npt.NDArray[np.float32]:
    """Return a discriminator's initial parameters, uniform as PyTorch's layers are."""
    stream = generator(seed, Purpose.PHASE)
    first, second = inputs**-0.5, hidden**-0.5
    parts = [
        stream.uniform(-first, first, inputs * hidden + hidden),
        stream.uniform(-second, second, hidden + 1),
    ]
    return np.concatenate(parts).astype(np.float32)


def discriminator_logits(models: Tensor, x: Tensor, hidden: int) -> Tensor:
    """Return the logits of MLPs with one hidden layer, ``[pairs, n]``.

    Parameters
    ----------
    models : Tensor
        ``[pairs, (inputs + 1) * hidden + hidden + 1]``.
    x : Tensor
        ``[pairs, n, inputs]``.
    hidden : int
        Hidden units.
    """
    pairs, _, inputs = x.shape
    ends = np.cumsum([inputs * hidden, hidden, hidden]).tolist()
    w1, b1, w2, b2 = torch.tensor_split(models, ends, dim=1)
    h = F.relu(torch.bmm(x, w1.view(pairs, inputs, hidden)) + b1[:, None])
    logits: Tensor = torch.bmm(h, w2[:, :, None])[..., 0] + b2
    return logits
