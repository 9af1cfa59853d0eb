"""What a comparison compares: strategies, objectives and data sets, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import ConfigurationError
from ..core.options import options_of
from ..core.settings import kebab, kebab_key, parse_setting
from ..core.texts import NAME_LENGTH, plain, shown
from .given import as_settings, whole_tables
from .tables import MOST_SEED, PICKS, SCHEMA, options_in_file

_MORE_KEYS = {
    "strategies": "strategy",
    "objectives": "objective",
    "data-sets": "data",
}


# Other values of these tables make other data; of all others, another method.
OF_DATA = ("data", "partition")


@dataclass(frozen=True)
class Method:
    """One of the things that are compared.

    Attributes
    ----------
    label : str
        What tables call it: its name, and the options that are not the defaults.
    settings : Mapping[str, Any]
        The keys of a simulation file that make it.
    whole : tuple of str
        The tables that the settings say all of.
    """

    label: str
    settings: Mapping[str, Any]
    whole: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """What the folders of its runs begin with.

        Examples
        --------
        >>> Method("feddisco:a=0.2+proximal", {}).folder
        'feddisco-a=0.2+proximal'
        """
        return re.sub(r"[^\w.=+-]+", "-", self.label)


def methods_of(strategies: Any, objectives: Any = ()) -> list[Method]:
    """Return what is compared: every strategy, with every objective if any are given.

    Parameters
    ----------
    strategies, objectives : str or list
        Names, classes or made objects; a text may hold several, separated by commas,
        and options: ``"fedavg,feddisco:a=0.2:b=0.1"``. Strategies may be a mapping, by
        what they are to be called: of settings each, of any table but the data's.

    Raises
    ------
    ConfigurationError
        If there is none, one is there twice, or no file could say it.

    Examples
    --------
    >>> [one.label for one in methods_of("fedavg, feddisco:a=0.2:b=0.1")]
    ['fedavg', 'feddisco:a=0.2']
    >>> focal = {"strategy.name": "fedavg", "objective.name": "focal"}
    >>> [one.label for one in methods_of({"my focal": focal})]
    ['my focal']
    """
    if isinstance(strategies, Mapping):
        rules = _of_tables("strategies", strategies, "strategy.name = 'fedavg'")
        for one in rules:
            where = f"strategies.{one.label}"
            own = [k for k in one.settings if k != "strategy.name"]
            refuse_taken(where, own, bool(objectives))
            for key in own:
                if key.partition(".")[0] in OF_DATA:
                    raise ConfigurationError(
                        f"{where}: {key} says what the data are, on which all are "
                        "compared. Say it in data-sets."
                    )
    else:
        rules = _chosen("strategies", strategies)
    if not rules:
        raise ConfigurationError(
            "strategies must name one or more, such as 'fedavg,feddisco', got "
            f"{shown(strategies)}. 'fedweight list' shows all."
        )
    losses = _chosen("objectives", objectives)
    found = times(rules, losses) or rules
    refuse_twins("strategies", found)
    return found


def data_sets_of(data_sets: Any) -> list[Method]:
    """Return the data sets that a text, a list or a mapping of settings names.

    One without a label where nothing is given: what the file says.

    Examples
    --------
    >>> [one.label for one in data_sets_of("digits,csv:path=own.csv:label=y")]
    ['digits', 'csv:path=own.csv:label=y']
    """
    if isinstance(data_sets, Mapping):
        found = _of_tables("data-sets", data_sets, "data.name = 'adult'")
        for one in found:
            refuse_taken(f"data-sets.{one.label}", one.settings, objectives=True)
    else:
        found = _chosen("data-sets", data_sets)
    refuse_twins("data-sets", found)
    return found or [Method("", {})]


def _of_tables(key: str, given: Mapping[str, Any], such_as: str) -> list[Method]:
    """Return what a mapping calls each table of settings."""
    found = []
    for name, settings in given.items():
        label = plain(name, NAME_LENGTH)
        if not isinstance(settings, Mapping) or not settings:
            raise ConfigurationError(
                f"{key}.{label} must be a table of settings, such as {such_as}, got "
                f"{shown(settings)}."
            )
        given = flat(settings)
        dotted = {kebab_key(k): v for k, v in as_settings(given).items()}
        found.append(Method(label, dotted, tuple(whole_tables(given))))
    return found


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys, also where TOML has nested them: ``data.name = "adult"``."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and key in SCHEMA:
            found |= {f"{key}.{own}": one for own, one in value.items()}
        else:
            found[key] = value
    return found


def refuse_taken(where: str, keys: Iterable[str], objectives: bool) -> None:
    """Refuse keys of a simulation file that a comparison's own arguments say.

    Raises
    ------
    ConfigurationError
        If there is one.
    """
    taken = {"run.seed": "seeds", "strategy.name": "strategies"}
    taken |= {"objective.name": "objectives"} if objectives else {}
    for key in keys:
        if key in taken:
            raise ConfigurationError(
                f"{where}: {key} is what {taken[key]} say. Leave it out."
            )


def joined(*several: Method) -> Method:
    """Return choices as one; of equal settings the last one's holds.

    Examples
    --------
    >>> joined(Method("ida", {"strategy.name": "ida"}), Method("", {})).label
    'ida'
    """
    return Method(
        "+".join(one.label for one in several if one.label),
        {key: value for one in several for key, value in one.settings.items()},
        tuple(table for one in several for table in one.whole),
    )


def times(first: Iterable[Method], second: Iterable[Method]) -> list[Method]:
    """Return every one of the first with every one of the second."""
    second = list(second)
    return [joined(a, b) for a in first for b in second]


def refuse_twins(what: str, several: Iterable[Method]) -> None:
    """Refuse choices that have the same name, as a label or as a folder."""
    for kind in ("label", "folder"):
        seen: set[str] = set()
        for one in several:
            name = getattr(one, kind)
            if name in seen:
                raise ConfigurationError(
                    f"{what}: '{one.label}' is there twice. Keep one, or give them "
                    "options that differ: 'feddisco:a=0.2'."
                )
            seen.add(name)


def seeds_of(seeds: Any) -> list[int]:
    """Return the seeds that a list or a text such as ``"0,1,2"`` or ``"0-9"`` names.

    Examples
    --------
    >>> seeds_of("0,3-5"), seeds_of(range(2))
    ([0, 3, 4, 5], [0, 1])
    """
    advice = "Give whole numbers from 0, such as 0,1,2 or 0-9."
    if isinstance(seeds, str):
        found: list[int] = []
        for part in seeds.split(","):
            match = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", part, re.ASCII)
            if not match:
                raise ConfigurationError(f"seeds: got {shown(part)}. {advice}")
            first, last = int(match[1]), int(match[2] or match[1])
            if not first <= last < first + 10_000:
                raise ConfigurationError(
                    f"seeds: {shown(part)} is no range of 1 to 10,000 seeds. {advice}"
                )
            found += range(first, last + 1)
    else:
        several = list(seeds) if isinstance(seeds, Iterable) else [seeds]
        for seed in several:
            whole = hasattr(seed, "__index__") and not isinstance(seed, bool)
            if not whole or not 0 <= int(seed) <= MOST_SEED:
                raise ConfigurationError(f"seeds: got {shown(seed)}. {advice}")
        found = [int(seed) for seed in several]
    if not found:
        raise ConfigurationError(f"seeds must be one or more, got none. {advice}")
    twice = [seed for seed in found if found.count(seed) > 1]
    if twice:
        raise ConfigurationError(
            f"seeds: {twice[0]} is there twice. The same seed gives the same run, "
            "which is no evidence: keep one."
        )
    return found


def _chosen(key: str, given: Any) -> list[Method]:
    several = given if isinstance(given, list | tuple) else [given]
    found: list[Method] = []
    for one in several:
        if isinstance(one, str):
            found += [_of_text(key, part) for part in parts(one)]
        else:
            table = _MORE_KEYS[key]
            settings = {table: one}
            found.append(
                _labelled(table, as_settings(settings), tuple(whole_tables(settings)))
            )
    return found


def parts(text: str) -> list[str]:
    """Split at commas, but not those of a list or a table."""
    found = re.findall(r"(?:[^,\[{]|\[[^\]]*\]?|\{[^}]*\}?)+", text)
    return [part.strip() for part in found if part.strip()]


def _of_text(key: str, text: str) -> Method:
    """Read ``name:option=value:option=value``; a name may be ``module:name``."""
    table = _MORE_KEYS[key]
    pieces = text.split(":")
    first = next((k for k, piece in enumerate(pieces) if "=" in piece), len(pieces))
    name, options = ":".join(pieces[:first]).strip(), pieces[first:]
    bad = [piece for piece in options if "=" not in piece]
    if bad or not name:
        raise ConfigurationError(
            f"{key}: got {shown(text)}. Write a name, and options behind it: "
            "feddisco:a=0.2:b=0.1."
        )
    settings: dict[str, Any] = {f"{table}.name": name}
    for option in options:
        _, own, value = parse_setting(f"{table}.{option.strip()}")
        settings[f"{table}.{kebab(own)}"] = value
    return _labelled(table, settings)


def _labelled(
    table: str, settings: Mapping[str, Any], whole: tuple[str, ...] = ()
) -> Method:
    """Name a choice: what it is, and its options that are not the defaults."""
    name = str(settings[f"{table}.name"])
    options = options_in_file(table, name)
    if whole:  # A made object has its class's defaults, not those of a file.
        made = options_of(PICKS[table].registry.resolve(name))
        options = {k: o.in_file if o.by_name else o for k, o in made.items()}
    known = {kebab(k): o for k, o in options.items()}
    words = [plain(name.rsplit(":", 1)[-1].lower(), NAME_LENGTH)]
    for dotted, value in settings.items():
        key = kebab(dotted.removeprefix(f"{table}."))
        if key != "name" and not (key in known and known[key].default == value):
            words.append(f"{key}={plain(_short(value), NAME_LENGTH)}")
    return Method(":".join(words), settings, whole)


def _short(value: Any) -> Any:
    """Return a table as ``name(option=value)``; what is none is returned as it is."""
    if not isinstance(value, Mapping):
        return value
    own = ",".join(f"{k}={_short(v)}" for k, v in value.items() if k != "name")
    return f"{value.get('name', '')}({own})" if own else value.get("name", "")
