"""What a file holds and what a run would say of it, before a run: ``fedweight check``.

A data file is read by the code that reads it for a run. A simulation file is made ready
as for a run, up to the point where a run would make its folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import data
from ..core.errors import ConfigurationError, DataError, FedweightError
from ..core.extras import Imported
from ..core.options import options_of, resolve_options
from ..core.paths import clean_path, readable_file
from ..core.settings import kebab, parse_setting, toml_value
from ..core.texts import listed
from ..core.writing import write_whole
from ..data import DataSet, Examples, FederatedData
from ..data.examples import name_clients
from ..data.files import load_csv, load_npz, load_one, load_one_csv
from ..data.groups import groups_of
from ..data.schema import Schema
from ..data.sources import Source, faults, read_source, read_test
from ..data.tables import Reading, is_numeric
from ..data.tasks import CLASSIFICATION, TASKS

if TYPE_CHECKING:
    import pandas as pd

    from ..clients import TrainingApp
else:
    pd = Imported("pandas", "studies", "a run's folder")

# So many columns and classes are printed; as JSON there are all of them.
PRINTED = 40

# The clients are listed one by one where there are no more of them.
LISTED_CLIENTS = 100_000

# What a file of settings may say of [data] that is not about the file.
NOT_OF_A_FILE = frozenset({"name", "path", "held-out", "proxy", "validation"})


@dataclass
class Checked:
    """What was found in a file.

    Attributes
    ----------
    facts : dict
        Ready for JSON: ``file``, ``kind``, ``rows``, ``columns``, ``classes`` (or
        ``target``, where numbers are predicted),
        ``clients``, ``groups``, ``features``, as far as they are known.
    notes : list of str
        What a user should know, but no run refuses.
    refused : list of str
        Why a run would refuse the file, a line each; the first is what it would say.
    """

    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return {**self.facts, "notes": self.notes, "refused": self.refused}

    def lines(self) -> Iterator[str]:
        """Yield everything as lines of text."""
        facts = self.facts
        about = [facts["kind"]]
        if "rows" in facts:
            about.append(f"{facts['rows']:,} rows")
        if "columns" in facts:
            about.append(f"{len(facts['columns']):,} columns")
        yield f"{facts['file']}: {', '.join(about)}"
        if facts.get("columns"):
            yield ""
            yield from _table(facts["columns"])
            yield ""
        if "classes" in facts:
            counts = facts["classes"]
            label = f"label '{facts['label']}'" if facts.get("label") else "labels"
            shares = [f"{name}: {count:,}" for name, count in counts.items()]
            yield f"{label}: {len(counts):,} classes; {listed(shares, PRINTED)}"
        if "labels" in facts:
            each = [f"{name}: {count:,}" for name, count in facts["labels"].items()]
            yield f"{len(each):,} labels; examples with {listed(each, PRINTED)}"
        if "target" in facts:
            target = facts["target"]
            yield (
                f"{facts.get('label', 'y')}: numbers from {target['from']:g} to "
                f"{target['to']:g}, mean {target['mean']:.3g}, std {target['std']:.3g}"
            )
        if "inputs" in facts:
            yield f"inputs of a model: {facts['inputs']}"
        if "clients" in facts:
            clients = facts["clients"]
            column = f"column '{clients['column']}', " if clients.get("column") else ""
            yield (
                f"clients: {column}{clients['number']:,} clients of "
                f"{clients['smallest']:,} to {clients['largest']:,} examples, median "
                f"{clients['median']:,g}"
            )
        for name, counts in facts.get("groups", {}).items():
            shares = [f"{group}: {count:,}" for group, count in counts.items()]
            yield f"groups by '{name}'; {listed(shares, PRINTED)}"
        for name, value in facts.get("run", {}).items():
            yield f"{name}: {value}"
        for note in self.notes:
            yield f"note: {note}"
        for reason in self.refused:
            yield f"refused: {reason}"
        if not self.refused:
            yield "nothing here would be refused"


def check_file(
    file: str | Path,
    settings: Mapping[str, Any] | Sequence[str] = (),
    *,
    schema: str | Path | None = None,
    write_schema: str | Path | None = None,
) -> Checked:
    """Look at a data file, or at a simulation file, as a run would.

    Parameters
    ----------
    file : str or Path
        A simulation file, ``.toml``; arrays, ``.npz``; or else a CSV file.
    settings : Mapping or sequence of str
        Override keys of a simulation file, or say how a data file is read:
        ``{"data.label": "outcome"}``, or texts, ``["data.label=outcome"]``.
    schema : str or Path, optional
        What another site's ``write_schema`` wrote: the file is read as a node reads
        its own, and must have these columns.
    write_schema : str or Path, optional
        Where to write the file's schema, for other sites; it is read as a node's own.

    Returns
    -------
    Checked
        What was found, and what would be refused.

    Raises
    ------
    ConfigurationError, DataError
        If nothing can be said of the file, or a setting is wrong.

    Examples
    --------
    >>> checked = check_file("simulations/own_data.csv", {"data.label": "diagnosis"})
    >>> checked.facts["classes"], checked.refused
    ({'benign': 357, 'malignant': 212}, [])
    """
    file = clean_path("the file", file)
    if file.suffix.lower() == ".toml":
        if schema is not None or write_schema is not None:
            raise ConfigurationError(
                f"a schema is of one data file, but {file} is a simulation file. Give "
                "the file of data."
            )
        return _check_simulation(file, settings)
    given = dict(_of_data(settings))
    if schema is not None or write_schema is not None:
        return _check_site(file, given, schema, write_schema)
    return _check_npz(file, given) if _is_npz(file) else _check_csv(file, given)


def _of_data(
    settings: Mapping[str, Any] | Sequence[str],
) -> Iterator[tuple[str, Any]]:
    """Yield what settings say of how a data file is read."""
    for setting in settings:
        if isinstance(settings, Mapping):
            (table, _, key), value = setting.partition("."), settings[setting]
        else:
            table, key, value = parse_setting(setting)
        if table != "data":
            raise ConfigurationError(
                f"a data file is read by the keys of [data], got '{table}.{key}'. "
                "Check a simulation file for the others."
            )
        if kebab(key) not in NOT_OF_A_FILE:
            yield key, toml_value(f"data.{key}", value)


def _is_npz(file: Path) -> bool:
    return file.suffix.lower() == ".npz"


def _options(function: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Check options as a simulation file's are, and return them by name in Python."""
    options = {k: o for k, o in options_of(function).items() if k not in _LIBRARY}
    resolve_options("data", options, given)
    return {key.replace("-", "_"): value for key, value in given.items()}


