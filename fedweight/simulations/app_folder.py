"""A Flower App as a folder: its ``pyproject.toml``, its two halves, its settings."""

from __future__ import annotations

import importlib
import logging
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from ..core.errors import ConfigurationError, check_choice, closest
from ..core.paths import clean_path, why_unreadable
from ..core.texts import shown
from .grid import RunConfig

log = logging.getLogger("fedweight")

# What Flower's simulation runtime may be told, with the names of its command line; and
# what it takes where it is told nothing.
FEDERATION = {
    "num-supernodes": int,
    "backend": str,
    "client-resources-num-cpus": float,
    "client-resources-num-gpus": float,
    "init-args-num-cpus": int,
    "init-args-num-gpus": int,
    "init-args-logging-level": str,
    "init-args-log-to-driver": bool,
    "verbose": bool,
}
NUM_SUPERNODES = 2

# As Flower reads settings: name=value, the value in quotes where it has blanks.
_PAIR = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")


@dataclass(frozen=True)
class AppFolder:
    """What ``flwr run`` reads of a folder.

    Parameters
    ----------
    path : Path
        The folder, absolute.
    server_app, client_app : str
        Where the two halves are, as ``module:attribute``.
    run_config : Mapping
        ``[tool.flwr.app.config]``, flattened: ``train.rate`` for ``rate`` in a table
        ``train``.
    """

    path: Path
    server_app: str
    client_app: str
    run_config: RunConfig

    @classmethod
    def read(cls, folder: str | Path) -> AppFolder:
        """Read a folder's ``pyproject.toml``.

        Raises
        ------
        ConfigurationError
            Where there is none, or it does not describe a Flower App.
        """
        path = Path(folder).absolute()
        file = path / "pyproject.toml"
        if not file.is_file():
            raise ConfigurationError(
                f"{folder} is not the folder of a Flower App: it has no pyproject.toml."
            )
        try:
            app = tomllib.loads(file.read_text("utf-8"))["tool"]["flwr"]["app"]
            parts = app["components"]
            server_app, client_app = str(parts["serverapp"]), str(parts["clientapp"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            missing = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ConfigurationError(
                f"{file} does not describe a Flower App: {missing}. It needs "
                "'serverapp' and 'clientapp', each 'module:attribute', in "
                "[tool.flwr.app.components]."
            ) from error
        settings = app.get("config", {})
        if not isinstance(settings, Mapping):
            raise ConfigurationError(
                f"{file}: [tool.flwr.app.config] must be a table of settings, got "
                f"{shown(settings)}."
            )
        return cls(path, server_app, client_app, flattened(settings, str(file)))

    def config(self, overrides: Sequence[str] = ()) -> RunConfig:
        """Return the settings with some overridden, as ``flwr run -c`` does.

        Parameters
        ----------
        overrides : Sequence[str]
            ``"key=value other.key='text'"``, or one TOML file.

        Raises
        ------
        ConfigurationError
            For a key that the app does not have.
        """
        given = read_pairs(overrides, "--run-config")
        for name in given:
            if name not in self.run_config:
                raise ConfigurationError(
                    f"the app has no setting {name!r} in [tool.flwr.app.config] of its "
                    f"pyproject.toml.{closest(name, self.run_config)}"
                )
            default = self.run_config[name]
            if not _alike(given[name], default):
                log.warning(
                    "%s is %r, where the app's pyproject.toml has %r: the app gets it "
                    "so, as from Flower.",
                    name,
                    given[name],
                    default,
                )
        return {**self.run_config, **given}

    def load(self) -> tuple[ServerApp, ClientApp]:
        """Import the two halves; modules are found in the folder first.

        Raises
        ------
        ConfigurationError
            Where there is no such module or attribute, or it is something else.
        """
        if str(self.path) not in sys.path:
            sys.path.insert(0, str(self.path))
        server_app = self._load("serverapp", self.server_app, ServerApp)
        return server_app, self._load("clientapp", self.client_app, ClientApp)

    def _load(self, which: str, reference: str, kind: type) -> Any:
        module, _, attributes = reference.partition(":")
        if not (attributes and all(part.isidentifier() for part in module.split("."))):
            raise ConfigurationError(
                f"the {which} of the app is {reference!r}, which must be written "
                "'module:attribute'."
            )
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # What the app itself misses.
            raise ConfigurationError(
                f"the {which} of the app is {reference!r}, but there is no module "
                f"{error.name!r} in {self.path}."
            ) from error
        for name in filter(None, attributes.split(".")):
            found = getattr(found, name, None)
        if not isinstance(found, kind):
            raise ConfigurationError(
                f"the {which} of the app is {reference!r}, which must be a "
                f"{kind.__name__}, got {type(found).__name__}."
            )
        return found


def _alike(value: Any, default: Any) -> bool:
    """Tell whether a setting is of its default's type; a whole number may be real."""
    whole = type(value) is int and type(default) is float
    return whole or type(value) is type(default)


def flattened(table: Mapping[str, Any], where: str, parent: str = "") -> RunConfig:
    """Return a nested table with dotted keys.

    Examples
    --------
    >>> flattened({"train": {"rate": 0.1}, "rounds": 3}, "a file")
    {'train.rate': 0.1, 'rounds': 3}
    """
    result: dict[str, bool | float | int | str] = {}
    for key, value in table.items():
        name = f"{parent}.{key}" if parent else key
        if isinstance(value, Mapping):
            result |= flattened(value, where, name)
        elif isinstance(value, bool | float | int | str):
            result[name] = value
        else:
            raise ConfigurationError(
                f"{where}: {name} must be text, a number or true or false, or a table "
                f"of these, got {value!r}."
            )
    return result


def read_pairs(settings: Sequence[str], option: str) -> dict[str, Any]:
    """Read settings as Flower's command line takes them.

    Parameters
    ----------
    settings : Sequence[str]
        ``"key=value other.key='text'"``, or the name of one TOML file.
    option : str
        Which option they were given to, for a message.

    Examples
    --------
    >>> read_pairs(["rounds=3 train.rate=0.1", "name='my run'"], "--run-config")
    {'rounds': 3, 'train.rate': 0.1, 'name': 'my run'}
    """
    return dict(flattened(read_tables(settings, option), option))


def read_tables(settings: Sequence[str], option: str) -> dict[str, Any]:
    """Read settings like :func:`read_pairs`; dotted keys are tables in tables."""
    if any(text.endswith(".toml") for text in settings):
        if len(settings) > 1:
            raise ConfigurationError(
                f"{option} takes a TOML file or settings, not both: got {settings!r}."
            )
        text = _read(settings[0], option)
    else:
        text = " ".join(settings)
        if _PAIR.sub("", text).strip():
            raise ConfigurationError(
                f"{option} must be written \"key=value other='a text'\", got {text!r}."
            )
        text = "\n".join(f"{key} = {value}" for key, value in _PAIR.findall(text))
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(
            f"{option}: {error}, in {text!r}. Text stands in quotes: key='text'."
        ) from error


def _read(name: str, option: str) -> str:
    """Return what is in a file of settings."""
    file = clean_path(option, name)
    reason = why_unreadable(file)
    if reason is None:
        try:
            return file.read_text("utf-8")
        except (OSError, ValueError) as error:
            reason = str(error)
    raise ConfigurationError(f"{option}: {file} cannot be read: {reason}.")


def read_federation(settings: Sequence[str]) -> dict[str, Any]:
    """Read ``--federation-config`` with the keys of Flower's.

    Examples
    --------
    >>> read_federation(["num-supernodes=10 client-resources-num-cpus=1"])
    {'num-supernodes': 10, 'client-resources-num-cpus': 1}
    """
    given = read_pairs(settings, "--federation-config")
    for name, value in given.items():
        check_choice("a key of --federation-config", name, FEDERATION)
        kind = FEDERATION[name]
        allowed = int | float if kind is float else kind
        if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
            raise ConfigurationError(
                f"{name} of --federation-config must be of type {kind.__name__}, got "
                f"{value!r}."
            )
    return given


def backend_config(federation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what ``run_simulation`` calls ``backend_config``.

    Examples
    --------
    >>> backend_config({"num-supernodes": 3, "client-resources-num-gpus": 0.5})
    {'client_resources': {'num_gpus': 0.5}, 'init_args': {}}
    """
    result: dict[str, dict[str, Any]] = {"client_resources": {}, "init_args": {}}
    for name, value in federation.items():
        for table, own in result.items():
            prefix = f"{table.replace('_', '-')}-"
            if name.startswith(prefix):
                own[name.removeprefix(prefix).replace("-", "_")] = value
    return result


def read_node_config(settings: Sequence[str]) -> dict[int, RunConfig]:
    """Read what clients' ``node_config`` hold besides: ``"0.path='a' 1.path='b'"``.

    Or a TOML file with a table for each client, named by its number.

    Examples
    --------
    >>> read_node_config(["0.path='a' 1.path='b'"])
    {0: {'path': 'a'}, 1: {'path': 'b'}}
    """
    result: dict[int, RunConfig] = {}
    for client, own in read_tables(settings, "--node-config").items():
        if not client.isdigit() or not isinstance(own, Mapping):
            raise ConfigurationError(
                "--node-config has a table for each client's number, such as "
                f"0.path='a', got {client!r}."
            )
        result[int(client)] = flattened(own, f"--node-config of client {client}")
    return result
