"""Groups of examples, such as women and men, and what a model achieves on each.

What is added up by group is part of a client's sums, so a group's result at a client,
at all clients, or on the server's test data is one function of such sums. Groups that
are too small are left out where the examples are, before anything is sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import ConfigurationError, DataError, check_range
from ..core.texts import listed, plain
from .sums import Array, Sums

Codes = npt.NDArray[np.int64]

# Stands between the attributes, and the groups, of an intersection.
AND = " & "

# The code of an example that is in no group: its own is too small to be told.
MASKED = -1


def equity_scaled(overall: float, groups: Sequence[float]) -> float:
    """Return a measure that groups' differences make smaller: m / (1 + sum |m_g - m|).

    Parameters
    ----------
    overall : float
        The measure m of all examples, such as an accuracy or Dice; more is better.
    groups : sequence of float
        m_g, of each group. NaN, of a group without examples, is left out.

    Returns
    -------
    float
        ``overall`` where all groups have that, less where some have more or less. For a
        measure in [0, 1] it lies in [0, 1]: 0 where m is 0, and 1 where m and all m_g
        are 1.

    References
    ----------
    Y. Tian et al., "FairSeg: A Large-Scale Medical Image Segmentation Dataset for
    Fairness Learning Using Segment Anything Model with Fair Error-Bound Scaling", ICLR
    2024, with a weight of 1.

    Examples
    --------
    >>> round(equity_scaled(0.8, [0.9, 0.7]), 8)
    0.66666667
    """
    gaps = [abs(own - overall) for own in groups if not math.isnan(own)]
    return overall / (1 + math.fsum(gaps))


@dataclass(frozen=True)
class Groups:
    """By which groups examples are counted.

    Parameters
    ----------
    names : Mapping[str, tuple of str]
        By sensitive attribute, what its codes 0, 1, ... stand for.
    intersections : bool
        Whether the groups of each two attributes are crossed, too: women who are Black.
    min_size : int
        1 or more. What a client tells of an attribute's groups, and whatever can be
        computed of that and of what it tells of all its examples, is of no example or
        of so many at least; where attributes are crossed that holds of all of them
        together. See :meth:`codes`.
    positive : int, optional
        The class that it is good to be given, such as a loan: selection rate, true and
        false positive rate are of it. By default class 1 of two; with more classes
        there are none of these.

    Raises
    ------
    ConfigurationError
        If no attribute is named, one is called by what stands between two that are
        crossed, or ``min_size`` is below 1.

    Examples
    --------
    >>> groups = Groups({"sex": ("f", "m"), "old": ("no", "yes")}, intersections=True)
    >>> [name for _, name in groups.labels]
    ['f', 'm', 'no', 'yes', 'f & no', 'f & yes', 'm & no', 'm & yes']
    >>> own = {"sex": np.array([0, 1]), "old": np.array([1, 1])}
    >>> groups.codes([own], [2]).tolist()
    [[0, 3, 5], [1, 3, 7]]
    """

    names: Mapping[str, tuple[str, ...]]
    intersections: bool = False
    min_size: int = 1
    positive: int | None = None

    def __post_init__(self) -> None:
        """Check that there are groups, and the size."""
        if not self.names:
            raise ConfigurationError("groups must name an attribute or more.")
        for name in self.names:
            if AND in name:
                raise ConfigurationError(
                    f"groups: attribute '{plain(name)}' must not hold '{AND}', which "
                    "stands between two attributes that are crossed. Rename it."
                )
        check_range("min_size", self.min_size, 1)

    @property
    def tables(self) -> list[tuple[str, ...]]:
        """What is counted: each attribute, and each two where they are crossed."""
        pairs = combinations(self.names, 2) if self.intersections else ()
        return [*((name,) for name in self.names), *pairs]

    @cached_property
    def slices(self) -> list[slice]:
        """Where the groups of each table are among all of them."""
        sizes = [math.prod(len(self.names[a]) for a in one) for one in self.tables]
        ends = np.cumsum(sizes).tolist()
        return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]

    @property
    def count(self) -> int:
        """How many groups there are: G, of all tables."""
        return int(self.slices[-1].stop)

    @cached_property
    def labels(self) -> list[tuple[str, str]]:
        """Attribute and group, as tables of a run call them, ``[G]``."""
        found = []
        for one in self.tables:
            shape = [len(self.names[a]) for a in one]
            for places in np.ndindex(*shape):
                pairs = zip(one, places, strict=True)
                own = AND.join(self.names[a][place] for a, place in pairs)
                found.append((AND.join(one), own))
        return found

    def codes(
        self, attributes: Sequence[Mapping[str, Array]], sizes: Sequence[int]
    ) -> Codes:
        """Return the groups of each example of some clients, by table.

        Examples of a client's groups that have fewer than :attr:`min_size` examples
        there are in none. If they are fewer than that all together, they are the
        difference between the client's other groups and all of its examples; so the
        smallest of the other groups are left out with them, until they are enough.
        Where attributes are crossed, this is done with the groups that all of them
        make together, and an example is left out of all tables or of none: then no sum
        or difference of what is told is of fewer than ``min_size`` examples. Otherwise
        it is done for each attribute by itself: who knows how two of them overlap may
        subtract a group of one from a group of the other.

        Parameters
        ----------
        attributes : sequence of Mapping[str, ndarray]
            Of each client's examples, by name: codes ``[n]``.
        sizes : sequence of int
            How many examples each client has.

        Returns
        -------
        ndarray
            ``[N, tables]`` of all N examples, one client after another: numbers from 0
            to G - 1, or :data:`MASKED`.

        Raises
        ------
        DataError
            If examples have no such attribute, or one that is no code of a group.
        """
        columns = {name: self._column(name, attributes, sizes) for name in self.names}
        total = int(np.sum(sizes, dtype=np.int64))
        found = np.empty((total, len(self.tables)), np.int64)
        for place, (one, where) in enumerate(
            zip(self.tables, self.slices, strict=True)
        ):
            found[:, place] = where.start + self._cells(columns, one)
        if self.min_size > 1:
            owners = np.repeat(np.arange(len(sizes)), sizes)
            if self.intersections:
                cells = self._cells(columns, tuple(self.names))
                found[self._too_small(cells, owners)] = MASKED
            else:
                for place in range(len(self.tables)):
                    small = self._too_small(found[:, place], owners)
                    found[small, place] = MASKED
        return found

    def _column(
        self, name: str, attributes: Sequence[Mapping[str, Array]], sizes: Sequence[int]
    ) -> Codes:
        several = []
        for own, size in zip(attributes, sizes, strict=True):
            if size and name not in own:
                raise DataError(
                    f"groups: the examples have no attribute '{name}'; they have "
                    f"{listed(sorted(own), most=9) or 'none'}."
                )
            several.append(own[name] if size else np.empty(0, np.int64))
        column = np.concatenate([np.empty(0, np.int64), *several])
        codes = column.astype(np.int64)
        number = len(self.names[name])
        if len(codes) and not (
            (codes == column).all() and 0 <= codes.min() <= codes.max() < number
        ):
            raise DataError(
                f"groups: '{name}' must be codes from 0 to {number - 1}, for "
                f"{listed(self.names[name], most=9)}, got values from {column.min()} "
                f"to {column.max()}."
            )
        return codes

    def _cells(self, columns: Mapping[str, Codes], one: tuple[str, ...]) -> Codes:
        """Return the places of examples in a table of some attributes, row by row."""
        cells = columns[one[0]]
        for name in one[1:]:
            cells = cells * len(self.names[name]) + columns[name]
        return cells

    def _too_small(self, cells: Codes, owners: Codes) -> npt.NDArray[np.bool_]:
        """Tell which examples are in no group that may be told."""
        small = np.zeros(len(cells), bool)
        ends = np.flatnonzero(np.diff(owners, append=-1)) + 1
        starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            _, own, counts = np.unique(
                cells[start:end], return_inverse=True, return_counts=True
            )
            left_out = counts < self.min_size
            missing = self.min_size - int(counts[left_out].sum())
            if 0 < missing < self.min_size:
                others = np.flatnonzero(~left_out)
                for place in others[np.argsort(counts[others], kind="stable")].tolist():
                    left_out[place], missing = True, missing - int(counts[place])
                    if missing <= 0:
                        break
            small[start:end] = left_out[own]
        return small

    @property
    def untold(self) -> Groups:
        """The same without a least size: for examples that are not sent anywhere."""
        return Groups(self.names, self.intersections, 1, self.positive)

    def result(self, sums: Sums) -> dict[str, Array]:
        """Return what is measured of each client and group, ``[C, G]``, by name.

        Parameters
        ----------
        sums : Sums
            Of C clients, with what is added up by group.

        Returns
        -------
        dict[str, ndarray]
            ``examples``, how many there are, and ``loss``, their mean. Where a
            prediction is right or wrong, ``accuracy``. Where there is a positive class
            also ``positives``, of how many examples it is the true one, and rates in
            [0, 1]: ``selection_rate``, the share that is given it; ``tpr``, the share
            of those whose true class it is that is given it; ``fpr``, the share of the
            others that is given it. NaN is what is of no examples, such as the ``tpr``
            of a group without a positive one.
        """
        n = sums["group-examples"]
        found: dict[str, Array] = {"examples": n}
        with np.errstate(all="ignore"):
            if "group-confusion" in sums.parts:
                counts = sums["group-confusion"]
                hits = np.trace(counts, axis1=2, axis2=3)
                found["accuracy"] = hits / n
                positive = self.positive
                if positive is None and counts.shape[-1] == 2:
                    positive = 1
                if positive is not None:
                    true = counts[:, :, positive].sum(-1)
                    selected = counts[..., positive].sum(-1)
                    both = counts[:, :, positive, positive]
                    found["positives"] = true
                    found["selection_rate"] = selected / n
                    found["tpr"] = both / true
                    found["fpr"] = (selected - both) / (n - true)
            elif "group-hits" in sums.parts:
                found["accuracy"] = sums["group-hits"] / n
            found["loss"] = sums["group-loss"] / n
        return found

    def rows(
        self, sums: Sums, *, absent: bool = False
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield what is measured, a row for a client and a group.

        Parameters
        ----------
        sums : Sums
            Of C clients.
        absent : bool
            Whether groups that a client has no example of have a row, too.

        Yields
        ------
        tuple
            The client's place in ``sums``, and its row: ``attribute``, ``group`` and
            what :meth:`result` has.
        """
        found = self.result(sums)
        n = found["examples"]
        there = np.ones(n.shape, bool) if absent else n > 0
        columns = {name: values.tolist() for name, values in found.items()}
        for client, group in np.argwhere(there).tolist():
            attribute, name = self.labels[group]
            row: dict[str, Any] = {"attribute": attribute, "group": name}
            row |= {key: values[client][group] for key, values in columns.items()}
            yield client, row