_LIBRARY = frozenset({"path", "seed", "schema"})


# ----------------------------------------------------------------------- data files


def _check_csv(file: Path, given: Mapping[str, Any]) -> Checked:
    options = _options(load_csv, given)
    source = _source(file, options)
    checked = Checked(_described(source))
    checked.facts["kind"] = "CSV"
    test, reading = options.get("test"), _reading(options)
    extra = None if test is None else read_test(source, test, reading)
    told = options.get("classes"), options.get("task", CLASSIFICATION)
    checked.refused += faults(source, extra, *told)
    if not checked.refused:
        _finish(checked, "csv", file, options)
    return checked


def _check_npz(file: Path, given: Mapping[str, Any]) -> Checked:
    options = _options(load_npz, given)
    checked = Checked({"file": str(readable_file(file, "npz")), "kind": "arrays"})
    _finish(checked, "npz", file, options)
    return checked


def _finish(
    checked: Checked, name: str, file: Path, options: Mapping[str, Any]
) -> None:
    """Load the file as a run does, and say what a run is told."""
    try:
        dataset = data.load(name, file, **options)
        federated = data.federate(dataset, "iid", 1, held_out=0.0, proxy=0.0)
    except FedweightError as error:
        checked.refused.append(str(error))
        return
    parts = (dataset.train, dataset.test)
    facts = checked.facts
    facts.setdefault("rows", sum(len(part) for part in parts))
    facts.setdefault("test_rows", len(dataset.test))
    facts |= _predicted(dataset, parts)
    shape = ", ".join(map(str, dataset.input_shape))
    facts["inputs"] = f"[{shape}] of {dataset.train.x.dtype}"
    if dataset.natural_clients is not None and "clients" not in facts:
        sizes = dataset.natural_sizes
        if sizes is None:
            sizes = np.bincount(dataset.natural_clients)
        facts["clients"] = _sizes(sizes, dataset.natural_names)
    checked.notes += data.notes(federated)


def _predicted(
    dataset: DataSet | FederatedData, parts: Sequence[Examples]
) -> dict[str, Any]:
    """Return how many examples are of each class, or how numbers to predict lie."""
    y, task = np.concatenate([part.y for part in parts]), TASKS[dataset.task]
    if task.least_classes:
        counts = task.class_counts(y, dataset.num_classes)
        names = dataset.class_names or map(str, range(dataset.num_classes))
        kind = "classes" if task.has_classes else "labels"
        return {kind: dict(zip(names, counts.tolist(), strict=True))}
    numbers = y.astype(np.float64)
    target = {"from": numbers.min(), "to": numbers.max(), "mean": numbers.mean()}
    target["std"] = numbers.std()
    return {"target": {name: float(value) for name, value in target.items()}}


