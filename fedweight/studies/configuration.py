"""Simulation files: what a run is made of, as TOML tables.

Every key has a default and a meaning. What a table's ``name`` picks (a data set, a
partition, a model, an objective, a strategy) brings options of its own, which stand
beside ``name`` in the same table.
"""

from __future__ import annotations

import logging
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from ..core.errors import ConfigurationError, closest
from ..core.options import ANY, Option, resolve_options
from ..core.paths import NOT_THERE, absolute, clean_path, why_unreadable
from ..core.settings import kebab, parse_setting, split_key, toml_value
from ..core.texts import listed, shown
from ..data import DATA_SETS
from .tables import COMPARE, PICKS, SCHEMA, options_in_file, picks_of, seed_rule

log = logging.getLogger("fedweight")

# A simulation file is a page. What is so much longer is no such file.
MOST_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Configuration:
    """A resolved simulation file: every table with every key.

    Parameters
    ----------
    tables : Mapping[str, Mapping[str, Any]]
        As the TOML file would hold them; keys in kebab-case.

    Examples
    --------
    >>> configuration = Configuration.of({"strategy": {"name": "ida"}})
    >>> configuration["run"]["rounds"], configuration["strategy"]["name"]
    (20, 'ida')
    """

    tables: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, given: Mapping[str, Any], source: str = "") -> Configuration:
        """Check what is given and add every default.

        Raises
        ------
        ConfigurationError
            For an unknown table or key, a wrong type, or a value out of range; the
            message is one line that names it.
        """
        where = f"{source}: " if source else ""
        for name, table in given.items():
            if name == COMPARE:
                raise ConfigurationError(
                    f"{where}[{COMPARE}] says what 'fedweight compare' runs. Give the "
                    "file to that, or take the table out."
                )
            if name not in SCHEMA:
                near = closest(str(name), SCHEMA)
                raise ConfigurationError(
                    f"{where}there is no table [{shown(name)[1:-1]}].{near} "
                    f"There are {', '.join(SCHEMA)}."
                )
            if not isinstance(table, Mapping):
                raise ConfigurationError(
                    f"{where}'{name}' is a table of keys, got {shown(table)}. Write "
                    f"[{name}] and its keys below."
                )
        return cls(
            {
                name: _resolve(f"{where}{name}", name, given.get(name, {}))
                for name in SCHEMA
            }
        )

    @classmethod
    def read(
        cls,
        path: str | Path | None = None,
        settings: Mapping[str, Any] | Iterable[str] = (),
        data: str | None = None,
        whole: Iterable[str] = (),
    ) -> Configuration:
        """Read a simulation file, and settings that override it.

        Parameters
        ----------
        path : str or Path, optional
            The file; the quick start by default. A run that it does not name is called
            as the file is, without its ending.
        settings : Mapping or iterable of str
            ``{"partition.alpha": 0.1}``, or texts, ``["partition.alpha=0.1"]``; later
            ones win.
        data : str, optional
            What the data are called, where they come as an object: then nothing that
            [data] says of where they are is read.
        whole : iterable of str
            Tables of the file that are not read: the settings say all of them, or they
            are no run's.
        """
        if path is not None:
            path = clean_path("the simulation file", path)
        given: dict[str, Any] = {} if path is None else _named(path, read_tables(path))
        given = {name: table for name, table in given.items() if name not in {*whole}}
        changes: dict[str, Any] = {}
        for setting in settings:
            if isinstance(settings, Mapping):
                value = settings[setting]
                table, key = split_key(setting, setting)
                value = str(value) if isinstance(value, Path) else value
            else:
                table, key, value = parse_setting(setting)
            _replace(changes.setdefault(table, {}), {key: value})
        make_paths_whole(given, changes, Path(path or "").parent)
        source = "" if path is None else str(path)
        _leave_out(given, changes)
        merged = _merged(given, changes)
        if data is None:
            return cls.of(merged, source)
        shares = ("held-out", "proxy", "validation")
        if isinstance(merged.get("data"), dict):
            table = merged["data"]
            merged["data"] = {key: table[key] for key in shares if key in table}
        tables = cls.of(merged, source).tables
        name = toml_value("the data set's name", str(data))
        own = {"name": name, "path": "", **{k: tables["data"][k] for k in shares}}
        return cls({**tables, "data": own})

    @classmethod
    def unflatten(cls, flat: Mapping[str, bool | float | int | str]) -> Configuration:
        """Read a Flower run config: dotted keys, and ``settings`` for the others.

        ``settings`` is a text of ``table.key=value``, separated by spaces.
        """
        given: dict[str, Any] = {}
        for dotted, value in flat.items():
            if dotted != "settings":
                table, key = split_key(dotted, dotted)
                given.setdefault(table, {})[key] = value
        for setting in str(flat.get("settings", "")).split():
            table, key, value = parse_setting(setting)
            _replace(given.setdefault(table, {}), {key: value})
        return cls.of(given, "run config")

    def __getitem__(self, table: str) -> Mapping[str, Any]:
        """Return a table."""
        return self.tables[table]

    def having(self, table: str, key: str, value: Any) -> Configuration:
        """Return the same configuration with another value of one key."""
        return Configuration({**self.tables, table: {**self.tables[table], key: value}})

    def without(self, table: str) -> Configuration:
        """Return the same configuration with the defaults of one table."""
        return Configuration({**self.tables, table: Configuration.of({})[table]})

    def options(self, table: str) -> dict[str, Any]:
        """Return the options of what a table's ``name`` picks, in snake_case."""
        name = self.tables[table].get("name", "")
        fixed = {*SCHEMA[table], *seed_rule(table, name)}
        return {
            key.replace("-", "_"): value
            for key, value in self.tables[table].items()
            if key not in fixed
        }

    def seed(self, table: str) -> int:
        """Return the seed of ``"partition"`` or ``"model"``: its own, or the run's."""
        own = self.tables[table].get("seed")
        if own is None or not seed_rule(table, self.tables[table]["name"]):
            own = self.tables["run"]["seed"]
        return int(own)

    def to_toml(self) -> str:
        """Return the tables as a simulation file that repeats the run."""
        return tomli_w.dumps({k: dict(v) for k, v in self.tables.items()})


