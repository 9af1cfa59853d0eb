"""Simulation files: what a run is made of, as TOML tables.

Every key has a default and a meaning. What a table's ``name`` picks (a data set, a
partition, a model, an objective, a strategy) brings options of its own, which stand
beside ``name`` in the same table.
"""

from __future__ import annotations

import inspect
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w

from .. import models
from ..clients.objectives import OBJECTIVES
from ..data import DATA_SETS
from ..data.partitions import PARTITIONS
from ..errors import ConfigurationError, check_choice, check_range, closest
from ..registry import Registry
from ..simulations import ENGINES
from ..strategies import STRATEGIES
from ..strategies.server_optimizers import SERVER_OPTIMIZERS

INFINITY = float("inf")


@dataclass(frozen=True)
class Key:
    """A key of a simulation file: its default, what it means, what is allowed."""

    default: Any
    meaning: str
    low: float = -INFINITY
    high: float = INFINITY
    choices: Sequence[str] = ()
    low_open: bool = False
    high_open: bool = False


SCHEMA: dict[str, dict[str, Key]] = {
    "run": {
        "name": Key("quickstart", "what the run's folder is called"),
        "rounds": Key(20, "rounds of training", 1),
        "seed": Key(0, "the seed that every random number comes from", 0),
        "timeout": Key(0.0, "seconds to wait for a round's replies; 0 has no limit", 0),
        "evaluate-every": Key(1, "rounds from one server evaluation to the next", 1),
    },
    "data": {
        "name": Key("digits", "a data set, or 'module:function'"),
        "path": Key("", "the folder or file that holds it, where it needs one"),
        "held-out": Key(
            0.2, "share of a client's data it keeps to evaluate", 0, 1, high_open=True
        ),
        "proxy": Key(
            0.02,
            "share of the training data the server keeps as a proxy set",
            0,
            1,
            high_open=True,
        ),
    },
    "partition": {
        "name": Key("dirichlet", "how the data are split, or 'module:function'"),
        "clients": Key(20, "how many clients there are; 0 is all natural ones", 0),
    },
    "model": {"name": Key("mlp", "a model, or 'module:function'")},
    "objective": {"name": Key("plain", "what clients minimise, or 'module:Class'")},
    "training": {
        "epochs": Key(10, "passes over a client's data in a round", 1),
        "batch-size": Key(16, "examples in a step", 1),
        "optimizer": Key("sgd", "the client's optimiser", choices=("sgd", "adam")),
        "learning-rate": Key(0.1, "of the client's optimiser", 0),
        "learning-rate-decay": Key(
            1.0, "factor on the rate after every round", 0, 1, low_open=True
        ),
        "momentum": Key(0.9, "of sgd", 0, 1, high_open=True),
        "weight-decay": Key(0.0, "strength of the L2 term", 0),
    },
    "strategy": {"name": Key("fedavg", "how clients are weighed, or 'module:Class'")},
    "server": {
        "name": Key("none", "the server's optimiser: none, momentum or adam"),
    },
    "engine": {
        "name": Key("auto", "where clients run", choices=ENGINES),
        "workers": Key(0, "Ray workers; 0 is one for each core or GPU share", 0),
        "gpus-per-worker": Key(0.0, "share of a GPU for each Ray worker", 0),
        "address": Key("", "a running Ray cluster to join"),
        "threads": Key(0, "clients at once in the local engine; 0 decides", 0),
        "plan": Key("auto", "how clients train: auto, loop or batched-N (N at once)"),
        "device": Key("auto", "auto, cpu, cuda or cuda:N"),
    },
}

# What the library fills in itself and a file may not.
GIVEN: dict[str, frozenset[str]] = {
    "data": frozenset({"path", "seed"}),
    "partition": frozenset(),  # its first three parameters, whatever they are called
    "model": frozenset({"input_shape", "num_classes"}),
    "objective": frozenset({"inner"}),
    "strategy": frozenset(
        {
            "accumulate",
            "arrayrecord_key",
            "buffers",
            "configrecord_key",
            "device",
            "evaluate_metrics_aggr_fn",
            "frozen",
            "model",
            "num_classes",
            "proxy",
            "seed",
            "server_optimizer",
            "threads",
            "train_metrics_aggr_fn",
            "weighted_by_key",
        }
    ),
    "server": frozenset(),
}