def _check_site(
    file: Path,
    given: Mapping[str, Any],
    schema: str | Path | None,
    write_schema: str | Path | None,
) -> Checked:
    """Look at a file as a node that trains on it does, or the server of such nodes."""
    options: dict[str, Any] = {}
    checked = Checked({"file": str(file), "kind": "arrays of one site"})
    known = None if schema is None else Schema.of_file(schema)
    if not _is_npz(file):
        # What else [data] says is for other files than a node's.
        options = _options(load_csv, given)
        if known is not None and known.label:
            options.setdefault("label", known.label)
        if options.get("task", CLASSIFICATION) != CLASSIFICATION:
            checked.refused.append(
                f"data.task is '{options['task']}': nodes that have files of their own "
                "train on classes. Set data.task = 'classification'."
            )
            return checked
        checked.facts = _described(_source(file, options))
        checked.facts["kind"] = "CSV of one site"
        taken = options_of(load_one_csv)
        options = {key: value for key, value in options.items() if key in taken}
    try:
        examples, found = load_one(file, known, **options)
    except FedweightError as error:
        checked.refused.append(str(error))
        return checked
    classes = found.classes or tuple(map(str, range(int(examples.y.max()) + 1)))
    counts = np.bincount(examples.y, minlength=len(classes)).tolist()
    checked.facts["rows"] = len(examples)
    checked.facts["classes"] = dict(zip(classes, counts, strict=True))
    checked.facts["inputs"] = f"[{', '.join(map(str, examples.x.shape[1:]))}]"
    if write_schema is not None:
        path = clean_path("--write-schema", write_schema)
        written = Schema(found.source, found.label, classes, found.columns, found.shape)
        write_whole(path, written.write() + "\n")
        checked.facts["schema"] = str(path)
    return checked


def _source(file: str | Path | None, options: Mapping[str, Any]) -> Source:
    return read_source(
        file,
        options.get("label"),
        options.get("client"),
        options.get("sensitive", ()),
        options.get("sensitive_features", True),
        _reading(options),
    )


def _reading(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k in Reading.__annotations__}


def _described(source: Source) -> dict[str, Any]:
    """Return what a CSV file holds, column by column."""
    table = source.table
    facts: dict[str, Any] = {
        "file": str(table.path),
        "kind": "CSV",
        "rows": len(table),
        "dropped_rows": table.dropped_rows,
        "label": ", ".join(source.labels),
        "columns": [_column(source, name) for name in table.columns],
    }
    if table.fault is not None:
        return facts
    if source.client is not None:
        names, numbers = name_clients(table.frame[source.client].to_numpy())
        facts["clients"] = {
            "column": source.client,
            **_sizes(np.bincount(numbers), names),
        }
    facts["groups"] = {}
    for name in source.sensitive:
        values = table.frame[name].to_numpy()
        groups = groups_of(values)
        if groups is not None:  # Of others a remark says that they make none.
            counts = np.unique(values, return_counts=True)[1].tolist()
            facts["groups"][name] = dict(zip(groups, counts, strict=True))
    return facts


def _column(source: Source, name: str) -> dict[str, Any]:
    values = source.table.frame[name]
    roles: dict[str | None, str] = dict.fromkeys(source.labels, "label")
    roles[source.client] = "client"
    role = roles.get(name, "feature" if name in source.features else "")
    if name in source.sensitive:
        role = f"{role}, sensitive" if role else "sensitive"
    known = values.dropna()
    column: dict[str, Any] = {
        "name": name,
        "role": role,
        "type": _kind(values),
        "different": int(known.nunique()),
        "missing": source.table.missing.get(name, 0),
    }
    if not len(known):
        return column
    if pd.api.types.is_bool_dtype(known) or not is_numeric(known):
        usual = known.astype(str).value_counts()
        column |= {"most": str(usual.index[0]), "most_rows": int(usual.iloc[0])}
    else:
        finite = known.to_numpy(np.float64)
        finite = finite[np.isfinite(finite)]
        if not len(finite):
            return column
        with np.errstate(over="ignore", invalid="ignore"):
            std = float(finite.std())
        column |= {"from": float(finite.min()), "to": float(finite.max())}
        column["std"] = std if np.isfinite(std) else None
    return column


