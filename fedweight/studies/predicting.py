"""What a run's model predicts, example by example."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..clients.evaluation import outputs_of
from ..core.errors import ConfigurationError, DataError, check_choice, closest
from ..core.extras import Imported
from ..core.module import FlatModule
from ..core.texts import listed, shown
from ..data import DataSet, FederatedData
from ..data.examples import Examples
from ..metrics import LearningTask
from .configuration import Configuration
from .folder import check_repeats

if TYPE_CHECKING:
    import pandas as pd

    from .components import Components
    from .reader import RunFolder
else:
    pd = Imported("pandas", "studies", "a run's predictions")

Part = Literal["held-out", "train", "test"]

Indices = npt.NDArray[np.int64]


def predictions(
    run: RunFolder,
    part: Part,
    clients: Sequence[int | str] | None,
    model: Mapping[str, Tensor] | None,
    dataset: DataSet | None,
) -> pd.DataFrame:
    """Return what :meth:`fedweight.Run.predictions` returns."""
    check_choice("part", part, ("held-out", "train", "test"))
    components = components_of(run, dataset)
    module = _with(components, run.model() if model is None else model)
    task = components.task
    frames = [
        _frame(
            task,
            client,
            examples,
            rows,
            outputs_of(module, examples),
            components.data.attribute_names,
        )
        for client, examples, rows in _parts(components, part, clients)
        if len(examples)
    ]
    if not frames:
        raise DataError(f"{run.folder}: there are no examples of part '{part}'.")
    found = pd.concat(frames, ignore_index=True)
    data = components.data
    if part != "test" and data.names:
        found.insert(1, "name", found["client"].map(data.name_of))
    return found


def components_of(run: RunFolder, dataset: DataSet | None) -> Components:
    """Return a run's parts, its data loaded and divided as it did it."""
    from .components import prepare

    config = run.folder / "config.toml"
    if dataset is None:
        check_repeats(config)
    name = None if dataset is None else dataset.name
    return prepare(Configuration.read(config, data=name), dataset)


def _named(values: Any, names: tuple[str, ...] | None) -> Any:
    """Return what an attribute's codes stand for, or its values as they are."""
    if names is None or not np.isin(values, np.arange(len(names))).all():
        return values
    codes: npt.NDArray[np.int64] = values.astype(np.int64)
    return pd.Categorical.from_codes(codes, categories=pd.Index(names))


def _with(components: Components, model: Mapping[str, Tensor]) -> FlatModule:
    """Return the run's architecture with a model's values."""
    module = components.make_model()
    expected = module.state_dict()
    odd = [n for n in expected if n not in model or model[n].shape != expected[n].shape]
    odd += [name for name in model if name not in expected]
    if odd:
        raise DataError(
            f"model: {listed(odd)} is not as the run's own model has it. Give what "
            "model(), best_model() or one of models() returns."
        )
    module.load_state_dict(dict(model))
    return FlatModule(module, "cpu")


def _parts(
    components: Components, part: Part, clients: Sequence[int | str] | None
) -> Iterable[tuple[int | None, Examples, Indices | None]]:
    """Yield the examples of each client, and which rows of a file they are."""
    data = components.data
    if part == "test":
        yield None, data.test, data.test_file_rows
        return
    for client in _numbers(data, clients):
        own, rows = data.client(client), data.file_rows(client)
        held_out = part == "held-out"
        examples = own.held_out if held_out else own.train
        yield client, examples, None if rows is None else rows[held_out]


def _numbers(data: FederatedData, clients: Any) -> Iterable[int]:
    """Return the numbers of clients that are given by number or name."""
    if clients is None:
        return range(data.num_clients)
    allowed = f"numbers from 0 to {data.num_clients - 1}" + " or names" * bool(
        data.names
    )
    if isinstance(clients, str) or not isinstance(clients, Iterable):
        raise ConfigurationError(
            f"clients must be a list of {allowed}, got {shown(clients)}. Of one client "
            f"give [{clients!r}]."
        )
    by_name = {name: client for client, name in enumerate(data.names)}
    found = []
    for client in clients:
        number = by_name.get(client, -1) if isinstance(client, str) else client
        if number not in range(data.num_clients):
            raise ConfigurationError(
                f"clients must be a list of {allowed}, got {shown(client)}."
                f"{closest(client, by_name) if isinstance(client, str) else ''}"
            )
        found.append(int(number))
    return found


def _frame(
    task: LearningTask,
    client: int | None,
    examples: Examples,
    file_rows: Indices | None,
    outputs: Tensor,
    names: Mapping[str, tuple[str, ...]],
) -> pd.DataFrame:
    """Return a client's examples as rows."""
    y = torch.from_numpy(np.ascontiguousarray(examples.y))
    columns: dict[str, Any] = {
        "client": pd.array([client] * len(y), dtype="Int64"),
        "row": np.arange(len(y)),
    }
    columns |= {} if file_rows is None else {"file_row": file_rows}
    decided, scores = task.decided(outputs), task.scores(outputs)
    if y.ndim == 1:
        columns |= {"target": y.numpy(), "prediction": decided.numpy()}
    elif y.ndim == 2:
        of = {"target": y, "prediction": decided}
        columns |= {
            f"{name}_{k}": values[:, k].numpy()
            for name, values in of.items()
            for k in range(y.shape[1])
        }
    else:
        hits = task.example_hits(outputs, y)
        columns |= {"accuracy": hits.numpy()}
    if scores is not None:
        columns |= {f"score_{k}": s.numpy() for k, s in enumerate(scores.unbind(1))}
    for attribute, values in examples.attributes.items():
        if values.ndim == 1:
            taken = attribute in columns or attribute == "name"
            column = f"attribute_{attribute}" if taken else attribute
            columns[column] = _named(values, names.get(attribute))
    return pd.DataFrame(columns)