REGISTRIES: dict[str, Registry] = {
    "data": DATA_SETS,
    "partition": PARTITIONS,
    "model": models.MODELS,
    "objective": OBJECTIVES,
    "strategy": STRATEGIES,
    "server": SERVER_OPTIMIZERS,
}


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
            if name not in SCHEMA:
                raise ConfigurationError(
                    f"{where}there is no table [{name}].{closest(name, SCHEMA)} "
                    f"There are {', '.join(SCHEMA)}."
                )
            if not isinstance(table, Mapping):
                raise ConfigurationError(
                    f"{where}'{name}' is a table of keys, got {table!r}. Write "
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
    ) -> Configuration:
        """Read a simulation file, and settings that override it.

        Parameters
        ----------
        path : str or Path, optional
            The file; the quick start by default.
        settings : Mapping or iterable of str
            ``{"partition.alpha": 0.1}``, or texts, ``["partition.alpha=0.1"]``; later
            ones win.
        data : str, optional
            What the data are called, where they come as an object: then nothing that
            [data] says of where they are is read.
        """
        given: dict[str, Any] = {} if path is None else _read_toml(Path(path))
        changes: dict[str, Any] = {}
        for setting in settings:
            if isinstance(settings, Mapping):
                value = settings[setting]
                table, key = split_key(setting, setting)
                value = str(value) if isinstance(value, Path) else value
            else:
                table, key, value = parse_setting(setting)
            changes.setdefault(table, {})[key] = value
        _make_paths_whole(given, changes, Path(path or "").parent)
        source = "" if path is None else str(path)
        merged = _merged(given, changes)
        if data is None:
            return cls.of(merged, source)
        shares = ("held-out", "proxy")
        if isinstance(merged.get("data"), dict):
            table = merged["data"]
            merged["data"] = {key: table[key] for key in shares if key in table}
        tables = cls.of(merged, source).tables
        own = {"name": data, "path": "", **{k: tables["data"][k] for k in shares}}
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
            given.setdefault(table, {})[key] = value
        return cls.of(given, "run config")

    def __getitem__(self, table: str) -> Mapping[str, Any]:
        """Return a table."""
        return self.tables[table]

    def having(self, table: str, key: str, value: Any) -> Configuration:
        """Return the same configuration with another value of one key."""
        return Configuration({**self.tables, table: {**self.tables[table], key: value}})

    def options(self, table: str) -> dict[str, Any]:
        """Return the options of what a table's ``name`` picks, in snake_case."""
        fixed = SCHEMA[table]
        return {
            key.replace("-", "_"): value
            for key, value in self.tables[table].items()
            if key not in fixed
        }

    def to_toml(self) -> str:
        """Return the tables as a simulation file that repeats the run."""
        return tomli_w.dumps({k: dict(v) for k, v in self.tables.items()})


def parse_setting(setting: str) -> tuple[str, str, Any]:
    """Read ``"table.key=value"``; the value is TOML, or else plain text.

    Examples
    --------
    >>> parse_setting("partition.alpha=0.1")
    ('partition', 'alpha', 0.1)
    >>> parse_setting("strategy.name=ida")
    ('strategy', 'name', 'ida')
    """
    dotted, equals, text = setting.partition("=")
    table, key = split_key(dotted if equals else "", setting)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    return table, key, value


def split_key(dotted: str, setting: str) -> tuple[str, str]:
    """Read ``"table.key"``, a part of a setting that an error message names."""
    table, _, key = dotted.strip().partition(".")
    if not (table and key):
        raise ConfigurationError(
            f"setting {setting!r} must be written table.key=value, such as "
            "partition.alpha=0.1."
        )
    return table, key


