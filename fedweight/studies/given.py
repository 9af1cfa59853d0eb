"""What Python gives in place of a name: classes, functions, and made objects.

They become the keys that a simulation file has, so a run's ``config.toml`` repeats it.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from ..clients.settings import TrainingSettings
from ..core.errors import ConfigurationError, closest
from ..core.options import ANY, options_of
from ..core.registry import Registry
from ..core.settings import kebab, parse_setting
from ..core.texts import shown
from .tables import PICKS, SCHEMA, picks_of

# In which module a notebook or a script defines what a file cannot name.
MAIN = "__main__"


def as_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as dotted keys, also those that name a table.

    Parameters
    ----------
    settings : Mapping[str, Any]
        By ``"table.key"`` a value; or by ``"table"`` a mapping of keys, a name, a class
        or function, or an object whose options are the keys.

    Raises
    ------
    ConfigurationError
        If no file could say it.

    Examples
    --------
    >>> from fedweight.strategies import FedDisco
    >>> found = as_settings({"strategy": FedDisco(a=0.2), "run.rounds": 3})
    >>> found["strategy.name"], found["strategy.a"], found["run.rounds"]
    ('feddisco', 0.2, 3)
    """
    found: dict[str, Any] = {}
    whole = set(whole_tables(settings))
    for key, value in settings.items():
        if key.partition(".")[0] in whole - {key}:
            raise ConfigurationError(
                f"setting '{key}': the object that is given for "
                f"'{key.partition('.')[0]}' says all of its options. Give it there."
            )
        if key not in SCHEMA:
            if "." not in key:
                raise ConfigurationError(
                    f"setting {shown(key)} must be written table.key=value, such as "
                    f"partition.alpha=0.1, or be a table.{closest(key, SCHEMA)} There "
                    f"are {', '.join(SCHEMA)}."
                )
            found[key] = _named(key, value)
            continue
        table = value if isinstance(value, Mapping) else _table_of(key, value)
        found |= {f"{key}.{own}": _named(f"{key}.{own}", v) for own, v in table.items()}
    return found


def _named(key: str, value: Any) -> Any:
    """Return the name of a class or a function that stands where a name does."""
    table, _, own = key.partition(".")
    picks = picks_of(table)
    named = callable(value) and not isinstance(value, str) and not _is_made(value)
    if not named or kebab(own) not in picks:
        return value
    return _name(table, value, picks[kebab(own)].registry)


def setting_map(settings: Mapping[str, Any] | Iterable[str]) -> Mapping[str, Any]:
    """Return settings by their keys; texts are read as the command line's are.

    Examples
    --------
    >>> setting_map(["partition.alpha=0.1"])
    {'partition.alpha': 0.1}
    """
    if isinstance(settings, Mapping):
        return settings
    return {f"{table}.{key}": v for table, key, v in map(parse_setting, settings)}


def whole_tables(settings: Mapping[str, Any]) -> list[str]:
    """Return the tables that a made object says all of: a file's keys do not stand."""
    return [
        key
        for key, value in settings.items()
        if key in SCHEMA and not isinstance(value, Mapping | str) and _is_made(value)
    ]


def _is_made(given: Any) -> bool:
    return not (inspect.isclass(given) or inspect.isfunction(given))


def of_main(settings: Mapping[str, Any]) -> list[str]:
    """Return the keys that name what only this process has, as a notebook's classes."""
    return [key for key, value in settings.items() if _names_main(value)]


def _names_main(value: Any) -> bool:
    """Tell whether a name, or one in a table of options, is of what stands there."""
    if isinstance(value, Mapping):
        return any(map(_names_main, value.values()))
    return isinstance(value, str) and value.startswith(f"{MAIN}:")


def _table_of(table: str, given: Any) -> dict[str, Any]:
    """Return the keys of a table, as an object says them."""
    if isinstance(given, str):
        return {"name": given}
    if isinstance(given, TrainingSettings):
        return {kebab(key): value for key, value in given.to_keys().items()}
    if table not in PICKS:
        return _options(table, given, type(given))
    if not _is_made(given):
        return {"name": _name(table, given, PICKS[table].registry)}
    name = _name(table, type(given), PICKS[table].registry)
    return {"name": name, **_options(table, given, type(given))}


