"""The axes of a comparison: methods, data sets and seeds, as they are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ..core.errors import ConfigurationError, closest
from ..core.options import ANY
from ..core.settings import kebab, kebab_key, parse_setting, split_key
from ..core.texts import NAME_LENGTH, listed, plain, shown
from .configuration import make_paths_whole, read_tables
from .methods import (
    OF_DATA,
    Method,
    data_sets_of,
    flat,
    methods_of,
    parts,
    refuse_taken,
    refuse_twins,
    seeds_of,
    times,
)
from .tables import COMPARE, PICKS, SCHEMA, options_in_file


@dataclass(frozen=True)
class Axes:
    """What a comparison runs: every method on all data sets with all seeds.

    Attributes
    ----------
    methods : list of Method
        Strategies, each with every objective and every value of what is varied.
    candidates : dict
        By a method's label what a sweep tries of it; one without a label where there
        is nothing to choose.
    data_sets : list of Method
        What they are run on; one without a label where only the file says it.
    seeds : list of int
        One or more.
    target : float, optional
        The test accuracy that rounds and bytes are counted to.
    keys : frozenset of str
        The keys of a simulation file that differ from run to run: those of what is
        varied, of a sweep and of data sets.
    """

    methods: list[Method]
    candidates: dict[str, list[Method]]
    data_sets: list[Method]
    seeds: list[int]
    target: float | None = None
    keys: frozenset[str] = frozenset()

    @property
    def chooses(self) -> bool:
        """Whether there is anything to choose."""
        return any(len(several) > 1 for several in self.candidates.values())


@dataclass(frozen=True)
class Asked:
    """What is to be compared, as :func:`fedweight.compare` takes it.

    ``None`` is what is not given. A file's table ``[compare]`` has the same keys.
    """

    strategies: Annotated[
        Any,
        Field(
            description="names, with options, or a table of settings each; all are "
            "held against the first"
        ),
    ] = None
    objectives: Annotated[
        Any, Field(description="names, likewise: every strategy is run with each")
    ] = None
    data_sets: Annotated[
        Any, Field(description="names, or a table of settings each: all is run on each")
    ] = None
    vary: Annotated[
        Any, Field(description="values by key: every strategy is run with each")
    ] = None
    sweep: Annotated[
        Any, Field(description="likewise; the best on data.validation is compared")
    ] = None
    seeds: Annotated[Any, Field(description="'0-9', '0,1,2' or whole numbers")] = None
    target: Annotated[
        Any, Field(description="test accuracy that rounds and bytes are counted to")
    ] = None

    def beside(self, file: str | Path | None) -> Asked:
        """Return the same, with what a file says of what is not given.

        Raises
        ------
        ConfigurationError
            If its ``[compare]`` is no table, or has a key that there is not.
        """
        table = {} if file is None else read_tables(file).get(COMPARE, {})
        where = f"{file}: {COMPARE}"
        if not isinstance(table, Mapping):
            raise ConfigurationError(
                f"{where} is a table of keys, got {shown(table)}. Write [{COMPARE}] "
                "and its keys below."
            )
        known = {kebab(field.name): field.name for field in fields(self)}
        written: dict[str, str] = {}
        for key in table:
            before = written.setdefault(kebab(key), key)
            if before != key:
                raise ConfigurationError(
                    f"{where} has the key '{before}' twice, also as '{key}'. Keep one."
                )
            if kebab(key) not in known:
                near = closest(kebab(key), known)
                raise ConfigurationError(
                    f"{where} has no key '{plain(key)}'.{near} There are "
                    f"{listed([*known])}."
                )
        told = {known[kebab(key)]: value for key, value in table.items()}
        if file is not None and isinstance(told.get("data_sets"), Mapping):
            folder = Path(file).expanduser().parent
            told["data_sets"] = {
                label: _beside(folder, settings)
                for label, settings in told["data_sets"].items()
            }
        mine = {name: getattr(self, name) for name in known.values()}
        return Asked(**told | {k: v for k, v in mine.items() if v is not None})

    def axes(self) -> Axes:
        """Return what it names.

        Raises
        ------
        ConfigurationError
            If something of it cannot be, or is there twice.
        """
        methods = methods_of(self.strategies or (), self.objectives or ())
        data_sets = data_sets_of(self.data_sets or ())
        varied, swept = _values("vary", self.vary), _values("sweep", self.sweep)
        refuse_taken("vary", varied, bool(self.objectives))
        refuse_taken("sweep", swept, bool(self.objectives))
        for key, values in varied.items():
            if key in swept:
                raise ConfigurationError(
                    f"sweep: {key} is varied: every value of it is compared. Keep one."
                )
            if _table(key) in OF_DATA:
                data_sets = times(data_sets, _choices(key, values))
            else:
                methods = times(methods, _choices(key, values))
        refuse_twins("vary", methods)
        refuse_twins("vary", data_sets)
        for key in swept:
            if _table(key) in OF_DATA:
                raise ConfigurationError(
                    f"sweep: {key} says what the data are, which no accuracy can "
                    "choose. Vary it."
                )
            if _table(key) == "personal":
                raise ConfigurationError(
                    f"sweep: {key} says how personal models are trained, and "
                    "data.validation judges the global one. Vary it."
                )
            if not any(_takes(method, key) for method in methods):
                raise ConfigurationError(
                    f"sweep: no strategy takes {key}, or all of them say it themselves."
                )
        return Axes(
            methods,
            {method.label: _candidates(method, swept) for method in methods},
            data_sets,
            seeds_of((0,) if self.seeds is None else self.seeds),
            _target(self.target),
            frozenset({*varied, *swept, *(k for d in data_sets for k in d.settings)}),
        )


def _target(given: Any) -> float | None:
    if given is None:
        return None
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if not number or not 0 < given <= 1:
        raise ConfigurationError(
            f"target must be a test accuracy above 0 and up to 1, got {shown(given)}."
        )
    return float(given)


def _table(key: str) -> str:
    return key.partition(".")[0]


def _choices(key: str, values: Iterable[Any]) -> list[Method]:
    """Return each value of a key as what can be chosen."""
    return [
        Method(f"{key}={plain(value, NAME_LENGTH)}", {key: value}) for value in values
    ]


def _candidates(method: Method, swept: Mapping[str, list[Any]]) -> list[Method]:
    """Return what a sweep tries of a method: all values of the keys that it has."""
    found = [Method("", {})]
    for key, values in swept.items():
        if _takes(method, key):
            found = times(found, _choices(key, values))
    refuse_twins("sweep", found)
    return found


def _takes(method: Method, key: str) -> bool:
    """Tell whether a method has a key: another strategy's options it has not."""
    table, _, option = key.partition(".")
    name = method.settings.get(f"{table}.name")
    if key in method.settings or (name is None or table not in PICKS):
        return key not in method.settings
    options = {kebab(known) for known in options_in_file(table, name)}
    return bool({option, kebab(ANY)} & (options | {*SCHEMA[table]}))


