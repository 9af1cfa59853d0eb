"""Additive statistics: sums over examples, of which every measure is made.

What a client, a group or the whole federation achieves is one function of such sums,
and those of the whole are the sum of the parts'. A mean of the clients' F1, AUC or R2
is not that of all their examples; what is made of the sum of their counts is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.errors import AggregationError, ConfigurationError, check_range, closest
from ..core.texts import listed, shown
from ..data.tasks import LearningTask
from .groups import Groups
from .measures import MEASURES
from .parts import EXACT, PARTS, Seen
from .sums import Array, Sums, segment_sums

# A client's statistics are at most so many numbers.
MOST_NUMBERS = 1_000_000


@dataclass(frozen=True)
class Statistics:
    """What is added up to evaluate a model of a task.

    Parameters
    ----------
    task : LearningTask
        What the outputs mean.
    num_classes : int
        C, classes or labels; 0 where there are none, or nothing is counted by class.
    metrics : sequence of str, optional
        What is measured besides the loss and, where there is one, the accuracy: of what
        the task offers. By default what the task measures.
    pixels : int, optional
        1 or more: how many pixels each image has, if all have as many and it is known;
        clients' counts of a segmentation must then be of exactly those.
    groups : Groups, optional
        By which groups examples are counted besides: of each one the loss and how often
        each class is decided on for each; without classes, how much is right.

    Raises
    ------
    ConfigurationError
        If a task does not offer a measure, or a client's sums would be more than
        :data:`MOST_NUMBERS` numbers.

    Examples
    --------
    >>> from fedweight.metrics import task_named
    >>> statistics = Statistics(task_named("regression"))
    >>> outputs, targets = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1, 2, 5])
    >>> sums = statistics.of(outputs, targets, sizes=[1, 2])
    >>> statistics.result(sums)["loss"].tolist()
    [0.0, 2.0]
    >>> statistics.result(sums.total())["rmse"].round(4).tolist()
    [1.1547]
    """

    task: LearningTask
    num_classes: int = 0
    metrics: Sequence[str] | None = None
    pixels: int | None = None
    groups: Groups | None = None

    def __post_init__(self) -> None:
        """Check what is asked for."""
        if self.pixels is not None:
            check_range("pixels", self.pixels, 1)
        metrics = self.task.metrics if self.metrics is None else self.metrics
        object.__setattr__(self, "metrics", tuple(dict.fromkeys(metrics)))
        for name in self.extra:
            if name not in self.task.offered:
                raise ConfigurationError(
                    f"metrics: {self.task.name} has no {shown(name)}."
                    f"{closest(str(name), self.task.offered)} It has "
                    f"{listed(self.task.offered, most=9)}."
                )
        by_class = [name for name in self.extra if self._counts_classes(name)]
        if by_class and self.num_classes < max(1, self.task.least_classes):
            raise ConfigurationError(
                f"num_classes must be {max(1, self.task.least_classes)} or more, got "
                f"{self.num_classes}: {listed(by_class, most=9)} of {self.task.name} "
                "counts each class. Say how many there are."
            )
        if self.groups is not None:
            self._check_groups(self.groups)
        if self.num_numbers > MOST_NUMBERS:
            raise ConfigurationError(
                f"metrics: {listed(self.extra, most=9)} of {self.num_classes:,} "
                f"classes takes {self.num_numbers:,} numbers of each client; at most "
                f"{MOST_NUMBERS:,} are sent. Leave out those that take the most."
            )

    def _check_groups(self, groups: Groups) -> None:
        own = sum(math.prod(self.parts[n]) for n in self.parts if PARTS[n].by_group)
        if own > MOST_NUMBERS:
            raise ConfigurationError(
                f"groups: {groups.count:,} groups of {self.num_classes:,} classes take "
                f"{own:,} numbers of each client; at most {MOST_NUMBERS:,} are sent. "
                "Name fewer attributes, or do not cross them."
            )
        if groups.positive is not None:
            if not self.task.has_classes:
                raise ConfigurationError(
                    f"groups: positive names a class, and {self.task.name} has none. "
                    "Leave it out."
                )
            check_range("positive", groups.positive, 0, self.num_classes - 1)

    @property
    def sends(self) -> bool:
        """Whether clients send their sums: loss and accuracy alone are sent as such."""
        return bool(self.extra) or self.groups is not None

    @property
    def extra(self) -> tuple[str, ...]:
        """What is measured besides the loss and the accuracy."""
        assert self.metrics is not None
        return tuple(self.metrics)

    @staticmethod
    def _counts_classes(name: str) -> bool:
        return any(PARTS[part].shape(1) for part in MEASURES[name].parts)

    @property
    def besides(self) -> tuple[str, ...]:
        """The numbers among them, with the error of those that have one."""
        error = ("auc-error",) if "auc" in self.extra else ()
        return tuple(name for name in (*self.extra, *error) if name != "confusion")

    @property
    def measures(self) -> tuple[str, ...]:
        """All that is measured, by name."""
        usual = ("loss", "accuracy") if self.task.counts_hits else ("loss",)
        return tuple(dict.fromkeys((*usual, *self.extra, *self.besides)))

    @cached_property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """What is added up: the shape of each part, of one client, by name."""
        names = [name for one in self.measures for name in MEASURES[one].parts]
        count = 0
        if self.groups is not None:
            count = self.groups.count
            names += ["group-examples", "group-loss"]
            if self.task.has_classes:
                names.append("group-confusion")
            elif self.task.counts_hits:
                names.append("group-hits")
        return {
            name: (
                *((count,) if PARTS[name].by_group else ()),
                *PARTS[name].shape(self.num_classes),
            )
            for name in dict.fromkeys(["examples", *names])
        }

    @property
    def num_numbers(self) -> int:
        """How many numbers :meth:`rows` makes of a client's sums."""
        return sum(math.prod(shape) for shape in self.parts.values())

    def zero(self, clients: int = 1) -> Sums:
        """Return the sums of clients without examples."""
        return Sums(
            {
                name: np.zeros(
                    (clients, *shape), np.int64 if PARTS[name].counts else np.float64
                )
                for name, shape in self.parts.items()
            }
        )

    def of(
        self,
        outputs: Tensor,
        targets: Tensor,
        sizes: Sequence[int] | None = None,
        attributes: Sequence[Mapping[str, Array]] | None = None,
    ) -> Sums:
        """Add up what a model makes of some examples.

        Parameters
        ----------
        outputs : Tensor
            The model's, ``[n, ...]``.
        targets : Tensor
            What is right, ``[n, ...]``, as the task has it.
        sizes : sequence of int, optional
            How many of the examples each client has, in their order; by default they
            are all of one.
        attributes : sequence of Mapping[str, ndarray], optional
            Of each client's examples, the attributes that :attr:`groups` counts by.
        """
        adding = self.begin([len(targets)] if sizes is None else sizes, attributes)
        adding.add(outputs, targets)
        return adding.sums()

    def begin(
        self,
        sizes: Sequence[int],
        attributes: Sequence[Mapping[str, Array]] | None = None,
    ) -> Adding:
        """Begin to add up, batch by batch, the examples of clients of some sizes."""
        codes = None
        if self.groups is not None:
            codes = self.groups.codes(attributes or [{} for _ in sizes], sizes)
        return Adding(self, np.asarray(sizes, np.int64), codes)

    def result(self, sums: Sums) -> dict[str, Array]:
        """Return what is measured of each client, ``[C]`` each, by name.

        NaN where there are no examples, or a measure is not defined for those.
        """
        with np.errstate(all="ignore"):
            return {name: MEASURES[name].result(sums) for name in self.measures}

    def rows(self, sums: Sums) -> npt.NDArray[np.float64]:
        """Return each client's sums in a row, ``[C, num_numbers]``."""
        several = [
            sums[name].reshape(len(sums), math.prod(shape))
            for name, shape in self.parts.items()
        ]
        return np.concatenate(several, axis=1, dtype=np.float64)

    def read(self, rows: Iterable[Any]) -> tuple[Sums, dict[int, str]]:
        """Return sums of what clients say that theirs are, and who says the impossible.

        Parameters
        ----------
        rows : iterable of list
            What :meth:`rows` makes, a list a client.

        Returns
        -------
        tuple
            Sums of all, with zeros for those that are not believed; and by their place
            why not.
        """
        several = list(rows)
        size = self.num_numbers
        table, odd = np.zeros((len(several), size)), dict[int, str]()
        for place, row in enumerate(several):
            try:
                table[place] = _numbers(row, size)
            except AggregationError as error:
                odd[place] = str(error)
        pieces = self._pieces(table)
        for name, piece in pieces.items():
            if PARTS[name].counts:  # Not beyond what a float counts.
                bad = (piece != np.rint(piece)) | (np.abs(piece) > EXACT)
                self._tell(odd, name, bad.any(axis=tuple(range(1, bad.ndim))))
        of_none = (pieces["examples"] == 0) & table.any(1)
        for place in np.flatnonzero(of_none).tolist():
            odd.setdefault(place, "its statistics are of no examples, but not all 0")
        table[list(odd)] = 0
        sums = self._split(table)
        for name in self.parts:
            self._tell(odd, name, PARTS[name].impossible(sums, self))
        table[list(odd)] = 0
        return self._split(table), odd

    @staticmethod
    def _tell(odd: dict[int, str], name: str, bad: npt.NDArray[np.bool_]) -> None:
        for place in np.flatnonzero(bad).tolist():
            odd.setdefault(place, f"its statistics have impossible '{name}'")

    def _split(self, table: npt.NDArray[np.float64]) -> Sums:
        pieces = self._pieces(table).items()
        return Sums(
            {n: p.astype(np.int64) if PARTS[n].counts else p for n, p in pieces}
        )

    def _pieces(self, table: npt.NDArray[np.float64]) -> dict[str, Array]:
        """Return views of the columns of each part, ``[C, ...]``."""
        ends = np.cumsum([math.prod(shape) for shape in self.parts.values()])[:-1]
        return {
            name: piece.reshape(len(table), *shape)
            for (name, shape), piece in zip(
                self.parts.items(), np.split(table, ends, axis=1), strict=True
            )
        }


