"""The parts that are added up over examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.errors import DataError
from ..data.tasks import LearningTask, MultiLabel
from .sums import Array, Sums

if TYPE_CHECKING:
    from .additive import Statistics

Flags = npt.NDArray[np.bool_]
Impossible = Callable[[Sums, "Statistics"], Flags]

# A client counts no more than a float64 tells apart.
EXACT = 2.0**53

# Targets, and losses other than squared errors, are believed to be at most so large in
# the mean over a client's examples; squares at most the square of that. No task's loss
# is negative, but for what rounding to float32 leaves of it.
MOST_MEAN = 1e15
ROUNDING = 1e-4

# Log-odds are counted in so many bins: equal ones of asinh(8 s), where s is limited to
# SPAN; so they are fine where scores are near each other, and reach to 1e-7 and beyond.
BINS = 256
FINENESS = 8.0
SPAN = 16.0


@dataclass
class Seen:
    """A batch of examples, as parts look at it.

    Attributes
    ----------
    task : LearningTask
        What the outputs mean.
    outputs, targets : Tensor
        ``[n, ...]``.
    num_classes : int
        C.
    owners : Tensor, optional
        ``[n]``: whose each example is, from 0.
    clients : int
        How many owners there are.
    groups : Tensor, optional
        ``[n, tables]``: in which group of each table an example is, or in none.
    num_groups : int
        G.
    """

    task: LearningTask
    outputs: Tensor
    targets: Tensor
    num_classes: int
    owners: Tensor | None = None
    clients: int = 1
    groups: Tensor | None = None
    num_groups: int = 0

    @cached_property
    def losses(self) -> Tensor:
        """The loss of each example, ``[n]``."""
        return self.task.example_losses(self.outputs, self.targets)

    @cached_property
    def hits(self) -> Tensor:
        """Which share of each example's decisions is right, ``[n]``."""
        return self.task.example_hits(self.outputs, self.targets)

    @cached_property
    def truth(self) -> Tensor:
        """The true class of each decision, ``[m]``, or labels ``[n, L]`` of 0 and 1."""
        targets, labels = self.targets, isinstance(self.task, MultiLabel)
        most = 1 if labels else self.num_classes - 1
        low, high = float(targets.min()), float(targets.max())
        if not 0 <= low <= high <= most:
            raise DataError(
                f"targets: they reach from {low:g} to {high:g}, but {self.task.name} "
                f"has 0 to {most}."
            )
        return targets.long() if labels else targets.flatten()

    @cached_property
    def decided(self) -> Tensor:
        """What the model decides, as :attr:`truth`."""
        decided = self.task.decided(self.outputs)
        labels = isinstance(self.task, MultiLabel)
        return decided.long() if labels else decided.flatten()

    @cached_property
    def codes(self) -> Tensor:
        """By decision, C times its owner: where the owner's counts begin, ``[m]``."""
        assert self.owners is not None
        each = self.targets[0].numel() if self.targets.ndim > 1 else 1
        return self.owners.repeat_interleave(each) * self.num_classes

    def count(self, places: Tensor, size: int) -> Tensor:
        """Count how often each of ``size`` places of an owner occurs, ``[C, size]``."""
        found = torch.bincount(places.flatten(), minlength=self.clients * size)
        return found.view(self.clients, size)


@dataclass(frozen=True)
class Part:
    """Something that is added up.

    Attributes
    ----------
    of : Callable[[Seen], Tensor]
        Counts ``[C, ...]`` of a batch; or the value of each example, ``[n]``.
    shape : Callable[[int], tuple of int]
        The shape of one client's, from the number of classes.
    impossible : Callable[[Sums, Statistics], ndarray]
        Which clients' cannot be, ``[C]``.
    counts : bool
        Whether it is counted, and so exact.
    by_group : bool
        Whether there is one of each group: counts ``[C, G, ...]``, and values of
        examples that are added up by group.
    """

    of: Callable[[Seen], Tensor]
    impossible: Impossible
    shape: Callable[[int], tuple[int, ...]] = lambda num_classes: ()
    counts: bool = False
    by_group: bool = False


