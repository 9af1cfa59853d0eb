"""Groups of sensitive attributes in a run: what is asked for, and their table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.errors import ConfigurationError, closest
from ..core.records import RoundRecord
from ..core.settings import names_of
from ..core.texts import NAME_LENGTH, listed, own_name, plain, shown
from ..data import FederatedData
from ..data.groups import check_groups
from ..metrics import Groups, Sums
from .configuration import Configuration
from .folder import Table
from .tables import SCHEMA

GROUP_COLUMNS = (
    "round",
    "part",
    "client",
    "name",  # only where some client has one
    "attribute",
    "group",
    "examples",
    "accuracy",
    "positives",
    "selection_rate",
    "tpr",
    "fpr",
    "loss",
)

# Those that are there only where there is such a thing.
_OPTIONAL = frozenset({"name", "accuracy", "positives", "selection_rate", "tpr", "fpr"})


def groups_asked(configuration: Configuration, data: FederatedData) -> Groups | None:
    """Return by which groups a configuration has data measured, if by any.

    Raises
    ------
    ConfigurationError, DataError
        If that cannot be.
    """
    table = configuration["groups"]
    asked, key = list(table["attributes"]), "groups.attributes"
    if not asked:
        named = configuration.options("data").get("sensitive") or ()
        named = names_of(named, data.examples.attributes)
        # What is no group is said where the file is read.
        asked, key = [n for n in named if n in data.attribute_names], "data.sensitive"
    asked = list(dict.fromkeys(asked))
    if not asked:
        given = [k for k in table if table[k] != SCHEMA["groups"][k].default]
        if given:
            raise ConfigurationError(
                f"groups.{given[0]} is {shown(table[given[0]])}, but groups.attributes "
                "names no sensitive attribute. Name some, or leave it out."
            )
        return None
    for name in asked:
        check_groups(key, data, name)
    if table["intersections"] and len(asked) < 2:
        raise ConfigurationError(
            f"groups.intersections crosses two attributes, and only '{asked[0]}' is "
            "named. Name another one in groups.attributes, or leave it out."
        )
    return Groups(
        {name: data.attribute_names[name] for name in asked},
        table["intersections"],
        table["min-size"],
        _positive(table["positive"], data),
    )


def flips_asked(configuration: Configuration) -> dict[str, Any] | None:
    """Return how labels are flipped, as ``fedweight.data.federate`` takes it.

    Raises
    ------
    ConfigurationError
        If a part of it is said and another one is not.
    """
    table = configuration["bias"]
    if not table["flip-rates"]:
        if table["attribute"] or table["strength"]:
            raise ConfigurationError(
                "[bias] flips labels, and has no flip-rates. Set flip-rates = [0.3] "
                'for all examples; attribute = "sex" and flip-rates = [0.3, 0.0] by '
                "group; or nothing of it."
            )
        return None
    return {
        "attribute": table["attribute"],
        "rates": table["flip-rates"],
        "strength": table["strength"],
    }


def _positive(given: str | int, data: FederatedData) -> int | None:
    """Return the number of the class that a text names, or a text or number counts."""
    text = str(given)
    names = data.class_names or tuple(map(str, range(data.num_classes)))
    if not text:
        return None
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < data.num_classes:
        return int(text)
    raise ConfigurationError(
        f"groups.positive: data '{data.name}' have no class {shown(text)}."
        f"{closest(text, names)} They have {listed(names, most=9) or 'none'}."
    )


def group_table(folder: Path) -> Table:
    """Return a run's ``groups.csv``."""
    return Table(folder / "groups.csv", GROUP_COLUMNS, _OPTIONAL)


def group_rows(
    groups: Groups, record: RoundRecord, tested: Sums | None
) -> list[dict[str, Any]]:
    """Return the rows of a round: of all clients together, of each, of the test data.

    Parameters
    ----------
    groups : Groups
        By which is measured.
    record : RoundRecord
        Of the round, with what clients told.
    tested : Sums, optional
        What was added up on the server's test data.
    """
    rows: list[dict[str, Any]] = []
    if record.by_group is not None:
        clients, sums = record.by_group
        names = {c.client: plain(c.name, NAME_LENGTH) for c in record.clients}
        base = {"round": record.number, "part": "held-out"}
        rows += [base | row for _, row in groups.rows(sums.total(), absent=True)]
        for place, row in groups.rows(sums):
            client = clients[place]
            name = own_name(client, names.get(client, ""))
            called = {"name": name} if name else {}
            rows.append({**base, "client": client, **called, **row})
    if tested is not None:
        base = {"round": record.number, "part": "test"}
        rows += [base | row for _, row in groups.rows(tested, absent=True)]
    return rows