def _numbers(row: Any, size: int) -> npt.NDArray[np.float64]:
    if not isinstance(row, list) or len(row) != size:
        raise AggregationError(
            f"its statistics must be a list of {size} numbers, got {shown(row)}"
        )
    try:
        values = np.array(row, np.float64)
    except (TypeError, ValueError, OverflowError):
        values = np.full(size, np.nan)
    if not np.isfinite(values).all() or np.abs(values).max(initial=0) > 1e300:
        raise AggregationError(
            f"its statistics must be finite numbers, got {shown(row)}"
        )
    return values


@dataclass
class Adding:
    """Sums of some clients' examples, as batches of them come in the clients' order."""

    statistics: Statistics
    sizes: npt.NDArray[np.int64]
    codes: npt.NDArray[np.int64] | None = None  # The examples' groups, [n, tables].
    _seen: int = 0
    _counts: dict[str, Array] = field(default_factory=dict)
    _values: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin with nothing."""
        for name in self.statistics.parts:
            if name == "examples":
                continue
            if PARTS[name].counts:
                shape = (len(self.sizes), *self.statistics.parts[name])
                self._counts[name] = np.zeros(shape, np.int64)
            else:
                self._values[name] = []

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Add the next examples."""
        task, num_classes = self.statistics.task, self.statistics.num_classes
        seen = Seen(task, outputs, targets, num_classes)
        for name, values in self._values.items():
            values.append(PARTS[name].of(seen))
        if self._counts and len(targets):
            owners = self._owners[self._seen : self._seen + len(targets)]
            first, last = int(owners[0]), int(owners[-1])
            seen.owners = torch.from_numpy(owners - first).to(outputs.device)
            seen.clients = last - first + 1
            if self.codes is not None and self.statistics.groups is not None:
                own = self.codes[self._seen : self._seen + len(targets)]
                seen.groups = torch.from_numpy(own).to(outputs.device)
                seen.num_groups = self.statistics.groups.count
            for name, counts in self._counts.items():
                found = PARTS[name].of(seen).cpu().numpy()
                counts[first : last + 1] += found.reshape(-1, *counts.shape[1:])
        self._seen += len(targets)

    @cached_property
    def _owners(self) -> npt.NDArray[np.int64]:
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def sums(self) -> Sums:
        """Return what was added up."""
        if self._seen != int(self.sizes.sum()):
            raise ConfigurationError(
                f"sizes: {int(self.sizes.sum())} examples were announced, and "
                f"{self._seen} came."
            )
        found: dict[str, Array] = {"examples": self.sizes, **self._counts}
        columns = [torch.cat(v).double() for v in self._values.values() if v]
        # Brought from the device all at once.
        none = np.empty((len(self._values), 0))
        table = torch.stack(columns).cpu().numpy() if columns else none
        values = dict(zip(self._values, table, strict=True))
        whole = [name for name in values if not PARTS[name].by_group]
        sums = segment_sums(np.stack([values[name] for name in whole]), self.sizes)
        found |= dict(zip(whole, sums, strict=True))
        by_group = {n: own for n, own in values.items() if PARTS[n].by_group}
        return Sums(
            {
                name: found[name] if name in found else self._by_group(by_group[name])
                for name in self.statistics.parts
            }
        )

    def _by_group(self, values: npt.NDArray[np.float64]) -> Array:
        """Return the sum of each client's values by group, ``[C, G]``."""
        groups = self.statistics.groups
        assert groups is not None
        assert self.codes is not None
        sums = np.zeros((len(self.sizes), groups.count))
        for codes, table in zip(self.codes.T, groups.slices, strict=True):
            told = np.flatnonzero(codes >= 0)
            width = table.stop - table.start
            cells = self._owners[told] * width + codes[told] - table.start
            # In a cell the examples keep their order, so it decides the last bit.
            order = told[np.argsort(cells, kind="stable")]
            counts = np.bincount(cells, minlength=len(self.sizes) * width)
            found = segment_sums(values[None, order], counts)
            sums[:, table] = found.reshape(-1, width)
        return sums