def _named(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Return the tables of a file, with a name for the run where they have none."""
    run = given.get("run", {})
    if isinstance(run, Mapping) and "name" not in run and path.stem.isprintable():
        return {**given, "run": {"name": path.stem, **run}}
    return given


def _leave_out(given: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Leave out what a file says of a choice, where another choice is made beside it.

    Of a file's strategy that another one replaces only those options stay that the
    other one has, too; what neither has is refused later.
    """
    for table, pick in PICKS.items():
        old, new = given.get(table), changes.get(table, {}).get("name")
        if not isinstance(old, Mapping) or not isinstance(new, str):
            continue
        before = old.get("name", SCHEMA[table]["name"].default)
        names = [name for name in (before, new) if isinstance(name, str)]
        if before == new or not all(
            n in pick.registry.entries or ":" in n for n in names
        ):
            continue
        took, takes = (
            {kebab(key) for key in (*options_in_file(table, n), *seed_rule(table, n))}
            for n in names
        )
        odd = [k for k in old if kebab(str(k)) in took - takes - {*SCHEMA[table]}]
        if odd and kebab(ANY) not in takes:
            given[table] = {key: old[key] for key in old if key not in odd}
            log.warning(
                "%s.%s of the file is left out: '%s' takes no such option",
                table,
                listed(odd),
                new,
            )


def _merged(given: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return tables with some keys changed; what is no table stays, to be refused."""
    merged = dict(given)
    for name, table in changes.items():
        before = merged.get(name, {})
        if isinstance(before, dict):
            merged[name] = _replace(dict(before), table)
    return merged


def _replace(table: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Change keys of a table, where ``a-b`` and ``a_b`` are the same key."""
    for key, value in changes.items():
        for before in [k for k in table if kebab(k) == kebab(key)]:
            del table[before]
        table[key] = value
    return table


def make_paths_whole(
    given: Mapping[str, Any], changes: Mapping[str, Any], folder: Path
) -> None:
    """Make paths absolute, so that they hold wherever a run is repeated.

    Those of a file are relative to it, those of settings to the working directory.
    """
    name = _merged(given, changes).get("data", {})
    name = name.get("name") if isinstance(name, dict) else None
    paths = {"path"}
    if isinstance(name, str) and (name in DATA_SETS.entries or ":" in name):
        options = options_in_file("data", name)
        kinds = {key: typing.get_args(o.annotation) for key, o in options.items()}
        paths |= {key for key, kind in kinds.items() if Path in kind}
    for tables, start in ((given, folder), (changes, Path())):
        for name, keys in (("data", paths), ("model", {"weights"})):
            table: Any = tables.get(name)
            for key in keys if isinstance(table, dict) else ():
                if isinstance(table.get(key), str) and table[key]:
                    table[key] = str(absolute(f"{name}.{key}", table[key], start))


def read_tables(path: str | Path) -> dict[str, Any]:
    """Read a simulation file as it is written.

    Raises
    ------
    ConfigurationError
        If there is none, or it is no TOML.
    """
    path = clean_path("the simulation file", path)
    reason = why_unreadable(path)
    if reason == NOT_THERE:
        raise ConfigurationError(
            f"there is no simulation file '{path}'. Those that come with fedweight "
            "are in simulations/."
        )
    try:
        if reason is None and path.stat().st_size > MOST_BYTES:
            reason = f"it has more than {MOST_BYTES // 2**20} MiB"
        content = b"" if reason else path.read_bytes()
    except OSError as error:
        reason = error.strerror
    if reason:
        raise ConfigurationError(f"{path} cannot be read: {reason}.")
    if content.startswith(b"\xef\xbb\xbf"):
        raise ConfigurationError(
            f"{path} begins with a byte order mark, which TOML does not allow. Save it "
            "as UTF-8 without one."
        )
    try:
        if b"\0" in content:
            raise UnicodeError
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        hint = ""
        if path.suffix.lower() in (".csv", ".npz", ".txt", ".tsv"):
            hint = " 'fedweight check' looks at a file of data."
        elif any(word in str(error).lower() for word in ("escape", "hex value")):
            hint = " Write a Windows path in single quotes: 'C:\\data\\own.csv'."
        deep = isinstance(error, RecursionError)
        text = "it is nested too deep" if deep else " ".join(str(error).split())
        if isinstance(error, UnicodeError):
            text = "it is not written in UTF-8. Save it as UTF-8"
        raise ConfigurationError(f"{path} is not a TOML file: {text}.{hint}") from None


def _resolve(where: str, table: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Check one table and fill in its defaults."""
    given = {key: toml_value(f"{where}.{key}", v) for key, v in _keys(where, given)}
    fixed = dict(SCHEMA[table])
    options: dict[str, Option] = {}
    for key in picks_of(table):
        name = given.get(key, fixed[key].default)
        name = fixed[key].checked(f"{where}.{key}", name)
        options |= options_in_file(table, name, where, key)
        if key == "name":
            fixed |= seed_rule(table, name)
    resolved = {
        key: rule.checked(f"{where}.{key}", given.get(key, rule.default))
        for key, rule in fixed.items()
        if key in given or key in SCHEMA[table]
    }
    return resolved | resolve_options(where, options, given, fixed)


def _keys(where: str, given: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yield a table's keys and values, if no key is there twice."""
    written: dict[str, str] = {}
    for key, value in given.items():
        if not isinstance(key, str):
            raise ConfigurationError(f"{where}: a key is a text, got {shown(key)}.")
        before = written.setdefault(kebab(key), key)
        if before != key:
            raise ConfigurationError(
                f"{where} has the key '{before}' twice, also as '{key}'. Keep one."
            )
        yield key, value