def _merged(given: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return tables with some keys changed; what is no table stays, to be refused."""
    merged = dict(given)
    for name, table in changes.items():
        before = merged.get(name, {})
        merged[name] = {**before, **table} if isinstance(before, dict) else before
    return merged


def _make_paths_whole(
    given: Mapping[str, Any], changes: Mapping[str, Any], folder: Path
) -> None:
    """Make the paths of [data] absolute, so that they hold wherever a run is repeated.

    Those of a file are relative to it, those of settings to the working directory.
    """
    name = _merged(given, changes).get("data", {})
    name = name.get("name") if isinstance(name, dict) else None
    paths = {"path"}
    if isinstance(name, str) and (name in DATA_SETS.entries or ":" in name):
        options = options_of(DATA_SETS.resolve(name))
        kinds = {key: typing.get_args(o.annotation) for key, o in options.items()}
        paths |= {key for key, kind in kinds.items() if Path in kind}
    for tables, start in ((given, folder), (changes, Path())):
        data = tables.get("data")
        if not isinstance(data, dict):
            continue
        for key in paths:
            if isinstance(data.get(key), str) and data[key]:
                data[key] = str((start / Path(data[key]).expanduser()).resolve())


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(
            f"there is no simulation file '{path}'. Those that come with fedweight "
            "are in simulations/."
        ) from None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{path} is not a TOML file: {error}.") from None


def _resolve(where: str, table: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Check one table and fill in its defaults."""
    fixed = SCHEMA[table]
    resolved = {}
    for key, rule in fixed.items():
        value = given.get(key, rule.default)
        resolved[key] = _checked(f"{where}.{key}", value, rule)
    options: dict[str, Option] = {}
    any_key = False
    if table in REGISTRIES:
        chosen = REGISTRIES[table].resolve(resolved["name"])
        if not callable(chosen):
            raise ConfigurationError(
                f"{where}.name must be a function or a class, but "
                f"'{resolved['name']}' is {chosen!r}."
            )
        options = options_of(chosen)
        library = set(list(options)[:3]) if table == "partition" else GIVEN[table]
        options = {name: o for name, o in options.items() if name not in library}
        any_key = options.pop(ANY, None) is not None
    for key in given:
        if not any_key and key not in fixed and key.replace("-", "_") not in options:
            allowed = [*fixed, *(name.replace("_", "-") for name in options)]
            raise ConfigurationError(
                f"{where} has no key '{key}'.{closest(key, allowed)} "
                f"It takes {', '.join(allowed)}."
            )
    for name, option in options.items():
        key = name.replace("_", "-")
        if key in fixed:
            continue
        written = next((k for k in (key, name) if k in given), None)
        value = option.default if written is None else given[written]
        if value is inspect.Parameter.empty:
            raise ConfigurationError(f"{where} needs the key '{key}'.")
        if written is not None:
            check_type(f"{where}.{key}", value, option.annotation)
        if written is not None or _is_toml(value):
            resolved[key] = value
    known = {*fixed, *options}
    others = {k: v for k, v in given.items() if not known & {k, k.replace("-", "_")}}
    return {k: _lists(v) for k, v in (resolved | others).items()}


def _is_toml(value: Any) -> bool:
    """Tell whether a default can be written down; others stay the function's own."""
    if isinstance(value, list | tuple):
        return all(_is_toml(v) for v in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_toml(v) for k, v in value.items())
    return isinstance(value, bool | int | float | str)


def _lists(value: Any) -> Any:
    """Return a value as TOML reads it: tuples are lists there."""
    if isinstance(value, list | tuple):
        return [_lists(v) for v in value]
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return value


def _checked(where: str, value: Any, rule: Key) -> Any:
    """Check a fixed key against its default's type and its range."""
    check_type(where, value, type(rule.default))
    if rule.choices:
        check_choice(where, value, rule.choices)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        check_range(
            where,
            value,
            rule.low,
            rule.high,
            low_open=rule.low_open,
            high_open=rule.high_open,
        )
    return float(value) if isinstance(rule.default, float) else value


# The name under which a function that takes any option (**options) says so.
ANY = "**"


@dataclass(frozen=True)
class Option:
    """A parameter of something picked by name."""

    default: Any
    annotation: Any


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """Return the parameters of a function or class.

    Keyword arguments typed by a ``TypedDict`` (``**arguments: Unpack[...]``) count
    as parameters without a default of their own. Untyped ones stand for those of the
    next base class; where there is none, :data:`ANY` is among the names.
    """
    if not isinstance(function, type):
        return _parameters(function)
    makers = [
        vars(base)["__init__"]
        for base in function.__mro__[:-1]
        if "__init__" in vars(base)
    ]
    options: dict[str, Option] = {}
    for make in makers:
        options.pop(ANY, None)
        _, *inherited = _parameters(make).items()  # the first is self
        options |= {name: o for name, o in inherited if name not in options}
        if ANY not in options:
            break
    return options


def _parameters(function: Callable[..., Any]) -> dict[str, Option]:
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # Names that its module imports for types only.
        hints = {}
    options: dict[str, Option] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints.get(name, Any)
        if parameter.kind is parameter.VAR_KEYWORD:
            kinds = typing.get_args(hint)
            for arguments in kinds:
                for key, kind in typing.get_type_hints(arguments).items():
                    options.setdefault(key, Option(None, kind))
            if not kinds:
                options[ANY] = Option(None, Any)
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            options[name] = Option(parameter.default, hint)
    return options


def check_type(where: str, value: Any, annotation: Any) -> None:
    """Raise :class:`ConfigurationError` unless a value fits a type annotation.

    Examples
    --------
    >>> check_type("run.rounds", 20, int)
    >>> check_type("run.rounds", "many", int)
    Traceback (most recent call last):
    fedweight.errors.ConfigurationError: run.rounds must be a whole number, got 'many'.
    """
    if not _fits(value, annotation):
        near = ""
        if typing.get_origin(annotation) is Literal:
            near = closest(str(value), map(str, typing.get_args(annotation)))
        raise ConfigurationError(
            f"{where} must be {_described(annotation)}, got {value!r}.{near}"
        )


def _fits(value: Any, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or isinstance(annotation, typing.TypeVar):
        return True
    if annotation is None or annotation is types.NoneType:
        return value is None
    if origin is Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in arguments)
    if origin is not None:
        if not (isinstance(origin, type) and issubclass(origin, Iterable)):
            return True
        if issubclass(origin, Mapping):
            return isinstance(value, Mapping)
        inner = arguments[0] if arguments else Any
        return isinstance(value, list | tuple) and all(_fits(v, inner) for v in value)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is Path:
        return isinstance(value, str | Path)
    return isinstance(value, annotation) if isinstance(annotation, type) else True


def _described(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        kinds = [a for a in arguments if a is not types.NoneType]
        return " or ".join(_described(a) for a in kinds)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a table"
    if origin is not None:
        inner = arguments[0] if arguments else Any
        return f"a list, each {_described(inner)}"
    named = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        Path: "a path",
    }
    return named.get(annotation, getattr(annotation, "__name__", str(annotation)))
