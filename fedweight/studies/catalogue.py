"""What there is to choose from, and the keys of a file, for people and editors.

All of it is read from the registries and from the annotations of what they name.
"""

from __future__ import annotations

import re
from typing import Any

from ..clients.registries import PROBES, QUERIES
from ..core.docstrings import meanings, unmarked
from ..core.errors import ConfigurationError, closest
from ..core.options import ANY, Option, options_of
from ..core.settings import kebab
from ..core.texts import shown
from .axes import Asked
from .tables import (
    COMPARE,
    FURTHER_PICKS,
    PICKS,
    SCHEMA,
    SEEDS,
    Pick,
    options_in_file,
    picks_of,
)

# What each kind is called in a list of all, and the table that picks one of it.
KINDS = {
    "strategies": "strategy",
    "objectives": "objective",
    "personal models": "personal",
    "data": "data",
    "partitions": "partition",
    "models": "model",
    "adapters": "model.adapters",
    "server optimisers": "server",
    "schedules": "schedule",
    "codecs": "codec",
    "local optimisers": "training.optimizer",
    "learning-rate schedules": "training.learning-rate-schedule",
}


# What has a name but no table of a file: a strategy asks for it.
ASKED_FOR = {"probes": PROBES, "queries": QUERIES}


def catalogue() -> dict[str, dict[str, str]]:
    """Return all names by kind, each with a line, and the keys of a simulation file."""
    keys = {
        f"{table}.{key}": f"{rule.meaning} (default {rule.default!r})"
        for table, rules in SCHEMA.items()
        for key, rule in rules.items()
    } | {
        f"{table}.seed": f"{rule.meaning} (default run.seed)"
        for table, rule in SEEDS.items()
    }
    kinds = {kind: _pick(own).registry.descriptions() for kind, own in KINDS.items()}
    asked_for = {kind: names.descriptions() for kind, names in ASKED_FOR.items()}
    return kinds | asked_for | {"keys of a simulation file": keys}


def names_page(kind: str, name: str = "") -> dict[str, str] | None:
    """Return what strategies may ask clients for, by name, each with a line.

    Parameters
    ----------
    kind : str
        ``"probe"`` or ``"query"``, or one of :data:`ASKED_FOR`; of anything else there
        is nothing to return.
    name : str
        Only this one; by default all.

    Raises
    ------
    ConfigurationError
        If there is none of this name.
    """
    by_kind = {registry.kind: registry for registry in ASKED_FOR.values()} | ASKED_FOR
    if kind not in by_kind:
        return None
    lines = by_kind[kind].descriptions()
    if name and name not in lines:
        raise ConfigurationError(
            f"there is no {by_kind[kind].kind} {shown(name)}.{closest(name, lines)} "
            f"There are {', '.join(lines)}."
        )
    return {name: lines[name]} if name else lines


def _pick(own: str) -> Pick:
    """Return what a table picks by its name, or by ``"table.key"``."""
    table, _, key = own.partition(".")
    return picks_of(table)[key or "name"]


def options_page(kind: str, name: str = "") -> dict[str, dict[str, Any]]:
    """Return the keys of a table, with those that one name brings.

    Parameters
    ----------
    kind : str
        A table of a simulation file, such as ``"strategy"``, or a kind of
        :data:`KINDS`.
    name : str
        What its ``name`` picks; none: the keys that the table always has.

    Returns
    -------
    dict
        By key: ``allowed`` and ``meaning``, in words, and ``default``: ``None`` where
        something else decides, and missing where the key must be given.
    """
    table, _, key = KINDS.get(kind, kind).partition(".")
    if table not in SCHEMA or (key and key not in picks_of(table)):
        asked_for = [registry.kind for registry in ASKED_FOR.values()]
        known = [*SCHEMA, *KINDS, *asked_for, *ASKED_FOR]
        raise ConfigurationError(
            f"there is no kind '{kind}'.{closest(kind, known)} There are "
            f"{', '.join([*SCHEMA, *asked_for])}."
        )
    page = {key: _row(rule, rule.meaning) for key, rule in SCHEMA[table].items()}
    if table in SEEDS:
        page["seed"] = {**_row(SEEDS[table], SEEDS[table].meaning), "default": None}
    if not name:
        return page
    picks = picks_of(table)
    if not picks:
        raise ConfigurationError(f"the table [{table}] picks nothing by name.")
    if not key:  # Of several choices, that which has the name.
        knows = [own for own, pick in picks.items() if name in pick.registry.entries]
        key = [*knows, *picks][0]
    del page[key]
    for own, (rule, text) in _brought(table, name, key).items():
        page.setdefault(own, _row(rule, text))
    return page