def _kind(values: pd.Series[Any]) -> str:
    if pd.api.types.is_bool_dtype(values):
        return "true or false"
    if pd.api.types.is_integer_dtype(values):
        return "whole numbers"
    return "numbers" if is_numeric(values) else "texts"


def _sizes(sizes: npt.NDArray[np.int64], names: Sequence[str]) -> dict[str, Any]:
    clients: dict[str, Any] = {
        "number": len(sizes),
        "smallest": int(sizes.min()),
        "median": float(np.median(sizes[:LISTED_CLIENTS])),
        "largest": int(sizes.max()),
    }
    if len(sizes) <= LISTED_CLIENTS:
        every = names or map(str, range(len(sizes)))
        clients["sizes"] = dict(zip(every, sizes.tolist(), strict=True))
    return clients


def _table(columns: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield columns as lines, one below the other."""
    rows = [("column", "role", "holds", "different", "missing", "values")]
    for column in columns[:PRINTED]:
        if "most" in column:
            values = f"mostly {column['most']!r} ({column['most_rows']:,})"
        elif column.get("from") is not None:
            whole = column["type"] == "whole numbers"
            ends = (column["from"], column["to"])
            values = " to ".join(f"{end:.0f}" if whole else f"{end:g}" for end in ends)
            if column["std"] is not None:
                values += f", std {column['std']:.3g}"
        else:
            values = ""
        rows.append(
            (
                column["name"],
                column["role"],
                column["type"],
                f"{column['different']:,}",
                f"{column['missing']:,}" if column["missing"] else "",
                values,
            )
        )
    texts = [[" ".join(cell.split())[:40] for cell in row] for row in rows]
    widths = [max(len(row[k]) for row in texts) for k in range(len(texts[0]))]
    for row in texts:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield ("  " + "  ".join(cells)).rstrip()
    if len(columns) > PRINTED:
        yield f"  ... and {len(columns) - PRINTED:,} more"


# ------------------------------------------------------------------ simulation files


def _alone_with(client_app: TrainingApp) -> Iterator[str]:
    """Yield why clients train one after another with an objective of one's own."""
    first = client_app.first_context
    for trials in client_app.own_trials:
        kind = trials.kind(first)
        why = "" if kind is None else trials.batched(kind, first)
        if why:
            name = type(trials.objective).__name__
            yield f"objective {name} trains one client after another: {why}"


def _check_simulation(
    file: Path, settings: Mapping[str, Any] | Sequence[str]
) -> Checked:
    """Make a run ready, but for its folder and its measuring, and say what it is."""
    from ..messages.arrays import layout_of
    from .comparing import check_comparison
    from .components import prepare
    from .configuration import Configuration, read_tables
    from .own_strategies import try_own
    from .runner import flat_of, make_ready
    from .tables import COMPARE

    facts: dict[str, Any] = {"file": str(file), "kind": "simulation file"}
    checked = Checked(facts)
    if COMPARE in read_tables(file):
        facts["kind"] = "comparison"
        facts["run"], checked.refused = check_comparison(file, settings)
        return checked
    configuration = Configuration.read(file, settings)
    table = configuration["data"]
    if table["name"] == "csv":
        source = _source(table["path"] or None, configuration.options("data"))
        facts |= _described(source) | {"file": str(file), "kind": facts["kind"]}
    try:
        components = prepare(configuration)
        strategy, client_app, initial = make_ready(components)
        try_own(components, strategy, flat_of(initial))
    except (ConfigurationError, DataError) as error:
        checked.refused.append(str(error))
        return checked
    federated = components.data
    parts = [federated.examples, federated.test]
    if not federated.is_lazy:  # Those are drawn from a set that has the proxy in it.
        parts.append(federated.proxy)
    facts |= _predicted(federated, parts)
    facts["inputs"] = f"[{', '.join(map(str, federated.input_shape))}]"
    facts["clients"] = _sizes(federated.sizes, federated.names)
    facts["run"] = {
        "data": federated.name,
        "partition": configuration["partition"]["name"],
        "model": configuration["model"]["name"],
        "parameters": layout_of(initial).num_parameters,
        "objective": configuration["objective"]["name"],
        "personal": configuration["personal"]["name"],
        "strategy": configuration["strategy"]["name"],
        "rounds": configuration["run"]["rounds"],
        "engine": components.engine(),
        "device": " or ".join(components.devices),
    }
    checked.notes += [*data.notes(federated), *_alone_with(client_app)]
    return checked