def _beside(folder: Path, settings: Any) -> Any:
    """Return settings of a file whose paths are relative to it."""
    if not isinstance(settings, Mapping):
        return settings
    tables: dict[str, Any] = {}
    for key, value in flat(settings).items():
        table, own = split_key(key, key)
        tables.setdefault(table, {})[own] = value
    make_paths_whole(tables, {}, folder)
    return tables


def _values(where: str, given: Any) -> dict[str, list[Any]]:
    """Return the values of each key that a mapping, or texts, list."""
    advice = "Write training.learning-rate=0.1,0.01."
    found: dict[str, list[Any]] = {}

    def take(dotted: str, text: str, several: list[Any]) -> None:
        key = kebab_key(dotted, text)
        if key in found:
            raise ConfigurationError(
                f"{where}: {key} is there twice. Give it once, with all its values."
            )
        found[key] = several

    if isinstance(given, Mapping):
        for dotted, several in flat(given).items():
            lists = isinstance(several, list | tuple | range)
            values = list(several) if lists else [several]
            take(str(dotted), str(dotted), values)
    elif given is not None:
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, Iterable):
            raise ConfigurationError(f"{where}: got {shown(given)}. {advice}")
        for text in texts:
            dotted, _, told = str(text).partition("=")
            several = [parse_setting(f"{dotted}={value}")[2] for value in parts(told)]
            take(dotted, str(text), several)
    for key, several in found.items():
        if not several:
            raise ConfigurationError(f"{where}: {key} has no value. {advice}")
        if any(isinstance(v, float) and not math.isfinite(v) for v in several):
            raise ConfigurationError(
                f"{where}: {key} must be numbers that are finite, got {shown(several)}."
            )
    return found