def _labels_of(seen: Seen) -> Tensor:
    """Return, by class, how often it is true, decided on, and both: ``[C, 3, K]``."""
    truth, decided = seen.truth, seen.decided
    if truth.ndim == 2:
        assert seen.owners is not None
        each = torch.stack([truth, decided, truth * decided], 1)
        zeros = each.new_zeros(seen.clients, *each.shape[1:])
        return zeros.index_add_(0, seen.owners, each)
    right = truth == decided
    several = (truth, decided, truth[right])
    places = (seen.codes, seen.codes, seen.codes[right])
    counts = [
        seen.count(place + code, seen.num_classes)
        for place, code in zip(places, several, strict=True)
    ]
    return torch.stack(counts, 1)


def _confusion_of(seen: Seen) -> Tensor:
    """Return how often class j was decided on where i is true, ``[C, K, K]``."""
    places = (seen.codes + seen.truth) * seen.num_classes + seen.decided
    return seen.count(places, seen.num_classes**2)


def _group_examples_of(seen: Seen) -> Tensor:
    """Return how many examples are in each group, ``[C, G]``."""
    places, told = _group_places(seen)
    return seen.count(places[told], seen.num_groups)


def _group_confusion_of(seen: Seen) -> Tensor:
    """Return, by group, how often class j was decided on where i is true."""
    places, told = _group_places(seen)
    pairs = seen.truth * seen.num_classes + seen.decided
    cells = places * seen.num_classes**2 + pairs[:, None]
    return seen.count(cells[told], seen.num_groups * seen.num_classes**2)


def _group_places(seen: Seen) -> tuple[Tensor, Tensor]:
    """Return where each example's owner counts its groups, and which of them are."""
    assert seen.groups is not None
    assert seen.owners is not None
    return seen.owners[:, None] * seen.num_groups + seen.groups, seen.groups >= 0