def _options(table: str, made: Any, cls: type) -> dict[str, Any]:
    """Return the options of a made object, as a file may say them."""
    if all({"__init__", "__new__"}.isdisjoint(vars(c)) for c in cls.__mro__[:-1]):
        return {}  # It takes nothing.
    known = {one.name: one for one in fields(cls)} if is_dataclass(cls) else {}
    if not known and (table not in PICKS or PICKS[table].positional):
        raise ConfigurationError(
            f"{table}: {shown(made)} does not say what it was made with. Give the "
            f"class, and its options as '{table}.option', or a dictionary of keys."
        )
    options = {name: o for name, o in options_of(cls).items() if name != ANY}
    if not options.keys() <= known.keys():
        _check_kept(table, made, cls, options)
    found: dict[str, Any] = {}
    for name, option in options.items():
        value = getattr(made, name)
        if option.by_name:
            named = _name(table, type(value), option.by_name.registry)
            own = _options(table, value, type(value))
            found[kebab(name)] = {"name": named, **own}
        elif not option.given:
            if value is not None:
                found[kebab(name)] = value
            elif option.in_file.default is not None:
                raise ConfigurationError(
                    f"{table}: {name} of {cls.__name__} is None, which no file can "
                    f"say where its default is {shown(option.in_file.default)}. Give "
                    "it a value."
                )
        elif name not in known or not _is_default(known[name], value):
            raise ConfigurationError(
                f"{table}: {name} of {cls.__name__} is filled in by the run. Leave "
                "it out; a seed is 'run.seed', a server optimiser 'server'."
            )
    return found


def _check_kept(table: str, made: Any, cls: type, names: Collection[str]) -> None:
    """Refuse an object that does not keep what it was made with under those names.

    Another one is made of what it keeps, and must hold the same: an object that keeps
    something else under an argument's name is not taken for what it is not.
    """
    kept = {name: getattr(made, name) for name in names if hasattr(made, name)}
    lost = [name for name in names if name not in kept]
    calls = ", ".join(f"{name}={shown(value)}" for name, value in kept.items())
    why = f"it has no '{lost[0]}'" if lost else f"{cls.__name__}({calls}) is another"
    try:
        if not lost and _same(vars(cls(**kept)), vars(made)):
            return
    except Exception as error:
        why = f"{cls.__name__}({calls}) raises {type(error).__name__}"
    first = next(iter(names))
    raise ConfigurationError(
        f"{table}: this {cls.__name__} does not say what it was made with: {why}. Keep "
        f"each argument of __init__ under its own name, as self.{first} = {first}, or "
        f"give the class and its options: {{'name': {cls.__name__}, "
        f"'{kebab(first)}': ...}}."
    )


def _same(first: Any, second: Any) -> bool:
    """Tell whether two values, or all that two objects hold, are the same."""
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(
            _same(first[key], second[key]) for key in first
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    if hasattr(first, "shape"):
        return first.shape == second.shape and bool((first == second).all())
    return bool(first == second) or _content(first, second)


def _is_default(one: Field[Any], value: Any) -> bool:
    """Tell whether a field has what it has where nothing is given."""
    default = one.default if one.default_factory is MISSING else one.default_factory()
    if type(value) is not type(default):
        return False
    return value is default or bool(value == default) or _content(value, default)


def _content(value: Any, default: Any) -> bool:
    """Tell whether two objects without an equality of their own hold the same."""
    return hasattr(value, "__dict__") and vars(value) == vars(default)


def _name(table: str, given: Any, registry: Registry) -> str:
    """Return the name of a class or a function, as a file has it."""
    name = registry.name_of(given)
    if name not in registry.entries and "." in given.__qualname__:
        raise ConfigurationError(
            f"{table}: {given.__qualname__} is defined inside a function or a class, "
            "where no file can name it. Define it at the top of its module."
        )
    return name