def _brought(table: str, name: str, key: str = "name") -> dict[str, tuple[Option, str]]:
    """Return the keys that a choice brings, each with what it means."""
    texts = meanings(picks_of(table)[key].registry.resolve(name))
    return {
        kebab(option): (rule, rule.meaning or texts.get(option, ""))
        for option, rule in options_in_file(table, name, key=key).items()
        if option != ANY
    }


def _row(rule: Option, meaning: str) -> dict[str, Any]:
    row = {"allowed": rule.allowed, "meaning": _line(meaning)}
    return row if rule.required else {"default": rule.default, **row}


def _line(text: str) -> str:
    """Return the first sentence of a text, without the marks of a docstring."""
    return re.split(r"(?<=[a-z0-9)\]])\. (?=[A-Z])", unmarked(text))[0].rstrip(".")


# ------------------------------------------------------------------------ JSON schema


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a simulation file, as editors of TOML read it."""
    properties = {table: _table_schema(table) for table in SCHEMA}
    asked = {kebab(k): {"description": o.meaning} for k, o in options_of(Asked).items()}
    properties[COMPARE] = {
        "type": "object",
        "properties": asked,
        "additionalProperties": False,
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A simulation file of fedweight",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _table_schema(table: str) -> dict[str, Any]:
    keys = {key: _key_schema(rule, rule.meaning) for key, rule in SCHEMA[table].items()}
    if table in SEEDS:
        keys["seed"] = _key_schema(SEEDS[table], SEEDS[table].meaning)
        del keys["seed"]["default"]
    schema: dict[str, Any] = {"type": "object", "properties": keys}
    if table in FURTHER_PICKS:
        return _with_choices(table, keys)
    if table not in PICKS:
        return schema | {"additionalProperties": False}
    registry = PICKS[table].registry
    lines = registry.descriptions()
    own = {"pattern": ":", "description": "your own: 'module:name'"}
    names = [{"const": name, "description": line} for name, line in lines.items()]
    keys["name"] |= {"anyOf": [*names, own]}
    cases = []
    for name in sorted(registry.entries):
        more = {
            key: _key_schema(rule, _line(text))
            for key, (rule, text) in _brought(table, name).items()
            if key not in keys
        }
        is_it: dict[str, Any] = {"properties": {"name": {"const": name}}}
        if name != SCHEMA[table]["name"].default:
            is_it["required"] = ["name"]
        allowed = {"properties": {**dict.fromkeys(keys, True), **more}}
        cases.append({"if": is_it, "then": allowed | {"additionalProperties": False}})
    return schema | {"allOf": cases}


def _with_choices(table: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a table of which several keys bring options."""
    cases: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    is_own: list[dict[str, Any]] = []
    for key, pick in picks_of(table).items():
        lines = pick.registry.descriptions()
        own = {"pattern": ":", "description": "your own: 'module:name'"}
        names = [{"const": name, "description": line} for name, line in lines.items()]
        keys[key] |= {"anyOf": [*names, own]}
        is_own.append({"properties": {key: {"pattern": ":"}}, "required": [key]})
        default = SCHEMA[table][key].default
        brings: dict[str, dict[str, dict[str, Any]]] = {}
        for name in sorted(pick.registry.entries):
            for option, (rule, text) in _brought(table, name, key).items():
                schema = _key_schema(rule, _line(text))
                brings.setdefault(option, {})[name] = schema
        for option, by_name in brings.items():
            named = {"anyOf": [{"enum": [*by_name]}, {"pattern": ":"}]}
            fits: dict[str, Any] = {"properties": {key: named}}
            if default not in by_name:
                fits["required"] = [key]
            cases.append({"if": {"required": [option]}, "then": fits})
            first, *others = by_name.values()
            if not others:
                more[option] = first
                continue
            more[option] = {}
            for name, schema in by_name.items():  # Each has its own.
                is_it: dict[str, Any] = {"properties": {key: {"const": name}}}
                if name != default:
                    is_it["required"] = [key]
                then = {"properties": {option: schema}}
                cases.append({"if": is_it, "then": then})
    listed = {"propertyNames": {"enum": [*keys, *more]}}
    cases.append({"if": {"not": {"anyOf": is_own}}, "then": listed})
    return {"type": "object", "properties": {**keys, **more}, "allOf": cases}


def _key_schema(rule: Option, meaning: str) -> dict[str, Any]:
    """Return the schema of one key; what no file can hold has no default there."""
    schema = dict(rule.json_schema())
    schema.pop("title", None)
    if meaning:
        schema["description"] = meaning
    if isinstance(rule.default, bool | int | float | str):
        schema["default"] = rule.default
    return schema
