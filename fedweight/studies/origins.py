"""What a run was made of beside its configuration: data, weights, and own code.

A digest of each stands in its ``environment.json``. Whoever goes on with a run, or
holds it against others, asks here whether all are still the same.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import DataError
from ..core.own_code import source_digest
from ..core.texts import listed, plain
from ..models.weights import digest as digest_of_weights
from .configuration import Configuration
from .reader import table_of

log = logging.getLogger("fedweight")

# The table of environment.json, and its key of the data.
MADE_OF = "made_of"
DATA = "data"
WEIGHTS = "model.weights"


def made_of(configuration: Configuration, digest: str) -> dict[str, str]:
    """Return the digests of what a configuration only names, by key.

    Parameters
    ----------
    configuration : Configuration
        Of a run.
    digest : str
        That of its data; empty where others have them.
    """
    found = {DATA: digest, WEIGHTS: ""}
    if weights := configuration["model"]["weights"]:
        found[WEIGHTS] = digest_of_weights(weights)
    for table, keys in configuration.tables.items():
        for key, value in _texts(table, keys):
            found[key] = _of_code(value) or found.get(key, "")
    return {key: one for key, one in found.items() if one}


def _texts(where: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield all texts of a table, however deep, with their dotted keys."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(f"{where}.{key}", inner)


def _of_code(value: str) -> str:
    """Return the digest of what ``"module:name"`` stands for; empty for other texts."""
    name, _, attribute = value.partition(":")
    found = getattr(sys.modules.get(name), attribute, None) if attribute else None
    return "" if found is None else source_digest(found)


def recorded(folder: Path) -> dict[str, str]:
    """Return what a run's folder has of :func:`made_of`; nothing if it is older."""
    try:
        content = json.loads((folder / "environment.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    content = content if isinstance(content, dict) else {}
    older = {WEIGHTS: table_of(content, "model").get("weights-sha256")}
    found = table_of(content, MADE_OF) or {k: v for k, v in older.items() if v}
    return {str(key): str(value) for key, value in found.items()}


def changed(
    before: Mapping[str, str], now: Mapping[str, str], configuration: Configuration
) -> list[str]:
    """Return what is not what it was, in words; what is not known is not told."""
    return [
        called(key, configuration)
        for key, digest in before.items()
        if now.get(key, digest) != digest
    ]


def called(key: str, configuration: Configuration) -> str:
    """Return what a key of :func:`made_of` stands for, in words."""
    if key == DATA:
        table = configuration["data"]
        return f"the data ({plain(table['path'] or table['name'])})"
    if key == WEIGHTS:
        return f"the file of {key} ({plain(configuration['model']['weights'])})"
    texts = {
        k: v for t, keys in configuration.tables.items() for k, v in _texts(t, keys)
    }
    return f"the code of {key} ({plain(texts.get(key, 'not named any more'))})"


def others_in(
    folder: Path, configuration: Configuration, digest: str
) -> list[str] | None:
    """Return what a run's folder was made of that is another now, in words.

    ``None`` where the folder does not say what it was made of.
    """
    before = recorded(folder)
    if not before:
        return None
    return changed(before, made_of(configuration, digest), configuration)


def check_same(folder: Path, configuration: Configuration, digest: str) -> None:
    """Refuse to go on with a run of which something was another.

    Raises
    ------
    DataError
        If it was. What a folder does not say is told, and believed.
    """
    others = others_in(folder, configuration, digest)
    if others is None:
        tell_unknown([str(folder)])
    elif others:
        raise DataError(
            f"{listed(others)} changed since the run in {folder} began. Put back what "
            f"was there; or begin anew: fedweight run {folder / 'config.toml'}"
        )


def tell_unknown(names: list[str]) -> None:
    """Say of which runs nobody knows whether data and code were the same."""
    log.warning(
        "%s: written before runs kept digests of their data and code. Whether these "
        "are still the same is not known",
        listed(names),
    )