def _scores_of(seen: Seen) -> Tensor:
    """Count the log-odds of each class by bin, of others and its own examples.

    ``[C, K, 2, BINS]``; log-odds are ``log p - log (1 - p)``.
    """
    outputs, truth = seen.outputs.double(), seen.truth
    if truth.ndim == 2:
        odds, positive = outputs, truth
    else:
        log_p = outputs.log_softmax(1)
        odds = log_p - (-torch.expm1(log_p)).log()
        classes = torch.arange(seen.num_classes, device=truth.device)
        positive = (truth[:, None] == classes).long()
    limit = float(np.arcsinh(FINENESS * SPAN))
    scaled = torch.asinh(FINENESS * odds.nan_to_num(0.0).clamp(-SPAN, SPAN)) / limit
    bins = ((scaled + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
    assert seen.owners is not None
    width = odds.shape[1]
    columns = seen.owners[:, None] * width + torch.arange(width, device=truth.device)
    return seen.count((columns * 2 + positive) * BINS + bins, width * 2 * BINS)


def _odd_examples(sums: Sums, which: Statistics) -> Flags:
    return _any(sums["examples"] < 0)


def _odd_loss(sums: Sums, which: Statistics) -> Flags:
    most = MOST_MEAN if which.task.counts_hits else MOST_MEAN**2
    return _beyond(sums, "loss", -ROUNDING, most)


def _odd_errors(sums: Sums, which: Statistics) -> Flags:
    return _beyond(sums, "squared-error", 0.0, MOST_MEAN**2)


def _odd_targets(sums: Sums, which: Statistics) -> Flags:
    return _beyond(sums, "targets", -MOST_MEAN, MOST_MEAN)


def _beyond(sums: Sums, name: str, least: float, most: float) -> Flags:
    """Tell where the mean over the examples lies beyond limits."""
    values, n = sums[name], sums["examples"]
    return _any((values < least * n) | (values > most * n))


def _too_many_hits(sums: Sums, which: Statistics) -> Flags:
    return _any((sums["hits"] < 0) | (sums["hits"] > sums["examples"]))


def _added(counts: Array, axes: int | tuple[int, ...]) -> Array:
    """Add counts up as float64: exact to 2**53, and beyond it nothing wraps around."""
    return np.asarray(counts.sum(axes, dtype=np.float64))


def _odd_labels(sums: Sums, which: Statistics) -> Flags:
    counts = sums["labels"]
    true, decided, both = counts[:, 0], counts[:, 1], counts[:, 2]
    odd: Flags = _any(counts < 0) | _any(both > np.minimum(true, decided))
    if isinstance(which.task, MultiLabel):
        return odd | _any(np.maximum(true, decided) > sums["examples"][:, None])
    totals = _added(true, 1)
    odd |= _any(totals != _added(decided, 1))
    return odd | _odd_total(totals, sums, which)


def _odd_confusion(sums: Sums, which: Statistics) -> Flags:
    counts = sums["confusion"]
    return _any(counts < 0) | _odd_total(_added(counts, (1, 2)), sums, which)


def _odd_total(totals: Array, sums: Sums, which: Statistics) -> Flags:
    """Tell where there are not as many decisions as the examples have, one or more."""
    examples = sums["examples"]
    if which.task.has_classes:
        return _any(totals != examples)
    if which.pixels is not None:
        return _any(totals != examples.astype(np.float64) * which.pixels)
    return _any((totals < examples) | (totals > EXACT))


def _odd_scores(sums: Sums, which: Statistics) -> Flags:
    counts = sums["scores"]
    totals = _added(counts, (2, 3))
    return _any(counts < 0) | _any(totals != sums["examples"][:, None])


def _odd_squares(sums: Sums, which: Statistics) -> Flags:
    """Tell where squares are less than their numbers' sum allows (A.-L. Cauchy)."""
    squares, total, n = sums["squared-targets"], sums["targets"], sums["examples"]
    with np.errstate(all="ignore"):
        least = total**2 / np.maximum(n, 1)
    odd = _beyond(sums, "squared-targets", 0.0, MOST_MEAN**2)
    return odd | _any(squares < (1 - 1e-9) * least)


def _odd_group_examples(sums: Sums, which: Statistics) -> Flags:
    """Tell where the groups of a table have more examples than there are."""
    counts = sums["group-examples"]
    odd = _any(counts < 0)
    for table in which.groups.slices if which.groups is not None else ():
        odd |= _added(counts[:, table], 1) > sums["examples"]
    return odd


def _odd_group_loss(sums: Sums, which: Statistics) -> Flags:
    most = MOST_MEAN if which.task.counts_hits else MOST_MEAN**2
    values, n = sums["group-loss"], sums["group-examples"]
    return _any((values < -ROUNDING * n) | (values > most * n))


def _odd_group_hits(sums: Sums, which: Statistics) -> Flags:
    values = sums["group-hits"]
    return _any((values < 0) | (values > sums["group-examples"]))


def _odd_group_confusion(sums: Sums, which: Statistics) -> Flags:
    counts = sums["group-confusion"]
    return _any(counts < 0) | _any(_added(counts, (2, 3)) != sums["group-examples"])


def _any(flags: npt.NDArray[np.bool_]) -> Flags:
    """Tell of each client whether any of its values is flagged."""
    return np.asarray(flags.any(axis=tuple(range(1, flags.ndim))))


# By name.
PARTS: Mapping[str, Part] = {
    "examples": Part(lambda seen: seen.targets, _odd_examples, counts=True),
    "loss": Part(lambda seen: seen.losses, _odd_loss),
    "squared-error": Part(
        lambda seen: (seen.outputs[:, 0].double() - seen.targets.double()) ** 2,
        _odd_errors,
    ),
    "hits": Part(lambda seen: seen.hits, _too_many_hits),
    "targets": Part(lambda seen: seen.targets.double(), _odd_targets),
    "squared-targets": Part(lambda seen: seen.targets.double() ** 2, _odd_squares),
    "labels": Part(_labels_of, _odd_labels, lambda k: (3, k), counts=True),
    "confusion": Part(_confusion_of, _odd_confusion, lambda k: (k, k), counts=True),
    "scores": Part(_scores_of, _odd_scores, lambda k: (k, 2, BINS), counts=True),
    "group-examples": Part(
        _group_examples_of, _odd_group_examples, counts=True, by_group=True
    ),
    "group-loss": Part(lambda seen: seen.losses, _odd_group_loss, by_group=True),
    "group-hits": Part(lambda seen: seen.hits, _odd_group_hits, by_group=True),
    "group-confusion": Part(
        _group_confusion_of,
        _odd_group_confusion,
        lambda k: (k, k),
        counts=True,
        by_group=True,
    ),
}
